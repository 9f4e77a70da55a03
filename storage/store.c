/* The store's write transactions: the writer thread's part.
 *
 * The happy path: begin, a few pages in ascending order, the user's record moved forward, commit.
 * A page is zeroed past its valid slots, gets its trailer, and is copied and summed in one pass
 * into LMDB's dirty pages, from where commit writes it to the file. Failure: the transaction is
 * aborted at once, later calls of it return the same status, and the store is as it was.
 *
 * The header in front of a page that is replaced or removed says how much LMDB will free, and only
 * LMDB's word stands behind it; ours is compared with it first, and put in its place.
 *
 * Puts are refused above SKV_STORE_FULL_PERCENT of the map: removing needs a few fresh pages of the
 * tree, so a map filled to the brim could never be emptied again. */
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "hash.h"
#include "log.h"
#include "store_private.h"

/* Free disk below this, besides what a commit had to write, makes an I/O error "disk full". */
#define DISK_SLACK_BYTES (UINT64_C(4) << 20)

static int fail(struct skv_store *store, int status)
{
    if (store->txn)
        mdb_txn_abort(store->txn);
    store->txn = NULL;
    store->failed = status;
    return status;
}

static int fail_lmdb(struct skv_store *store, const char *what, int rc)
{
    return fail(store, skv_lmdb_status(what, rc));
}

int skv_store_begin(struct skv_store *store)
{
    store->failed = 0;
    store->dirty_bytes = 0;
    if (store->txn) {
        skv_error("store: begin within a transaction");
        return SKV_EINVAL;
    }
    if (!store->env)
        return SKV_EIO;
    return skv_begin_status(store, "beginning a transaction",
                            mdb_txn_begin(store->env, NULL, 0, &store->txn));
}

/* What every write call begins with: 0, or why the transaction is over. */
static int check_open(const struct skv_store *store)
{
    if (store->txn)
        return 0;
    return store->failed ? store->failed : SKV_EINVAL;
}

static bool is_full(struct skv_store *store)
{
    MDB_stat pages;
    if (mdb_stat(store->txn, store->pages, &pages))
        return false;
    uint64_t used = store->tree_bytes + store->extent_bytes +
                    (pages.ms_branch_pages + pages.ms_leaf_pages + pages.ms_overflow_pages) *
                        (uint64_t)LMDB_PAGE_BYTES;
    bool full = used > store->map_bytes / 100 * SKV_STORE_FULL_PERCENT;
    if (full && !store->full_said)
        skv_warn("store: full: %.2f of %.2f GiB in use; puts are refused until users are evicted",
                 (double)used / (1u << 30), (double)store->map_bytes / (1u << 30));
    store->full_said |= full;
    return full;
}

/* [layer][K|V][head][token][dim]: every run of `page_tokens` tokens keeps its first `valid`. */
static void zero_past_valid(const struct skv_geometry *g, uint8_t *page, uint32_t valid)
{
    size_t token_bytes = (size_t)g->head_dim * 2, run_bytes = token_bytes * g->page_tokens;
    size_t keep = token_bytes * valid, runs = (size_t)g->layers * 2 * g->heads;
    for (size_t run = 0; run < runs && keep < run_bytes; run++)
        memset(page + run * run_bytes + keep, 0, run_bytes - keep);
}

/* `value` is about to be freed: its extent's header must say what it is. One that does not (the
 * disk did that) is written anew, behind LMDB's map. */
static int mend_header(const struct skv_store *store, const MDB_val *value)
{
    uint64_t at = (uintptr_t)value->mv_data - (uintptr_t)store->map - LMDB_PAGE_HEADER;
    struct {
        uint64_t number;
        uint16_t unused, flags;
        uint32_t pages;
    } is, should = {at / LMDB_PAGE_BYTES, 0, LMDB_OVERFLOW,
                    (uint32_t)(store->extent_bytes / LMDB_PAGE_BYTES)};
    _Static_assert(sizeof is == LMDB_PAGE_HEADER, "LMDB's page header");
    if (at >= store->map_bytes)
        return 0; /* put by this transaction: not in the map yet */
    memcpy(&is, store->map + at, sizeof is);
    if (is.number == should.number && is.flags == should.flags && is.pages == should.pages)
        return 0;
    char file[64];
    snprintf(file, sizeof file, "/proc/self/fd/%d", store->file);
    int fd = open(file, O_WRONLY | O_CLOEXEC);
    ssize_t wrote = fd < 0 ? -1 : pwrite(fd, &should, sizeof should, (off_t)at);
    if (fd >= 0)
        close(fd);
    skv_warn("store: the header of the page at %llu was damaged; %s", (unsigned long long)at,
             wrote == sizeof should ? "it is written anew" : "it cannot be written anew");
    return wrote == sizeof should ? 0 : EIO;
}

