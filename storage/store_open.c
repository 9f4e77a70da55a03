/* Opening and closing the store: whose directory it is, whether data.mdb may be trusted, where its
 * map lies.
 *
 * The happy path: lock and read sidekv.store, have a child process check data.mdb (store_check.c),
 * mark it unclean, open the environment, make the databases, extend the file to the map. Failure: a
 * directory that is not ours, another geometry with users in it, another daemon: refused,
 * untouched. Files of ours that cannot be trusted (unclean reboot under `process`, a check that did
 * not pass, a tree that LMDB found damaged while it was in use): removed, logged, counted, made
 * new. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "log.h"
#include "store_private.h"

#define MIN_MAP_BYTES (UINT64_C(64) << 20)

int skv_lmdb_status(const char *what, int rc)
{
    int status;
    switch (rc) {
    case MDB_SUCCESS:
        return SKV_OK;
    case MDB_NOTFOUND:
        return SKV_ENOENT;
    case MDB_MAP_FULL:
        status = SKV_ENOSPC;
        break;
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
    case MDB_VERSION_MISMATCH:
    case MDB_INCOMPATIBLE:
    case MDB_BAD_VALSIZE:
        status = SKV_ECORRUPT;
        break;
    case MDB_TXN_FULL:
    case MDB_READERS_FULL:
        status = SKV_ENOMEM;
        break;
    default:
        status = skv_errno_status(rc);
    }
    skv_error("store: %s: %s", what, mdb_strerror(rc));
    return status;
}

int skv_begin_status(struct skv_store *store, const char *what, int rc)
{
    if (rc == MDB_PANIC && atomic_exchange(&store->broken, true))
        return SKV_EIO; /* that was said */
    return skv_lmdb_status(what, rc);
}

static void put_big_endian(uint8_t *at, struct skv_id id)
{
    uint64_t hi = __builtin_bswap64(id.hi), lo = __builtin_bswap64(id.lo);
    memcpy(at, &hi, 8);
    memcpy(at + 8, &lo, 8);
}

MDB_val skv_user_key(struct skv_key *key, struct skv_id model, struct skv_id user)
{
    put_big_endian(key->bytes, model);
    put_big_endian(key->bytes + 16, user);
    return (MDB_val){USER_KEY_BYTES, key->bytes};
}

MDB_val skv_page_key(struct skv_key *key, struct skv_id model, struct skv_id user, uint32_t index)
{
    uint32_t last = __builtin_bswap32(index);
    skv_user_key(key, model, user);
    memcpy(key->bytes + USER_KEY_BYTES, &last, 4);
    return (MDB_val){PAGE_KEY_BYTES, key->bytes};
}

static uint64_t tree_pages(MDB_txn *txn, MDB_dbi dbi)
{
    MDB_stat stat;
    if (mdb_stat(txn, dbi, &stat))
        return 0;
    return stat.ms_branch_pages + stat.ms_leaf_pages + stat.ms_overflow_pages;
}

struct skv_usage skv_store_measure(const struct skv_store *store, MDB_txn *txn)
{
    /* 0 and 1 are LMDB's free list and its directory of databases; two more pages are its metas. */
    uint64_t trees = 2 + tree_pages(txn, 0) + tree_pages(txn, 1) + tree_pages(txn, store->users) +
                     tree_pages(txn, store->meta);
    return (struct skv_usage){.trees = trees * LMDB_PAGE_BYTES,
                              .pages = tree_pages(txn, store->pages) * LMDB_PAGE_BYTES};
}

void skv_store_publish(struct skv_store *store, struct skv_usage usage)
{
    MDB_envinfo info;
    mdb_env_info(store->env, &info);
    store->tree_bytes = usage.trees;
    store->last_transaction = info.me_last_txnid;
    atomic_store_explicit(&store->used, usage.trees + usage.pages, memory_order_relaxed);
    atomic_store_explicit(&store->high_water, (info.me_last_pgno + 1) * LMDB_PAGE_BYTES,
                          memory_order_relaxed);
}

