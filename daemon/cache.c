#include "cache_internal.h"

#include <stdio.h>
#include <sys/mman.h>

int skv_cache_open(const struct skv_cache_options *options, struct skv_cache **out)
{
    assert(options->sessions <= SKV_MAX_SESSIONS);
    if (skv_geometry_check(&options->geometry) || !options->pages ||
        (options->extent_pages && (options->pages - 1) / options->extent_pages >= WIRE_MAX_EXTENTS))
        return SKV_EINVAL;
    struct skv_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return SKV_ENOMEM;
    cache->geometry = options->geometry;
    cache->options = *options;
    cache->generation = options->generation - 1;
    cache->dirty = cache->tails = (struct backlog){.first = SKV_NONE, .last = SKV_NONE};
    cache->epoch = cache->epoch_oldest = 1;
    uint32_t holders = options->sessions * SKV_MAX_ROWS * SKV_MAX_BATCH;
    int status = skv_records_init(&cache->records, options->max_records);
    if (!status)
        status =
            skv_residences_init(&cache->residences, options->pages, options->extent_pages, holders);
    if (!status && !skv_reserve_actions(cache, 0))
        status = SKV_ENOMEM;
    if (status) {
        skv_cache_close(cache);
        return status;
    }
    if (options->table) {
        struct wire_table *table = options->table;
        if (table->magic != WIRE_MAGIC) /* else skv_cache_adopt() asks what it was */
            table->protect = options->extent_pages != 0;
        table->magic = WIRE_MAGIC;
        table->version = WIRE_TABLE_VERSION;
        table->geometry = options->geometry;
        table->pages = options->pages;
        table->generation = cache->generation;
    }
    *out = cache;
    return SKV_OK;
}

static uint64_t batches_bytes(uint32_t rows)
{
    uint64_t one = sizeof(struct batch) + WIRE_SLOT_PAGES * (sizeof(uint64_t) + sizeof(uint32_t));
    return (rows * one + 4095) / 4096 * 4096;
}

static void session_close(struct session *session)
{
    if (session->batches)
        munmap(session->batches, batches_bytes(session->rows));
    *session = (struct session){.epoch = session->epoch + 1};
}

void skv_cache_close(struct skv_cache *cache)
{
    if (!cache)
        return;
    for (uint32_t i = 0; i < SKV_MAX_SESSIONS; i++)
        session_close(&cache->sessions[i]);
    for (struct onboard *job = cache->oldest, *next; job; job = next) {
        next = job->behind;
        free(job);
    }
    skv_residences_fini(&cache->residences);
    skv_records_fini(&cache->records);
    free(cache->actions);
    free(cache);
}

void skv_cache_time(struct skv_cache *cache, uint64_t now_ms, uint32_t wall_s)
{
    cache->now_ms = now_ms;
    cache->wall_s = wall_s;
}

/* The index of a model, made when it is new; SKV_NO_MODEL when there are too many. */
uint16_t skv_model_index(struct skv_cache *cache, struct skv_id model)
{
    for (uint32_t i = 0; i < cache->model_count; i++)
        if (skv_id_equal(cache->models[i], model))
            return (uint16_t)i;
    if (cache->model_count == SKV_MAX_MODELS)
        return SKV_NO_MODEL;
    cache->models[cache->model_count] = model;
    return (uint16_t)cache->model_count++;
}

void skv_cache_number_above(struct skv_cache *cache, uint64_t generation)
{
    if (cache->generation >= generation)
        return;
    cache->generation = generation;
    if (cache->options.table)
        cache->options.table->generation = generation;
}

/* Forgets an adopted user, which may be stored, for one that is: the least recently used that
 * nothing holds. false: there is none. */
static bool make_way(struct skv_cache *cache)
{
    for (uint32_t i = cache->residences.oldest; i != SKV_NONE; i = cache->residences.all[i].newer) {
        const struct residence *r = residence_at(cache, i);
        if (r->leases || r->copies || cache->records.all[r->record].stored)
            continue;
        skv_evict_to(cache, i, 0);
        return true;
    }
    return false;
}

