/* What goes to the store, and when: full pages soon, in the order they were committed; tails when
 * they are urgent, when a FLUSH or the daemon's stop wants them, or `tail_ms` after their last
 * append. One job a residence at a time, ascending, each moving the user's stored record forward.
 */
#include "cache_internal.h"

static void advance_epoch(struct skv_cache *cache)
{
    while (cache->epoch_oldest < cache->epoch &&
           !cache->dirty_in[cache->epoch_oldest % FLUSH_EPOCHS])
        cache->epoch_oldest++;
}

static void unqueue(struct skv_cache *cache, uint32_t index)
{
    struct residence *r = residence_at(cache, index);
    if (!r->queued)
        return;
    skv_backlog_remove(&cache->residences, r->in_tails ? &cache->tails : &cache->dirty, index);
}

void skv_undirty(struct skv_cache *cache, uint32_t index)
{
    struct residence *r = residence_at(cache, index);
    unqueue(cache, index);
    if (r->dirty_epoch) {
        cache->dirty_in[r->dirty_epoch % FLUSH_EPOCHS]--;
        r->dirty_epoch = 0;
        advance_epoch(cache);
    }
    r->urgent = false;
}

void skv_dirty(struct skv_cache *cache, uint32_t index, uint64_t epoch)
{
    struct residence *r = residence_at(cache, index);
    uint32_t stored = cache->records.all[r->record].stored;
    if (!cache->options.store || r->tokens <= stored) {
        skv_undirty(cache, index);
        return;
    }
    if (!r->dirty_epoch) {
        r->dirty_epoch = epoch ? epoch : cache->epoch;
        cache->dirty_in[r->dirty_epoch % FLUSH_EPOCHS]++;
        if (r->dirty_epoch < cache->epoch_oldest)
            cache->epoch_oldest = r->dirty_epoch;
    }
    uint32_t full = r->tokens - r->tokens % cache->geometry.page_tokens;
    bool tail = full <= stored && !r->urgent;
    if (r->queued && tail == r->in_tails && !tail)
        return;
    unqueue(cache, index);
    if (r->offload)
        return; /* queued again when that is done */
    r->in_tails = tail;
    skv_backlog_push(&cache->residences, tail ? &cache->tails : &cache->dirty, index);
}

static struct skv_offload *make_job(struct skv_cache *cache, uint32_t index, uint32_t end,
                                    uint32_t max_pages)
{
    struct residence *r = residence_at(cache, index);
    const struct record *record = &cache->records.all[r->record];
    uint32_t size = cache->geometry.page_tokens, first = record->stored / size;
    if (end > (first + max_pages) * size)
        end = (first + max_pages) * size;
    assert(end > record->stored);
    uint32_t last = pages_of(cache, end), count = last - first;
    struct offload *offload =
        calloc(1, sizeof *offload + count * sizeof(struct skv_move) + last * sizeof(uint64_t));
    if (!offload) {
        cache->starved = true;
        return NULL;
    }
    *offload = (struct offload){
        .residence = index, .committed = r->tokens, .cut = UINT32_MAX, .epoch = cache->epoch};
    struct skv_offload *job = &offload->job;
    job->id = ++cache->next_job;
    job->moves = (struct skv_move *)(offload + 1);
    job->hashes = (uint64_t *)(job->moves + count);
    job->move_count = count;
    memcpy(job->hashes, r->hash, last * sizeof *job->hashes);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = first + i, left = end - page * size;
        job->moves[i] =
            (struct skv_move){.page = r->page[page],
                              .index = page,
                              .valid = left < size ? left : size,
                              .hash = r->hash[page],
                              .generation = cache->residences.page[r->page[page]].generation};
    }
    job->record = skv_stored_record(cache, record);
    job->record.tokens = end;
    job->record.last_use_s = cache->wall_s;
    job->record.hash_tail = job->hashes[last - 1];
    uint32_t full = end / size;
    job->record.hash_full = full ? job->hashes[full - 1] : skv_chain_before(cache, record);
    unqueue(cache, index);
    r->copies++;
    r->offload = job;
    return job;
}

bool skv_cache_starved(struct skv_cache *cache)
{
    bool starved = cache->starved;
    cache->starved = false;
    return starved;
}

struct skv_offload *skv_cache_next_offload(struct skv_cache *cache, uint32_t max_pages, bool stop)
{
    if (!max_pages || cache->early)
        return NULL;
    uint32_t size = cache->geometry.page_tokens;
    for (uint32_t i = cache->dirty.first; i != SKV_NONE; i = residence_at(cache, i)->behind) {
        struct residence *r = residence_at(cache, i);
        if (r->load_job)
            continue; /* its bytes may not have arrived */
        bool tail = stop || r->urgent || cache->epoch_oldest <= cache->flush_wanted;
        return make_job(cache, i, tail ? r->tokens : r->tokens - r->tokens % size, max_pages);
    }
    bool all = stop || cache->epoch_oldest <= cache->flush_wanted;
    for (uint32_t i = cache->tails.first; i != SKV_NONE; i = residence_at(cache, i)->behind) {
        struct residence *r = residence_at(cache, i);
        if (!all && cache->now_ms - r->committed_ms < cache->options.tail_ms)
            break; /* the queue is in the order of their last append */
        if (!r->load_job)
            return make_job(cache, i, r->tokens, max_pages);
    }
    return NULL;
}

