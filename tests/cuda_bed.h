/* What the CUDA tests share: is there a GPU, device arrays, the tolerance. */
#ifndef CUDA_BED_H
#define CUDA_BED_H

#include <criterion/criterion.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_paths.h"
#include "cuda_reference.h"
#include "layers.h"

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t cuda_error_ = (call);                                                          \
        cr_assert_eq(cuda_error_, cudaSuccess, "%s: %s", #call, cudaGetErrorString(cuda_error_));  \
    } while (0)

/* First line of every test that needs one. */
#define NEED_GPU()                                                                                 \
    do {                                                                                           \
        int gpus_ = 0;                                                                             \
        if (cudaGetDeviceCount(&gpus_) != cudaSuccess || gpus_ == 0)                               \
            cr_skip_test("no GPU here");                                                           \
    } while (0)

static inline void *on_device(const void *from, uint64_t bytes)
{
    void *memory = NULL;
    CUDA(cudaMalloc(&memory, bytes + 16));
    if (from && bytes)
        CUDA(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
    return memory;
}

/* Random bf16. */
static inline void *random_on_device(uint64_t count, uint64_t seed, float low, float high)
{
    void *memory = on_device(NULL, count * 2);
    cr_assert_eq(cuda_fill_random(memory, count, seed, low, high), SKV_OK);
    return memory;
}

static inline uint16_t *to_host(const void *from, uint64_t bytes)
{
    uint16_t *memory = malloc(bytes);
    CUDA(cudaMemcpy(memory, from, bytes, cudaMemcpyDeviceToHost));
    return memory;
}

static inline const struct hstu_attention_path *path_of_device(void)
{
    int major = 0, minor = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    return hstu_attention_choose(major, minor);
}

/* How far `a` is from R32, the fp32 reference, in units of what is allowed: 1 is the limit. Allowed
 * is twice the distance of R16, the reference rounded where layers.h says; the largest and the
 * mean. `slack` is the absolute term for approximate tanh. NaN is infinitely far. */
struct distance {
    double max, mean;
};

static inline struct distance distance_of(const float *a, const float *r32, const float *r16,
                                          uint64_t count, double slack)
{
    double a_max = 0, a_sum = 0, r_max = 0, r_sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        double da = fabs((double)a[i] - r32[i]), dr = fabs((double)r16[i] - r32[i]);
        if (!isfinite(da) || !isfinite(dr))
            return (struct distance){INFINITY, INFINITY};
        a_max = fmax(a_max, da);
        r_max = fmax(r_max, dr);
        a_sum += da;
        r_sum += dr;
    }
    if (a_sum == 0)
        return (struct distance){0, 0};
    return (struct distance){a_max / (2 * r_max + slack),
                             a_sum / (2 * r_sum + slack * (double)count)};
}

#define CHECK_NEAR(d, ...)                                                                         \
    do {                                                                                           \
        struct distance d_ = (d);                                                                  \
        cr_assert(d_.max <= 1 && d_.mean <= 1,                                                     \
                  "max %.2f mean %.2f of the limit: " #d " " __VA_ARGS__, d_.max, d_.mean);        \
    } while (0)

#endif
