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
    over_keys(call, batch, head, chunk, partial_of(call, batch * call->p->heads + head, chunk), scratch);
}

/* sum_m w v [batch, heads, Dk, Dv], and under softmax shift and sum_m w [batch, heads, Dk], for w = exp(k - shift). */
int summarize(const Problem *p, const View *key, const View *value, const View *mask, float *weighted, float *shift,
              float *total, float *partials) {
    Call call = {.p = p, .parts = 1, .partials = partials, .key = *key, .value = *value, .mask = *mask};
    return for_partials(&call, summarize_chunk, over_keys_floats(p), weighted, shift, total);
}

static void summarize_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t channels = p->key_channels, values = p->value_channels, at = batch * p->heads + head;
    const Block d_mean = take(&scratch, padded(channels), padded(values));
    const Block shift = take(&scratch, 1, padded(channels)), correction = take(&scratch, 1, padded(channels));
    load(d_mean, matrix(call->mean + at * channels * values, channels, values), 0.0f);
    load(shift, matrix(call->shift + at * channels, 1, channels), 0.0f);
    load(correction, matrix(call->correction + at * channels, 1, channels), 0.0f);
    back_over_keys(call, batch, head, chunk, d_mean, shift.data, correction.data, scratch);
}

/* d_value = w d_mean, and d_key = w (V d_mean^T - correction) or V d_mean^T: d_mean and correction are over total. */
int summarize_backward(const Problem *p, const View *key, const View *value, const View *mask, const float *d_mean,
                       const float *shift, const float *correction, const View *d_key, const View *d_value) {
    Call call = {.p = p, .key = *key, .value = *value, .mask = *mask, .d_key = *d_key, .d_value = *d_value};
    call.mean = d_mean, call.shift = shift, call.correction = correction;
    call.chunks = chunks_of(p), call.heads = all_heads(p);
    int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    return for_chunks(&call, summarize_backward_chunk, width * (columns + 2) + back_over_keys_floats(p));
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
    over_queries(call, batch, head, chunk, mean, scratch);
}

/* rho_q(Q) mean. */
int attend(const Problem *p, const View *query, const float *mean, const View *output) {
    Call call = {.p = p, .query = *query, .output = *output, .mean = mean};
    call.chunks = chunks_of(p), call.heads = all_heads(p);
    const int64_t context = padded(p->key_channels) * padded(p->value_channels);
    return for_chunks(&call, attend_chunk, context + over_queries_floats(p));
}

static void attend_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const int64_t at = batch * call->p->heads + head;
    const Block mean = load_context(call, at, &scratch);
    const Partial d_mean = call->partials ? partial_of(call, at, chunk) : (Partial){0};
    back_over_queries(call, batch, head, chunk, mean, d_mean, scratch);
}

/* d_query = A (G - sum_c A G) for A = rho_q(Q), G = d_out mean^T, or G; d_mean = A^T d_out [batch, heads, Dk, Dv]. */
int attend_backward(const Problem *p, const View *d_output, const View *query, const float *mean, const View *d_query,
                    float *d_mean, float *partials) {
    Call call = {.p = p, .parts = 1, .partials = partials, .query = *query, .mean = mean};
    call.d_output = *d_output, call.d_query = *d_query;
    const int64_t floats = padded(p->key_channels) * padded(p->value_channels) + back_over_queries_floats(p);
    if (partials) return for_partials(&call, attend_backward_chunk, floats, d_mean, NULL, NULL);
    call.chunks = chunks_of(p), call.heads = all_heads(p);
    return for_chunks(&call, attend_backward_chunk, floats);
}
