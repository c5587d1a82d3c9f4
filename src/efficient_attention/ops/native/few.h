/* The quadratic order for few queries, of which whole vectors would be empty for the most part: their channels are
 * in vectors, as they lie in memory, and neither queries nor keys are padded.
 */
#ifndef FEW_H
#define FEW_H

#include "quadratic.h"

/* So many queries, at most. */
enum { FEW = LANES / 2 };

/* Whether they are faster so. Of many keys, gradients and pairs make more of whole vectors. */
INLINE int are_few(const Call *call, int backward) {
    int64_t most = FEW;
    if (call->p->positions > LANES && backward) most = FEW * 3 / 4;
    if (call->p->positions > LANES && !backward && in_pairs(call->p)) most = FEW / 2;
    return call->then->p->positions <= most;
}

static void weigh_few_keys(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    (void)scratch;
    weigh_chunk(call, batch, head, chunk, 0);
}

/* Rows of channels, padded with what has no weight, become their softmax; each channel is multiplied by its factor, if
 * there is one. */
INLINE void normalize_rows(Block queries, const float *factors, int softmax, int pairs) {
    for (int64_t r = 0; r < queries.rows; r++) {
        float *x = row_of(queries, r);
        vec by = SPLAT(1.0f), largest = LOAD(x), total = SPLAT(0.0f);
        for (int64_t c = LANES; softmax && c < queries.columns; c += LANES) largest = MAX(LOAD(x + c), largest);
        largest = largest_lane(largest);
        for (int64_t c = 0; softmax && c < queries.columns; c += LANES) {
            const vec weight = exponential(LOAD(x + c) - largest, pairs);
            STORE(x + c, weight);
            total += weight;
        }
        if (softmax) by = SPLAT(1.0f) / all_lanes(total);
        for (int64_t c = 0; c < queries.columns; c += LANES)
            STORE(x + c, LOAD(x + c) * by * (factors ? LOAD(factors + c) : SPLAT(1.0f)));
    }
}

/* parts [keys, LANES] += products of a query with each of the keys, in some of the channels. */
INLINE void add_parts(const int vectors, int64_t channel, const float *query, Block keys, float *parts) {
    vec x[WIDE];
    UNROLL for (int j = 0; j < vectors; j++) x[j] = LOAD(query + channel + j * LANES);
    for (int64_t m = 0; m < keys.rows; m++) {
        vec sum = LOAD(parts + m * LANES);
        UNROLL for (int j = 0; j < vectors; j++)
            sum = FMA(x[j], LOAD(row_of(keys, m) + channel + j * LANES), sum);
        STORE(parts + m * LANES, sum);
    }
}

/* scores [keys.rows], with room for whole vectors: the products of a query with each of the keys, whose rows lie
 * keys.columns apart. */
INLINE void score_keys(const float *query, int64_t channels, Block keys, float *scores) {
    for (int64_t first = 0; first < keys.rows; first += LANES) {
        const Block some = {row_of(keys, first), smaller(LANES, keys.rows - first), keys.columns};
        float parts[LANES * LANES] __attribute__((aligned(64))) = {0};
        FOR_WIDE(add_parts, channels, query, some, parts);
        vec x[LANES];
        UNROLL for (int i = 0; i < LANES; i++) x[i] = LOAD(parts + i * LANES);
        STORE(scores + first, totals(x));
    }
}

/* to += scores values, in some of the columns; those of even values and of odd are added up apart. */
INLINE void add_values(const int vectors, int64_t column, const float *scores, Block values, float *to) {
    vec sum[2][WIDE];
    UNROLL for (int j = 0; j < vectors; j++) sum[0][j] = LOAD(to + column + j * LANES), sum[1][j] = SPLAT(0.0f);
    for (int64_t m = 0; m + 1 < values.rows; m += 2)
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int j = 0; j < vectors; j++)
                sum[i][j] = FMA(SPLAT(scores[m + i]), LOAD(row_of(values, m + i) + column + j * LANES), sum[i][j]);
    for (int64_t m = values.rows & ~1; m < values.rows; m++)
        UNROLL for (int j = 0; j < vectors; j++)
            sum[0][j] = FMA(SPLAT(scores[m]), LOAD(row_of(values, m) + column + j * LANES), sum[0][j]);
    UNROLL for (int j = 0; j < vectors; j++) STORE(to + column + j * LANES, sum[0][j] + sum[1][j]);
}

/* Values of a block where they lie, or in memory. */
INLINE Block values_of(Matrix value, Matrix mask, Span m, Block memory) {
    if (lies_well(value, mask, memory.columns)) return lying(value, m);
    memory.rows = m.count;
    load(memory, rows_in(value, m), 0.0f);
    silence(memory, mask, m, 0.0f);
    return memory;
}

/* What a chunk of the keys adds to the outputs: the outputs, if it is the only one. */
static void score_few(const Call *call, int64_t batch, int64_t head, int64_t k, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const Head h = head_in(call, batch, head);
    const Span n = {0, then->p->positions};
    const Block queries = take(&scratch, n.count, h.width), scores = take(&scratch, 1, BLOCK);
    const Block memory = take(&scratch, BLOCK, h.columns), sums = take(&scratch, n.count, h.columns);
    const Block to = call->chunks > 1 ? added_by(call, h.kept.added, k, n, h.columns) : sums;
    load(queries, h.query, p->softmax ? -INFINITY : 0.0f);
    normalize_rows(queries, row_of(h.kept.factors, k), p->softmax, in_pairs(p));
    memset(to.data, 0, to.rows * to.columns * 4);
    Span m;
    for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
        const Block values = values_of(h.value, h.mask, m, memory);
        for (int64_t i = 0; i < n.count; i++) {
            score_keys(row_of(queries, i), h.width, only_rows(h.kept.weights, m), scores.data);
            FOR_WIDE(add_values, h.columns, scores.data, values, row_of(to, i));
        }
    }
    if (call->chunks == 1) store(to, h.output, 0);
}

static int few_queries(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const int64_t keys = call->chunks;
    const Step steps[] = {{weigh_few_keys, keys}, {compare_chunks, 1}, {score_few, keys}, {add_scores, 1}};
    const int64_t scratch = FEW * (width + columns) + BLOCK * (columns + 1);
    return for_steps(call, steps, keys > 1 ? 4 : 3, kept_floats(call, 0), scratch);
}

#endif
