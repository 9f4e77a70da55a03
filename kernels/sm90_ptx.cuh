/* Hopper's asynchronous machinery as plain functions, for its kernels: mbarriers, TMA, named
 * barriers, register reallocation, and wgmma with its shared-memory descriptors.
 *
 * Shared memory is addressed by 32-bit shared-space addresses throughout. Every tile that wgmma
 * reads was written by TMA with the 128-byte swizzle: rows of 128 bytes (64 bf16), eight rows an
 * atom of 1 KiB, atoms 1 KiB aligned. */
#ifndef HSTU_SM90_PTX_CUH
#define HSTU_SM90_PTX_CUH

#include <cuda.h>
#include <stdint.h>

namespace sm90
{

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* ---- mbarriers: a phase ends when `count` arrivals and all announced bytes have come ---- */

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/* Makes the inits visible to TMA, which signals through the async proxy. */
__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                     : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* Waits until the phase of this parity has ended. A fresh barrier counts as having just ended phase
 * parity 1. try_wait sleeps in hardware for a while, so the loop is not a hot spin. */
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity)
{
    asm volatile("{\n\t"
                 ".reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* ---- clusters: pairs of blocks that see each other's shared memory ---- */

__device__ __forceinline__ uint32_t cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* Every thread of both blocks: from here on both have started, and see each other's barriers, whose
 * inits barrier_init_fence() has released. (An arrival that releases too would wait for all that is
 * in memory's way: about a microsecond.) */
__device__ __forceinline__ void cluster_start()
{
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

/* The address of the same place in the block of this rank. */
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t rank)
{
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

/* On a barrier of either block. What it releases are wgmma's accesses, complete by then, or
 * ordinary ones that async_proxy_fence() has ended, so the default order does; .release.cluster is
 * a fence that costs some 300 cycles each time. */
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* ---- named barriers: sync takes part and waits, arrive only takes part ---- */

__device__ __forceinline__ void named_sync(uint32_t id, uint32_t threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Ordinary loads and stores of this thread in shared memory, before what wgmma and TMA do there
 * next. */
__device__ __forceinline__ void async_proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <uint32_t Registers> __device__ __forceinline__ void registers_grow()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <uint32_t Registers> __device__ __forceinline__ void registers_shrink()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

/* How soon the L2 drops what a load brings when others need the room, as createpolicy makes it.
 * (Made on the device it cost 4 to 12 % of the block.) */
constexpr uint64_t L2_USUAL = UINT64_C(0x1000000000000000);
constexpr uint64_t L2_FIRST_OUT = UINT64_C(0x12f0000000000000);

/* ---- TMA: a box {64 columns, rows, chunks of 64 columns} of a map {64, rows, chunks} ---- */

__device__ __forceinline__ void map_prefetch(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap *map, uint32_t row,
                                         uint32_t chunk, uint32_t barrier, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(0), "r"(row), "r"(chunk), "r"(barrier), "l"(policy)
                 : "memory");
}

/* The same box into both blocks of the pair, at the same place, each copy signalling its own
 * block's barrier. */
__device__ __forceinline__ void load_box_both(uint32_t to, const CUtensorMap *map, uint32_t row,
                                              uint32_t chunk, uint32_t barrier, uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(to),
        "l"(map), "r"(0), "r"(row), "r"(chunk), "r"(barrier), "h"((uint16_t)3), "l"(policy)
        : "memory");
}

/* ---- stores, by way of shared memory ---- */

/* Four matrices of 8 x 8 bf16, a row of each at a lane's address. */
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* A box from shared memory to where the map says; rows past its end are left out. This thread's. */
__device__ __forceinline__ void store_box(const CUtensorMap *map, uint32_t from, uint32_t row,
                                          uint32_t chunk)
{
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];"
                 "\n\tcp.async.bulk.commit_group;" ::"l"(map),
                 "r"(0), "r"(row), "r"(chunk), "r"(from)
                 : "memory");
}

/* Shared memory that this thread's stores came from may be written again. */
__device__ __forceinline__ void stores_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* ---- wgmma descriptors: address, leading and stride offsets in units of 16 bytes ---- */

constexpr uint32_t SWIZZLE_128B =
    1u << 30;                         /* bits 62 and 63 of the descriptor, seen in its upper word */
constexpr uint32_t ATOM_BYTES = 1024; /* eight rows of 128 bytes */

__device__ __forceinline__ uint64_t descriptor(uint32_t low, uint32_t high)
{
    return (uint64_t)high << 32 | low;
}

/* K-major operand (rows are m or n, 64 columns of k a row): the next eight rows follow after one
 * atom; 16 columns of k further is 32 bytes further inside the swizzled row. The leading offset is
 * not used. */
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address)
{
    return descriptor((address & 0x3ffff) >> 4 | 1u << 16, SWIZZLE_128B | ATOM_BYTES >> 4);
}

