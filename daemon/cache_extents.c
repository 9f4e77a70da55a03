/* Who may write which part of a protected pool. Pages lie in extents (whole allocations of the
 * pool), and a worker has a writable view of those extents only that are its own; so its append
 * pages come from there, and a half-filled tail anywhere else is not appended to, nor onboarded for
 * who will append.
 *
 * A session takes free extents as it needs them, the next one before its last is full. Its share
 * is bounded, so that onboards (which fill common extents, and always have one left) and other
 * sessions find some: near the bound the fullest of its own are given up for fresh ones. An extent
 * given up, or whose session has ended, becomes common once no view of it can be left: the session
 * has said that it has applied a list without it, or is gone. A common extent is free when its last
 * page is, and when none is free, one with few pages is cleared. So what a session can write to,
 * only that session has filled.
 *
 * Without protection there is one extent, it is common, and nothing here has anything to decide. */
#include "cache_internal.h"

#define EVICTIONS   32u /* LRU users evicted for one taking, before an extent is cleared */
#define CLEAR_TRIES 8u  /* common extents looked at for one that can be cleared */

static struct owner *owner_of(struct skv_cache *cache, uint32_t who)
{
    return &cache->residences.owners[who];
}

/* Extents that a session may own. */
static uint32_t share(const struct skv_cache *cache)
{
    uint32_t extents = cache->residences.extents / (cache->session_count + 1);
    return extents ? extents : 1;
}

/* The table says, for a daemon to come, of which extents a worker may have a view. */
static void mark(struct skv_cache *cache, uint32_t extent, bool viewed)
{
    struct wire_table *table = cache->options.table;
    if (!table)
        return;
    uint64_t bit = UINT64_C(1) << extent % 64;
    if (viewed)
        table->viewed[extent / 64] |= bit;
    else
        table->viewed[extent / 64] &= ~bit;
}

/* Nobody has a view of it any more. */
static void let_go_of(struct skv_cache *cache, uint32_t index)
{
    struct extent *extent = &cache->residences.extent[index];
    mark(cache, index, false);
    skv_extent_give(&cache->residences, index,
                    extent->free == extent->pages ? EXTENT_FREE : EXTENT_COMMON);
}

static void list_changed(struct skv_cache *cache, uint32_t slot)
{
    cache->sessions[slot].views++;
    if (!cache->sessions[slot].views_told)
        skv_act(cache, SKV_ACTION_VIEWS)->session = slot;
    cache->sessions[slot].views_told = true;
}

static void own(struct skv_cache *cache, uint32_t slot)
{
    uint32_t index = owner_of(cache, EXTENT_FREE)->first;
    mark(cache, index, true); /* before anybody is told */
    skv_extent_give(&cache->residences, index, slot);
    list_changed(cache, slot);
}

/* Gives up the fullest extent of a session that no lease of it writes to. false: there is none. */
static bool give_up(struct skv_cache *cache, uint32_t slot)
{
    struct residences *rs = &cache->residences;
    uint32_t fullest = SKV_NONE;
    for (uint32_t i = 0; i < rs->extents; i++)
        if (rs->extent[i].owner == slot && !rs->extent[i].writing &&
            (fullest == SKV_NONE || rs->extent[i].free < rs->extent[fullest].free))
            fullest = i;
    if (fullest == SKV_NONE)
        return false;
    list_changed(cache, slot);
    skv_extent_give(rs, fullest, EXTENT_HELD);
    rs->extent[fullest].lender = (uint16_t)slot;
    rs->extent[fullest].asked = cache->sessions[slot].views;
    cache->sessions[slot].held++;
    return true;
}

/* Would one more that is owned, or held, leave none to onboard into? */
static bool is_last(const struct skv_cache *cache)
{
    const struct residences *rs = &cache->residences;
    uint32_t left = rs->owners[EXTENT_FREE].extents + rs->owners[EXTENT_COMMON].extents;
    return rs->extents > 1 && left <= 1;
}

