/* Checksums: XXH3, whatever they were compiled for, and the same when they copy. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "checksum.h"
#include "hash.h"

#define BYTES 100000u

static uint8_t from[BYTES], to[BYTES + 1];

static void fill(void)
{
    for (size_t i = 0; i < BYTES; i++)
        from[i] = (uint8_t)(i * 2654435761u >> 13);
}

TestSuite(checksum, .init = fill);

Test(checksum, is_the_librarys_xxh3_at_every_length)
{
    for (size_t count = 0; count <= BYTES; count += count < 3000 ? 1 : 977)
        cr_assert_eq(skv_checksum(from, count), XXH3_64bits(from, count), "%zu bytes", count);
}

Test(checksum, copying_gives_the_same_sum_and_the_bytes_and_no_byte_more)
{
    for (size_t count = 0; count <= BYTES; count += count < 3000 ? 1 : 977) {
        memset(to, 0xaa, sizeof to);
        cr_assert_eq(skv_checksum_copy(to, from, count), XXH3_64bits(from, count));
        cr_assert_eq(memcmp(to, from, count), 0);
        cr_assert_eq(to[count], 0xaa);
    }
}

Test(checksum, avx2_and_portable_agree)
{
    const struct skv_checksums *avx2 = skv_checksums_avx2();
    if (!avx2)
        cr_skip("no AVX2 here");
    cr_assert_eq(avx2->sum(from, BYTES), XXH3_64bits(from, BYTES));
    cr_assert_eq(avx2->sum_copy(to, from, BYTES), XXH3_64bits(from, BYTES));
}
