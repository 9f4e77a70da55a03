/* Steps that the named tests of the cache core are told in. */
#ifndef SKV_CACHE_STEPS_H
#define SKV_CACHE_STEPS_H

#include "cache_restarts.h"

static inline void setup(uint32_t pages)
{
    world_open((struct skv_cache_options){.pages = pages,
                                          .sessions = SESSIONS,
                                          .max_records = 100,
                                          .lease_ms = 300,
                                          .tail_ms = 500,
                                          .store = true});
    workers_open();
    for (uint32_t s = 0; s < SESSIONS; s++)
        session_open(s);
}

static inline void later(uint64_t ms)
{
    world.now_ms += ms;
    skv_cache_time(world.cache, world.now_ms, (uint32_t)(world.clock_s += ms / 1000));
}

/* A user's history of `tokens` tokens; one that differs from `from` on when `version` does. */
static inline void history(struct view *view, uint32_t u, uint32_t tokens, uint32_t from,
                           uint32_t version)
{
    *view = (struct view){.user = u, .history = tokens, .max_cached = UINT32_MAX};
    for (uint32_t i = 0; i < tokens; i++)
        view->tokens[i] = 1000 * (u + 1) + i + (i >= from ? 100000 * version : 0);
}

static inline struct view *acquire_view(uint32_t s, uint32_t r, struct view view)
{
    struct sim_row *row = &sessions[s].rows[r];
    row->count = 1;
    row->views[0] = view;
    CHECK(acquire_begin(s, r, true));
    acquire_end(s, r);
    skv_cache_check(world.cache);
    return &row->views[0];
}

static inline struct view *acquire(uint32_t s, uint32_t r, uint32_t u, uint32_t tokens)
{
    struct view view;
    history(&view, u, tokens, 0, 0);
    return acquire_view(s, r, view);
}

static inline struct view *acquire_edited(uint32_t s, uint32_t r, uint32_t u, uint32_t tokens,
                                          uint32_t from)
{
    struct view view;
    history(&view, u, tokens, from, 1);
    return acquire_view(s, r, view);
}

static inline void run_pass(uint32_t s, uint32_t r)
{
    while (run_step(&sessions[s], &sessions[s].rows[r], WORLD_TOKENS))
        ;
}

static inline void finish(uint32_t s, uint32_t r, bool commit)
{
    run_pass(s, r);
    row_end(s, r, commit, ~0u);
    skv_cache_check(world.cache);
    check_table();
}

static inline void append(uint32_t u, uint32_t tokens)
{
    struct view *view = acquire(0, 0, u, tokens);
    CHECK(view->grant.flags & SKV_GRANT_APPEND);
    finish(0, 0, true);
}

static inline void store_all(void)
{
    while (offload_begin(4, true))
        settle_mover();
    sync_users(true);
}

static inline void evict(uint32_t u)
{
    CHECK(skv_cache_evict(world.cache, record_of(u)) == 0);
    take_actions();
    sync_users(true);
    CHECK(info_of(u).resident == 0);
}

/* Stored, and no longer in the pool. */
static inline void put_away(uint32_t u, uint32_t tokens)
{
    append(u, tokens);
    store_all();
    evict(u);
}

static inline bool appends(const struct view *view)
{
    return view->grant.flags & SKV_GRANT_APPEND;
}

static inline bool gated(const struct view *view)
{
    return view->grant.flags & SKV_GRANT_GATED;
}

static inline struct wire_committed end_lease(uint32_t s, uint32_t r, uint64_t lease, bool commit)
{
    struct wire_committed result;
    skv_cache_end(world.cache, sessions[s].slot, r, &lease, 1, commit, &result);
    take_actions();
    return result;
}

#endif
