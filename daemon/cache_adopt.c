/* Hot restart: the pool and its descriptor table outlived an earlier daemon; its users are rebuilt
 * from the descriptors alone, and served; then, one by one, reconciled with what the store says.
 *
 * Why that is right wherever the earlier daemon was killed: a page's descriptor says what the page
 * is before anybody is told of it (before a grant, before COMMIT's answer, before an evicted page
 * is somebody else's), a list is written from its front and dropped from its end, and what a user
 * lost (a cut, an eviction, a swapped tail) is said to be nobody's even while leases hold it. So
 * the valid pages of a user form its history, or a prefix of it while a commit was under way; two
 * pages with one index are a tail and the fuller page that replaces it.
 *
 * The table is written at once and the store later, so where the two differ the store is late.
 *
 * Until all are reconciled nothing of them changes but who reads them: what would have to be
 * decided of a user who is appended to, cut or evicted meanwhile does not arise. */
#include "cache_internal.h"

/* The descriptor of a page; false: it is not whole. */
static bool describes(const struct wire_table *table, uint32_t page, struct wire_descriptor *out)
{
    const struct wire_page_entry *entry = &table->entries[page];
    *out = entry->slot[entry->sequence & 1];
    return out->check == (uint32_t)skv_checksum(out, offsetof(struct wire_descriptor, check));
}

static bool is_free(const struct wire_table *table, uint32_t page)
{
    struct wire_descriptor d;
    return !table->entries[page].sequence ||
           (describes(table, page, &d) && !(d.flags & WIRE_PAGE_USED));
}

static bool is_sane(const struct skv_cache *cache, const struct wire_descriptor *d)
{
    return d->flags & WIRE_PAGE_USED && d->flags & WIRE_PAGE_VALID &&
           !(d->flags & WIRE_PAGE_LOADING) && d->index < SKV_MAX_USER_PAGES && d->valid &&
           d->valid <= cache->geometry.page_tokens && !skv_id_is_zero(d->model) && d->generation &&
           d->generation <= cache->generation;
}

static uint32_t valid_of(const struct skv_cache *cache, uint32_t page)
{
    struct wire_descriptor d;
    describes(cache->options.table, page, &d);
    return d.valid;
}

/* Puts a page into its user's list, holes before it filled with SKV_NONE; of two that claim one
 * index the newer generation, then the fuller one. What has no place is nobody's. */
static void place(struct skv_cache *cache, uint32_t page, const struct wire_descriptor *d)
{
    struct residences *rs = &cache->residences;
    uint16_t model = skv_model_index(cache, d->model);
    if (model == SKV_NO_MODEL)
        return;
    uint32_t owner = skv_records_find(&cache->records, model, d->user);
    if (owner == SKV_NONE && (owner = skv_records_add(&cache->records, model, d->user)) == SKV_NONE)
        return;
    struct record *record = &cache->records.all[owner];
    if (record->residence == SKV_NONE)
        record->residence = skv_residence_add(rs, owner);
    uint32_t index = record->residence;
    if (index == SKV_NONE || !skv_residence_reserve(rs, index, d->index + 1)) {
        if (index == SKV_NONE)
            skv_records_remove(&cache->records, owner);
        return;
    }
    struct residence *r = residence_at(cache, index);
    while (r->pages <= d->index)
        skv_residence_push(rs, index, SKV_NONE, 0);
    uint32_t other = r->page[d->index];
    if (other != SKV_NONE) {
        uint64_t generation = rs->page[other].generation;
        if (generation > d->generation ||
            (generation == d->generation && valid_of(cache, other) >= d->valid))
            return;
        rs->page[other].generation = 0;
    }
    rs->page[page].generation = d->generation; /* 0: nobody's */
    r->page[d->index] = page;
    r->hash[d->index] = d->hash;
}

/* Keeps the part of a list that is a history: no gap, no decrease of generation, nothing after a
 * half-filled page. */
