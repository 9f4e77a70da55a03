/* The host tier: one LMDB environment that keeps users' pages past GPU memory, workers and the
 * daemon. Only the daemon opens it.
 *
 * Databases: `users`: {model, user} -> record and one chain hash per page begun. `pages`: {model,
 * user, index} -> page bytes and a 64-byte trailer; all values have one length, slots past valid
 * zeroed. `meta`: high-water mark of generations. Beside data.mdb lies sidekv.store (state.h):
 * format, geometry, boot id, clean mark, and the lock.
 *
 * Threads: write calls (begin .. commit) by one thread at a time, the writer; readers each by one
 * thread, any number; open and close by one thread, while nobody else uses the store. Errors are
 * translated here and logged with LMDB's or the kernel's text: SKV_ENOSPC (disk or map full),
 * SKV_EIO, SKV_ECORRUPT, SKV_ENOMEM. A failed write transaction is aborted at once and leaves the
 * store as it was; its later calls return the same status. */
#ifndef SKV_STORE_H
#define SKV_STORE_H

#include "sidekv.h"

struct skv_store;

enum skv_durability {
    SKV_PROCESS, /* survives the daemon (kill -9); after an unclean reboot the store starts cold */
    SKV_POWER,   /* survives power loss: two flushes a transaction */
};

#define SKV_TRAILER_BYTES 64u

/* Behind every stored page. Written and checked here alone. */
struct skv_trailer {
    struct skv_id model, user;
    uint32_t index, valid; /* page of the user, tokens in it */
    uint64_t generation;   /* the user's, when the page was filled */
    uint64_t hash;         /* chain hash after `valid` tokens */
    uint64_t checksum;     /* XXH3_64 of page bytes and this trailer up to here */
};
_Static_assert(sizeof(struct skv_trailer) == SKV_TRAILER_BYTES, "a trailer is 64 bytes");

struct skv_store_options {
    const char *path;             /* a directory, made if missing (its parent must exist) */
    struct skv_geometry geometry; /* must equal the stored one's, if users are in it */
    uint64_t map_bytes; /* size of data.mdb (sparse); at least 64 MiB; may grow between runs */
    enum skv_durability durability;
};

/* Forks the process that will check the store, so call it before there are threads or a device; the
 * child ends with the calling thread. The store itself is not touched. Of the options, path and
 * geometry count. Follow with skv_store_claim() or skv_store_close(). */
int skv_store_prepare(const struct skv_store_options *options, struct skv_store **out);
/* Takes the store's lock, making the store if it is missing, and has the check of what is in it
 * begin. Follow with skv_store_open_claimed() or skv_store_close(). SKV_EBUSY: another daemon has
 * it, try again (not logged); SKV_EGEOMETRY: made for another geometry, and users are in it (else
 * it is made anew, logged); SKV_ECORRUPT: not a store (a directory with other files in it is left
 * alone); SKV_ENOTSUP: made by a later sidekvd, and left alone. */
int skv_store_claim(struct skv_store *store);
/* Waits for the check, then opens the store; any thread. After an unclean reboot under `process`,
 * or when the check did not pass, it starts cold: the old data.mdb is removed; that is logged and
 * counted. Where it fails the store is left to skv_store_close(). */
int skv_store_open_claimed(struct skv_store *store, const struct skv_store_options *options);
/* From another thread: it need not wait any longer, and returns SKV_EAGAIN. */
void skv_store_open_abandon(struct skv_store *store);
/* All three. */
int skv_store_open(const struct skv_store_options *options, struct skv_store **out);
/* Sets the clean mark, syncs, closes. NULL is fine, and a store that is only claimed. */
void skv_store_close(struct skv_store *store);

/* How often it started cold since it was made (this start included), and how many damaged records
 * were left out at this start. */
void skv_store_damage(const struct skv_store *store, uint64_t *cold_starts, uint64_t *records);

/* LMDB gives an environment up when the write of a meta page fails: until it is opened anew every
 * call of this store is SKV_EIO. Any thread. */
bool skv_store_broken(const struct skv_store *store);
/* Opens it anew, in place; its map moves. No transaction may be open, every reader must be
 * released, nobody may use the map. *more: the transaction that was said to have failed is there
 * all the same. On failure (logged) the store stays broken: try again later. */
int skv_store_reopen(struct skv_store *store, bool *more);

/* What the loop keeps of a stored user. */
struct skv_record {
    struct skv_id model, user;
    uint64_t generation; /* the user's now */
    uint64_t hash_full;  /* chain hash at its last full page; of page -1 when there is none */
    uint64_t hash_tail;  /* chain hash at `tokens`; equals hash_full when the last page is full */
    uint64_t last_use_s; /* seconds since the epoch */
    uint32_t tokens;     /* stored */
    uint32_t reserved;
};

