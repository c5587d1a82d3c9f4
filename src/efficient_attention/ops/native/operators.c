/* The four operators of ops/blocked.py on CPUs with AVX2 or AVX-512, for float32 and bfloat16.
 *
 * Plain C, without headers of Python or PyTorch: called with addresses, strides and sizes (native_calls.py), with
 * threads of the OpenMP that PyTorch has loaded before. Each operator passes once over its inputs. Blocks of BLOCK
 * positions are copied to the first cache, as [positions, channels] or, where a softmax runs over channels, as
 * [channels, positions], so that it never runs across the lanes of a vector.
 *
 * All return 0, or 1 if there is no memory. Gradients are computed where there is memory for them.
 */
#include "passes.h"

static void summarize_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    pass_over_keys(call, batch, head, chunk, partial_of(call, batch * call->p->heads + head, chunk), scratch);
}

/* sum_m w v [batch, heads, Dk, Dv], and under softmax shift and sum_m w [batch, heads, Dk], for w = exp(k - shift). */
int summarize(const Problem *p, const View *key, const View *value, const View *mask, float *weighted, float *shift,
              float *total, float *partials) {
    Call call = {.p = p, .parts = 1, .partials = partials, .key = *key, .value = *value, .mask = *mask};
    return for_partials(&call, summarize_chunk, keys_floats(p), weighted, shift, total);
}

/* What all blocks of a head share in the backward pass of `summarize`. */
typedef struct {
    Block there, back; /* words of d_mean, and of its transpose */
    float *shift, *correction;
} Slopes;

static Slopes load_slopes(const Call *call, int64_t head, float **scratch, int pairs) {
    const int64_t channels = call->p->key_channels, values = call->p->value_channels;
    const int64_t width = padded(channels), columns = padded(values);
    const Matrix d_mean = matrix(call->mean + head * channels * values, channels, values);
    const Block there = take(scratch, width, columns), there_words = take(scratch, width, columns);
    const Block back = take(scratch, columns, width), back_words = take(scratch, columns, width);
    const Block shift = take(scratch, 1, width), correction = take(scratch, 1, width);
    load(there, d_mean, 0.0f);
    load(back, flipped(d_mean), 0.0f);
    load(shift, matrix(call->shift + head * channels, 1, channels), 0.0f);
    load(correction, matrix(call->correction + head * channels, 1, channels), 0.0f);
    const Block d_mean_words = over_rows(there, there_words, pairs), transposed = over_rows(back, back_words, pairs);
    return (Slopes){d_mean_words, transposed, shift.data, correction.data};
}

/* Slopes [ROWS, padded(Dk)] of the weights become those of the keys. */
static void pull_back_keys(Block slope, const float *weights, const float *correction) {
    for (int64_t r = 0; r < slope.rows; r++)
        for (int64_t c = 0; c < slope.columns; c += LANES) {
            float *x = row_of(slope, r) + c;
            STORE(x, (LOAD(x) - LOAD(correction + c)) * LOAD(weights + r * slope.columns + c));
        }
}

static void summarize_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix key = head_of(&call->key, batch, head, p->key_channels, p);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix d_key = head_of(&call->d_key, batch, head, p->key_channels, p);
    const Matrix d_value = head_of(&call->d_value, batch, head, p->value_channels, p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const int pairs = in_pairs(p);
    const Block keys = take(&scratch, BLOCK, width), key_words = take(&scratch, BLOCK, width);
    const Block values = take(&scratch, BLOCK, columns), value_words = take(&scratch, BLOCK, columns);
    const Block slope = take(&scratch, ROWS, width), d_values = take(&scratch, ROWS, columns);
    const Slopes slopes = load_slopes(call, batch * p->heads + head, &scratch, pairs);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        load(keys, rows_in(key, n), nothing);
        silence(keys, mask, n, nothing);
        if (p->softmax) weigh(keys, slopes.shift, NULL, 0);
        const Left weights = over_columns(keys, key_words, pairs);
        for (int64_t r = 0; d_value.data && r < n.count; r += ROWS) {
            fetch(key, n, r / ROWS, BLOCK / ROWS);
            product(pairs, weights, r, slopes.there, width, d_values.data);
            store(d_values, rows_in(d_value, rows_of(n, r)), p->stream);
        }
        if (!d_key.data) continue;
        load(values, rows_in(value, n), 0.0f);
        silence(values, mask, n, 0.0f);
        const Left left = over_columns(values, value_words, pairs);
        for (int64_t r = 0; r < n.count; r += ROWS) {
            fetch(value, n, r / ROWS, BLOCK / ROWS);
            product(pairs, left, r, slopes.back, columns, slope.data);
            if (p->softmax) pull_back_keys(slope, row_of(keys, r), slopes.correction);
            store(slope, rows_in(d_key, rows_of(n, r)), p->stream);
        }
    }
}

