/* The core's own state, shared by its files: cache.c (life, sessions, pages, cuts), cache_acquire.c
 * (match and grant), cache_commit.c (leases' ends), cache_load.c (onboards), cache_offload.c (what
 * goes to the store, flush), cache_extents.c (who may write where), cache_manage.c (admin, stats,
 * check), cache_adopt.c (hot restart). */
#ifndef SKV_CACHE_INTERNAL_H
#define SKV_CACHE_INTERNAL_H

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "failpoint.h"
#include "hash.h"

enum lease_state { LEASE_NONE, LEASE_READ, LEASE_APPEND };

struct lease {
    uint64_t generation; /* the user's, when granted */
    uint64_t since_ms;
    uint32_t residence;   /* or SKV_NONE: an unknown user, read only */
    uint32_t history;     /* h */
    uint32_t base;        /* append: page index at which its own pages begin */
    uint32_t own, owned;  /* its own pages: first in batch->own, how many */
    uint32_t hash_offset; /* of its hashes in input.hashes */
    uint32_t tail_page;   /* with tail_in_place */
    uint8_t state;        /* enum lease_state */
    bool tail_in_place;   /* appends into the residence's half-filled last page */
};

struct onboard { /* a job and what the core keeps with it */
    struct skv_onboard job;
    uint32_t session, row; /* SKV_NONE: a prefetch */
    bool cancelled;
    struct onboard *before, *behind;   /* in flight, oldest first */
    uint32_t residence[SKV_MAX_BATCH]; /* of job.users[i] */
    struct skv_record users[SKV_MAX_BATCH];
    struct skv_move moves[];
};

struct offload { /* likewise */
    struct skv_offload job;
    uint32_t residence; /* that its pages are read from */
    uint32_t committed; /* tokens of the user when it was made */
    uint32_t cut;       /* tokens that the user was cut to since, or more */
    uint64_t epoch;     /* flush epoch then */
    bool copied;
};

struct batch { /* of one gate row */
    struct skv_batch_input input;
    struct onboard *job;  /* in flight, or NULL */
    uint32_t *own;        /* [WIRE_SLOT_PAGES] pages taken for appending */
    uint32_t owned;       /* of them in use by this batch */
    uint32_t serial;      /* of the batch; 24 bits in a lease id */
    uint32_t count, open; /* leases granted, not yet ended */
    struct lease leases[SKV_MAX_BATCH];
};

struct session {
    enum { SESSION_NONE, SESSION_LIVE, SESSION_FENCED } state;
    uint32_t epoch; /* moved by fencing; 24 bits in a lease id */
    uint16_t model;
    uint32_t rows;
    uint32_t *gate_row[SKV_MAX_ROWS];
    struct batch *batches; /* [rows] */
    uint32_t views;        /* its list of extents: changes so far */
    bool views_told;       /* an action says so, and is not taken yet */
    uint32_t held;         /* extents given up, whose views it may still have */
};

#define FLUSH_EPOCHS 1024u /* flushes that may wait at one time, at most */
#define UNREAD       64u   /* each costs one batch too many when it is forgotten */
#define UNREAD_MS    1000u /* not tried again till then */

struct skv_cache {
    struct skv_geometry geometry;
    struct skv_cache_options options;
    struct records records;
    struct residences residences;
    struct skv_id models[SKV_MAX_MODELS];
    uint32_t model_count;
    struct session sessions[SKV_MAX_SESSIONS];
    uint32_t session_count;
    uint64_t now_ms;
    uint32_t wall_s;
    uint64_t generation;             /* the last one handed out */
    uint64_t next_job;               /* ids of onboards, offloads and changes */
    struct onboard *oldest, *newest; /* onboards in flight */
    struct backlog dirty, tails;     /* residences with full pages, or only a tail, to store */
    uint64_t epoch, epoch_oldest;    /* flush epochs: now, and the oldest with unstored commits */
    uint64_t flush_wanted;           /* the latest epoch that a FLUSH waits for */
    uint32_t dirty_in[FLUSH_EPOCHS]; /* residences whose oldest unstored commit is of epoch e */
    struct skv_action *actions;      /* a ring, grown by skv_reserve_actions() */
    uint32_t action_first, action_count, action_room;
    uint32_t onboards; /* in flight */
    struct unread {    /* users whose stored pages could not be read a moment ago */
        uint64_t generation, until_ms;
    } unread[UNREAD];   /* the oldest are forgotten */
    uint32_t unread_at; /* where the next one goes */
    bool starved;       /* a job could not be made for want of memory */
    bool early;         /* adopted, and what the store holds is not known yet */
    bool ending;        /* skv_cache_end_appends() */
    struct skv_stats stats;
};

