/* The registers of native/tiles.h in plain C, in place of that file, for processors that have none. */
#ifndef TILES_H
#define TILES_H

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define HAS_TILES
enum { TILE = 16 };
extern int may_use_tiles;

/* Only who has taken them may use them, and nobody may rely on what they hold at first. */
static _Thread_local struct {
    float words[8][TILE][TILE];
    int taken;
} registers;

typedef int Tiles;
static inline Tiles take_tiles(void) {
    memset(registers.words, 0xff, sizeof registers.words);
    registers.taken = 1;
    return 0;
}
static inline void give_back_tiles(Tiles before) { registers.taken = before; }

static inline float (*tile_of(int t))[TILE] {
    if (!registers.taken) abort();
    return registers.words[t];
}

static inline void load_tile(int t, const float *words, int64_t row) {
    for (int i = 0; i < TILE; i++) memcpy(tile_of(t)[i], words + i * row, 4 * TILE);
}

static inline void store_tile(int t, float *words, int64_t row) {
    for (int i = 0; i < TILE; i++) memcpy(words + i * row, tile_of(t)[i], 4 * TILE);
}

static inline float upper_half(float word) {
    uint32_t bits;
    memcpy(&bits, &word, 4);
    bits &= 0xffff0000;
    memcpy(&word, &bits, 4);
    return word;
}

static inline float lower_half(float word) {
    uint32_t bits;
    memcpy(&bits, &word, 4);
    bits <<= 16;
    memcpy(&word, &bits, 4);
    return word;
}

static inline void add_product_of(float sum[TILE][TILE], float a[TILE][TILE], float b[TILE][TILE]) {
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) {
            float lower = 0.0f, upper = 0.0f;
            for (int k = 0; k < TILE; k++) {
                lower += lower_half(a[i][k]) * lower_half(b[k][j]);
                upper += upper_half(a[i][k]) * upper_half(b[k][j]);
            }
            sum[i][j] += lower + upper;
        }
}

#define CLEAR_TILE(t) memset(tile_of(t), 0, sizeof registers.words[t])
#define LOAD_TILE(t, words, row) load_tile(t, words, row)
#define STORE_TILE(t, words, row) store_tile(t, words, row)
#define ADD_PRODUCT_OF_TILES(sum, a, b) add_product_of(tile_of(sum), tile_of(a), tile_of(b))

#endif
