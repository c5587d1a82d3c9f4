/* Gradients by the quadratic order; weights are computed again rather than kept. */
#ifndef QUADRATIC_BACKWARD_H
#define QUADRATIC_BACKWARD_H

#include "quadratic.h"

/* What chunk i of the queries adds for a block of keys. */
INLINE Block slopes_of(const Call *call, Block slopes, int64_t i, Span m) {
    return rows_of(slopes, (Span){i * padded(call->p->positions) + m.start, m.count});
}

INLINE void scale_columns(Block x, const float *factors) {
    for (int64_t r = 0; r < x.rows; r++)
        for (int64_t c = 0; c < x.columns; c += LANES)
            STORE(row_of(x, r) + c, LOAD(factors + c) * LOAD(row_of(x, r) + c));
}

/* sums [Dk] += sum_m W slope. */
INLINE void add_weighted(float *sums, Block weights, Block slope) {
    for (int64_t c = 0; c < slope.columns; c += LANES) {
        vec sum = SPLAT(0.0f);
        for (int64_t r = 0; r < slope.rows; r++)
            sum = FMA(LOAD(row_of(weights, r) + c), LOAD(row_of(slope, r) + c), sum);
        STORE(sums + c, LOAD(sums + c) + sum);
    }
}

/* A block of the queries, and of gradients of their outputs, in words: (A f)^T and dO^T for sums over channels, A and
 * dO for sums over queries. */
typedef struct {
    Block asking, d_out_turned, queries, d_out;
} Queries;

/* What such a block adds to the gradients of a block of the keys: dS^T A to those of rho_k(K) and S^T dO to those of V,
 * for dS = dO V^T. And d_asking += W^T dS^T, where it has memory. */
static void back_over_block(const Call *call, const Queries *q, Block weights, Matrix value, Matrix mask, Span m,
                            Block d_keys, Block d_values, Block d_asking, float *scratch) {
    const int64_t rows = weights.rows, width = weights.columns, columns = d_values.columns, queries = q->asking.columns;
    const int pairs = in_pairs(call->p);
    const Block scores = take(&scratch, rows, queries), score_words = take(&scratch, rows, queries);
    const Block values = take(&scratch, rows, columns), value_words = take(&scratch, rows, columns);
    const Block key_words = take(&scratch, rows, width);
    if (call->d_value.data) {
        multiply(pairs, over_columns(weights, key_words, pairs), q->asking, width, scores);
        add_multiply(pairs, over_columns(scores, score_words, pairs), q->d_out, queries, d_values);
    }
    if (!call->d_key.data && !d_asking.data) return;
    load(values, rows_in(value, m), 0.0f);
    silence(values, mask, m, 0.0f);
    multiply(pairs, over_columns(values, value_words, pairs), q->d_out_turned, columns, scores);
    if (call->d_key.data) add_multiply(pairs, over_columns(scores, score_words, pairs), q->queries, queries, d_keys);
    if (d_asking.data) {
        const Left back = {over_rows(weights, key_words, pairs).data, 1, width};
        add_multiply(pairs, back, over_rows(scores, score_words, pairs), rows, d_asking);
    }
}

/* d_query of a block, from the slopes of its weights A^T. */
INLINE void store_queries(Block slope, Block weights, Matrix d_query, Span n, const Problem *p) {
    if (p->softmax) pull_back_queries(slope, weights, p->key_channels, p->groups);
    store(slope, flipped(rows_in(d_query, n)), 0);
}

/* Chunk k of the keys adds to the gradients of A^T [padded(Dk), .]. */
INLINE Block slope_by(const Call *call, Block added, int64_t k, Span n) {
    const int64_t width = padded(call->p->key_channels);
    return (Block){added_by(call, added, k, n, width).data, width, filled(n)};
}

/* What a chunk of the queries and one of the keys add to each other's gradients. */
static void score_backward(const Call *call, int64_t batch, int64_t head, int64_t piece, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const Head h = head_in(call, batch, head);
    const int64_t chunk = piece / call->chunks, k = piece % call->chunks;
    const float *factors = row_of(h.kept.factors, k);
    const int pairs = in_pairs(p);
    Block weights = take(&scratch, h.width, BLOCK), turned = take(&scratch, BLOCK, h.width);
    Block asking = take(&scratch, h.width, BLOCK), slope = take(&scratch, h.width, BLOCK);
    Block d_out = take(&scratch, BLOCK, h.columns), d_out_turned = take(&scratch, h.columns, BLOCK);
    const Block turned_words = take(&scratch, BLOCK, h.width), asking_words = take(&scratch, h.width, BLOCK);
    const Block d_out_words = take(&scratch, BLOCK, h.columns), d_out_turned_words = take(&scratch, h.columns, BLOCK);
    Span n, m;
    for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
        memset(slopes_of(call, h.kept.d_keys, chunk, m).data, 0, filled(m) * h.width * 4);
        memset(slopes_of(call, h.kept.d_values, chunk, m).data, 0, filled(m) * h.columns * 4);
    }
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        turned.rows = d_out.rows = weights.columns = asking.columns = slope.columns = d_out_turned.columns = filled(n);
        load_queries(weights, h.query, n, NULL, p);
        load(turned, flipped(matrix(weights.data, h.width, weights.columns)), 0.0f);
        memcpy(asking.data, weights.data, h.width * weights.columns * 4);
        scale_rows(asking, factors);
        const Queries q = {
            .asking = over_rows(asking, asking_words, pairs),
            .d_out_turned = load_over_rows(d_out_turned, d_out_turned_words, flipped(rows_in(h.d_output, n)), pairs),
            .queries = over_rows(turned, turned_words, pairs),
            .d_out = load_over_rows(d_out, d_out_words, rows_in(h.d_output, n), pairs),
        };
        Block to = call->chunks > 1 ? slope_by(call, h.kept.added, k, n) : slope;
        memset(to.data, 0, to.rows * to.columns * 4);
        if (!h.d_query.data) to.data = NULL;
        for (int64_t j = 0; (m = block_in(p, k, j)).count; j++)
            back_over_block(call, &q, rows_of(h.kept.weights, m), h.value, h.mask, m,
                            slopes_of(call, h.kept.d_keys, chunk, m), slopes_of(call, h.kept.d_values, chunk, m), to,
                            scratch);
        if (!h.d_query.data) continue;
        scale_rows(to, factors);
        if (call->chunks == 1) store_queries(to, weights, h.d_query, n, p);
    }
}

