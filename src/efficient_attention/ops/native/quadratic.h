/* The quadratic order, (rho_q(Q) rho_k(K)^T) V: cheaper where keys or queries are few.
 *
 * Weights of a chunk of the keys are relative to its own largest keys, W = exp(K - shift). What makes them rho_k(K) is
 * a factor f for each channel, known when all keys have been seen, by which the queries are multiplied: a chunk of the
 * keys adds S V to the output, for S = (A f) W^T and A = rho_q(Q).
 */
#ifndef QUADRATIC_H
#define QUADRATIC_H

#include "steps.h"

/* What a head keeps from step to step, N, M and channels padded. */
typedef struct {
    Block weights;  /* W [M, Dk] */
    Block shifts;   /* [chunks of keys, Dk]; in the end, of a gradient, the sums that a softmax takes off it */
    Block factors;  /* [chunks of keys, Dk]: totals of W, then f */
    Block added;    /* [chunks of keys * N, Dv or Dk]: what each, of several, adds to outputs or to gradients of A */
    Block d_keys;   /* [chunks of queries * M, Dk]: what each adds to gradients of rho_k(K), in the backward pass */
    Block d_values; /* [chunks of queries * M, Dv]: and to those of V */
} Kept;

INLINE Kept kept_in(const Call *call, float *memory) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels), keys = padded(p->positions);
    const int64_t queries = padded(call->then->p->positions), slopes = call->then->chunks * keys;
    Kept kept;
    kept.weights = take(&memory, keys, width);
    kept.shifts = take(&memory, call->chunks, width);
    kept.factors = take(&memory, call->chunks, width);
    kept.added = take(&memory, call->chunks > 1 ? call->chunks * queries : 0, larger(width, columns));
    kept.d_keys = take(&memory, slopes, width);
    kept.d_values = take(&memory, slopes, columns);
    return kept;
}

INLINE Kept kept_of(const Call *call) { return kept_in(call, call->partials); }

static int64_t kept_floats(const Call *call, int backward) {
    float first[1]; /* nothing is written */
    const Kept kept = kept_in(call, first);
    return (backward ? row_of(kept.d_values, kept.d_values.rows) : kept.d_keys.data) - first;
}

/* Matrices of one head, and what it keeps. */
typedef struct {
    Matrix query, key, value, mask, output, d_query, d_key, d_value, d_output;
    Kept kept;
    int64_t width, columns; /* channels, padded */
} Head;

INLINE Head head_in(const Call *call, int64_t batch, int64_t head) {
    const Problem *p = call->p;
    const Call *then = call->then;
    return (Head){
        .query = head_of(&then->query, batch, head, p->key_channels, then->p),
        .key = head_of(&call->key, batch, head, p->key_channels, p),
        .value = head_of(&call->value, batch, head, p->value_channels, p),
        .mask = mask_of(&call->mask, batch, head),
        .output = head_of(&then->output, batch, head, p->value_channels, then->p),
        .d_query = head_of(&then->d_query, batch, head, p->key_channels, then->p),
        .d_key = head_of(&call->d_key, batch, head, p->key_channels, p),
        .d_value = head_of(&call->d_value, batch, head, p->value_channels, p),
        .d_output = head_of(&then->d_output, batch, head, p->value_channels, then->p),
        .kept = kept_of(call),
        .width = padded(p->key_channels),
        .columns = padded(p->value_channels),
    };
}

INLINE Block rows_of(Block x, Span n) { return (Block){row_of(x, n.start), filled(n), x.columns}; }
INLINE Block only_rows(Block x, Span n) { return (Block){row_of(x, n.start), n.count, x.columns}; }

/* Of all chunks of the keys, what chunk k adds for a block of queries, so many numbers for each. */
INLINE Block added_by(const Call *call, Block added, int64_t k, Span n, int64_t columns) {
    const int64_t start = k * padded(call->then->p->positions) + n.start;
    return (Block){added.data + start * columns, filled(n), columns};
}