static void trim(struct skv_cache *cache, struct residence *r)
{
    struct page *page = cache->residences.page;
    uint32_t size = cache->geometry.page_tokens, keep = 0;
    uint64_t generation = 0;
    r->tokens = 0;
    while (keep < r->pages && r->page[keep] != SKV_NONE &&
           page[r->page[keep]].generation >= generation && r->tokens == keep * size) {
        generation = page[r->page[keep]].generation;
        r->tokens += valid_of(cache, r->page[keep++]);
    }
    for (uint32_t i = keep; i < r->pages; i++)
        if (r->page[i] != SKV_NONE)
            page[r->page[i]].generation = 0;
    r->trimmed = keep < r->pages;
    r->pages = r->ready = keep;
}

/* What is known of a user by its pages alone. */
static void know(struct skv_cache *cache, uint32_t index)
{
    struct residence *r = residence_at(cache, index);
    struct record *record = &cache->records.all[r->record];
    record->generation = cache->residences.page[r->page[r->pages - 1]].generation;
    record->hash_full = record->hash_tail = skv_chain_before(cache, record);
    r->committed_ms = cache->now_ms;
    skv_requeue(cache, index);
}

/* ---- and by the store ---- */

/* How many of the first `pages` pages, all full in both, are the same. */
static uint32_t common_pages(const struct residence *r, const uint64_t *hashes, uint32_t pages)
{
    uint32_t same = 0;
    while (same < pages && hashes[same] == r->hash[same])
        same++;
    return same;
}

/* How many of the stored tokens are of the history that the pool has. hashes: the stored ones. */
static uint32_t stored_in_common(const struct skv_cache *cache, const struct record *record,
                                 const struct residence *r, const uint64_t *hashes)
{
    const struct page *page = cache->residences.page;
    uint32_t size = cache->geometry.page_tokens, stored = record->stored;
    uint32_t full = stored / size, tail = stored % size, resident = r->tokens / size;
    if (stored > r->tokens) {
        if (page[r->page[r->pages - 1]].generation <= record->generation)
            return stored; /* not cut since it was stored */
        uint32_t same = common_pages(r, hashes, resident);
        return same == resident && r->tokens % size == 0 ? stored : same * size;
    }
    if (full && r->hash[full - 1] != record->hash_full)
        return common_pages(r, hashes, full) * size;
    if (!tail || (r->tokens == stored && r->hash[full] == record->hash_tail) ||
        (r->tokens != stored && page[r->page[full]].generation <= record->generation))
        return stored;
    return full * size; /* its tail may be of an earlier history, or of this one */
}

void skv_reconcile(struct skv_cache *cache, uint32_t owner, const struct skv_record *stored,
                   const uint64_t *hashes)
{
    struct record *record = &cache->records.all[owner];
    struct residence *r = residence_of(cache, owner);
    uint32_t size = cache->geometry.page_tokens, index = record->residence;
    uint64_t generation = record->generation; /* of its last page */
    bool trimmed = r->trimmed;
    r->trimmed = false;
    record->generation = stored->generation;
    record->hash_full = stored->hash_full;
    record->hash_tail = stored->hash_tail;
    if (!record->last_use_s) /* else it was used since */
        record->last_use_s = (uint32_t)stored->last_use_s;
    skv_records_set_stored(&cache->records, owner, stored->tokens);
    if (r->tokens % size && r->tokens < stored->tokens && generation <= stored->generation) {
        trimmed = true; /* of its tail: the store has all of it, and more */
        index = skv_shorten(cache, index, r->pages - 1);
        r = residence_at(cache, index);
    }
    uint32_t keep = r && r->pages ? stored_in_common(cache, record, r, hashes) : stored->tokens;
    bool cut = keep < record->stored;
    if (cut || trimmed) /* what was dropped must not be taken for its own again */
        skv_new_generation(cache, record);
    else if (record->generation < generation)
        record->generation = generation;
    /* Only its generation tells a stored tail from one of an earlier history: after another
     * restart, too. Till the store has it nothing is appended there. */
    if (cut || (record->stored % size && record->generation > stored->generation))
        skv_cut_stored(cache, owner, keep, cut ? r->hash : hashes,
                       skv_new_change(cache, pages_of(cache, keep)));
    if (r) {
        skv_requeue(cache, index);
        skv_settle(cache, index);
    }
    skv_failpoint(FAIL_adopt_user);
}

