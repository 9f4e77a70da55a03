/* The CUDA kernels around attention and the big products, as C functions: each enqueues on a
 * cudaStream_t (here void *, so that no CUDA header is needed) and returns 0 or, logged, an error.
 * Tensors are row-major; bf16 unless said otherwise. Rows of padding (row_sequence UINT32_MAX) hold
 * nothing that reaches another row. */
#ifndef HSTU_CUDA_KERNELS_H
#define HSTU_CUDA_KERNELS_H

#include "cuda_layout.h"
#include "cuda_pass.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- pull (pull.cu): the batch from the pinned block to the device ---- */

/* The pinned block's head; `counts` is copied as it is, the arrays behind it by their counts. */
struct hstu_counts {
    struct hstu_layout layout; /* all that a block of rows reads of the counts */
    uint32_t target_start[SKV_MAX_BATCH + 1];
    uint32_t candidates;
    uint32_t every_row;            /* 1: of the last layer history rows' output is wanted too */
    uint32_t next[SKV_MAX_LAYERS]; /* zeros */
    uint32_t reserved[1];          /* the size is a multiple of 16 */
};
static_assert(sizeof(struct hstu_counts) % 16 == 0, "pull copies 16 bytes at a time");

struct hstu_pull_args {
    /* in pinned memory */
    const struct hstu_counts *counts;
    const uint64_t *token;               /* [rows] */
    const uint8_t *slices, *last_slices; /* [rows] both */
    const uint32_t *page; /* room for whole lines of 128 bytes, there and on the device */
    const struct hstu_work *work, *last_work;
    /* on the device */
    struct hstu_counts *to_counts;
    uint32_t *to_row_sequence, *to_slot, *to_page;
    uint8_t *to_slices, *to_last_slices;
    struct hstu_work *to_work, *to_last_work;
    /* x = bf16(emb * sqrt(E) + pos) */
    const void *embedding, *position;
    void *x;
    uint32_t rows, embed, embedding_rows, position_buckets, page_tokens;
};
int hstu_launch_pull(const struct hstu_pull_args *args, void *stream);

/* ---- norms and activation (elementwise.cu) ---- */

/* out = LN(x; weight, bias, eps), one rounding. x, out [rows][columns], columns <= 2048. */
struct hstu_norm_args {
    const uint32_t *row_sequence;
    const void *x, *weight, *bias;
    void *out;
    uint32_t rows, columns;
    float eps;
};
int hstu_launch_norm(const struct hstu_norm_args *args, void *stream);

/* Of `width` values: their mean, and the sum of the squares of how far each is from it. */
struct hstu_moments {
    float mean, square;
};

/* The row tiles of a product that have rows wanted of the last layer. */
struct hstu_wanted_tiles {
    uint32_t rows;  /* of a tile; 1024 tiles at most; 0: no list is needed */
    uint32_t *list; /* out: how many they are, then which, ascending; room for one more than all, as
                       who walks it looks one ahead */
};

/* What a pass works out before its first layer: the moments of each row's values, for a norm that
 * comes with the product after it, attention's units, and tiles wanted of the last layer. */
struct hstu_prepare_args {
    const uint32_t *row_sequence;
    const void *x;                   /* [rows][columns], columns <= 2048 */
    struct hstu_moments *out;        /* [rows] */
    uint32_t rows, columns;          /* rows 0: none */
    struct hstu_units_args units[2]; /* of the layers but the last, of the last */
    const struct hstu_counts *counts;
    struct hstu_wanted_tiles wanted[3]; /* of UVQK, of the projection, of the head */
};
int hstu_launch_prepare(const struct hstu_prepare_args *args, void *stream);

/* m = SiLU(m) in place, and K and V of rows that have a slot to their page. m [rows][4HD]. */
struct hstu_activate_args {
    const uint32_t *row_sequence, *slot;
    void *m, *pool;
    struct skv_geometry geometry;
    uint32_t rows, layer;
};
int hstu_launch_activate(const struct hstu_activate_args *args, void *stream);

/* ---- the gate (gate.cu) ---- */

/* y = u * LN(sum of slices / N; weight, bias, eps) over the whole HD row; fp32 until the one
 * rounding. u is the first part of m; partial fp32 [slices][rows][HD]. */
struct hstu_gate_args {
    const uint8_t *slices; /* 0: padding, or nobody wants y */
    const float *partial;
    const void *m, *weight, *bias;
    void *y;
    uint32_t rows, columns; /* HD */
    uint32_t sm_count;
    float inverse_n, eps;
    bool rounded; /* sums of one slice: bf16 in the first half of a row's place */
    /* May start while attention ends. That lets its dependents start only after its own wait, so u
     * is there by then, and slices. */
    bool early;
};
int hstu_launch_gate(const struct hstu_gate_args *args, void *stream);

/* ---- the head (head.cu; head_sm90.cu: compute capability 9.0, few outputs) ---- */

/* logits [candidates][outputs] fp32 = ReLU(x / max(|x|, 1e-6) W1 + b1) W2 + b2 of the candidate
 * rows of x, in the batch's order. Hidden width is padded to a multiple of 64 with zero weights. */
