/* The mathematics of an HSTU block, as plain functions: the contract that every kernel is held to.
 * Internal to the project.
 *
 *   reference.c   fp32 (accumulated in fp64 where it costs nothing) or rounded to bf16 at the
 *                 points below; slow and obvious
 *   host_*.c      the fast host version that the host runner uses
 *   *.cu          CUDA: see cuda_pass.h
 *
 * Rounding points (of `rounded`): LN out to bf16; GEMM fp32 + bias -> bf16 -> SiLU fp32 -> bf16;
 * QK^T, mask, alpha, SiLU fp32, p to bf16 before PV, fp32 accumulation, divide by N after PV, o to
 * bf16; LN * u fp32, one rounding; projection fp32 + residual, one rounding. Without `rounded` only
 * inputs, weights and pages are bf16 (pages always are). */
#ifndef HSTU_LAYERS_H
#define HSTU_LAYERS_H

#include "hstu.h"
#include "table_rows.h"

static inline float bf16_to_float(uint16_t bits)
{
    union {
        uint32_t u;
        float f;
    } x = {.u = (uint32_t)bits << 16};
    return x.f;
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t bf16_from_float(float value)
{
    union {
        float f;
        uint32_t u;
    } x = {.f = value};
    if ((x.u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((x.u >> 16) | 0x40u);
    return (uint16_t)((x.u + 0x7fffu + ((x.u >> 16) & 1u)) >> 16);
}

/* May query row `query` (absolute position) of a sequence with `history` tokens see key `key`? The
 * one definition of the mask. */
static inline bool hstu_allowed(uint32_t query, uint32_t key, uint32_t history, uint32_t group)
{
    if (query < history)
        return key <= query;
    if (key < history)
        return true;
    return key <= query && (key - history) / group == (query - history) / group;
}

/* Where K (kv 0) or V (kv 1) of token t of a page lies: element offset from the page's start, D
 * contiguous elements. */
static inline uint64_t hstu_page_offset(const struct skv_geometry *g, uint32_t layer, uint32_t kv,
                                        uint32_t head, uint32_t slot)
{
    return ((((uint64_t)layer * 2 + kv) * g->heads + head) * g->page_tokens + slot) * g->head_dim;
}

/* Attention of one sequence and one head, reference. q, k, v: the in-flight rows [n + T], row
 * stride `stride` elements, bf16 values held as fp32 or fp32 proper; the prefix [0, c) comes from
 * `pages`. out: [n + T][D] fp32, row stride out_stride. */
struct hstu_attention_case {
    struct skv_geometry geometry;
    uint32_t scaling_length, group, layer;
    uint32_t history, cached, targets;
    const uint16_t *pool;  /* page p at pool + p * page elements */
    const uint32_t *pages; /* [ceil(c/S)] */
    const float *q, *k, *v;
    uint64_t stride;
    float *out;
    uint64_t out_stride;
    float *magnitude; /* [n + T] sum_j |s_j v_j| summed over d, maximum over d: tolerance term; or
                         NULL */
    bool rounded;
};
void hstu_reference_attention(const struct hstu_attention_case *c, uint32_t head);

/* A whole pass, reference: embedding + position, L layers, head. Appends write bf16 K and V through
 * pages. `block_out` [sum q][E] and `logits` [sum T][head_out] may be NULL. `pool` NULL: no pages
 * anywhere. Returns 0 or SKV_ENOMEM. */
int hstu_reference_pass(const struct hstu_weights *weights, const struct hstu_sequence *sequences,
                        uint32_t count, uint16_t *pool, bool rounded, float *block_out,
                        float *logits);

/* The head of rows x [rows][E]: logits [rows][head_out]. Returns 0 or SKV_ENOMEM. */
int hstu_reference_head(const struct hstu_weights *weights, const float *x, uint32_t rows,
                        float *logits);

/* The block alone on given input rows x [sum q][E] fp32 (bf16 values): what the kernels' tests
 * drive. */
int hstu_reference_block(const struct hstu_weights *weights, const struct hstu_sequence *sequences,
                         uint32_t count, uint16_t *pool, bool rounded, const float *x,
                         float *block_out);

/* One backend of the runner; see client/runner.c. All functions as in hstu.h. */
struct hstu_backend {
    const char *name;
    int (*open)(const struct hstu_runner_options *options, void **state);
    void (*close)(void *state);
    int (*launch)(void *state, const struct hstu_sequence *sequences, uint32_t count, bool gated);
    int (*wait)(void *state, float *logits, uint32_t timeout_ms);
    int (*debug)(void *state, const struct hstu_sequence *sequences, uint32_t count,
                 float *block_out);
    void (*footprint)(const void *state, struct hstu_footprint *out);
};
extern const struct hstu_backend hstu_backend_host;
extern const struct hstu_backend
    hstu_backend_cuda; /* in host-only builds: open() is SKV_ENODEVICE */

#endif
