/* What the CLI and the counters ask of the core, and the check of its invariants. */
#include "cache_internal.h"

#include <stdio.h>

uint32_t skv_cache_find(const struct skv_cache *cache, struct skv_id model, struct skv_id user)
{
    for (uint32_t i = 0; i < cache->model_count; i++)
        if (skv_id_equal(cache->models[i], model))
            return skv_records_find(&cache->records, (uint16_t)i, user);
    return SKV_NONE;
}

uint32_t skv_cache_find_any(const struct skv_cache *cache, struct skv_id user, uint32_t *model)
{
    while (*model < cache->model_count) {
        uint32_t record = skv_records_find(&cache->records, (uint16_t)(*model)++, user);
        if (record != SKV_NONE)
            return record;
    }
    return SKV_NONE;
}

void skv_cache_info(const struct skv_cache *cache, uint32_t index, struct skv_user_info *info)
{
    const struct record *record = &cache->records.all[index];
    const struct residence *r =
        record->residence == SKV_NONE ? NULL : &cache->residences.all[record->residence];
    uint32_t resident = r ? r->tokens : 0;
    *info = (struct skv_user_info){
        .model = cache->models[record->model],
        .user = record->user,
        .generation = record->generation,
        .last_use_s = record->last_use_s,
        .committed = resident > record->stored ? resident : record->stored,
        .resident = resident,
        .stored = record->stored,
        .leases = r ? r->leases : 0,
    };
}

uint32_t skv_cache_next(const struct skv_cache *cache, uint64_t *cursor, uint32_t scan)
{
    uint32_t found = SKV_NONE;
    for (uint32_t i = 0; i < scan && *cursor < cache->records.used && found == SKV_NONE; i++) {
        uint32_t index = (uint32_t)(*cursor)++;
        if (cache->records.all[index].model != SKV_NO_MODEL)
            found = index;
    }
    if (*cursor >= cache->records.used)
        *cursor = 0;
    return found;
}

int skv_cache_truncate(struct skv_cache *cache, uint32_t index, uint32_t tokens,
                       const struct skv_known *known, uint32_t *kept, uint64_t *change)
{
    const struct record *record = &cache->records.all[index];
    const struct residence *r = residence_of(cache, index);
    uint32_t size = cache->geometry.page_tokens, resident = r ? r->tokens : 0;
    uint32_t committed = resident > record->stored ? resident : record->stored;
    assert(!cache->early);
    *change = 0;
    *kept = committed;
    if (tokens && tokens >= committed)
        return SKV_OK; /* but to 0 also what is only leased: its COMMIT shall be stale */
    uint32_t keep = tokens / size;
    const uint64_t *hashes = r ? r->hash : NULL;
    if (keep * size > resident) {
        if (!known)
            return SKV_EAGAIN;
        if (!skv_is_of(cache, known, record))
            keep = resident / size; /* it changed meanwhile */
        else
            hashes = known->hashes;
    }
    uint16_t model = record->model;
    struct skv_id user = record->user;
    if (skv_cut(cache, index, keep * size, hashes, change))
        return SKV_ENOMEM;
    struct skv_user_info left = {0}; /* pages that were being loaded are gone too */
    if ((index = skv_records_find(&cache->records, model, user)) != SKV_NONE)
        skv_cache_info(cache, index, &left);
    *kept = left.committed;
    return SKV_OK;
}

#define STORE_EVICT_SCAN 256u

uint64_t skv_cache_evict_stored(struct skv_cache *cache)
{
    uint32_t index = cache->records.oldest;
    assert(!cache->early);
    for (uint32_t i = 0; i < STORE_EVICT_SCAN && index != SKV_NONE; i++) {
        struct record *record = &cache->records.all[index];
        if (record->residence != SKV_NONE) { /* in use: it would be stored again */
            index = record->newer;
            continue;
        }
        struct skv_change *change = skv_new_change(cache, 0);
        if (!change) {
            cache->starved = true;
            return 0;
        }
        change->id = ++cache->next_job;
        change->kind = SKV_CHANGE_RECORD;
        change->record = skv_stored_record(cache, record);
        change->record.tokens = 0;
        skv_act(cache, SKV_ACTION_CHANGE)->job = change;
        cache->stats.store_evicted_users++;
        skv_records_remove(&cache->records, index);
        return change->id;
    }
    return 0;
}

