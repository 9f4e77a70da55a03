/* What the products on Hopper share (uvqk_sm90.cu, project_sm90.cu, head_sm90.cu): shapes of tiles,
 * the ring of stages, the order of tiles, how results leave.
 *
 * A block is one producer thread, which feeds a ring of stages by TMA, and consumer warpgroups of
 * 64 rows each, which multiply by wgmma: a K-major, b as it lies in memory, MN-major. Persistent;
 * tiles in row order, columns fastest, so that b and a few rows of a stay in L2. Two blocks may
 * form a cluster along the rows and multicast halves of b to each other: that keeps L2 traffic at
 * 32 bytes a clock and multiprocessor in the large shapes. */
#ifndef HSTU_GEMM_SM90_CUH
#define HSTU_GEMM_SM90_CUH

#include "cuda_kernels.h"

#include <cuda_runtime.h>
#include <math.h>

#include "cuda_check.h"
#include "mma.cuh"
#include "sm90_ptx.cuh"
#include "tensor_map.cuh"

namespace
{

constexpr int STAGING_BYTES = 2048; /* a warp's 16 rows by 64 columns, on their way out */

template <int Groups, int Columns, int Stages, int Cluster> struct shape {
    static constexpr int GROUPS = Groups, COLUMNS = Columns, STAGES = Stages, CLUSTER = Cluster;
    static constexpr int DEPTH = 64; /* of a stage: one swizzled row of a */
    static constexpr int ROWS = GROUPS * 64;
    static constexpr bool LISTED = false;
    static constexpr uint32_t TILE_ROWS = ROWS * CLUSTER; /* of a cluster's two row tiles, or one */
    static constexpr int CHUNKS = COLUMNS / 64;
    static constexpr int PIECES = COLUMNS / 16;     /* what is finished at a time */
    static constexpr int CHUNK_BYTES = DEPTH * 128; /* 64 columns of b */
    static constexpr int A_BYTES = ROWS * DEPTH * 2;
    static constexpr int B_BYTES = CHUNKS * CHUNK_BYTES;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    /* In shared memory, behind the stages. */
    static constexpr int STAGING = STAGES * STAGE_BYTES; /* every warp's */
    static constexpr int BARRIERS = STAGING + GROUPS * 4 * STAGING_BYTES;
    static constexpr int OWN = BARRIERS + STAGES * 16; /* a kernel's own, aligned to 16 */
    static constexpr int SHARED = OWN + 1024;          /* and room to align */
    static constexpr int THREADS = 128 * (1 + GROUPS);
    /* Registers of a thread: the warpgroup of the producer gives some of its share to the others.
     */
    static constexpr int FEW = GROUPS == 4 ? 64 : GROUPS == 3 ? 56 : 40;
    static constexpr int MANY = GROUPS == 2 ? 232 : GROUPS == 3 ? 152 : 104;
    static_assert(SHARED <= 227 * 1024, "one block a multiprocessor");
};

/* ---- tiles ---- */

/* A kernel that leaves out what nobody wants of the last layer: a shape of its own, as what finds
 * the wanted tiles would cost the other layers 0.8 % of a small pass. */
template <typename S> struct listed : S {
    static constexpr bool LISTED = true;
};

/* In which order a kernel's tiles are taken. A listed one walks rows that follow each other without
 * a gap: first `whole` rows, the result's own, by columns that are wanted of all of them, then
 * those of the wanted tiles by the other columns. */
struct tile_order {
    uint32_t columns;                 /* of a row */
    uint32_t step_rows, step_columns; /* from one tile of a block to its next */
    const uint32_t *wanted;           /* the list of struct hstu_wanted_tiles */
    uint32_t whole;
    uint32_t part; /* columns of u, v, q or k; UVQK: walks two of them */
};

/* The tiles of a block: cluster c takes tiles c, c + clusters, ... of row blocks by columns. The
 * next one is found without a division: the tensor cores wait for it. */
template <typename S> struct schedule {
    const uint32_t rows; /* parameters of the kernel, like the order: they cost nothing */
    const tile_order &order;
    uint32_t row, column; /* the next tile's */
    __device__ __forceinline__ schedule(uint32_t rows_, const tile_order &order_)
        : rows(rows_), order(order_)
    {
        const uint32_t first = blockIdx.x / S::CLUSTER, columns = order.columns / S::COLUMNS;
        row = (first / columns * S::CLUSTER + rank()) * S::ROWS;
        column = first % columns * S::COLUMNS;
    }
    __device__ __forceinline__ bool take(uint32_t *row0, uint32_t *column0)
    {
        *row0 = row;
        *column0 = column;
        row += order.step_rows;
        column += order.step_columns;
        if (column >= order.columns) {
            column -= order.columns;
            row += S::TILE_ROWS;
        }
        if (S::LISTED)
            return find_wanted(row0, column0);
        /* By the cluster's first row: its blocks take as many tiles. */
        return *row0 - rank() * S::ROWS < rows;
    }
    /* From rows and columns walked to the result's. */
    __device__ __forceinline__ bool find_wanted(uint32_t *row0, uint32_t *column0) const
    {
        const uint32_t base = *row0 - rank() * S::ROWS;
        const bool whole = base < order.whole;
        if (*column0 >= order.part) /* v, k: 1 and 3 of the parts; u, q: 0 and 2 */
            *column0 += order.part;
        if (whole) {
            *column0 += order.part;
            return true;
        }
        /* A cluster's blocks take neighbours in the list, the last of them maybe none: rows past
         * the end. Both loads at once. */
        const uint32_t first = (base - order.whole) / S::TILE_ROWS * S::CLUSTER;
        const uint32_t mine = min(first + rank(), (rows + S::ROWS - 1) / S::ROWS);
        const uint32_t count = __ldcg(order.wanted), tile = __ldcg(order.wanted + 1 + mine);
        *row0 = mine < count ? tile * S::ROWS : rows;
        return first < count;
    }
    static __device__ __forceinline__ uint32_t rank()
    {
        return S::CLUSTER > 1 ? sm90::cluster_rank() : 0;
    }
};

/* ---- the ring ---- */

template <typename S> struct stage_ring {
    uint32_t shared, stage, phase;

    __device__ __forceinline__ uint32_t full(uint32_t which) const
    {
        return shared + S::BARRIERS + which * 8;
    }
    __device__ __forceinline__ uint32_t empty(uint32_t which) const
    {
        return shared + S::BARRIERS + (S::STAGES + which) * 8;
    }
    __device__ __forceinline__ uint32_t at() const
    {
        return shared + stage * S::STAGE_BYTES;
    }
    __device__ __forceinline__ void advance()
    {
        if (++stage == S::STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }

    __device__ __forceinline__ uint32_t before() const
    {
        return (stage == 0 ? S::STAGES : stage) - 1;
    }

    /* One thread of the block, before anything else. */
    __device__ __forceinline__ void open() const
    {
#pragma unroll 1
        for (uint32_t i = 0; i < S::STAGES; i++) {
            sm90::barrier_init(full(i), 1);
            sm90::barrier_init(empty(i), S::GROUPS * S::CLUSTER);
        }
        sm90::barrier_init_fence();
    }

    /* Producer: waits for the stage to be free and announces what comes. A ring starts with phase 1
     * here, with 0 at the consumers. */
    __device__ __forceinline__ void announce(uint32_t bytes) const
    {
        sm90::barrier_wait(empty(stage), phase);
        sm90::barrier_arrive_expect(full(stage), bytes);
    }

    /* b of one step into the stage; in a cluster each block's half, for both. */
    __device__ __forceinline__ void load_b(const CUtensorMap *map, uint32_t step, uint32_t column0,
                                           uint32_t rank, uint64_t policy) const
    {
        uint32_t b = at() + S::A_BYTES;
        if (S::CLUSTER == 1) {
            sm90::load_box(b, map, step * S::DEPTH, column0 / 64, full(stage), policy);
        } else {
            constexpr uint32_t CHUNKS = S::CHUNKS / S::CLUSTER;
            sm90::load_box_both(b + rank * CHUNKS * S::CHUNK_BYTES, map, step * S::DEPTH,
                                column0 / 64 + rank * CHUNKS, full(stage), policy);
        }
    }

    /* Consumers: a stage is read; one call a warpgroup, by all its threads, when all have. */
    __device__ __forceinline__ void release(uint32_t which) const
    {
        const uint32_t thread = threadIdx.x % 128;
        if (S::CLUSTER == 1 && thread == 0)
            sm90::barrier_arrive(empty(which));
        if (S::CLUSTER > 1 && thread % 32 == 0 && thread / 32 < S::CLUSTER)
            sm90::barrier_arrive_cluster(sm90::address_in(empty(which), thread / 32));
    }
};

/* A consumer warpgroup: d = (or +=) a b of the next stage, once it is there. */
template <typename S>
__device__ __forceinline__ void multiply_stage(float *d, const stage_ring<S> &ring, uint32_t group,
                                               bool accumulate)
{
    sm90::barrier_wait(ring.full(ring.stage), ring.phase);
    const uint32_t a = ring.at() + group * 64 * S::DEPTH * 2, b = ring.at() + S::A_BYTES;
    sm90::wgmma_fence();
#pragma unroll
    for (int i = 0; i < S::DEPTH / 16; i++)
        sm90::wgmma_shared<S::COLUMNS, sm90::MN_MAJOR>(
            d, sm90::descriptor_k_major(a + i * 32),
            sm90::descriptor_mn_major<S::CHUNK_BYTES>(b + i * 16 * 128), accumulate || i > 0);
    sm90::wgmma_commit();
}

/* While those products are under way: the ones before them have ended, and their stage, if the tile
 * has had one, is released. */
template <typename S> __device__ __forceinline__ void release_before(stage_ring<S> &ring, bool any)
{
    sm90::wgmma_wait<1>();
    if (any)
        ring.release(ring.before());
    ring.advance();
}

/* The producer, one thread: of each tile `Lead` stages that start() loads, then a's and b's. Of the
 * first tile the lead and b do not depend on the kernel before, and are asked for first. */
template <typename S, int Lead, typename Parameters, typename Start>
__device__ __forceinline__ void produce(const Parameters &p, const CUtensorMap *a,
                                        stage_ring<S> ring, Start start)
{
    schedule<S> tiles(p.rows, p.order);
    const uint32_t steps = p.k / S::DEPTH;
    uint32_t row0, column0;
    bool first = true;
    while (tiles.take(&row0, &column0)) {
        const uint32_t ahead = first ? min(steps, (uint32_t)(S::STAGES - Lead)) : 0;
#pragma unroll 1
        for (int i = 0; i < Lead; i++, ring.advance())
            start(ring, row0, column0, i);
        auto next = ring;
#pragma unroll 1
        for (uint32_t step = 0; step < ahead; step++, next.advance()) {
            next.announce(S::STAGE_BYTES);
            next.load_b(&p.b, step, column0, tiles.rank(), p.b_policy);
        }
        if (first) {
            mma::dependency_wait();
            mma::dependency_trigger(); /* all that the next one relies on has ended */
        }
        first = false;
#pragma unroll 1
        for (uint32_t step = 0; step < steps; step++, ring.advance()) {
            if (step >= ahead) {
                ring.announce(S::STAGE_BYTES);
                ring.load_b(&p.b, step, column0, tiles.rank(), p.b_policy);
            }
            sm90::load_box(ring.at(), a, row0, step, ring.full(ring.stage), sm90::L2_USUAL);
        }
    }
    if (S::CLUSTER > 1) /* nobody arrives at the barriers of a block that has gone */
#pragma unroll 1
        for (int i = 0; i < S::STAGES; i++, ring.advance())
            sm90::barrier_wait(ring.empty(ring.stage), ring.phase);
}

/* Sets the block up and runs its two kinds of threads: the producer's warpgroup and the consumers.
 */
template <typename S, typename Produce, typename Consume>
__device__ __forceinline__ void run_block(uint32_t shared, Produce produce, Consume consume)
{
    stage_ring<S> ring = {shared, 0, 0};
    if (threadIdx.x == 0)
        ring.open();
    __syncthreads();
    if (S::CLUSTER > 1)
        sm90::cluster_start();
    const uint32_t group = threadIdx.x / 128;
    if (group == 0) {
        if (S::GROUPS > 1)
            sm90::registers_shrink<S::FEW>();
        ring.phase = 1;
        produce(ring);
    } else {
        if (S::GROUPS > 1)
            sm90::registers_grow<S::MANY>();
        consume(ring, group - 1);
        sm90::stores_read(); /* shared memory stays until then */
    }
}

__device__ __forceinline__ uint32_t shared_base(char *memory)
{
    return (mma::shared_address(memory) + 1023) & ~1023u;
}

__device__ __forceinline__ uint4 load_shared(uint32_t address)
{
    uint4 bits;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(address)
                 : "memory");
    return bits;
}

/* ---- results: 64 columns at a time from registers to memory, by way of a warp's staging ---- */

/* The row that a lane stores in the i-th of four steps: 8 lanes a row. */
__device__ __forceinline__ uint32_t stored_row(uint32_t row0, uint32_t warp, int i)
{
    return row0 + warp * 16 + i * 4 + threadIdx.x % 32 / 8;
}

/* 16 columns of a warp's 16 rows, as wgmma lays sums out, to its staging; `piece` counts them. */
__device__ __forceinline__ void stage_piece(uint32_t staging, int piece, const uint32_t *word)
{
    const uint32_t lane = threadIdx.x % 32;
    if (piece % 4 == 0) { /* the last 64 columns are read */
        if (lane == 0)
            sm90::stores_read();
        __syncwarp();
    }
    /* Lanes 0-15 address the rows of the first 8 columns, 16-31 those of the next 8. */
    sm90::store_matrices(staging + mma::tile_offset<8>(lane % 16, piece % 4 * 2 + lane / 16),
                         word[0], word[1], word[2], word[3]);
}

/* The 64 staged columns to the map's chunk `chunk` of rows row and on, by TMA. */
__device__ __forceinline__ void store_staged(const CUtensorMap *map, uint32_t staging, uint32_t row,
                                             uint32_t chunk)
{
    sm90::async_proxy_fence();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        sm90::store_box(map, staging, row, chunk);
}

/* What this lane stores of 64 staged columns in the i-th step: 8 columns from lane % 8 * 8 on. */
__device__ __forceinline__ uint4 staged(uint32_t staging, int i)
{
    const uint32_t lane = threadIdx.x % 32;
    return load_shared(staging + mma::tile_offset<8>(i * 4 + lane / 8, lane % 8));
}

/* ---- host ---- */

template <typename S> uint32_t tiles_of(uint32_t rows, uint32_t n)
{
    return (rows + S::TILE_ROWS - 1) / S::TILE_ROWS * (n / S::COLUMNS) * S::CLUSTER;
}

/* Rows of tiles that are wanted of the last layer, for want of knowledge: half. Candidates of a
 * sequence are a few hundred rows, so that most tiles of more than 128 have some. */
template <typename S> uint32_t wanted_rows(uint32_t rows)
{
    return S::ROWS > 128 ? rows : rows / 2;
}

/* Microseconds that the product adds to a layer: S::START, and S::ROUND for every round of the
 * machine at k 1024. Fitted to whole blocks on an H200 with each shape in turn; alone (bench_gemm)
 * the widest tiles do better than among the other kernels. */
template <typename S> double estimate(uint32_t tiles, uint32_t n, uint32_t k, uint32_t sm_count)
{
    if (n % S::COLUMNS)
        return INFINITY;
    const uint32_t rounds = (tiles + sm_count - 1) / sm_count;
    return S::START + S::ROUND * k / 1024 * rounds;
}

/* What a launch uses. */
struct choice {
    enum hstu_tiles tiles;
    bool listed;
};

constexpr double OTHER_CODE = 1; /* us: a kernel that no other layer uses */

/* Of tiles from `first` to `last` those with the least cost, or `fixed` ones; listed ones, which
 * may_list says are asked for, only where that is less. cost(tiles, listed): in us; INFINITY: there
 * is no such kernel. */
template <typename Cost>
struct choice choose_tiles(enum hstu_tiles fixed, enum hstu_tiles first, enum hstu_tiles last,
                           bool may_list, Cost cost)
{
    if (fixed != HSTU_TILES_ANY)
        return {fixed, may_list && cost(fixed, true) < INFINITY};
    struct choice best = {last, false};
    double least = INFINITY;
    for (int listed = 0; listed <= (int)may_list; listed++)
        for (int tiles = first; tiles <= last; tiles++) {
            const double us = cost((enum hstu_tiles)tiles, listed) + listed * OTHER_CODE;
            if (us < least) {
                least = us;
                best = {(enum hstu_tiles)tiles, (bool)listed};
            }
        }
    return best;
}

/* A block a multiprocessor at most. `early`: may start while the kernel before it ends. The order
 * is given but for what the tiles say of it. */
template <typename S, typename Parameters>
int launch_tiles(void (*kernel)(Parameters), Parameters p, uint32_t sm_count, int shared,
                 bool early, cudaStream_t stream)
{
    if (p.n % S::COLUMNS || sm_count < S::CLUSTER) {
        skv_error("a product: %u columns, tiles of %d, %u multiprocessors", p.n, S::COLUMNS,
                  sm_count);
        return SKV_ENOTSUP;
    }
    const uint32_t most = sm_count / S::CLUSTER * S::CLUSTER, tiles = tiles_of<S>(p.rows, p.n);
    const uint32_t blocks = tiles < most ? tiles : most; /* listed: that many at most */
    const uint32_t columns = p.order.columns / S::COLUMNS;
    p.order.step_rows = blocks / S::CLUSTER / columns * S::CLUSTER * S::ROWS;
    p.order.step_columns = blocks / S::CLUSTER % columns * S::COLUMNS;
    cudaLaunchAttribute attribute[2] = {};
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = S::CLUSTER;
    attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    attribute[1] = mma::early_start();
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(S::THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = early ? 2 : 1;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (e == cudaSuccess)
        e = cudaLaunchKernelEx(&config, kernel, p);
    return hstu_cuda_check(e, "launching a product");
}

} // namespace

#endif
