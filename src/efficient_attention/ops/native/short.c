/* Efficient attention of short inputs: each head at once, from its queries, keys and values to its output.
 *
 * Keys and queries are one chunk each, so that neither contexts nor sums of chunks are in memory.
 */
#include "passes.h"

/* Sizes and strides; keys and queries differ in their positions alone. As in native_calls.py. */
typedef struct {
    Problem keys, queries;
    View query, key, value, mask, output; /* without their memory */
    int64_t quadratic;                    /* (rho_q(Q) rho_k(K)^T) V, for keys of one block */
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

static void linear(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Partial context = take_partial(&scratch, call);
    const Block sums = context.sums;
    pass_over_keys(call, batch, head, chunk, context, scratch);
    divisors(call, batch, head, context.total, sums.rows);
    for (int64_t c = 0; c < sums.rows; c++) {
        const vec by = SPLAT(1.0f / context.total[c]);
        for (int64_t e = 0; e < sums.columns; e += LANES)
            STORE(row_of(sums, c) + e, LOAD(row_of(sums, c) + e) * by);
    }
    pass_over_queries(call->then, batch, head, chunk, sums, scratch);
}

INLINE int64_t linear_floats(const Call *call) {
    const int64_t of_keys = keys_floats(call->p) + partial_floats(call), of_queries = queries_floats(call->then->p);
    return partial_floats(call) + (of_keys > of_queries ? of_keys : of_queries);
}

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
    const Partial weights = {{NULL, width, 0}, shift.data, total.data};
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

/* rho_q(Q) rho_k(K)^T V [batch, heads, N, Dv]. */
int efficient_attention(const Short *s, char *query, char *key, char *value, char *mask, char *output) {
    Call queries = {.p = &s->queries, .query = s->query, .output = s->output};
    queries.query.data = query, queries.output.data = output;
    Call call = {.p = &s->keys, .chunks = 1, .parts = 1, .key = s->key, .value = s->value, .mask = s->mask};
    call.key.data = key, call.value.data = value, call.mask.data = mask, call.then = &queries;
    if (s->quadratic) return for_chunks(&call, quadratic, quadratic_floats(&s->keys));
    return for_chunks(&call, linear, linear_floats(&call));
}
