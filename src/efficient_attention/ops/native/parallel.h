/* Threads, those of the OpenMP that PyTorch has loaded. */
#ifndef PARALLEL_H
#define PARALLEL_H

#include <stdlib.h>

#include "vectors.h"

/* `work` on each of `count` parts, each thread with scratch memory of its own; 1 if there is no memory. */
static int for_each(int64_t count, int threads, void (*work)(const void *what, int64_t i, float *scratch),
                    const void *what, int64_t scratch_floats) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = aligned_alloc(64, (size_t)(scratch_floats * 4 + 63) / 64 * 64);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++)
            if (scratch) work(what, i, scratch);
        _mm_sfence(); /* what went past the caches is there for whoever reads it next */
        free(scratch);
    }
    return failed;
}

#endif
