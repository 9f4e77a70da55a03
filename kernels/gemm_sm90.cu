/* The two products of a layer on Hopper. UVQK in one kernel: m = SiLU(bf16(a b + bias)), and K and
 * V of rows with a slot to their page, so that no pass over [rows, 4HD] follows the product. The
 * projection, x += a b, where one wave does it, for the sake of an early start.
 *
 * One producer warp feeds a ring of stages by TMA; consumer warpgroups multiply, 64 rows each, by
 * wgmma from shared memory (a K-major, b as it lies, MN-major). Sums are rounded to bf16 in
 * registers, activated, and stored by way of a little shared memory. A block of many tiles does
 * that while the tensor cores are at the next tile, a few columns after each step: SiLU, bound by
 * the special function unit, takes a quarter of a product's time.
 * Two blocks may form a cluster along the rows and multicast halves of b to each other: that keeps
 * L2 traffic at 32 bytes a clock and multiprocessor in the large shape. Persistent; tiles in row
 * order, columns fastest, so that b and a few rows of a stay in L2.
 *
 * Moves: a once per column block (from L2), b once per two row blocks, m once; a page row once. */
#include "cuda_kernels.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <cudaTypedefs.h>
#include <math.h>

#include "gemm_sm90_ptx.cuh"
#include "mma.cuh"

extern "C" {
#include "log.h"
}

