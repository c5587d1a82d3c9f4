/* Blocks of float32 in the first cache, and how they are copied from tensors and back.
 *
 * Nothing but the copies knows strides, dtypes, masks and ragged ends.
 */
#ifndef BLOCKS_H
#define BLOCKS_H

#include <string.h>

#include "vectors.h"

/* Positions of a block. */
enum { BLOCK = 64 };

/* Sizes of a problem, and what is asked for; as in native_calls.py. A chunk is of whole blocks; `together` heads,
 * of all samples, have sums of chunks at a time. */
typedef struct {
    int64_t batch, heads, positions, chunk, together, key_channels, value_channels, groups;
    int32_t bfloat16, softmax, stream, threads;
} Problem;

/* Memory of [batch, heads, positions, channels], and its strides in elements; no memory where there is no tensor. */
typedef struct {
    char *data;
    int64_t batch, head, position, channel;
} View;

/* A matrix in a tensor: `down` is from row to row, in elements of `size` bytes, and `across` from column to column. */
typedef struct {
    char *data;
    int64_t rows, columns, down, across, size;
} Matrix;

/* A matrix [rows, columns] in the cache, padded so that both fill whole vectors and tiles; of a few of its rows, or of
 * one that is read in a tensor, `columns` is how far rows are apart. */
typedef struct {
    float *data;
    int64_t rows, columns;
} Block;

/* Some of the positions. */
typedef struct {
    int64_t start, count;
} Span;

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

/* The next piece of scratch memory. */
INLINE Block take(float **scratch, int64_t rows, int64_t columns) {
    Block block = {*scratch, rows, columns};
    *scratch += rows * columns;
    return block;
}

INLINE float *row_of(Block block, int64_t row) { return block.data + row * block.columns; }

/* [positions, channels] of one head. */
INLINE Matrix head_of(const View *x, int64_t batch, int64_t head, int64_t channels, const Problem *p) {
    const int64_t size = p->bfloat16 ? 2 : 4;
    char *data = x->data ? x->data + (batch * x->batch + head * x->head) * size : NULL;
    return (Matrix){data, p->positions, channels, x->position, x->channel, size};
}

/* A byte for each position of one head. */
INLINE Matrix mask_of(const View *mask, int64_t batch, int64_t head) {
    char *data = mask->data ? mask->data + batch * mask->batch + head * mask->head : NULL;
    return (Matrix){.data = data, .columns = 1, .down = mask->position, .size = 1};
}

/* How many of the positions a mask attends to: all, if there is none. */
static inline int64_t attended(Matrix mask, int64_t positions) {
    if (!mask.data) return positions;
    int64_t count = 0;
    for (int64_t n = 0; n < positions; n++) count += mask.data[n * mask.down] != 0;
    return count;
}

/* Contiguous float32. */
INLINE Matrix matrix(const float *data, int64_t rows, int64_t columns) {
    return (Matrix){(char *)data, rows, columns, columns, 1, 4};
}

INLINE Matrix flipped(Matrix x) { return (Matrix){x.data, x.columns, x.rows, x.across, x.down, x.size}; }

INLINE Matrix rows_in(Matrix x, Span n) {
    return (Matrix){x.data + n.start * x.down * x.size, n.count, x.columns, x.down, x.across, x.size};
}

INLINE char *at(Matrix x, int64_t row, int64_t column) {
    return x.data + (row * x.down + column * x.across) * x.size;
}

INLINE float element(const char *p, int64_t size) {
    uint32_t bits;
    uint16_t upper;
    if (size == 4) memcpy(&bits, p, 4);
    else memcpy(&upper, p, 2), bits = (uint32_t)upper << 16; /* a bfloat16 is the first half of a float32 */
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void set_element(char *p, float x, int64_t size) {
    half low = narrowed(SPLAT(x));
    if (size == 4) memcpy(p, &x, 4);
    else memcpy(p, &low, 2);
}

INLINE vec vector(const char *p, int64_t size) {
    return size == 4 ? LOAD((const float *)p) : widened(LOAD_HALF(p));
}

INLINE void set_vector(char *p, vec x, int64_t size, int stream) {
    if (size == 4 && stream) STREAM((float *)p, x);
    if (size == 4 && !stream) STORE((float *)p, x);
    if (size == 2 && stream) STREAM_HALF(p, narrowed(x));
    if (size == 2 && !stream) STORE_HALF(p, narrowed(x));
}

/* Two at once, at a multiple of their size: with AVX-512 a whole line of the caches, past which they may go. */
INLINE void set_halves(char *p, half first, half second, int stream) {
    if (stream) STREAM_HALVES(p, first, second);
    else STORE_HALF(p, first), STORE_HALF(p + sizeof(half), second);
}

/* From (row, column) on, columns of a source that lie in one piece are LANES rows of a block: `count` of them, and then
 * `fill`. */
INLINE void turn_into(Block block, int64_t row, int64_t column, Matrix source, const int64_t count, float fill) {
    vec x[LANES];
    UNROLL for (int i = 0; i < LANES; i++)
        x[i] = i < count ? vector(at(source, row, column + i), source.size) : SPLAT(fill);
    transpose(x);
    UNROLL for (int i = 0; i < LANES; i++) STORE(row_of(block, row + i) + column, x[i]);
}

/* block = source, and `fill` around it. */
INLINE void load(Block block, Matrix source, float fill) {
    const int64_t size = source.size;
    int64_t columns = 0, rows = 0; /* that go by whole vectors */
    if (source.across == 1) {
        columns = source.columns / LANES * LANES, rows = source.rows;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c += LANES) STORE(row_of(block, r) + c, vector(at(source, r, c), size));
    } else if (source.down == 1) {
        columns = padded(source.columns), rows = source.rows / LANES * LANES;
        const int64_t rest = source.columns % LANES, whole = source.columns - rest;
        for (int64_t c = 0; c < whole; c += LANES)
            for (int64_t r = 0; r < rows; r += LANES) turn_into(block, r, c, source, LANES, fill);
        for (int64_t r = 0; rest && r < rows; r += LANES) turn_into(block, r, whole, source, rest, fill);
    }
    if (rows == block.rows && columns == block.columns) return;
    for (int64_t r = 0; r < source.rows; r++) {
        float *row = row_of(block, r);
        for (int64_t c = r < rows ? columns : 0; c < source.columns; c++) row[c] = element(at(source, r, c), size);
        for (int64_t c = source.columns; c < block.columns; c++) row[c] = fill;
    }
    for (float *x = row_of(block, source.rows); x < row_of(block, block.rows); x++) *x = fill;
}

