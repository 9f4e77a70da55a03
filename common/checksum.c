/* Checksums for any CPU, and the choice of the fastest for this one. */
#pragma GCC optimize("O3")
#include "checksum_body.h"

#include "hash.h"

static const struct skv_checksums *chosen(void)
{
    static const struct skv_checksums portable = {sum, sum_copy};
    const struct skv_checksums *avx2 = skv_checksums_avx2();
    return avx2 ? avx2 : &portable;
}

uint64_t skv_checksum(const void *bytes, size_t count)
{
    return chosen()->sum(bytes, count);
}

uint64_t skv_checksum_copy(void *to, const void *from, size_t count)
{
    return chosen()->sum_copy(to, from, count);
}
