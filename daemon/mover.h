/* The mover joins pool and store: onboard (store to pool, layer by layer, opening gates) and
 * offload (pool to staging to store), and the store's other work. It decides nothing about the
 * cache: the loop hands it jobs and takes its events; every number in a job was decided by the
 * core.
 *
 * Threads: the loop calls everything below. The copy thread makes all CUDA calls and LMDB reads;
 * the writer thread all LMDB write transactions. Jobs go by ring and eventfd, first in first out; a
 * job is the mover's from the call until its last event, then the caller's again. The loop never
 * blocks in here.
 *
 * Onboard: all batches on one FIFO stream, round robin by layer groups between batches. A prefetch
 * gets what jobs that a worker waits for leave of snapshots, staging and room for copies, or one
 * turn in 256; it is one of them as soon as a gated job comes after it. Gate l of a job opens after
 * the last copy of layer l of the job and of every job up to `after`. Slices below 128 KiB share a
 * gate's worth of copies (a layer group: its gates open together). Verified pages in registered
 * windows are copied straight from the map, layer by layer, split at window borders, under a read
 * transaction that lives as long as the copies. The others are slower than the bus anyway: they are
 * verified by the CPU, in place or after a read into pinned staging, and copied whole as they come.
 * No gate of a job opens before all its pages are located and verified. A missing or damaged page:
 * SKV_MOVER_FAILED, the job halts; the loop answers with skv_mover_cancel().
 *
 * Offload: no D2H copy is queued while an onboard with a gate row lives, but for 64 MiB after every
 * 100 ms of waiting, so that offload goes on under unbroken load. Long offloads are stored in
 * several transactions, each moving the record forward; one that fails half-way may leave the first
 * pages stored, and says so. Changes keep their place among the offloads, and are never given up:
 * what failed comes before all else, so a user that was cut does not come back. */
#ifndef SKV_MOVER_H
#define SKV_MOVER_H

#include "device.h"
#include "pinner.h"
#include "store.h"

struct skv_mover;

struct skv_mover_options {
    struct skv_device *device;
    struct skv_pool *pool;
    struct skv_geometry geometry;
    struct skv_store *store;   /* NULL: no store; offers only cancel and gates */
    struct skv_pinner *pinner; /* NULL: nothing is read in place */
    uint64_t staging_bytes;    /* half for onboard, half for offload; at least four pages each */
    void *staging;             /* so many bytes, pinned, the caller's; NULL: the mover's own */
    enum skv_durability durability; /* of the store: how much goes into one transaction */
};

int skv_mover_start(const struct skv_mover_options *options, struct skv_mover **out);
/* Waits for all that was handed in; events not taken are lost, and their jobs the caller's again.
 * Jobs that halted, or wait for such a one, are cancelled with SKV_ELOAD. NULL is fine. */
void skv_mover_stop(struct skv_mover *mover);

/* Waits for all that was handed in, as stop does, and holds nothing of the store afterwards: it may
 * be opened anew. Events stay to be taken, jobs may be handed in, they wait for resume. */
void skv_mover_halt(struct skv_mover *mover);
/* Goes on, with this pinner. SKV_ENOMEM: no thread; try again. */
int skv_mover_resume(struct skv_mover *mover, struct skv_pinner *pinner);

struct skv_move {
    uint32_t page;       /* in the pool */
    uint32_t index;      /* of the user */
    uint32_t valid;      /* tokens */
    uint32_t user;       /* of the job's users[] */
    uint64_t hash;       /* chain hash after `valid` tokens */
    uint64_t generation; /* onboard: the most a stored page may have; offload: of the page */
};

struct skv_onboard {
    uint64_t id;        /* grows from job to job */
    uint64_t after;     /* gates wait for every job with id <= this too; 0: none */
    uint32_t *gate_row; /* registered with the device; NULL for a prefetch */
    uint32_t user_count, move_count;
    struct skv_record *users; /* [user_count] model, user and generation are read */
    struct skv_move *moves;   /* [move_count]; may be 0: then only gates, after `after` */
    void *
        state; /* memory for the mover: SKV_ONBOARD_STATE_BYTES(move_count), aligned as a pointer */
};
#define SKV_ONBOARD_STATE_BYTES(moves) (128u + 16u * (size_t)(moves))

