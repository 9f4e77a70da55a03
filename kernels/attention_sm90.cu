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
 * for 256 rows, 256 flops a byte: 2.5 TB/s from the L2 at 640 TFLOP/s.
 *
 * Here are the block and the launch; the rest is in the headers named below, what producers and
 * consumers share in attention_sm90_ring.cuh. */
#include "attention_sm90_consumer.cuh"
#include "attention_sm90_producer.cuh"

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "tensor_map.cuh"

using namespace sm90;

namespace
{

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
    return hstu_cuda_check(e, "launching attention_sm90");
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
