/* A plain CUDA reference for shapes that are too large for the one in C: one thread an output
 * element, fp32 sums in order of the index, with or without the rounding points of layers.h. Used
 * by tests and benches only; itself checked against hstu_reference_pass() on small shapes. */
#ifndef CUDA_REFERENCE_H
#define CUDA_REFERENCE_H

#include "cuda_state.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The block's output rows [sum q][E] for sequences over `pool` (on the device; only read, appends
 * are not done), with the weights of an open runner. `magnitude`, or NULL: max over rows, layers
 * and columns of sum_j |s_j v_j|. Returns 0, SKV_ENOMEM or SKV_EDEVICE. */
int cuda_reference_pass(const struct hstu_cuda *c, const struct hstu_sequence *sequences,
                        uint32_t count, bool rounded, float *block_out, float *magnitude);

/* Attention alone. m [rows][4HD] bf16 and o [rows][HD] fp32 on the device, o after division by N.
 */
int cuda_reference_attention(const struct skv_geometry *geometry, uint32_t layer, uint32_t group,
                             uint32_t scaling_length, const struct hstu_sequence *sequences,
                             uint32_t count, const void *m, const void *pool, bool rounded,
                             float *o, float *magnitude);

/* count bf16 values, uniform in [low, high), on the device. */
int cuda_fill_random(void *memory, uint64_t count, uint64_t seed, float low, float high);

/* Reads `bytes` (a multiple of 16) and does nothing: pushes everything else out of L2. */
int cuda_flush(const void *memory, uint64_t bytes, void *stream);

#ifdef __cplusplus
}
#endif
#endif