struct skv_offload {
    uint64_t id;
    struct skv_record record; /* as it shall stand once these pages are stored */
    uint64_t *hashes;         /* [ceil(record.tokens / S)] */
    uint32_t move_count;
    struct skv_move *moves; /* ascending, one user; the last one ends at record.tokens */
    uint32_t drop; /* atomic: set by the loop when the generation is old; the writer then skips it
                      (status SKV_ESTALE) */
    uint32_t stored_moves; /* out, when it failed: the first moves, stored by earlier transactions
                              with a record that ends there */
    void *state;           /* the mover's own */
};

/* A change of the store: a user shortened (record.tokens > 0, with hashes) or removed (tokens ==
 * 0), or only touched. */
enum skv_change_kind { SKV_CHANGE_RECORD, SKV_CHANGE_GENERATION, SKV_CHANGE_SYNC };
struct skv_change {
    uint64_t id;
    enum skv_change_kind kind;
    struct skv_record record; /* RECORD; GENERATION: record.generation is the high-water mark */
    uint64_t *hashes;         /* RECORD: [ceil(tokens / S)] or NULL when tokens == 0 */
    bool refused;             /* the caller's: it was answered once, and is owed */
    struct skv_change *owed;  /* the mover's own */
};

/* Reads one user's record and chain hashes. Never queues behind page reads. */
struct skv_lookup_job {
    uint64_t id;
    struct skv_record record; /* in: model, user; out: all */
    uint32_t count;           /* out: hashes read */
    uint64_t *hashes;         /* [SKV_MAX_USER_PAGES] */
};

enum skv_mover_event_kind {
    SKV_MOVER_ONBOARDED, /* job: skv_onboard, last event; all copies and gates done */
    SKV_MOVER_FAILED, /* job: skv_onboard; `user`, `index` say which page; halted, cancel follows */
    SKV_MOVER_CANCELLED, /* job: skv_onboard, last event; no copy of it is in flight, gates are
                            open, status word set */
    SKV_MOVER_COPIED,    /* job: skv_offload; its pages have been read */
    SKV_MOVER_STORED,    /* job: skv_offload, last event; status: 0, SKV_ENOSPC, SKV_EIO, SKV_ESTALE
                            (dropped) */
    SKV_MOVER_CHANGED,   /* job: skv_change; status 0, or of a SYNC: last event. Else it is owed:
                            nothing that came later is stored before it, it is tried again with each
                            of those, and answered again when it is done */
    SKV_MOVER_FOUND,     /* job: skv_lookup_job, last event; status 0 or SKV_ENOENT, SKV_ECORRUPT,
                            SKV_EIO */
    SKV_MOVER_BROKEN,    /* the device failed: the daemon must exit */
};

struct skv_mover_event {
    enum skv_mover_event_kind kind;
    int32_t status;
    uint32_t user, index;
    void *job;
};

/* An eventfd, blocking, readable when events may wait. The caller reads it (poll, or an io_uring
 * read), then calls skv_mover_next() until it says false: only then will it ring again. */
int skv_mover_fd(const struct skv_mover *mover);
bool skv_mover_next(struct skv_mover *mover, struct skv_mover_event *event);

void skv_mover_onboard(struct skv_mover *mover, struct skv_onboard *job);
/* Stops a job: once nothing of it is in flight, sets the row's status word (when `status` is not
 * 0), opens its gates, and answers SKV_MOVER_CANCELLED. A job that finished meanwhile answers
 * SKV_MOVER_ONBOARDED instead, and only that. Jobs handed in earlier that come `after` a cancelled
 * one keep their gates shut from then on: cancel them too, in any order. */
void skv_mover_cancel(struct skv_mover *mover, uint64_t id, int32_t status);
/* false: no staging free for its move_count pages now (or it is larger than staging ever is: at
 * most skv_mover_offload_pages()). */
bool skv_mover_offload(struct skv_mover *mover, struct skv_offload *job);
uint32_t skv_mover_offload_pages(const struct skv_mover *mover);  /* free in staging now */
uint32_t skv_mover_offload_staged(const struct skv_mover *mover); /* in it, not stored yet */
void skv_mover_change(struct skv_mover *mover, struct skv_change *job);
void skv_mover_lookup(struct skv_mover *mover, struct skv_lookup_job *job);

struct skv_mover_counters { /* read at any time, by the loop */
    uint64_t onboard_bytes, onboard_in_place_bytes, offload_bytes, offload_pages, store_errors,
        damaged_pages;
};
void skv_mover_counters(const struct skv_mover *mover, struct skv_mover_counters *out);

#endif
