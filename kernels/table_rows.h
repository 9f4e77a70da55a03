/* Which rows of the embedding and position tables a query row is the sum of, for the CPU and for
 * pull. */
#ifndef HSTU_TABLE_ROWS_H
#define HSTU_TABLE_ROWS_H

#include <stdint.h>

#ifdef __CUDACC__
#define HSTU_EITHER_SIDE static inline __host__ __device__
#else
#define HSTU_EITHER_SIDE static inline
#endif

/* The finalizer of SplitMix64: a bijection of 64 bits that looks random on counters. */
HSTU_EITHER_SIDE uint64_t hstu_mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* A token's row of an embedding table of `rows` rows, a power of two. */
HSTU_EITHER_SIDE uint32_t hstu_mix_row(uint64_t token, uint32_t rows)
{
    return (uint32_t)hstu_mix(token + UINT64_C(0x9e3779b97f4a7c15)) & (rows - 1);
}

/* idx(i) = min(i + c, high), high = min(h, K-1): all candidates share position h. */
HSTU_EITHER_SIDE uint32_t hstu_position(uint32_t row, uint32_t cached, uint32_t history,
                                        uint32_t buckets)
{
    uint32_t high = history < buckets - 1 ? history : buckets - 1;
    return row + cached < high ? row + cached : high;
}

#endif
