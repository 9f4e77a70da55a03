/* What the CUDA kernels of one pass share: the batch as it lies on the device, the attention work
 * list, and the contract of an attention path. Plain C, so that the planner and its tests need no
 * GPU.
 *
 * The runner writes a batch into one pinned block (cuda_batch.c); the graph's first
 * node, `pull`, copies it to the fixed device addresses of struct hstu_device_batch and embeds the
 * rows. A launch thus patches nothing.
 *
 * Two attention paths: "sm90" (wgmma, TMA; compute capability 9.0) and "portable" (mma.sync,
 * cp.async; 8.0 and up; at most 99 KiB of shared memory a block). HSTU_KERNELS=portable forces the
 * second. */
#ifndef HSTU_CUDA_PASS_H
#define HSTU_CUDA_PASS_H

#include "hstu.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One block's share of attention: `rows` query rows (at most the path's tile) from local row `row0`
 * of a sequence, one head, keys [key0, key1) by absolute position (in-flight keys included: key t
 * >= cached is local row t - cached). Partial sums go to slice `slice` of the output, every row and
 * every column of the head, even when no key was allowed (zeros then). Where args.rounded says so,
 * sums of a tile of one slice are rounded to bf16, half the traffic: a row's HD columns fill the
 * first half of its place.
 *
 * The slices of one tile partition [0, a1), a1 being one past the tile's last absolute row; key0 is
 * a multiple of the path's key_step, and only the last slice goes past h. Between h and the
 * candidates' own groups lie keys that no row of the tile may see: skip them by tiles.
 *
 * What a block needs of the sequence is repeated here, so that one load tells all; the size is a
 * multiple of 16. */
struct hstu_work {
    uint32_t sequence, head;
    uint32_t row0;
    uint32_t key0, key1;
    uint16_t slice, slices;         /* which, of how many the tile has */
    uint32_t rows;                  /* 1 to tile_rows */
    uint32_t history, cached;       /* h, c */
    uint32_t row_start, page_start; /* the sequence's first query row; its first of `pages` */
    uint32_t next; /* of a unit's first item: the unit after it, or HSTU_WORK_LAST */
};
#define HSTU_WORK_LAST UINT32_MAX

/* Page ids of a sequence in a batch's list: of what it reads, or reads and appends to. */
static inline uint32_t hstu_pages_listed(const struct hstu_sequence *s, uint32_t page_tokens)
{
    return ((s->append ? s->history : s->cached) + page_tokens - 1) / page_tokens;
}

/* Fixed device addresses. Lengths are data: a graph is captured for `rows` only. */
struct hstu_device_batch {
    const uint32_t *row_start;    /* [batch + 1] first query row of a sequence */
    const uint32_t *history;      /* [batch] h */
    const uint32_t *cached;       /* [batch] c */
    const uint32_t *page_start;   /* [batch + 1] into pages */
    const uint32_t *pages;        /* page ids, hstu_pages_listed() a sequence */
    const uint32_t *row_sequence; /* [rows] sequence of a row, UINT32_MAX for padding */
    const uint8_t *slices; /* [rows] slices of the row to sum; 0: padding, or nobody wants it */
    const struct hstu_work *work;
    uint32_t work_room;           /* items that may be read there, whatever they hold */
    const uint32_t *work_count;   /* one word */
    const uint32_t *target_start; /* [batch + 1] first logit row of a sequence */
    uint32_t *next; /* [layers] 0 when a pass starts: launch l may draw its items from next[l] by
                       atomicAdd. Not NULL for the portable path. */
};

/* The units of a work list, decoded once a pass instead of by every layer's blocks, for a path
 * whose units have two items: per unit and block what it does (struct item in
 * attention_sm90_item.cuh). hstu_launch_prepare() makes them. */
struct hstu_units_args {
    struct hstu_device_batch batch;
    uint32_t page_tokens, rows;
    uint32_t group;   /* g, or INT32_MAX: no sequence has more candidates */
    uint32_t workers; /* pairs of blocks: each finds a unit, an empty one where the list is short */
    bool rounded;     /* as in struct hstu_attention_args */
    void *units;      /* out, hstu_units_bytes(); NULL: none are needed */
};
#define HSTU_UNIT_BYTES 288

/* Who walks a work list: blocks, or pairs of them where units have two items. */
static inline uint32_t hstu_workers(uint32_t unit_items, uint32_t sm_count)
{
    return sm_count > unit_items ? sm_count / unit_items : 1;
}

/* Of the units of a list of at most `items`, or as many as there are workers. */
static inline uint64_t hstu_units_bytes(uint32_t items, uint32_t sm_count)
{
    return ((uint64_t)items / 2 + sm_count) * HSTU_UNIT_BYTES;
}

