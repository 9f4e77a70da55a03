/* The CUDA runner's state, shared by its files:
 *   cuda_runner.c  the backend: open, launch, wait, close
 *   cuda_memory.c  what it holds on the device: weights, arena, the pinned block
 *   cuda_batch.c   a batch checked and written into the pinned block
 *   cuda_graph.c   a pass enqueued, captured, kept by size
 *   cuda_waits.c   the waits for gates in it
 * Tests and benches may look in here too. */
#ifndef HSTU_CUDA_STATE_H
#define HSTU_CUDA_STATE_H

#include "cuda_check.h"
#include "cuda_gemm.h"
#include "cuda_kernels.h"
#include "cuda_paths.h"
#include "layers.h"

/* One layer's weights on the device. Fused: the first norm and the bias are in uvqk and fold, and
 * not there by themselves; else there is no fold. */
struct hstu_cuda_layer {
    void *ln1_weight, *ln1_bias, *uvqk, *uvqk_bias, *ln2_weight, *ln2_bias, *projection;
    struct hstu_fold *fold;
};

struct hstu_cuda_weights {
    void *memory; /* one allocation behind all of them */
    uint64_t bytes;
    struct hstu_cuda_layer layer[SKV_MAX_LAYERS];
    void *embedding, *position;
    void *head1, *head1_bias, *head2, *head2_bias;
    uint32_t head_columns; /* head_hidden rounded up to 64; the added columns are zero */
};

/* One allocation for every graph and layer: a pass ends before the next begins, and a layer's
 * activations are dead when it ends. Sized for the largest graph. */
struct hstu_cuda_arena {
    char *memory;
    uint64_t bytes;
    /* the batch, written by pull */
    struct hstu_counts *counts;
    uint32_t *row_sequence, *slot;      /* [rows] */
    uint8_t *slices, *last_slices;      /* [rows] both; last: of the last layer */
    uint32_t *page;                     /* [page_capacity] */
    struct hstu_work *work, *last_work; /* [work_capacity] both */
    void *units, *last_units; /* of the work lists, decoded; NULL where nobody reads them */
    uint32_t *uvqk_wanted, *project_wanted, *head_wanted; /* struct hstu_wanted_tiles; NULL unless
                                                             fused */
    /* activations: from here to the end poison may fill */
    char *activations;
    void *x;                        /* [rows][E] */
    void *normed;                   /* [rows][max(E, HD)]: LN's output, then y */
    void *m;                        /* [rows][4HD] */
    float *partial;                 /* [slices][rows][HD] */
    struct hstu_moments *x_moments; /* [E / 64 at most][rows] */
    float *head;                    /* the head's scratch, in m's place */
    uint32_t *candidate_row;
    float *inverse_norm; /* [rows] both; NULL where hstu_cuda_head_fused() */
    void *workspace;     /* cuBLASLt's, unless fused */
    uint64_t workspace_bytes;
};

/* The pinned block: written by the CPU before a launch, read by pull; logits the other way. */
struct hstu_cuda_pinned {
    char *memory;
    uint64_t bytes;
    struct hstu_counts *counts;
    uint64_t *token; /* [rows] both */
    uint8_t *slices, *last_slices;
    uint32_t *page;
    struct hstu_work *work, *last_work;
    float *logits; /* [rows][head_out] */
};

/* A part of the pinned block that a launch has written. */
struct hstu_cuda_written {
    volatile char *at;
    uint64_t bytes;
};
enum { HSTU_CUDA_PARTS = 7, HSTU_CUDA_LINE = 64 /* bytes of the CPU's */ };

/* Which instance of a size: OR of these. */
enum hstu_cuda_instance {
    HSTU_CUDA_GATED = 1, /* waits for gate l before layer l touches pages */
    HSTU_CUDA_BLOCK = 2, /* the layers alone, on what the last pull left: for benches */
    HSTU_CUDA_INSTANCES = 4,
};

enum { HSTU_CUDA_MAX_SIZES = 512 };

