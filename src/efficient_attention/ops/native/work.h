/* Work in parallel: chunks of the positions of one head, whose contexts are added pairwise.
 *
 * So neither what is computed nor its rounding depends on the number of threads.
 */
#ifndef WORK_H
#define WORK_H

#include <float.h>
#include <math.h>

#include "parallel.h"
#include "products.h"

/* How many blocks of a chunk are summed before they are added to those before: rounding grows with the length of a
 * sum. */
enum { RUN = 4 };

typedef struct Call Call;
typedef void (*Work)(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch);

/* The arguments of an operator; those that it does not take are zero. */
struct Call {
    const Problem *p;
    View key, value, mask, query, d_output, output, d_query, d_key, d_value;
    View x, added, d_x, weight, bias; /* of the module */
    const float *mean, *shift, *correction;
    float *partials;
    int64_t chunks, parts; /* of each head; sums that are made at a time, each of the size of a context */
    Span heads;            /* of all samples, that are at work: none unless it is set; `partials` has sums for these */
    const Call *then;      /* what is done next with what a head has come to */
    Work work;
};

INLINE int64_t chunks_of(const Problem *p) { return (p->positions + p->chunk - 1) / p->chunk; }

/* Block i of a chunk; empty behind the last. */
INLINE Span block_in(const Problem *p, int64_t chunk, int64_t i) {
    int64_t start = chunk * p->chunk + i * BLOCK, left = p->positions - start;
    if (i * BLOCK >= p->chunk || left < 0) left = 0;
    return (Span){start, left < BLOCK ? left : BLOCK};
}

/* Rows of a block that has these positions: as few whole vectors as hold them. */
INLINE int64_t filled(Span n) { return padded(n.count); }

INLINE Span all_heads(const Problem *p) { return (Span){0, p->batch * p->heads}; }

static void work_on_chunk(const void *what, int64_t i, float *scratch) {
    const Call *call = what;
    const int64_t head = call->heads.start + i / call->chunks, heads = call->p->heads;
    call->work(call, head / heads, head % heads, i % call->chunks, scratch);
}

/* `work` on every chunk of the heads at work. */
static int for_chunks(Call *call, Work work, int64_t scratch_floats) {
    call->work = work;
    return for_each(call->heads.count * call->chunks, call->p->threads, work_on_chunk, call, scratch_floats);
}

/* Sums in the making, one or several below each other: [parts * padded(Dk), padded(Dv)] of weighted values, relative to
 * shift, and the total of the weights. */
typedef struct {
    Block sums;
    float *shift, *total;
} Partial;

INLINE int64_t partial_floats(const Call *call) {
    return call->parts * padded(call->p->key_channels) * (padded(call->p->value_channels) + 2);
}

INLINE Partial take_partial(float **scratch, const Call *call) {
    const int64_t rows = call->parts * padded(call->p->key_channels);
    const Block sums = take(scratch, rows, padded(call->p->value_channels));
    const Block shift = take(scratch, 1, rows), total = take(scratch, 1, rows);
    return (Partial){sums, shift.data, total.data};
}

/* That of a chunk. */
INLINE Partial partial_of(const Call *call, int64_t head, int64_t chunk) {
    float *data = call->partials + ((head - call->heads.start) * call->chunks + chunk) * partial_floats(call);
    return take_partial(&data, call);
}

/* Some of its rows. */
INLINE Partial part_of(Partial x, int64_t first, int64_t rows) {
    return (Partial){{row_of(x.sums, first), rows, x.sums.columns}, x.shift + first, x.total + first};
}

/* Nothing, relative to the lowest number under softmax: where no key has any weight, -inf - -inf would be NaN. */
INLINE void clear(Partial x, int softmax) {
    memset(x.sums.data, 0, x.sums.rows * x.sums.columns * 4);
    memset(x.total, 0, x.sums.rows * 4);
    for (int64_t c = 0; c < x.sums.rows; c++) x.shift[c] = softmax ? -FLT_MAX : 0.0f;
}

/* a += b, relative to the largest key of both. */
static void merge(Partial a, Partial b) {
    for (int64_t c = 0; c < a.sums.rows; c++) {
        float shift = a.shift[c] > b.shift[c] ? a.shift[c] : b.shift[c];
        float of_a = a.shift[c] == shift ? 1.0f : expf(a.shift[c] - shift);
        float of_b = b.shift[c] == shift ? 1.0f : expf(b.shift[c] - shift);
        float *to = row_of(a.sums, c), *from = row_of(b.sums, c);
        for (int64_t e = 0; e < a.sums.columns; e++) to[e] = to[e] * of_a + from[e] * of_b;
        a.total[c] = a.total[c] * of_a + b.total[c] * of_b;
        a.shift[c] = shift;
    }
}

/* Sums of a run of a chunk: those of the chunk itself, where it has one run. */
INLINE Partial run_of(Partial whole, float **scratch, const Call *call) {
    const Problem *p = call->p;
    return smaller(p->positions, p->chunk) <= RUN * BLOCK ? whole : take_partial(scratch, call);
}

/* whole += run after block i of a chunk, if the run or the chunk ends there; the next is relative to the same keys. */
static void end_run(Partial whole, Partial run, const Problem *p, int64_t chunk, int64_t i) {
    if (run.sums.data == whole.sums.data) return;
    if ((i + 1) % RUN != 0 && block_in(p, chunk, i + 1).count) return;
    merge(whole, run);
    clear(run, 0);
    memcpy(run.shift, whole.shift, run.sums.rows * 4);
}

/* Pairs of `count` sums, a += b, that leave the sum of all in the first: a balanced tree. */
#define FOR_PAIRS(a, b, count) \
    for (int64_t apart = 1; apart < (count); apart *= 2) \
        for (int64_t a = 0, b = apart; b < (count); a += 2 * apart, b += 2 * apart)

/* Rows [parts, Dk] of each head at work from those of its chunks, as a balanced tree; LANES of them at a time. */
static void gather(const Call *call, float *sums, float *shift, float *total) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), slices = call->parts * width / LANES;
#pragma omp parallel for num_threads(p->threads)
    for (int64_t i = 0; i < call->heads.count * slices; i++) {
        const int64_t head = call->heads.start + i / slices, first = i % slices * LANES;
        FOR_PAIRS(a, b, call->chunks)
            merge(part_of(partial_of(call, head, a), first, LANES), part_of(partial_of(call, head, b), first, LANES));
        const Partial whole = partial_of(call, head, 0);
        for (int64_t r = first; r < first + LANES && r % width < p->key_channels; r++) {
            const int64_t to = (head * call->parts + r / width) * p->key_channels + r % width;
            memcpy(sums + to * p->value_channels, row_of(whole.sums, r), p->value_channels * 4);
            if (shift) shift[to] = whole.shift[r];
            if (total) total[to] = whole.total[r];
        }
    }
}

/* `for_chunks` with a Partial for each, at least one a head, and what they come to; 1 if there is no memory. These are
 * the caller's (native_calls.py), so that his account of memory has them, and there for so many heads at a time. */
static inline int for_partials(Call *call, Work work, int64_t scratch_floats, float *sums, float *shift, float *total) {
    const Span all = all_heads(call->p);
    call->chunks = call->p->positions ? chunks_of(call->p) : 1;
    for (int64_t start = 0; start < all.count; start += call->p->together) {
        call->heads = (Span){start, smaller(all.count - start, call->p->together)};
        if (for_chunks(call, work, scratch_floats + partial_floats(call))) return 1;
        gather(call, sums, shift, total);
    }
    return 0;
}

#endif
