/* Efficient attention of short inputs in one call: each head at once, from its queries, keys and values to its output,
 * or from the gradient of that to theirs, so that contexts and sums of chunks stay in the cache. Where that would leave
 * threads without work, all work on chunks of the same heads. What is added, and in which order, is the same.
 */
#include "passes.h"

/* Sizes and strides; keys and queries differ in their positions alone. As in native_short.py. */
typedef struct {
    Problem keys, queries;
    View query, key, value, mask, output, d_query, d_key, d_value; /* without their memory; output: or its gradient */
    int64_t quadratic; /* (rho_q(Q) rho_k(K)^T) V, for keys of one block */
} Short;

/* What is done for a head, in pieces that do not depend on each other. */
typedef struct {
    Work work;
    int64_t pieces;
} Step;

/* Steps one after another; `floats` is the memory in which a head leaves what later steps take. */
typedef struct {
    const Call *call;
    const Step *steps;
    int64_t count, floats;
    float *memory; /* of all heads, where they are not each of one thread */
} Steps;

/* All steps of one head. */
static void whole_head(const void *what, int64_t i, float *scratch) {
    const Steps *steps = what;
    const int64_t heads = steps->call->p->heads;
    Call call = *steps->call;
    call.partials = scratch;
    for (const Step *step = steps->steps; step < steps->steps + steps->count; step++)
        for (int64_t piece = 0; piece < step->pieces; piece++)
            step->work(&call, i / heads, i % heads, piece, scratch + steps->floats);
}

/* A piece of the only step, of one of the heads. */
static void piece_of_head(const void *what, int64_t i, float *scratch) {
    const Steps *steps = what;
    const int64_t pieces = steps->steps->pieces, head = i / pieces, heads = steps->call->p->heads;
    Call call = *steps->call;
    call.partials = steps->memory + head * steps->floats;
    steps->steps->work(&call, head / heads, head % heads, i % pieces, scratch);
}

/* At most so many numbers are in memory for the sums of heads that threads share. */
enum { MOST_SHARED = 4 << 20 };

static int for_steps(const Call *call, const Step *steps, int64_t count, int64_t floats, int64_t scratch_floats) {
    const int64_t heads = all_heads(call->p).count, chunks = larger(call->chunks, call->then->chunks);
    const int threads = call->p->threads;
    const int busy = heads % threads == 0 || heads >= 4 * threads;
    if (busy || chunks == 1 || heads * floats > MOST_SHARED) {
        const Steps all = {call, steps, count, floats, NULL};
        return for_each(heads, threads, whole_head, &all, floats + scratch_floats);
    }
    float *memory = memory_for(heads * floats);
    int failed = !memory;
    for (int64_t i = 0; i < count && !failed; i++) {
        const Steps one = {call, steps + i, 1, floats, memory};
        failed = for_each(heads * steps[i].pieces, threads, piece_of_head, &one, scratch_floats);
    }
    free(memory);
    return failed;
}

/* The sums of a chunk of the keys, of which the first come to the context; and behind them those of the queries, which
 * come to its gradient. */
INLINE Partial sums_of_keys(const Call *call, int64_t chunk) {
    float *data = call->partials + chunk * partial_floats(call);
    return take_partial(&data, call);
}

INLINE Partial sums_of_queries(const Call *call, int64_t chunk) { return sums_of_keys(call, call->chunks + chunk); }

static void summarize_piece(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    over_keys(call, batch, head, chunk, sums_of_keys(call, chunk), scratch);
}

/* LANES rows of sums come to those of the first, as a balanced tree. */
INLINE Partial add_up(const Call *call, Partial (*sums_of)(const Call *call, int64_t chunk), int64_t chunks,
                      int64_t slice) {
    const int64_t first = slice * LANES;
    for (int64_t apart = 1; apart < chunks; apart *= 2)
        for (int64_t a = 0; a + apart < chunks; a += 2 * apart)
            merge(part_of(sums_of(call, a), first, LANES), part_of(sums_of(call, a + apart), first, LANES));
    return part_of(sums_of(call, 0), first, LANES);
}

/* What LANES rows are divided by: the sums of their weights, or how many keys there are; where none has any, 1. */
INLINE vec divisors(const Call *call, int64_t batch, int64_t head, vec total) {
    const Problem *p = call->p;
    if (!p->softmax) total = SPLAT((float)attended(mask_of(&call->mask, batch, head), p->positions));
    return MAX(total, SPLAT(1.0f));
}

/* Rows of the context: means of the values. */
static void mean_piece(const Call *call, int64_t batch, int64_t head, int64_t slice, float *scratch) {
    const Partial context = add_up(call, sums_of_keys, call->chunks, slice);
    (void)scratch;
    STORE(context.total, divisors(call, batch, head, LOAD(context.total)));
    for (int64_t c = 0; c < LANES; c++) {
        const vec by = SPLAT(1.0f / context.total[c]);
        for (int64_t e = 0; e < context.sums.columns; e += LANES)
            STORE(row_of(context.sums, c) + e, LOAD(row_of(context.sums, c) + e) * by);
    }
}

static void attend_piece(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    over_queries(call->then, batch, head, chunk, sums_of_keys(call, 0).sums, scratch);
}

static int linear(const Call *call) {
    const int64_t chunks = call->chunks, slices = padded(call->p->key_channels) / LANES;
    const Step steps[] = {{summarize_piece, chunks}, {mean_piece, slices}, {attend_piece, call->then->chunks}};
    const int64_t run = partial_floats(call), of_keys = over_keys_floats(call->p) + run;
    return for_steps(call, steps, 3, chunks * run, larger(of_keys, over_queries_floats(call->then->p)));
}

