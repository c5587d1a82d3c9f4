/* The registers of native/tiles.h in plain C, in place of that file, for processors that have none. */
#ifndef TILES_H
#define TILES_H

#include <string.h>

#include "vectors.h"

#define HAS_TILES
enum { TILE = 16 };
extern int may_use_tiles;

static _Thread_local float registers[8][TILE][TILE];

/* Nobody may rely on what they hold at first. */
typedef int Tiles;
static inline Tiles take_tiles(void) {
    memset(registers, 0xff, sizeof registers);
    return 0;
}
static inline void give_back_tiles(Tiles before) { (void)before; }

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

#define CLEAR_TILE(t) memset(registers[t], 0, sizeof registers[t])
#define LOAD_TILE(t, words, row) \
    for (int i = 0; i < TILE; i++) memcpy(registers[t][i], (words) + i * (row), 4 * TILE)
#define STORE_TILE(t, words, row) \
    for (int i = 0; i < TILE; i++) memcpy((words) + i * (row), registers[t][i], 4 * TILE)
#define ADD_PRODUCT_OF_TILES(sum, a, b) add_product_of(registers[sum], registers[a], registers[b])

#endif
