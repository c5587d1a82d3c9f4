/* Efficient attention of short inputs: each head at once, from its queries, keys and values to its output, or from the
 * gradient of that to theirs.
 *
 * Keys and queries are one chunk each, so that neither contexts nor sums of chunks are in memory.
 */
#include "passes.h"

/* Sizes and strides; keys and queries differ in their positions alone. As in native_short.py. */
typedef struct {
    Problem keys, queries;
    View query, key, value, mask, output, d_query, d_key, d_value; /* without their memory; output: or its gradient */
    int64_t quadratic; /* (rho_q(Q) rho_k(K)^T) V, for keys of one block */
} Short;

/* What keys are divided by: their sums, or how many there are; where nothing has any weight, 1. */
static void divisors(const Call *call, int64_t batch, int64_t head, float *total, int64_t width) {
    const Matrix mask = mask_of(&call->mask, batch, head);
    int64_t count = mask.data ? 0 : call->p->positions;
    for (int64_t n = 0; mask.data && n < call->p->positions; n++) count += mask.data[n * mask.down] != 0;
    for (int64_t c = 0; c < width; c += LANES) {
        const vec x = call->p->softmax ? LOAD(total + c) : SPLAT((float)count);
        STORE(total + c, MAX(x, SPLAT(1.0f)));
    }
}

/* The means of a head's values, relative to shift and total. */
static void summarize_head(const Call *call, int64_t batch, int64_t head, Partial context, float *scratch) {
    const Block sums = context.sums;
    over_keys(call, batch, head, 0, context, scratch);
    divisors(call, batch, head, context.total, sums.rows);
    for (int64_t c = 0; c < sums.rows; c++) {
        const vec by = SPLAT(1.0f / context.total[c]);
        for (int64_t e = 0; e < sums.columns; e += LANES)
            STORE(row_of(sums, c) + e, LOAD(row_of(sums, c) + e) * by);
    }
}

INLINE int64_t summarize_head_floats(const Call *call) { return over_keys_floats(call->p) + partial_floats(call); }

static void linear(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Partial context = take_partial(&scratch, call);
    summarize_head(call, batch, head, context, scratch);
    over_queries(call->then, batch, head, chunk, context.sums, scratch);
}

INLINE int64_t linear_floats(const Call *call) {
    return partial_floats(call) + larger(summarize_head_floats(call), over_queries_floats(call->then->p));
}

