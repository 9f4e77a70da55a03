/* The instruction sets that checksums are compiled for; hash.h is what others call. */
#ifndef SKV_CHECKSUM_H
#define SKV_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

struct skv_checksums {
    uint64_t (*sum)(const void *bytes, size_t count);
    uint64_t (*sum_copy)(void *to, const void *from, size_t count);
};

/* NULL where this CPU has no AVX2. */
const struct skv_checksums *skv_checksums_avx2(void);

#endif