int skv_cache_restore(struct skv_cache *cache, const struct skv_record *stored,
                      const uint64_t *hashes)
{
    if (!stored->tokens || stored->tokens > SKV_MAX_TOKENS || skv_id_is_zero(stored->model) ||
        stored->generation > cache->generation)
        return SKV_EINVAL;
    uint16_t model = skv_model_index(cache, stored->model);
    if (model == SKV_NO_MODEL)
        return SKV_EFULL;
    uint32_t index = skv_records_find(&cache->records, model, stored->user);
    if (index != SKV_NONE && (!cache->early || cache->records.all[index].stored))
        return SKV_EINVAL;
    if (index != SKV_NONE) {
        skv_reconcile(cache, index, stored, hashes);
        return skv_records_unsorted(&cache->records, index);
    }
    do
        index = skv_records_add(&cache->records, model, stored->user);
    while (index == SKV_NONE && cache->early && make_way(cache));
    if (index == SKV_NONE)
        return SKV_EFULL;
    struct record *record = &cache->records.all[index];
    record->generation = stored->generation;
    record->hash_full = stored->hash_full;
    record->hash_tail = stored->hash_tail;
    record->last_use_s = (uint32_t)stored->last_use_s;
    skv_records_set_stored(&cache->records, index, stored->tokens);
    return skv_records_unsorted(&cache->records, index);
}

bool skv_cache_restored(struct skv_cache *cache, uint32_t limit)
{
    if (!skv_records_sort(&cache->records, limit))
        return false;
    skv_adopted(cache);
    cache->early = false;
    return true;
}

/* ---- actions ---- */

bool skv_reserve_actions(struct skv_cache *cache, uint32_t more)
{
    /* An onboard comes to ONBOARD, CANCEL and ROW; a session to one FENCE and one VIEWS. */
    uint32_t wanted = cache->action_count + 3 * cache->onboards + 2 * SKV_MAX_SESSIONS + more;
    if (wanted <= cache->action_room) /* it grows to its steady size, then never again */
        return true;
    struct skv_action *actions = malloc(2 * wanted * sizeof *actions);
    if (!actions)
        return false;
    for (uint32_t i = 0; i < cache->action_count; i++)
        actions[i] = cache->actions[(cache->action_first + i) % cache->action_room];
    free(cache->actions);
    cache->actions = actions;
    cache->action_first = 0;
    cache->action_room = 2 * wanted;
    return true;
}

struct skv_action *skv_act(struct skv_cache *cache, enum skv_action_kind kind)
{
    assert(cache->action_count < cache->action_room);
    uint32_t slot = (cache->action_first + cache->action_count++) % cache->action_room;
    cache->actions[slot] = (struct skv_action){.kind = kind};
    return &cache->actions[slot];
}

bool skv_cache_action(struct skv_cache *cache, struct skv_action *action)
{
    if (!cache->action_count)
        return false;
    *action = cache->actions[cache->action_first];
    cache->action_first = (cache->action_first + 1) % cache->action_room;
    cache->action_count--;
    if (action->kind == SKV_ACTION_VIEWS)
        cache->sessions[action->session].views_told = false;
    return true;
}

/* ---- sessions ---- */