INLINE void add_block(Block to, Block x) {
    for (int64_t i = 0; i < x.rows * x.columns; i += LANES) STORE(to.data + i, LOAD(to.data + i) + LOAD(x.data + i));
}

/* Each row multiplied by its factor. */
INLINE void scale_rows(Block x, const float *factors) {
    for (int64_t r = 0; r < x.rows; r++)
        for (int64_t c = 0; c < x.columns; c += LANES)
            STORE(row_of(x, r) + c, SPLAT(factors[r]) * LOAD(row_of(x, r) + c));
}

/* The largest of some columns of x, if it is above the number there. */
INLINE void raise(const int vectors, int64_t column, Block x, float *largest) {
    vec most[WIDE];
    UNROLL for (int j = 0; j < vectors; j++) most[j] = LOAD(largest + column + j * LANES);
    for (int64_t r = 0; r < x.rows; r++)
        UNROLL for (int j = 0; j < vectors; j++) most[j] = MAX(LOAD(row_of(x, r) + column + j * LANES), most[j]);
    UNROLL for (int j = 0; j < vectors; j++) STORE(largest + column + j * LANES, most[j]);
}

/* Whether blocks of x may be read where they lie, as (Block){., ., x.down}: nothing is to be done to them. */
INLINE int lies_well(Matrix x, Matrix mask, int64_t columns) {
    return x.size == 4 && x.across == 1 && x.columns == columns && !mask.data;
}

INLINE Block lying(Matrix x, Span n) { return (Block){(float *)rows_in(x, n).data, n.count, x.down}; }

/* A^T [padded(Dk), .] of a block of queries, each channel multiplied by its factor if there is one. */
INLINE void load_queries(Block weights, Matrix query, Span n, const float *factors, const Problem *p) {
    load(weights, flipped(rows_in(query, n)), 0.0f);
    if (p->softmax) normalize(weights, p->key_channels, p->groups, factors, in_pairs(p));
    else if (factors) scale_rows(weights, factors);
}

