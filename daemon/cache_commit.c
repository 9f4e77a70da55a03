/* The end of a lease: COMMIT makes what it appended the user's, RELEASE and a session's end drop
 * it. */
#include "cache_internal.h"

/* Where an appended tail begins below the residence's last page: the prefix lives on in a new
 * residence, without that page. */
static uint32_t swap_tail(struct skv_cache *cache, uint32_t index, uint32_t base)
{
    struct residence *r = residence_at(cache, index);
    if (r->leases > 1 || r->copies)
        return skv_succeed(cache, index, base, base * cache->geometry.page_tokens);
    skv_drop_pages(cache, r, base);
    r->tokens = base * cache->geometry.page_tokens;
    return index;
}

/* Makes the lease's tokens committed. Returns the user's residence then, or SKV_NONE when nothing
 * came of it. */
static uint32_t commit(struct skv_cache *cache, struct batch *batch, struct lease *lease)
{
    uint32_t index = lease->residence;
    struct residence *r = residence_at(cache, index);
    uint32_t pages = pages_of(cache, lease->history), before = r->tokens;
    const uint64_t *hashes = batch->input.hashes + lease->hash_offset;
    const uint32_t *own = batch->own + lease->own;
    uint64_t epoch = r->dirty_epoch; /* a swapped tail is still owed to whoever flushed it */
    if (r->pages > lease->base) {
        /* The table shows the fuller page before it loses the old tail: a kill in between, and the
         * next daemon takes the fuller one. */
        uint32_t size = cache->geometry.page_tokens, left = lease->history - lease->base * size;
        skv_describe_ahead(cache, &cache->records.all[r->record], own[0], lease->base,
                           left < size ? left : size, hashes[lease->base]);
        skv_failpoint(FAIL_commit_ahead);
        index = swap_tail(cache, index, lease->base);
        skv_failpoint(FAIL_commit_swapped);
    }
    if (index == SKV_NONE)
        return SKV_NONE;
    if (!skv_residence_reserve(&cache->residences, index, pages))
        return SKV_NONE;
    r = residence_at(cache, index);
    assert(r->pages == lease->base);
    cache->stats.appended_tokens += lease->history > before ? lease->history - before : 0;
    r->tokens = lease->history;
    if (lease->tail_in_place)
        r->hash[lease->base - 1] = hashes[lease->base - 1];
    if (r->ready == r->pages)
        r->ready = pages;
    for (uint32_t i = 0; i < lease->owned; i++)
        skv_residence_push(&cache->residences, index, own[i], hashes[lease->base + i]);
    lease->owned = 0; /* the residence holds them now */
    for (uint32_t i = lease->base - lease->tail_in_place; i < pages; i++) {
        skv_describe(cache, r, i);
        skv_failpoint(FAIL_commit_page);
    }
    r->committed_ms = cache->now_ms;
    skv_dirty(cache, index, epoch);
    return index;
}

void skv_lease_end(struct skv_cache *cache, struct session *session, uint32_t row, uint32_t entry,
                   bool commits)
{
    struct batch *batch = &session->batches[row];
    struct lease *lease = &batch->leases[entry];
    uint32_t index = lease->residence;
    if (index != SKV_NONE) {
        struct residence *r = residence_at(cache, index);
        uint32_t me = appender_of((uint32_t)(session - cache->sessions), row, entry);
        if (r->appender == me)
            r->appender = SKV_NONE;
        r->tail_writers -= lease->tail_in_place;
        skv_writes(cache, batch, lease, -1);
        if (commits)
            commit(cache, batch, lease);
        else if (lease->tail_in_place && r->record != SKV_NONE && r->pages >= lease->base)
            skv_describe(cache, r, lease->base - 1);
        for (uint32_t i = 0; i < lease->owned; i++)
            skv_let_go(cache, batch->own[lease->own + i]);
        r->leases--;
        lease->residence = SKV_NONE;
        skv_settle(cache, index);
    }
    lease->state = LEASE_NONE;
    lease->owned = 0;
    batch->open--;
}

/* Its user was cut, or its residence replaced, since the grant: what it computed does not follow
 * from what is there. */
static bool is_stale(struct skv_cache *cache, const struct lease *lease)
{
    const struct residence *r = residence_at(cache, lease->residence);
    if (r->record == SKV_NONE || cache->records.all[r->record].generation != lease->generation)
        return true;
    /* A tail can be swapped only for a list whose pages are all there. (It was asked for while a
     * fenced session held the tail that is still being loaded; or, in a protected pool, while
     * somebody who reads has it loaded.) */
    return r->loads && r->pages > lease->base;
}

static struct wire_committed end_one(struct skv_cache *cache, struct session *session, uint32_t row,
                                     uint64_t id, bool commits)
{
    struct batch *batch = &session->batches[row];
    uint32_t entry = id & 0xff;
    if (entry >= batch->count || batch->leases[entry].state == LEASE_NONE ||
        id != lease_id(session->epoch, batch->serial, row, entry)) {
        cache->stats.commits_stale += commits;
        return (struct wire_committed){.status = SKV_ESTALE};
    }
    struct lease *lease = &batch->leases[entry];
    struct skv_id user = batch->input.requests[entry].user;
    struct wire_committed result = {0};
    bool appends = commits && lease->state == LEASE_APPEND;
    if (appends && is_stale(cache, lease)) {
        appends = false;
        result.status = SKV_ESTALE;
        cache->stats.commits_stale++;
    } else {
        cache->stats.commits += commits;
    }
    skv_lease_end(cache, session, row, entry, appends);
    uint32_t owner = skv_records_find(&cache->records, session->model, user);
    if (owner != SKV_NONE) {
        const struct record *record = &cache->records.all[owner];
        const struct residence *r = residence_of(cache, owner);
        result.stored = record->stored;
        result.committed = r && r->tokens > record->stored ? r->tokens : record->stored;
    }
    return result;
}

bool skv_cache_end(struct skv_cache *cache, uint32_t slot, uint32_t row, const uint64_t *leases,
                   uint32_t count, bool commits, struct wire_committed *results)
{
    struct session *session = &cache->sessions[slot];
    for (uint32_t i = 0; i < count; i++)
        results[i] = end_one(cache, session, row, leases[i], commits);
    skv_look_ahead(cache, slot);
    return session->batches[row].job != NULL;
}
