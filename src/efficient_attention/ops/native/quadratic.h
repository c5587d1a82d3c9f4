/* The quadratic order, (rho_q(Q) rho_k(K)^T) V: cheaper where keys or queries are few.
 *
 * Weights of a chunk of the keys are relative to its own largest keys, W = exp(K - shift). What makes them rho_k(K) is a
 * factor for each channel, by which the queries are multiplied, as it is known when all keys have been seen:
 * S = (rho_q(Q) f) W^T for each chunk of the keys, and O = sum S V.
 */
#ifndef QUADRATIC_H
#define QUADRATIC_H

#include "steps.h"

/* Of all keys of a head, W [M, padded(Dk)], and of a chunk of them its shifts, totals and then factors. */
INLINE Block weights_of(const Call *call, Span keys) {
    const int64_t width = padded(call->p->key_channels);
    return (Block){call->partials + keys.start * width, filled(keys), width};
}

INLINE Span all_keys(const Call *call) { return (Span){0, call->p->positions}; }

INLINE Partial scale_of(const Call *call, int64_t chunk) {
    const Block all = weights_of(call, all_keys(call));
    float *data = row_of(all, all.rows + 2 * chunk);
    return (Partial){{data, all.columns, 0}, data, data + all.columns};
}

INLINE const float *factors_of(const Call *call, int64_t chunk) { return scale_of(call, chunk).total; }

/* Sums over a chunk of the queries: gradients of rho_k(K) [M, padded(Dk)] and V [M, padded(Dv)], behind the above. */
typedef struct {
    Block keys, values;
} Slopes;

INLINE int64_t slope_floats(const Call *call) {
    const Block all = weights_of(call, all_keys(call));
    return all.rows * (all.columns + padded(call->p->value_channels));
}

INLINE Slopes slopes_of(const Call *call, int64_t chunk) {
    const Block all = weights_of(call, all_keys(call));
    float *data = scale_of(call, call->chunks).shift + chunk * slope_floats(call);
    const Block keys = take(&data, all.rows, all.columns);
    return (Slopes){keys, take(&data, all.rows, padded(call->p->value_channels))};
}

/* What is left of a head to later steps. */
INLINE int64_t kept_floats(const Call *call, int64_t slopes) {
    const Block all = weights_of(call, all_keys(call));
    return (all.rows + 2 * call->chunks) * all.columns + slopes * slope_floats(call);
}

static void weigh_keys(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const Matrix key = head_of(&call->key, batch, head, p->key_channels, p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const Partial scale = scale_of(call, chunk);
    (void)scratch;
    clear(scale, p->softmax);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        const Block weights = weights_of(call, n);
        load(weights, rows_in(key, n), nothing);
        silence(weights, mask, n, nothing);
        if (p->softmax) raise_shift(scale, weights);
    }
    for (int64_t i = 0; p->softmax && (n = block_in(p, chunk, i)).count; i++)
        weigh(weights_of(call, n), scale.shift, scale.total, in_pairs(p));
}

/* f = exp(shift - largest shift) / total of all keys, or one over how many there are. */
static void compare_chunks(const Call *call, int64_t batch, int64_t head, int64_t piece, float *scratch) {
    const int64_t width = padded(call->p->key_channels);
    (void)piece, (void)scratch;
    for (int64_t c = 0; c < width; c += LANES) {
        vec shift = LOAD(scale_of(call, 0).shift + c), total = SPLAT(0.0f);
        for (int64_t i = 1; i < call->chunks; i++) shift = MAX(shift, LOAD(scale_of(call, i).shift + c));
        for (int64_t i = 0; i < call->chunks; i++) {
            const Partial scale = scale_of(call, i);
            const vec ratio = exponential(LOAD(scale.shift + c) - shift, 0);
            total = FMA(LOAD(scale.total + c), ratio, total);
            STORE(scale.total + c, ratio);
        }
        const vec by = SPLAT(1.0f) / divisors(call, batch, head, total);
        for (int64_t i = 0; i < call->chunks; i++) {
            float *factors = scale_of(call, i).total + c;
            STORE(factors, LOAD(factors) * by);
        }
    }
}

/* to = x, or to += x, [padded(Dk), .] for to of as many columns, each row multiplied by its factor. */
INLINE void scale_rows(Block to, Block x, const float *factors, const int add) {
    for (int64_t c = 0; c < x.rows; c++)
        for (int64_t n = 0; n < x.columns; n += LANES) {
            const vec before = add ? LOAD(row_of(to, c) + n) : SPLAT(0.0f);
            STORE(row_of(to, c) + n, FMA(SPLAT(factors[c]), LOAD(row_of(x, c) + n), before));
        }
}

/* c += left right, of which `steps` numbers are summed. */
INLINE void add_to(int pairs, Left left, Block right, int64_t steps, Block c) {
    FOR_STRIPS(r, c.rows, pairs) add_product(pairs, left, r, right, steps, row_of(c, r.start));
}

