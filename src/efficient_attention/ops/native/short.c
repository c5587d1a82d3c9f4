/* Efficient attention of short inputs in one call: from queries, keys and values to the output, or from the gradient of
 * that to theirs. Contexts and sums of chunks stay in the cache.
 */
#include "few_backward.h"

/* Sizes and strides; keys and queries differ in their positions alone. As in native_short.py. */
typedef struct {
    Problem keys, queries;
    View query, key, value, mask, d_query, d_key, d_value, output; /* without their memory; output: or its gradient */
    int64_t quadratic; /* (rho_q(Q) rho_k(K)^T) V */
} Short;

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
    FOR_PAIRS(a, b, chunks) merge(part_of(sums_of(call, a), first, LANES), part_of(sums_of(call, b), first, LANES));
    return part_of(sums_of(call, 0), first, LANES);
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
static int linear_backward(const Call *call) {
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
    if (!s->quadratic) return linear(&keys);
    return are_few(&keys, 0) ? few_queries(&keys) : quadratic(&keys);
}

/* Its gradients, laid out as the inputs are, and with respect to those for which there is memory. */
int efficient_attention_backward(const Short *s, char *query, char *key, char *value, char *mask, char *d_query,
                                 char *d_key, char *d_value, char *d_output) {
    Call queries, keys = calls(s, &queries);
    keys.d_key = s->d_key, keys.d_value = s->d_value;
    keys.key.data = key, keys.value.data = value, keys.mask.data = mask;
    keys.d_key.data = d_key, keys.d_value.data = d_value;
    queries.d_output = s->output, queries.d_query = s->d_query;
    queries.query.data = query, queries.d_output.data = d_output, queries.d_query.data = d_query;
    if (!s->quadratic) return linear_backward(&keys);
    return are_few(&keys, 1) ? few_queries_backward(&keys) : quadratic_backward(&keys);
}