/* ---- LRU ---- */

struct age {
    uint32_t last_use_s, residence;
    uint64_t generation;
};

static int compare_ages(const void *left, const void *right)
{
    const struct age *a = left, *b = right;
    if (a->last_use_s != b->last_use_s)
        return a->last_use_s < b->last_use_s ? -1 : 1;
    return a->generation < b->generation ? -1 : a->generation > b->generation;
}

/* Orders the residences by their users' last use, as far as the store knew it. */
static void sort_residences(struct skv_cache *cache)
{
    struct residences *rs = &cache->residences;
    struct age *ages = malloc((rs->count + 1) * sizeof *ages);
    uint32_t count = 0;
    for (uint32_t i = 0; ages && i < rs->used; i++) {
        if (!rs->all[i].hash || rs->all[i].record == SKV_NONE)
            continue;
        const struct record *record = &cache->records.all[rs->all[i].record];
        ages[count++] = (struct age){record->last_use_s, i, record->generation};
    }
    if (count)
        qsort(ages, count, sizeof *ages, compare_ages);
    for (uint32_t i = 0; i < count; i++)
        skv_residence_touch(rs, ages[i].residence);
    free(ages);
}

/* ---- outside ---- */

uint32_t skv_cache_adopt(struct skv_cache *cache, bool limbo)
{
    struct residences *rs = &cache->residences;
    const struct wire_table *table = cache->options.table;
    cache->early = cache->options.store;
    for (uint32_t page = 0; page < rs->pages; page++) {
        struct wire_descriptor d;
        if (is_free(table, page))
            continue;
        rs->page[page].refs = 1;
        rs->page[page].residence = SKV_NONE;
        if (describes(table, page, &d) && is_sane(cache, &d))
            place(cache, page, &d);
    }
    skv_failpoint(FAIL_adopt_placed);
    for (uint32_t i = 0; i < rs->used; i++) {
        struct residence *r = residence_at(cache, i);
        if (!r->hash)
            continue;
        trim(cache, r);
        for (uint32_t p = 0; p < r->pages; p++)
            rs->page[r->page[p]].residence = i;
        if (r->pages)
            know(cache, i);
        else
            skv_settle(cache, i);
    }
    for (uint32_t page = 0; page < rs->pages; page++) {
        struct page *p = &rs->page[page];
        if (!p->refs)
            continue;
        p->limbo = limbo;
        if (p->generation)
            p->refs += limbo;
        else if (limbo)
            skv_describe_held(cache, page);
        else
            p->refs = 0;
        if (!p->refs)
            skv_describe_free(cache, page);
        skv_failpoint(FAIL_adopt_page);
    }
    skv_pages_relink(rs);
    skv_extents_adopt(cache, limbo);
    return rs->count;
}

void skv_adopted(struct skv_cache *cache)
{
    struct residences *rs = &cache->residences;
    for (uint32_t i = 0; i < rs->used; i++) {
        struct residence *r = &rs->all[i];
        if (!r->hash || r->record == SKV_NONE)
            continue;
        struct record *record = &cache->records.all[r->record];
        if (!record->last_use_s)
            record->last_use_s = cache->wall_s;
        if (r->trimmed)
            skv_new_generation(cache, record);
        r->trimmed = false;
    }
    sort_residences(cache);
}

void skv_cache_settle(struct skv_cache *cache)
{
    struct residences *rs = &cache->residences;
    for (uint32_t page = 0; page < rs->pages; page++) {
        if (!rs->page[page].limbo)
            continue;
        rs->page[page].limbo = false;
        skv_let_go(cache, page);
    }
    skv_extents_settle(cache);
}