static void score(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix query = head_of(&then->query, batch, head, p->key_channels, then->p);
    const Matrix output = head_of(&then->output, batch, head, p->value_channels, then->p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const int pairs = in_pairs(p);
    Block queries = take(&scratch, width, BLOCK), scaled = take(&scratch, width, BLOCK);
    Block scores = take(&scratch, BLOCK, BLOCK), values = take(&scratch, BLOCK, columns);
    Block sums = take(&scratch, BLOCK, columns);
    const Block scaled_words = take(&scratch, width, BLOCK), score_words = take(&scratch, BLOCK, BLOCK);
    const Block key_words = take(&scratch, BLOCK, width), value_words = take(&scratch, BLOCK, columns);
    Span n, m;
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        queries.columns = scaled.columns = scores.columns = sums.rows = filled(n);
        load(queries, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(queries, p->key_channels, p->groups, pairs);
        memset(sums.data, 0, sums.rows * columns * 4);
        for (int64_t k = 0; k < call->chunks; k++) {
            scale_rows(scaled, queries, factors_of(call, k), 0);
            const Block by = over_rows(scaled, scaled_words, pairs);
            for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
                scores.rows = values.rows = filled(m);
                multiply(pairs, over_columns(weights_of(call, m), key_words, pairs), by, width, scores);
                const Left left = {over_rows(scores, score_words, pairs).data, 1, scores.columns};
                add_to(pairs, left, load_silenced(values, value_words, value, mask, m, pairs), scores.rows, sums);
            }
        }
        store(sums, rows_in(output, n), 0);
    }
}

static int quadratic(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const Step steps[] = {{weigh_keys, call->chunks}, {compare_chunks, 1}, {score, call->then->chunks}};
    return for_steps(call, steps, 3, kept_floats(call, 0), BLOCK * (4 * width + 3 * columns + 2 * BLOCK));
}

/* A block of the queries, and of gradients of their outputs, in words: (A f)^T and dO^T for sums over channels, A and dO
 * for sums over queries. */
typedef struct {
    Block scaled, d_out_turned, queries, d_out;
} Queries;

INLINE Block rows_of(Block x, Span n) { return (Block){row_of(x, n.start), filled(n), x.columns}; }

/* What such a block adds to the gradients of a block of the keys, dS^T A and S^T dO for dS = dO V^T; and d_scaled +=
 * W^T dS^T, that of (A f)^T, where it has memory. */
static void back_over_block(const Call *call, Span m, Matrix value, Matrix mask, const Queries *q, Slopes slopes,
                            Block d_scaled, float *scratch) {
    const Block weights = weights_of(call, m);
    const int64_t rows = weights.rows, width = weights.columns, columns = slopes.values.columns;
    const int64_t queries = q->scaled.columns;
    const int pairs = in_pairs(call->p);
    const Block scores = take(&scratch, rows, queries), score_words = take(&scratch, rows, queries);
    const Block values = take(&scratch, rows, columns), value_words = take(&scratch, rows, columns);
    const Block key_words = take(&scratch, rows, width);
    if (call->d_value.data) {
        multiply(pairs, over_columns(weights, key_words, pairs), q->scaled, width, scores);
        add_to(pairs, over_columns(scores, score_words, pairs), q->d_out, queries, rows_of(slopes.values, m));
    }
    if (!call->d_key.data && !d_scaled.data) return;
    load(values, rows_in(value, m), 0.0f);
    silence(values, mask, m, 0.0f);
    multiply(pairs, over_columns(values, value_words, pairs), q->d_out_turned, columns, scores);
    if (call->d_key.data)
        add_to(pairs, over_columns(scores, score_words, pairs), q->queries, queries, rows_of(slopes.keys, m));
    if (d_scaled.data) {
        const Left back = {over_rows(weights, key_words, pairs).data, 1, width};
        add_to(pairs, back, over_rows(scores, score_words, pairs), rows, d_scaled);
    }
}

