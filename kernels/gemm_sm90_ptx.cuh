/* What the products on Hopper need beyond sm90_ptx.cuh: wgmma with both operands in shared memory
 * and b as it lies, matrix stores. */
#ifndef HSTU_GEMM_SM90_PTX_CUH
#define HSTU_GEMM_SM90_PTX_CUH

#include "sm90_ptx.cuh"

namespace
{

#define ACC8(i)                                                                                    \
    "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]),          \
        "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define ACC32(i) ACC8(i), ACC8((i) + 8), ACC8((i) + 16), ACC8((i) + 24)
#define LIST32                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST128                                                                                    \
    LIST64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "    \
           "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "      \
           "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "      \
           "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "  \
           "%124, %125, %126, %127"

/* d[64 rows][N] = (or +=) a b, 16 deep; a K-major, b MN-major, both in shared memory. */
template <int N>
__device__ __forceinline__ void multiply(float *d, uint64_t a, uint64_t b, uint32_t accumulate);

template <>
__device__ __forceinline__ void multiply<64>(float *d, uint64_t a, uint64_t b, uint32_t accumulate)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST32 "}, "
                 "%32, %33, p, 1, 1, 0, 1;\n\t}"
                 : ACC32(0)
                 : "l"(a), "l"(b), "r"(accumulate));
}

template <>
__device__ __forceinline__ void multiply<128>(float *d, uint64_t a, uint64_t b, uint32_t accumulate)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST64 "}, "
                 "%64, %65, p, 1, 1, 0, 1;\n\t}"
                 : ACC32(0), ACC32(32)
                 : "l"(a), "l"(b), "r"(accumulate));
}

template <>
__device__ __forceinline__ void multiply<256>(float *d, uint64_t a, uint64_t b, uint32_t accumulate)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %130, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LIST128 "}, "
                 "%128, %129, p, 1, 1, 0, 1;\n\t}"
                 : ACC32(0), ACC32(32), ACC32(64), ACC32(96)
                 : "l"(a), "l"(b), "r"(accumulate));
}

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

#undef LIST128
#undef LIST64
#undef LIST32
#undef ACC32
#undef ACC8

} // namespace

#endif
