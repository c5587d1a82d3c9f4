/* Vectors of LANES float32, the largest that the processor has, and what is computed with them.
 *
 * The file is compiled on the machine on which it runs, so that its instructions are a question for the preprocessor.
 */
#ifndef VECTORS_H
#define VECTORS_H

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* What is used several times is read once: the compiler would rather read it from the cache each time. */
#define IN_REGISTER(x) __asm__("" : "+v"(x))

/* A product is made in pieces of ROWS x VECTORS vectors of sums, which fit the registers (products.h). */
#ifdef __AVX512F__
enum { LANES = 16, ROWS = 8, VECTORS = 2 };
typedef __m512 vec;
typedef __m256i half; /* LANES bfloat16 */
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, x) _mm512_storeu_ps(p, x)
#define STREAM(p, x) _mm512_stream_ps(p, x)
#define LOAD_HALF(p) _mm256_loadu_si256((const half *)(p))
#define STORE_HALF(p, x) _mm256_storeu_si256((half *)(p), x)
#define STREAM_HALF(p, x) _mm256_stream_si256((half *)(p), x)
#define STREAM_HALVES(p, x, y) \
    _mm512_stream_si512((__m512i *)(p), _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1))
#define SPLAT(x) _mm512_set1_ps(x)
#define MAX(a, b) _mm512_max_ps(a, b) /* b if either is NaN */
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define EXTENDED(x) _mm512_cvtepu16_epi32(x)
#define LOWER_HALVES(x) _mm512_cvtepi32_epi16((__m512i)(x))
/* Lane i of a, or lane i - LANES of b. */
#define PICK(a, b, index) _mm512_permutex2var_ps(a, (__m512i)(index), b)
#define PERMUTE(a, index) _mm512_permutexvar_ps((__m512i)(index), a) /* by the last bits of each index */
#else
enum { LANES = 8, ROWS = 4, VECTORS = 2 };
typedef __m256 vec;
typedef __m128i half;
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, x) _mm256_storeu_ps(p, x)
#define STREAM(p, x) _mm256_stream_ps(p, x)
#define LOAD_HALF(p) _mm_loadu_si128((const half *)(p))
#define STORE_HALF(p, x) _mm_storeu_si128((half *)(p), x)
#define STREAM_HALF(p, x) _mm_stream_si128((half *)(p), x)
#define STREAM_HALVES(p, x, y) \
    _mm256_stream_si256((__m256i *)(p), _mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1))
#define SPLAT(x) _mm256_set1_ps(x)
#define MAX(a, b) _mm256_max_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define EXTENDED(x) _mm256_cvtepu16_epi32(x)
#define LOWER_HALVES(x)                                                                                  \
    _mm_packus_epi32(_mm256_castsi256_si128((__m256i)(x)), _mm256_extracti128_si256((__m256i)(x), 1))
#define PICK(a, b, index)                                                                                \
    _mm256_blendv_ps(_mm256_permutevar8x32_ps(a, (__m256i)(index)),                                      \
                     _mm256_permutevar8x32_ps(b, (__m256i)(index)), (vec)((index) << 28))
#define PERMUTE(a, index) _mm256_permutevar8x32_ps(a, (__m256i)(index))
#endif
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

/* f(vectors, column, ...) for all columns, so many vectors of them at a time as keep in registers what each is for. */
enum { WIDE = 4 };
#define FOR_WIDE(f, columns, ...)                                                                        \
    do {                                                                                                 \
        int64_t wide_c = 0;                                                                              \
        for (; wide_c + WIDE * LANES <= (columns); wide_c += WIDE * LANES) f(WIDE, wide_c, __VA_ARGS__); \
        for (; wide_c < (columns); wide_c += LANES) f(1, wide_c, __VA_ARGS__);                           \
    } while (0)

/* 2^(i / LANES), in one register. */
#ifdef __AVX512F__
static const float powers[LANES] = {1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                    1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                    1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
#else
static const float powers[LANES] = {1.0f, 1.09050773f, 1.18920712f, 1.29683955f,
                                    1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
#endif

/* x 2^floor(n) for multiples n of 1 / LANES, which `shifted` counts in its last bits; 0 below about the smallest normal
 * number, as processors may take a hundred times as long for what is smaller. */
INLINE vec scaled(vec x, vec n, vec shifted) {
#ifdef __AVX512F__
    (void)shifted;
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, SPLAT(-125.0f), _CMP_NLT_UQ), x, n);
#else
    return (vec)((((uvec)x + ((uvec)shifted / LANES << 23)) & ~(uvec)(n < SPLAT(-125.0f))) | (uvec)(n != n));
#endif
}