struct hstu_head_args {
    struct hstu_device_batch batch;
    const void *x; /* [rows][embed] */
    const void *weight1, *bias1, *weight2, *bias2;
    float *scratch;            /* [rows][hidden], of which Hopper's head takes outputs / 64 */
    float *logits;             /* pinned, [rows][outputs] */
    const uint32_t *row_count; /* candidates, one word on the device */
    uint32_t rows, embed, hidden_columns, outputs;
    /* head.cu */
    uint32_t *candidate_row; /* scratch [rows] */
    float *inverse_norm;     /* scratch [rows] */
    /* head_sm90.cu: moments [parts][rows] of x's rows, and the row tiles that have candidates */
    const struct hstu_moments *moments;
    const uint32_t *wanted;
    uint32_t parts, sm_count;
};
int hstu_launch_head(const struct hstu_head_args *args, void *stream);
#define HSTU_HEAD_SM90_OUTPUTS 64 /* at most */
int hstu_launch_head_sm90(const struct hstu_head_args *args, void *stream);
/* Rows of the row tiles that args->wanted has to list. */
uint32_t hstu_head_sm90_listed_rows(const struct hstu_head_args *args);

/* ---- products (gemm_mma.cu): where cuBLASLt is missing, and the head's ---- */

enum hstu_product {
    HSTU_PRODUCT_BIAS,     /* out = a b + extra, extra [n] bf16; out bf16 */
    HSTU_PRODUCT_RESIDUAL, /* out += a b, out bf16 */
    HSTU_PRODUCT_HEAD,     /* out = ReLU(a b * scale[row] + extra), out fp32 */
};

/* a [rows][k], b [k][n], out [rows][n]; k and n multiples of 64. */
struct hstu_product_args {
    const void *a, *b, *extra;
    void *out;
    const uint32_t *a_row; /* row of a for each row of out, or NULL: the same */
    const float *scale;
    const uint32_t *row_count; /* on the device: compute only this many rows, or NULL: all */
    uint32_t rows, n, k;
};
int hstu_launch_product(enum hstu_product product, const struct hstu_product_args *args,
                        void *stream);

/* ---- the two products of a layer (uvqk_sm90.cu, project_sm90.cu): compute capability 9.0 ----
 *
 * Rows of padding are computed like any other, where a list does not leave them out; what comes of
 * them is in their own rows. */

/* Rows by columns. UVQK has those up to 128 x 128, the projection those from 128 x 256 on. */
enum hstu_tiles {
    HSTU_TILES_ANY,
    HSTU_TILES_256X128,
    HSTU_TILES_128X256,
    HSTU_TILES_192X128,
    HSTU_TILES_128X128,
    HSTU_TILES_64X64
};

/* m = SiLU(LN(x) W + bias), and K and V of rows that have a slot to their page. x [rows][k], b
 * [k][n], m [rows][n], n = 4HD. Where the norm has weight w and bias v, b is W with row i times
 * w[i]; of column j, fold has the sum of b and bias[j] + sum over i of v[i] W[i][j]. */
struct hstu_fold {
    float sum, bias;
};
struct hstu_uvqk_args {
    const void *x, *b;
    const struct hstu_moments *moments; /* [parts][rows], each of k / parts columns of x */
    const struct hstu_fold *fold;       /* [n] */
    void *m, *pool;
    const uint32_t *slot;
    struct skv_geometry geometry;
    uint32_t layer, rows, n, k, parts, sm_count;
    float eps;
    bool early;            /* may start while the kernel before it ends */
    enum hstu_tiles tiles; /* ANY, but in tests */
    bool spares_l2;        /* weights leave the L2 first */
    /* Row tiles (struct hstu_wanted_tiles) whose u and q are wanted: of the others only v and k may
     * be computed. NULL: all are. Older than the kernel before. */
    const uint32_t *wanted;
};
int hstu_launch_uvqk_sm90(const struct hstu_uvqk_args *args, void *stream);
/* Rows of the row tiles that args->wanted has to list. 0: it is not read, as that is no faster. */
uint32_t hstu_uvqk_sm90_listed_rows(const struct hstu_uvqk_args *args);

/* x += y b, and the moments of x's new values. y [rows][k], b [k][n], x [rows][n]; k a multiple of
 * 64, n of the tiles' columns. */
struct hstu_project_args {
    const void *y, *b;
    void *x;
    struct hstu_moments *moments; /* out, [parts][rows] */
    uint32_t rows, n, k, sm_count;
    bool early;
    enum hstu_tiles tiles;  /* ANY, but in tests */
    bool spares_l2;         /* weights leave the L2 first */
    const uint32_t *wanted; /* as above; of other row tiles x may stay as it is */
};
int hstu_launch_project_sm90(const struct hstu_project_args *args, void *stream);
/* How many parts the moments have. */
uint32_t hstu_project_sm90_parts(const struct hstu_project_args *args);
uint32_t hstu_project_sm90_listed_rows(const struct hstu_project_args *args);

#ifdef __cplusplus
}
#endif
#endif
