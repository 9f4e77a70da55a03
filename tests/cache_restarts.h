/* The daemon's end, and what outlives it: the descriptor table, restarts cold and hot, and the
 * judgement of what a new daemon makes of pool and store. Then the checks of a whole world: of its
 * views, of its table, and of its quiet end, which finishes a hot restart that is under way. */
#ifndef SKV_CACHE_RESTARTS_H
#define SKV_CACHE_RESTARTS_H

#include "cache_workers.h"

/* ---- the descriptor table ---- */

static inline struct wire_descriptor descriptor(uint32_t page)
{
    const struct wire_page_entry *entry = &world.table->entries[page];
    struct wire_descriptor found = entry->slot[entry->sequence & 1];
    if (entry->sequence)
        CHECK(found.check ==
              (uint32_t)skv_checksum(&found, offsetof(struct wire_descriptor, check)));
    return found;
}

/* What the table alone says of a user: its pages, in order. Returns the tokens in them. */
static inline uint32_t rebuild(uint32_t user, tag *tags)
{
    uint64_t best[WORLD_PAGES] = {0};
    struct wire_descriptor found[WORLD_PAGES];
    uint32_t at[WORLD_PAGES], tokens = 0;
    for (uint32_t page = 0; page < world.options.pages; page++) {
        struct wire_descriptor d = descriptor(page);
        if (!(d.flags & WIRE_PAGE_VALID) || d.flags & WIRE_PAGE_LOADING || !d.valid ||
            !skv_id_equal(d.model, world.users[user].model) ||
            !skv_id_equal(d.user, world.users[user].id))
            continue;
        CHECK(d.index < WORLD_PAGES && d.valid <= S && d.flags & WIRE_PAGE_USED);
        CHECK(d.generation <= world.table->generation);
        if (d.generation <= best[d.index])
            continue;
        best[d.index] = d.generation;
        found[d.index] = d;
        at[d.index] = page;
    }
    for (uint32_t i = 0; i < WORLD_PAGES && best[i] && (!i || best[i] >= best[i - 1]); i++) {
        memcpy(tags + tokens, world.pool[at[i]], found[i].valid * sizeof(tag));
        tokens += found[i].valid;
        if (found[i].valid < S)
            break;
    }
    return tokens;
}

/* ---- restarts ---- */

static inline void restore_stored(uint32_t u)
{
    const struct stored_user *stored = &world.store[u];
    struct skv_record record = {.model = world.users[u].model,
                                .user = world.users[u].id,
                                .generation = stored->generation,
                                .hash_full = stored->hash_full,
                                .hash_tail = stored->hash_tail,
                                .last_use_s = stored->last_use_s,
                                .tokens = stored->tokens};
    starve();
    if (stored->tokens)
        CHECK(skv_cache_restore(world.cache, &record, stored->hashes) == 0);
    world.users[u].untold = starve_end() ? info_of(u).generation : 0;
}

/* A hot restart between its two halves: the cache is early, users are restored one by one. */
static struct {
    uint32_t restored;            /* users so far */
    uint32_t pooled[WORLD_USERS]; /* tokens that the table alone had before it */
    uint32_t count[WORLD_USERS];  /* what was committed before it */
    uint32_t stored[WORLD_USERS]; /* and how much of that was known to be stored */
    tag committed[WORLD_USERS][WORLD_TOKENS];
    bool unanswered[WORLD_USERS]; /* a COMMIT of it, which may count or not: it waited for copies */
} awaited;

static inline bool is_unanswered(uint32_t u)
{
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t r = 0; r < ROWS; r++)
            for (uint32_t i = 0; i < sessions[s].rows[r].count; i++)
                if (sessions[s].rows[r].unanswered && sessions[s].rows[r].views[i].user == u)
                    return true;
    return false;
}