/* Everything an attention launch needs. Activations m [rows][4*H*D] bf16, post-SiLU, in flat order
 * u|v|q|k. */
struct hstu_attention_args {
    struct skv_geometry geometry;
    uint32_t layer;
    uint32_t rows;   /* of the graph, padding included */
    uint32_t group;  /* g */
    float inverse_n; /* 1 / N, applied once, to the sum of slices, by the kernel that sums them */
    const void *m;
    const void *pool; /* page 0; may be NULL when no sequence has cached tokens */
    uint64_t pool_pages;
    struct hstu_device_batch batch;
    const void *units;   /* of batch.work, where units have two items */
    float *partial;      /* out, [slices][rows][H*D] fp32, or bf16 in half of it, before the
                            division by N */
    uint32_t max_slices; /* planes of partial */
    bool rounded;        /* sums of tiles of one slice are bf16 */
    uint32_t sm_count;
    /* May start before the kernel before it ends, where the path can: that kernel then lets its
     * dependents start no sooner than everything before it has ended. */
    bool early;
    bool spares_l2; /* what it reads leaves the L2 first */
};

struct hstu_attention_path {
    const char *name;
    /* Query rows of a work item (the tile) for a head dim, and the key granularity of a slice, a
     * power of two. */
    uint32_t (*tile_rows)(uint32_t head_dim);
    uint32_t key_step;
    /* Items of a unit: 1, or 2 where two blocks work side by side, on items 2u and 2u + 1. Who
     * takes units one by one may draw them in the order of the list; pairs of blocks, of which
     * there are hstu_workers(), follow `next`, pair w from unit w on. */
    uint32_t unit_items;
    bool rounds; /* sums of tiles of one slice to bf16 in every graph, not only where there is one
                    plane */
    /* In graphs of up to so many rows tiles may have half as many rows, all of a sequence's: they
     * are more, and end sooner. Where units have two items. */
    uint32_t halved_rows;
    /* Enqueues attention of args->layer on the stream (a cudaStream_t): a persistent grid that
     * walks the work list. Called while the stream is being captured. SKV_EDEVICE, SKV_ENOTSUP,
     * logged. */
    int (*launch)(const struct hstu_attention_args *args, void *stream);
};

/* What launch() finds at args->units, made of the rest of args. */
static inline struct hstu_units_args hstu_units_of(const struct hstu_attention_args *args,
                                                   void *units)
{
    return (struct hstu_units_args){
        .batch = args->batch,
        .page_tokens = args->geometry.page_tokens,
        .rows = args->rows,
        .group = args->group < INT32_MAX ? args->group : INT32_MAX,
        .workers = hstu_workers(2, args->sm_count),
        .rounded = args->rounded,
        .units = units,
    };
}

/* args.rounded for a graph of so many planes. */
static inline bool hstu_sums_rounded(const struct hstu_attention_path *path, uint32_t max_slices)
{
    return path->rounds || max_slices == 1;
}
extern const struct hstu_attention_path hstu_attention_portable;
extern const struct hstu_attention_path hstu_attention_sm90;

/* What a work list is for. */
struct hstu_plan_args {
    const struct hstu_attention_path *path;
    const struct skv_geometry *geometry;
    uint32_t group; /* g */
    uint32_t rows;  /* of the graph */
    uint32_t sm_count, max_slices;
    const struct hstu_sequence *sequences;
    uint32_t count;
    /* Only tiles that have candidates, for the last layer: nobody reads what history rows come to
     * there. */
    bool candidates_only;
};

/* The work list of a batch, longest units first, in large graphs a few sequences at a time;
 * deterministic. The split of a sequence depends only on `rows` (the graph size), the path,
 * sm_count and this sequence's own c, n and T, so that batch mates never change a bit; they may
 * change which items share a unit, and the order. Writes slices per row too, 0 for padding and for
 * rows of no tile. *items: how many there are; where units have two and there is an odd number of
 * them, one unit's second is a hole: an item of no rows, which counts. False: `capacity` is too
 * small. */
bool hstu_plan(const struct hstu_plan_args *args, struct hstu_work *work, uint32_t capacity,
               uint8_t *row_slices, uint32_t *items);

/* Planes of partial sums that a graph of `rows` rows has: many for small batches, which need the
 * split, one for large ones. */
uint32_t hstu_plan_slices(uint32_t rows);

/* Items, a hole included, that a plan of `rows` rows in at most `batch` sequences can have. */
uint32_t hstu_plan_capacity(const struct hstu_attention_path *path,
                            const struct skv_geometry *geometry, uint32_t rows, uint32_t batch);

#ifdef __cplusplus
}
#endif
#endif