/* May it own another extent? Gives one up for it, if it must. */
static bool may_own(struct skv_cache *cache, uint32_t slot)
{
    const struct session *session = &cache->sessions[slot];
    const struct owner *owner = owner_of(cache, slot);
    if (session->state != SESSION_LIVE)
        return false;
    if (owner->extents >= share(cache) && !session->held)
        give_up(cache, slot);
    return owner->extents < share(cache) && owner->extents + session->held <= share(cache) &&
           !is_last(cache);
}

/* Another free extent for `who`; false: none is free, or it may not have it. */
static bool extend(struct skv_cache *cache, uint32_t who)
{
    if (!owner_of(cache, EXTENT_FREE)->extents || (who < EXTENT_COMMON && !may_own(cache, who)))
        return false;
    if (who < EXTENT_COMMON)
        own(cache, who);
    else
        skv_extent_give(&cache->residences, owner_of(cache, EXTENT_FREE)->first, who);
    return true;
}

/* ---- clearing ---- */

/* Can every user with pages in it do without them? 2: and all of it is stored; 0: no. */
static int clearable(struct skv_cache *cache, const struct extent *extent)
{
    struct residences *rs = &cache->residences;
    uint32_t first = (uint32_t)(extent - rs->extent) * rs->extent_pages;
    int how = 2;
    for (uint32_t i = first; i < first + extent->pages; i++) {
        const struct page *page = &rs->page[i];
        if (!page->refs)
            continue;
        if (page->refs > 1 || page->limbo || page->residence == SKV_NONE)
            return 0;
        const struct residence *r = residence_at(cache, page->residence);
        if (r->record == SKV_NONE || r->leases || r->copies || r->offload)
            return 0;
        if (!skv_is_stored(cache, r))
            how = 1;
    }
    return how;
}

/* The common extent with the fewest pages in use, but more than `than` (used, index). */
static uint32_t next_fewest(const struct residences *rs, uint64_t *than)
{
    uint32_t best = SKV_NONE;
    uint64_t least = UINT64_MAX;
    for (uint32_t i = 0; i < rs->extents; i++) {
        const struct extent *extent = &rs->extent[i];
        uint64_t key = (uint64_t)(extent->pages - extent->free) << 32 | i;
        if (extent->owner == EXTENT_COMMON && key > *than && key < least) {
            least = key;
            best = i;
        }
    }
    *than = least;
    return best;
}

/* Makes a common extent free: its users keep what they have before their first page there. */
static bool clear(struct skv_cache *cache)
{
    struct residences *rs = &cache->residences;
    uint32_t chosen = SKV_NONE;
    uint64_t than = 0;
    int best = 0;
    for (uint32_t tries = 0; tries < CLEAR_TRIES && best < 2; tries++) {
        uint32_t index = next_fewest(rs, &than);
        if (index == SKV_NONE)
            break;
        int how = clearable(cache, &rs->extent[index]);
        if (how > best) {
            best = how;
            chosen = index;
        }
    }
    if (!best)
        return false;
    uint32_t first = chosen * rs->extent_pages;
    for (uint32_t i = first; i < first + rs->extent[chosen].pages; i++) {
        if (!rs->page[i].refs)
            continue;
        const struct residence *r = residence_at(cache, rs->page[i].residence);
        uint32_t keep = 0;
        while (rs->page[r->page[keep]].extent != chosen)
            keep++;
        skv_evict_to(cache, rs->page[i].residence, keep);
    }
    assert(rs->extent[chosen].owner == EXTENT_FREE);
    return true;
}

/* ---- for the rest of the core ---- */

uint32_t skv_appends_from(const struct skv_cache *cache, uint32_t slot)
{
    return cache->residences.protect ? slot : EXTENT_COMMON;
}

bool skv_may_write(const struct skv_cache *cache, uint32_t slot, uint32_t page)
{
    const struct residences *rs = &cache->residences;
    return !rs->protect || rs->extent[rs->page[page].extent].owner == slot;
}

