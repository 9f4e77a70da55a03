/* Which attention path a device gets. */
#ifndef HSTU_CUDA_PATHS_H
#define HSTU_CUDA_PATHS_H

#include "cuda_pass.h"

/* The first path of the table that runs on compute capability major.minor; HSTU_KERNELS=portable
 * (or any path's name) leaves only that one. NULL, and a log line, when there is none. */
const struct hstu_attention_path *hstu_attention_choose(int major, int minor);

/* Are a layer's first norm, activation and residual parts of the two products (uvqk_sm90.cu,
 * project_sm90.cu)? Beside path sm90, unless HSTU_PRODUCTS=cublaslt. */
bool hstu_products_fused(const struct hstu_attention_path *path);

#endif
