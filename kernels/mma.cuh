/* The few PTX instructions that the portable kernels are made of (compute capability 8.0 and up):
 * asynchronous 16-byte copies to shared memory, 8x8 matrix loads, and the bf16 matrix product
 * m16n8k16 with fp32 accumulators. Tiles in shared memory are rows of 16-byte chunks, each chunk at
 * its column XOR the row's low bits, so that the eight rows of a matrix load hit all banks once. */
#ifndef HSTU_MMA_CUH
#define HSTU_MMA_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace mma
{

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes, global to shared; zeros where `valid` is false (the source is not touched then). */
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Byte offset of 16-byte chunk `chunk` of row `row` in a tile whose rows have CHUNKS of them, a
 * multiple of 8. */
template <int CHUNKS> __device__ __forceinline__ uint32_t tile_offset(uint32_t row, uint32_t chunk)
{
    static_assert(CHUNKS % 8 == 0, "the swizzle permutes groups of eight chunks");
    return (row * CHUNKS + (chunk ^ (row & 7))) * 16;
}

__device__ __forceinline__ void load4(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load4_transposed(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/* c += a b: a 16x16 (rows by k), b 16x8 (k by columns). Lane l holds c at rows l/4 and l/4 + 8,
 * columns 2(l%4) and the next. */
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two floats rounded to bf16, the first in the low half. */
__device__ __forceinline__ uint32_t pack(float low, float high)
{
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&both);
}

__device__ __forceinline__ float2 unpack(uint32_t both)
{
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}

/* x * sigmoid(x) by ex2 and rcp: right to a few units of fp32's last place. Every finite x gives a
 * finite value: where ex2 overflows, rcp gives zero. */
__device__ __forceinline__ float silu(float x)
{
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return x * r;
}

/* The same of two values by one rcp, of both denominators' product: the special function unit is
 * what SiLU waits for. Below -41 ex2 is held at 2^60, so that the product is finite; x 2^-60 is as
 * good as zero. A value's last bits depend on the other one: not where that is masked. */
__device__ __forceinline__ float2 silu(float2 x)
{
    float e, f, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x.x));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(-1.4426950408889634f * x.y));
    const float a = 1.0f + fminf(e, 0x1p60f), b = 1.0f + fminf(f, 0x1p60f);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a * b));
    return make_float2(x.x * (r * b), x.y * (r * a));
}

/* Programmatic dependent launch, from 9.0 on; nothing in an ordinary launch. Above the wait a
 * kernel reads nothing that the one before it writes, and writes nothing. */
__device__ __forceinline__ void dependency_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next kernel's blocks may start, once every block of this one has said so. */
__device__ __forceinline__ void dependency_trigger()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Of a launch whose blocks may start so. */
inline cudaLaunchAttribute early_start()
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
}

} // namespace mma

#endif