struct hstu_cuda {
    const struct hstu_weights *weights;
    struct hstu_model model; /* = weights->model */
    int ordinal;
    int sm_count;
    void *pool, *append_pool; /* page 0: to read, to write */
    uint64_t pool_pages;
    uint32_t max_rows, max_batch;
    uint32_t arena_rows;    /* of the largest graph */
    uint32_t page_capacity; /* of the pinned block and the arena */
    uint32_t work_capacity;
    uint32_t *gate_row;     /* on the host, or NULL */
    uintptr_t gate_address; /* of its first word, on the device */

    struct hstu_cuda_weights on_device;
    struct hstu_cuda_arena arena;
    struct hstu_cuda_pinned pinned;
    struct hstu_work *plan_work; /* [work_capacity] a plan, before it is copied to the block */
    uint8_t *plan_slices;        /* [arena_rows] */
    struct hstu_cuda_written written[HSTU_CUDA_PARTS];
    uint32_t reclaim_part; /* where hstu_cuda_reclaim() goes on */
    uint64_t reclaim_at;

    const struct hstu_attention_path *path;
    struct hstu_gemm *gemm; /* NULL when fused */
    bool fused;             /* hstu_products_fused() */
    cudaStream_t stream;
    cudaEvent_t done; /* after every pass */
    cudaGraphExec_t graph[HSTU_CUDA_MAX_SIZES][HSTU_CUDA_INSTANCES];
    uint32_t graphs;
    uint64_t graphs_bytes, context_bytes;

    /* The last layer makes history rows' outputs too, which no pass needs: debug(), benches. */
    bool every_row;
    bool running;        /* launched, not waited for */
    uint32_t candidates; /* of the running pass */
    uint32_t rows;       /* query rows of it */
};

/* Has the head kernels of its own on Hopper? */
static inline bool hstu_cuda_head_fused(const struct hstu_cuda *c)
{
    return c->fused && c->model.head_out <= HSTU_HEAD_SM90_OUTPUTS;
}

/* cuda_memory.c */
int hstu_cuda_memory_open(struct hstu_cuda *c);
void hstu_cuda_memory_close(struct hstu_cuda *c);
/* Fills the activations with NaN, for tests. The runner must be idle. */
int hstu_cuda_poison(struct hstu_cuda *c);

/* cuda_batch.c: checks and writes the pinned block; sets rows and candidates. SKV_EINVAL changes
 * nothing. */
int hstu_cuda_batch(struct hstu_cuda *c, const struct hstu_sequence *sequences, uint32_t count,
                    uint32_t *graph_rows);
/* Takes a few lines of what the last launch wrote back from the GPU, which has read them, and goes
 * on from there the next time, round and round. For who waits anyway: the next launch then finds
 * the lines in its own cache. The bytes stay as they are. */
void hstu_cuda_reclaim(struct hstu_cuda *c);

/* Who multiplies, in words. */
static inline const char *hstu_cuda_products(const struct hstu_cuda *c)
{
    return c->fused ? "fused" : hstu_gemm_name(c->gemm);
}

/* cuda_graph.c */
/* Rows of the graph that takes `rows`: multiples of 64 up to 1024, of 128 up to 8192, then of 256.
 * The index is dense. */
uint32_t hstu_cuda_graph_rows(uint32_t rows, uint32_t *index);
/* The instance of a size, captured if need be. */
int hstu_cuda_graph(struct hstu_cuda *c, uint32_t graph_rows, uint32_t instance,
                    cudaGraphExec_t *out);
void hstu_cuda_graphs_close(struct hstu_cuda *c);

/* cuda_waits.c */
/* In a capture: before its newest node a wait for gate `layer` is to stand. The node goes to
 * behind[layer]; `behind` NULL: a pass without waits. */
int hstu_cuda_stands_behind(struct hstu_cuda *c, uint32_t layer, cudaGraphNode_t *behind);
/* Adds a wait for every gate to the captured graph, before behind[layers]. SKV_EDEVICE. */
int hstu_cuda_add_waits(struct hstu_cuda *c, cudaGraph_t graph, const cudaGraphNode_t *behind);

#endif
