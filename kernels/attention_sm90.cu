/* HSTU attention for Hopper (compute capability 9.0): wgmma on tiles that TMA brings, K and V of
 * the prefix straight from the cache's pages, of the in-flight rows from m. The contract is struct
 * hstu_attention_path in cuda_pass.h and the mask in layers.h.
 *
 * One block an SM, persistent; clusters of two blocks walk the work list two items at a time
 * (attention_sm90_item.cuh). A block is a few producer warps and two consumer warpgroups of 64
 * query rows each:
 *
 *   producers  keep a ring of slots full: 128 keys of K as D/64 parts [128 keys][64 dims], then of
 *              V as D/64 parts [D/64 chunks][128 * 64/D keys][64 dims], then the next 128 keys; two
 *              parts a slot, or D/64. Each has its own slot of every tile: one alone, which takes
 *              1,000 cycles a slot, would be slower than the products. The first one brings items
 *              to shared memory, the first one of V brings q
 *   consumer   s = q k^T (both from shared memory), p = SiLU(s / sqrt(D)) to bf16 in registers,
 *              o += p v (p as the register operand). o stays in registers for the whole item
 *
 * The warpgroups take turns at the tensor cores, one product each: while one computes SiLU, the
 * other multiplies (struct turns). SiLU needs no row statistics, so that is all: no rescaling, and
 * slices of the key range simply add in the kernel that reads the partial sums.
 *
 * Masks. Within a tile the keys that a row may see are always one interval, so a mask is one
 * unsigned comparison, and only tiles at an edge pay for it. A warpgroup that needs only one half
 * of a tile's keys multiplies only that half. K rows that are not ours may hold anything: p is
 * selected, not multiplied. V rows that are not ours are zeroed in shared memory before the
 * product, since 0 * NaN is NaN.
 *
 * Cost, of an item of r rows and k keys: 4 r k D flops on the tensor cores, r k tanh on the MUFU;
 * bytes: 4 k D of K and V, 2 r D of q, 4 r D of output. A joined pair of items reads K and V once
 * for 256 rows, 256 flops a byte: 2.5 TB/s from the L2 at 640 TFLOP/s. */
#include "attention_sm90_item.cuh"

#include <cuda_runtime.h>

#include "mma.cuh"
#include "tensor_map.cuh"

using namespace sm90;

