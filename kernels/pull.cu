/* pull: the first node of every graph. Brings the batch from the pinned block to its fixed device
 * addresses, works out where each row belongs and embeds it, so that a launch patches nothing and
 * the CPU writes only what it alone knows. The first COPY_BLOCKS blocks copy counts, page ids and
 * work items, 16 bytes a thread; the others take some rows each, first a thread a row, then a
 * warp.
 *
 * Moves over PCIe: 10 bytes a row, 4 a page, 48 a work item, sizeof(struct hstu_counts), and
 * struct hstu_layout once more for every block; on the device two table rows read and one row of x
 * written per row. What counts on PCIe is the number of requests and of round trips, 1.5 us each.
 * Requests: neighbouring lanes read whole lines, 16 tokens one. (Loads marked volatile go
 * out lane by lane: 2 us a row.) Round trips: two. The first brings layout, tokens and slices
 * together; the second page ids, while the rows are embedded, and in the copying blocks what the
 * counts tell the length of. */
#include "cuda_kernels.h"

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "mma.cuh"

namespace
{

constexpr uint32_t WARPS = 16, THREADS = WARPS * 32;
constexpr uint32_t COPY_BLOCKS = 8; /* 64 KiB in flight: enough to hide PCIe's latency */
constexpr uint32_t LINE_CHUNKS = 8, LINE_ROWS = 16, LINE_PAGES = 32; /* in a line of 128 bytes */
constexpr uint32_t AHEAD = 4; /* chunks of both tables that a lane has in flight: a row of E 1024 */

struct table_row {
    uint32_t token, position;
};

__device__ void copy16(void *to, const void *from, uint32_t bytes, uint32_t thread,
                       uint32_t threads)
{
    for (uint32_t i = thread; i < bytes / 16; i += threads)
        static_cast<uint4 *>(to)[i] = static_cast<const uint4 *>(from)[i];
}

static_assert(sizeof(hstu_work) % 16 == 0, "copied 16 bytes at a time");

/* Counts at once; then, their lengths known, page ids and work items as one list. */
__device__ void copy_lists(const hstu_pull_args &a)
{
    __shared__ uint32_t page_chunks, work_chunks, last_chunks;
    const uint32_t thread = blockIdx.x * THREADS + threadIdx.x, threads = COPY_BLOCKS * THREADS;
    /* In a warp that copies no counts, and all at once: no load waits for another. */
    if (threadIdx.x == THREADS - 1) {
        const struct hstu_layout &l = a.counts->layout;
        const uint32_t pages = l.pages, work = l.work, last_work = l.last_work;
        page_chunks = (pages + LINE_PAGES - 1) / LINE_PAGES * LINE_CHUNKS;
        work_chunks = work * (sizeof *a.work / 16);
        last_chunks = last_work * (sizeof *a.work / 16);
    }
    copy16(a.to_counts, a.counts, sizeof *a.counts, thread, threads);
    __syncthreads();
    const uint4 *page = reinterpret_cast<const uint4 *>(a.page);
    const uint4 *work = reinterpret_cast<const uint4 *>(a.work);
    const uint4 *last = reinterpret_cast<const uint4 *>(a.last_work);
    uint4 *to_page = reinterpret_cast<uint4 *>(a.to_page);
    uint4 *to_work = reinterpret_cast<uint4 *>(a.to_work);
    uint4 *to_last = reinterpret_cast<uint4 *>(a.to_last_work);
    const uint32_t before_last = page_chunks + work_chunks;
    for (uint32_t i = thread; i < before_last + last_chunks; i += threads) {
        const uint32_t in_work = i - page_chunks, in_last = i - before_last;
        const uint4 *from = i < page_chunks   ? page + i
                            : i < before_last ? work + in_work
                                              : last + in_last;
        uint4 *to = i < page_chunks   ? to_page + i
                    : i < before_last ? to_work + in_work
                                      : to_last + in_last;
        *to = *from;
    }
}

/* Eight elements. Not fused: the reference's bits. */
__device__ uint4 embed(uint4 e, uint4 p, float scale)
{
    uint4 out;
    const uint32_t *ew = &e.x, *pw = &p.x;
    uint32_t *ow = &out.x;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float2 ef = mma::unpack(ew[k]), pf = mma::unpack(pw[k]);
        ow[k] = mma::pack(__fadd_rn(__fmul_rn(ef.x, scale), pf.x),
                          __fadd_rn(__fmul_rn(ef.y, scale), pf.y));
    }
    return out;
}

