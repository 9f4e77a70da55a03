/* The consumers of an attention block (attention_sm90.cu): a warpgroup for 64 query rows, which
 * multiplies, weighs, masks and stores. */
#ifndef HSTU_ATTENTION_SM90_CONSUMER_CUH
#define HSTU_ATTENTION_SM90_CONSUMER_CUH

#include "attention_sm90_ring.cuh"

#include "mma.cuh"

namespace sm90
{

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
        uint32_t near = mma::pack(o[0], o[1]), far = mma::pack(o[4], o[5]);
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
            weights[i / 2] = mma::pack(x[0], x[1]);
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
                    wgmma_shared<N, K_MAJOR>(s, descriptor_k_major(a + i * 32),
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

} // namespace sm90

#endif
