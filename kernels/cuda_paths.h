/* Which attention path a device gets. */
#ifndef HSTU_CUDA_PATHS_H
#define HSTU_CUDA_PATHS_H

#include "cuda_pass.h"

/* The first path of the table that runs on compute capability major.minor; HSTU_KERNELS=portable
 * (or any path's name) leaves only that one. NULL, and a log line, when there is none. */
const struct hstu_attention_path *hstu_attention_choose(int major, int minor);

/* When UVQK runs as one kernel (gemm_sm90.cu): on 9.0 where it pays; never elsewhere and with
 * HSTU_KERNELS=portable. HSTU_UVQK=fused or cublaslt decides for every size. */
enum hstu_uvqk_fusion { HSTU_UVQK_NEVER, HSTU_UVQK_WHERE_IT_PAYS, HSTU_UVQK_ALWAYS };
enum hstu_uvqk_fusion hstu_uvqk_choose(int major, int minor);

#endif