/* The daemon is killed; the pool and its descriptors are not. What is in them is served. */
static inline void hot_restart_begin(bool limbo)
{
    uint64_t views = 0;
    for (uint32_t s = 0; s < SESSIONS; s++)
        views |= sessions[s].views;
    for (uint32_t u = 0; u < WORLD_USERS; u++) {
        tag tags[WORLD_TOKENS];
        awaited.pooled[u] = rebuild(u, tags);
        CHECK(info_of(u).committed == world.users[u].count);
        if (world.early && u >= awaited.restored)
            continue; /* as it was before the restart before */
        awaited.count[u] = world.users[u].count;
        memcpy(awaited.committed[u], world.users[u].committed, sizeof awaited.committed[u]);
        awaited.stored[u] = world.users[u].stored_count;
        CHECK(memcmp(world.users[u].stored, world.users[u].committed,
                     awaited.stored[u] * sizeof(tag)) == 0);
        awaited.unanswered[u] = is_unanswered(u);
    }
    world.options.generation = world.table->generation + 1;
    world_cache_close();
    workers_open();
    CHECK(skv_cache_open(&world.options, &world.cache) == 0);
    skv_cache_time(world.cache, world.now_ms, (uint32_t)world.clock_s);
    skv_cache_adopt(world.cache, limbo);
    skv_cache_check(world.cache);
    CHECK(!limbo || stats_now().extents_owned >= (uint32_t)__builtin_popcountll(views));
    if (limbo)
        skv_cache_settle(world.cache);
    CHECK(!stats_now().extents_owned);
    awaited.restored = 0;
    world.early = true;
    world.dropped_tokens = 0;
    for (uint32_t u = 0; u < WORLD_USERS; u++) { /* what is known of it */
        struct sim_user *user = &world.users[u];
        struct skv_user_info info = info_of(u);
        CHECK(rebuild(u, user->committed) == info.resident && !info.stored);
        CHECK(info.resident == info.committed);
        user->count = info.committed;
        user->stored_count = 0;
        user->generation = info.generation;
        user->forgotten_by = 0;
    }
}

/* One more user of the store is heard of, or all have been. All that was committed must be there,
 * or more where a cut had not reached the store. */
static inline void hot_restart_step(void)
{
    if (awaited.restored == 0)
        skv_cache_number_above(world.cache, skv_cache_generation(world.cache) + 10);
    if (awaited.restored == WORLD_USERS) {
        world.early = !skv_cache_restored(world.cache, 1);
        for (uint32_t u = 0; u < WORLD_USERS && !world.early; u++)
            if (info_of(u).generation) /* of which pages were dropped have a new one */
                world.users[u].generation = info_of(u).generation;
        take_actions();
        return;
    }
    uint32_t u = awaited.restored++;
    restore_stored(u);
    take_actions();
    struct sim_user *user = &world.users[u];
    const struct stored_user *stored = &world.store[u];
    struct skv_user_info info = info_of(u);
    tag tags[WORLD_TOKENS];
    for (uint32_t i = 0; i < stored->tokens; i++)
        tags[i] = stored->pages[i / S].tags[i % S];
    CHECK(info.stored <= stored->tokens);
    memcpy(user->stored, tags, info.stored * sizeof(tag));
    CHECK(rebuild(u, tags) == info.resident);
    /* Users whose removal had not reached the store may fill a small table of users. */
    bool lossy = awaited.unanswered[u] || world.options.max_records < WORLD_USERS;
    CHECK(info.resident >= awaited.pooled[u] || info.stored >= awaited.pooled[u] || lossy);
    CHECK(info.committed >= awaited.count[u] || lossy);
    CHECK(info.stored >= awaited.stored[u] || lossy);
    uint32_t least = awaited.count[u] < info.committed ? awaited.count[u] : info.committed;
    CHECK(memcmp(tags, awaited.committed[u], least * sizeof(tag)) == 0 || awaited.unanswered[u]);
    memcpy(user->committed, tags, info.committed * sizeof(tag));
    user->count = info.committed;
    user->stored_count = info.stored;
    user->generation = info.generation;
    sync_users(false); /* others made way for it */
}

static inline void hot_restart(bool limbo)
{
    hot_restart_begin(limbo);
    while (world.early)
        hot_restart_step();
}

