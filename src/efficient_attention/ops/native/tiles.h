/* Registers of whole tiles, of processors that have them (AMX), which multiply many times as fast as vectors.
 *
 * A tile is TILE rows of TILE words. In factors these are pairs of bfloat16, as products.h has them anyway: of a left
 * factor rows of a row's pairs, of a right one rows of pairs for each column. In sums they are float32.
 */
#ifndef TILES_H
#define TILES_H

#include "vectors.h"

enum { TILE = 16 };

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define HAS_TILES

/* Whether the system lets this process use them (tiles.c). */
extern int may_use_tiles;

/* What each of the eight registers holds, as the processor is told. */
typedef struct {
    uint8_t palette, from, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Tiles;

/* The thread's registers become those of this file; back come those that others had. */
INLINE Tiles take_tiles(void) {
    Tiles ours = {.palette = 1}, before = {0};
    for (int t = 0; t < 8; t++) ours.row_bytes[t] = 4 * TILE, ours.rows[t] = TILE;
    if (!may_use_tiles) return before;
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    __asm__ volatile("ldtilecfg %0" ::"m"(ours));
    return before;
}

INLINE void give_back_tiles(Tiles before) {
    if (may_use_tiles) __asm__ volatile("ldtilecfg %0" ::"m"(before));
}

#define CLEAR_TILE(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define LOAD_TILE(t, words, row) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(words), "r"((int64_t)(row) * 4) : "memory")
#define STORE_TILE(t, words, row) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(words), "r"((int64_t)(row) * 4) : "memory")
#define ADD_PRODUCT_OF_TILES(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

#else
typedef int Tiles;
INLINE Tiles take_tiles(void) { return 0; }
INLINE void give_back_tiles(Tiles before) { (void)before; }
#endif
#endif
