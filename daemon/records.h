/* Every user the cache knows of, resident or stored or both: 64 bytes each, found by {model, user},
 * in LRU order of those stored.
 *
 * Records live at fixed indices in memory that is reserved once and touched as needed. The index
 * over them is a linear hash: one bucket is split per insertion, so it grows without ever stopping
 * to rehash. One thread: the loop. */
#ifndef SKV_RECORDS_H
#define SKV_RECORDS_H

#include "sidekv.h"

#define SKV_NONE UINT32_MAX

struct record {
    struct skv_id user;
    uint64_t generation;
    uint64_t
        hash_full; /* chain hash at the last full stored page (of page -1: the chain's start) */
    uint64_t hash_tail; /* chain hash at `stored` tokens */
    uint32_t last_use_s;
    uint16_t model : 14;   /* index of the fingerprint */
    uint16_t untold : 1;   /* the store may know another generation of its stored tail */
    uint16_t telling : 1;  /* a change that says this one is on its way there */
    uint16_t stored;       /* tokens in the store; SKV_MAX_TOKENS fits */
    uint32_t residence;    /* pages in the pool, or SKV_NONE */
    uint32_t chain;        /* next in its bucket */
    uint32_t newer, older; /* LRU of stored users; `older` also links free records */
};
_Static_assert(sizeof(struct record) == 64, "ten million users in 640 MB");
_Static_assert(SKV_MAX_TOKENS <= UINT16_MAX, "stored tokens fit");

#define SKV_MAX_MODELS 4096u
#define SKV_NO_MODEL   0x3fffu /* of a freed record */

struct records {
    struct record *all; /* [capacity], reserved */
    uint32_t *buckets;  /* [2 * capacity rounded up to a power of two], reserved */
    uint32_t capacity;
    uint32_t used;         /* indices ever handed out */
    uint32_t free;         /* list of freed ones, or SKV_NONE */
    uint32_t count;        /* live */
    uint32_t stored_count; /* in the LRU */
    uint32_t level,
        split; /* linear hash: 1 << level buckets, the first `split` of them split already */
    uint32_t newest, oldest;   /* LRU ends */
    struct unsorted *unsorted; /* [unsorted_count] a heap, the most recently used on top */
    uint32_t unsorted_count, unsorted_room;
};

/* Reserves room for `capacity` users. SKV_ENOMEM. */
int skv_records_init(struct records *records, uint32_t capacity);
void skv_records_fini(struct records *records);

/* The record of a user, or SKV_NONE. */
uint32_t skv_records_find(const struct records *records, uint16_t model, struct skv_id user);
/* A new one, empty: not stored, not resident. SKV_NONE when full. The user must not have one. */
uint32_t skv_records_add(struct records *records, uint16_t model, struct skv_id user);
void skv_records_remove(struct records *records, uint32_t index);

/* Sets how many tokens are stored; puts the record in the LRU (as the newest when it was not in),
 * or takes it out at 0. */
void skv_records_set_stored(struct records *records, uint32_t index, uint32_t tokens);
/* Moves a stored record to the newest end; nothing for others. */
void skv_records_touch(struct records *records, uint32_t index);
/* At the start: a record that was found in the store has its place in the LRU by last_use_s, once
 * all are sorted. SKV_ENOMEM. */
int skv_records_unsorted(struct records *records, uint32_t index);
/* Gives up to `limit` of them their places; true: it was the last. Some 100 ns each. */
bool skv_records_sort(struct records *records, uint32_t limit);

#endif
