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
    /* H100, cuBLASLt 13.1.0; UVQK (0), then projection (1); microseconds, and the first offer's */
    {130100, 0, 1024, 4096, 1024, 2},  /* 13.4, 14.6 */
    {130100, 0, 8704, 4096, 1024, 4},  /* 107.5, 118.9 */
    {130100, 0, 9216, 4096, 1024, 6},  /* 114.3, 118.0 */
    {130100, 0, 10240, 4096, 1024, 7}, /* 122.7, 132.2 */
    {130100, 0, 17408, 4096, 1024, 6}, /* 201.0, 216.6 */
    {130100, 0, 18432, 4096, 1024, 7}, /* 211.4, 245.7 */
    {130100, 1, 2304, 1024, 1024, 3},  /* 9.6, 10.5 */
    {130100, 1, 4096, 1024, 1024, 2},  /* 13.5, 14.7 */
    {130100, 1, 6144, 1024, 1024, 2},  /* 21.4, 22.4 */
    {130100, 1, 8704, 1024, 1024, 3},  /* 33.9, 35.9 */
    {130100, 1, 9216, 1024, 1024, 1},  /* 33.8, 35.8 */
    {130100, 1, 17408, 1024, 1024, 5}, /* 60.4, 68.5 */
    {130100, 1, 18432, 1024, 1024, 4}, /* 62.7, 73.2 */
    {130100, 1, 34816, 1024, 1024, 3}, /* 121.6, 141.1 */
};

#endif