/* exp(x) for x <= 0, to 1e-7 of its value; or, where it is for products of bfloat16, which 16 lanes alone have, to
 * 2e-6; NaN for NaN. */
INLINE vec exponential(vec x, const int for_bfloat16) {
    /* x = n log(2) + r, for the nearest multiple n of 1 / LANES; this one rounds to such. */
    const vec shifter = SPLAT(12582912.0f / LANES);
    vec shifted = FMA(x, SPLAT(1.44269504f), shifter), n = shifted - shifter, r, p;
    const vec power = PERMUTE(LOAD(powers), shifted);
    /* (exp(r) - 1) / r, its last coefficient fitted to |r| <= log(2) / (2 LANES). */
    if (for_bfloat16) {
        r = FMA(n, SPLAT(-0.69314718f), x);
        p = FMA(r, SPLAT(0.5f), SPLAT(1.0f));
    } else {
        /* log(2) is in two parts of which the first has few digits, so that its multiples are exact. */
        r = FMA(n, SPLAT(2.12194440e-4f), FMA(n, SPLAT(-0.693359375f), x));
        p = FMA(FMA(r, SPLAT(0.16666667f), SPLAT(0.5f + 0.004144f / (LANES * LANES))), r, SPLAT(1.0f));
    }
    return scaled(FMA(power * r, p, power), n, shifted);
}

/* The nearest bfloat16, ties to even; NaN for NaN. */
INLINE half narrowed(vec x) {
#ifdef __AVX512BF16__
    return (half)_mm512_cvtneps_pbh(x);
#else
    uvec bits = (uvec)x, nan = (uvec)(x != x);
    uvec nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return LOWER_HALVES((nearest & ~nan) | (nan & 0x7fc0));
#endif
}

INLINE vec widened(half x) { return (vec)((uvec)EXTENDED(x) << 16); }

/* Words of which the first half is of `first`, and the second of `second`. */
INLINE vec paired(half first, half second) { return (vec)((uvec)EXTENDED(first) | (uvec)EXTENDED(second) << 16); }

/* 0, 1, 2, ... */
INLINE uvec lanes(void) {
    uvec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

/* Of two rows of a matrix, blocks of so many columns: what lies beside the diagonal of (a, b) changes places. */
INLINE void exchange(int size, vec *a, vec *b) {
    const uvec lane = lanes(), second = (uvec)((lane & size) != 0);
    const vec x = *a, y = *b;
    *a = PICK(x, y, (lane & ~second) | ((lane - size + LANES) & second));
    *b = PICK(x, y, ((lane + size) & ~second) | ((lane + LANES) & second));
}

/* Rows of a matrix [LANES, LANES] become its columns: ever larger blocks beside the diagonal change places. */
INLINE void transpose(vec x[LANES]) {
    UNROLL for (int size = 1; size < LANES; size *= 2)
        UNROLL for (int i = 0; i < LANES; i++)
            if (!(i & size)) exchange(size, x + i, x + i + size);
}

/* The totals of LANES vectors: the same, but that what has changed places is added up. */
INLINE vec totals(vec x[LANES]) {
    UNROLL for (int size = 1; size < LANES; size *= 2)
        UNROLL for (int i = 0; i < LANES; i += 2 * size) {
            exchange(size, x + i, x + i + size);
            x[i] += x[i + size];
        }
    return x[0];
}

/* The total of all lanes, and the largest, in each of them. */
INLINE vec all_lanes(vec x) {
    UNROLL for (int size = 1; size < LANES; size *= 2) x += PERMUTE(x, lanes() ^ size);
    return x;
}

INLINE vec largest_lane(vec x) {
    UNROLL for (int size = 1; size < LANES; size *= 2) x = MAX(x, PERMUTE(x, lanes() ^ size));
    return x;
}

#endif