/* d_value = w d_mean, and d_key = w (V d_mean^T - correction) or V d_mean^T: d_mean and correction are over total. */
int summarize_backward(const Problem *p, const View *key, const View *value, const View *mask, const float *d_mean,
                       const float *shift, const float *correction, const View *d_key, const View *d_value) {
    Call call = {.p = p, .key = *key, .value = *value, .mask = *mask, .d_key = *d_key, .d_value = *d_value};
    call.mean = d_mean, call.shift = shift, call.correction = correction, call.chunks = chunks_of(p);
    int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    int64_t floats = (2 * BLOCK + ROWS) * (width + columns) + 4 * width * columns + 2 * width;
    return for_chunks(&call, summarize_backward_chunk, floats);
}

/* The context of a head, [padded(Dk), padded(Dv)]. */
static Block load_context(const Call *call, int64_t head, float **scratch) {
    const int64_t channels = call->p->key_channels, values = call->p->value_channels;
    const Block context = take(scratch, padded(channels), padded(values));
    load(context, matrix(call->mean + head * channels * values, channels, values), 0.0f);
    return context;
}

static void attend_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Block mean = load_context(call, batch * call->p->heads + head, &scratch);
    pass_over_queries(call, batch, head, chunk, mean, scratch);
}

/* rho_q(Q) mean. */
int attend(const Problem *p, const View *query, const float *mean, const View *output) {
    Call call = {.p = p, .query = *query, .output = *output, .mean = mean, .chunks = chunks_of(p)};
    return for_chunks(&call, attend_chunk, queries_floats(p));
}

static void attend_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix query = head_of(&call->query, batch, head, p->key_channels, p);
    const Matrix d_query = head_of(&call->d_query, batch, head, p->key_channels, p);
    const Matrix d_output = head_of(&call->d_output, batch, head, p->value_channels, p);
    const int pairs = in_pairs(p);
    const Block weights = take(&scratch, width, BLOCK), weight_words = take(&scratch, width, BLOCK);
    const Block slope = take(&scratch, width, BLOCK);
    const Block d_out = take(&scratch, BLOCK, columns), d_out_words = take(&scratch, BLOCK, columns);
    const Block by_channels = {d_out.data, columns, BLOCK}, by_channels_words = {d_out_words.data, columns, BLOCK};
    const Block mean = load_context(call, batch * p->heads + head, &scratch);
    const Left context = over_columns(mean, take(&scratch, width, columns), pairs);
    const Partial run = take_partial(&scratch, call);
    const Partial d_mean = call->partials ? partial_of(call, batch * p->heads + head, chunk) : run;
    clear(d_mean, 0), clear(run, 0);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        load(weights, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(weights, p->key_channels, p->groups);
        if (call->partials) {
            const Left left = over_columns(weights, weight_words, pairs);
            const Block right = load_over_rows(d_out, d_out_words, rows_in(d_output, n), pairs);
            for (int64_t c = 0; c < width; c += ROWS) {
                fetch(d_output, n, c / ROWS, width / ROWS);
                add_product(pairs, left, c, right, BLOCK, row_of(run.sums, c));
            }
            end_run(d_mean, run, p, chunk, i);
        }
        if (!d_query.data) continue;
        const Block right = load_over_rows(by_channels, by_channels_words, flipped(rows_in(d_output, n)), pairs);
        for (int64_t c = 0; c < width; c += ROWS) {
            fetch(query, n, c / ROWS, width / ROWS);
            product(pairs, context, c, right, columns, row_of(slope, c));
        }
        if (p->softmax) pull_back_queries(slope, weights, p->key_channels, p->groups);
        store(slope, flipped(rows_in(d_query, n)), p->stream);
    }
}

/* d_query = A (G - sum_c A G) for A = rho_q(Q), G = d_out mean^T, or G; d_mean = A^T d_out [batch, heads, Dk, Dv]. */
int attend_backward(const Problem *p, const View *d_output, const View *query, const float *mean, const View *d_query,
                    float *d_mean, float *partials) {
    Call call = {.p = p, .parts = 1, .partials = partials, .query = *query, .mean = mean};
    call.d_output = *d_output, call.d_query = *d_query;
    int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    int64_t floats = BLOCK * (3 * width + 2 * columns) + 2 * width * columns;
    if (d_mean) return for_partials(&call, attend_backward_chunk, floats, d_mean, NULL, NULL);
    call.chunks = chunks_of(p);
    return for_chunks(&call, attend_backward_chunk, floats + partial_floats(&call));
}