namespace
{

/* In shared memory, behind Q and the ring. */
template <int D> struct control {
    uint64_t full[config<D>::SLOTS];  /* producers' TMA -> consumers of this block */
    uint64_t empty[config<D>::SLOTS]; /* consumer warps of both blocks -> next use's producer */
    uint64_t q_full[WARPGROUPS];      /* TMA -> that warpgroup */
    uint64_t q_empty[WARPGROUPS];     /* its warps -> first producer of V */
    uint64_t item_full[2];            /* first producer -> consumer warps, other producers */
    uint64_t item_empty[2];           /* they -> first producer */
    struct item item[2];
};

template <int D> constexpr uint32_t shared_bytes()
{
    /* The base is aligned by hand: nobody promises dynamic shared memory 1 KiB. */
    return 1024 + WARPGROUPS * config<D>::Q_BYTES + config<D>::SLOTS * config<D>::SLOT_BYTES +
           sizeof(struct control<D>);
}
static_assert(shared_bytes<256>() <= SHARED_MAX && shared_bytes<128>() <= SHARED_MAX &&
              shared_bytes<64>() <= SHARED_MAX);

/* Where in the ring: slot, and the parity of its use. */
template <int D> struct cursor {
    uint32_t slot, parity;
    __device__ __forceinline__ void advance(uint32_t count)
    {
        slot += count;
        if (slot >= config<D>::SLOTS) {
            slot -= config<D>::SLOTS;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ cursor at(uint32_t count) const
    {
        cursor r = *this;
        r.advance(count);
        return r;
    }
};

/* Shared addresses. */
template <int D> struct layout {
    uint32_t q, slots;
    struct control<D> *control;

    /* Part `part` of what begins with the slot at the cursor. */
    __device__ __forceinline__ uint32_t part(const struct cursor<D> &from, uint32_t part) const
    {
        constexpr int PARTS = config<D>::PARTS;
        return slots + from.at(part / PARTS).slot * config<D>::SLOT_BYTES +
               part % PARTS * PART_BYTES;
    }
    __device__ __forceinline__ uint32_t full(uint32_t i) const
    {
        return shared_address(&control->full[i]);
    }
    __device__ __forceinline__ uint32_t empty(uint32_t i) const
    {
        return shared_address(&control->empty[i]);
    }
};

/* ---- producers: a warp for each slot of a tile; lanes issue boxes side by side ---- */

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

/* ---- consumers ---- */

/* Named barriers 1 and 2 hand the tensor cores round: a warpgroup syncs on its own and arrives at
 * the next one's. Before the first turn the last warpgroup arrives for the first, and after the
 * last turn the first one syncs once more, so that arrivals and syncs pair up. Barriers 3 and 4 are
 * a warpgroup's own. */
struct turns {
    uint32_t group;
    __device__ __forceinline__ void wait() const
    {
        named_sync(1 + group, 256);
    }
    __device__ __forceinline__ void pass() const
    {
        named_arrive(1 + (group + 1) % WARPGROUPS, 256);
    }
    __device__ __forceinline__ void sync_group() const
    {
        named_sync(1 + WARPGROUPS + group, 128);
    }
};

/* h + h tanh(h) with h = s / (2 sqrt(D)) is SiLU(s / sqrt(D)): one MUFU instruction. */
template <int D> __device__ __forceinline__ float silu(float s)
{
    constexpr float HALF_SCALE = D == 256 ? 0.5f / 16 : D == 64 ? 0.5f / 8 : 0.5f * 0.08838834764f;
    float h = s * HALF_SCALE, t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(h));
    return fmaf(h, t, h);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

/* The same in every lane, and known to the compiler to be: it serializes wgmmas whose control flow
 * could diverge. */
__device__ __forceinline__ int32_t uniform(int32_t x)
{
    return __shfl_sync(~0u, x, 0);
}

__device__ __forceinline__ void store_pair(void *to, uint32_t x, uint32_t y, bool valid)
{
    asm volatile("{\n\t"
                 ".reg .pred valid;\n\t"
                 "setp.ne.b32 valid, %3, 0;\n\t"
                 "@valid st.global.v2.b32 [%0], {%1, %2};\n\t"
                 "}" ::"l"(to),
                 "r"(x), "r"(y), "r"((int)valid)
                 : "memory");
}

__device__ __forceinline__ void store_four(float *to, float a, float b, float c, float d,
                                           bool valid)
{
    asm volatile("{\n\t"
                 ".reg .pred valid;\n\t"
                 "setp.ne.b32 valid, %5, 0;\n\t"
                 "@valid st.global.v4.f32 [%0], {%1, %2, %3, %4};\n\t"
                 "}" ::"l"(to),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"((int)valid)
                 : "memory");
}

template <int D> struct consumer {
    static constexpr int KV_SLOTS = config<D>::KV_SLOTS;

    const struct parameters &p;
    struct layout<D> at;
    struct turns turn;
    uint32_t group, warp, lane; /* warp: in the group */
    uint32_t empty;             /* cluster address of empty[0] of the block of rank lane % 2 */
    struct cursor<D> ring;

    __device__ __forceinline__ consumer(const struct parameters &p_, const struct layout<D> &at_,
                                        uint32_t group_, uint32_t warp_, uint32_t lane_)
        : p(p_), at(at_), turn{group_}, group(group_), warp(warp_), lane(lane_),
          empty(address_in(at_.empty(0), lane_ % 2)), ring{0, 0}
    {
    }

    __device__ __forceinline__ void acquire(const struct cursor<D> &slot)
    {
        barrier_wait(at.full(slot.slot), slot.parity);
    }

    /* One arrival a warp, in both blocks: each warp's wgmmas have finished when its own wait says
     * so. */
    __device__ __forceinline__ void release(const struct cursor<D> &slot)
    {
        if (lane < 2)
            barrier_arrive_cluster(empty + slot.slot * sizeof(uint64_t));
    }

    /* Releases a tile's slots of K or V, each as soon as the wgmmas that read it have ended.
     * Commits: one a slot; or 1, and all slots go at the end. */
    template <int Commits>
    __device__ __forceinline__ void release_read(const struct cursor<D> &from)
    {
        static_assert(Commits == 1 || (Commits == 2 && KV_SLOTS == 2));
        if (Commits == 2) {
            wgmma_wait<1>();
            release(from);
        }
        wgmma_wait();
#pragma unroll
        for (int i = Commits - 1; i < KV_SLOTS; i++)
            release(from.at(i));
    }

    /* Absolute position of the first of this warpgroup's rows, and how many it has. */
    __device__ __forceinline__ int32_t position(const struct item *it) const
    {
        return first_position(it) + it->group_row[group];
    }

    __device__ __forceinline__ int32_t rows_of(const struct item *it) const
    {
        return max(min((int32_t)it->work.rows - it->group_row[group], 64), 0);
    }

    /* Stores the item's o, four lanes a sector of 32 bytes, and clears it. */
    __device__ __forceinline__ void store(float *o, const struct item *it)
    {
        const int32_t row = warp * 16 + lane / 4, below = rows_of(it) - row; /* valid rows */
        const uint32_t heads = p.heads, column = it->work.head * D;
        float *to = p.partial + (uint64_t)(it->group_out[group] + row) * heads * D;
        if (uniform(it->group_rounded[group])) {
            uint16_t *upper = reinterpret_cast<uint16_t *>(to) + column;
            upper += lane % 2 * 8 + lane % 4 / 2 * 4;
            uint16_t *lower = upper + 8 * heads * D * 2;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                store_rounded(upper + i * 16, o + i * 8, below > 0);
                store_rounded(lower + i * 16, o + i * 8 + 2, below > 8);
            }
        } else {
            float *upper = to + column + lane % 2 * 8 + lane % 4 / 2 * 4;
            float *lower = upper + 8 * heads * D;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                store_sums(upper + i * 16, o + i * 8, below > 0);
                store_sums(lower + i * 16, o + i * 8 + 2, below > 8);
            }
        }
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            o[i] = 0;
    }

    /* Neighbouring lanes swap halves of 16 columns, so that each has four in a row. */
    __device__ __forceinline__ void store_sums(float *to, const float *o, bool valid)
    {
        const bool odd = lane & 1;
        float x = __shfl_xor_sync(~0u, odd ? o[0] : o[4], 1);
        float y = __shfl_xor_sync(~0u, odd ? o[1] : o[5], 1);
        store_four(to, odd ? x : o[0], odd ? y : o[1], odd ? o[4] : x, odd ? o[5] : y, valid);
    }

    /* The same of bf16. */
    __device__ __forceinline__ void store_rounded(uint16_t *to, const float *o, bool valid)
    {
        const bool odd = lane & 1;
        uint32_t near = pack_bf16(o[0], o[1]), far = pack_bf16(o[4], o[5]);
        uint32_t other = __shfl_xor_sync(~0u, odd ? near : far, 1);
        store_pair(to, odd ? other : near, odd ? far : other, valid);
    }

    /* Zeroes V rows [from, to) of the tile, all dims. The whole warpgroup; each warpgroup for
     * itself, the same zeros. */
    __device__ __forceinline__ void zero_v(const struct cursor<D> &v, int32_t from, int32_t to)
    {
        constexpr int32_t UNITS = D / 8; /* of 16 bytes a row */
#pragma unroll 1
        for (int32_t i = from * UNITS + warp * 32 + lane; i < to * UNITS; i += 128) {
            int32_t key = i / UNITS, unit = i % UNITS;
            uint32_t row = unit / 8 * config<D>::V_KEYS + key % config<D>::V_KEYS;
            uint32_t address = at.part(v, key / config<D>::V_KEYS) + row * ROW_BYTES;
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address + unit % 8 * 16),
                         "r"(0)
                         : "memory");
        }
        /* Before our wgmmas read it, and before the next TMA into the slot. */
        async_proxy_fence();
        turn.sync_group();
    }

    /* p = SiLU(s) as the A operand of the second product: an accumulator's layout is an operand's.
     */
    template <int N, bool Masked>
    __device__ __forceinline__ void weigh(uint32_t *weights, const float *s, uint32_t half,
                                          const struct row_mask &mask)
    {
#pragma unroll
        for (int i = 0; i < N / 2; i += 2) {
            float x[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                x[j] = silu<D>(s[i + j]);
                if (Masked) {
                    int32_t key = half * HALF + i / 4 * 8 + lane % 4 * 2 + j, row = i / 2 % 2;
                    if ((uint32_t)(key - mask.low[row]) >= mask.count[row])
                        x[j] = 0;
                }
            }
            weights[i / 2] = pack_bf16(x[0], x[1]);
        }
    }

    /* One tile: keys [half * 64, half * 64 + N) of it. */
    template <int N, bool Masked>
    __device__ __forceinline__ void step(float *o, const struct item *it, const struct tile &tile,
                                         int32_t valid, uint32_t half, bool last)
    {
        constexpr int PARTS = config<D>::PARTS, V_KEYS = config<D>::V_KEYS;
        struct cursor<D> k = ring, v = ring.at(KV_SLOTS);
        float s[N / 2];
        acquire(k);
        turn.wait();
#pragma unroll
        for (int slot = 0; slot < KV_SLOTS; slot++) {
            if (slot > 0)
                acquire(k.at(slot));
            wgmma_fence();
#pragma unroll
            for (int c = slot * PARTS; c < (slot + 1) * PARTS; c++) {
                uint32_t a = at.q + group * config<D>::Q_BYTES + c * 64 * ROW_BYTES;
                uint32_t b = at.part(k, c) + half * HALF * ROW_BYTES;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    wgmma_shared<N>(s, descriptor_k_major(a + i * 32),
                                    descriptor_k_major(b + i * 32), c + i > 0);
            }
            wgmma_commit();
        }
        turn.pass();
        release_read<KV_SLOTS>(k);
        pin<N / 2>(s);
        if (last && lane == 0)
            barrier_arrive(shared_address(&at.control->q_empty[group]));

        uint32_t weights[N / 4];
        struct row_mask mask;
        if (Masked)
            mask = mask_of(it, tile, position(it) + warp * 16 + lane / 4);
        weigh<N, Masked>(weights, s, half, mask);

        /* All of V at once: ptxas has no registers to spare for a wait amid these products. */
#pragma unroll
        for (int slot = 0; slot < KV_SLOTS; slot++)
            acquire(v.at(slot));
        int32_t begin = half * HALF, end = begin + N;
        if (Masked && valid < end)
            zero_v(v, max(valid, begin), end);
        turn.wait();
        wgmma_fence();
        constexpr int COMMITS = N == KEYS ? KV_SLOTS : 1; /* half a tile is in one slot */
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
            uint32_t b = begin % V_KEYS * ROW_BYTES + i * 16 % V_KEYS * ROW_BYTES;
            b += at.part(v, begin / V_KEYS + i * 16 / V_KEYS);
            wgmma_registers<D>(o, weights + i * 4, descriptor_mn_major<V_KEYS * ROW_BYTES>(b));
            if ((i + 1) % (N / 16 / COMMITS) == 0)
                wgmma_commit();
        }
        turn.pass();
        release_read<COMMITS>(v);
        pin<N / 4>(weights);
        pin<D / 2>(o);
        ring.advance(2 * KV_SLOTS);
    }

    /* A tile that no row of ours sees: keep the turns and the ring going. */
    __device__ __forceinline__ void skip(bool last)
    {
        if (last && lane == 0)
            barrier_arrive(shared_address(&at.control->q_empty[group]));
#pragma unroll 1
        for (int i = 0; i < 2 * KV_SLOTS; i++) {
            const struct cursor<D> slot = ring.at(i);
            acquire(slot);
            if (i % KV_SLOTS == 0) { /* of K, of V */
                turn.wait();
                turn.pass();
            }
            release(slot);
        }
        ring.advance(2 * KV_SLOTS);
    }

    __device__ __forceinline__ void run()
    {
        float o[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            o[i] = 0;
        if (group + 1 == WARPGROUPS)
            turn.pass();
        for (uint32_t n = 0;; n++) {
            const struct item *it = &at.control->item[n & 1];
            barrier_wait(shared_address(&at.control->item_full[n & 1]), n >> 1 & 1);
            int32_t steps = uniform(it->steps);
            if (steps == 0)
                break;
            barrier_wait(shared_address(&at.control->q_full[group]), n & 1);
#pragma unroll 1
            for (int32_t t = 0; t < steps; t++) {
                struct tile tile = tile_at(it, t);
                struct view view = look(it, tile, position(it), rows_of(it));
                int32_t from = uniform(view.from), to = uniform(view.to);
                int32_t masked = uniform(view.masked);
                const bool last = t + 1 == steps;
                if (to <= from)
                    skip(last);
                else if (to <= HALF || from >= HALF)
                    step<HALF, true>(o, it, tile, view.valid, from >= HALF, last);
                else if (masked)
                    step<KEYS, true>(o, it, tile, view.valid, 0, last);
                else { /* at once all that are alike: decoding costs small head dims a tenth */
                    int32_t alike = uniform(whole_tiles(it, tile, position(it)));
                    t += alike - 1;
#pragma unroll 1
                    for (; alike > 0; alike--)
                        step<KEYS, false>(o, it, tile, KEYS, 0, alike == 1 && t + 1 == steps);
                }
            }
            store(o, it);
            __syncwarp();
            if (lane == 0)
                barrier_arrive(shared_address(&at.control->item_empty[n & 1]));
        }
        if (group == 0)
            turn.wait();
    }
};