/* The quadratic order for a chunk of the queries; the keys are one block. */
static void quadratic_piece(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
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
    const Span all = block_in(p, 0, 0);
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
    for (int64_t c = 0; c < width; c += LANES) {
        const vec by = SPLAT(1.0f) / divisors(call, batch, head, LOAD(total.data + c));
        for (int64_t r = 0; r < rows; r++) STORE(row_of(keys, r) + c, LOAD(row_of(keys, r) + c) * by);
    }
    const Left left = over_columns(keys, take(&scratch, rows, width), pairs);
    const Block right = load_silenced(values, take(&scratch, rows, columns), value, mask, all, pairs);
    Block queries = take(&scratch, width, BLOCK), query_words = take(&scratch, width, BLOCK);
    Block products = take(&scratch, rows, BLOCK), product_words = take(&scratch, rows, BLOCK);
    const Block strip = take(&scratch, STRIP, larger(columns, BLOCK));
    Span n;
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        queries.columns = query_words.columns = products.columns = product_words.columns = filled(n);
        load(queries, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(queries, p->key_channels, p->groups, pairs);
        multiply(pairs, left, over_rows(queries, query_words, pairs), width, products);
        const Block scores = over_rows(products, product_words, pairs);
        write_product(pairs, scores, right, rows, (Matrix){0}, output, n, strip, 0, query);
    }
}

static int quadratic(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const int64_t scratch = BLOCK * (4 * width + 2 * columns + 2 * BLOCK) + 2 * width + STRIP * (BLOCK + columns);
    const Step step = {quadratic_piece, call->then->chunks};
    return for_steps(call, &step, 1, 0, scratch);
}

/* Gradients of queries, and their part in that of the context, where somebody asks for those of keys or values. */
static void attend_piece_backward(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const int wanted = call->d_key.data || call->d_value.data;
    const Partial d_mean = wanted ? sums_of_queries(call, chunk) : (Partial){0};
    back_over_queries(call->then, batch, head, chunk, sums_of_keys(call, 0).sums, d_mean, scratch);
}

/* Rows of the context's gradient, over its total; in place of totals what comes to all keys alike. */
static void slope_piece(const Call *call, int64_t batch, int64_t head, int64_t slice, float *scratch) {
    const Partial d_mean = add_up(call, sums_of_queries, call->then->chunks, slice);
    const Partial context = part_of(sums_of_keys(call, 0), slice * LANES, LANES);
    (void)batch, (void)head, (void)scratch;
    for (int64_t c = 0; c < LANES; c++) {
        const vec by = SPLAT(1.0f / context.total[c]);
        vec product = SPLAT(0.0f);
        for (int64_t e = 0; e < context.sums.columns; e += LANES) {
            float *d = row_of(d_mean.sums, c) + e;
            STORE(d, LOAD(d) * by);
            product = FMA(LOAD(d), LOAD(row_of(context.sums, c) + e), product);
        }
        d_mean.total[c] = 0.0f;
        for (int i = 0; i < LANES; i++) d_mean.total[c] += product[i];
    }
}

static void summarize_piece_backward(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Partial d_mean = sums_of_queries(call, 0);
    back_over_keys(call, batch, head, chunk, d_mean.sums, sums_of_keys(call, 0).shift, d_mean.total, scratch);
}

/* Gradients by the linear order; the context is computed again rather than kept. */
static int backward(const Call *call) {
    const int64_t keys = call->chunks, queries = call->then->chunks, slices = padded(call->p->key_channels) / LANES;
    const Step steps[] = {
        {summarize_piece, keys}, {mean_piece, slices}, {attend_piece_backward, queries},
        {slope_piece, slices}, {summarize_piece_backward, keys},
    };
    const int wanted = call->d_key.data || call->d_value.data;
    const int64_t run = partial_floats(call), of_keys = over_keys_floats(call->p) + run;
    const int64_t of_queries = back_over_queries_floats(call->then->p) + run;
    const int64_t scratch = larger(larger(of_keys, of_queries), back_over_keys_floats(call->p));
    return for_steps(call, steps, wanted ? 5 : 3, (keys + queries) * run, scratch);
}

/* The keys and values, and what is then done with the queries, at least one chunk of both. */
INLINE Call calls(const Short *s, Call *queries) {
    *queries = (Call){.p = &s->queries, .parts = 1, .query = s->query};
    queries->chunks = larger(1, chunks_of(&s->queries));
    Call keys = {.p = &s->keys, .parts = 1, .key = s->key, .value = s->value, .mask = s->mask, .then = queries};
    keys.chunks = larger(1, chunks_of(&s->keys));
    return keys;
}

/* rho_q(Q) rho_k(K)^T V [batch, heads, N, Dv]. */
int efficient_attention(const Short *s, char *query, char *key, char *value, char *mask, char *output) {
    Call queries, keys = calls(s, &queries);
    keys.key.data = key, keys.value.data = value, keys.mask.data = mask;
    queries.output = s->output;
    queries.query.data = query, queries.output.data = output;
    return s->quadratic ? quadratic(&keys) : linear(&keys);
}

/* Its gradients, laid out as the inputs are, and with respect to those for which there is memory. */
int efficient_attention_backward(const Short *s, char *query, char *key, char *value, char *mask, char *d_output,
                                 char *d_query, char *d_key, char *d_value) {
    Call queries, keys = calls(s, &queries);
    keys.d_key = s->d_key, keys.d_value = s->d_value;
    keys.key.data = key, keys.value.data = value, keys.mask.data = mask;
    keys.d_key.data = d_key, keys.d_value.data = d_value;
    queries.d_output = s->output, queries.d_query = s->d_query;
    queries.query.data = query, queries.d_output.data = d_output, queries.d_query.data = d_query;
    return backward(&keys);
}
