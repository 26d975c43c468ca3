/* Registers of float32 and float64, as wide as the instruction set this file is compiled for.
 *
 * Arithmetic on them (+ - * /) is the compiler's own vector extension (GCC, Clang), on any processor. This header adds
 * what that extension cannot say: memory access, maxima, comparisons, lane permutation, non-temporal stores. The algorithm
 * itself is in the Cython files beside it.
 *
 * Every function exists for both types, T##_name with T = f32v or f64v; registers.pxi gives them one name.
 */
#ifndef FASTSOFTMAX_SIMD_H
#define FASTSOFTMAX_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define REGISTER_BYTES 64
#elif defined(__AVX2__)
#define REGISTER_BYTES 32
#else
#define REGISTER_BYTES 16
#endif

/* Registers that go through the exponential together: each takes three of the 32 or 16 there are, beside constants. */
enum { GROUP = REGISTER_BYTES == 64 ? 8 : 4 };

/* A table of 2**(j / POWERS) for j below POWERS, and of their relative rounding errors: as many as one register holds,
 * where an instruction picks lanes of a register by the numbers in another. */
#if REGISTER_BYTES == 64
#define F32_POWERS_LOG2 4
#define F64_POWERS_LOG2 3
#elif REGISTER_BYTES == 32
#define F32_POWERS_LOG2 3
#define F64_POWERS_LOG2 0
#else
#define F32_POWERS_LOG2 0
#define F64_POWERS_LOG2 0
#endif
#define F32_POWERS (1 << F32_POWERS_LOG2)
#define F64_POWERS (1 << F64_POWERS_LOG2)

/* Whether a * b + c is one instruction with one rounding. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMA)
#define HAS_FMA 1
#else
#define HAS_FMA 0
#endif

typedef float f32v __attribute__((vector_size(REGISTER_BYTES)));
typedef double f64v __attribute__((vector_size(REGISTER_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(REGISTER_BYTES)));
typedef uint64_t u64v __attribute__((vector_size(REGISTER_BYTES)));

#define DEFINE_FOR_ANY_PROCESSOR(T, real, bits, mantissa_bits)                                                         \
    typedef T T##_unaligned __attribute__((aligned(sizeof(real)), may_alias));                                         \
    static inline T T##_splat(double c) { return (real)c - (T){0}; }                                                   \
    static inline T T##_load(const T *p) { return *(const T##_unaligned *)p; }                                         \
    static inline void T##_store(T *p, T v) { *(T##_unaligned *)p = v; }                                               \
    /* v * 2**k, where the lowest bits of `magic` hold k and, in `below` bits, j, and v is element j of a table. */    \
    static inline T T##_raise(T v, T magic, int below)                                                                 \
    {                                                                                                                  \
        return (T)((bits)v + ((bits)magic << (mantissa_bits - below)));                                                \
    }                                                                                                                  \
    /* v = significand * 2**binary_exponent, with 1 <= |significand| < 2, where v is a normal number.            */     \
    static inline T T##_significand(T v)                                                                               \
    {                                                                                                                  \
        bits one = (bits)T##_splat(1), field = (bits){0} + ((1u << (sizeof(real) * 8 - mantissa_bits - 1)) - 1);       \
        return (T)(((bits)v & ~(field << mantissa_bits)) | one);                                                       \
    }                                                                                                                  \
    static inline T T##_binary_exponent(T v)                                                                           \
    {                                                                                                                  \
        bits bias = (bits)T##_splat(1) >> mantissa_bits, two_to_digits = (bits)T##_splat((real)(1ull << mantissa_bits)); \
        return (T)(((bits)v << 1 >> (mantissa_bits + 1)) | two_to_digits) - ((T)(bias | two_to_digits));               \
    }                                                                                                                  \
    /* Lane by lane a <= b ? x : y. */                                                                                 \
    static inline T T##_where_at_most(T a, T b, T x, T y)                                                              \
    {                                                                                                                  \
        bits mask = (bits)(a <= b);                                                                                    \
        return (T)((mask & (bits)x) | (~mask & (bits)y));                                                              \
    }                                                                                                                  \
    /* v, but 0 in the lanes where p is. */                                                                            \
    static inline T T##_where_nonzero(T p, T v) { return (T)((bits)v & (bits)(p != 0)); }                              \
    static inline real T##_lane(T v, int lane) { return v[lane]; }

DEFINE_FOR_ANY_PROCESSOR(f32v, float, u32v, 23)
DEFINE_FOR_ANY_PROCESSOR(f64v, double, u64v, 52)