/* Gradients of a chunk of the queries, and what it adds to those of keys and values. */
static void score_backward(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix query = head_of(&then->query, batch, head, p->key_channels, then->p);
    const Matrix d_query = head_of(&then->d_query, batch, head, p->key_channels, then->p);
    const Matrix d_output = head_of(&then->d_output, batch, head, p->value_channels, then->p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const int pairs = in_pairs(p);
    Block weights = take(&scratch, width, BLOCK), turned = take(&scratch, BLOCK, width);
    Block scaled = take(&scratch, width, BLOCK), d_scaled = take(&scratch, d_query.data ? width : 0, BLOCK);
    Block slope = take(&scratch, width, BLOCK);
    Block d_out = take(&scratch, BLOCK, columns), d_out_turned = take(&scratch, columns, BLOCK);
    const Block turned_words = take(&scratch, BLOCK, width), scaled_words = take(&scratch, width, BLOCK);
    const Block d_out_words = take(&scratch, BLOCK, columns), d_out_turned_words = take(&scratch, columns, BLOCK);
    const Slopes slopes = slopes_of(call, chunk);
    memset(slopes.keys.data, 0, slope_floats(call) * 4);
    if (!d_query.data) d_scaled.data = NULL;
    Span n, m;
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        turned.rows = d_out.rows = filled(n);
        weights.columns = scaled.columns = d_scaled.columns = slope.columns = d_out_turned.columns = filled(n);
        load(weights, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(weights, p->key_channels, p->groups, pairs);
        load(turned, flipped(matrix(weights.data, width, weights.columns)), 0.0f);
        Queries q = {.queries = over_rows(turned, turned_words, pairs)};
        q.d_out = load_over_rows(d_out, d_out_words, rows_in(d_output, n), pairs);
        q.d_out_turned = load_over_rows(d_out_turned, d_out_turned_words, flipped(rows_in(d_output, n)), pairs);
        memset(slope.data, 0, width * slope.columns * 4);
        for (int64_t k = 0; k < call->chunks; k++) {
            scale_rows(scaled, weights, factors_of(call, k), 0);
            q.scaled = over_rows(scaled, scaled_words, pairs);
            memset(d_scaled.data, 0, d_scaled.rows * d_scaled.columns * 4);
            for (int64_t j = 0; (m = block_in(p, k, j)).count; j++)
                back_over_block(call, m, value, mask, &q, slopes, d_scaled, scratch);
            scale_rows(slope, d_scaled, factors_of(call, k), 1);
        }
        if (!d_query.data) continue;
        if (p->softmax) pull_back_queries(slope, weights, p->key_channels, p->groups);
        store(slope, flipped(rows_in(d_query, n)), 0);
    }
}

/* sums [padded(Dk)] += sum_m f W slope, of a block. */
INLINE void add_weighted(Block weights, Block slope, const float *factors, float *sums) {
    for (int64_t c = 0; c < slope.columns; c += LANES) {
        vec sum = SPLAT(0.0f);
        for (int64_t r = 0; r < slope.rows; r++)
            sum = FMA(LOAD(row_of(weights, r) + c), LOAD(row_of(slope, r) + c), sum);
        STORE(sums + c, FMA(LOAD(factors + c), sum, LOAD(sums + c)));
    }
}

/* Slopes of a block become gradients: f W (slope - sums), or f slope where there are no weights. */
INLINE void pull_back_block(Block slope, const Block *weights, const float *factors, const float *sums) {
    for (int64_t r = 0; r < slope.rows; r++)
        for (int64_t c = 0; c < slope.columns; c += LANES) {
            float *x = row_of(slope, r) + c;
            vec factor = LOAD(factors + c);
            if (weights) factor *= LOAD(row_of(*weights, r) + c);
            STORE(x, factor * (LOAD(x) - LOAD(sums + c)));
        }
}

/* Gradients of keys and values, from the sums of all chunks of the queries. */
static void weigh_keys_backward(const Call *call, int64_t batch, int64_t head, int64_t piece, float *scratch) {
    const Problem *p = call->p;
    const Slopes slopes = slopes_of(call, 0);
    const Matrix d_key = head_of(&call->d_key, batch, head, p->key_channels, p);
    const Block sums = take(&scratch, 1, slopes.keys.columns);
    (void)piece;
    for (int64_t apart = 1; apart < call->then->chunks; apart *= 2)
        for (int64_t a = 0; a + apart < call->then->chunks; a += 2 * apart) {
            float *to = slopes_of(call, a).keys.data, *from = slopes_of(call, a + apart).keys.data;
            for (int64_t i = 0; i < slope_floats(call); i += LANES) STORE(to + i, LOAD(to + i) + LOAD(from + i));
        }
    if (call->d_value.data) store(slopes.values, head_of(&call->d_value, batch, head, p->value_channels, p), 0);
    if (!d_key.data) return;
    memset(sums.data, 0, sums.columns * 4);
    Span m;
    for (int64_t k = 0; p->softmax && k < call->chunks; k++)
        for (int64_t j = 0; (m = block_in(p, k, j)).count; j++)
            add_weighted(weights_of(call, m), rows_of(slopes.keys, m), factors_of(call, k), sums.data);
    for (int64_t k = 0; k < call->chunks; k++)
        for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
            const Block weights = weights_of(call, m), slope = rows_of(slopes.keys, m);
            pull_back_block(slope, p->softmax ? &weights : NULL, factors_of(call, k), sums.data);
            store(slope, rows_in(d_key, m), 0);
        }
}

static int quadratic_backward(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const Step steps[] = {
        {weigh_keys, call->chunks}, {compare_chunks, 1}, {score_backward, call->then->chunks}, {weigh_keys_backward, 1},
    };
    const int wanted = call->d_key.data || call->d_value.data;
    const int64_t scratch = BLOCK * (8 * width + 6 * columns + 2 * BLOCK);
    return for_steps(call, steps, wanted ? 4 : 3, kept_floats(call, call->then->chunks), scratch);
}

#endif