int skv_cache_session_open(struct skv_cache *cache, struct skv_id model, uint32_t rows,
                           uint32_t *const gate_row[])
{
    uint16_t index = skv_model_index(cache, model);
    uint32_t slot = 0;
    while (slot < cache->options.sessions && cache->sessions[slot].state != SESSION_NONE)
        slot++;
    if (index == SKV_NO_MODEL || slot == cache->options.sessions)
        return SKV_EFULL;
    void *memory = mmap(NULL, batches_bytes(rows), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return SKV_ENOMEM;
    struct session *session = &cache->sessions[slot];
    *session = (struct session){.state = SESSION_LIVE,
                                .epoch = session->epoch + 1,
                                .model = index,
                                .rows = rows,
                                .batches = memory};
    cache->session_count++;
    uint64_t *hashes = (uint64_t *)(session->batches + rows);
    uint32_t *own = (uint32_t *)(hashes + (uint64_t)rows * WIRE_SLOT_PAGES);
    for (uint32_t row = 0; row < rows; row++) {
        session->gate_row[row] = gate_row[row];
        session->batches[row].input.hashes = hashes + (uint64_t)row * WIRE_SLOT_PAGES;
        session->batches[row].own = own + (uint64_t)row * WIRE_SLOT_PAGES;
    }
    return (int)slot;
}

void skv_cache_session_fence(struct skv_cache *cache, uint32_t slot)
{
    struct session *session = &cache->sessions[slot];
    if (session->state != SESSION_LIVE)
        return;
    session->state = SESSION_FENCED;
    session->epoch++;
    for (uint32_t row = 0; row < session->rows; row++)
        cache->stats.fenced_leases += session->batches[row].open;
}

bool skv_cache_session_idle(const struct skv_cache *cache, uint32_t slot)
{
    const struct session *session = &cache->sessions[slot];
    for (uint32_t row = 0; row < session->rows; row++)
        if (session->batches[row].open)
            return false;
    return true;
}

bool skv_cache_session_gone(struct skv_cache *cache, uint32_t slot)
{
    struct session *session = &cache->sessions[slot];
    skv_cache_session_fence(cache, slot);
    bool busy = false;
    for (uint32_t row = 0; row < session->rows; row++) {
        struct batch *batch = &session->batches[row];
        for (uint32_t entry = 0; entry < batch->count; entry++)
            if (batch->leases[entry].state != LEASE_NONE)
                skv_lease_end(cache, session, row, entry, false);
        busy = busy || batch->job;
    }
    if (!busy) {
        skv_cache_unviewed(cache, slot);
        session_close(session);
        cache->session_count--;
    }
    return !busy;
}

/* ---- records and descriptors ---- */

uint64_t skv_chain_before(const struct skv_cache *cache, const struct record *record)
{
    return skv_chain_start(cache->models[record->model], record->user);
}

struct skv_record skv_stored_record(const struct skv_cache *cache, const struct record *record)
{
    return (struct skv_record){.model = cache->models[record->model],
                               .user = record->user,
                               .generation = record->generation,
                               .hash_full = record->hash_full,
                               .hash_tail = record->hash_tail,
                               .last_use_s = record->last_use_s,
                               .tokens = record->stored};
}

static void table_write(struct skv_cache *cache, uint32_t page, struct wire_descriptor *next)
{
    struct wire_page_entry *entry = &cache->options.table->entries[page];
    uint64_t sequence = entry->sequence + 1;
    next->check = (uint32_t)skv_checksum(next, offsetof(struct wire_descriptor, check));
    entry->slot[sequence & 1] = *next;
    skv_failpoint(FAIL_table_torn);
    /* A daemon that comes after this one takes the sequence, then checks the checksum. */
    __atomic_store_n(&entry->sequence, sequence, __ATOMIC_RELEASE);
}

void skv_describe(struct skv_cache *cache, const struct residence *r, uint32_t index)
{
    if (!cache->options.table)
        return;
    const struct record *record = &cache->records.all[r->record];
    uint32_t start = index * cache->geometry.page_tokens, left = r->tokens - start;
    uint16_t flags = WIRE_PAGE_USED | WIRE_PAGE_VALID, session = 0;
    if (index >= r->ready)
        flags |= WIRE_PAGE_LOADING;
    if (r->appender != SKV_NONE) {
        const struct lease *lease = skv_appending(cache, r);
        if (lease->tail_in_place && lease->base == index + 1) {
            flags |= WIRE_PAGE_APPENDING;
            session = (uint16_t)(r->appender >> 16);
        }
    }
    table_write(
        cache, r->page[index],
        &(struct wire_descriptor){
            .model = cache->models[record->model],
            .user = record->user,
            .index = index,
            .valid = left < cache->geometry.page_tokens ? left : cache->geometry.page_tokens,
            .hash = r->hash[index],
            .generation = cache->residences.page[r->page[index]].generation,
            .flags = flags,
            .session = session,
        });
}

void skv_describe_own(struct skv_cache *cache, uint32_t page, const struct record *record,
                      uint32_t index, uint16_t session)
{
    if (!cache->options.table)
        return;
    table_write(cache, page,
                &(struct wire_descriptor){
                    .model = cache->models[record->model],
                    .user = record->user,
                    .index = index,
                    .generation = record->generation,
                    .flags = WIRE_PAGE_USED | WIRE_PAGE_APPENDING,
                    .session = session,
                });
}

void skv_describe_ahead(struct skv_cache *cache, const struct record *record, uint32_t page,
                        uint32_t index, uint32_t valid, uint64_t hash)
{
    if (!cache->options.table)
        return;
    table_write(cache, page,
                &(struct wire_descriptor){
                    .model = cache->models[record->model],
                    .user = record->user,
                    .index = index,
                    .valid = valid,
                    .hash = hash,
                    .generation = cache->residences.page[page].generation,
                    .flags = WIRE_PAGE_USED | WIRE_PAGE_VALID,
                });
}

void skv_describe_free(struct skv_cache *cache, uint32_t page)
{
    if (cache->options.table)
        table_write(cache, page, &(struct wire_descriptor){0});
}

/* ---- pages ---- */

void skv_let_go(struct skv_cache *cache, uint32_t page)
{
    if (skv_page_drop(&cache->residences, page))
        skv_describe_free(cache, page);
}

void skv_describe_held(struct skv_cache *cache, uint32_t page)
{
    if (cache->options.table)
        table_write(cache, page, &(struct wire_descriptor){.flags = WIRE_PAGE_USED});
}

void skv_drop_pages(struct skv_cache *cache, struct residence *r, uint32_t keep)
{
    while (r->pages > keep) {
        uint32_t page = r->page[--r->pages];
        if (r->record != SKV_NONE && cache->residences.page[page].refs > 1)
            skv_describe_held(cache, page);
        if (cache->residences.page[page].residence == (uint32_t)(r - cache->residences.all))
            cache->residences.page[page].residence = SKV_NONE;
        skv_let_go(cache, page);
        skv_failpoint(FAIL_drop_page);
    }
    if (r->ready > keep)
        r->ready = keep;
}

struct skv_change *skv_new_change(struct skv_cache *cache, uint32_t pages)
{
    struct skv_change *change = NULL;
    if (skv_reserve_actions(cache, 1))
        change = calloc(1, sizeof *change + pages * sizeof *change->hashes);
    return change;
}

/* Has the store say of a user what its record says. hashes: of the stored pages. Returns the
 * change's id. */
static uint64_t change_record(struct skv_cache *cache, struct record *record,
                              const uint64_t *hashes, struct skv_change *change)
{
    uint32_t count = pages_of(cache, record->stored);
    record->untold = record->telling = true;
    change->id = ++cache->next_job;
    change->kind = SKV_CHANGE_RECORD;
    change->hashes = (uint64_t *)(change + 1);
    if (count) {
        memcpy(change->hashes, hashes, (count - 1) * sizeof *hashes);
        /* a stored tail's hash is of its own tokens, not of the page as it is now */
        change->hashes[count - 1] = record->hash_tail;
    }
    change->record = skv_stored_record(cache, record);
    skv_act(cache, SKV_ACTION_CHANGE)->job = change;
    return change->id;
}

void skv_cache_changed(struct skv_cache *cache, const struct skv_change *change)
{
    uint32_t owner = skv_cache_find(cache, change->record.model, change->record.user);
    if (owner != SKV_NONE && cache->records.all[owner].generation == change->record.generation)
        cache->records.all[owner].untold = cache->records.all[owner].telling = false;
}

void skv_tell(struct skv_cache *cache, uint32_t owner)
{
    struct record *record = &cache->records.all[owner];
    const struct residence *r = residence_of(cache, owner);
    if (record->telling || r->offload) /* which says it too */
        return;
    struct skv_change *change = skv_new_change(cache, pages_of(cache, record->stored));
    if (change)
        change_record(cache, record, r->hash, change);
}

/* The offload in flight counts for nothing; it may be in the writer's hands already. false: there
 * is none. */
static bool disown_offload(struct skv_cache *cache, struct residence *r)
{
    if (!r->offload)
        return false;
    __atomic_store_n(&r->offload->drop, 1, __ATOMIC_RELEASE); /* pairs with the writer's look */
    r->offload = NULL;
    skv_forget_tail(cache, r->record);
    return true;
}

void skv_settle(struct skv_cache *cache, uint32_t index)
{
    struct residence *r = residence_at(cache, index);
    if (r->leases || r->copies || (r->record != SKV_NONE && r->pages))
        return;
    uint32_t owner = r->record;
    if (owner != SKV_NONE)
        skv_undirty(cache, index);
    skv_drop_pages(cache, r, 0);
    skv_residence_remove(&cache->residences, index);
    if (owner == SKV_NONE)
        return;
    struct record *record = &cache->records.all[owner];
    record->residence = SKV_NONE;
    if (!record->stored)
        skv_records_remove(&cache->records, owner);
}

void skv_evict_to(struct skv_cache *cache, uint32_t index, uint32_t keep)
{
    struct residence *r = residence_at(cache, index);
    uint32_t stored = cache->records.all[r->record].stored;
    uint32_t left =
        keep * cache->geometry.page_tokens > stored ? keep * cache->geometry.page_tokens : stored;
    if (r->tokens > left) {
        cache->stats.dropped_tokens += r->tokens - left;
        skv_failpoint(FAIL_evict_unstored);
    }
    cache->stats.evicted_users++;
    skv_failpoint(FAIL_evict_begun);
    skv_drop_pages(cache, r, keep);
    r->tokens = keep * cache->geometry.page_tokens;
    if (keep)
        skv_requeue(cache, index);
    else
        skv_undirty(cache, index);
    skv_settle(cache, index);
}

#define EVICT_SCAN                                                                                 \
    256u /* LRU users looked at for one that is stored, before one that is not is dropped */

bool skv_evict_one(struct skv_cache *cache)
{
    uint32_t unstored = SKV_NONE, scanned = 0;
    for (uint32_t i = cache->residences.oldest; i != SKV_NONE; i = cache->residences.all[i].newer) {
        const struct residence *r = residence_at(cache, i);
        if (r->leases || r->copies || r->offload || !r->pages || skv_in_limbo(cache, r->page[0]))
            continue; /* limbo pages come first in a list: evicting it would free few, or none */
        if (skv_is_stored(cache, r)) {
            skv_evict_to(cache, i, 0);
            return true;
        }
        if (unstored == SKV_NONE)
            unstored = i;
        if (++scanned == EVICT_SCAN)
            break;
    }
    if (unstored == SKV_NONE)
        return false;
    skv_evict_to(cache, unstored, 0);
    return true;
}

uint32_t skv_take_pages(struct skv_cache *cache, uint32_t owner, uint64_t generation,
                        uint32_t count, uint32_t *out)
{
    struct residences *rs = &cache->residences;
    uint32_t got = 0, evictions = 0;
    if (owner != EXTENT_COMMON) /* all or none: making room may give up an extent of its own */
        while (rs->owners[owner].free_pages < count)
            if (!skv_make_room(cache, owner, &evictions))
                return 0;
    while (got < count) {
        out[got] = skv_page_take(rs, owner, generation);
        if (out[got] != SKV_NONE)
            got++;
        else if (!skv_make_room(cache, owner, &evictions))
            break;
    }
    return got;
}

int skv_cache_evict(struct skv_cache *cache, uint32_t record)
{
    struct residence *r = residence_of(cache, record);
    if (!r)
        return SKV_OK;
    if (r->leases || r->load_job || (r->pages && skv_in_limbo(cache, r->page[0])))
        return SKV_EBUSY;
    if (cache->options.store && !skv_is_stored(cache, r)) {
        r->urgent = true;
        skv_requeue(cache, cache->records.all[record].residence);
        return SKV_EAGAIN;
    }
    if (r->copies || r->offload)
        return SKV_EAGAIN;
    skv_evict_to(cache, cache->records.all[record].residence, 0);
    return SKV_OK;
}

/* ---- cuts ---- */

uint32_t skv_succeed(struct skv_cache *cache, uint32_t index, uint32_t pages, uint32_t tokens)
{
    struct residences *rs = &cache->residences;
    struct residence *old = residence_at(cache, index);
    uint32_t owner = old->record;
    uint64_t epoch = old->dirty_epoch;
    skv_undirty(cache, index);
    uint32_t next = skv_residence_add(rs, owner);
    if (next != SKV_NONE && !skv_residence_reserve(rs, next, pages)) {
        skv_residence_remove(rs, next);
        next = SKV_NONE;
    }
    if (next == SKV_NONE) {
        struct record *record = &cache->records.all[owner];
        struct skv_change *change =
            old->offload ? skv_new_change(cache, pages_of(cache, record->stored)) : NULL;
        pages = 0;
        if (disown_offload(cache, old) && change)
            change_record(cache, record, old->hash, change);
    }
    skv_residence_detach(rs, index);
    for (uint32_t i = pages; i < old->pages; i++) {
        skv_describe_held(cache, old->page[i]);
        skv_failpoint(FAIL_succeed_page);
    }
    cache->records.all[owner].residence = next;
    if (next == SKV_NONE) {
        if (!cache->records.all[owner].stored)
            skv_records_remove(&cache->records, owner);
        return next;
    }
    struct residence *r = residence_at(cache, next);
    r->offload = old->offload; /* its copies are the old one's, what it stores is the user's */
    old->offload = NULL;
    for (uint32_t i = 0; i < pages; i++) {
        rs->page[old->page[i]].refs++;
        skv_residence_push(rs, next, old->page[i], old->hash[i]);
    }
    r->ready = pages;
    r->tokens = tokens;
    r->committed_ms = old->committed_ms;
    skv_dirty(cache, next, epoch);
    return next;
}

void skv_forget_tail(struct skv_cache *cache, uint32_t owner)
{
    struct record *record = &cache->records.all[owner];
    uint32_t tail = record->stored % cache->geometry.page_tokens;
    if (!tail)
        return;
    skv_records_set_stored(&cache->records, owner, record->stored - tail);
    record->hash_tail = record->hash_full;
}

void skv_new_generation(struct skv_cache *cache, struct record *record)
{
    record->generation = ++cache->generation;
    if (cache->options.table)
        cache->options.table->generation = cache->generation;
}

uint64_t skv_cut_stored(struct skv_cache *cache, uint32_t owner, uint32_t tokens,
                        const uint64_t *hashes, struct skv_change *change)
{
    struct record *record = &cache->records.all[owner];
    uint32_t keep = tokens / cache->geometry.page_tokens;
    if (record->stored > tokens) {
        skv_records_set_stored(&cache->records, owner, tokens);
        record->hash_full = record->hash_tail =
            keep ? hashes[keep - 1] : skv_chain_before(cache, record);
    }
    record->untold = true;
    return change ? change_record(cache, record, hashes, change) : 0;
}

uint32_t skv_shorten(struct skv_cache *cache, uint32_t index, uint32_t keep)
{
    struct residence *r = residence_at(cache, index);
    uint32_t size = cache->geometry.page_tokens;
    if (r->leases || r->copies) {
        uint32_t pages = keep < r->ready ? keep : r->ready;
        return skv_succeed(cache, index, pages, pages * size);
    }
    skv_drop_pages(cache, r, keep);
    r->tokens = keep * size;
    return index;
}

/* The store's part, now: the offload in flight counts for nothing. */
static int cut_in_store(struct skv_cache *cache, uint32_t owner, uint32_t tokens,
                        const uint64_t *hashes, uint64_t *id)
{
    const struct record *record = &cache->records.all[owner];
    struct residence *r = residence_of(cache, owner);
    uint32_t size = cache->geometry.page_tokens;
    /* At 0 always: a removal by eviction may be under way, and FORGET waits for it too. And a
     * stored tail is told by its generation from what a hot restart finds in the pool. */
    bool in_store = record->stored > tokens || record->stored % size ||
                    (!tokens && cache->options.store) || (r && r->offload);
    struct skv_change *change = NULL;
    if (in_store && !(change = skv_new_change(cache, tokens / size)))
        return SKV_ENOMEM;
    skv_new_generation(cache, &cache->records.all[owner]);
    skv_failpoint(FAIL_cut_numbered);
    if (r)
        disown_offload(cache, r);
    uint64_t made = in_store ? skv_cut_stored(cache, owner, tokens, hashes, change) : 0;
    if (id)
        *id = made;
    return SKV_OK;
}

/* Or later: an offload in flight replaces a stored tail that the cut leaves alone, and is not to
 * cost it. What it stores counts, up to the cut, and the store is told when that is known. */
static bool cut_at_offload(struct skv_cache *cache, struct record *record,
                           const struct residence *r, uint32_t tokens)
{
    if (!r || !r->offload || record->stored > tokens ||
        record->stored % cache->geometry.page_tokens == 0)
        return false;
    struct offload *offload = (struct offload *)r->offload;
    if (tokens < offload->cut)
        offload->cut = tokens;
    skv_new_generation(cache, record);
    record->untold = true;
    record->telling = false;
    return true;
}

int skv_cut(struct skv_cache *cache, uint32_t owner, uint32_t tokens, const uint64_t *hashes,
            uint64_t *id)
{
    struct record *record = &cache->records.all[owner];
    struct residence *r = residence_of(cache, owner);
    uint32_t keep = tokens / cache->geometry.page_tokens, index = record->residence;
    assert(tokens % cache->geometry.page_tokens == 0);

    bool later = !id && cut_at_offload(cache, record, r, tokens);
    if (!later && cut_in_store(cache, owner, tokens, hashes, id))
        return SKV_ENOMEM;
    cache->stats.cuts++;
    if (!r) {
        if (!record->stored)
            skv_records_remove(&cache->records, owner);
        return SKV_OK;
    }
    if (r->tokens > tokens)
        index = skv_shorten(cache, index, keep);
    skv_failpoint(FAIL_cut_done);
    if (index == SKV_NONE) /* no room for its successor: as good as evicted */
        return SKV_OK;
    skv_requeue(cache, index);
    skv_settle(cache, index);
    return SKV_OK;
}

/* ---- users that could not be read ---- */

void skv_unread(struct skv_cache *cache, uint64_t generation)
{
    cache->unread[cache->unread_at++ % UNREAD] =
        (struct unread){.generation = generation, .until_ms = cache->now_ms + UNREAD_MS};
}

bool skv_is_unread(const struct skv_cache *cache, uint64_t generation)
{
    bool unread = false;
    for (uint32_t i = 0; i < UNREAD; i++)
        unread |=
            cache->unread[i].generation == generation && cache->now_ms < cache->unread[i].until_ms;
    return unread;
}