/* MN-major operand (rows are k, 64 columns of n a row): the next eight rows of k follow after one
 * atom, the next 64 columns of n after `chunk_bytes`. */
template <uint32_t ChunkBytes>
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t address)
{
    return descriptor((address & 0x3ffff) >> 4 | (ChunkBytes >> 4) << 16,
                      SWIZZLE_128B | ATOM_BYTES >> 4);
}

/* ---- wgmma ---- */

/* Register writes before this line are seen by the wgmmas after it. */
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* All wgmmas of this warp, but those of the last `Pending` commits, have read their operands and
 * written their accumulators. */
template <int Pending = 0> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/* The compiler does not know that wgmma writes accumulators and reads register operands after its
 * asm statement: pin them behind the wait. */
template <int Count> __device__ __forceinline__ void pin(float *d)
{
#pragma unroll
    for (int i = 0; i < Count; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

template <int Count> __device__ __forceinline__ void pin(uint32_t *a)
{
#pragma unroll
    for (int i = 0; i < Count; i++)
        asm volatile("" : "+r"(a[i])::"memory");
}

/* d[] as asm operands, eight at a time. */
#define ACC8(i)                                                                                    \
    "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]),          \
        "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define ACC32(i) ACC8(i), ACC8((i) + 8), ACC8((i) + 16), ACC8((i) + 24)

#define LIST32                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64                                                                                     \
    LIST32                                                                                         \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"             \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST128                                                                                    \
    LIST64                                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
    "%127"

/* How B lies in shared memory: rows of n, 16 of k each, or rows of k, N of n each. */
constexpr int K_MAJOR = 0, MN_MAJOR = 1;

/* d[64 rows][N] = (or +=) A B, 16 deep. A: 64 rows, K-major, shared; B: shared. */
template <int N, int B>
__device__ __forceinline__ void wgmma_shared(float *d, uint64_t a, uint64_t b, uint32_t accumulate)
{
    static_assert(N == 64 || N == 128 || N == 256);
    if constexpr (N == 64)
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST32 "}, "
                     "%32, %33, p, 1, 1, 0, %35;\n\t}"
                     : ACC32(0)
                     : "l"(a), "l"(b), "r"(accumulate), "n"(B));
    if constexpr (N == 128)
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST64 "}, "
                     "%64, %65, p, 1, 1, 0, %67;\n\t}"
                     : ACC32(0), ACC32(32)
                     : "l"(a), "l"(b), "r"(accumulate), "n"(B));
    if constexpr (N == 256)
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %130, 0;\n\t"
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LIST128 "}, "
                     "%128, %129, p, 1, 1, 0, %131;\n\t}"
                     : ACC32(0), ACC32(32), ACC32(64), ACC32(96)
                     : "l"(a), "l"(b), "r"(accumulate), "n"(B));
}

/* d[64 rows][N] += A B, 16 deep. A: this warpgroup's registers; B: 16 rows of N columns, MN-major,
 * shared. */
template <int N>
__device__ __forceinline__ void wgmma_registers(float *d, const uint32_t *a, uint64_t b);

template <>
__device__ __forceinline__ void wgmma_registers<64>(float *d, const uint32_t *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST32 "}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : ACC32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void wgmma_registers<128>(float *d, const uint32_t *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST64 "}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : ACC32(0), ACC32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void wgmma_registers<256>(float *d, const uint32_t *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LIST128 "}, "
                 "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : ACC32(0), ACC32(32), ACC32(64), ACC32(96)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef LIST128
#undef LIST64
#undef LIST32
#undef ACC32
#undef ACC8

} // namespace sm90

#endif