uint64_t skv_cache_tail_due(const struct skv_cache *cache)
{
    if (cache->tails.first == SKV_NONE || cache->early)
        return UINT64_MAX;
    uint64_t age = cache->now_ms - cache->residences.all[cache->tails.first].committed_ms;
    return age < cache->options.tail_ms ? cache->options.tail_ms - age : 0;
}

void skv_cache_copied(struct skv_cache *cache, struct skv_offload *job)
{
    struct offload *offload = (struct offload *)job;
    residence_at(cache, offload->residence)->copies--;
    offload->copied = true;
    skv_settle(cache, offload->residence);
}

/* What was committed up to the job's making is stored; what is not, came later. */
static void advance_dirty(struct skv_cache *cache, struct residence *r,
                          const struct offload *offload)
{
    if (!r->dirty_epoch || r->dirty_epoch >= offload->epoch)
        return;
    cache->dirty_in[r->dirty_epoch % FLUSH_EPOCHS]--;
    cache->dirty_in[offload->epoch % FLUSH_EPOCHS]++;
    r->dirty_epoch = offload->epoch;
    advance_epoch(cache);
}

/* The first so many pages of the job are stored. */
static void set_full(struct skv_cache *cache, uint32_t owner, const struct skv_offload *job,
                     uint32_t pages)
{
    struct record *record = &cache->records.all[owner];
    record->hash_full = record->hash_tail = job->hashes[pages - 1];
    skv_records_set_stored(&cache->records, owner, pages * cache->geometry.page_tokens);
}

void skv_cache_stored(struct skv_cache *cache, struct skv_offload *job, int32_t status)
{
    struct offload *offload = (struct offload *)job;
    if (!offload->copied)
        skv_cache_copied(cache, job);
    uint32_t owner = skv_cache_find(cache, job->record.model, job->record.user);
    struct record *record = owner == SKV_NONE ? NULL : &cache->records.all[owner];
    struct residence *r = record ? residence_of(cache, owner) : NULL;
    bool same = record && record->generation == job->record.generation;
    bool cut = r && r->offload == job && !same; /* cut_at_offload() */
    if (same || cut) {
        if (!status && job->record.tokens <= offload->cut) {
            record->hash_full = job->record.hash_full;
            record->hash_tail = job->record.hash_tail;
            skv_records_set_stored(&cache->records, owner, job->record.tokens);
        } else if (!status) {
            set_full(cache, owner, job, offload->cut / cache->geometry.page_tokens);
        } else if (job->stored_moves) { /* full pages, by earlier transactions */
            uint32_t pages = job->moves[job->stored_moves - 1].index + 1;
            uint32_t left = offload->cut / cache->geometry.page_tokens;
            set_full(cache, owner, job, pages < left ? pages : left);
        }
        if (r && r->offload == job) {
            r->offload = NULL;
            if (same && !status && job->record.tokens >= offload->committed)
                advance_dirty(cache, r, offload);
        }
        if (cut) {
            struct skv_change *change = skv_new_change(cache, pages_of(cache, record->stored));
            skv_cut_stored(cache, owner, record->stored, job->hashes, change);
        }
        if (r) {
            skv_requeue(cache, record->residence);
            skv_settle(cache, record->residence);
        }
    }
    free(job);
}

void skv_cache_found_stored(struct skv_cache *cache, const struct skv_record *stored)
{
    uint32_t owner = skv_cache_find(cache, stored->model, stored->user);
    struct record *record = owner == SKV_NONE ? NULL : &cache->records.all[owner];
    if (!record || record->generation != stored->generation || record->stored >= stored->tokens)
        return;
    record->hash_full = stored->hash_full;
    record->hash_tail = stored->hash_tail;
    skv_records_set_stored(&cache->records, owner, stored->tokens);
    if (record->residence != SKV_NONE)
        skv_requeue(cache, record->residence);
}

void skv_cache_offload_undo(struct skv_cache *cache, struct skv_offload *job)
{
    cache->next_job--;
    skv_cache_stored(cache, job, SKV_EAGAIN);
}

/* ---- flush ---- */

void skv_cache_end_appends(struct skv_cache *cache)
{
    cache->ending = true;
}

uint64_t skv_cache_flush(struct skv_cache *cache)
{
    uint64_t epoch = cache->epoch;
    if (cache->epoch - cache->epoch_oldest < FLUSH_EPOCHS - 1)
        cache->epoch++; /* else it joins the commits to come: it only waits longer */
    advance_epoch(cache);
    cache->flush_wanted = epoch;
    return epoch;
}

bool skv_cache_flushed(const struct skv_cache *cache, uint64_t epoch)
{
    if (!cache->options.store || cache->epoch_oldest > epoch)
        return true;
    /* The current epoch, which a flush too many joined: done when nothing at all is unstored. */
    return cache->epoch_oldest == epoch && !cache->dirty_in[epoch % FLUSH_EPOCHS];
}

#define GROOM_SCAN 64u /* LRU users whose tails are asked for ahead of their eviction */

void skv_cache_groom(struct skv_cache *cache)
{
    if (!cache->options.store || cache->residences.free_pages > cache->residences.pages / 16)
        return;
    uint32_t index = cache->residences.oldest;
    for (uint32_t i = 0; i < GROOM_SCAN && index != SKV_NONE; i++) {
        struct residence *r = residence_at(cache, index);
        if (r->dirty_epoch && !r->urgent) {
            r->urgent = true;
            skv_requeue(cache, index);
        }
        index = r->newer;
    }
}