uint64_t skv_cache_generation(const struct skv_cache *cache)
{
    return cache->generation;
}

void skv_cache_stats(const struct skv_cache *cache, struct skv_stats *stats)
{
    *stats = cache->stats;
    stats->pool_pages = cache->residences.pages;
    stats->pool_pages_free = cache->residences.free_pages;
    stats->pool_protected = cache->residences.protect;
    if (cache->residences.protect) {
        const struct owner *owners = cache->residences.owners;
        stats->extents = cache->residences.extents;
        stats->extents_free = owners[EXTENT_FREE].extents;
        stats->extents_common = owners[EXTENT_COMMON].extents;
        stats->extents_owned = stats->extents - stats->extents_free - stats->extents_common;
    }
    stats->users_known = cache->records.count;
    stats->users_resident = cache->residences.count;
    stats->users_stored = cache->records.stored_count;
    uint32_t size = cache->geometry.page_tokens;
    for (int tails = 0; tails < 2; tails++) {
        const struct backlog *queue = tails ? &cache->tails : &cache->dirty;
        for (uint32_t i = queue->first; i != SKV_NONE; i = cache->residences.all[i].behind) {
            const struct residence *r = &cache->residences.all[i];
            stats->offload_backlog += r->pages - cache->records.all[r->record].stored / size;
        }
    }
    for (uint32_t i = 0; i < cache->options.sessions; i++) {
        const struct session *session = &cache->sessions[i];
        for (uint32_t row = 0; session->state == SESSION_FENCED && row < session->rows; row++)
            for (uint32_t entry = 0; entry < session->batches[row].count; entry++) {
                const struct lease *lease = &session->batches[row].leases[entry];
                if (lease->residence != SKV_NONE)
                    stats->pool_pages_quarantined +=
                        lease->owned + cache->residences.all[lease->residence].pages;
            }
    }
}

/* ---- the check ---- */

#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "cache: broken at %s:%d: %s\n", __FILE__, __LINE__, #condition);       \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static void check_residence(const struct skv_cache *cache, uint32_t index, uint32_t *refs,
                            uint32_t *dirty)
{
    const struct residence *r = &cache->residences.all[index];
    uint32_t size = cache->geometry.page_tokens;
    for (uint32_t i = 0; i < r->pages; i++)
        refs[r->page[i]]++;
    MUST(r->ready <= r->pages);
    MUST(r->loads <= r->copies && !r->loads == !r->load_job);
    MUST(r->loads || r->ready == r->pages);
    MUST(r->tokens <= r->pages * size && r->tokens + size > r->pages * size);
    if (r->record == SKV_NONE) {
        MUST(r->leases || r->copies);
        return;
    }
    const struct record *record = &cache->records.all[r->record];
    MUST(record->residence == index);
    for (uint32_t i = 0; cache->residences.protect && i < r->pages; i++)
        MUST(cache->residences.page[r->page[i]].residence == index);
    MUST(r->pages || r->leases || r->copies);
    MUST(r->tokens >= record->stored || r->tokens % size == 0);
    bool unstored = cache->options.store && r->tokens > record->stored;
    MUST(unstored == (r->dirty_epoch != 0));
    MUST(!unstored || r->queued || r->offload);
    if (r->dirty_epoch)
        dirty[r->dirty_epoch % FLUSH_EPOCHS]++;
}

