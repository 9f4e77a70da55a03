/* Tensor maps, as TMA wants them: where a matrix lies and which boxes of it are moved. Host only.
 */
#ifndef HSTU_TENSOR_MAP_CUH
#define HSTU_TENSOR_MAP_CUH

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

extern "C" {
#include "log.h"
}
#include "hstu.h"

namespace
{

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

/* Row-major bf16 [rows][columns] as {64, rows, columns / 64}, in boxes of `box_rows` by
 * `box_chunks`: a box lies in shared memory as chunks of swizzled rows, as wgmma wants it. Rows
 * past the end read as zeros. SKV_EDEVICE, logged. */
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
    skv_error("tensor map %llu x %llu, box %u x %u: driver error %d", (unsigned long long)rows,
              (unsigned long long)columns, box_rows, box_chunks, (int)result);
    return SKV_EDEVICE;
}

} // namespace

#endif
