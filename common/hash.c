#include "hash.h"

#include <string.h>
#include <xxhash.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are hashed little-endian");

uint64_t skv_chain_start(struct skv_id model, struct skv_id user)
{
    struct skv_id both[2] = {model, user};
    return XXH3_64bits(both, sizeof both);
}

uint64_t skv_chain_link(uint64_t previous, const uint64_t *tokens, uint32_t count)
{
    return XXH3_64bits_withSeed(tokens, (size_t)count * sizeof *tokens, previous);
}

struct skv_id skv_digest(const void *bytes, size_t count)
{
    XXH128_hash_t hash = XXH3_128bits(bytes, count);
    return (struct skv_id){.lo = hash.low64, .hi = hash.high64};
}

struct skv_id skv_user_string(const char *name)
{
    return skv_digest(name, strlen(name));
}

uint32_t skv_chain_hashes(struct skv_id model, struct skv_id user, uint32_t page_tokens,
                          const uint64_t *tokens, uint32_t history, uint32_t first_page,
                          uint64_t *hashes)
{
    uint32_t pages = (history + page_tokens - 1) / page_tokens;
    uint64_t previous = first_page ? hashes[first_page - 1] : skv_chain_start(model, user);
    for (uint32_t page = first_page; page < pages; page++) {
        uint32_t start = page * page_tokens;
        uint32_t count = history - start < page_tokens ? history - start : page_tokens;
        previous = hashes[page] = skv_chain_link(previous, tokens + start, count);
    }
    return pages;
}