/* W of a chunk of the keys, its shift and totals; blocks are `whole` vectors of keys, or have only those there are. */
INLINE void weigh_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, const int whole) {
    const Problem *p = call->p;
    const Head h = head_in(call, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const int there = p->softmax && lies_well(h.key, h.mask, h.kept.weights.columns);
    float *shift = row_of(h.kept.shifts, chunk), *total = row_of(h.kept.factors, chunk);
    for (int64_t c = 0; c < h.kept.shifts.columns; c++) shift[c] = p->softmax ? -FLT_MAX : 0.0f, total[c] = 0.0f;
    Span m;
    for (int64_t j = 0; (m = block_in(p, chunk, j)).count; j++) {
        const Block weights = whole ? rows_of(h.kept.weights, m) : only_rows(h.kept.weights, m);
        if (!there) load(weights, rows_in(h.key, m), nothing), silence(weights, h.mask, m, nothing);
        if (p->softmax) FOR_WIDE(raise, weights.columns, there ? lying(h.key, m) : weights, shift);
    }
    for (int64_t j = 0; p->softmax && (m = block_in(p, chunk, j)).count; j++) {
        const Block weights = whole ? rows_of(h.kept.weights, m) : only_rows(h.kept.weights, m);
        weigh(weights, there ? lying(h.key, m) : weights, shift, total, in_pairs(p));
    }
}

static void weigh_keys(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    (void)scratch;
    weigh_chunk(call, batch, head, chunk, 1);
}

/* f = exp(shift - largest shift) / total of all keys, or one over how many there are. */
static void compare_chunks(const Call *call, int64_t batch, int64_t head, int64_t piece, float *scratch) {
    const Kept kept = kept_of(call);
    (void)piece, (void)scratch;
    for (int64_t c = 0; c < kept.factors.columns; c += LANES) {
        vec shift = LOAD(kept.shifts.data + c), total = SPLAT(0.0f);
        for (int64_t k = 1; k < call->chunks; k++) shift = MAX(shift, LOAD(row_of(kept.shifts, k) + c));
        for (int64_t k = 0; k < call->chunks; k++) {
            float *of_chunk = row_of(kept.factors, k) + c;
            const vec ratio = exponential(LOAD(row_of(kept.shifts, k) + c) - shift, 0);
            total = FMA(LOAD(of_chunk), ratio, total);
            STORE(of_chunk, ratio);
        }
        const vec by = SPLAT(1.0f) / divisors(call, batch, head, total);
        for (int64_t k = 0; k < call->chunks; k++) {
            float *factor = row_of(kept.factors, k) + c;
            STORE(factor, LOAD(factor) * by);
        }
    }
}

/* What a chunk of the keys adds to the outputs of one of the queries: the outputs, if it is the only one. */
static void score(const Call *call, int64_t batch, int64_t head, int64_t piece, float *scratch) {
    const Problem *p = call->p;
    const Call *then = call->then;
    const Head h = head_in(call, batch, head);
    const int64_t chunk = piece / call->chunks, k = piece % call->chunks;
    const int pairs = in_pairs(p);
    Block queries = take(&scratch, h.width, BLOCK), sums = take(&scratch, BLOCK, h.columns);
    Block scores = take(&scratch, BLOCK, BLOCK), values = take(&scratch, BLOCK, h.columns);
    const Block query_words = take(&scratch, h.width, BLOCK), score_words = take(&scratch, BLOCK, BLOCK);
    const Block key_words = take(&scratch, BLOCK, h.width), value_words = take(&scratch, BLOCK, h.columns);
    Span n, m;
    for (int64_t i = 0; (n = block_in(then->p, chunk, i)).count; i++) {
        queries.columns = scores.columns = sums.rows = filled(n);
        load_queries(queries, h.query, n, row_of(h.kept.factors, k), p);
        const Block asking = over_rows(queries, query_words, pairs);
        const Block to = call->chunks > 1 ? added_by(call, h.kept.added, k, n, h.columns) : sums;
        for (int64_t j = 0; (m = block_in(p, k, j)).count; j++) {
            scores.rows = values.rows = filled(m);
            multiply(pairs, over_columns(rows_of(h.kept.weights, m), key_words, pairs), asking, h.width, scores);
            const Left left = {over_rows(scores, score_words, pairs).data, 1, scores.columns};
            const Block right = load_silenced(values, value_words, h.value, h.mask, m, pairs);
            if (j) add_multiply(pairs, left, right, scores.rows, to);
            else multiply(pairs, left, right, scores.rows, to);
        }
        if (call->chunks == 1) store(to, rows_in(h.output, n), 0);
    }
}

/* Outputs of a chunk of the queries from what chunks of the keys add to them. */
static void add_scores(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->then->p;
    const Head h = head_in(call, batch, head);
    (void)scratch;
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        FOR_PAIRS(a, b, call->chunks)
            add_block(added_by(call, h.kept.added, a, n, h.columns), added_by(call, h.kept.added, b, n, h.columns));
        store(added_by(call, h.kept.added, 0, n, h.columns), rows_in(h.output, n), 0);
    }
}

static int quadratic(const Call *call) {
    const int64_t width = padded(call->p->key_channels), columns = padded(call->p->value_channels);
    const int64_t keys = call->chunks, queries = call->then->chunks;
    const Step steps[] = {{weigh_keys, keys}, {compare_chunks, 1}, {score, queries * keys}, {add_scores, queries}};
    const int64_t scratch = BLOCK * (3 * width + 3 * columns + 2 * BLOCK);
    return for_steps(call, steps, keys > 1 ? 4 : 3, kept_floats(call, 0), scratch);
}

#endif