/* LMDB calls this, then aborts the process: all that can be saved is the next start. */
static void on_assert(MDB_env *env, const char *text)
{
    struct skv_store *store = mdb_env_get_userctx(env);
    skv_error("store: LMDB found its tree damaged and gives up (%s); the next start begins cold",
              text);
    store->state.damaged = true;
    skv_state_write(&store->state);
}

static int remove_data(const char *path, const char *why)
{
    static const char *const names[] = {"data.mdb", "lock.mdb"};
    skv_warn("store %s: starting cold: %s; its old data is removed", path, why);
    for (int i = 0; i < 2; i++) {
        char file[PATH_MAX];
        snprintf(file, sizeof file, "%s/%s", path, names[i]);
        if (unlink(file) < 0 && errno != ENOENT) {
            int error = errno;
            skv_error("store: cannot remove %s: %s", file, strerror(error));
            return skv_errno_status(error);
        }
    }
    return skv_sync_directory(path); /* before anything says that what is there may be trusted */
}

static bool has_data(const char *path)
{
    char file[PATH_MAX];
    snprintf(file, sizeof file, "%s/data.mdb", path);
    return access(file, F_OK) == 0;
}

/* May data.mdb be opened? NULL, or why not. */
static const char *distrust(const struct skv_state *state)
{
    char boot[40];
    skv_boot_id(boot);
    if (state->damaged)
        return "LMDB found its tree damaged while it was in use";
    if (!state->clean && state->durability == SKV_PROCESS &&
        (strcmp(boot, state->boot) != 0 || strcmp(boot, "unknown") == 0))
        return "the machine went down under durability process while it was in use";
    return NULL;
}

/* The map's base. LMDB does not tell it, but every page in it begins with its own number. */
static int find_map(struct skv_store *store, MDB_txn *txn)
{
    MDB_val key = {strlen(SKV_GENERATION_KEY), SKV_GENERATION_KEY}, value;
    int rc = mdb_get(txn, store->meta, &key, &value);
    if (rc)
        return skv_lmdb_status("reading meta", rc);
    uintptr_t page = (uintptr_t)value.mv_data & ~(uintptr_t)(LMDB_PAGE_BYTES - 1);
    uint64_t number, mark;
    memcpy(&number, (const void *)page, sizeof number);
    uint8_t *map = (uint8_t *)(page - number * LMDB_PAGE_BYTES);
    uint32_t magic = 0;
    /* A damaged number must not lead us out of the map: msync refuses what is not mapped whole. */
    if (number < store->map_bytes / LMDB_PAGE_BYTES && msync(map, store->map_bytes, MS_ASYNC) == 0)
        memcpy(&magic, map + LMDB_PAGE_HEADER, sizeof magic);
    if (magic != SKV_LMDB_MAGIC || value.mv_size != sizeof mark)
        return skv_lmdb_status("finding the map", MDB_CORRUPTED);
    store->map = map;
    memcpy(&mark, value.mv_data, sizeof mark);
    if (mark > store->generation)
        store->generation = mark;
    return 0;
}

static int make_databases(struct skv_store *store)
{
    MDB_txn *txn;
    MDB_val key = {strlen(SKV_GENERATION_KEY), SKV_GENERATION_KEY};
    uint64_t zero = 0;
    MDB_val value = {sizeof zero, &zero};
    int rc = mdb_txn_begin(store->env, NULL, 0, &txn);
    if (rc)
        return skv_lmdb_status("first transaction", rc);
    if ((rc = mdb_dbi_open(txn, "users", MDB_CREATE, &store->users)) ||
        (rc = mdb_dbi_open(txn, "pages", MDB_CREATE, &store->pages)) ||
        (rc = mdb_dbi_open(txn, "meta", MDB_CREATE, &store->meta)) ||
        ((rc = mdb_put(txn, store->meta, &key, &value, MDB_NOOVERWRITE)) && rc != MDB_KEYEXIST)) {
        mdb_txn_abort(txn);
        return skv_lmdb_status("making its databases", rc);
    }
    rc = mdb_txn_commit(txn);
    if (rc)
        return skv_lmdb_status("making its databases", rc);
    rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn);
    if (rc)
        return skv_lmdb_status("first transaction", rc);
    rc = find_map(store, txn);
    skv_store_publish(store, skv_store_measure(store, txn));
    mdb_txn_abort(txn);
    return rc;
}

