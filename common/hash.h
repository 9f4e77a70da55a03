/* The three hashes of the project, all XXH3: chain hashes of tokens, keys of named users, checksums
 * of pages. */
#ifndef SKV_HASH_H
#define SKV_HASH_H

#include "sidekv.h"

/* What stands before page 0 of a user's chain. */
uint64_t skv_chain_start(struct skv_id model, struct skv_id user);
/* One link: `count` tokens after `previous`. */
uint64_t skv_chain_link(uint64_t previous, const uint64_t *tokens, uint32_t count);
/* XXH3_64 of bytes: page trailers, descriptors. */
uint64_t skv_checksum(const void *bytes, size_t count);
/* Copies and sums in one pass over memory; the sum of what arrived. */
uint64_t skv_checksum_copy(void *to, const void *from, size_t count);
/* XXH3_128 of bytes: fingerprints, named users. */
struct skv_id skv_digest(const void *bytes, size_t count);

static inline bool skv_id_equal(struct skv_id a, struct skv_id b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

static inline bool skv_id_is_zero(struct skv_id a)
{
    return (a.lo | a.hi) == 0;
}

#endif