/* `writing` [extents]: pages that open leases may write to. */
static void check_extents(const struct skv_cache *cache, const uint32_t *writing)
{
    const struct residences *rs = &cache->residences;
    struct owner sums[EXTENT_OWNERS] = {0};
    for (uint32_t e = 0; e < rs->extents; e++) {
        const struct extent *extent = &rs->extent[e];
        uint32_t unused = 0, next = extent->first_free;
        for (uint32_t i = 0; i < extent->pages; i++)
            unused += !rs->page[e * rs->extent_pages + i].refs;
        MUST(unused == extent->free);
        for (uint32_t i = 0; i < unused; i++) {
            MUST(next < rs->pages && rs->page[next].extent == e && !rs->page[next].refs);
            next = rs->page[next].next_free;
        }
        MUST(extent->writing == writing[e]);
        sums[extent->owner].extents++;
        sums[extent->owner].free_pages += extent->free;
        MUST(rs->protect || extent->owner == EXTENT_COMMON);
        MUST(!rs->protect || extent->owner != EXTENT_COMMON || unused < extent->pages);
        MUST(extent->owner != EXTENT_FREE || extent->free == extent->pages);
        MUST(extent->owner >= EXTENT_COMMON ||
             cache->sessions[extent->owner].state != SESSION_NONE);
    }
    for (uint32_t i = 0; i < EXTENT_OWNERS; i++)
        MUST(sums[i].extents == rs->owners[i].extents &&
             sums[i].free_pages == rs->owners[i].free_pages);
}

void skv_cache_check(const struct skv_cache *cache)
{
    const struct residences *rs = &cache->residences;
    uint32_t *refs = calloc(rs->pages + rs->used + FLUSH_EPOCHS + rs->extents, sizeof *refs);
    uint32_t *leases = refs + rs->pages, *dirty = leases + rs->used, live = 0, resident = 0;
    uint32_t *writing = dirty + FLUSH_EPOCHS;
    MUST(refs);
    for (uint32_t slot = 0; slot < cache->options.sessions; slot++) {
        const struct session *session = &cache->sessions[slot];
        for (uint32_t row = 0; session->state != SESSION_NONE && row < session->rows; row++) {
            const struct batch *batch = &session->batches[row];
            uint32_t open = 0;
            for (uint32_t entry = 0; entry < batch->count; entry++) {
                const struct lease *lease = &batch->leases[entry];
                open += lease->state != LEASE_NONE;
                if (lease->residence != SKV_NONE)
                    leases[lease->residence]++;
                for (uint32_t i = 0; i < lease->owned; i++) {
                    uint32_t page = batch->own[lease->own + i];
                    refs[page]++;
                    writing[rs->page[page].extent] += rs->protect;
                    MUST(!rs->protect || rs->extent[rs->page[page].extent].owner == slot);
                }
                if (lease->state == LEASE_APPEND && lease->tail_in_place)
                    writing[rs->page[lease->tail_page].extent] += rs->protect;
            }
            MUST(open == batch->open);
        }
    }
    for (uint32_t i = 0; i < rs->used; i++) {
        if (!rs->all[i].hash)
            continue;
        MUST(rs->all[i].leases == leases[i]);
        check_residence(cache, i, refs, dirty);
        resident += rs->all[i].record != SKV_NONE;
    }
    MUST(resident == rs->count);
    uint32_t used = 0;
    for (uint32_t i = 0; i < rs->pages; i++) {
        refs[i] += rs->page[i].limbo;
        MUST(refs[i] == rs->page[i].refs);
        used += refs[i] != 0;
    }
    MUST(used + rs->free_pages == rs->pages);
    check_extents(cache, writing);
    MUST(memcmp(dirty, cache->dirty_in, sizeof cache->dirty_in) == 0);
    for (uint32_t i = 0; i < cache->records.used; i++) {
        const struct record *record = &cache->records.all[i];
        if (record->model == SKV_NO_MODEL)
            continue;
        live++;
        MUST(record->stored || record->residence != SKV_NONE);
        MUST(record->residence == SKV_NONE || rs->all[record->residence].record == i);
        MUST(skv_records_find(&cache->records, record->model, record->user) == i);
    }
    MUST(live == cache->records.count);
    free(refs);
}
