/* hstu: HSTU layers on sidekv's pages. The public API of libsidekv-hstu.
 *
 * A model is a geometry, some constants and a set of weights; a runner owns one arena and runs
 * batches of sequences through embedding, the HSTU block and the head: on CUDA as captured graphs
 * keyed by total rows, one launch per batch; on the host as threads of the caller. The runner reads
 * the cached prefix from pages, computes in-flight tokens from its own tensors, and writes K and V
 * of new history through the pages that the batch was granted for appending. */
#ifndef HSTU_H
#define HSTU_H

#include "sidekv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Everything that decides a number. All of it is in the fingerprint. */
struct hstu_model {
    struct skv_geometry geometry; /* layers L, heads H, head dim D, page tokens S */
    uint32_t embed;               /* E: hidden size, a multiple of 64, at most 2048 */
    uint32_t scaling_length;      /* N: attention is divided by it; a constant of the model */
    uint32_t group;            /* g: candidates that may see each other, >= 1; 1: only themselves */
    uint32_t position_buckets; /* K: rows of the position table */
    uint32_t embedding_rows;   /* a power of two; a token's row is hstu_token_row() */
    uint32_t head_hidden, head_out; /* the MLP head: E -> head_hidden (ReLU) -> head_out */
    float eps;                      /* layer norm */
};

/* The named models of the command line: "tiny", "kuairand", "bench". SKV_ENOENT for another name.
 */
int hstu_model_named(const char *name, struct hstu_model *out);

/* The most history tokens a named model takes: tiny and kuairand 8192, bench 4096. */
uint32_t hstu_model_history(const char *name);

int hstu_model_check(const struct hstu_model *model);

/* The embedding row of a token: a fixed mix of its bits, so that any u64 is a token. */
uint32_t hstu_token_row(const struct hstu_model *model, uint64_t token);

/* One layer's weights, bf16 bits, row-major. */
struct hstu_layer_weights {
    uint16_t *ln1_weight, *ln1_bias; /* [E] */
    uint16_t *uvqk, *uvqk_bias;      /* [E][4*H*D] in flat u|v|q|k, [4*H*D] */
    uint16_t *ln2_weight, *ln2_bias; /* [H*D] */
    uint16_t *projection;            /* [H*D][E] */
};

struct hstu_weights {
    struct hstu_model model;
    struct hstu_layer_weights layer[SKV_MAX_LAYERS];
    uint16_t *embedding;          /* [embedding_rows][E] */
    uint16_t *position;           /* [position_buckets][E] */
    uint16_t *head1, *head1_bias; /* [E][head_hidden], [head_hidden] */
    uint16_t *head2, *head2_bias; /* [head_hidden][head_out], [head_out] */
    uint64_t bytes;               /* of all of them */
    void *memory;                 /* one allocation behind all of them */
};

/* Seeded random weights, scaled so that activations stay of order one through the layers and scores
 * differ between users. The same model and seed give the same bits on any machine. Follow with
 * hstu_weights_close(). SKV_ENOMEM. */
int hstu_weights_random(const struct hstu_model *model, uint64_t seed, struct hstu_weights **out);
void hstu_weights_close(struct hstu_weights *weights);

/* The 128-bit fingerprint: XXH3-128 of the model's fields (mask, geometry, N, eps, ...) and of
 * every weight. */
struct skv_id hstu_fingerprint(const struct hstu_weights *weights);

/* One user's part of a batch. */
struct hstu_sequence {
    uint32_t history; /* h */
    uint32_t cached;  /* c <= h; new tokens n = h - c */
    uint32_t targets; /* T candidates */
    bool append;      /* write K and V of tokens [c, h) through pages */
    const uint32_t
        *pages; /* page of token t is pages[t / S]; covers [0, h) with append, else [0, c) */
    const uint64_t *tokens; /* [n + T] new history, then candidates */
};

struct hstu_runner;

struct hstu_runner_options {
    const struct hstu_weights *weights; /* must outlive the runner */
    struct skv_device *device;          /* host: computes on CPU threads; CUDA: on that GPU */
    void
        *pool_base; /* device address of page 0, or NULL: sequences must have c = 0 and no append */
    void *pool_append_base; /* where new K and V are written: skv_pool_append_base(); NULL:
                               pool_base */
    uint64_t pool_pages;    /* 0 with pool_base NULL */
    uint32_t max_rows;      /* query rows a launch, at least the longest history + candidates; CUDA:
                               at most 65,536 */
    uint32_t max_batch;     /* sequences a launch, at most SKV_MAX_BATCH */
    uint32_t *gate_row;     /* of this runner's row, from skv_gate_row(); NULL: never gated */
    uint32_t threads;       /* host only: CPU threads, the waiting one included; 0: 1 */
};

/* Takes the arena, uploads the weights. Graphs are captured when first needed. SKV_ENOMEM,
 * SKV_EINVAL, SKV_ENODEVICE. */
int hstu_runner_open(const struct hstu_runner_options *options, struct hstu_runner **out);
void hstu_runner_close(struct hstu_runner *runner);

/* Starts one pass over `count` sequences. `gated`: wait for gate l before layer l touches pages.
 * The arrays may be reused once it returns. One pass at a time: follow with hstu_runner_wait().
 * SKV_EINVAL: more rows than max_rows, or a page outside the pool; SKV_EBUSY: a pass runs. Nothing
 * was launched then. */
int hstu_runner_launch(struct hstu_runner *runner, const struct hstu_sequence *sequences,
                       uint32_t count, bool gated);

/* Waits for the pass. logits: [sum of T][head_out], before the sigmoid, in sequence order; NULL to
 * drop them. On the host the caller computes meanwhile, as one of the runner's threads.
 * SKV_ETIMEDOUT: still running (call again); SKV_EINVAL: none runs; SKV_EDEVICE: the context is
 * lost. */
int hstu_runner_wait(struct hstu_runner *runner, float *logits, uint32_t timeout_ms);

/* Like launch + wait, and also gives the block's output rows x_L [sum q][E] as fp32, for tests:
 * those of history too, which launch leaves out where nothing needs them. Logits may differ from
 * launch's in their last bits, as attention of the last layer may be cut in other slices. */
int hstu_runner_debug(struct hstu_runner *runner, const struct hstu_sequence *sequences,
                      uint32_t count, float *block_out);

struct hstu_footprint {
    uint64_t context_bytes, weights_bytes, arena_bytes,
        graphs_bytes; /* device (or host) memory of this runner */
    uint32_t graphs;  /* captured so far */
};
void hstu_runner_footprint(const struct hstu_runner *runner, struct hstu_footprint *out);

static inline float hstu_sigmoid(float logit)
{
    return 1.0f / (1.0f + __builtin_expf(-logit));
}

#ifdef __cplusplus
}
#endif
#endif