template <int D>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    attention_kernel(const __grid_constant__ struct parameters p)
{
    extern __shared__ uint8_t memory[];
    struct layout<D> at;
    uint8_t *base = memory + (-shared_address(memory) & (ATOM_BYTES - 1));
    at.q = shared_address(base);
    at.slots = at.q + WARPGROUPS * config<D>::Q_BYTES;
    at.control = (struct control<D> *)(base + WARPGROUPS * config<D>::Q_BYTES +
                                       config<D>::SLOTS * config<D>::SLOT_BYTES);
    /* Every pair of blocks begins with the unit of its number. */
    const uint4 first = threadIdx.x < 32 ? ask(p, blockIdx.x / 2) : uint4{};
    if (threadIdx.x == 0) {
        struct control<D> *c = at.control;
#pragma unroll 1
        for (int i = 0; i < config<D>::SLOTS; i++) {
            barrier_init(shared_address(&c->full[i]), 1);
            barrier_init(shared_address(&c->empty[i]), 2 * 4 * WARPGROUPS);
        }
        for (int i = 0; i < WARPGROUPS; i++) {
            barrier_init(shared_address(&c->q_full[i]), 1);
            barrier_init(shared_address(&c->q_empty[i]), 4);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&c->item_full[i]), 1);
            barrier_init(shared_address(&c->item_empty[i]), 4 * WARPGROUPS + PRODUCERS<D> - 1);
        }
        barrier_init_fence();
        /* Their first use waits for nothing then, once m is there. */
        map_prefetch(&p.m_q);
        map_prefetch(&p.m_k);
        map_prefetch(&p.m_v);
    }
    __syncwarp();
    cluster_start();
    uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp < 4) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (warp < PRODUCERS<D>) {
            struct producer<D> producer(p, at, warp, lane);
            producer.run(first);
        }
    } else {
        registers_grow<CONSUMER_REGISTERS>();
        struct consumer<D> consumer(p, at, warp / 4 - 1, warp % 4, lane);
        consumer.run();
    }
}

