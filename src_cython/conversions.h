/* Elements in memory that have another type than is computed in: loops that the compiler vectorises.
 *
 * Numbers beyond the range become infinite; what is rounded is rounded once, to nearest.
 */
#ifndef FASTSOFTMAX_CONVERSIONS_H
#define FASTSOFTMAX_CONVERSIONS_H

#include "simd.h"

/* How an element lies in memory: as in registers, or otherwise. */
enum Storage { AS_COMPUTED, FLOAT16, BFLOAT16, FLOAT32, FLOAT64, BOOL, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64 };

static inline int size_of_storage(int storage)
{
    static const char sizes[] = {0, 2, 2, 4, 8, 1, 1, 1, 2, 2, 4, 4, 8, 8};
    return sizes[storage];
}

static inline f32v f32v_from_half(const char *p, int count, int storage)
{
    u16v halves = u16v_load_first((const uint16_t *)p, count);
    return storage == FLOAT16 ? f32v_from_float16(halves) : f32v_from_bfloat16(halves);
}

#define READ_AS(name, type, real)                                                                                      \
    case name:                                                                                                         \
        if (stride == (long)sizeof(type))                                                                              \
            for (long i = 0; i < n; i++)                                                                               \
                target[i] = (real)((const type *)source)[i];                                                           \
        else                                                                                                           \
            for (long i = 0; i < n; i++)                                                                               \
                target[i] = (real) * (const type *)(source + i * stride);                                              \
        break;

/* Read n elements that are `stride` bytes apart. */
#define DEFINE_READ(T, real)                                                                                           \
    static void T##_read(const char *source, long stride, T *registers, long n, int storage)                           \
    {                                                                                                                  \
        real *target = (real *)registers;                                                                              \
        float block[F32_LANES];                                                                                        \
        switch (storage) {                                                                                             \
        case FLOAT16:                                                                                                  \
        case BFLOAT16:                                                                                                 \
            for (long i = 0, count; i < n; i += count) {                                                               \
                count = stride != 2 ? 1 : n - i < F32_LANES ? n - i : F32_LANES;                                       \
                f32v v = f32v_from_half(source + i * stride, (int)count, storage);                                     \
                memcpy(block, &v, sizeof v);                                                                           \
                for (long j = 0; j < count; j++)                                                                       \
                    target[i + j] = block[j];                                                                          \
            }                                                                                                          \
            break;                                                                                                     \
        case BOOL: /* of which any byte but 0 is true */                                                               \
            for (long i = 0; i < n; i++)                                                                               \
                target[i] = source[i * stride] != 0;                                                                   \
            break;                                                                                                     \
            READ_AS(FLOAT32, float, real)                                                                              \
            READ_AS(FLOAT64, double, real)                                                                             \
            READ_AS(INT8, int8_t, real)                                                                                \
            READ_AS(UINT8, uint8_t, real)                                                                              \
            READ_AS(INT16, int16_t, real)                                                                              \
            READ_AS(UINT16, uint16_t, real)                                                                            \
            READ_AS(INT32, int32_t, real)                                                                              \
            READ_AS(UINT32, uint32_t, real)                                                                            \
            READ_AS(INT64, int64_t, real)                                                                              \
            READ_AS(UINT64, uint64_t, real)                                                                            \
        }                                                                                                              \
    }

DEFINE_READ(f32v, float)
DEFINE_READ(f64v, double)

/* A float that rounds to 16 bits as the double does: odd in its last bit, unless it is exact (S. Boldo, G. Melquiond,
 * "Emulation of FMA and correctly rounded sums", 2008). */
static inline float rounded_to_odd(double v)
{
    float nearest = (float)v;
    double back = nearest;
    uint32_t bits;
    memcpy(&bits, &nearest, sizeof bits);
    if (back == v || v != v || bits & 1)
        return nearest;
    bits += (back > v) == (v > 0) ? -1 : 1; /* towards v */
    memcpy(&nearest, &bits, sizeof bits);
    return nearest;
}

/* Write n doubles `stride` bytes apart, as FLOAT32, FLOAT16 or BFLOAT16. */
static void f64v_write(const f64v *registers, char *target, long stride, long n, int storage)
{
    const double *source = (const double *)registers;
    if (storage == FLOAT32 && stride == 4) {
        for (long i = 0; i < n; i++)
            ((float *)target)[i] = (float)source[i];
    } else if (storage == FLOAT32) {
        for (long i = 0; i < n; i++)
            *(float *)(target + i * stride) = (float)source[i];
    } else {
        for (long i = 0; i < n; i++) {
            f32v v = f32v_splat(rounded_to_odd(source[i]));
            u16v_store_first((uint16_t *)(target + i * stride), storage == FLOAT16 ? f32v_to_float16(v) : f32v_to_bfloat16(v), 1);
        }
    }
}

#endif
