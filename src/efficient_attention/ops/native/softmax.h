/* What the normalizations do to blocks: softmax over positions, softmax over channels, and back. */
#ifndef SOFTMAX_H
#define SOFTMAX_H

#include "work.h"

/* Take a partial context relative to the largest key including those of a block [., padded(Dk)]. */
static void raise_shift(Partial x, Block keys) {
    for (int64_t c = 0; c < keys.columns; c += LANES) {
        vec before = LOAD(x.shift + c), largest = before;
        for (int64_t r = 0; r < keys.rows; r++) largest = MAX(LOAD(row_of(keys, r) + c), largest);
        uvec raised = (uvec)(largest > before);
        uint32_t any = 0;
        for (int i = 0; i < LANES; i++) any |= raised[i];
        if (!any) continue;
        vec ratio = exponential(before - largest, 0);
        STORE(x.shift + c, largest);
        STORE(x.total + c, LOAD(x.total + c) * ratio);
        for (int i = 0; i < LANES; i++)
            for (int64_t e = 0; e < x.sums.columns; e += LANES) {
                float *sums = row_of(x.sums, c + i) + e;
                STORE(sums, LOAD(sums) * SPLAT(ratio[i]));
            }
    }
}

/* Weights exp(k - shift) of keys, which may be the same memory, and 0 in rows that keys do not have. They are added to
 * total, as precise as products take them. */
static void weigh(Block weights, Block keys, const float *shift, float *total, int pairs) {
    for (int64_t c = 0; c < weights.columns; c += LANES) {
        vec of_block = SPLAT(0.0f), by = LOAD(shift + c);
        for (int64_t r = 0; r < keys.rows; r++) {
            vec weight = exponential(LOAD(row_of(keys, r) + c) - by, pairs);
            if (pairs) weight = widened(narrowed(weight));
            STORE(row_of(weights, r) + c, weight);
            of_block += weight;
        }
        for (int64_t r = keys.rows; r < weights.rows; r++) STORE(row_of(weights, r) + c, SPLAT(0.0f));
        if (total) STORE(total + c, LOAD(total + c) + of_block);
    }
}

/* So many channels are summed in a row, for the rounding. */
enum { ROW_OF_CHANNELS = 16 };

/* The largest of so many numbers for each lane; they are `row` apart. */
INLINE vec largest_of(const float *x, int64_t count, int64_t row) {
    vec most = LOAD(x), other = most;
    int64_t c = 1;
    for (; c + 4 <= count; c += 4) {
        most = MAX(MAX(LOAD(x + c * row), LOAD(x + (c + 1) * row)), most);
        other = MAX(MAX(LOAD(x + (c + 2) * row), LOAD(x + (c + 3) * row)), other);
    }
    for (; c < count; c++) most = MAX(LOAD(x + c * row), most);
    return MAX(most, other);
}

/* Queries [padded(Dk), .] become their softmax over the channels of each group, and these are multiplied by factors, if
 * there are any. */
static void normalize(Block queries, int64_t channels, int64_t groups, const float *factors, int pairs) {
    const int64_t size = channels / groups, row = queries.columns;
    for (int64_t first = 0; first < channels; first += size)
        for (int64_t n = 0; n < row; n += LANES) {
            float *x = row_of(queries, first) + n;
            const vec largest = largest_of(x, size, row);
            vec total = SPLAT(0.0f);
            for (int64_t start = 0; start < size; start += ROW_OF_CHANNELS) {
                vec sum = SPLAT(0.0f);
                for (int64_t c = start; c < smaller(start + ROW_OF_CHANNELS, size); c++) {
                    vec weight = exponential(LOAD(x + c * row) - largest, pairs);
                    STORE(x + c * row, weight);
                    sum += weight;
                }
                total += sum;
            }
            const vec by = SPLAT(1.0f) / total;
            for (int64_t c = 0; c < size; c++)
                STORE(x + c * row, LOAD(x + c * row) * by * SPLAT(factors ? factors[first + c] : 1.0f));
        }
}

/* d_weights [padded(Dk), .] become d_queries, for weights that `normalize` has made. */
static void pull_back_queries(Block d_weights, Block weights, int64_t channels, int64_t groups) {
    const int64_t size = channels / groups, row = weights.columns;
    for (int64_t first = 0; first < channels; first += size)
        for (int64_t n = 0; n < row; n += LANES) {
            float *d = row_of(d_weights, first) + n, *x = row_of(weights, first) + n;
            vec total = SPLAT(0.0f);
            for (int64_t start = 0; start < size; start += ROW_OF_CHANNELS) {
                vec sum = SPLAT(0.0f);
                for (int64_t c = start; c < smaller(start + ROW_OF_CHANNELS, size); c++)
                    sum = FMA(LOAD(d + c * row), LOAD(x + c * row), sum);
                total += sum;
            }
            for (int64_t c = 0; c < size; c++)
                STORE(d + c * row, (LOAD(d + c * row) - total) * LOAD(x + c * row));
        }
}

#endif