/* Calls `each` for every stored user of one snapshot, in any thread. The record, and its chain
 * hashes [ceil(tokens / S)], which need not be aligned, are the callee's for the call only.
 * Non-zero from `each` stops. */
int skv_store_scan(struct skv_store *store,
                   int (*each)(void *context, const struct skv_record *record, const void *hashes),
                   void *context);

/* ---- writing: one transaction at a time, the writer thread ---- */

/* Page bytes a transaction for the most speed (bench_store on 16 cores with an H200): LMDB keeps a
 * transaction's pages in malloc'ed memory, which should stay in the processor's cache; from 64 MiB
 * on malloc returns it to the kernel every time, and half the speed is gone. Under `power` the two
 * flushes are shared by more. */
#define SKV_STORE_BATCH_BYTES       (UINT64_C(2) << 20)
#define SKV_STORE_BATCH_BYTES_POWER (UINT64_C(8) << 20)

int skv_store_begin(struct skv_store *store);
/* Puts one page. `page` holds page_bytes plus SKV_TRAILER_BYTES of room, is the caller's, and is
 * changed: slots past `valid` are zeroed ([layer][K|V][head][token][dim] bf16) and the trailer is
 * written. */
int skv_store_put_page(struct skv_store *store, const struct skv_record *user, uint32_t index,
                       uint32_t valid, uint64_t generation, uint64_t hash, void *page);
/* Writes the user's record; hashes[ceil(tokens / S)], one per page begun, the last one at `tokens`.
 * tokens == 0 removes the user and every page. A record that is shorter than before removes the
 * pages past it in the same transaction. */
int skv_store_put_record(struct skv_store *store, const struct skv_record *record,
                         const uint64_t *hashes);
/* Moves the high-water mark of generations, kept in `meta`: a daemon hands out only generations
 * above it. */
int skv_store_put_generation(struct skv_store *store, uint64_t high_water);
int skv_store_commit(struct skv_store *store);
void skv_store_abort(struct skv_store *store);

/* The high-water mark as opened; should a record lie above it, that one's. */
uint64_t skv_store_generation(const struct skv_store *store);

/* Puts are refused (SKV_ENOSPC) above this share of the map; removing always works. */
#define SKV_STORE_FULL_PERCENT 97u

/* Bytes live in the store, estimated from its pages in use, and the bytes it may use (the map). Any
 * thread. */
void skv_store_usage(const struct skv_store *store, uint64_t *used, uint64_t *limit);

/* ---- reading ---- */

struct skv_reader; /* a read transaction: what it located stays unchanged until it ends */

int skv_reader_open(struct skv_store *store, struct skv_reader **out);
int skv_reader_begin(struct skv_reader *reader);    /* a fresh snapshot */
void skv_reader_end(struct skv_reader *reader);     /* soon: a forgotten one makes the file grow */
void skv_reader_release(struct skv_reader *reader); /* until it begins again it holds nothing */
void skv_reader_close(struct skv_reader *reader);

/* A user's record and chain hashes; hashes[capacity] gets up to `capacity`, *count how many there
 * are. SKV_ENOENT. */
int skv_reader_record(struct skv_reader *reader, struct skv_id model, struct skv_id user,
                      struct skv_record *record, uint64_t *hashes, uint32_t capacity,
                      uint32_t *count);

struct skv_location {
    const uint8_t *value;   /* page bytes and trailer, in the map; 16-byte aligned; good until
                               skv_reader_end() */
    uint64_t extent_offset; /* of data.mdb, a multiple of 4096: what a direct read must cover */
    uint32_t extent_bytes;  /* a multiple of 4096 */
    uint32_t value_offset;  /* of the value in the extent */
};
/* Where a stored page lies, without touching its bytes. SKV_ENOENT. */
int skv_reader_locate(struct skv_reader *reader, struct skv_id model, struct skv_id user,
                      uint32_t index, struct skv_location *location);

/* Is this value what the caller expects: model, user, index, chain hash at `valid` tokens,
 * generation at most `generation`, checksum? Reads the whole page. 0 or SKV_ECORRUPT. Pure: any
 * thread. */
int skv_page_verify(const void *value, uint64_t page_bytes, struct skv_id model, struct skv_id user,
                    uint32_t index, uint32_t valid, uint64_t hash, uint64_t generation);

/* The store's map and its file, for registering windows and direct reads. */
const uint8_t *skv_store_map(const struct skv_store *store, uint64_t *bytes);
uint64_t skv_store_high_water(
    const struct skv_store *store); /* bytes of the map that LMDB has ever used; any thread */
int skv_store_file(const struct skv_store
                       *store); /* an fd of data.mdb, opened O_DIRECT where the file system can */

#endif
