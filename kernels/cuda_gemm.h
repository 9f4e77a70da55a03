/* The two big products of a layer, by cuBLASLt where libcublasLt is there, else by gemm_mma.cu.
 * libcublasLt (half a gigabyte) is opened at run time: $HSTU_CUBLASLT names the file ("none":
 * without), else the loader's path, the toolkit's folder and the Python wheels are tried. */
#ifndef HSTU_CUDA_GEMM_H
#define HSTU_CUDA_GEMM_H

#include "cuda_kernels.h"

struct hstu_gemm; /* the open library, one workspace */

/* `workspace` is device memory that only this runner's stream uses. Never fails for want of the
 * library. Follow with hstu_gemm_close(). */
int hstu_gemm_open(void *workspace, uint64_t workspace_bytes, struct hstu_gemm **out);
void hstu_gemm_close(struct hstu_gemm *gemm);
const char *hstu_gemm_name(const struct hstu_gemm *gemm); /* "cuBLASLt 13.1.0" or "mma.sync" */
size_t hstu_gemm_version(const struct hstu_gemm *gemm);   /* cublasLtGetVersion(), or 0 */

/* A product of one shape, its algorithm chosen. Ask for it before a capture begins; free it when
 * the graph has been instantiated. */
struct hstu_gemm_plan;
int hstu_gemm_plan(struct hstu_gemm *gemm, enum hstu_product product, uint32_t rows, uint32_t n,
                   uint32_t k, struct hstu_gemm_plan **out);
void hstu_gemm_plan_close(struct hstu_gemm_plan *plan);
/* Enqueues out = a b (+ extra), as enum hstu_product says; `extra` is NULL for a residual. */
int hstu_gemm_run(struct hstu_gemm_plan *plan, const void *a, const void *b, const void *extra,
                  void *out, void *stream);

/* For bench_gemm: how many algorithms the heuristic offers (at most `limit`), and a plan with the
 * index-th. */
uint32_t hstu_gemm_choices(struct hstu_gemm *gemm, enum hstu_product product, uint32_t rows,
                           uint32_t n, uint32_t k, uint32_t limit);
int hstu_gemm_plan_choice(struct hstu_gemm *gemm, enum hstu_product product, uint32_t rows,
                          uint32_t n, uint32_t k, uint32_t choice, struct hstu_gemm_plan **out);

#endif
