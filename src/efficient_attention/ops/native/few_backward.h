/* Gradients of few queries, and of their keys and values, with channels in vectors. */
#ifndef FEW_BACKWARD_H
#define FEW_BACKWARD_H

#include "few.h"
#include "quadratic_backward.h"

/* to [., columns] += scores x^T, in some of the columns. */
INLINE void add_outer(const int vectors, int64_t column, const float *scores, const float *x, Block to) {
    vec across[WIDE];
    UNROLL for (int j = 0; j < vectors; j++) across[j] = LOAD(x + column + j * LANES);
    for (int64_t m = 0; m < to.rows; m++)
        UNROLL for (int j = 0; j < vectors; j++) {
            float *sum = row_of(to, m) + column + j * LANES;
            STORE(sum, FMA(SPLAT(scores[m]), across[j], LOAD(sum)));
        }
}

/* d_query from the slopes of rho_q(Q). */
INLINE void store_few(Block slope, Block weights, Matrix d_query, const Problem *p) {
    for (int64_t r = 0; p->softmax && r < weights.rows; r++) {
        float *d = row_of(slope, r), *x = row_of(weights, r);
        vec total = SPLAT(0.0f);
        for (int64_t c = 0; c < weights.columns; c += LANES) total = FMA(LOAD(d + c), LOAD(x + c), total);
        total = all_lanes(total);
        for (int64_t c = 0; c < weights.columns; c += LANES) STORE(d + c, (LOAD(d + c) - total) * LOAD(x + c));
    }
    store(slope, d_query, 0);
}

/* rho_q(Q). */
INLINE void load_few(Block weights, Matrix query, const Problem *p) {
    load(weights, query, p->softmax ? -INFINITY : 0.0f);
    normalize_rows(weights, NULL, p->softmax, in_pairs(p));
}

/* What the queries and a chunk of the keys add to each other's gradients. */
static void score_few_backward(const Call *call, int64_t batch, int64_t head, int64_t k, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const Head h = head_in(call, batch, head);
    const float *factors = row_of(h.kept.factors, k);
    const Span n = {0, then->p->positions};
    const Block weights = take(&scratch, n.count, h.width), asking = take(&scratch, n.count, h.width);
    const Block slope = take(&scratch, n.count, h.width), d_out = take(&scratch, n.count, h.columns);
    const Block scores = take(&scratch, 1, BLOCK), memory = take(&scratch, BLOCK, h.columns);
    const Block to = call->chunks > 1 ? added_by(call, h.kept.added, k, n, h.width) : slope;
    load_few(weights, h.query, p);
    memcpy(asking.data, weights.data, n.count * h.width * 4);
    scale_columns(asking, factors);
    load(d_out, h.d_output, 0.0f);
    memset(to.data, 0, to.rows * h.width * 4);
    Span m;
    for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
        const Block keys = only_rows(h.kept.weights, m), values = values_of(h.value, h.mask, m, memory);
        Block d_keys = slopes_of(call, h.kept.d_keys, 0, m), d_values = slopes_of(call, h.kept.d_values, 0, m);
        memset(d_keys.data, 0, d_keys.rows * h.width * 4);
        memset(d_values.data, 0, d_values.rows * h.columns * 4);
        d_keys.rows = d_values.rows = m.count;
        for (int64_t i = 0; call->d_value.data && i < n.count; i++) {
            score_keys(row_of(asking, i), h.width, keys, scores.data);
            FOR_WIDE(add_outer, h.columns, scores.data, row_of(d_out, i), d_values);
        }
        for (int64_t i = 0; (call->d_key.data || h.d_query.data) && i < n.count; i++) {
            score_keys(row_of(d_out, i), h.columns, values, scores.data);
            if (call->d_key.data) FOR_WIDE(add_outer, h.width, scores.data, row_of(weights, i), d_keys);
            if (h.d_query.data) FOR_WIDE(add_values, h.width, scores.data, keys, row_of(to, i));
        }
    }
    scale_columns(to, factors);
    if (call->chunks == 1 && h.d_query.data) store_few(to, weights, h.d_query, p);
}

/* Gradients of the queries from what chunks of the keys add to them. */
static void add_slopes_of_few(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->then->p;
    const Head h = head_in(call, batch, head);
    const Block weights = take(&scratch, p->positions, h.width);
    const Span n = {0, p->positions};
    (void)chunk;
    if (!h.d_query.data) return;
    FOR_PAIRS(a, b, call->chunks)
        add_block(added_by(call, h.kept.added, a, n, h.width), added_by(call, h.kept.added, b, n, h.width));
    load_few(weights, h.query, p);
    store_few(added_by(call, h.kept.added, 0, n, h.width), weights, h.d_query, p);
}

static int few_queries_backward(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const int64_t scratch = FEW * (3 * width + columns) + BLOCK * (columns + 1);
    return gradients_by(call, score_few_backward, add_slopes_of_few, scratch);
}

#endif
