/* What the store's files share; nobody else includes this, nor lmdb.h. */
#ifndef SKV_STORE_PRIVATE_H
#define SKV_STORE_PRIVATE_H

#include <lmdb.h>
#include <stdatomic.h>

#include "state.h"
#include "store.h"

#define LMDB_PAGE_BYTES                                                                            \
    4096u /* asserted at open; overflow values begin behind one 16-byte header */
#define LMDB_PAGE_HEADER   16u
#define LMDB_OVERFLOW      0x04u /* flag of a value's first page */

#define SKV_LMDB_MAGIC     UINT32_C(0xBEEFC0DE) /* behind the header of pages 0 and 1 */
#define SKV_GENERATION_KEY "generation"

/* What the check at start found, in memory that it shares with the process that does it. */
struct skv_tree_report {
    bool foreign; /* told to the child: the store is of another geometry, so it must be empty */
    _Atomic uint64_t progress; /* node pages seen */
    _Atomic bool verdict;      /* `status` counts. Release; pairs with skv_check_wait() */
    int32_t status;            /* 0, SKV_ECORRUPT: see `why`; SKV_EGEOMETRY: foreign, not empty;
                                  SKV_ENOMEM, SKV_EIO: not checked */
    char why[128];
    uint64_t users, pages;    /* entries */
    uint64_t damaged_records; /* users left out */
    uint64_t generation;      /* the highest that the mark or any record names */
};

struct skv_check {
    pid_t child;                    /* 0: none runs */
    struct skv_tree_report *report; /* NULL: there is, or was, no child */
    int claimed;                    /* eventfd that the child waits for */
    uint64_t started_ns;
    bool stuck;
    _Atomic bool abandoned; /* by any thread: nobody waits for it any more */
};

struct skv_store {
    MDB_env *env;
    MDB_dbi users, pages, meta;
    struct skv_geometry geometry;
    uint64_t page_bytes;   /* of a page, without its trailer */
    uint64_t value_bytes;  /* with it: every value of `pages` */
    uint64_t extent_bytes; /* the LMDB pages that hold one value */
    uint64_t map_bytes;    /* of the map and of data.mdb */
    const uint8_t *map;
    char *path;
    enum skv_durability durability;
    int file; /* data.mdb, O_DIRECT where possible */
    struct skv_state state;
    struct skv_check check;
    const char *distrusted; /* why data.mdb may not even be looked at, or NULL */
    bool fresh;             /* there was no whole sidekv.store */
    uint64_t generation;    /* high-water mark as opened, or what a record has above it */
    uint64_t damaged_records;

    /* the writer's */
    MDB_txn *txn;
    int failed;           /* status of the transaction that was aborted for it; 0: none */
    uint64_t tree_bytes;  /* of everything but `pages`, at begin */
    uint64_t dirty_bytes; /* put in this transaction: what a commit will write, roughly */
    bool full_said;       /* "full" is logged once until a put is committed */

    /* written by the writer at commit, read by any thread; each stands alone, so relaxed */
    _Atomic uint64_t used, high_water;
    uint64_t last_transaction; /* that was published */
    _Atomic bool broken;       /* LMDB gave its environment up; set by any thread */
};

/* Translates and logs what LMDB returned (`what` was tried); MDB_NOTFOUND is SKV_ENOENT, unlogged.
 */
int skv_lmdb_status(const char *what, int rc);

/* The same of a call that begins a transaction: one that finds LMDB's panic breaks the store. */
int skv_begin_status(struct skv_store *store, const char *what, int rc);

/* Keys sort by model, user, index: big-endian. */
#define USER_KEY_BYTES 32u
#define PAGE_KEY_BYTES 36u
struct skv_key {
    uint8_t bytes[PAGE_KEY_BYTES];
};
MDB_val skv_user_key(struct skv_key *key, struct skv_id model, struct skv_id user);
MDB_val skv_page_key(struct skv_key *key, struct skv_id model, struct skv_id user, uint32_t index);

/* A value of `users`: the record, then its chain hashes. Its `reserved` holds the low half of the
 * XXH3_64 of all of it, taken with `reserved` zero. */
#define MAX_RECORD_BYTES (sizeof(struct skv_record) + SKV_MAX_USER_PAGES * sizeof(uint64_t))

/* Copies a stored record out and checks it; *hashes is where its chain hashes lie (unaligned). */
int skv_record_parse(const struct skv_store *store, const MDB_val *key, const MDB_val *value,
                     struct skv_record *record, const uint8_t **hashes);

static inline uint32_t skv_store_pages(const struct skv_store *store, uint32_t tokens)
{
    return tokens / store->geometry.page_tokens + (tokens % store->geometry.page_tokens != 0);
}

/* What lies in the trees as `txn` sees them, in bytes. */
struct skv_usage {
    uint64_t trees; /* of everything but `pages` */
    uint64_t pages;
};
struct skv_usage skv_store_measure(const struct skv_store *store, MDB_txn *txn);
/* Makes that the store's usage, once committed, and moves the high-water mark. */
void skv_store_publish(struct skv_store *store, struct skv_usage usage);

/* store_tree.c: walks the trees in `bytes` of data.mdb; of a foreign store, as far as it takes to
 * see whether users or pages are in it (SKV_EGEOMETRY). 0; SKV_ECORRUPT, with report->why;
 * SKV_ENOMEM. May crash on what it meets. */
int skv_tree_walk(const struct skv_store *store, const uint8_t *file, uint64_t bytes,
                  struct skv_tree_report *report);

/* store_check.c: the same in a child process, which begins when it is told to start. Follow with
 * skv_check_stop(). */
int skv_check_fork(struct skv_store *store);
int skv_check_start(struct skv_store *store);
/* Its verdict, as skv_tree_walk() (crashed and stuck are SKV_ECORRUPT); store->check.report has
 * more. */
int skv_check_wait(struct skv_store *store);
void skv_check_stop(struct skv_store *store); /* also when none was started */

#endif