namespace
{

constexpr int DEPTH = 64;           /* of a stage: one swizzled row of a */
constexpr int CHUNK_BYTES = 8192;   /* 64 rows of k by 64 columns of b */
constexpr int STAGING_BYTES = 2048; /* a warp's 16 rows by 64 columns, on their way out */

/* Shadow: a tile is finished while the next one is multiplied; for blocks of many tiles. */
template <int Columns, int Stages, int Cluster, bool Shadow> struct shape {
    static constexpr int GROUPS = 2, COLUMNS = Columns, STAGES = Stages, CLUSTER = Cluster;
    static constexpr bool SHADOW = Shadow;
    static constexpr int ROWS = GROUPS * 64;
    static constexpr int CHUNKS = COLUMNS / 64;
    static constexpr int PIECES = COLUMNS / 16; /* what is finished at a time */
    static constexpr int A_BYTES = ROWS * DEPTH * 2;
    static constexpr int B_BYTES = CHUNKS * CHUNK_BYTES;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int OUT = STAGES * STAGE_BYTES; /* every warp's staging */
    static constexpr int BARRIERS = OUT + GROUPS * 4 * STAGING_BYTES;
    static constexpr int SHARED = BARRIERS + STAGES * 16 + 1024; /* and room to align */
    static constexpr int THREADS = 128 * (1 + GROUPS);
    static_assert(SHARED <= 227 * 1024, "one block a multiprocessor");
};
using large = shape<256, 4, 2, true>;
using small = shape<128, 6, 1, false>;

struct parameters {
    CUtensorMap a, b;
    const uint16_t *bias;
    uint16_t *out;
    const uint32_t *slot;
    char *pool;
    skv_geometry geometry;
    uint32_t layer, rows, n, k;
};

/* ---- the kernel ---- */

/* The tiles of a block: cluster c takes tiles c, c + clusters, ... of row blocks by columns. */
template <typename S> struct schedule {
    uint32_t column_blocks, tiles, next, step, rank;
    __device__ explicit schedule(const parameters &p)
    {
        column_blocks = p.n / S::COLUMNS;
        tiles = (p.rows + S::ROWS * S::CLUSTER - 1) / (S::ROWS * S::CLUSTER) * column_blocks;
        next = blockIdx.x / S::CLUSTER;
        step = gridDim.x / S::CLUSTER;
        rank = S::CLUSTER > 1 ? sm90::cluster_rank() : 0;
    }
    __device__ bool take(uint32_t *row0, uint32_t *column0)
    {
        if (next >= tiles)
            return false;
        *row0 = (next / column_blocks * S::CLUSTER + rank) * S::ROWS;
        *column0 = next % column_blocks * S::COLUMNS;
        next += step;
        return true;
    }
};

template <typename S> __device__ __forceinline__ uint32_t full_of(uint32_t shared, uint32_t stage)
{
    return shared + S::BARRIERS + stage * 8;
}

template <typename S> __device__ __forceinline__ uint32_t empty_of(uint32_t shared, uint32_t stage)
{
    return shared + S::BARRIERS + (S::STAGES + stage) * 8;
}

template <typename S>
__device__ __forceinline__ void load_b(const parameters &p, uint32_t shared, uint32_t stage,
                                       uint32_t step, uint32_t column0, uint32_t rank)
{
    uint32_t b = shared + stage * S::STAGE_BYTES + S::A_BYTES;
    if (S::CLUSTER == 1) {
        sm90::load_box(b, &p.b, step * DEPTH, column0 / 64, full_of<S>(shared, stage));
    } else {
        constexpr uint32_t CHUNKS = S::CHUNKS / S::CLUSTER;
        sm90::load_box_both(b + rank * CHUNKS * CHUNK_BYTES, &p.b, step * DEPTH,
                            column0 / 64 + rank * CHUNKS, full_of<S>(shared, stage));
    }
}

/* One thread. The first stages' b does not depend on the kernel before, so it is asked for first.
 */
template <typename S> __device__ void produce(const parameters &p, uint32_t shared)
{
    schedule<S> tiles(p);
    const uint32_t steps = p.k / DEPTH;
    uint32_t stage = 0, phase = 1, row0, column0;
    bool first = true;
    while (tiles.take(&row0, &column0)) {
        const uint32_t ahead = first ? min(steps, (uint32_t)S::STAGES) : 0;
        for (uint32_t step = 0; step < ahead; step++) {
            sm90::barrier_arrive_expect(full_of<S>(shared, step), S::STAGE_BYTES);
            load_b<S>(p, shared, step, step, column0, tiles.rank);
        }
        if (first) {
            sm90::dependency_wait();
            sm90::dependency_trigger(); /* all that the next one relies on has ended */
        }
        first = false;
        for (uint32_t step = 0; step < steps; step++) {
            if (step >= ahead) {
                sm90::barrier_wait(empty_of<S>(shared, stage), phase);
                sm90::barrier_arrive_expect(full_of<S>(shared, stage), S::STAGE_BYTES);
                load_b<S>(p, shared, stage, step, column0, tiles.rank);
            }
            sm90::load_box(shared + stage * S::STAGE_BYTES, &p.a, row0, step,
                           full_of<S>(shared, stage));
            if (++stage == S::STAGES) {
                stage = 0;
                phase ^= 1;
            }
        }
    }
}

/* Where K or V of a column of m goes, for rows that have a slot. */
struct page_columns {
    char *at; /* of page 0, slot 0; NULL for u and q */
    uint64_t page_bytes;
    uint32_t shift, slot_bytes;
};

__device__ __forceinline__ page_columns page_columns_at(const parameters &p, uint32_t column)
{
    const skv_geometry &g = p.geometry;
    const uint32_t hd = p.n / 4, part = column / hd, head = column % hd / g.head_dim;
    const uint64_t head_bytes = (uint64_t)g.page_tokens * g.head_dim * 2;
    page_columns c;
    c.shift = 31 - __clz(g.page_tokens);
    c.slot_bytes = g.head_dim * 2;
    c.page_bytes = head_bytes * g.heads * 2 * g.layers;
    c.at = nullptr;
    if (part == 1 || part == 3) /* V, K */
        c.at = p.pool + ((p.layer * 2 + (part == 1)) * g.heads + head) * head_bytes +
               column % g.head_dim * 2;
    return c;
}

__device__ __forceinline__ void store_page(const page_columns &c, uint32_t slot, uint4 bits)
{
    if (slot == UINT32_MAX || !c.at)
        return;
    uint64_t page = slot >> c.shift, at = slot & ((1u << c.shift) - 1);
    *reinterpret_cast<uint4 *>(c.at + page * c.page_bytes + at * c.slot_bytes) = bits;
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

__device__ __forceinline__ uint32_t activate(uint32_t pair)
{
    float2 x = mma::unpack(pair);
    return mma::pack(mma::silu(x.x), mma::silu(x.y));
}

/* A warpgroup's tile between its products and memory: sums and bias, rounded to bf16.
 * A thread's part, as wgmma lays sums out: rows lane / 4 and that + 8 of its warp's 16, columns
 * 8i + 2 (lane % 4) and the next. */
template <typename S> struct finished {
    uint32_t word[S::COLUMNS / 4]; /* [i][row] */
    uint32_t row0, column0;        /* of the tile */
    uint32_t slot[4];              /* of the rows that this lane stores */
};

/* The row that a lane stores in the i-th of four steps: 8 lanes a row. */
__device__ __forceinline__ uint32_t stored_row(uint32_t row0, uint32_t warp, int i)
{
    return row0 + warp * 16 + i * 4 + threadIdx.x % 32 / 8;
}

/* Columns 16 * piece and on: activated, to the warp's staging; every fourth time the 64 columns
 * there go to memory. */
template <typename S>
__device__ __forceinline__ void finish(const parameters &p, const finished<S> &tile, int piece,
                                       uint32_t staging, uint32_t warp)
{
    const uint32_t lane = threadIdx.x % 32;
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        word[i] = activate(tile.word[piece * 4 + i]);
    if (piece % 4 == 0)
        __syncwarp(); /* the last 64 columns are read */
    /* Lanes 0-15 address the rows of the first 8 columns, 16-31 those of the next 8. */
    store_matrices(staging + mma::tile_offset<8>(lane % 16, piece % 4 * 2 + lane / 16), word[0],
                   word[1], word[2], word[3]);
    if (piece % 4 != 3)
        return;
    __syncwarp();
    const uint32_t column = tile.column0 + piece / 4 * 64 + lane % 8 * 8;
    const page_columns page = page_columns_at(p, column);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t row = stored_row(tile.row0, warp, i);
        uint4 bits = load_shared(staging + mma::tile_offset<8>(i * 4 + lane / 8, lane % 8));
        if (row >= p.rows)
            continue;
        *reinterpret_cast<uint4 *>(p.out + (uint64_t)row * p.n + column) = bits;
        store_page(page, tile.slot[i], bits);
    }
}

/* One consumer warpgroup. */
template <typename S> __device__ void consume(const parameters &p, uint32_t shared, uint32_t group)
{
    schedule<S> tiles(p);
    const uint32_t steps = p.k / DEPTH, thread = threadIdx.x % 128, lane = thread % 32;
    const uint32_t warp = group * 4 + thread / 32, staging = shared + S::OUT + warp * STAGING_BYTES;
    uint32_t stage = 0, phase = 0, row0, column0;
    float d[S::COLUMNS / 2];
    finished<S> last = {}; /* of no row yet */
    last.row0 = p.rows;
    auto release = [&](uint32_t which) {
        if (S::CLUSTER == 1 && thread == 0)
            sm90::barrier_arrive(empty_of<S>(shared, which));
        if (S::CLUSTER > 1 && thread % 32 == 0 && thread / 32 < S::CLUSTER)
            sm90::barrier_arrive_cluster(sm90::address_in(empty_of<S>(shared, which), thread / 32));
    };
    sm90::dependency_wait();
    while (tiles.take(&row0, &column0)) {
        uint32_t before = 0, step = 0;
        uint32_t bias[S::COLUMNS / 8];
#pragma unroll
        for (int piece = 0; piece < (S::SHADOW ? S::PIECES : 1); piece++) {
            const uint32_t until = S::SHADOW ? steps * (piece + 1) / S::PIECES : steps;
#pragma unroll 1
            for (; step < until; step++) {
                sm90::barrier_wait(full_of<S>(shared, stage), phase);
                const uint32_t a = shared + stage * S::STAGE_BYTES + group * 64 * DEPTH * 2;
                const uint32_t b = shared + stage * S::STAGE_BYTES + S::A_BYTES;
                sm90::wgmma_fence();
#pragma unroll
                for (int i = 0; i < DEPTH / 16; i++)
                    multiply<S::COLUMNS>(d, sm90::descriptor_k_major(a + i * 32),
                                         sm90::descriptor_mn_major<CHUNK_BYTES>(b + i * 16 * 128),
                                         step + i > 0);
                sm90::wgmma_commit();
                if (step > 0) { /* the stage before is read */
                    wgmma_wait_but<1>();
                    release(before);
                }
                before = stage;
                if (++stage == S::STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            if (S::SHADOW)
                finish<S>(p, last, piece, staging, warp);
        }
#pragma unroll
        for (int i = 0; i < S::COLUMNS / 8; i++) /* while the last products run */
            bias[i] =
                __ldg(reinterpret_cast<const uint32_t *>(p.bias + column0 + i * 8 + lane % 4 * 2));
#pragma unroll
        for (int i = 0; i < 4; i++)
            last.slot[i] = __ldg(p.slot + min(stored_row(row0, warp, i), p.rows - 1));
        wgmma_wait_but<0>();
        sm90::pin<S::COLUMNS / 2>(d);
        release(before);
        last.row0 = row0;
        last.column0 = column0;
#pragma unroll
        for (int i = 0; i < S::COLUMNS / 4; i++) {
            const float2 add = mma::unpack(bias[i / 2]);
            last.word[i] = mma::pack(d[i * 2] + add.x, d[i * 2 + 1] + add.y);
        }
        if (!S::SHADOW)
#pragma unroll
            for (int piece = 0; piece < S::PIECES; piece++)
                finish<S>(p, last, piece, staging, warp);
    }
    if (S::SHADOW)
#pragma unroll
        for (int piece = 0; piece < S::PIECES; piece++)
            finish<S>(p, last, piece, staging, warp);
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) uvqk_kernel(const __grid_constant__ parameters p)
{
    extern __shared__ char memory[];
    const uint32_t shared = (mma::shared_address(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        sm90::map_prefetch(&p.a);
        sm90::map_prefetch(&p.b);
        for (uint32_t i = 0; i < S::STAGES; i++) {
            sm90::barrier_init(full_of<S>(shared, i), 1);
            sm90::barrier_init(empty_of<S>(shared, i), S::GROUPS * S::CLUSTER);
        }
        sm90::barrier_init_fence();
    }
    __syncthreads();
    if (S::CLUSTER > 1)
        sm90::cluster_sync(); /* the other block's barriers are there */
    const uint32_t group = threadIdx.x / 128;
    if (group == 0) {
        sm90::registers_shrink<40>();
        if (threadIdx.x == 0)
            produce<S>(p, shared);
    } else {
        sm90::registers_grow<232>();
        consume<S>(p, shared, group - 1);
    }
    if (S::CLUSTER > 1) {
        __syncwarp();
        sm90::cluster_sync(); /* nobody arrives at the barriers of a block that has gone */
    }
}

/* ---- host ---- */

PFN_cuTensorMapEncodeTiled_v12000 find_encode()
{
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        return nullptr;
    return (PFN_cuTensorMapEncodeTiled_v12000)entry;
}

/* Row-major bf16 [rows][columns] as {64, rows, columns / 64}: a box lies in shared memory as chunks
 * of swizzled rows. Rows past the end read as zeros. */
int encode(CUtensorMap *map, const void *base, uint64_t rows, uint64_t columns, uint32_t box_rows,
           uint32_t box_chunks)
{
    auto encode_tiled = find_encode();
    cuuint64_t sizes[3] = {64, rows, columns / 64}, strides[2] = {columns * 2, 128};
    cuuint32_t box[3] = {64, box_rows, box_chunks}, steps[3] = {1, 1, 1};
    CUresult result = CUDA_ERROR_NOT_SUPPORTED;
    if (encode_tiled)
        result =
            encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)base, sizes, strides,
                         box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS)
        return SKV_OK;
    skv_error("gemm_sm90: tensor map %llu x %llu, box %u x %u: driver error %d",
              (unsigned long long)rows, (unsigned long long)columns, box_rows, box_chunks,
              (int)result);
    return SKV_EDEVICE;
}

template <typename S> uint32_t tiles_of(uint32_t rows, uint32_t n)
{
    return (rows + S::ROWS * S::CLUSTER - 1) / (S::ROWS * S::CLUSTER) * (n / S::COLUMNS) *
           S::CLUSTER;
}

template <typename S> int launch(const struct hstu_uvqk_args *args, cudaStream_t stream)
{
    parameters p = {};
    int status = encode(&p.a, args->a, args->rows, args->k, S::ROWS, 1);
    if (status == SKV_OK)
        status = encode(&p.b, args->b, args->k, args->n, DEPTH, S::CHUNKS / S::CLUSTER);
    if (status != SKV_OK)
        return status;
    p.bias = (const uint16_t *)args->bias;
    p.out = (uint16_t *)args->m;
    p.slot = args->slot;
    p.pool = (char *)args->pool;
    p.geometry = args->geometry;
    p.layer = args->layer;
    p.rows = args->rows;
    p.n = args->n;
    p.k = args->k;
    uint32_t tiles = tiles_of<S>(args->rows, args->n);
    uint32_t most = args->sm_count / S::CLUSTER * S::CLUSTER;
    cudaLaunchAttribute attribute[2] = {};
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = S::CLUSTER;
    attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    attribute[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(tiles < most ? tiles : most);
    config.blockDim = dim3(S::THREADS);
    config.dynamicSmemBytes = S::SHARED;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = args->early ? 2 : 1;
    cudaError_t e = cudaFuncSetAttribute(uvqk_kernel<S>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED);
    if (e == cudaSuccess)
        e = cudaLaunchKernelEx(&config, uvqk_kernel<S>, p);
    if (e == cudaSuccess)
        return SKV_OK;
    skv_error("gemm_sm90: %s", cudaGetErrorString(e));
    return SKV_EDEVICE;
}

/* Microseconds on an H100 (bench_gemm), by rounds of the machine: what starting and ending cost,
 * and a round at k 1024. */
template <typename S>
double cost(uint32_t rows, uint32_t n, uint32_t k, uint32_t sm_count, double once, double round)
{
    return once + (tiles_of<S>(rows, n) + sm_count - 1) / sm_count * round * k / 1024;
}

double large_cost(uint32_t rows, uint32_t n, uint32_t k, uint32_t sm_count)
{
    return cost<large>(rows, n, k, sm_count, 11.0, 11.9);
}

double small_cost(uint32_t rows, uint32_t n, uint32_t k, uint32_t sm_count)
{
    return cost<small>(rows, n, k, sm_count, 1.0, 8.0);
}

} // namespace

bool hstu_uvqk_sm90_pays(uint32_t rows, uint32_t n, uint32_t k, uint32_t sm_count)
{
    /* cuBLASLt's product, the pass, and one more launch. */
    double apart = 6 + rows * (n / 4096.0) * (0.0105 * k / 1024 + 0.0045);
    return fmin(large_cost(rows, n, k, sm_count), small_cost(rows, n, k, sm_count)) < apart;
}

int hstu_launch_uvqk_sm90(const struct hstu_uvqk_args *args, void *stream)
{
    bool is_large = args->shape == HSTU_UVQK_LARGE;
    if (args->shape == HSTU_UVQK_ANY)
        is_large = large_cost(args->rows, args->n, args->k, args->sm_count) <
                   small_cost(args->rows, args->n, args->k, args->sm_count);
    return is_large ? launch<large>(args, (cudaStream_t)stream)
                    : launch<small>(args, (cudaStream_t)stream);
}