/* The daemon is killed and a new one started: what was said to be stored must be there. */
static inline void restart(void)
{
    uint64_t generation = skv_cache_generation(world.cache) + 10;
    world_cache_close();
    workers_open();
    world_cache_open(generation);
    for (uint32_t u = 0; u < WORLD_USERS; u++) {
        struct sim_user *user = &world.users[u];
        const struct stored_user *stored = &world.store[u];
        tag tags[WORLD_TOKENS];
        for (uint32_t i = 0; i < stored->tokens; i++)
            tags[i] = stored->pages[i / S].tags[i % S];
        CHECK(stored->tokens >= user->stored_count);
        CHECK(memcmp(tags, user->stored, user->stored_count * sizeof(tag)) == 0);
        user->count = user->stored_count = stored->tokens;
        memcpy(user->committed, tags, sizeof tags);
        memcpy(user->stored, tags, sizeof tags);
        user->generation = user->forgotten_by = 0;
        restore_stored(u);
        user->generation = stored->tokens ? stored->generation : 0;
    }
    while (!skv_cache_restored(world.cache, 1))
        ;
    world.dropped_tokens = 0;
    world.early = false;
}

/* Once nothing is late any more, nobody waits for anything, and every page can be had. */
static inline void check_quiet(void)
{
    while (world.early)
        hot_restart_step();
    settle_mover();
    CHECK(!loading());
    for (uint32_t s = 0; s < SESSIONS; s++) {
        for (uint32_t r = 0; r < ROWS && sessions[s].state != CLOSED; r++) {
            const struct sim_row *row = &sessions[s].rows[r];
            CHECK(row->phase != WAITING || sessions[s].state != LIVE);
            for (uint32_t layer = 0; row->phase == GRANTED && layer < WORLD_LAYERS; layer++)
                CHECK(row->gates[layer]);
        }
        if (sessions[s].state == LIVE)
            fence(s);
        if (sessions[s].state != CLOSED)
            session_gone(s);
        CHECK(sessions[s].state == CLOSED);
    }
    while (offload_begin(4, true))
        settle_mover();
    for (uint32_t u = 0; u < WORLD_USERS; u++) {
        struct skv_user_info info = info_of(u);
        CHECK(!info.leases && (!world.options.store || info.stored == info.committed));
        CHECK(record_of(u) == SKV_NONE || skv_cache_evict(world.cache, record_of(u)) == 0);
    }
    take_actions();
    settle_mover();
    struct skv_stats stats = stats_now();
    CHECK(stats.pool_pages_free == stats.pool_pages && !stats.users_resident);
    CHECK(stats.extents_free == stats.extents);
    CHECK(!stats.pool_pages_quarantined && stats.users_known == stats.users_stored);
    skv_cache_check(world.cache);
}

/* ---- the checks of the views and the table ---- */

/* Nobody can write to what another can, nor to a committed page that its own worker has not filled.
 */
static inline void check_views(void)
{
    for (uint32_t s = 0; s < SESSIONS && world.options.extent_pages; s++) {
        for (uint32_t other = 0; other < s; other++)
            CHECK(!(sessions[s].views & sessions[other].views));
        for (uint32_t page = 0; sessions[s].views && page < world.options.pages; page++)
            CHECK(!(sessions[s].views & extent_bit(page)) ||
                  !(descriptor(page).flags & WIRE_PAGE_VALID) ||
                  world.filled_by[page] == sessions[s].serial);
    }
}

static inline void check_table(void)
{
    struct skv_stats stats = stats_now();
    uint64_t unused = 0;
    for (uint32_t page = 0; page < world.options.pages; page++)
        unused += !(descriptor(page).flags & WIRE_PAGE_USED);
    CHECK(unused == stats.pool_pages_free);
    for (uint32_t i = 0; i < WORLD_USERS; i++) {
        tag tags[WORLD_TOKENS];
        struct skv_user_info info = info_of(i);
        uint32_t tokens = rebuild(i, tags);
        CHECK(tokens <= info.resident);
        CHECK(loading() || tokens == info.resident);
        CHECK(memcmp(tags, world.users[i].committed, tokens * sizeof(tag)) == 0);
    }
    CHECK(world.table->generation == skv_cache_generation(world.cache));
}

#endif
