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
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix query = head_of(&then->query, batch, head, p->key_channels, then->p);
    const Matrix d_query = head_of(&then->d_query, batch, head, p->key_channels, then->p);
    const Matrix d_output = head_of(&then->d_output, batch, head, p->value_channels, then->p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const Kept kept = kept_of(call);
    const float *factors = row_of(kept.factors, k);
    const Span n = {0, then->p->positions};
    const Block weights = take(&scratch, n.count, width), asking = take(&scratch, n.count, width);
    const Block slope = take(&scratch, n.count, width), d_out = take(&scratch, n.count, columns);
    const Block scores = take(&scratch, 1, BLOCK), slopes = take(&scratch, 1, BLOCK);
    const Block memory = take(&scratch, BLOCK, columns);
    const Block to = call->chunks > 1 ? added_by(call, kept.added, k, n, width) : slope;
    load_few(weights, query, p);
    memcpy(asking.data, weights.data, n.count * width * 4);
    scale_columns(asking, factors);
    load(d_out, d_output, 0.0f);
    memset(to.data, 0, to.rows * width * 4);
    Span m;
    for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
        const Block keys = only_rows(kept.weights, m), values = values_of(value, mask, m, memory);
        Block d_keys = slopes_of(call, kept.d_keys, 0, m), d_values = slopes_of(call, kept.d_values, 0, m);
        memset(d_keys.data, 0, d_keys.rows * width * 4);
        memset(d_values.data, 0, d_values.rows * columns * 4);
        d_keys.rows = d_values.rows = m.count;
        for (int64_t i = 0; i < n.count; i++) {
            score_keys(row_of(asking, i), width, keys, scores.data);
            score_keys(row_of(d_out, i), columns, values, slopes.data);
            FOR_WIDE(add_outer, columns, scores.data, row_of(d_out, i), d_values);
            FOR_WIDE(add_outer, width, slopes.data, row_of(weights, i), d_keys);
            FOR_WIDE(add_values, width, slopes.data, keys, row_of(to, i));
        }
    }
    scale_columns(to, factors);
    if (call->chunks == 1 && d_query.data) store_few(to, weights, d_query, p);
}

/* Gradients of the queries from what chunks of the keys add to them. */
static void add_slopes_of_few(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->then->p;
    const Matrix query = head_of(&call->then->query, batch, head, p->key_channels, p);
    const Matrix d_query = head_of(&call->then->d_query, batch, head, p->key_channels, p);
    const int64_t width = padded(p->key_channels);
    const Block added = kept_of(call).added, weights = take(&scratch, p->positions, width);
    const Span n = {0, p->positions};
    (void)chunk;
    if (!d_query.data) return;
    FOR_PAIRS(a, b, call->chunks) add_block(added_by(call, added, a, n, width), added_by(call, added, b, n, width));
    load_few(weights, query, p);
    store_few(added_by(call, added, 0, n, width), weights, d_query, p);
}

static int few_queries_backward(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const int64_t scratch = FEW * (3 * width + columns) + BLOCK * (columns + 2);
    return gradients_by(call, score_few_backward, add_slopes_of_few, scratch);
}

#endif