/* One warp: x = bf16(emb * sqrt(E) + pos). */
__device__ void embed_row(const hstu_pull_args &a, uint32_t row, table_row from, uint32_t lane)
{
    const float scale = sqrtf((float)a.embed);
    const uint32_t chunks = a.embed / 8;
    const uint4 *e = static_cast<const uint4 *>(a.embedding) + (uint64_t)from.token * chunks;
    const uint4 *p = static_cast<const uint4 *>(a.position) + (uint64_t)from.position * chunks;
    uint4 *x = static_cast<uint4 *>(a.x) + (uint64_t)row * chunks;
    for (uint32_t i = lane; i < chunks; i += 32 * AHEAD) {
        uint4 ei[AHEAD], pi[AHEAD];
#pragma unroll
        for (uint32_t n = 0; n < AHEAD; n++) {
            const uint32_t at = min(i + n * 32, chunks - 1);
            ei[n] = __ldg(e + at);
            pi[n] = __ldg(p + at);
        }
#pragma unroll
        for (uint32_t n = 0; n < AHEAD; n++)
            if (i + n * 32 < chunks)
                x[i + n * 32] = embed(ei[n], pi[n], scale);
    }
}

__device__ void place_and_embed(const hstu_pull_args &a, uint32_t row0, uint32_t block_rows)
{
    __shared__ __align__(16) hstu_layout layout;
    __shared__ table_row tables[THREADS];
    static_assert(sizeof layout / 16 <= THREADS, "a load a thread brings it");
    const uint32_t row = row0 + threadIdx.x;
    const bool mine = threadIdx.x < block_rows && row < a.rows;
    uint64_t token = 0;
    uint8_t slices = 0, last_slices = 0;
    if (mine) {
        token = a.token[row];
        slices = a.slices[row];
        last_slices = a.last_slices[row];
    }
    copy16(&layout, &a.counts->layout, sizeof layout, threadIdx.x, THREADS);
    __syncthreads();

    struct hstu_place place = {};
    uint32_t page = 0;
    if (mine) {
        place = hstu_place_row(&layout, row, a.page_tokens, a.position_buckets);
        if (place.page != UINT32_MAX)
            page = a.page[place.page]; /* used last */
        tables[threadIdx.x] = {hstu_mix_row(token, a.embedding_rows), place.position};
        a.to_row_sequence[row] = place.sequence;
        a.to_slices[row] = slices;
        a.to_last_slices[row] = last_slices;
    }
    __syncthreads();

    const uint32_t rows = layout.row_start[layout.batch]; /* the rest is padding */
    for (uint32_t i = threadIdx.x / 32; i < block_rows && row0 + i < rows; i += WARPS)
        embed_row(a, row0 + i, tables[i], threadIdx.x % 32);
    if (mine)
        a.to_slot[row] = place.page == UINT32_MAX ? UINT32_MAX : page * a.page_tokens + place.slot;
}

__global__ void __launch_bounds__(THREADS)
    pull_kernel(const __grid_constant__ hstu_pull_args a, uint32_t block_rows)
{
    if (blockIdx.x < COPY_BLOCKS)
        copy_lists(a);
    else
        place_and_embed(a, (blockIdx.x - COPY_BLOCKS) * block_rows, block_rows);
}

} // namespace

int hstu_launch_pull(const struct hstu_pull_args *args, void *stream)
{
    /* Each block reads the layout anew, 0.2 us of PCIe's time, and a warp takes 1.2 us for a row:
     * so many blocks balance the two. */
    uint32_t row_blocks = 1;
    while (3 * row_blocks * row_blocks < args->rows)
        row_blocks++;
    const uint32_t lines = (args->rows + LINE_ROWS - 1) / LINE_ROWS;
    const uint32_t block_rows = (lines + row_blocks - 1) / row_blocks * LINE_ROWS;
    if (block_rows > THREADS)
        return SKV_EINVAL; /* cannot be: so many rows are more than a launch may have */
    uint32_t blocks = COPY_BLOCKS + (args->rows + block_rows - 1) / block_rows;
    pull_kernel<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(*args, block_rows);
    return hstu_cuda_check(cudaGetLastError(), "launching pull");
}