/* The file is extended (sparse) to the map before anything reads past its end, which would be a
 * SIGBUS. A smaller map than before keeps the old file's size. */
static int open_file(struct skv_store *store, const char *path)
{
    char file[PATH_MAX];
    struct stat st;
    snprintf(file, sizeof file, "%s/data.mdb", path);
    int fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 ||
        ((uint64_t)st.st_size < store->map_bytes && ftruncate(fd, (off_t)store->map_bytes) < 0)) {
        int error = errno;
        skv_error("store: %s: cannot extend it to %.1f GiB: %s: make room, or lower --store-bytes",
                  file, (double)store->map_bytes / (1u << 30), strerror(error));
        if (fd >= 0)
            close(fd);
        return skv_errno_status(error);
    }
    close(fd);
    if (store->file >= 0) /* opened anew: it is the same one */
        return 0;
    store->file = open(file, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (store->file < 0) /* a file system without O_DIRECT */
        store->file = open(file, O_RDONLY | O_CLOEXEC);
    return store->file < 0 ? skv_errno_status(errno) : 0;
}

static void close_environment(struct skv_store *store)
{
    if (store->env)
        mdb_env_close(store->env);
    if (store->file >= 0)
        close(store->file);
    store->env = NULL;
    store->file = -1;
}

/* Everything of LMDB's. SKV_ECORRUPT: data.mdb is no good. */
static int open_environment(struct skv_store *store)
{
    char file[PATH_MAX];
    struct stat st;
    unsigned flags = MDB_NOTLS | MDB_NORDAHEAD;
    if (store->durability == SKV_PROCESS)
        flags |= MDB_NOSYNC;
    snprintf(file, sizeof file, "%s/data.mdb", store->path);
    if (stat(file, &st) == 0 && (uint64_t)st.st_size > store->map_bytes)
        store->map_bytes = (uint64_t)st.st_size & ~UINT64_C(4095);
    int rc = mdb_env_create(&store->env);
    if (rc)
        return skv_lmdb_status("creating an environment", rc);
    mdb_env_set_userctx(store->env, store);
    mdb_env_set_assert(store->env, on_assert);
    mdb_env_set_maxdbs(store->env, 4);
    mdb_env_set_mapsize(store->env, store->map_bytes);
    MDB_stat tree;
    if ((rc = mdb_env_open(store->env, store->path, flags, 0600)) ||
        (rc = mdb_env_stat(store->env, &tree)))
        return skv_lmdb_status("opening data.mdb", rc);
    if (tree.ms_psize != LMDB_PAGE_BYTES) {
        skv_error("store %s: LMDB pages of %u bytes; sidekv needs 4096", store->path,
                  tree.ms_psize);
        return SKV_ENOTSUP;
    }
    rc = open_file(store, store->path);
    return rc ? rc : make_databases(store);
}

/* What the check said: NULL, or why data.mdb is no good. An error: it was not checked. */
static int await_check(struct skv_store *store, const char **why)
{
    int rc = skv_check_wait(store);
    const struct skv_tree_report *report = store->check.report;
    *why = rc == SKV_ECORRUPT ? report->why : NULL;
    if (rc == 0) {
        store->generation = report->generation;
        store->damaged_records = report->damaged_records;
    }
    return rc == SKV_ECORRUPT ? 0 : rc;
}

static int start_cold(struct skv_store *store, const char *path, const char *why)
{
    store->state.cold_starts++;
    return remove_data(path, why);
}

