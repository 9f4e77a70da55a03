/* What a pair of blocks works on, for attention_sm90.cu: shapes that follow from the head dim, work
 * items cut into tiles of keys, and units of two items.
 *
 * A unit is items 2u and 2u + 1 of the work list; the two blocks of a cluster always work on one
 * unit and walk it in step. When the two items are neighbouring row tiles of one head over the same
 * keys, the unit is *joined*: each K and V tile is read once and sent to both blocks, and the rows
 * are dealt out by warpgroups so that the causal edge costs both blocks the same. Otherwise each
 * block has its own item and loads for itself; the shorter one is padded with tiles that nobody
 * needs. Halved tiles, in small graphs, keep one warpgroup of a block at work.
 *
 * An item's keys are three spans: the prefix (tiles start at a page box), the in-flight history,
 * and the candidates' own keys; a tile of 128 keys never straddles two.
 *
 * What each block does of each unit is worked out once a pass (hstu_launch_prepare()), from the
 * work list; every layer's blocks only read it. */
#ifndef HSTU_ATTENTION_SM90_ITEM_CUH
#define HSTU_ATTENTION_SM90_ITEM_CUH

#include "cuda_pass.h"

#include "sm90_ptx.cuh"

namespace sm90
{

constexpr int KEYS = 128; /* of a tile */
constexpr int HALF = 64, HALF_SHIFT = 6;
constexpr uint32_t ROW_BYTES = 128; /* 64 bf16: a row of a swizzled tile */
constexpr uint32_t PART_BYTES = KEYS * ROW_BYTES;
constexpr uint32_t SHARED_MAX = 232448; /* 227 KiB, what a block may have */
constexpr int WARPGROUPS = 2;           /* consumers of a block, 64 query rows each */
constexpr int ROWS = 64 * WARPGROUPS;   /* of an item */
constexpr int THREADS = 128 * (WARPGROUPS + 1);
/* Registers a thread, multiples of 8. The launch gives all three warpgroups 168; setmaxnreg moves
 * the producers' to the consumers: 40 + 2 * 232 = 3 * 168. */
constexpr uint32_t PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

/* What follows from the head dim. */
template <int D> struct config {
    static constexpr int CHUNKS = D / 64;           /* parts of K, and of V, a tile */
    static constexpr int V_KEYS = KEYS / CHUNKS;    /* keys of a part of V */
    static constexpr int PARTS = D == 64 ? 1 : 2;   /* of a slot */
    static constexpr int KV_SLOTS = CHUNKS / PARTS; /* of K, and of V, a tile */
    static constexpr uint32_t SLOT_BYTES = PARTS * PART_BYTES;
    /* Of one part each: even, as the blocks of a pair load them in turn. */
    static constexpr int SLOTS = D == 64 ? 12 : 5;
    static constexpr uint32_t Q_BYTES = 64 * D * 2; /* of one warpgroup */
};

struct span {
    int32_t start, end; /* absolute key positions; the first tile starts at start */
};

/* A block's part of a unit. */
struct item {
    alignas(16) struct hstu_work work; /* of a joined unit: rows of both, the keys of the longer */
    int32_t group;                     /* g */
    struct span span[3];               /* prefix, in-flight history, candidates */
    int32_t tiles[3];                  /* how many tiles up to and with this span */
    int32_t steps;                     /* tiles of the unit; 0: no unit, the list is done */
    int32_t joined;
    int32_t group_row[WARPGROUPS];  /* where each warpgroup's 64 rows begin, from the first row */
    uint32_t group_out[WARPGROUPS]; /* of that row: slice * rows + row */
    bool group_rounded[WARPGROUPS]; /* its sums, to bf16 */
    uint32_t row;                   /* of m: the first query row */
    int32_t to_row;                 /* row of m of key t: t + to_row */
    const uint32_t *page;           /* the sequence's page ids */
    int32_t pages;                  /* how many */
};
constexpr uint32_t ITEM_CHUNKS = sizeof(struct item) / 16;
static_assert(2 * sizeof(struct item) == HSTU_UNIT_BYTES);

/* Boxes of the pool may not cross a page, nor half a tile; a V box holds all chunks at once when it
 * fills its part. */
struct boxes {
    uint32_t k_shift, v_shift; /* log2 of rows */
    bool v_whole;
};

struct parameters {
    CUtensorMap m_q, m_k, m_v, pool_k, pool_v;
    const uint4 *units; /* [unit][block][ITEM_CHUNKS] */
    float *partial;
    uint64_t policy; /* of every load */
    uint32_t heads, layer, layers;
    uint32_t page_shift; /* log2 S */
    struct boxes pool;
};

__device__ __forceinline__ int32_t tiles_of(struct span s)
{
    return s.end > s.start ? (s.end - s.start + KEYS - 1) / KEYS : 0;
}

__device__ __forceinline__ int32_t first_position(const struct item *it)
{
    return (int32_t)(it->work.cached + it->work.row0);
}

/* The first key of the group of the candidate at this position, or of the first one. */
__device__ __forceinline__ int32_t candidates_from(const struct item *it, int32_t position)
{
    int32_t history = it->work.history;
    return history + max(position - history, 0) / it->group * it->group;
}

/* ---- units, from the work list: hstu_launch_prepare() ---- */

/* Cuts the keys of it->work into spans of tiles. */
__device__ __forceinline__ void cut(struct item *it, const struct hstu_units_args &a)
{
    int32_t first = first_position(it), after = first + it->work.rows, history = it->work.history;
    int32_t key0 = it->work.key0, key1 = it->work.key1, cached = it->work.cached;
    int32_t seen = min(min(history, after), key1); /* end of the history that its rows see */
    int32_t box = min(a.page_tokens, HALF);        /* rows of the pool's boxes of K */
    struct span prefix = {key0 & -box, min(cached, seen)};
    struct span flight = {max(key0, cached), seen};
    struct span own = {0, 0};
    if (after > history) { /* from the first candidate's group on */
        int32_t start = max(first - history, 0);
        if (it->group > 1) /* one lane alone: a division is slow */
            start = start / it->group * it->group;
        /* One wgmma sums sixteen keys. Count the sixteens from h, whoever shares the tile, so that
         * joining items does not change a bit; a single key is the same anywhere among zeros. */
        own.start = max(history + (it->group > 1 ? start & ~15 : start), key0);
        own.end = min(after, key1);
    }
    it->span[0] = prefix;
    it->span[1] = flight;
    it->span[2] = own;
    it->tiles[0] = key0 < prefix.end ? tiles_of(prefix) : 0;
    it->tiles[1] = it->tiles[0] + tiles_of(flight);
    /* An item without keys still writes zeros: one tile that nobody needs. */
    it->tiles[2] = max(it->tiles[1] + tiles_of(own), 1);
}

/* An item of the work list, or an empty one past its end; one of no rows is a hole that evens out
 * the pairs. */
__device__ __forceinline__ void read_item(struct item *it, const struct hstu_units_args &a,
                                          const struct hstu_work &work, bool listed)
{
    *it = {};
    it->group = a.group;
    it->work.next = HSTU_WORK_LAST;
    if (!listed)
        return;
    it->work = work;
    if (it->work.rows == 0)
        return;
    int32_t cached = it->work.cached;
    it->row = it->work.row_start + it->work.row0;
    it->to_row = (int32_t)it->work.row_start - cached;
    it->page = a.batch.pages + it->work.page_start;
    it->pages = (cached + a.page_tokens - 1) / a.page_tokens;
    cut(it, a);
}

/* May the two share their tiles? Neighbouring rows of one head over the same keys, whole or halved
 * tiles; the first may stop earlier only where the mask stops it. Candidates' own keys are nobody
 * else's: where both have some, the unit walks more tiles than either alone, which only long items
 * make good. */
__device__ __forceinline__ bool joins(const struct item *a, const struct item *b)
{
    const struct hstu_work &x = a->work, &y = b->work;
    const struct span &own = b->span[2];
    bool both = a->span[2].end > a->span[2].start;
    int32_t more = both ? tiles_of({a->span[2].start, own.end}) - tiles_of(own) : 0;
    return (x.rows == ROWS || x.rows == ROWS / 2) && y.rows > 0 && x.sequence == y.sequence &&
           x.head == y.head && y.row0 == x.row0 + x.rows && x.key0 == y.key0 &&
           (x.key1 == y.key1 ||
            (x.key1 < y.key1 && x.key1 == (uint32_t)first_position(a) + x.rows)) &&
           more * 8 <= b->tiles[1];
}

/* Block `rank`'s part of the unit of two items. */
__device__ __forceinline__ void make_part(struct item *it, const struct item *a,
                                          const struct item *b, uint32_t rank,
                                          const struct hstu_units_args &args)
{
    bool joined = joins(a, b);
    const struct item *mine = joined || rank == 0 ? a : b;
    *it = *mine;
    it->work.next = a->work.next; /* the unit's, not the item's */
    it->joined = joined;
    it->steps = max(a->tiles[2], b->tiles[2]);
    if (joined) {
        it->work.rows = a->work.rows + b->work.rows;
        it->work.key1 = b->work.key1;
        cut(it, args);
        it->steps = it->tiles[2];
    }
    /* Of four warpgroups' rows, one block has the outer two, the other the inner two. Halved: a
     * block the first 64, the other the rest. */
    const int32_t rows = joined ? (int32_t)a->work.rows : ROWS;
    for (int g = 0; g < WARPGROUPS; g++) {
        int32_t row = 64 * g;
        if (joined)
            row = rows == ROWS ? 64 * (rank == 0 ? 3 * g : 1 + g) : 64 * rank + 128 * g;
        it->group_row[g] = row;
        const struct item *of = row >= rows ? b : mine;
        it->group_out[g] = of->work.slice * args.rows + of->row + row % rows;
        it->group_rounded[g] = args.rounded && of->work.slices == 1;
    }
}

/* Tile t of an item: its first key, one past its last valid key, and which span. */
struct tile {
    int32_t start, end;
    int32_t kind;
};

__device__ __forceinline__ struct tile tile_at(const struct item *it, int32_t t)
{
    struct tile tile;
    tile.kind = t < it->tiles[0] ? 0 : t < it->tiles[1] ? 1 : 2;
    int32_t before = tile.kind == 0 ? 0 : it->tiles[tile.kind - 1];
    tile.start = it->span[tile.kind].start + (t - before) * KEYS;
    tile.end = min(it->span[tile.kind].end, tile.start + KEYS);
    if (t >= it->tiles[2])
        tile.end = tile.start = 0; /* padding of an unjoined unit */
    return tile;
}

/* A tile as 64 rows see it, relative to the tile's start. */
struct view {
    int32_t from, to; /* keys that some row of ours may see; to <= from: none */
    int32_t valid;    /* keys from here on are not ours: stale or somebody else's */
    bool masked;      /* not every row sees every key of the tile */
};

/* `first`: absolute position of the first of the `rows` rows. */
__device__ __forceinline__ struct view look(const struct item *it, const struct tile &tile,
                                            int32_t first, int32_t rows)
{
    struct view v;
    int32_t low = it->work.key0, after = first + rows;
    v.valid = tile.end - tile.start;
    v.masked = true;
    if (tile.kind == 2)
        low = max(low, candidates_from(it, first));
    v.from = max(low - tile.start, 0);
    v.to = rows > 0 ? min(tile.end, after) - tile.start : 0;
    if (tile.kind < 2)
        v.masked = v.from > 0 || v.valid < KEYS || first < tile.start + KEYS - 1;
    return v;
}

/* Of a tile that rows from position `first` on see whole: how many such there are from it on,
 * itself included, in its span. */
__device__ __forceinline__ int32_t whole_tiles(const struct item *it, const struct tile &tile,
                                               int32_t first)
{
    return min(it->span[tile.kind].end - tile.start, first + 1 - tile.start) / KEYS;
}

/* Two rows a thread, eight apart: the keys that each may see are [low, low + count), relative to
 * the tile. */
struct row_mask {
    int32_t low[2];
    uint32_t count[2];
};

__device__ __forceinline__ struct row_mask mask_of(const struct item *it, const struct tile &tile,
                                                   int32_t first_row)
{
    struct row_mask mask;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int32_t position = first_row + i * 8;
        int32_t low = it->work.key0, high = min(tile.end, position + 1);
        if (tile.kind == 2) {
            low = max(low, candidates_from(it, position));
            if (position < (int32_t)it->work.history)
                high = low;
        }
        mask.low[i] = low - tile.start;
        mask.count[i] = max(high - low, 0);
    }
    return mask;
}

} // namespace sm90

#endif
