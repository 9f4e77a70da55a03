/* The fast host version for AVX2 with FMA. */
#include "host_math.h"

#include <immintrin.h>

#define MATH         host_math_avx2
#define MATH_NAME    "avx2"
#define LANES        8
#define PAIR         1
#define TILE_VECTORS 2 /* 6 x 2 accumulators, 2 of B and one broadcast: 15 of 16 registers */

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));

#include "host_vector.h"

static bool supported(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static inline vf v_fma(vf a, vf b, vf c)
{
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

static inline vf v_mac(vf a, vf b, vf c)
{
    return v_fma(a, b, c);
}

static inline vh v_narrow(vf v)
{
    return v_narrow_by_adding(v);
}

static inline vf v_split(vf y, vf *n)
{
    __m256 limited = _mm256_max_ps((__m256)y, _mm256_set1_ps(-125.0f));
    limited = _mm256_min_ps(limited, _mm256_set1_ps(125.0f));
    return v_split_by_adding((vf)limited, n);
}

static inline vf v_scale(vf p, vf n)
{
    return v_scale_by_adding(p, n);
}

static inline vf v_reciprocal(vf a)
{
    return 1.0f / a;
}

#include "host_math_body.h"
