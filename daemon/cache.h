/* The cache core: users, pages, leases, LRU. A pure state machine: commands and completions in,
 * decisions and actions out; no I/O, no CUDA, no clock, no thread. Read this first.
 *
 * A *user* has a record (what is known and stored of it) and, when it has pages in the pool, a
 * residence. An ACQUIRE matches the request's chain hashes against both, leases what can be had
 * now, and hands out pages for appending; COMMIT makes the appended tokens the user's; RELEASE
 * drops them. What the core wants done (an onboard, a change of the store, a fence) it puts into a
 * list of actions that the caller carries out in order; what was done comes back as an event.
 *
 *   a lease:     none --ACQUIRE--> read or append --COMMIT, RELEASE--> none
 *                                  read or append --fence--> fenced --session gone--> none
 *                (the pages of a fenced one stay held)
 *   a session:   none --open--> live --fence--> fenced --gone--> none
 *   a gate row:  free --ACQUIRE--> owned --all leases ended and no copy in flight--> free
 *
 * A user is cut (shortened, with a new generation) only by a proven mismatch, TRUNCATE, FORGET, or
 * a stored page found damaged. */
#ifndef SKV_CACHE_H
#define SKV_CACHE_H

#include "mover.h"
#include "residence.h"
#include "wire.h"

struct skv_cache;

struct skv_cache_options {
    struct skv_geometry geometry;
    uint32_t pages;           /* of the pool */
    uint32_t extent_pages;    /* sessions append within extents of their own, of so many pages; 0:
                                 anywhere */
    uint32_t sessions;        /* at most SKV_MAX_SESSIONS */
    uint32_t max_records;     /* users known at one time */
    uint64_t generation;      /* the first one to hand out */
    uint32_t lease_ms;        /* an append lease held longer may be fenced for another worker */
    uint32_t tail_ms;         /* a tail is stored this long after its last append */
    bool store;               /* false: nothing can be stored */
    struct wire_table *table; /* page descriptors, or NULL */
};

int skv_cache_open(const struct skv_cache_options *options, struct skv_cache **out);
void skv_cache_close(struct skv_cache *cache);

/* The caller's clocks, before any other call of a turn. */
void skv_cache_time(struct skv_cache *cache, uint64_t now_ms, uint32_t wall_s);

/* ---- filling it at start: adopt, after a hot restart; restore each; restored ---- */

/* Hot restart, the pool and its descriptors outlived an earlier daemon: rebuilds the users from
 * options.table, before anything else. A page whose descriptor is not whole, not valid, being
 * loaded, or out of line is nobody's. `limbo`: workers of the earlier daemon may still run: until
 * settled, what was in use then is not freed, its users are not evicted, and a half-filled page of
 * then is not appended to. Returns how many users have pages.
 *
 * With a store the cache is *early* from then until restored(): what the store holds is not known,
 * so users are read out of the pool, and nothing of them changes. ACQUIRE grants what is resident,
 * never to append, and cuts nobody; nothing is loaded or offloaded, and no generation is handed
 * out. Sessions, leases' ends and FLUSH are as always; EVICT is SKV_EAGAIN; TRUNCATE, FORGET and
 * skv_cache_evict_stored() must wait. */
uint32_t skv_cache_adopt(struct skv_cache *cache, bool limbo);
/* All of them have reattached or are gone. */
void skv_cache_settle(struct skv_cache *cache);

/* Generations up to this one are not handed out: before the first restore(). */
void skv_cache_number_above(struct skv_cache *cache, uint64_t generation);
/* A user found in the store, with its chain hashes [ceil(tokens / S)]. Where its pages were
 * adopted the two are reconciled; take the actions after it. SKV_EFULL: more users than
 * max_records; SKV_EINVAL: not a possible record; SKV_ENOMEM. */
int skv_cache_restore(struct skv_cache *cache, const struct skv_record *record,
                      const uint64_t *hashes);
/* After the last: puts up to `limit` of them in order, some 100 ns each; true: all is done. */
bool skv_cache_restored(struct skv_cache *cache, uint32_t limit);

/* ---- actions: what the core wants done ---- */