static inline uint32_t pages_of(const struct skv_cache *cache, uint32_t tokens)
{
    return (tokens + cache->geometry.page_tokens - 1) / cache->geometry.page_tokens;
}

static inline struct residence *residence_at(struct skv_cache *cache, uint32_t index)
{
    return index == SKV_NONE ? NULL : &cache->residences.all[index];
}

static inline struct residence *residence_of(struct skv_cache *cache, uint32_t record)
{
    return residence_at(cache, cache->records.all[record].residence);
}

static inline uint64_t lease_id(uint32_t epoch, uint32_t serial, uint32_t row, uint32_t entry)
{
    return (uint64_t)(epoch & 0xffffff) << 40 | (uint64_t)(serial & 0xffffff) << 16 | row << 8 |
           entry;
}

/* An appender, as a residence names it: session, row and entry; SKV_NONE is none. */
static inline uint32_t appender_of(uint32_t session, uint32_t row, uint32_t entry)
{
    return session << 16 | row << 8 | entry;
}

/* The lease that may append to a residence; there must be one. */
static inline const struct lease *skv_appending(const struct skv_cache *cache,
                                                const struct residence *r)
{
    const struct batch *batch =
        &cache->sessions[r->appender >> 16].batches[r->appender >> 8 & 0xff];
    return &batch->leases[r->appender & 0xff];
}

/* cache.c */
struct skv_action *skv_act(struct skv_cache *cache, enum skv_action_kind kind);
/* Room for `more` actions besides all that what is under way may come to. false: no memory. */
bool skv_reserve_actions(struct skv_cache *cache, uint32_t more);
/* A change of the store for a record of `pages`, and room to say it; NULL: no memory. */
struct skv_change *skv_new_change(struct skv_cache *cache, uint32_t pages);
/* The index of a model, made when it is new; SKV_NO_MODEL when there are too many. */
uint16_t skv_model_index(struct skv_cache *cache, struct skv_id model);
struct skv_record skv_stored_record(const struct skv_cache *cache, const struct record *record);
uint64_t skv_chain_before(const struct skv_cache *cache, const struct record *record);
/* Says in the table what a page of a user's residence is now. */
void skv_describe(struct skv_cache *cache, const struct residence *r, uint32_t index);
void skv_describe_own(struct skv_cache *cache, uint32_t page, const struct record *record,
                      uint32_t index, uint16_t session);
/* A page that is held but no user's, or no user's any more: a restart does not find it. */
void skv_describe_held(struct skv_cache *cache, uint32_t page);
/* A page that is about to be the user's. */
void skv_describe_ahead(struct skv_cache *cache, const struct record *record, uint32_t page,
                        uint32_t index, uint32_t valid, uint64_t hash);
void skv_describe_free(struct skv_cache *cache, uint32_t page);
void skv_let_go(struct skv_cache *cache,
                uint32_t page); /* drops a hold; describes the page as free when it was the last */
static inline bool skv_in_limbo(const struct skv_cache *cache, uint32_t page)
{
    return cache->residences.page[page].limbo;
}
/* Takes `count` pages of an owner's extents, evicting what may be evicted; returns how many it got.
 */
uint32_t skv_take_pages(struct skv_cache *cache, uint32_t owner, uint64_t generation,
                        uint32_t count, uint32_t *out);
/* Evicts the least recently used user that is stored; failing that, the least recently used one.
 * false: all are held. */
bool skv_evict_one(struct skv_cache *cache);
/* Leaves a user that nothing holds its first `keep` pages only. */
void skv_evict_to(struct skv_cache *cache, uint32_t residence, uint32_t keep);
/* Is everything of it stored, so that evicting it costs only time? */
static inline bool skv_is_stored(const struct skv_cache *cache, const struct residence *r)
{
    return cache->records.all[r->record].stored >= r->tokens;
}
/* The user has only its first `keep` pages from now on. */
void skv_drop_pages(struct skv_cache *cache, struct residence *r, uint32_t keep);
/* Empties and removes a residence that nothing holds, and its user's record when nothing is left of
 * it. */