int skv_store_put_page(struct skv_store *store, const struct skv_record *user, uint32_t index,
                       uint32_t valid, uint64_t generation, uint64_t hash, void *page)
{
    int rc = check_open(store);
    if (rc)
        return rc;
    if (valid == 0 || valid > store->geometry.page_tokens || index >= SKV_MAX_USER_PAGES) {
        skv_error("store: put of page %u with %u tokens", index, valid);
        return fail(store, SKV_EINVAL);
    }
    if (is_full(store))
        return fail(store, SKV_ENOSPC);
    struct skv_trailer trailer = {
        .model = user->model,
        .user = user->user,
        .index = index,
        .valid = valid,
        .generation = generation,
        .hash = hash,
    };
    struct skv_key space;
    MDB_val key = skv_page_key(&space, user->model, user->user, index);
    MDB_val value = {store->value_bytes, NULL}, old;
    rc = mdb_get(store->txn, store->pages, &key, &old);
    rc = rc == 0 ? mend_header(store, &old) : rc == MDB_NOTFOUND ? 0 : rc;
    if (rc == 0)
        rc = mdb_put(store->txn, store->pages, &key, &value, MDB_RESERVE);
    if (rc)
        return fail_lmdb(store, "putting a page", rc);
    const size_t summed = store->value_bytes - sizeof trailer.checksum;
    uint8_t *from = page, *to = value.mv_data;
    zero_past_valid(&store->geometry, from, valid);
    memcpy(from + store->page_bytes, &trailer, sizeof trailer);
    trailer.checksum = skv_checksum_copy(to, from, summed);
    memcpy(from + summed, &trailer.checksum, sizeof trailer.checksum);
    memcpy(to + summed, &trailer.checksum, sizeof trailer.checksum);
    store->dirty_bytes += store->extent_bytes;
    return 0;
}

/* Removes a user's pages from `first` on. */
static int remove_pages(struct skv_store *store, const struct skv_record *user, uint32_t first)
{
    MDB_cursor *cursor;
    int rc = mdb_cursor_open(store->txn, store->pages, &cursor);
    if (rc)
        return rc;
    struct skv_key wanted;
    MDB_val key = skv_page_key(&wanted, user->model, user->user, first), value;
    while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE)) == 0) {
        if (key.mv_size != PAGE_KEY_BYTES || memcmp(key.mv_data, wanted.bytes, USER_KEY_BYTES) != 0)
            break;
        rc = mend_header(store, &value);
        if (rc == 0)
            rc = mdb_cursor_del(cursor, 0);
        if (rc)
            break;
        key = (MDB_val){PAGE_KEY_BYTES, wanted.bytes};
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? 0 : rc;
}

int skv_store_put_record(struct skv_store *store, const struct skv_record *record,
                         const uint64_t *hashes)
{
    int rc = check_open(store);
    if (rc)
        return rc;
    if (record->tokens > SKV_MAX_TOKENS) {
        skv_error("store: put of a record with %u tokens", record->tokens);
        return fail(store, SKV_EINVAL);
    }
    uint32_t pages = skv_store_pages(store, record->tokens);
    struct skv_key space;
    MDB_val key = skv_user_key(&space, record->model, record->user);
    rc = remove_pages(store, record, pages);
    if (rc)
        return fail_lmdb(store, "removing pages", rc);
    if (record->tokens == 0) {
        rc = mdb_del(store->txn, store->users, &key, NULL);
        return rc && rc != MDB_NOTFOUND ? fail_lmdb(store, "removing a user", rc) : 0;
    }
    uint8_t bytes[MAX_RECORD_BYTES];
    struct skv_record head = *record;
    MDB_val value = {sizeof head + pages * sizeof *hashes, bytes};
    head.reserved = 0;
    memcpy(bytes, &head, sizeof head);
    memcpy(bytes + sizeof head, hashes, pages * sizeof *hashes);
    head.reserved = (uint32_t)skv_checksum(bytes, value.mv_size);
    memcpy(bytes, &head, sizeof head);
    rc = mdb_put(store->txn, store->users, &key, &value, 0);
    return rc ? fail_lmdb(store, "putting a record", rc) : 0;
}

int skv_store_put_generation(struct skv_store *store, uint64_t high_water)
{
    int rc = check_open(store);
    if (rc)
        return rc;
    MDB_val key = {strlen(SKV_GENERATION_KEY), SKV_GENERATION_KEY},
            value = {sizeof high_water, &high_water};
    rc = mdb_put(store->txn, store->meta, &key, &value, 0);
    return rc ? fail_lmdb(store, "putting the generation", rc) : 0;
}

/* LMDB calls a short write EIO, and a full disk begins with one. */
static int disk_full(const struct skv_store *store, int rc)
{
    struct statvfs disk;
    if (rc == EIO && fstatvfs(store->file, &disk) == 0 &&
        disk.f_bavail * disk.f_frsize < store->dirty_bytes + DISK_SLACK_BYTES)
        return ENOSPC;
    return rc;
}

int skv_store_commit(struct skv_store *store)
{
    int rc = check_open(store);
    if (rc)
        return rc;
    MDB_txn *txn = store->txn;
    store->txn = NULL; /* commit ends it, whatever it returns */
    struct skv_usage usage = skv_store_measure(store, txn);
    rc = mdb_txn_commit(txn);
    if (rc) {
        if (mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn) == 0)
            mdb_txn_abort(txn);
        else /* LMDB gave up: the meta page may be anything */
            store->broken = true;
        return fail_lmdb(store, "committing", disk_full(store, rc));
    }
    store->full_said &= store->dirty_bytes == 0;
    skv_store_publish(store, usage);
    return 0;
}

void skv_store_abort(struct skv_store *store)
{
    if (store->txn)
        mdb_txn_abort(store->txn);
    store->txn = NULL;
    store->failed = 0;
}
