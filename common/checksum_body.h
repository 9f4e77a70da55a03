/* Sums of pages, compiled once for each instruction set: the same numbers from all of them. The
 * system's libxxhash is compiled for the oldest x86-64 and sums 2 to 4 GB/s; this is 10 (portable)
 * and 19 (AVX2) on the same core, and a page is summed on its way to disk and on its way back. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <string.h>

#include "checksum.h"

#define CHUNK_BYTES 16384u /* copied, then summed while it is in the first-level cache */

static uint64_t sum(const void *bytes, size_t count)
{
    return XXH3_64bits(bytes, count);
}

static uint64_t sum_copy(void *to, const void *from, size_t count)
{
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    for (size_t at = 0; at < count; at += CHUNK_BYTES) {
        size_t chunk = count - at < CHUNK_BYTES ? count - at : CHUNK_BYTES;
        memcpy((char *)to + at, (const char *)from + at, chunk);
        XXH3_64bits_update(&state, (const char *)to + at, chunk);
    }
    return XXH3_64bits_digest(&state);
}
