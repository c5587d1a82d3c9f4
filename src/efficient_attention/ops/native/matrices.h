/* Products of matrices anywhere in memory, in parallel: part by part of the results, in float32. */
#ifndef MATRICES_H
#define MATRICES_H

#include "parallel.h"
#include "products.h"

/* Rows and columns of a part. */
enum { PART = 64 };

/* Matrices in a tensor [batch, heads, rows, columns], of numbers of `size` bytes. */
typedef struct {
    View view;
    int64_t size;
} Matrices;

/* target [rows, columns] = left [rows, steps] right [steps, columns] + down [rows, 1] across [1, columns], for each
 * head of each sample or, where they are `summed`, of all; nothing where the target has no memory. */
typedef struct {
    int64_t batch, heads, rows, steps, columns;
    Matrices target, left, right, down, across;
    int summed;
} Product;

/* Several that do not depend on each other. */
typedef struct {
    const Product *each;
    int64_t count;
} Products;

INLINE Matrix matrix_of(Matrices x, int64_t batch, int64_t head, int64_t rows, int64_t columns) {
    char *data = x.view.data ? x.view.data + (batch * x.view.batch + head * x.view.head) * x.size : NULL;
    return (Matrix){data, rows, columns, x.view.position, x.view.channel, x.size};
}

INLINE Matrices turned(Matrices x) {
    const View v = x.view;
    return (Matrices){{v.data, v.batch, v.head, v.channel, v.position}, x.size};
}

INLINE Matrix part(Matrix x, Span rows, Span columns) {
    return (Matrix){at(x, rows.start, columns.start), rows.count, columns.count, x.down, x.across, x.size};
}

/* Piece i of a size that is cut into pieces of `length`. */
INLINE Span piece(int64_t size, int64_t length, int64_t i) {
    return (Span){i * length, smaller(size - i * length, length)};
}

INLINE int64_t pieces(int64_t size, int64_t length) { return (size + length - 1) / length; }

/* A copy of what a part needs of a matrix, padded with 0. */
INLINE Block copy(Matrix x, float *memory) {
    const Block block = {memory, padded(x.rows), padded(x.columns)};
    load(block, x, 0.0f);
    return block;
}

/* sums += left right. */
INLINE void add_matrices(Block sums, Block left, Block right) {
    by_vectors(0, (Left){left.data, left.columns, 1}, sums.rows, right, right.rows, sums.data, 1);
}

/* sums = down across, or 0. */
INLINE void start(Block sums, Matrix down, Matrix across, float *memory) {
    memset(sums.data, 0, sums.rows * sums.columns * 4);
    if (!across.data) return;
    const Block row = {memory, 1, sums.columns};
    load(row, across, 0.0f);
    for (int64_t r = 0; r < down.rows; r++) {
        const vec x = SPLAT(element(at(down, r, 0), down.size));
        for (int64_t c = 0; c < sums.columns; c += LANES) STORE(row_of(sums, r) + c, x * LOAD(row.data + c));
    }
}

INLINE int64_t parts_of(const Product *p) {
    const int64_t parts = pieces(p->rows, PART) * pieces(p->columns, PART);
    return p->target.view.data ? (p->summed ? 1 : p->batch) * p->heads * parts : 0;
}

static void multiply_part(const void *what, int64_t i, float *scratch) {
    const Products *products = what;
    const Product *p = products->each;
    for (; i >= parts_of(p); p++) i -= parts_of(p);
    const int64_t width = pieces(p->columns, PART), height = pieces(p->rows, PART);
    const int64_t head = i / width / height % p->heads, sample = i / width / height / p->heads;
    const Span rows = piece(p->rows, PART, i / width % height), columns = piece(p->columns, PART, i % width);
    const Span one = {0, 1};
    const Block sums = {scratch, padded(rows.count), padded(columns.count)};
    float *left_memory = scratch + PART * PART, *right_memory = left_memory + PART * SUM;
    start(sums, part(matrix_of(p->down, sample, head, p->rows, 1), rows, one),
          part(matrix_of(p->across, sample, head, 1, p->columns), one, columns), right_memory);
    for (int64_t b = sample; b < (p->summed ? p->batch : sample + 1); b++) {
        const Matrix left = matrix_of(p->left, b, head, p->rows, p->steps);
        const Matrix right = matrix_of(p->right, b, head, p->steps, p->columns);
        for (int64_t k = 0; k < pieces(p->steps, SUM); k++) {
            const Span steps = piece(p->steps, SUM, k);
            const Block here = copy(part(left, rows, steps), left_memory);
            add_matrices(sums, here, copy(part(right, steps, columns), right_memory));
        }
    }
    store(sums, part(matrix_of(p->target, sample, head, p->rows, p->columns), rows, columns), 0);
}

/* All of them; 1 if there is no memory. */
static int multiply_matrices(const Product *each, int64_t count, int threads) {
    const Products products = {each, count};
    int64_t parts = 0;
    for (int64_t i = 0; i < count; i++) parts += parts_of(each + i);
    return for_each(parts, threads, multiply_part, &products, PART * (PART + 2 * SUM));
}

#endif
