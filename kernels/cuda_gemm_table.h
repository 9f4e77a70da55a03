/* cuBLASLt algorithms that beat the heuristic's first: which of its offers to take, for one version
 * of the library. Written by `bench_gemm --tune`; a shape or version that is not here takes the
 * first. */
#ifndef HSTU_CUDA_GEMM_TABLE_H
#define HSTU_CUDA_GEMM_TABLE_H

static const struct {
    size_t version;
    int product; /* enum hstu_product */
    uint32_t rows, n, k, choice;
} gemm_table[] = {
    /* H200, cuBLASLt 13.1.0; UVQK (0), then projection (1); microseconds, and the first offer's */
    {130100, 0, 4352, 4096, 1024, 3},  /* 55.0, 58.0 */
    {130100, 0, 8704, 4096, 1024, 1},  /* 106.6, 110.9 */
    {130100, 0, 9216, 4096, 1024, 1},  /* 107.7, 112.8 */
    {130100, 0, 18432, 4096, 1024, 1}, /* 211.8, 221.4 */
    {130100, 1, 8704, 1024, 1024, 3},  /* 29.4, 30.9 */
    {130100, 1, 9216, 1024, 1024, 3},  /* 31.3, 32.8 */
    {130100, 1, 17408, 1024, 1024, 3}, /* 54.4, 57.3 */
    {130100, 1, 18432, 1024, 1024, 2}, /* 56.5, 63.0 */
    {130100, 1, 34816, 1024, 1024, 3}, /* 103.1, 115.3 */
};

#endif