/* ---- host ---- */

template <int D> int encode_maps(const struct hstu_attention_args *args, struct parameters *p)
{
    constexpr uint32_t CHUNKS = config<D>::CHUNKS, V_KEYS = config<D>::V_KEYS;
    const struct skv_geometry *g = &args->geometry;
    uint64_t wide = UINT64_C(4) * g->heads * D;
    uint32_t k_rows = g->page_tokens < HALF ? g->page_tokens : HALF;
    uint32_t pool_v_rows = k_rows < V_KEYS ? k_rows : V_KEYS;
    p->pool.k_shift = __builtin_ctz(k_rows);
    p->pool.v_shift = __builtin_ctz(pool_v_rows);
    p->pool.v_whole = pool_v_rows == V_KEYS;
    uint32_t v_rows = V_KEYS < HALF ? V_KEYS : HALF;
    int status = encode(&p->m_q, args->m, args->rows, wide, HALF, CHUNKS);
    status = status ? status : encode(&p->m_k, args->m, args->rows, wide, HALF, 1);
    status = status ? status : encode(&p->m_v, args->m, args->rows, wide, v_rows, CHUNKS);
    if (status || !args->pool || !args->pool_pages) {
        p->pool_k = p->m_k; /* never used: no sequence has a prefix */
        p->pool_v = p->m_v;
        return status;
    }
    uint64_t rows = args->pool_pages * g->layers * 2 * g->heads * g->page_tokens;
    if (rows > INT32_MAX) { /* TMA coordinates */
        skv_error("attention_sm90: the pool has %llu rows of K and V, more than 2^31",
                  (unsigned long long)rows);
        return SKV_ENOTSUP;
    }
    status = encode(&p->pool_k, args->pool, rows, D, k_rows, 1);
    return status
               ? status
               : encode(&p->pool_v, args->pool, rows, D, pool_v_rows, p->pool.v_whole ? CHUNKS : 1);
}