/* Gradients of a chunk of the queries from what chunks of the keys add to them. */
static void add_slopes_of_queries(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->then->p;
    const Head h = head_in(call, batch, head);
    Block weights = take(&scratch, padded(p->key_channels), BLOCK);
    Span n;
    for (int64_t i = 0; h.d_query.data && (n = block_in(p, chunk, i)).count; i++) {
        FOR_PAIRS(a, b, call->chunks) add_block(slope_by(call, h.kept.added, a, n), slope_by(call, h.kept.added, b, n));
        weights.columns = filled(n);
        load_queries(weights, h.query, n, NULL, p);
        store_queries(slope_by(call, h.kept.added, 0, n), weights, h.d_query, n, p);
    }
}

/* Gradients of values, and slopes of W in a chunk of the keys, from what chunks of the queries add to them. */
static void add_slopes_of_keys(const Call *call, int64_t batch, int64_t head, int64_t k, float *scratch) {
    const Problem *p = call->p;
    const Head h = head_in(call, batch, head);
    (void)scratch;
    memset(row_of(h.kept.shifts, k), 0, h.kept.shifts.columns * 4);
    Span m;
    for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
        const Block slope = slopes_of(call, h.kept.d_keys, 0, m), d_values = slopes_of(call, h.kept.d_values, 0, m);
        FOR_PAIRS(a, b, call->then->chunks) {
            add_block(slopes_of(call, h.kept.d_keys, a, m), slopes_of(call, h.kept.d_keys, b, m));
            add_block(slopes_of(call, h.kept.d_values, a, m), slopes_of(call, h.kept.d_values, b, m));
        }
        if (h.d_value.data) store(d_values, rows_in(h.d_value, m), 0);
        scale_columns(slope, row_of(h.kept.factors, k));
        add_weighted(row_of(h.kept.shifts, k), rows_of(h.kept.weights, m), slope);
    }
}

/* Gradients of a chunk of the keys: W (slope - f sum_m W slope), or what scaling has left of the slope. */
static void weigh_keys_backward(const Call *call, int64_t batch, int64_t head, int64_t k, float *scratch) {
    const Problem *p = call->p;
    const Head h = head_in(call, batch, head);
    const Block sums = take(&scratch, 1, h.kept.shifts.columns);
    memset(sums.data, 0, sums.columns * 4);
    for (int64_t i = 0; i < call->chunks; i++) add_block(sums, (Block){row_of(h.kept.shifts, i), 1, sums.columns});
    scale_columns(sums, row_of(h.kept.factors, k));
    Span m;
    for (int64_t j = 0; h.d_key.data && (m = block_in(p, k, j)).count; j++) {
        const Block slope = slopes_of(call, h.kept.d_keys, 0, m);
        if (p->softmax) pull_back_keys(slope, rows_of(h.kept.weights, m).data, sums.data);
        store(slope, rows_in(h.d_key, m), 0);
    }
}

/* Gradients, by what chunks of queries and of keys add to each other's, and then to those of the queries alone. */
static int gradients_by(const Call *call, Work score, Work add_slopes, int64_t scratch_floats) {
    const int64_t keys = call->chunks, queries = call->then->chunks;
    const int wanted = call->d_key.data || call->d_value.data;
    Step steps[6] = {{weigh_keys, keys}, {compare_chunks, 1}, {score, queries * keys}};
    int64_t count = 3;
    if (keys > 1) steps[count++] = (Step){add_slopes, queries};
    if (wanted) steps[count++] = (Step){add_slopes_of_keys, keys}, steps[count++] = (Step){weigh_keys_backward, keys};
    return for_steps(call, steps, count, kept_floats(call, 1), scratch_floats);
}

static int quadratic_backward(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const int64_t scratch = BLOCK * (7 * width + 6 * columns + 2 * BLOCK);
    return gradients_by(call, score_backward, add_slopes_of_queries, scratch);
}

#endif