/* The quadratic order; the keys are one block. */
static void quadratic(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix key = head_of(&call->key, batch, head, p->key_channels, p);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix query = head_of(&then->query, batch, head, p->key_channels, then->p);
    const Matrix output = head_of(&then->output, batch, head, p->value_channels, then->p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const int pairs = in_pairs(p);
    const Span all = block_in(p, chunk, 0);
    const int64_t rows = filled(all);
    const Block keys = take(&scratch, rows, width), values = take(&scratch, rows, columns);
    const Block shift = take(&scratch, 1, width), total = take(&scratch, 1, width);
    const Partial weights = {{keys.data, width, 0}, shift.data, total.data};
    clear(weights, p->softmax);
    load(keys, rows_in(key, all), nothing);
    silence(keys, mask, all, nothing);
    if (p->softmax) {
        raise_shift(weights, keys);
        weigh(keys, shift.data, total.data, 0);
    }
    divisors(call, batch, head, total.data, width);
    for (int64_t c = 0; c < width; c += LANES) {
        const vec by = SPLAT(1.0f) / LOAD(total.data + c);
        for (int64_t r = 0; r < rows; r++) STORE(row_of(keys, r) + c, LOAD(row_of(keys, r) + c) * by);
    }
    const Left left = over_columns(keys, take(&scratch, rows, width), pairs);
    const Block right = load_silenced(values, take(&scratch, rows, columns), value, mask, all, pairs);
    Block queries = take(&scratch, width, BLOCK), query_words = take(&scratch, width, BLOCK);
    Block products = take(&scratch, rows, BLOCK), product_words = take(&scratch, rows, BLOCK);
    const Block strip = take(&scratch, ROWS, columns > BLOCK ? columns : BLOCK);
    Span n;
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        queries.columns = query_words.columns = products.columns = product_words.columns = filled(n);
        load(queries, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(queries, p->key_channels, p->groups);
        multiply(pairs, left, over_rows(queries, query_words, pairs), width, products);
        const Block scores = over_rows(products, product_words, pairs);
        write_product(pairs, scores, right, rows, (Matrix){0}, output, n, strip, 0, query);
    }
}

INLINE int64_t quadratic_floats(const Problem *p) {
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    return BLOCK * (4 * width + 2 * columns + 2 * BLOCK) + 2 * width + ROWS * (BLOCK + columns);
}

/* Gradients by the linear order; the context is computed again rather than kept. */
static void backward(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Partial context = take_partial(&scratch, call), wanted = take_partial(&scratch, call);
    const int of_keys = call->d_key.data || call->d_value.data;
    const Partial d_mean = of_keys ? wanted : (Partial){0};
    summarize_head(call, batch, head, context, scratch);
    back_over_queries(call->then, batch, head, chunk, context.sums, d_mean, scratch);
    if (!of_keys) return;
    float *correction = d_mean.total;
    for (int64_t c = 0; c < context.sums.rows; c++) {
        const vec by = SPLAT(1.0f / context.total[c]);
        vec product = SPLAT(0.0f);
        for (int64_t e = 0; e < context.sums.columns; e += LANES) {
            float *d = row_of(d_mean.sums, c) + e;
            STORE(d, LOAD(d) * by);
            product = FMA(LOAD(d), LOAD(row_of(context.sums, c) + e), product);
        }
        correction[c] = 0.0f;
        for (int i = 0; i < LANES; i++) correction[c] += product[i];
    }
    back_over_keys(call, batch, head, chunk, d_mean.sums, context.shift, correction, scratch);
}

INLINE int64_t backward_floats(const Call *call) {
    const int64_t over_queries = back_over_queries_floats(call->then->p) + partial_floats(call);
    const int64_t longest = larger(over_queries, back_over_keys_floats(call->p));
    return 2 * partial_floats(call) + larger(longest, summarize_head_floats(call));
}

/* rho_q(Q) rho_k(K)^T V [batch, heads, N, Dv]. */
int efficient_attention(const Short *s, char *query, char *key, char *value, char *mask, char *output) {
    Call queries = {.p = &s->queries, .parts = 1, .query = s->query, .output = s->output};
    queries.query.data = query, queries.output.data = output;
    Call call = {.p = &s->keys, .chunks = 1, .parts = 1, .key = s->key, .value = s->value, .mask = s->mask};
    call.key.data = key, call.value.data = value, call.mask.data = mask;
    call.heads = all_heads(&s->keys), call.then = &queries;
    if (s->quadratic) return for_chunks(&call, quadratic, quadratic_floats(&s->keys));
    return for_chunks(&call, linear, linear_floats(&call));
}

/* Its gradients, laid out as the inputs are, and with respect to those for which there is memory. */
int efficient_attention_backward(const Short *s, char *query, char *key, char *value, char *mask, char *d_output,
                                 char *d_query, char *d_key, char *d_value) {
    Call queries = {.p = &s->queries, .parts = 1, .query = s->query, .d_output = s->output, .d_query = s->d_query};
    queries.query.data = query, queries.d_output.data = d_output, queries.d_query.data = d_query;
    Call call = {.p = &s->keys, .chunks = 1, .parts = 1, .key = s->key, .value = s->value, .mask = s->mask};
    call.d_key = s->d_key, call.d_value = s->d_value;
    call.key.data = key, call.value.data = value, call.mask.data = mask;
    call.heads = all_heads(&s->keys), call.then = &queries;
    call.d_key.data = d_key, call.d_value.data = d_value;
    return for_chunks(&call, backward, backward_floats(&call));
}
