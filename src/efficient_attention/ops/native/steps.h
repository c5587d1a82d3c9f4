/* Short inputs: a head goes through all steps at once, so that what one leaves for the next stays in the cache. Where
 * that would leave threads without work, all work on pieces of the same heads. What is added, and in which order, is
 * the same.
 */
#ifndef STEPS_H
#define STEPS_H

#include "passes.h"

/* What is done for a head, in pieces that do not depend on each other. */
typedef struct {
    Work work;
    int64_t pieces;
} Step;

/* Steps one after another; `floats` is the memory in which a head leaves what later steps take. */
typedef struct {
    const Call *call;
    const Step *steps;
    int64_t count, floats;
    float *memory; /* of all heads, where they are not each of one thread */
} Steps;

/* All steps of one head. */
static void whole_head(const void *what, int64_t i, float *scratch) {
    const Steps *steps = what;
    const int64_t heads = steps->call->p->heads;
    Call call = *steps->call;
    call.partials = scratch;
    for (const Step *step = steps->steps; step < steps->steps + steps->count; step++)
        for (int64_t piece = 0; piece < step->pieces; piece++)
            step->work(&call, i / heads, i % heads, piece, scratch + steps->floats);
}

/* A piece of the only step, of one of the heads. */
static void piece_of_head(const void *what, int64_t i, float *scratch) {
    const Steps *steps = what;
    const int64_t pieces = steps->steps->pieces, head = i / pieces, heads = steps->call->p->heads;
    Call call = *steps->call;
    call.partials = steps->memory + head * steps->floats;
    steps->steps->work(&call, head / heads, head % heads, i % pieces, scratch);
}

/* At most so many numbers are in memory for what heads that threads share leave for later steps. */
enum { MOST_SHARED = 4 << 20 };

static int for_steps(const Call *call, const Step *steps, int64_t count, int64_t floats, int64_t scratch_floats) {
    const int64_t heads = all_heads(call->p).count, chunks = larger(call->chunks, call->then->chunks);
    const int threads = call->p->threads;
    const int busy = heads % threads == 0 || heads >= 4 * threads;
    if (busy || chunks == 1 || heads * floats > MOST_SHARED) {
        const Steps all = {call, steps, count, floats, NULL};
        return for_each(heads, threads, whole_head, &all, floats + scratch_floats);
    }
    float *memory = memory_for(heads * floats);
    int failed = !memory;
    for (int64_t i = 0; i < count && !failed; i++) {
        const Steps one = {call, steps + i, 1, floats, memory};
        failed = for_each(heads * steps[i].pieces, threads, piece_of_head, &one, scratch_floats);
    }
    free(memory);
    return failed;
}

/* What LANES rows are divided by: the sums of their weights, or how many keys there are; where none has any, 1. */
INLINE vec divisors(const Call *call, int64_t batch, int64_t head, vec total) {
    const Problem *p = call->p;
    if (!p->softmax) total = SPLAT((float)attended(mask_of(&call->mask, batch, head), p->positions));
    return MAX(total, SPLAT(1.0f));
}

#endif