/* Opens data.mdb when it may be trusted and is whole; else removes it and makes a new one. */
static int open_warm_or_cold(struct skv_store *store, const struct skv_store_options *options)
{
    struct skv_state *state = &store->state;
    const char *why = store->distrusted;
    int rc = store->check.report ? await_check(store, &why) : 0;
    bool cold = why != NULL;
    if (rc == 0 && cold)
        rc = start_cold(store, options->path, why);
    skv_check_stop(store); /* `why` was there */
    if (rc)
        return rc;
    /* What an earlier run under `process` left may not be on disk yet. */
    bool unsynced = !store->fresh && !cold && !state->clean && state->durability == SKV_PROCESS;
    state->durability = unsynced ? SKV_PROCESS : options->durability;
    state->geometry = options->geometry;
    state->clean = state->damaged = false;
    skv_boot_id(state->boot);
    rc = skv_state_write(state);
    if (rc)
        return rc;
    rc = open_environment(store);
    if (rc == SKV_ECORRUPT && !cold) { /* checked, and yet */
        close_environment(store);
        rc = start_cold(store, options->path, "LMDB does not take its data.mdb");
        if (rc == 0)
            rc = skv_state_write(state);
        if (rc == 0)
            rc = open_environment(store);
    }
    if (rc == 0) /* under `process` too: a clean close speaks for a file that has its name */
        rc = skv_sync_directory(options->path);
    if (rc || options->durability == SKV_PROCESS)
        return rc;
    rc = skv_lmdb_status("syncing", mdb_env_sync(store->env, 1));
    state->durability = SKV_POWER;
    return rc || !unsynced ? rc : skv_state_write(state);
}

static int refuse_geometry(const struct skv_store *store)
{
    const struct skv_geometry *want = &store->geometry, *has = &store->state.geometry;
    skv_error("store %s holds pages of %u layers, %u heads, head dim %u, %u tokens; asked for %u "
              "layers, %u heads, head dim %u, %u tokens: use another directory, or remove this one",
              store->path, has->layers, has->heads, has->head_dim, has->page_tokens, want->layers,
              want->heads, want->head_dim, want->page_tokens);
    return SKV_EGEOMETRY;
}

/* A store of another geometry is made anew if nobody is in it, as one that a daemon without options
 * made, and refused else: also where that cannot be told. */
static int take_over(struct skv_store *store, bool data)
{
    int rc = distrust(&store->state) ? SKV_EGEOMETRY : 0;
    if (rc == 0 && data) {
        store->check.report->foreign = true;
        rc = skv_check_start(store);
        if (rc == 0)
            rc = skv_check_wait(store);
    }
    skv_check_stop(store);
    if (rc == SKV_EGEOMETRY || rc == SKV_ECORRUPT)
        return refuse_geometry(store);
    store->fresh = rc == 0;
    return rc ? rc : remove_data(store->path, "it is of another geometry, and no user is in it");
}

/* Why data.mdb cannot be trusted, as far as that shows without looking into it; NULL: it is to be
 * checked, or there is none yet. */
static const char *distrust_unseen(const struct skv_store *store, bool has_data)
{
    if (store->fresh)
        return has_data ? "sidekv.store is damaged" : NULL;
    const char *why = distrust(&store->state);
    return why || has_data ? why : "data.mdb is missing";
}

int skv_store_prepare(const struct skv_store_options *options, struct skv_store **out)
{
    if (!options->path || skv_geometry_check(&options->geometry)) {
        skv_error("store: needs a path and a geometry");
        return SKV_EINVAL;
    }
    struct skv_store *store = calloc(1, sizeof *store);
    if (!store)
        return SKV_ENOMEM;
    store->file = -1;
    store->geometry = options->geometry;
    store->page_bytes = skv_page_bytes(&options->geometry);
    store->value_bytes = store->page_bytes + SKV_TRAILER_BYTES;
    store->extent_bytes = (LMDB_PAGE_HEADER + store->value_bytes + LMDB_PAGE_BYTES - 1) /
                          LMDB_PAGE_BYTES * LMDB_PAGE_BYTES;
    store->state.fd = -1;
    store->path = strdup(options->path);
    int rc = store->path ? skv_check_fork(store) : SKV_ENOMEM;
    if (rc)
        skv_store_close(store);
    else
        *out = store;
    return rc;
}

