/* Threads, those of the OpenMP that PyTorch has loaded. */
#ifndef PARALLEL_H
#define PARALLEL_H

#include <stdlib.h>

#include "tiles.h"

INLINE float *memory_for(int64_t floats) { return aligned_alloc(64, (size_t)(floats * 4 + 64) / 64 * 64); }

/* `work` on each of `count` parts, each thread with scratch memory of its own; 1 if there is no memory. */
static int for_each(int64_t count, int threads, void (*work)(const void *what, int64_t i, float *scratch),
                    const void *what, int64_t scratch_floats) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = memory_for(scratch_floats);
        const Tiles others = take_tiles();
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++)
            if (scratch) work(what, i, scratch);
        _mm_sfence(); /* what went past the caches is there for whoever reads it next */
        give_back_tiles(others);
        free(scratch);
    }
    return failed;
}

#endif
