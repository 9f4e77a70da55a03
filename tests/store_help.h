/* What the tests of store, direct and pinner share: a directory to throw away, users whose every
 * byte and hash follows from their number. */
#ifndef SKV_STORE_HELP_H
#define SKV_STORE_HELP_H

#include <criterion/criterion.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hash.h"
#include "store.h"

/* 32 KiB a page. */
#define TINY            ((struct skv_geometry){.layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32})
#define TINY_PAGE_BYTES 32768u
#define MODEL           ((struct skv_id){.lo = 0x5eed, .hi = 7})
#define MIB             (UINT64_C(1) << 20)

static inline void temp_directory(char path[256])
{
    const char *base = getenv("TMPDIR");
    snprintf(path, 256, "%s/sidekv-test-XXXXXX", base && *base ? base : "/tmp");
    cr_assert_not_null(mkdtemp(path));
}

static inline int remove_one(const char *path, const struct stat *st, int kind, struct FTW *walk)
{
    (void)st, (void)kind, (void)walk;
    return remove(path);
}

static inline void remove_directory(const char *path)
{
    nftw(path, remove_one, 8, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

static inline int try_open(const char *path, uint64_t map_bytes, enum skv_durability durability,
                           struct skv_store **store)
{
    struct skv_store_options options = {
        .path = path, .geometry = TINY, .map_bytes = map_bytes, .durability = durability};
    return skv_store_open(&options, store);
}

static inline struct skv_store *open_store(const char *path, uint64_t map_bytes)
{
    struct skv_store *store;
    cr_assert_eq(try_open(path, map_bytes, SKV_PROCESS, &store), 0);
    return store;
}

/* ---- users: `version` changes every byte, as a recomputed history would ---- */

struct user {
    struct skv_id id;
    uint32_t version;
};

static inline struct user user_of(uint64_t id)
{
    return (struct user){.id = {.lo = id, .hi = id * 3}};
}

static inline void fill_tokens(struct user u, uint32_t count, uint64_t *tokens)
{
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = u.id.lo * 1000003 + u.version * 77 + i;
}

static inline uint32_t user_hashes(struct user u, uint32_t tokens, uint64_t *hashes)
{
    uint64_t *all = calloc(tokens + 1, sizeof *all);
    fill_tokens(u, tokens, all);
    uint32_t count = skv_chain_hashes(MODEL, u.id, TINY.page_tokens, all, tokens, 0, hashes);
    free(all);
    return count;
}

/* Byte `at` of page `index`. */
static inline void fill_page(struct user u, uint32_t index, uint8_t *page)
{
    uint64_t x = (u.id.lo << 20 | index) * UINT64_C(0x9e3779b97f4a7c15) + u.version;
    for (uint32_t at = 0; at < TINY_PAGE_BYTES; at += 8) {
        x ^= x >> 31;
        x *= UINT64_C(0xbf58476d1ce4e5b9);
        x += at;
        memcpy(page + at, &x, 8);
    }
}

static inline uint32_t page_valid(uint32_t tokens, uint32_t index)
{
    uint32_t rest = tokens - index * TINY.page_tokens;
    return rest < TINY.page_tokens ? rest : TINY.page_tokens;
}

static inline struct skv_record record_of(struct user u, uint32_t tokens, const uint64_t *hashes)
{
    uint32_t pages = (tokens + TINY.page_tokens - 1) / TINY.page_tokens;
    uint32_t full = tokens / TINY.page_tokens;
    return (struct skv_record){
        .model = MODEL,
        .user = u.id,
        .generation = 10 + u.version,
        .hash_full = full ? hashes[full - 1] : skv_chain_start(MODEL, u.id),
        .hash_tail = pages ? hashes[pages - 1] : 0,
        .last_use_s = 1700000000 + u.id.lo,
        .tokens = tokens,
    };
}

/* Puts pages [first, ceil(tokens / S)) and the record in the open transaction. */
static inline int put_user(struct skv_store *store, struct user u, uint32_t first, uint32_t tokens)
{
    static _Thread_local uint8_t page[TINY_PAGE_BYTES + SKV_TRAILER_BYTES];
    uint64_t hashes[SKV_MAX_USER_PAGES];
    uint32_t pages = user_hashes(u, tokens, hashes);
    struct skv_record record = record_of(u, tokens, hashes);
    for (uint32_t index = first; index < pages; index++) {
        fill_page(u, index, page);
        int rc = skv_store_put_page(store, &record, index, page_valid(tokens, index),
                                    record.generation, hashes[index], page);
        if (rc)
            return rc;
    }
    return skv_store_put_record(store, &record, hashes);
}

static inline int store_user(struct skv_store *store, struct user u, uint32_t first,
                             uint32_t tokens)
{
    int rc = skv_store_begin(store);
    if (rc)
        return rc;
    rc = put_user(store, u, first, tokens);
    if (rc == 0)
        return skv_store_commit(store);
    skv_store_abort(store);
    return rc;
}

static inline int remove_user(struct skv_store *store, struct user u)
{
    struct skv_record record = {.model = MODEL, .user = u.id};
    int rc = skv_store_begin(store);
    if (rc == 0)
        rc = skv_store_put_record(store, &record, NULL);
    if (rc == 0)
        return skv_store_commit(store);
    skv_store_abort(store);
    return rc;
}

/* Tokens of this user that the snapshot holds, every page of them checked; 0: no such user. */
static inline uint32_t check_user(struct skv_reader *reader, struct user u)
{
    uint64_t stored[SKV_MAX_USER_PAGES], hashes[SKV_MAX_USER_PAGES];
    struct skv_record record;
    uint32_t count = 0;
    int rc = skv_reader_record(reader, MODEL, u.id, &record, stored, SKV_MAX_USER_PAGES, &count);
    if (rc == SKV_ENOENT)
        return 0;
    cr_assert_eq(rc, 0);
    cr_assert_eq(user_hashes(u, record.tokens, hashes), count);
    cr_assert_eq(memcmp(stored, hashes, count * sizeof *hashes), 0);
    for (uint32_t index = 0; index < count; index++) {
        struct skv_location where;
        cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, index, &where), 0, "page %u", index);
        cr_assert_eq(skv_page_verify(where.value, TINY_PAGE_BYTES, MODEL, u.id, index,
                                     page_valid(record.tokens, index), hashes[index],
                                     record.generation),
                     0, "page %u", index);
    }
    return record.tokens;
}

static inline uint32_t tokens_of(struct skv_store *store, struct user u)
{
    struct skv_reader *reader;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    uint32_t tokens = check_user(reader, u);
    skv_reader_close(reader);
    return tokens;
}

#endif
