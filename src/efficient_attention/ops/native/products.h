/* Products of blocks.
 *
 * They take words of 4 bytes: a float32, or two bfloat16 that are neighbours in the summed dimension, a pair, where the
 * processor multiplies those. Sums are float32 either way.
 */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "blocks.h"

/* How many numbers are added in a row; pairs have lost more digits than a longer row costs. */
enum { SUM = 128 };

/* Whether products take pairs. */
INLINE int in_pairs(const Problem *p) {
#ifdef __AVX512BF16__
    return p->bfloat16;
#else
    (void)p;
    return 0;
#endif
}

/* The left factor: the word of row i and step k is at words[i * row + k * step]. */
typedef struct {
    const float *words;
    int64_t row, step;
} Left;

/* Words for sums over the rows of x: x, or pairs of its rows, [rows / 2, columns], which are put into `words`. */
INLINE Block over_rows(Block x, Block words, int pairs) {
    if (!pairs) return x;
    for (int64_t r = 0; r < x.rows; r += 2)
        for (int64_t c = 0; c < x.columns; c += LANES) {
            half first = narrowed(LOAD(row_of(x, r) + c)), second = narrowed(LOAD(row_of(x, r + 1) + c));
            STORE(row_of(words, r / 2) + c, paired(first, second));
        }
    return words;
}

/* Words for sums over the columns of x: x, or pairs of its columns, [rows, columns / 2], which are put into `words`. */
INLINE Left over_columns(Block x, Block words, int pairs) {
    if (!pairs) return (Left){x.data, x.columns, 1};
    for (int64_t i = 0; i < x.rows * x.columns; i += LANES)
        STORE_HALF((uint16_t *)words.data + i, narrowed(LOAD(x.data + i)));
    return (Left){words.data, x.columns / 2, 1};
}

/* Words for sums over the rows of a matrix, padded with 0: as `load` and `over_rows` give them. */
INLINE Block load_over_rows(Block block, Block words, Matrix x, int pairs) {
    const int whole = x.rows == block.rows && x.columns == block.columns;
    if (pairs && whole && x.across == 1) {
        for (int64_t r = 0; r < x.rows; r += 2)
            for (int64_t c = 0; c < x.columns; c += LANES)
                STORE(row_of(words, r / 2) + c, paired(LOAD_HALF(at(x, r, c)), LOAD_HALF(at(x, r + 1, c))));
        return words;
    }
    if (pairs && whole && x.down == 1 && x.across % 2 == 0 && (uintptr_t)x.data % 4 == 0) {
        /* Pairs of rows are words in memory already. */
        words.rows = x.rows / 2;
        load(words, (Matrix){x.data, x.rows / 2, x.columns, 1, x.across / 2, 4}, 0.0f);
        return words;
    }
    load(block, x, 0.0f);
    return over_rows(block, words, pairs);
}

/* Words of a block of values for sums over its positions, 0 where they are masked. */
static Block load_silenced(Block values, Block words, Matrix value, Matrix mask, Span n, int pairs) {
    if (!mask.data) return load_over_rows(values, words, rows_in(value, n), pairs);
    load(values, rows_in(value, n), 0.0f);
    silence(values, mask, n, 0.0f);
    return over_rows(values, words, pairs);
}

INLINE vec multiply_add(vec a, vec b, vec c, int pairs) {
#ifdef __AVX512BF16__
    if (pairs) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
    (void)pairs;
    return FMA(a, b, c);
}

/* c [ROWS, vectors * LANES] = left b, or += it: all sums in registers, and added to those before when complete, for the
 * rounding. b [steps, .] and c have rows of `width`. */
INLINE void tile(const int vectors, const int pairs, Left left, const float *b, int64_t steps, int64_t width,
                 float *c, const int add) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = SPLAT(0.0f);
    /* Two places to count rows from: with one, their addresses are more than the registers for addresses. */
    const float *upper = left.words, *lower = upper + ROWS / 2 * left.row;
    for (const float *end = b + steps * width; b < end; b += width, upper += left.step, lower += left.step) {
        vec row[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) row[j] = LOAD(b + j * LANES);
        UNROLL for (int i = 0; i < ROWS; i++) {
            vec word = SPLAT((i < ROWS / 2 ? upper : lower)[i % (ROWS / 2) * left.row]);
            UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = multiply_add(word, row[j], sum[i][j], pairs);
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < vectors; j++) {
            float *to = c + i * width + j * LANES;
            if (add) sum[i][j] += LOAD(to);
            STORE(to, sum[i][j]);
        }
}

INLINE void strip(const int pairs, Left left, Block b, int64_t steps, float *c, const int add) {
    int64_t j = 0;
    for (; j + VECTORS * LANES <= b.columns; j += VECTORS * LANES)
        tile(VECTORS, pairs, left, b.data + j, steps, b.columns, c + j, add);
    if (j < b.columns) tile(1, pairs, left, b.data + j, steps, b.columns, c + j, add);
}

/* ROWS rows of a product, from `first` on, are added to [ROWS, b.columns]; `steps` numbers are summed, half as many
 * pairs. */
static void add_product(int pairs, Left left, int64_t first, Block b, int64_t steps, float *rows) {
    left.words += first * left.row;
    if (pairs) strip(1, left, b, steps / 2, rows, 1);
    else strip(0, left, b, steps, rows, 1);
}

/* The rows themselves, of which no more than SUM numbers are added in a row. */
static void product(int pairs, Left left, int64_t first, Block b, int64_t steps, float *rows) {
    left.words += first * left.row;
    if (pairs) {
        strip(1, left, b, steps / 2, rows, 0);
        return;
    }
    strip(0, left, b, steps < SUM ? steps : SUM, rows, 0);
    for (int64_t k = SUM; k < steps; k += SUM) {
        left.words += SUM * left.step, b.data += SUM * b.columns;
        strip(0, left, b, steps - k < SUM ? steps - k : SUM, rows, 1);
    }
}

/* All rows of a product. */
INLINE void multiply(int pairs, Left left, Block b, int64_t steps, Block c) {
    for (int64_t r = 0; r < c.rows; r += ROWS) product(pairs, left, r, b, steps, row_of(c, r));
}

/* target [n, Dv] = weights^T context, + `added` where there is any, in the order in which it is stored; meanwhile the
 * block of `ahead` behind n is fetched. Words of both factors are for sums over their `steps` rows. */
static void write_product(int pairs, Block weights, Block context, int64_t steps, Matrix added, Matrix target, Span n,
                          Block strip, int stream, Matrix ahead) {
    const int channel_major = target.across != 1;
    const Block left = channel_major ? context : weights, right = channel_major ? weights : context;
    added = rows_in(added, n), target = rows_in(target, n);
    if (channel_major) added = flipped(added), target = flipped(target);
    strip.columns = right.columns;
    for (int64_t r = 0; r < target.rows; r += ROWS) {
        const Span some = {r, target.rows - r < ROWS ? target.rows - r : ROWS};
        fetch(ahead, n, r / ROWS, (target.rows + ROWS - 1) / ROWS);
        product(pairs, (Left){left.data, 1, left.columns}, r, right, steps, strip.data);
        if (added.data) add(strip, rows_in(added, some));
        store(strip, rows_in(target, some), stream);
    }
}

#endif