bool skv_make_room(struct skv_cache *cache, uint32_t who, uint32_t *evictions)
{
    if (!cache->residences.protect)
        return skv_evict_one(cache);
    if (extend(cache, who))
        return true;
    if (who < EXTENT_COMMON && !owner_of(cache, who)->extents && !may_own(cache, who))
        return false; /* no eviction could change that */
    if (*evictions < EVICTIONS && skv_evict_one(cache)) {
        ++*evictions;
        return true;
    }
    *evictions = EVICTIONS;
    return !owner_of(cache, EXTENT_FREE)->extents &&
           (who >= EXTENT_COMMON || may_own(cache, who)) && clear(cache);
}

void skv_writes(struct skv_cache *cache, const struct batch *batch, const struct lease *lease,
                int by)
{
    struct residences *rs = &cache->residences;
    if (!rs->protect)
        return;
    for (uint32_t i = 0; i < lease->owned; i++)
        rs->extent[rs->page[batch->own[lease->own + i]].extent].writing += (uint32_t)by;
    if (lease->tail_in_place)
        rs->extent[rs->page[lease->tail_page].extent].writing += (uint32_t)by;
}

void skv_look_ahead(struct skv_cache *cache, uint32_t slot)
{
    const struct residences *rs = &cache->residences;
    const struct owner *owner = owner_of(cache, slot);
    if (!rs->protect || cache->sessions[slot].state != SESSION_LIVE)
        return;
    /* An eighth of its share stays unused, for a batch that needs much at once: an extent given up
     * then comes too late, since its worker has to say first that it has no view left. Users would
     * be evicted though extents are free. */
    const uint32_t bound = share(cache);
    while (owner->extents > bound - bound / 8 && give_up(cache, slot))
        ;
    if (owner->extents && owner->free_pages < rs->extent_pages / 4)
        extend(cache, slot);
}

void skv_extents_adopt(struct skv_cache *cache, bool limbo)
{
    struct residences *rs = &cache->residences;
    struct wire_table *table = cache->options.table;
    for (uint32_t i = 0; rs->protect && i < rs->extents; i++) {
        bool viewed = limbo && (!table->protect || table->viewed[i / 64] >> i % 64 & 1);
        mark(cache, i, viewed);
        if (viewed) {
            skv_extent_give(rs, i, EXTENT_HELD);
            rs->extent[i].lender = EXTENT_HELD;
        }
    }
    table->protect = rs->protect;
}

void skv_extents_settle(struct skv_cache *cache)
{
    struct residences *rs = &cache->residences;
    for (uint32_t i = 0; i < rs->extents; i++)
        if (rs->extent[i].owner == EXTENT_HELD && rs->extent[i].lender == EXTENT_HELD)
            let_go_of(cache, i);
}

/* ---- outside ---- */

uint32_t skv_cache_views(const struct skv_cache *cache, uint32_t slot, uint64_t *extents)
{
    const struct residences *rs = &cache->residences;
    memset(extents, 0, WIRE_MAX_EXTENTS / 8);
    for (uint32_t i = 0; rs->protect && i < rs->extents; i++)
        if (rs->extent[i].owner == slot)
            extents[i / 64] |= UINT64_C(1) << i % 64;
    return cache->sessions[slot].views;
}

void skv_cache_viewed(struct skv_cache *cache, uint32_t slot, uint32_t sequence)
{
    struct residences *rs = &cache->residences;
    struct session *session = &cache->sessions[slot];
    for (uint32_t i = 0; session->held && i < rs->extents; i++)
        if (rs->extent[i].owner == EXTENT_HELD && rs->extent[i].lender == slot &&
            (int32_t)(sequence - rs->extent[i].asked) >= 0) {
            let_go_of(cache, i);
            session->held--;
        }
}

void skv_cache_unviewed(struct skv_cache *cache, uint32_t slot)
{
    struct residences *rs = &cache->residences;
    for (uint32_t i = 0; rs->protect && i < rs->extents; i++)
        if (rs->extent[i].owner == slot ||
            (rs->extent[i].owner == EXTENT_HELD && rs->extent[i].lender == slot))
            let_go_of(cache, i);
    cache->sessions[slot].held = 0;
}

bool skv_cache_has_views(const struct skv_cache *cache, uint32_t slot)
{
    return cache->residences.owners[slot].extents || cache->sessions[slot].held;
}