int skv_store_claim(struct skv_store *store)
{
    int rc = skv_state_open(store->path, &store->state, &store->fresh);
    if (rc)
        return rc;
    bool data = has_data(store->path);
    if (!store->fresh &&
        memcmp(&store->geometry, &store->state.geometry, sizeof store->geometry) != 0)
        return take_over(store, data);
    store->distrusted = distrust_unseen(store, data);
    if (data && !store->distrusted)
        return skv_check_start(store);
    skv_check_stop(store); /* there is nothing to look at */
    return 0;
}

int skv_store_open_claimed(struct skv_store *store, const struct skv_store_options *options)
{
    if (options->map_bytes < MIN_MAP_BYTES) {
        skv_error("store: needs a map of at least 64 MiB (--store-bytes)");
        return SKV_EINVAL;
    }
    store->durability = options->durability;
    store->map_bytes = (options->map_bytes + LMDB_PAGE_BYTES - 1) & ~UINT64_C(4095);
    int rc = open_warm_or_cold(store, options);
    if (rc) {
        close_environment(store); /* so that closing it writes no clean mark */
        return rc;
    }
    skv_info("store %s: map %.1f GiB, %.1f GiB in use, durability %s", options->path,
             (double)store->map_bytes / (1u << 30), (double)atomic_load(&store->used) / (1u << 30),
             options->durability == SKV_POWER ? "power" : "process");
    return 0;
}

int skv_store_open(const struct skv_store_options *options, struct skv_store **out)
{
    struct skv_store *store;
    int rc = skv_store_prepare(options, &store);
    if (rc)
        return rc;
    rc = skv_store_claim(store);
    if (rc == 0)
        rc = skv_store_open_claimed(store, options);
    if (rc)
        skv_store_close(store);
    else
        *out = store;
    return rc;
}

bool skv_store_broken(const struct skv_store *store)
{
    return store->broken;
}

int skv_store_reopen(struct skv_store *store, bool *more)
{
    uint64_t last = store->last_transaction;
    skv_store_abort(store);
    if (store->env)
        mdb_env_close(store->env);
    store->env = NULL;
    int rc = open_environment(store);
    if (rc) {
        if (store->env)
            mdb_env_close(store->env);
        store->env = NULL;
        return rc;
    }
    store->broken = false;
    *more = store->last_transaction > last;
    skv_info("store %s: opened anew", store->path);
    return 0;
}

void skv_store_close(struct skv_store *store)
{
    if (!store)
        return;
    skv_check_stop(store);
    skv_store_abort(store);
    if (store->env && !store->broken &&
        skv_lmdb_status("syncing", mdb_env_sync(store->env, 1)) == 0) {
        store->state.clean = true;
        skv_state_write(&store->state);
    }
    close_environment(store);
    skv_state_close(&store->state);
    free(store->path);
    free(store);
}

void skv_store_damage(const struct skv_store *store, uint64_t *cold_starts, uint64_t *records)
{
    *cold_starts = store->state.cold_starts;
    *records = store->damaged_records;
}

uint64_t skv_store_generation(const struct skv_store *store)
{
    return store->generation;
}

void skv_store_usage(const struct skv_store *store, uint64_t *used, uint64_t *limit)
{
    *used = atomic_load_explicit(&store->used, memory_order_relaxed);
    *limit = store->map_bytes;
}

uint64_t skv_store_high_water(const struct skv_store *store)
{
    return atomic_load_explicit(&store->high_water, memory_order_relaxed);
}

const uint8_t *skv_store_map(const struct skv_store *store, uint64_t *bytes)
{
    *bytes = store->map_bytes;
    return store->map;
}

int skv_store_file(const struct skv_store *store)
{
    return store->file;
}
