/* Vectors of LANES, in the compiler's own terms: what the instruction sets of the fast host version
 * share. Included by each host_math_*.c after LANES and its types: vf, vi, vh (fp32, int32,
 * uint16).
 *
 * An instruction set then defines
 *   v_fma(a, b, c)      a * b + c
 *   v_narrow(v)         to bf16, ties to even; NaN stays NaN
 *   v_split(y, &n)      y, limited so that 2^y and 1 / (1 + 2^y) stay normal, into an integer n (in
 *                       a form that v_scale knows) and the fraction in [-0.5, 0.5] that it returns
 *   v_scale(p, n)       p * 2^n, p in [0.7, 1.5]
 *   v_reciprocal(a)     1 / a, 2^-14 relative or better: what comes of it is rounded to bf16
 * Of a NaN y, v_split and v_scale may make anything. */

#include <math.h>
#include <string.h>

static inline vf v_load(const float *at)
{
    vf v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline void v_store(float *at, vf v)
{
    memcpy(at, &v, sizeof v);
}

static inline vf v_splat(float x)
{
    return x - (vf){0};
}

/* A word in every lane; as an integer, so that no bit of it is touched. */
static inline vf v_splat_word(const float *at)
{
    int32_t word;
    memcpy(&word, at, sizeof word);
    return (vf)(word - (vi){0});
}

static inline vf v_load_bf16(const uint16_t *at)
{
    vh v;
    memcpy(&v, at, sizeof v);
    return (vf)(__builtin_convertvector(v, vi) << 16);
}

/* Rounds to bf16, kept as fp32; ties to even. NaN stays NaN: every NaN here comes of bf16 inputs or
 * of the CPU, so its low half is zero and the carry cannot reach the sign. */
static inline vf v_round(vf v)
{
    vi bits = (vi)v;
    bits += 0x7fff + ((bits >> 16) & 1);
    return (vf)(bits & (int32_t)0xffff0000);
}

static inline vh v_narrow_by_adding(vf v)
{
    typedef uint32_t vu __attribute__((vector_size(sizeof(vf))));
    return __builtin_convertvector((vu)v_round(v) >> 16, vh);
}

/* 1.5 * 2^23: adding it rounds to an integer, and leaves that in the low bits. */
#define SPLIT_MAGIC 12582912.0f

static inline vf v_split_by_adding(vf y, vf *n)
{
    *n = y + SPLIT_MAGIC;
    return y - (*n - SPLIT_MAGIC);
}

static inline vf v_scale_by_adding(vf p, vf n)
{
    return (vf)((vi)p + ((vi)n << 23));
}

/* The lanes' sum, in one order: halves first. */
static inline float v_sum(vf v)
{
    vi lane = {0};
    for (int i = 1; i < LANES; i++)
        lane[i] = i;
    _Pragma("GCC unroll 4") for (int half = LANES / 2; half; half /= 2)
    {
        v += __builtin_shuffle(v, (lane + half) & (LANES - 1));
    }
    return v[0];
}