void skv_settle(struct skv_cache *cache, uint32_t residence);
/* A new residence for the same user with the first `pages` pages; the old one lives on detached.
 * SKV_NONE: no room (then the user is not resident any more). `tokens` in those pages. */
uint32_t skv_succeed(struct skv_cache *cache, uint32_t residence, uint32_t pages, uint32_t tokens);
/* Gives a user its next generation, in the table too. */
void skv_new_generation(struct skv_cache *cache, struct record *record);
/* The store's part of a cut: its record is to have `tokens` at most. `change` is from
 * skv_new_change(), of tokens / S pages; NULL: no memory, the store is not told yet. Returns the
 * change's id. */
uint64_t skv_cut_stored(struct skv_cache *cache, uint32_t record, uint32_t tokens,
                        const uint64_t *hashes, struct skv_change *change);
/* Has the store told of a resident user's generation, where there was no memory to do so before. */
void skv_tell(struct skv_cache *cache, uint32_t record);
/* Leaves a user its first `keep` pages, all full; in a residence of its own when what it lost may
 * still be read. Returns the residence, SKV_NONE: no room for it. */
uint32_t skv_shorten(struct skv_cache *cache, uint32_t residence, uint32_t keep);
/* Shortens a user to `tokens`, a multiple of the page size: new generation, the store too. hashes:
 * of its first tokens / S pages. *id: the change of the store, 0: none was needed; NULL: nobody
 * waits for it. SKV_ENOMEM: nothing was done. */
int skv_cut(struct skv_cache *cache, uint32_t record, uint32_t tokens, const uint64_t *hashes,
            uint64_t *id);
/* Its stored pages are not asked for a while. */
void skv_unread(struct skv_cache *cache, uint64_t generation);
bool skv_is_unread(const struct skv_cache *cache, uint64_t generation);
/* Are these the stored hashes of the user as the core knows it? */
static inline bool skv_is_of(const struct skv_cache *cache, const struct skv_known *known,
                             const struct record *record)
{
    uint32_t full = record->stored / cache->geometry.page_tokens;
    return known->count >= full && (!full || known->hashes[full - 1] == record->hash_full);
}
/* Counts a stored tail as not stored: an offload may have written over its page. */
void skv_forget_tail(struct skv_cache *cache, uint32_t record);

/* cache_offload.c: which residences have tokens to store */
/* Puts a residence with unstored tokens into the right queue and counts it in flush epoch `epoch`
 * (0: the current one) if it is not counted yet; without any, takes it out. */
void skv_dirty(struct skv_cache *cache, uint32_t residence, uint64_t epoch);
static inline void skv_requeue(struct skv_cache *cache, uint32_t residence)
{
    skv_dirty(cache, residence, 0);
}
void skv_undirty(struct skv_cache *cache, uint32_t residence); /* out of queue and count */

/* cache_extents.c */
/* The owner whose pages a session appends to. */
uint32_t skv_appends_from(const struct skv_cache *cache, uint32_t session);
/* May the session write to a page that is in use? */
bool skv_may_write(const struct skv_cache *cache, uint32_t session, uint32_t page);
/* One more step towards free pages of an owner; false: there is nothing to be had. `evictions`: so
 * far, for this taking. */
bool skv_make_room(struct skv_cache *cache, uint32_t owner, uint32_t *evictions);
/* A lease begins (by 1) or ends (by -1) to write where it appends. */
void skv_writes(struct skv_cache *cache, const struct batch *batch, const struct lease *lease,
                int by);
/* After a batch: the session's next extent, before its last is full. */
void skv_look_ahead(struct skv_cache *cache, uint32_t session);
void skv_extents_adopt(struct skv_cache *cache, bool limbo);
void skv_extents_settle(struct skv_cache *cache);

/* cache_adopt.c */
/* What the store says of a user whose pages were adopted. */
void skv_reconcile(struct skv_cache *cache, uint32_t record, const struct skv_record *stored,
                   const uint64_t *hashes);
/* There is nothing more to reconcile. */
void skv_adopted(struct skv_cache *cache);

/* cache_commit.c */
void skv_lease_end(struct skv_cache *cache, struct session *session, uint32_t row, uint32_t entry,
                   bool held);

#endif