template <int D> int launch(const struct hstu_attention_args *args, cudaStream_t stream)
{
    struct parameters p = {};
    int status = encode_maps<D>(args, &p);
    if (status)
        return status;
    p.units = (const uint4 *)args->units;
    p.partial = args->partial;
    p.policy = args->spares_l2 ? L2_FIRST_OUT : L2_USUAL;
    p.heads = args->geometry.heads;
    p.layer = args->layer;
    p.layers = args->geometry.layers;
    p.page_shift = __builtin_ctz(args->geometry.page_tokens);
    cudaLaunchAttribute attribute = mma::early_start();
    cudaLaunchConfig_t grid = {};
    grid.gridDim = dim3(hstu_workers(2, args->sm_count) * 2);
    grid.blockDim = dim3(THREADS);
    grid.dynamicSmemBytes = shared_bytes<D>();
    grid.stream = stream;
    grid.attrs = &attribute;
    grid.numAttrs = args->early ? 1 : 0;
    cudaError_t e = cudaFuncSetAttribute(
        attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<D>());
    if (e == cudaSuccess)
        e = cudaLaunchKernelEx(&grid, attention_kernel<D>, p);
    if (e == cudaSuccess)
        return SKV_OK;
    skv_error("attention_sm90: %s", cudaGetErrorString(e));
    return SKV_EDEVICE;
}

uint32_t path_tile_rows(uint32_t head_dim)
{
    (void)head_dim;
    return ROWS;
}

int path_launch(const struct hstu_attention_args *args, void *stream)
{
    switch (args->geometry.head_dim) {
    case 64:
        return launch<64>(args, (cudaStream_t)stream);
    case 128:
        return launch<128>(args, (cudaStream_t)stream);
    case 256:
        return launch<256>(args, (cudaStream_t)stream);
    }
    return SKV_ENOTSUP;
}

} // namespace

extern "C" const struct hstu_attention_path hstu_attention_sm90 = {
    "sm90", path_tile_rows, KEYS, 2, true, 2048, path_launch,
};
