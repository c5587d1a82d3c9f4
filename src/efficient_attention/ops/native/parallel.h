/* Threads, those of the OpenMP that PyTorch has loaded. */
#ifndef PARALLEL_H
#define PARALLEL_H

#include <stdlib.h>

#include "tiles.h"

INLINE float *memory_for(int64_t floats) { return aligned_alloc(64, (size_t)(floats * 4 + 64) / 64 * 64); }

/* Parts of a work, which threads take one after the other, each with scratch memory of its own. */
typedef struct {
    int64_t count, scratch_floats, next;
    void (*work)(const void *what, int64_t i, float *scratch);
    const void *what;
    int failed;
} Parts;

static void take_parts(Parts *parts) {
    float *scratch = memory_for(parts->scratch_floats);
    const Tiles others = take_tiles();
    if (!scratch) __atomic_store_n(&parts->failed, 1, __ATOMIC_RELAXED);
    for (int64_t i; scratch && (i = __atomic_fetch_add(&parts->next, 1, __ATOMIC_RELAXED)) < parts->count;)
        parts->work(parts->what, i, scratch);
    _mm_sfence(); /* what went past the caches is there for whoever reads it next */
    give_back_tiles(others);
    free(scratch);
}

/* `work` on each of `count` parts; 1 if there is no memory. */
static int for_each(int64_t count, int threads, void (*work)(const void *what, int64_t i, float *scratch),
                    const void *what, int64_t scratch_floats) {
    Parts parts = {count, scratch_floats, 0, work, what, 0};
    if (threads == 1) {
        take_parts(&parts);
    } else {
#pragma omp parallel num_threads(threads)
        take_parts(&parts);
    }
    return parts.failed;
}

#endif
