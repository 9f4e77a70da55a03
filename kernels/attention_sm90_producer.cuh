/* The producers of an attention block (attention_sm90.cu): a warp for each slot of a tile, whose
 * lanes issue TMA's boxes side by side. They wait for slots that are empty and for the kernel
 * before; they never look at what they bring. */
#ifndef HSTU_ATTENTION_SM90_PRODUCER_CUH
#define HSTU_ATTENTION_SM90_PRODUCER_CUH

#include "attention_sm90_ring.cuh"

#include "mma.cuh"

namespace sm90
{

template <int D> constexpr uint32_t PRODUCERS = 2 * config<D>::KV_SLOTS;
static_assert(PRODUCERS<256> <= 4, "there is one warpgroup");
/* A barrier's parity tells one phase from the next, not from the one after that. When a producer
 * waits for what its slot had last, what the slot had before is gone: for the tile before it has
 * waited for something later, and a warp's arrivals come in the order of its releases. */
template <int D> constexpr bool PARITY_TELLS = config<D>::SLOTS >= (int)PRODUCERS<D>;
static_assert(PARITY_TELLS<256> && PARITY_TELLS<128> && PARITY_TELLS<64>);
constexpr uint32_t V_PRODUCERS = 5; /* a named barrier; consumers have 1 to 4 */

/* The ids of 32 consecutive pages of a sequence, one a lane. */
struct page_window {
    int32_t base; /* the page in lane 0 */
    uint32_t id;
};

/* This block's part of a unit, 16 bytes a lane; behind the last unit zeros: no steps. Past the L1:
 * nothing has been waited for yet when the first one is asked for. (Page ids are older still: the
 * kernels before have waited for the one that brought them.) */
__device__ __forceinline__ uint4 ask(const struct parameters &p, uint32_t unit)
{
    const uint4 *part = p.units + ((uint64_t)unit * 2 + cluster_rank()) * ITEM_CHUNKS;
    uint4 chunk = {};
    if (unit != HSTU_WORK_LAST)
        chunk = __ldcg(part + min(threadIdx.x % 32, ITEM_CHUNKS - 1));
    return chunk;
}

template <int D> struct producer {
    static constexpr uint32_t KV_SLOTS = config<D>::KV_SLOTS;

    const struct parameters &p;
    struct layout<D> at;
    uint32_t which, lane; /* which: of a tile's slots it fills */
    struct cursor<D> ring;
    bool waited; /* for the kernel before */

    __device__ __forceinline__ producer(const struct parameters &p_, const struct layout<D> &at_,
                                        uint32_t which_, uint32_t lane_)
        : p(p_), at(at_), which(which_), lane(lane_), ring{which_, 0}, waited(false)
    {
    }

    /* Before the first load from m. The units, the page ids and the pages' cached rows are older
     * than the kernel before. */
    __device__ __forceinline__ void wait_for_m()
    {
        if (waited)
            return;
        mma::dependency_wait();
        /* In this order: the gate's blocks, which come where ours have gone, rely on m at once.
         * Once a block is enough: by V's first producer, which waits in any item's first tile. */
        if (which == KV_SLOTS)
            mma::dependency_trigger();
        waited = true;
    }

    /* Until both blocks' consumers have done with what the next slot had. */
    __device__ __forceinline__ void wait_slot()
    {
        barrier_wait(at.empty(ring.slot), ring.parity ^ 1);
    }

    /* Waits for the next slot and announces its bytes. */
    __device__ __forceinline__ void open_slot(uint32_t bytes)
    {
        wait_slot();
        if (lane == 0)
            barrier_arrive_expect(at.full(ring.slot), bytes);
        __syncwarp();
    }

    /* Into a part of the open slot. In a joined unit the blocks take the parts in turn (where a
     * slot is one part, one block has K and the other V), each for both: a slot is empty only when
     * both blocks' consumers have said so. */
    __device__ __forceinline__ void load(uint32_t to, uint32_t part, const CUtensorMap *map,
                                         uint32_t row, uint32_t chunk, bool joined)
    {
        const uint32_t turn = config<D>::PARTS == 1 ? ring.slot : part;
        if (!joined)
            load_box(to, map, row, chunk, at.full(ring.slot), p.policy);
        else if (turn % 2 == cluster_rank())
            load_box_both(to, map, row, chunk, at.full(ring.slot), p.policy);
    }

    /* Row of the pool's map where key `key` of this layer's K (kv 0) or V (kv 1) lies. Whole warp.
     */
    __device__ __forceinline__ uint32_t pool_row(const struct page_window &window, int32_t key,
                                                 uint32_t kv, uint32_t head)
    {
        uint32_t page = __shfl_sync(~0u, window.id, (key >> p.page_shift) - window.base);
        uint32_t plane = ((page * p.layers + p.layer) * 2 + kv) * p.heads + head;
        return (plane << p.page_shift) + (key & ((1 << p.page_shift) - 1));
    }

    /* A slot of a tile's K: 64 dims a part. */
    __device__ __forceinline__ void load_k(const struct item *it, const struct tile &tile,
                                           const struct page_window &window, uint32_t slot)
    {
        constexpr uint32_t PARTS = config<D>::PARTS;
        bool paged = tile.kind == 0;
        int32_t shift = paged ? p.pool.k_shift : HALF_SHIFT, rows = 1 << shift;
        int32_t count = (max(tile.end - tile.start, 0) + rows - 1) >> shift;
        open_slot(count * rows * ROW_BYTES * PARTS);
        int32_t key = tile.start + min((int32_t)lane, count - 1) * rows;
        uint32_t row = paged ? pool_row(window, key, 0, it->work.head) : key + it->to_row;
        uint32_t column = paged ? 0 : (3 * p.heads + it->work.head) * config<D>::CHUNKS;
        const CUtensorMap *map = paged ? &p.pool_k : &p.m_k;
        if ((int32_t)lane < count)
#pragma unroll
            for (uint32_t part = 0; part < PARTS; part++)
                load(at.part(ring, part) + lane * rows * ROW_BYTES, part, map, row,
                     column + slot * PARTS + part, it->joined);
        __syncwarp();
    }

    /* A slot of a tile's V: V_KEYS keys a part, all dims. */
    __device__ __forceinline__ void load_v(const struct item *it, const struct tile &tile,
                                           const struct page_window &window, uint32_t slot)
    {
        constexpr int32_t V_KEYS = config<D>::V_KEYS, CHUNKS = config<D>::CHUNKS;
        constexpr int32_t PARTS = config<D>::PARTS;
        bool paged = tile.kind == 0;
        bool whole = !paged || p.pool.v_whole; /* a box has all chunks of its rows */
        const CUtensorMap *map = paged ? &p.pool_v : &p.m_v;
        int32_t shift = paged ? p.pool.v_shift : V_KEYS == 32 ? 5 : HALF_SHIFT, rows = 1 << shift;
        int32_t start = tile.start + slot * PARTS * V_KEYS, boxes = 0, count[PARTS];
#pragma unroll
        for (int32_t part = 0; part < PARTS; part++) {
            int32_t valid = min(max(tile.end - start - part * V_KEYS, 0), V_KEYS);
            count[part] = (valid + rows - 1) >> shift;
            boxes += count[part];
        }
        open_slot(boxes * rows * CHUNKS * ROW_BYTES);
#pragma unroll
        for (int32_t part = 0; part < PARTS; part++, start += V_KEYS) {
            int32_t all = whole ? count[part] : count[part] * CHUNKS;
            int32_t box = max(min((int32_t)lane, all - 1), 0);
            int32_t down = (whole ? box : box / CHUNKS) * rows, chunk = whole ? 0 : box % CHUNKS;
            uint32_t column = paged ? 0 : (p.heads + it->work.head) * CHUNKS;
            /* An empty part's key may lie past the window: any lane's page will do. */
            uint32_t row = paged ? pool_row(window, start + down, 1, it->work.head)
                                 : start + down + it->to_row;
            if ((int32_t)lane < all)
                load(at.part(ring, part) + (chunk * V_KEYS + down) * ROW_BYTES, part, map, row,
                     column + chunk, it->joined);
            __syncwarp();
        }
    }

    __device__ __forceinline__ void load_q(const struct item *it, uint32_t use)
    {
#pragma unroll 1
        for (int g = 0; g < WARPGROUPS; g++) {
            uint32_t full = shared_address(&at.control->q_full[g]);
            barrier_wait(shared_address(&at.control->q_empty[g]), (use & 1) ^ 1);
            if (lane != 0)
                continue;
            int32_t row = it->group_row[g];
            bool any = row < (int32_t)it->work.rows;
            barrier_arrive_expect(full, any ? config<D>::Q_BYTES : 0);
            if (any)
                load_box(at.q + g * config<D>::Q_BYTES, &p.m_q, it->row + row,
                         (2 * p.heads + it->work.head) * config<D>::CHUNKS, full, p.policy);
        }
        __syncwarp();
    }

    /* Item n, and in the first producer what `next` asked for becomes it. */
    __device__ __forceinline__ const struct item *take(uint32_t n, uint4 next)
    {
        struct item *it = &at.control->item[n & 1];
        const uint32_t full = shared_address(&at.control->item_full[n & 1]);
        if (which > 0) {
            barrier_wait(full, n >> 1 & 1);
            return it;
        }
        barrier_wait(shared_address(&at.control->item_empty[n & 1]), (n >> 1 & 1) ^ 1);
        if (lane < ITEM_CHUNKS)
            reinterpret_cast<uint4 *>(it)[lane] = next;
        __syncwarp();
        if (lane == 0) /* releases the item to the others; syncwarp does to our own lanes */
            barrier_arrive(full);
        __syncwarp();
        return it;
    }

    __device__ __forceinline__ void run(uint4 next)
    {
        for (uint32_t n = 0;; n++) {
            const struct item *it = take(n, next);
            if (it->steps == 0)
                break;
            struct page_window window = {-32, 0};
#pragma unroll 1
            for (int32_t t = 0; t < it->steps; t++) {
                struct tile tile = tile_at(it, t);
                int32_t page = tile.start >> p.page_shift;
                if (tile.kind == 0 && ((tile.end - 1) >> p.page_shift) >= window.base + 32) {
                    window.base = page;
                    window.id = it->page[min(page + (int32_t)lane, it->pages - 1)];
                }
                const bool is_k = which < KV_SLOTS;
                /* K of pages need not wait for m. (V before m is slower: what comes early is taken
                 * from UVQK.) */
                if (tile.kind != 0 || !is_k)
                    wait_for_m();
                /* V comes behind q, which is needed first: that is faster, no more. */
                if (t == 0 && !is_k) {
                    if (which == KV_SLOTS)
                        load_q(it, n);
                    if (KV_SLOTS > 1)
                        named_sync(V_PRODUCERS, 32 * KV_SLOTS);
                }
                if (is_k)
                    load_k(it, tile, window, which);
                else
                    load_v(it, tile, window, which - KV_SLOTS);
                ring.advance(2 * KV_SLOTS);
                if (which == 0 && t == 0)
                    next = ask(p, it->work.next); /* while the consumers are busy */
            }
            __syncwarp();
            if (which > 0 && lane == 0)
                barrier_arrive(shared_address(&at.control->item_empty[n & 1]));
        }
        wait_for_m(); /* the grid ends after the one before it, whatever there was to do */
        if (which > 0)
            return;
        /* Until all that was ever loaded is read: the other block arrives here no more then. */
        for (int i = 0; i < config<D>::SLOTS; i++, ring.advance(1))
            wait_slot();
    }
};

} // namespace sm90

#endif