/* block += source; padding stays. */
INLINE void add(Block block, Matrix source) {
    const int64_t size = source.size;
    for (int64_t r = 0; r < source.rows; r++) {
        float *row = row_of(block, r);
        int64_t c = 0;
        if (source.across == 1)
            for (; c + LANES <= source.columns; c += LANES)
                STORE(row + c, LOAD(row + c) + vector(at(source, r, c), size));
        for (; c < source.columns; c++) row[c] += element(at(source, r, c), size);
    }
}

/* Rows of x are columns of a block, from (row, column) on. */
INLINE void load_turned(vec x[LANES], Block block, int64_t row, int64_t column) {
    UNROLL for (int i = 0; i < LANES; i++) x[i] = LOAD(row_of(block, row + i) + column);
    transpose(x);
}

/* target = what of a block is not padding; `stream`: past the caches, where whole vectors, or
 * two halves if they are turned, lie at natural addresses. */
INLINE void store(Block block, Matrix target, int stream) {
    const int64_t size = target.size, apart = target.across == 1 ? target.down : target.across;
    int64_t columns = 0, rows = 0; /* that go by whole vectors */
    const int64_t natural = LANES * (target.across == 1 ? size : 4);
    stream = stream && ((uintptr_t)target.data | (uintptr_t)(apart * size)) % natural == 0;
    if (target.across == 1) {
        columns = target.columns / LANES * LANES, rows = target.rows;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c += LANES)
                set_vector(at(target, r, c), LOAD(row_of(block, r) + c), size, stream);
    } else if (target.down == 1) {
        columns = target.columns / LANES * LANES, rows = target.rows / LANES * LANES;
        for (int64_t c = 0; c < columns; c += LANES) {
            int64_t r = 0;
            vec x[LANES];
            half first[LANES];
            for (; size == 2 && r + 2 * LANES <= rows; r += 2 * LANES) {
                load_turned(x, block, r, c);
                UNROLL for (int i = 0; i < LANES; i++) first[i] = narrowed(x[i]);
                load_turned(x, block, r + LANES, c);
                UNROLL for (int i = 0; i < LANES; i++)
                    set_halves(at(target, r, c + i), first[i], narrowed(x[i]), stream);
            }
            for (; r < rows; r += LANES) {
                load_turned(x, block, r, c);
                UNROLL for (int i = 0; i < LANES; i++) set_vector(at(target, r, c + i), x[i], size, stream);
            }
        }
    }
    if (rows == target.rows && columns == target.columns) return;
    for (int64_t r = 0; r < target.rows; r++)
        for (int64_t c = r < rows ? columns : 0; c < target.columns; c++)
            set_element(at(target, r, c), row_of(block, r)[c], size);
}

/* Rows of masked positions become `fill`; they may hold anything, NaN included. */
INLINE void silence(Block block, Matrix mask, Span n, float fill) {
    if (!mask.data) return;
    for (int64_t r = 0; r < n.count; r++)
        if (!mask.data[(n.start + r) * mask.down])
            for (int64_t c = 0; c < block.columns; c++) row_of(block, r)[c] = fill;
}

/* The same, of a block [., positions]. */
INLINE void silence_columns(Block block, Matrix mask, Span n, float fill) {
    for (int64_t i = 0; i < block.columns; i++)
        if (i >= n.count || (mask.data && !mask.data[(n.start + i) * mask.down]))
            for (int64_t r = 0; r < block.rows; r++) row_of(block, r)[i] = fill;
}

/* Ask for a part of the block of positions behind n, as large as `some` is of `all`, to be there in its turn. */
INLINE void fetch(Matrix x, Span n, Span some, int64_t all) {
    const int64_t left = x.rows - n.start - BLOCK;
    if (!x.data || left <= 0) return;
    Matrix next = rows_in(x, (Span){n.start + BLOCK, left < BLOCK ? left : BLOCK});
    if (next.across != 1 && next.down == 1) next = flipped(next);
    for (int64_t r = next.rows * some.start / all; r < next.rows * (some.start + some.count) / all; r++)
        for (int64_t byte = 0; byte < next.columns * next.size; byte += 64)
            _mm_prefetch(at(next, r, 0) + byte, _MM_HINT_T1);
}

#endif
