/* Products of blocks.
 *
 * They take words of 4 bytes: a float32, or two bfloat16 that are neighbours in the summed dimension, a pair, where the
 * processor multiplies those. Sums are float32 either way.
 */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "blocks.h"
#include "tiles.h"

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

/* Words for sums over the rows of x: x, or pairs of its rows, [rows / 2, columns], which are put into the memory of
 * `words`. */
INLINE Block over_rows(Block x, Block words, int pairs) {
    if (!pairs) return x;
    words.columns = x.columns;
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
    words.columns = block.columns;
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
        UNROLL for (int j = 0; j < vectors; j++) {
            row[j] = LOAD(b + j * LANES);
            IN_REGISTER(row[j]);
        }
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

/* c [rows, b.columns] = left b, or += it. */
INLINE void by_vectors(const int pairs, Left left, int64_t rows, Block b, int64_t steps, float *c, const int add) {
    for (int64_t r = 0; r < rows; r += ROWS, left.words += ROWS * left.row, c += ROWS * b.columns) {
        int64_t j = 0;
        for (; j + VECTORS * LANES <= b.columns; j += VECTORS * LANES)
            tile(VECTORS, pairs, left, b.data + j, steps, b.columns, c + j, add);
        if (j < b.columns) tile(1, pairs, left, b.data + j, steps, b.columns, c + j, add);
    }
}

/* So many rows of a product are made at a time, at most. */
#ifdef HAS_TILES
enum { STRIP = 2 * TILE };
INLINE int in_tiles(int pairs) { return pairs && may_use_tiles; }
#else
enum { STRIP = ROWS };
INLINE int in_tiles(int pairs) { return (void)pairs, 0; }
#endif

/* The strip of `rows` that begins at `start`. */
INLINE Span strip_from(int64_t start, int64_t rows, int pairs) {
    return (Span){start, smaller(rows - start, in_tiles(pairs) ? STRIP : ROWS)};
}

/* Span r is one strip of `rows` after the other. */
#define FOR_STRIPS(r, rows, pairs) \
    for (Span r = strip_from(0, rows, pairs); r.count > 0; r = strip_from(r.start + r.count, rows, pairs))

#ifdef HAS_TILES
/* c = a b, or += it, for one or two tiles down and across; a and b have rows of so many words, and c as b. */
INLINE void multiply_tiles(int two_down, int two_across, const float *a, int64_t a_row, const float *b, int64_t b_row,
                           int64_t steps, float *c, int add) {
    float *lower = c + TILE * b_row;
    if (add) {
        LOAD_TILE(0, c, b_row);
        if (two_across) LOAD_TILE(1, c + TILE, b_row);
        if (two_down) LOAD_TILE(2, lower, b_row);
        if (two_down && two_across) LOAD_TILE(3, lower + TILE, b_row);
    } else {
        CLEAR_TILE(0);
        CLEAR_TILE(1);
        CLEAR_TILE(2);
        CLEAR_TILE(3);
    }
    for (const float *end = a + steps; a < end; a += TILE, b += TILE * b_row) {
        LOAD_TILE(6, b, b_row);
        if (two_across) LOAD_TILE(7, b + TILE, b_row);
        LOAD_TILE(4, a, a_row);
        ADD_PRODUCT_OF_TILES(0, 4, 6);
        if (two_across) ADD_PRODUCT_OF_TILES(1, 4, 7);
        if (two_down) {
            LOAD_TILE(5, a + TILE * a_row, a_row);
            ADD_PRODUCT_OF_TILES(2, 5, 6);
            if (two_across) ADD_PRODUCT_OF_TILES(3, 5, 7);
        }
    }
    STORE_TILE(0, c, b_row);
    if (two_across) STORE_TILE(1, c + TILE, b_row);
    if (two_down) STORE_TILE(2, lower, b_row);
    if (two_down && two_across) STORE_TILE(3, lower + TILE, b_row);
}

/* So many words of a row are turned at a time. */
enum { DEEP = 128 };
_Static_assert((int)TILE == (int)LANES, "blocks are padded to whole tiles, and a tile is turned as vectors");

/* A left factor with step 1, as tiles want it: as it is, or, where that is its row, turned into `memory`. */
INLINE Left in_rows(Left left, int64_t rows, int64_t steps, float *memory) {
    if (left.step == 1) return left;
    for (int64_t r = 0; r < rows; r += TILE)
        for (int64_t k = 0; k < steps; k += TILE) {
            vec x[TILE];
            UNROLL for (int i = 0; i < TILE; i++) x[i] = LOAD(left.words + r + (k + i) * left.step);
            transpose(x);
            UNROLL for (int i = 0; i < TILE; i++) STORE(memory + (r + i) * steps + k, x[i]);
        }
    return (Left){memory, steps, 1};
}

/* The same by tiles, and steps that do not fill one by vectors. */
static void by_tiles(Left left, int64_t rows, Block b, int64_t steps, float *c, int add) {
    float memory[STRIP * DEEP] __attribute__((aligned(64)));
    while (steps >= TILE) {
        const int64_t deep = smaller(steps / TILE * TILE, DEEP);
        const Left a = in_rows(left, rows, deep, memory);
        for (int64_t j = 0; j < b.columns; j += 2 * TILE)
            multiply_tiles(rows > TILE, b.columns - j > TILE, a.words, a.row, b.data + j, b.columns, deep, c + j, add);
        left.words += deep * left.step, b.data += deep * b.columns, steps -= deep, add = 1;
    }
    if (!add) by_vectors(1, left, rows, b, steps, c, 0); /* 0 where there is nothing to add up */
    else if (steps) by_vectors(1, left, rows, b, steps, c, 1);
}
#else
INLINE void by_tiles(Left left, int64_t rows, Block b, int64_t steps, float *c, int add) {
    (void)left, (void)rows, (void)b, (void)steps, (void)c, (void)add;
}
#endif

/* A strip of a product is added to c [strip, b.columns]; `steps` numbers are summed, half as many pairs. There is room
 * for whole tiles. */
static void add_product(int pairs, Left left, Span strip, Block b, int64_t steps, float *c) {
    left.words += strip.start * left.row;
    if (in_tiles(pairs)) by_tiles(left, strip.count, b, steps / 2, c, 1);
    else if (pairs) by_vectors(1, left, strip.count, b, steps / 2, c, 1);
    else by_vectors(0, left, strip.count, b, steps, c, 1);
}

/* The strip itself, for which no more than SUM numbers are added in a row. */
static void product(int pairs, Left left, Span strip, Block b, int64_t steps, float *c) {
    left.words += strip.start * left.row;
    if (in_tiles(pairs)) {
        by_tiles(left, strip.count, b, steps / 2, c, 0);
        return;
    }
    if (pairs) {
        by_vectors(1, left, strip.count, b, steps / 2, c, 0);
        return;
    }
    by_vectors(0, left, strip.count, b, smaller(steps, SUM), c, 0);
    for (int64_t k = SUM; k < steps; k += SUM) {
        left.words += SUM * left.step, b.data += SUM * b.columns;
        by_vectors(0, left, strip.count, b, smaller(steps - k, SUM), c, 1);
    }
}

/* All rows of a product. */
INLINE void multiply(int pairs, Left left, Block b, int64_t steps, Block c) {
    FOR_STRIPS(r, c.rows, pairs)
        product(pairs, left, r, b, steps, row_of(c, r.start));
}

/* The same, added to c. */
INLINE void add_multiply(int pairs, Left left, Block b, int64_t steps, Block c) {
    FOR_STRIPS(r, c.rows, pairs)
        add_product(pairs, left, r, b, steps, row_of(c, r.start));
}

/* target [n, Dv] = weights^T context, + `added` where there is any, in the order in which it is stored; meanwhile the
 * block of `ahead` behind n is fetched. Words of both factors are for sums over their `steps` rows. */
static void write_product(int pairs, Block weights, Block context, int64_t steps, Matrix added, Matrix target, Span n,
                          Block made, int stream, Matrix ahead) {
    const int channel_major = target.across != 1;
    const Block left = channel_major ? context : weights, right = channel_major ? weights : context;
    added = rows_in(added, n), target = rows_in(target, n);
    if (channel_major) added = flipped(added), target = flipped(target);
    made.columns = right.columns;
    FOR_STRIPS(r, target.rows, pairs) {
        fetch(ahead, n, r, target.rows);
        product(pairs, (Left){left.data, 1, left.columns}, r, right, steps, made.data);
        if (added.data) add(made, rows_in(added, r));
        store(made, rows_in(target, r), stream);
    }
}

#endif