enum skv_action_kind {
    SKV_ACTION_ONBOARD, /* job: struct skv_onboard, for skv_mover_onboard() */
    SKV_ACTION_CANCEL,  /* id, status: for skv_mover_cancel() */
    SKV_ACTION_CHANGE,  /* job: struct skv_change, for skv_mover_change(); whoever takes its last
                           event frees it */
    SKV_ACTION_FENCE,   /* session: end it; it held an append lease too long */
    SKV_ACTION_ROW,     /* session, row: no copy of its batch is in flight any more */
    SKV_ACTION_VIEWS,   /* session: its list of extents has changed */
};
struct skv_action {
    enum skv_action_kind kind;
    int32_t status;
    uint32_t session, row;
    uint64_t id;
    void *job;
};
/* The next action, in order; false: none. Take them all after every call below. */
bool skv_cache_action(struct skv_cache *cache, struct skv_action *action);

/* ---- sessions ---- */

/* gate_row[r] is row r's words, mapped by the daemon and registered with the device; [layers] words
 * and a status word each. Returns the session's slot, or SKV_EFULL, SKV_ENOMEM. */
int skv_cache_session_open(struct skv_cache *cache, struct skv_id model, uint32_t rows,
                           uint32_t *const gate_row[]);
/* Its leases count for nothing from now on; their pages stay held until it is gone. Idempotent. */
void skv_cache_session_fence(struct skv_cache *cache, uint32_t session);
/* Does it hold no lease, so that nothing of its process' work can touch a page? */
bool skv_cache_session_idle(const struct skv_cache *cache, uint32_t session);
/* The process can touch nothing any more: its leases end. false: copies of its batches are still in
 * flight; ask again after SKV_ACTION_ROW. The slot is free once it returns true. */
bool skv_cache_session_gone(struct skv_cache *cache, uint32_t session);

/* ---- protection: which extents of the pool a session may write to ---- */

/* The session's list: bit e of extents[WIRE_MAX_EXTENTS / 64]. Returns its sequence, which changes
 * with it. Every extent that a grant lets it write to is on the list from before the grant until
 * its lease has ended. */
uint32_t skv_cache_views(const struct skv_cache *cache, uint32_t session, uint64_t *extents);
/* It has unmapped what is not on the list of that sequence. */
void skv_cache_viewed(struct skv_cache *cache, uint32_t session, uint32_t sequence);
/* It has no views any more: it has said so, fenced, holding no lease. */
void skv_cache_unviewed(struct skv_cache *cache, uint32_t session);
/* May it still have views? Then its process must be gone, or say that it has none. */
bool skv_cache_has_views(const struct skv_cache *cache, uint32_t session);

/* ---- the batch ---- */

/* Where the caller puts a row's requests before ACQUIRE: private copies. hashes[] of entry i begin
 * at requests[i].hash_offset. */
struct skv_batch_input {
    struct wire_request requests[SKV_MAX_BATCH];
    uint64_t *hashes; /* [WIRE_SLOT_PAGES] */
};
/* SKV_EBUSY: the row is owned by a batch. */
int skv_cache_input(struct skv_cache *cache, uint32_t session, uint32_t row,
                    struct skv_batch_input **input);

/* A record read from the store, for a user whose stored hashes a match needs. */
struct skv_known {
    uint32_t entry; /* of the batch */
    uint32_t count; /* hashes */
    struct skv_record record;
    const uint64_t *hashes;
};

/* Does entry `from` or a later one need its stored hash array to be matched? Its index, with the
 * user in *record, or SKV_NONE. */
uint32_t skv_cache_needs(struct skv_cache *cache, uint32_t session, uint32_t row, uint32_t from,
                         uint32_t count, struct skv_record *record);

/* Grants: fills grants[count] and the page ids behind them in pages[WIRE_SLOT_PAGES] (memory that
 * the client may scribble on: only written). Never refuses a valid request: what cannot be had now
 * is a shorter hit. Clears the row's status and sets its words to 0 (gated) or 1. `known`
 * [known_count]: records read. `lease`: false for PREFETCH. Returns whether the batch is gated. */
bool skv_cache_acquire(struct skv_cache *cache, uint32_t session, uint32_t row, uint32_t count,
                       const struct skv_known *known, uint32_t known_count, bool lease,
                       struct wire_grant *grants, uint32_t *pages);

/* Ends leases of a row; commits those that append when `commit`. Each result: 0, SKV_ESTALE.
 * Returns true when the completion must wait for SKV_ACTION_ROW. */