/* v where a byte of the `count` at p is not 0; `fill` where it is, and in the lanes behind them. As an expression of
 * vectors GCC 12 takes the bytes apart one by one, at eleven times the price of this. */
#if REGISTER_BYTES == 64
static inline f32v f32v_where_true(const char *p, int count, f32v v, f32v fill)
{
    __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), p);
    return (f32v)_mm512_mask_mov_ps((__m512)fill, _mm_test_epi8_mask(bytes, bytes), (__m512)v);
}
static inline f64v f64v_where_true(const char *p, int count, f64v v, f64v fill)
{
    __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), p);
    return (f64v)_mm512_mask_mov_pd((__m512d)fill, (__mmask8)_mm_test_epi8_mask(bytes, bytes), (__m512d)v);
}
#else
#if REGISTER_BYTES == 32
static inline u32v u32v_from_bytes(const uint8_t *p) { return (u32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline u64v u64v_from_bytes(const uint8_t *p) { return (u64v)_mm256_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p)); }
#else
static inline u32v u32v_from_bytes(const uint8_t *p) { return (u32v){p[0], p[1], p[2], p[3]}; }
static inline u64v u64v_from_bytes(const uint8_t *p) { return (u64v){p[0], p[1]}; }
#endif
#define DEFINE_WHERE_TRUE(T, real, bits)                                                                               \
    static inline T T##_where_true(const char *p, int count, T v, T fill)                                              \
    {                                                                                                                  \
        uint8_t bytes[8] = {0};                                                                                        \
        if (count == sizeof(T) / sizeof(real)) /* a copy of known length is one instruction */                         \
            memcpy(bytes, p, sizeof(T) / sizeof(real));                                                                \
        else                                                                                                           \
            memcpy(bytes, p, (size_t)count);                                                                           \
        bits mask = (bits)(bits##_from_bytes(bytes) != 0);                                                             \
        return (T)((mask & (bits)v) | (~mask & (bits)fill));                                                           \
    }

DEFINE_WHERE_TRUE(f32v, float, u32v)
DEFINE_WHERE_TRUE(f64v, double, u64v)
#endif

/* pick: element j of a table, where the lowest bits of v hold j.
 *
 * Adding k, shifted to the exponent of an element, adds j / POWERS to its significand along with it. The table holds what
 * makes a power of two of the sum: less by that, which below 1 counts half.
 */
#define LOWERED(j, powers, power) (1 - ((double)(j) / (powers) - ((power) - 1)) / 2)
#if REGISTER_BYTES == 64
static const f32v f32v_powers = {
    LOWERED(0, 16, 0x1p+0), LOWERED(1, 16, 0x1.0b5586p+0), LOWERED(2, 16, 0x1.172b84p+0),
    LOWERED(3, 16, 0x1.2387a6p+0), LOWERED(4, 16, 0x1.306fe0p+0), LOWERED(5, 16, 0x1.3dea64p+0),
    LOWERED(6, 16, 0x1.4bfdaep+0), LOWERED(7, 16, 0x1.5ab07ep+0), LOWERED(8, 16, 0x1.6a09e6p+0),
    LOWERED(9, 16, 0x1.7a1148p+0), LOWERED(10, 16, 0x1.8ace54p+0), LOWERED(11, 16, 0x1.9c4918p+0),
    LOWERED(12, 16, 0x1.ae89fap+0), LOWERED(13, 16, 0x1.c199bep+0), LOWERED(14, 16, 0x1.d5818ep+0),
    LOWERED(15, 16, 0x1.ea4afap+0)};
static const f32v f32v_powers_error = {
    0.0f, 0x1.8d96d4p-25f, -0x1.9c0c22p-27f, 0x1.964904p-25f, 0x1.125002p-25f, 0x1.370be4p-25f, -0x1.0a3550p-25f,
    -0x1.00d8acp-27f, 0x1.26055cp-26f, -0x1.05cb44p-25f, 0x1.67a1cap-28f, 0x1.a3b5e4p-28f, -0x1.f9c304p-27f,
    -0x1.6961b4p-28f, -0x1.a5217cp-28f, 0x1.61428ep-28f};
static const f64v f64v_powers = {
    LOWERED(0, 8, 0x1p+0), LOWERED(1, 8, 0x1.172b83c7d517bp+0), LOWERED(2, 8, 0x1.306fe0a31b715p+0),
    LOWERED(3, 8, 0x1.4bfdad5362a27p+0), LOWERED(4, 8, 0x1.6a09e667f3bcdp+0), LOWERED(5, 8, 0x1.8ace5422aa0dbp+0),
    LOWERED(6, 8, 0x1.ae89f995ad3adp+0), LOWERED(7, 8, 0x1.d5818dcfba487p+0)};
static const f64v f64v_powers_error = {
    0.0, -0x1.01b15eaa59348p-55, 0x1.34d754db0abb6p-55, 0x1.690cebb7aafb0p-56, -0x1.3b3efbf5e2228p-54,
    0x1.db72fc1f0eab4p-55, 0x1.c1a7792cb3387p-55, 0x1.4a385a63d07a7p-56};
static inline f32v f32v_pick(f32v table, f32v v) { return (f32v)_mm512_permutexvar_ps((__m512i)v, (__m512)table); }
static inline f64v f64v_pick(f64v table, f64v v) { return (f64v)_mm512_permutexvar_pd((__m512i)v, (__m512d)table); }
#elif REGISTER_BYTES == 32
static const f32v f32v_powers = {
    LOWERED(0, 8, 0x1p+0), LOWERED(1, 8, 0x1.172b84p+0), LOWERED(2, 8, 0x1.306fe0p+0), LOWERED(3, 8, 0x1.4bfdaep+0),
    LOWERED(4, 8, 0x1.6a09e6p+0), LOWERED(5, 8, 0x1.8ace54p+0), LOWERED(6, 8, 0x1.ae89fap+0),
    LOWERED(7, 8, 0x1.d5818ep+0)};
static const f32v f32v_powers_error = {0.0f, -0x1.9c0c22p-27f, 0x1.125002p-25f, -0x1.0a3550p-25f,
                                       0x1.26055cp-26f, 0x1.67a1cap-28f, -0x1.f9c304p-27f, -0x1.a5217cp-28f};
static inline f32v f32v_pick(f32v table, f32v v) { return (f32v)_mm256_permutevar8x32_ps((__m256)table, (__m256i)v); }
#endif
/* Never used where the table has one element. */
#if F32_POWERS == 1
static const f32v f32v_powers, f32v_powers_error;
static inline f32v f32v_pick(f32v table, f32v v) { return table + v; }
#endif
#if F64_POWERS == 1
static const f64v f64v_powers, f64v_powers_error;
static inline f64v f64v_pick(f64v table, f64v v) { return table + v; }
#endif

/* Lane permutations. swap: lane i of the result is lane i ^ distance of v. transpose: of as many registers as each has
 * lanes. Registers as far apart as the blocks of 16 bytes in a lane exchange them, which turns ever smaller blocks; within
 * blocks, zipping the first half of the registers with the second, as often as halves it, turns the rest.
 */
#if defined(__GNUC__) && !defined(__clang__)
static const u32v f32v_lanes = {0, 1, 2, 3,
#if REGISTER_BYTES >= 32
                                4, 5, 6, 7,
#endif
#if REGISTER_BYTES >= 64
                                8, 9, 10, 11, 12, 13, 14, 15,
#endif
};
static const u64v f64v_lanes = {0, 1,
#if REGISTER_BYTES >= 32
                                2, 3,
#endif
#if REGISTER_BYTES >= 64
                                4, 5, 6, 7,
#endif
};

/* Elements of two registers in turn, within each block of 16 bytes. */
#define f32v_zip ((f32v_lanes & ~3u) + (f32v_lanes % 4) / 2 + (f32v_lanes & 1) * (REGISTER_BYTES / 4))
#define f64v_zip ((f64v_lanes & ~1ul) + (f64v_lanes & 1) * (REGISTER_BYTES / 8))

/* Unrolled, for the compiler knows an instruction for a permutation only if it knows the permutation. */
#define DEFINE_PERMUTATIONS(T, real)                                                                                   \
    static inline T T##_swap(T v, unsigned distance) { return __builtin_shuffle(v, T##_lanes ^ distance); }            \
    /* Within blocks of 16 bytes, of as many registers as one has elements. */                                         \
    static inline void T##_turn_blocks(T *rows)                                                                        \
    {                                                                                                                  \
        enum { BLOCK = 16 / sizeof(real) };                                                                            \
        _Pragma("GCC unroll 2") for (unsigned half = BLOCK / 2; half; half /= 2)                                       \
        {                                                                                                              \
            T zipped[BLOCK];                                                                                           \
            _Pragma("GCC unroll 2") for (unsigned j = 0; j < BLOCK / 2; j++)                                           \
            {                                                                                                          \
                T a = rows[j], b = rows[j + BLOCK / 2];                                                                \
                zipped[2 * j] = __builtin_shuffle(a, b, T##_zip);                                                      \
                zipped[2 * j + 1] = __builtin_shuffle(a, b, T##_zip + BLOCK / 2);                                      \
            }                                                                                                          \
            _Pragma("GCC unroll 4") for (unsigned j = 0; j < BLOCK; j++) rows[j] = zipped[j];                          \
        }                                                                                                              \
    }                                                                                                                  \
    static inline void T##_transpose(T *rows)                                                                          \
    {                                                                                                                  \
        enum { LANES = sizeof(T) / sizeof(real), BLOCK = 16 / sizeof(real) };                                          \
        _Pragma("GCC unroll 8") for (unsigned distance = LANES / 2; distance >= BLOCK; distance /= 2)                  \
        {                                                                                                              \
            _Pragma("GCC unroll 16") for (unsigned i = 0; i < LANES; i++)                                              \
            {                                                                                                          \
                if (i & distance)                                                                                      \
                    continue;                                                                                          \
                T a = rows[i], b = rows[i + distance];                                                                 \
                rows[i] = __builtin_shuffle(a, b, T##_lanes + (T##_lanes & distance) * (LANES / distance - 1));        \
                rows[i + distance] =                                                                                   \
                    __builtin_shuffle(a, b, T##_lanes + distance + (T##_lanes & distance) * (LANES / distance - 1));   \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (unsigned i = 0; i < LANES; i += BLOCK) T##_turn_blocks(rows + i);                 \
    }
#else
#define DEFINE_PERMUTATIONS(T, real)                                                                                   \
    static inline T T##_swap(T v, unsigned distance)                                                                   \
    {                                                                                                                  \
        T result;                                                                                                      \
        for (unsigned lane = 0; lane < sizeof(T) / sizeof(real); lane++)                                               \
            result[lane] = v[lane ^ distance];                                                                         \
        return result;                                                                                                 \
    }                                                                                                                  \
    static inline void T##_turn_blocks(T *rows)                                                                        \
    {                                                                                                                  \
        enum { BLOCK = 16 / sizeof(real) };                                                                            \
        for (unsigned lane = 0; lane < sizeof(T) / sizeof(real); lane += BLOCK) {                                      \
            for (unsigned i = 1; i < BLOCK; i++) {                                                                     \
                for (unsigned j = 0; j < i; j++) {                                                                     \
                    real above = rows[j][lane + i];                                                                    \
                    rows[j][lane + i] = rows[i][lane + j];                                                             \
                    rows[i][lane + j] = above;                                                                         \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static inline void T##_transpose(T *rows)                                                                          \
    {                                                                                                                  \
        for (unsigned i = 1; i < sizeof(T) / sizeof(real); i++) {                                                      \
            for (unsigned j = 0; j < i; j++) {                                                                         \
                real above = rows[j][i];                                                                               \
                rows[j][i] = rows[i][j];                                                                               \
                rows[i][j] = above;                                                                                    \
            }                                                                                                          \
        }                                                                                                              \
    }
#endif

DEFINE_PERMUTATIONS(f32v, float)
DEFINE_PERMUTATIONS(f64v, double)

/* Blocks of 16 bytes, `step` bytes apart in memory. load_blocks: as many as a register has. store_blocks: of as many
 * registers as a block has elements, the first block of each, then the second of each, and so on. */
#define BLOCK_BYTES 16
typedef float block __attribute__((vector_size(16)));
typedef float block_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
#if REGISTER_BYTES == 64
static inline f32v f32v_load_blocks(const char *p, long step)
{
    __m512 v = _mm512_castps128_ps512(*(const block_unaligned *)p);
    v = _mm512_insertf32x4(v, *(const block_unaligned *)(p + step), 1);
    v = _mm512_insertf32x4(v, *(const block_unaligned *)(p + 2 * step), 2);
    return (f32v)_mm512_insertf32x4(v, *(const block_unaligned *)(p + 3 * step), 3);
}
#elif REGISTER_BYTES == 32
static inline f32v f32v_load_blocks(const char *p, long step)
{
    __m256 v = _mm256_castps128_ps256(*(const block_unaligned *)p);
    return (f32v)_mm256_insertf128_ps(v, *(const block_unaligned *)(p + step), 1);
}
#else
static inline f32v f32v_load_blocks(const char *p, long step) { return (f32v)*(const block_unaligned *)p; }
#endif
static inline f64v f64v_load_blocks(const char *p, long step) { return (f64v)f32v_load_blocks(p, step); }
#if REGISTER_BYTES == 64
#define PART_OF_REGISTER(v, block) _mm512_extractf32x4_ps((__m512)(v), block)
#elif REGISTER_BYTES == 32
#define PART_OF_REGISTER(v, block) _mm256_extractf128_ps((__m256)(v), block)
#else
#define PART_OF_REGISTER(v, block) (v)
#endif
#define STORE_BLOCKS(n, index)                                                                                         \
    if (REGISTER_BYTES > index * BLOCK_BYTES)                                                                          \
        for (int i = 0; i < n; i++)                                                                                    \
            *(block_unaligned *)(p + (index * n + i) * step) = (block)PART_OF_REGISTER(v[i], index % N_BLOCKS);
#define N_BLOCKS (REGISTER_BYTES / BLOCK_BYTES)
static inline void f32v_store_blocks(char *p, long step, const f32v *v)
{
    STORE_BLOCKS(4, 0) STORE_BLOCKS(4, 1) STORE_BLOCKS(4, 2) STORE_BLOCKS(4, 3)
}
static inline void f64v_store_blocks(char *p, long step, const f64v *v)
{
    STORE_BLOCKS(2, 0) STORE_BLOCKS(2, 1) STORE_BLOCKS(2, 2) STORE_BLOCKS(2, 3)
}

/* a * b + c with one rounding; only called where HAS_FMA. Left to the compiler, it may fuse the wrong one of two products. */
#if REGISTER_BYTES == 64
static inline f32v f32v_fused(f32v a, f32v b, f32v c) { return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline f64v f64v_fused(f64v a, f64v b, f64v c) { return (f64v)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif REGISTER_BYTES == 32 && HAS_FMA
static inline f32v f32v_fused(f32v a, f32v b, f32v c) { return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline f64v f64v_fused(f64v a, f64v b, f64v c) { return (f64v)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
static inline f32v f32v_fused(f32v a, f32v b, f32v c)
{
    for (unsigned lane = 0; lane < REGISTER_BYTES / 4; lane++)
        c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
}
static inline f64v f64v_fused(f64v a, f64v b, f64v c)
{
    for (unsigned lane = 0; lane < REGISTER_BYTES / 8; lane++)
        c[lane] = __builtin_fma(a[lane], b[lane], c[lane]);
    return c;
}
#endif

/* about_reciprocal: 1 / v to 14 bits at least. A division of a register takes some AVX-512 processors 16 cycles, and what
 * it waits for as much again. */
#if REGISTER_BYTES == 64
static inline f32v f32v_about_reciprocal(f32v v) { return (f32v)_mm512_rcp14_ps((__m512)v); }
static inline f64v f64v_about_reciprocal(f64v v) { return (f64v)_mm512_rcp14_pd((__m512d)v); }
#else
static inline f32v f32v_about_reciprocal(f32v v) { return 1 / v; }
static inline f64v f64v_about_reciprocal(f64v v) { return 1 / v; }
#endif

/* maximum and minimum return b where either operand is NaN, as the x86 instructions do. minimum_above: the smaller of v
 * and least where v > bound, else least. */
#if REGISTER_BYTES == 64

static inline f32v f32v_maximum(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
static inline f64v f64v_maximum(f64v a, f64v b) { return (f64v)_mm512_max_pd((__m512d)a, (__m512d)b); }
static inline f32v f32v_minimum(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
static inline f64v f64v_minimum(f64v a, f64v b) { return (f64v)_mm512_min_pd((__m512d)a, (__m512d)b); }
static inline f32v f32v_minimum_above(f32v v, f32v bound, f32v least)
{
    return (f32v)_mm512_mask_min_ps(
        (__m512)least, _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GT_OQ), (__m512)v, (__m512)least);
}
static inline f64v f64v_minimum_above(f64v v, f64v bound, f64v least)
{
    return (f64v)_mm512_mask_min_pd(
        (__m512d)least, _mm512_cmp_pd_mask((__m512d)v, (__m512d)bound, _CMP_GT_OQ), (__m512d)v, (__m512d)least);
}
static inline int f32v_any_greater(f32v a, f32v b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0; }
static inline int f64v_any_greater(f64v a, f64v b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0; }
static inline void f32v_stream(f32v *p, f32v v) { _mm512_stream_ps((float *)p, (__m512)v); }
static inline void f64v_stream(f64v *p, f64v v) { _mm512_stream_pd((double *)p, (__m512d)v); }

#elif REGISTER_BYTES == 32

static inline f32v f32v_maximum(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
static inline f64v f64v_maximum(f64v a, f64v b) { return (f64v)_mm256_max_pd((__m256d)a, (__m256d)b); }
static inline f32v f32v_minimum(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
static inline f64v f64v_minimum(f64v a, f64v b) { return (f64v)_mm256_min_pd((__m256d)a, (__m256d)b); }
static inline int f32v_any_greater(f32v a, f32v b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
}
static inline int f64v_any_greater(f64v a, f64v b)
{
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)) != 0;
}
static inline void f32v_stream(f32v *p, f32v v) { _mm256_stream_ps((float *)p, (__m256)v); }
static inline void f64v_stream(f64v *p, f64v v) { _mm256_stream_pd((double *)p, (__m256d)v); }

#elif defined(__x86_64__)

static inline f32v f32v_maximum(f32v a, f32v b) { return (f32v)_mm_max_ps((__m128)a, (__m128)b); }
static inline f64v f64v_maximum(f64v a, f64v b) { return (f64v)_mm_max_pd((__m128d)a, (__m128d)b); }
static inline f32v f32v_minimum(f32v a, f32v b) { return (f32v)_mm_min_ps((__m128)a, (__m128)b); }
static inline f64v f64v_minimum(f64v a, f64v b) { return (f64v)_mm_min_pd((__m128d)a, (__m128d)b); }
static inline int f32v_any_greater(f32v a, f32v b) { return _mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)) != 0; }
static inline int f64v_any_greater(f64v a, f64v b) { return _mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, (__m128d)b)) != 0; }
static inline void f32v_stream(f32v *p, f32v v) { _mm_stream_ps((float *)p, (__m128)v); }
static inline void f64v_stream(f64v *p, f64v v) { _mm_stream_pd((double *)p, (__m128d)v); }

#else

#define DEFINE_COMPARISONS(T, bits)                                                                                    \
    static inline T T##_select(bits mask, T a, T b) { return (T)((mask & (bits)a) | (~mask & (bits)b)); }              \
    static inline T T##_maximum(T a, T b) { return T##_select((bits)(a > b), a, b); }                                  \
    static inline T T##_minimum(T a, T b) { return T##_select((bits)(a < b), a, b); }                                  \
    static inline void T##_stream(T *p, T v) { *p = v; }                                                               \
    static inline int T##_any_greater(T a, T b)                                                                        \
    {                                                                                                                  \
        int any = 0;                                                                                                   \
        for (int lane = 0; lane < (int)(sizeof(T) / sizeof(real)); lane++)                                             \
            any |= a[lane] > b[lane];                                                                                  \
        return any;                                                                                                    \
    }

DEFINE_COMPARISONS(f32v, u32v)
DEFINE_COMPARISONS(f64v, u64v)

#endif

#if REGISTER_BYTES != 64
/* With all its bits set a lane is NaN, which minimum passes over. */
static inline f32v f32v_minimum_above(f32v v, f32v bound, f32v least)
{
    return f32v_minimum((f32v)((u32v)v | (u32v)(v <= bound)), least);
}
static inline f64v f64v_minimum_above(f64v v, f64v bound, f64v least)
{
    return f64v_minimum((f64v)((u64v)v | (u64v)(v <= bound)), least);
}
#endif

/* A register of which only the first `count` lanes are read from or written to memory; `fill` stands in the others.
 * drop_first_equal: v, but for 0 in the first lane where `keys` equals `key`.
 */
#if REGISTER_BYTES == 64

static inline f32v f32v_load_first(const f32v *p, int count, f32v fill)
{
    return (f32v)_mm512_mask_loadu_ps((__m512)fill, (__mmask16)((1u << count) - 1), p);
}
static inline f64v f64v_load_first(const f64v *p, int count, f64v fill)
{
    return (f64v)_mm512_mask_loadu_pd((__m512d)fill, (__mmask8)((1u << count) - 1), p);
}
static inline void f32v_store_first(f32v *p, f32v v, int count)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
static inline void f64v_store_first(f64v *p, f64v v, int count)
{
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
}
static inline f32v f32v_drop_first_equal(f32v v, f32v keys, double key)
{
    unsigned equal = _mm512_cmp_ps_mask((__m512)keys, _mm512_set1_ps((float)key), _CMP_EQ_OQ);
    return (f32v)_mm512_maskz_mov_ps((__mmask16)~(equal & -equal), (__m512)v);
}
static inline f64v f64v_drop_first_equal(f64v v, f64v keys, double key)
{
    unsigned equal = _mm512_cmp_pd_mask((__m512d)keys, _mm512_set1_pd(key), _CMP_EQ_OQ);
    return (f64v)_mm512_maskz_mov_pd((__mmask8)~(equal & -equal), (__m512d)v);
}

#else

#if REGISTER_BYTES == 32
/* By a mask, not by memcpy, which is called for a length that the compiler does not know: (1000, 28) float32 take
 * 32 us instead of 66. Whole registers are stored without one, as AMD's processors take their time with those. */
static inline f32v f32v_load_first(const f32v *p, int count, f32v fill)
{
    __m256i mask = (__m256i)((u32v){0, 1, 2, 3, 4, 5, 6, 7} < (u32v){0} + (uint32_t)count);
    return (f32v)_mm256_blendv_ps((__m256)fill, _mm256_maskload_ps((const float *)p, mask), (__m256)mask);
}
static inline f64v f64v_load_first(const f64v *p, int count, f64v fill)
{
    __m256i mask = (__m256i)((u64v){0, 1, 2, 3} < (u64v){0} + (uint64_t)count);
    return (f64v)_mm256_blendv_pd((__m256d)fill, _mm256_maskload_pd((const double *)p, mask), (__m256d)mask);
}
static inline void f32v_store_first(f32v *p, f32v v, int count)
{
    __m256i mask = (__m256i)((u32v){0, 1, 2, 3, 4, 5, 6, 7} < (u32v){0} + (uint32_t)count);
    if (count == 8)
        f32v_store(p, v);
    else
        _mm256_maskstore_ps((float *)p, mask, (__m256)v);
}
static inline void f64v_store_first(f64v *p, f64v v, int count)
{
    __m256i mask = (__m256i)((u64v){0, 1, 2, 3} < (u64v){0} + (uint64_t)count);
    if (count == 4)
        f64v_store(p, v);
    else
        _mm256_maskstore_pd((double *)p, mask, (__m256d)v);
}
#else
#define DEFINE_PARTIAL_ACCESS(T, real)                                                                                 \
    static inline T T##_load_first(const T *p, int count, T fill)                                                      \
    {                                                                                                                  \
        if (count == sizeof(T) / sizeof(real)) /* a copy of known length is one instruction */                         \
            return T##_load(p);                                                                                        \
        memcpy(&fill, p, count * sizeof(real));                                                                        \
        return fill;                                                                                                   \
    }                                                                                                                  \
    static inline void T##_store_first(T *p, T v, int count)                                                           \
    {                                                                                                                  \
        if (count == sizeof(T) / sizeof(real))                                                                         \
            T##_store(p, v);                                                                                           \
        else                                                                                                           \
            memcpy(p, &v, count * sizeof(real));                                                                       \
    }

DEFINE_PARTIAL_ACCESS(f32v, float)
DEFINE_PARTIAL_ACCESS(f64v, double)
#endif

#define DEFINE_DROP_FIRST_EQUAL(T, real)                                                                               \
    static inline T T##_drop_first_equal(T v, T keys, double key)                                                      \
    {                                                                                                                  \
        for (unsigned lane = 0; lane < sizeof(T) / sizeof(real); lane++) {                                             \
            if (keys[lane] == key) {                                                                                   \
                v[lane] = 0;                                                                                           \
                break;                                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
        return v;                                                                                                      \
    }

DEFINE_DROP_FIRST_EQUAL(f32v, float)
DEFINE_DROP_FIRST_EQUAL(f64v, double)

#endif

/* Scalar powers of two by their exponent bits: libm's ldexp costs a short row part of its time. */
static inline double double_from_bits(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* 2**k; 0 below the normal range. k is at most 1023. */
static inline double exact_power_of_two(double k) { return k < -1022 ? 0 : double_from_bits((uint64_t)(k + 1023) << 52); }

/* The smallest power of two that is at least n, and 2. */
static inline long power_of_two_from(long n) { return 2L << (63 - __builtin_clzl((unsigned long)(n - 1) | 1)); }

/* float16 and bfloat16 in memory, float32 in registers: the first `count` elements at p; `fill` in the lanes behind them.
 * Results are rounded to nearest, ties to even.
 */
#define F32_LANES (REGISTER_BYTES / 4)
typedef uint16_t u16v __attribute__((vector_size(REGISTER_BYTES / 2)));

#if REGISTER_BYTES == 64 && defined(__AVX512BW__) && defined(__AVX512VL__)
static inline u16v u16v_load_first(const uint16_t *p, int count)
{
    return (u16v)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
}
static inline void u16v_store_first(uint16_t *p, u16v v, int count)
{
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)v);
}
static inline f32v filled_up(f32v v, int count, f32v fill)
{
    return (f32v)_mm512_mask_mov_ps((__m512)fill, (__mmask16)((1u << count) - 1), (__m512)v);
}
#else
static inline u16v u16v_load_first(const uint16_t *p, int count)
{
    u16v v = {0};
    if (count == F32_LANES)
        memcpy(&v, p, sizeof v);
    else
        memcpy(&v, p, (size_t)count * 2);
    return v;
}

static inline void u16v_store_first(uint16_t *p, u16v v, int count)
{
    if (count == F32_LANES)
        memcpy(p, &v, sizeof v);
    else
        memcpy(p, &v, (size_t)count * 2);
}

static inline f32v filled_up(f32v v, int count, f32v fill)
{
    if (count < F32_LANES)
        memcpy(&fill, &v, (size_t)count * 4);
    return count < F32_LANES ? fill : v;
}
#endif

static inline f32v f32v_from_bfloat16(u16v v) { return (f32v)(__builtin_convertvector(v, u32v) << 16); }

static inline u16v f32v_to_bfloat16(f32v v)
{
    u32v bits = (u32v)v, is_nan = (u32v)(v != v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded), u16v);
}

#if REGISTER_BYTES == 64
static inline f32v f32v_from_float16(u16v v) { return (f32v)_mm512_cvtph_ps((__m256i)v); }
static inline u16v f32v_to_float16(f32v v)
{
    return (u16v)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif REGISTER_BYTES == 32 && defined(__F16C__)
static inline f32v f32v_from_float16(u16v v) { return (f32v)_mm256_cvtph_ps((__m128i)v); }
static inline u16v f32v_to_float16(f32v v) { return (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
/* The exponent of a float16 is 112 less than that of a float32 in the same place of the bits: a product by 2**112 mends
 * it, of subnormal numbers too. */
static inline f32v f32v_from_float16(u16v v)
{
    u32v bits = __builtin_convertvector(v, u32v), size = (bits & 0x7fff) << 13, is_special = (u32v)(size >= 0x0f800000);
    return (f32v)((bits & 0x8000) << 16 | (u32v)((f32v)size * 0x1p112f) | (is_special & 0x7f800000));
}
/* Adding and subtracting 2**13 times the power of two of the number, or of the smallest normal one, leaves its first
 * eleven digits. */
static inline u16v f32v_to_float16(f32v v)
{
    u32v sign = (u32v)v >> 16 & 0x8000, power, is_nan = (u32v)(v != v), is_large, is_normal;
    f32v size = (f32v)((u32v)v & 0x7fffffff), rounder;
    is_large = (u32v)(size >= 65520.0f);
    power = (u32v)size & 0x7f800000;
    is_normal = (u32v)(power > 0x38800000);
    rounder = (f32v)(((is_normal & power) | (~is_normal & 0x38800000)) + (13u << 23));
    size = ((size + rounder) - rounder) * 0x1p-112f;
    return __builtin_convertvector(
        sign | (is_nan & 0x7e00) | (~is_nan & ((is_large & 0x7c00) | (~is_large & ((u32v)size >> 13)))), u16v);
}
#endif

/* Fetch what is read next to the L1 cache. */
static inline void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

/* Fetch `count` lines of what is read later, `step` bytes apart: to the L2 cache, as in the first they push out what is
 * computed with: (8192, 4096) float32 take 13.8 ms instead of 18.2 where that has 32 KiB. Zen 5, whose first cache is
 * larger, fetches fewer lines at a time to its second: (2500, 8000) float32 take 4.3 ms to the first and 5.2 to the
 * second. */
static int is_zen_5; /* or later */
static inline void prefetch_far(const char *p, long step, int count)
{
    if (is_zen_5)
        for (int i = 0; i < count; i++)
            __builtin_prefetch(p + i * step, 0, 3);
    else
        for (int i = 0; i < count; i++)
            __builtin_prefetch(p + i * step, 0, 2);
}

/* KiB of an AMD processor's first data cache; 0 of others, who do not tell it here. */
static inline int first_cache_of_amd(void)
{
    unsigned eax, ebx, ecx = 0, edx;
#if defined(__x86_64__)
    if (!__get_cpuid(0x80000005, &eax, &ebx, &ecx, &edx))
        return 0;
#endif
    return (int)(ecx >> 24);
}

/* Make non-temporal stores visible to other threads in order. */
static inline void stream_fence(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* Whether this processor (and its operating system) runs code compiled for a tier. */
static inline int processor_runs(const char *tier)
{
    if (strcmp(tier, "portable") == 0)
        return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("ssse3");
    int v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2");
    int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    return strcmp(tier, "x86_64_v2") == 0 ? v2 : strcmp(tier, "x86_64_v3") == 0 ? v3 : strcmp(tier, "x86_64_v4") == 0 && v4;
#else
    return 0;
#endif
}

#endif
