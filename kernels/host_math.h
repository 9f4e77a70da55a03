/* The fast host version of the layers: what its files share.
 *
 *   host_pass.c        the runner's host backend: arena, threads, gates, the phases of a pass
 *   host_math.c        packs weights, chooses the instruction set
 *   host_math_*.c      one instruction set each: a handful of vector primitives, then
 *   host_math_body.h   the mathematics, written once in those primitives and host_vector.h's
 *
 * The promise: **a row's bits depend on that row alone** (and on the instruction set): not on the
 * rows beside it, on how many there are, on where a chunk begins, on what was cached, on threads.
 * It is kept by one rule: every sum has one order. A matrix product adds its terms, first to last,
 * in one accumulator an element (one fused multiply-add a term, or one instruction a pair of
 * terms); vectors run across columns, never along the sum. So it does not matter whether a row is
 * computed alone or among six. Attention adds keys by ascending absolute position the same way; K
 * and V are bf16 before use, whether they come from a page or from this call; a masked key is left
 * out, not multiplied by zero. */
#ifndef HSTU_HOST_MATH_H
#define HSTU_HOST_MATH_H

#include "layers.h"

enum {
    HOST_COLUMNS = 64,    /* columns of a weight panel; also the keys of a block */
    HOST_TILE_ROWS = 6,   /* rows of a register tile */
    HOST_BLOCK_ROWS = 48, /* rows of a row task: weights are read once for them */
    HOST_QUERY_ROWS = 192 /* most query rows of an attention task: a key block is unpacked once for
                             them */
};

/* A matrix of weights [depth][columns], as panels [columns / 64][words][64] of 32-bit words, the
 * last one filled up with zeros. A word holds one fp32, or two bf16 that follow one another along
 * the depth. */
struct host_matrix {
    float *panels;
    uint32_t words, columns;
};

struct host_layer {
    float *ln1_weight, *ln1_bias; /* [E] */
    struct host_matrix uvqk;      /* [E][4HD] */
    float *uvqk_bias;             /* [4HD] */
    float *ln2_weight, *ln2_bias; /* [HD] */
    struct host_matrix projection;
};

/* A model's weights as an instruction set wants them; vectors and the head's matrices are fp32. */
struct host_model {
    struct hstu_model model;
    uint32_t width;       /* HD */
    uint64_t page_values; /* of a page, bf16 */
    struct host_layer layer[SKV_MAX_LAYERS];
    struct host_matrix head1, head2;
    float *head1_bias, *head2_bias; /* padded to whole panels with zeros */
    void *memory;
    uint64_t bytes;
};
int host_model_open(const struct hstu_weights *weights, uint32_t pair, struct host_model **out);
void host_model_close(struct host_model *model);

/* The activations of a pass. */
struct host_rows {
    uint16_t *x; /* [rows][E] bf16, the residual stream */
    uint16_t *m; /* [rows][4HD] bf16, post-SiLU, u|v|q|k */
    float *o;    /* [rows][HD] */
};

/* One thread's working memory. */
struct host_scratch {
    float *row;    /* [max(E, HD)] */
    float *a;      /* [48][max(E, HD)] left operand of a product */
    float *hidden; /* [6][head_hidden, whole panels] */
    float *tile;   /* [6][64] */
    float *p;      /* [6][64] */
    float *query;  /* [192][D] */
    float *sum;    /* [192][D] */
    float *key;    /* [D][64]: a key block, transposed */
    float *value;  /* [64][D] */
    void *memory;
    uint64_t bytes;
};
int host_scratch_open(const struct hstu_model *model, struct host_scratch *out);
void host_scratch_close(struct host_scratch *scratch);

/* Query rows [row0, row0 + rows) of a sequence, one head. Pointers are to local row 0. */
struct host_attend {
    const struct hstu_sequence *sequence;
    uint32_t layer, head;
    uint32_t row0, rows;
    const uint16_t *pool;
    const uint16_t *m;
    float *o;
};

/* One instruction set. All functions work on at most HOST_BLOCK_ROWS rows (attend: on
 * HOST_QUERY_ROWS); `wanted` [rows] or NULL for all: rows whose output is used. The others get K
 * and V only. */
struct host_math {
    const char *name;
    uint32_t pair; /* values a word: 1, or 2 where products are of bf16 pairs */
    bool (*supported)(void);
    /* x = bf16(emb * sqrt(E) + pos) */
    void (*embed)(const struct hstu_weights *weights, const uint64_t *tokens,
                  const uint32_t *positions, uint32_t rows, uint16_t *x);
    /* m = SiLU(LN(x) W + b) */
    void (*project)(const struct host_model *model, uint32_t layer, const uint16_t *x, uint16_t *m,
                    uint32_t rows, const bool *wanted, struct host_scratch *scratch);
    /* o = attention / N */
    void (*attend)(const struct host_model *model, const struct host_attend *task,
                   struct host_scratch *scratch);
    /* x += (u * LN(o)) P */
    void (*output)(const struct host_model *model, uint32_t layer, const uint16_t *m,
                   const float *o, uint16_t *x, uint32_t rows, const bool *wanted,
                   struct host_scratch *scratch);
    /* logits [rows][head_out] of rows x */
    void (*head)(const struct host_model *model, const uint16_t *x, uint32_t rows, float *logits,
                 struct host_scratch *scratch);
    /* For the bench: fused multiply-adds on registers, `rounds` times; returns how many operations
     * (a multiply-add is two). */
    uint64_t (*peak)(uint64_t rounds);
};
extern const struct host_math host_math_avx512bf16, host_math_avx512, host_math_avx2,
    host_math_portable;

/* The fastest that this CPU has; HSTU_HOST_MATH=avx512bf16|avx512|avx2|portable forces one (NULL
 * when it is unknown or this CPU lacks it). */
const struct host_math *host_math_choose(void);

#endif