bool skv_cache_end(struct skv_cache *cache, uint32_t session, uint32_t row, const uint64_t *leases,
                   uint32_t count, bool commit, struct wire_committed *results);

/* ---- the mover's events ---- */

void skv_cache_onboarded(struct skv_cache *cache, struct skv_onboard *job);
/* status: SKV_ECORRUPT, SKV_ENOENT cut the user there; after any other it stays as it is stored,
 * and is not asked for a second. */
void skv_cache_load_failed(struct skv_cache *cache, struct skv_onboard *job, uint32_t user,
                           uint32_t index, int32_t status);
void skv_cache_cancelled(struct skv_cache *cache, struct skv_onboard *job);
void skv_cache_copied(struct skv_cache *cache, struct skv_offload *job);
void skv_cache_stored(struct skv_cache *cache, struct skv_offload *job, int32_t status);

/* The store has taken a change: till then nothing is appended to a stored tail of that user. The
 * change is the caller's. */
void skv_cache_changed(struct skv_cache *cache, const struct skv_change *change);

/* The store turned out to hold this of a user, although a job for it was said to have failed. */
void skv_cache_found_stored(struct skv_cache *cache, const struct skv_record *record);

/* The next pages to store, at most `max_pages`; NULL: nothing is due, or no memory for the job. The
 * job comes back by copied and stored. `stop`: shutting down, tails are due at once. */
struct skv_offload *skv_cache_next_offload(struct skv_cache *cache, uint32_t max_pages, bool stop);
/* Was a job not made, since the last time this was asked, for want of memory? */
bool skv_cache_starved(struct skv_cache *cache);
/* A job that could not be handed over: as if it had never been made. */
void skv_cache_offload_undo(struct skv_cache *cache, struct skv_offload *job);
/* Milliseconds until a tail is due; UINT64_MAX: none waits. */
uint64_t skv_cache_tail_due(const struct skv_cache *cache);
/* Asks for the tails of the users that eviction would meet next. Call now and then. */
void skv_cache_groom(struct skv_cache *cache);

/* ---- managing; users by record index ---- */

/* The record of {model, user}, or SKV_NONE. */
uint32_t skv_cache_find(const struct skv_cache *cache, struct skv_id model, struct skv_id user);
/* The next record of `user` in any model, from model index *model on (0 starts; moved past it);
 * SKV_NONE: no more. */
uint32_t skv_cache_find_any(const struct skv_cache *cache, struct skv_id user, uint32_t *model);
void skv_cache_info(const struct skv_cache *cache, uint32_t record, struct skv_user_info *info);
/* The next live record among the `scan` record indices from *cursor on, or SKV_NONE. *cursor moves
 * past it; it is 0 after the last of all. */
uint32_t skv_cache_next(const struct skv_cache *cache, uint64_t *cursor, uint32_t scan);

/* SKV_ENOMEM: nothing was done. TRUNCATE needs the stored hashes when fewer tokens are resident
 * than it keeps: then SKV_EAGAIN, ask again with them. `known` may be NULL. *kept: tokens left.
 * *change: id of the store's change to wait for, 0: none. */
int skv_cache_truncate(struct skv_cache *cache, uint32_t record, uint32_t tokens,
                       const struct skv_known *known, uint32_t *kept, uint64_t *change);
/* 0: evicted; SKV_EAGAIN: it is being stored first, ask again; SKV_EBUSY: leased, or copied right
 * now. */
int skv_cache_evict(struct skv_cache *cache, uint32_t record);
/* Drops the least recently used user from the store. Returns the change's id, 0: there is none. */
uint64_t skv_cache_evict_stored(struct skv_cache *cache);

/* From now on no lease appends; those that do may commit. For a daemon that ends, so that what it
 * stores has an end too. */
void skv_cache_end_appends(struct skv_cache *cache);

/* FLUSH: the epoch to wait for, and whether everything committed in it or before is stored. While
 * one is wanted, tails are due. */
uint64_t skv_cache_flush(struct skv_cache *cache);
bool skv_cache_flushed(const struct skv_cache *cache, uint64_t epoch);

uint64_t skv_cache_generation(const struct skv_cache *cache); /* the last one handed out */

/* The fields that the core knows. */
void skv_cache_stats(const struct skv_cache *cache, struct skv_stats *stats);

/* Every invariant, checked the slow way; aborts with a message. For tests. */
void skv_cache_check(const struct skv_cache *cache);

#endif
