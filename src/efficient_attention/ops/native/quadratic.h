/* The quadratic order, (rho_q(Q) rho_k(K)^T) V, for keys of one block: cheaper where there are few. */
#ifndef QUADRATIC_H
#define QUADRATIC_H

#include "steps.h"

INLINE Span all_keys(const Problem *p) { return block_in(p, 0, 0); }

/* rho_k(K) [M, padded(Dk)] of a head, which the first step leaves for the others. */
INLINE Block key_weights(const Call *call) {
    return (Block){call->partials, filled(all_keys(call->p)), padded(call->p->key_channels)};
}

static void weigh_keys(const Call *call, int64_t batch, int64_t head, int64_t piece, float *scratch) {
    const Problem *p = call->p;
    const Matrix key = head_of(&call->key, batch, head, p->key_channels, p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const Span all = all_keys(p);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const Block weights = key_weights(call);
    const Block shift = take(&scratch, 1, weights.columns), total = take(&scratch, 1, weights.columns);
    const Partial empty = {{weights.data, weights.columns, 0}, shift.data, total.data};
    (void)piece;
    clear(empty, p->softmax);
    load(weights, rows_in(key, all), nothing);
    silence(weights, mask, all, nothing);
    if (p->softmax) {
        raise_shift(empty, weights);
        weigh(weights, shift.data, total.data, 0);
    }
    for (int64_t c = 0; c < weights.columns; c += LANES) {
        const vec by = SPLAT(1.0f) / divisors(call, batch, head, LOAD(total.data + c));
        for (int64_t r = 0; r < weights.rows; r++) STORE(row_of(weights, r) + c, LOAD(row_of(weights, r) + c) * by);
    }
}

/* O = S V for the scores S = rho_q(Q) rho_k(K)^T of a chunk of the queries. */
static void score(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const Block keys = key_weights(call);
    const int64_t rows = keys.rows, width = keys.columns, columns = padded(p->value_channels);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix query = head_of(&then->query, batch, head, p->key_channels, then->p);
    const Matrix output = head_of(&then->output, batch, head, p->value_channels, then->p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const int pairs = in_pairs(p);
    const Left weights = over_columns(keys, take(&scratch, rows, width), pairs);
    const Block values = take(&scratch, rows, columns), value_words = take(&scratch, rows, columns);
    const Block right = load_silenced(values, value_words, value, mask, all_keys(p), pairs);
    Block queries = take(&scratch, width, BLOCK), scores = take(&scratch, rows, BLOCK);
    const Block query_words = take(&scratch, width, BLOCK), score_words = take(&scratch, rows, BLOCK);
    const Block strip = take(&scratch, STRIP, larger(columns, BLOCK));
    Span n;
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        queries.columns = scores.columns = filled(n);
        load(queries, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(queries, p->key_channels, p->groups, pairs);
        multiply(pairs, weights, over_rows(queries, query_words, pairs), width, scores);
        const Block left = over_rows(scores, score_words, pairs);
        write_product(pairs, left, right, rows, (Matrix){0}, output, n, strip, 0, query);
    }
}

static int quadratic(const Call *call) {
    const Block keys = key_weights(call);
    const int64_t rows = keys.rows, width = keys.columns, columns = padded(call->p->value_channels);
    const int64_t scratch = rows * (width + 2 * columns + 2 * BLOCK) + 2 * BLOCK * width + STRIP * (BLOCK + columns);
    const Step steps[] = {{weigh_keys, 1}, {score, call->then->chunks}};
    return for_steps(call, steps, 2, rows * width, larger(scratch, 2 * width));
}

/* Sums over queries: gradients of rho_k(K)^T [padded(Dk), M] and of V [M, padded(Dv)]. */
typedef struct {
    Block weights, values;
} Slopes;

INLINE int64_t slope_floats(const Call *call) {
    const Block keys = key_weights(call);
    return keys.rows * (keys.columns + padded(call->p->value_channels));
}

/* Those of a chunk of the queries. */
INLINE Slopes slopes_of(const Call *call, int64_t chunk) {
    const Block keys = key_weights(call);
    float *data = row_of(keys, keys.rows) + chunk * slope_floats(call);
    const Block weights = take(&data, keys.columns, keys.rows);
    return (Slopes){weights, take(&data, keys.rows, padded(call->p->value_channels))};
}

/* Gradients of a chunk of the queries, and their part in those of keys and values. For A = rho_q(Q), W = rho_k(K) and
 * S = A W^T: dV = S^T dO, dS = dO V^T, dW^T = A^T dS, dA^T = W^T dS^T. */
static void score_backward(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const Block keys = key_weights(call);
    const int64_t rows = keys.rows, width = keys.columns, columns = padded(p->value_channels);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix query = head_of(&then->query, batch, head, p->key_channels, then->p);
    const Matrix d_query = head_of(&then->d_query, batch, head, p->key_channels, then->p);
    const Matrix d_output = head_of(&then->d_output, batch, head, p->value_channels, then->p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const int pairs = in_pairs(p);
    const Left weights = over_columns(keys, take(&scratch, rows, width), pairs);
    const Left weights_turned = {over_rows(keys, take(&scratch, rows, width), pairs).data, 1, width};
    const Block turned = take(&scratch, columns, rows);
    load(turned, flipped(rows_in(value, all_keys(p))), 0.0f);
    silence_columns(turned, mask, all_keys(p), 0.0f);
    const Block values = over_rows(turned, take(&scratch, columns, rows), pairs);
    Block queries = take(&scratch, width, BLOCK), d_queries = take(&scratch, width, BLOCK);
    Block scores = take(&scratch, rows, BLOCK), d_scores = take(&scratch, BLOCK, rows);
    Block d_out = take(&scratch, BLOCK, columns);
    const Block query_words = take(&scratch, width, BLOCK), score_words = take(&scratch, rows, BLOCK);
    const Block d_out_words = take(&scratch, BLOCK, columns);
    const Slopes slopes = slopes_of(call, chunk);
    memset(slopes.weights.data, 0, slope_floats(call) * 4);
    Span n;
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        queries.columns = d_queries.columns = scores.columns = d_scores.rows = d_out.rows = filled(n);
        load(queries, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(queries, p->key_channels, p->groups, pairs);
        load(d_out, rows_in(d_output, n), 0.0f);
        if (call->d_value.data) {
            multiply(pairs, weights, over_rows(queries, query_words, pairs), width, scores);
            const Left left = over_columns(scores, score_words, pairs);
            const Block right = over_rows(d_out, d_out_words, pairs);
            FOR_STRIPS(r, rows, pairs) add_product(pairs, left, r, right, d_out.rows, row_of(slopes.values, r.start));
        }
        if (!call->d_key.data && !d_query.data) continue;
        multiply(pairs, over_columns(d_out, d_out_words, pairs), values, columns, d_scores);
        if (call->d_key.data) {
            const Left left = over_columns(queries, query_words, pairs);
            const Block right = over_rows(d_scores, score_words, pairs);
            FOR_STRIPS(c, width, pairs) add_product(pairs, left, c, right, d_out.rows, row_of(slopes.weights, c.start));
        }
        if (!d_query.data) continue;
        load(scores, flipped(matrix(d_scores.data, d_scores.rows, rows)), 0.0f);
        multiply(pairs, weights_turned, over_rows(scores, score_words, pairs), rows, d_queries);
        if (p->softmax) pull_back_queries(d_queries, queries, p->key_channels, p->groups);
        store(d_queries, flipped(rows_in(d_query, n)), 0);
    }
}

/* Slopes of the weights W [M, padded(Dk)] become those of the keys under softmax: dK = W (dW - sum_m W dW). */
static void pull_back_weights(Block slope, Block weights) {
    for (int64_t c = 0; c < slope.columns; c += LANES) {
        vec total = SPLAT(0.0f);
        for (int64_t r = 0; r < slope.rows; r++)
            total = FMA(LOAD(row_of(slope, r) + c), LOAD(row_of(weights, r) + c), total);
        for (int64_t r = 0; r < slope.rows; r++) {
            float *x = row_of(slope, r) + c;
            STORE(x, (LOAD(x) - total) * LOAD(row_of(weights, r) + c));
        }
    }
}

/* Gradients of the keys and values of a head, from the sums of all chunks of the queries. */
static void weigh_keys_backward(const Call *call, int64_t batch, int64_t head, int64_t piece, float *scratch) {
    const Problem *p = call->p;
    const Block weights = key_weights(call), slope = take(&scratch, weights.rows, weights.columns);
    const Slopes sums = slopes_of(call, 0);
    (void)piece;
    for (int64_t apart = 1; apart < call->then->chunks; apart *= 2)
        for (int64_t a = 0; a + apart < call->then->chunks; a += 2 * apart) {
            float *to = slopes_of(call, a).weights.data, *from = slopes_of(call, a + apart).weights.data;
            for (int64_t i = 0; i < slope_floats(call); i += LANES) STORE(to + i, LOAD(to + i) + LOAD(from + i));
        }
    if (call->d_value.data) store(sums.values, head_of(&call->d_value, batch, head, p->value_channels, p), 0);
    if (!call->d_key.data) return;
    load(slope, flipped(matrix(sums.weights.data, weights.columns, weights.rows)), 0.0f);
    if (p->softmax) {
        pull_back_weights(slope, weights);
    } else {
        const vec by = SPLAT(1.0f) / divisors(call, batch, head, SPLAT(0.0f));
        for (int64_t i = 0; i < slope.rows * slope.columns; i += LANES)
            STORE(slope.data + i, LOAD(slope.data + i) * by);
    }
    store(slope, head_of(&call->d_key, batch, head, p->key_channels, p), 0);
}

static int quadratic_backward(const Call *call) {
    const Block keys = key_weights(call);
    const int64_t rows = keys.rows, width = keys.columns, columns = padded(call->p->value_channels);
    const int64_t scratch = 2 * rows * (width + columns) + BLOCK * (3 * width + 3 * rows + 2 * columns);
    const Step steps[] = {{weigh_keys, 1}, {score_backward, call->then->chunks}, {weigh_keys_backward, 1}};
    const int64_t floats = rows * width + call->then->chunks * slope_floats(call);
    return for_steps(call, steps, call->d_key.data || call->d_value.data ? 3 : 2, floats, scratch);
}

#endif
