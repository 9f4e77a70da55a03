/* Checksums for AVX2. */
#include "checksum.h"

#if defined(__x86_64__)
#pragma GCC target("avx2")
#pragma GCC optimize("O3")
#include "checksum_body.h"

const struct skv_checksums *skv_checksums_avx2(void)
{
    static const struct skv_checksums checksums = {sum, sum_copy};
    return __builtin_cpu_supports("avx2") ? &checksums : NULL;
}
#else
const struct skv_checksums *skv_checksums_avx2(void)
{
    return NULL;
}
#endif
