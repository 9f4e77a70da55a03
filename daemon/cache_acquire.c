/* ACQUIRE: match a request's chain hashes against what the user has, then grant, in batch order,
 * what can be had now.
 *
 * A chain hash covers everything before it, so "do the first n pages match" is one comparison at
 * page n - 1, and the longest matching prefix a binary search. */
#include "cache_internal.h"

#include "device.h"

struct match {
    uint32_t owner;         /* record, or SKV_NONE */
    uint32_t committed;     /* tokens that the user has, resident or stored */
    uint32_t cached;        /* of these, the matching prefix, before max_cached */
    uint32_t cut;           /* proven: the user is to be cut to this many tokens; SKV_NONE: not */
    bool needs_record;      /* the stored hash array decides, and is not known */
    const uint64_t *hashes; /* of the user's full pages, as far as known: for a cut */
};

/* How many of the first `count` (at least one) pages match. */
static uint32_t longest(const uint64_t *ours, const uint64_t *theirs, uint32_t count)
{
    if (ours[count - 1] == theirs[count - 1])
        return count;
    uint32_t low = 0, high = count - 1; /* [0, low) match; page `high` does not */
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (ours[middle] == theirs[middle])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static const struct skv_known *known_for(const struct skv_known *known, uint32_t count,
                                         uint32_t entry)
{
    for (uint32_t i = 0; i < count; i++)
        if (known[i].entry == entry)
            return &known[i];
    return NULL;
}

/* The half-filled tail of a user whose full pages all match. */
static void match_tail(const struct skv_cache *cache, const struct wire_request *request,
                       const uint64_t *hashes, uint64_t tail_hash, struct match *m)
{
    uint32_t size = cache->geometry.page_tokens, start = m->committed - m->committed % size;
    m->cached = start;
    if (start == m->committed || request->history < m->committed)
        return;
    bool differs = request->history == m->committed
                       ? hashes[start / size] != tail_hash
                       : request->flags & WIRE_TAIL_DIFFERS && request->tail_hash == tail_hash &&
                             request->max_cached == start;
    if (differs)
        m->cut = start;
    else
        m->cached = m->committed;
}

static struct match match(const struct skv_cache *cache, uint16_t model,
                          const struct wire_request *request, const uint64_t *hashes,
                          const struct skv_known *known)
{
    struct match m = {.owner = skv_records_find(&cache->records, model, request->user),
                      .cut = SKV_NONE};
    if (m.owner == SKV_NONE)
        return m;
    const struct record *record = &cache->records.all[m.owner];
    const struct residence *r =
        record->residence == SKV_NONE ? NULL : &cache->residences.all[record->residence];
    uint32_t size = cache->geometry.page_tokens, resident = r ? r->tokens : 0;
    m.committed = resident > record->stored ? resident : record->stored;
    uint32_t full = m.committed / size, ours = request->history / size;
    uint32_t count = ours < full ? ours : full, matched;

    if (known && !skv_is_of(cache, known, record))
        known = NULL; /* it changed meanwhile */
    m.hashes = r ? r->hash : NULL;
    uint64_t tail_hash =
        resident >= record->stored && r && r->pages ? r->hash[r->pages - 1] : record->hash_tail;
    if (count * size <= resident) {
        matched = r && count ? longest(r->hash, hashes, count) : 0;
    } else if (known) {
        m.hashes = known->hashes;
        matched = longest(known->hashes, hashes, count); /* count > 0: more than is resident */
    } else if (count == full && hashes[full - 1] == record->hash_full) {
        matched = full; /* the usual: the stored history is a prefix of the request's */
        m.hashes = hashes;
    } else {
        uint32_t pages = resident / size;
        matched = r && pages ? longest(r->hash, hashes, pages) : 0;
        m.needs_record = matched == pages; /* till then, what is resident */
        m.cached = matched * size;
        if (m.needs_record)
            return m;
    }
    if (matched < count) {
        m.cut = m.cached = matched * size;
    } else if (matched == full) {
        match_tail(cache, request, hashes, tail_hash, &m);
    } else {
        m.cached = matched * size;
    }
    return m;
}

int skv_cache_input(struct skv_cache *cache, uint32_t slot, uint32_t row,
                    struct skv_batch_input **input)
{
    struct batch *batch = &cache->sessions[slot].batches[row];
    if (batch->open || batch->job)
        return SKV_EBUSY;
    *input = &batch->input;
    return SKV_OK;
}

uint32_t skv_cache_needs(struct skv_cache *cache, uint32_t slot, uint32_t row, uint32_t from,
                         uint32_t count, struct skv_record *record)
{
    struct session *session = &cache->sessions[slot];
    struct skv_batch_input *input = &session->batches[row].input;
    if (cache->early)
        return SKV_NONE;
    for (uint32_t i = from; i < count; i++) {
        const struct wire_request *request = &input->requests[i];
        struct match m =
            match(cache, session->model, request, input->hashes + request->hash_offset, NULL);
        if (m.needs_record && !(request->flags & WIRE_NO_ONBOARD)) {
            *record = skv_stored_record(cache, &cache->records.all[m.owner]);
            return i;
        }
    }
    return SKV_NONE;
}

/* ---- granting ---- */

struct granting { /* one ACQUIRE under way */
    struct session *session;
    struct batch *batch;
    uint32_t slot, row;
    struct onboard *job;  /* made when the first page must be loaded */
    uint64_t after;       /* latest job of another batch that loads one of its users */
    uint32_t page_offset; /* in the reply's page list */
    bool gated, lease;
};

/* NULL: no memory. */
static struct onboard *onboard_of(struct skv_cache *cache, struct granting *g)
{
    if (!g->job && skv_reserve_actions(cache, 3)) {
        /* Room for every page that a batch may have: memory that is not touched costs nothing. */
        struct onboard *job = malloc(sizeof *job + WIRE_SLOT_PAGES * sizeof *job->moves +
                                     SKV_ONBOARD_STATE_BYTES(WIRE_SLOT_PAGES));
        if (!job)
            return NULL;
        *job = (struct onboard){.job.id = ++cache->next_job, .session = SKV_NONE, .row = SKV_NONE};
        job->job.users = job->users;
        job->job.moves = job->moves;
        job->job.state = job->moves + WIRE_SLOT_PAGES;
        cache->onboards++;
        g->job = job;
    }
    return g->job;
}

/* Brings the residence up to `want` pages from the store; returns how many it has then. */
static uint32_t load(struct skv_cache *cache, struct granting *g, uint32_t owner, uint32_t want,
                     const uint64_t *hashes)
{
    const struct record *record = &cache->records.all[owner];
    uint32_t index = record->residence, size = cache->geometry.page_tokens;
    struct residence *r = residence_at(cache, index);
    uint32_t taken[SKV_MAX_USER_PAGES], count = want - r->pages;
    struct onboard *job = onboard_of(cache, g);
    if (!job || !skv_residence_reserve(&cache->residences, index, want))
        return r->pages;
    r->leases++; /* so that making room does not evict it */
    uint32_t got = skv_take_pages(cache, EXTENT_COMMON, record->generation, count, taken);
    r->leases--;
    if (!got)
        return r->pages;
    uint32_t user = job->job.user_count++;
    job->residence[user] = index;
    job->users[user] = skv_stored_record(cache, record);
    r->copies++;
    r->loads++;
    r->load_job = job->job.id;
    for (uint32_t i = 0; i < got; i++) {
        uint32_t page = r->pages, left = record->stored - page * size;
        uint64_t hash = left < size ? record->hash_tail : hashes[page];
        skv_residence_push(&cache->residences, index, taken[i], hash);
        r->tokens = left < size ? record->stored : (page + 1) * size;
        skv_describe(cache, r, page);
        skv_failpoint(FAIL_grant_loading);
        job->moves[job->job.move_count++] = (struct skv_move){.page = taken[i],
                                                              .index = page,
                                                              .valid = left < size ? left : size,
                                                              .user = user,
                                                              .hash = hash,
                                                              .generation = record->generation};
    }
    return r->pages;
}

/* May a session's lease append? Settles with a lease that holds the user already: a stale or fenced
 * one does not count, another session's old one is fenced. */
static bool may_append(struct skv_cache *cache, const struct residence *r, uint32_t session)
{
    if (r->appender == SKV_NONE)
        return true;
    uint32_t slot = r->appender >> 16;
    struct session *holder = &cache->sessions[slot];
    const struct lease *lease = skv_appending(cache, r);
    if (lease->generation != cache->records.all[r->record].generation)
        return true; /* its user was cut: its COMMIT will be stale */
    if (holder->state == SESSION_LIVE && slot != session &&
        cache->now_ms - lease->since_ms > cache->options.lease_ms) {
        skv_cache_session_fence(cache, slot);
        skv_act(cache, SKV_ACTION_FENCE)->session = slot;
    }
    return holder->state == SESSION_FENCED;
}

/* Would it be appended to the page of a stored tail, whose generation the store has not taken?
 * After a hot restart that tail would be taken for one of an earlier history. */
static bool must_be_told(const struct skv_cache *cache, const struct record *record,
                         uint32_t cached)
{
    return record->untold && cached / cache->geometry.page_tokens < pages_of(cache, record->stored);
}

/* Pages for tokens [cached, h). Lowers grant->cached to a page's start where the tail may not be
 * shared. */
static void append(struct skv_cache *cache, struct granting *g, uint32_t entry, uint32_t owner,
                   struct wire_grant *grant)
{
    struct record *record = &cache->records.all[owner];
    struct residence *r = residence_of(cache, owner);
    struct lease *lease = &g->batch->leases[entry];
    uint32_t size = cache->geometry.page_tokens, *own = g->batch->own + g->batch->owned;
    if (must_be_told(cache, record, grant->cached)) {
        skv_tell(cache, owner);
        goto refused;
    }
    if (!may_append(cache, r, g->slot))
        goto refused;
    uint32_t partial = grant->cached % size;
    /* A fenced lease, or a worker of an earlier daemon, may write there still; and where another
     * session's view is, this one has none. */
    uint32_t tail = partial ? r->page[grant->cached / size] : SKV_NONE;
    bool in_place = partial && !r->tail_writers && !skv_in_limbo(cache, tail) &&
                    skv_may_write(cache, g->slot, tail);
    uint32_t base = grant->cached / size + in_place;
    uint32_t pages = pages_of(cache, lease->history), need = pages - base;
    if (!skv_residence_reserve(&cache->residences, record->residence, pages))
        goto refused;
    lease->tail_in_place = in_place;
    lease->tail_page = tail;
    skv_writes(cache, g->batch, lease, 1); /* so that making room gives neither away */
    r->leases++;
    uint32_t got =
        skv_take_pages(cache, skv_appends_from(cache, g->slot), record->generation, need, own);
    r->leases--;
    skv_writes(cache, g->batch, lease, -1);
    if (got < need) {
        while (got)
            skv_let_go(cache, own[--got]);
        lease->tail_in_place = false;
        goto refused;
    }
    if (!in_place)
        grant->cached -= partial;
    lease->state = LEASE_APPEND;
    lease->base = base;
    r->tail_writers += in_place;
    lease->own = g->batch->owned;
    lease->owned = need;
    g->batch->owned += need;
    skv_writes(cache, g->batch, lease, 1);
    r->appender = appender_of(g->slot, g->row, entry);
    for (uint32_t i = 0; i < need; i++) {
        skv_describe_own(cache, own[i], record, base + i, (uint16_t)g->slot);
        skv_failpoint(FAIL_grant_own);
    }
    if (in_place)
        skv_describe(cache, r, base - 1);
    grant->flags |= SKV_GRANT_APPEND;
    return;
refused:
    cache->stats.append_refused++;
}

/* Makes sure that the user has a record and a residence; false: no room for it. */
static bool admit(struct skv_cache *cache, uint16_t model, struct skv_id user, uint32_t *owner)
{
    if (*owner == SKV_NONE) {
        *owner = skv_records_add(&cache->records, model, user);
        if (*owner == SKV_NONE)
            return false;
        struct record *record = &cache->records.all[*owner];
        skv_new_generation(cache, record);
        record->hash_full = record->hash_tail = skv_chain_before(cache, record);
    }
    struct record *record = &cache->records.all[*owner];
    if (record->residence == SKV_NONE) {
        uint32_t index = skv_residence_add(&cache->residences, *owner);
        if (index == SKV_NONE) {
            if (!record->stored)
                skv_records_remove(&cache->records, *owner);
            return false;
        }
        record->residence = index;
    }
    return true;
}

static void grant_one(struct skv_cache *cache, struct granting *g, uint32_t entry,
                      const struct skv_known *known, struct wire_grant *grant, uint32_t *pages)
{
    const struct wire_request *request = &g->batch->input.requests[entry];
    const uint64_t *hashes = g->batch->input.hashes + request->hash_offset;
    struct lease *lease = &g->batch->leases[entry];
    uint32_t size = cache->geometry.page_tokens;
    *lease = (struct lease){.residence = SKV_NONE,
                            .state = LEASE_READ,
                            .history = request->history,
                            .since_ms = cache->now_ms,
                            .hash_offset = request->hash_offset};
    struct match m = match(cache, g->session->model, request, hashes, known);
    cache->stats.tail_differs += request->flags & WIRE_TAIL_DIFFERS ? 1 : 0;
    while (m.cut != SKV_NONE && !cache->early) {
        /* what is left may be less: pages that were being loaded go too */
        if (skv_cut(cache, m.owner, m.cut, m.hashes, NULL))
            return; /* no memory: no hit */
        m = match(cache, g->session->model, request, hashes, known);
    }
    uint32_t cached = m.cached < request->max_cached ? m.cached : request->max_cached;
    if (cached > m.committed - m.committed % size && cached < m.committed)
        cached = m.committed - m.committed % size; /* part of a tail cannot be checked */
    bool end = cached == m.committed && !m.needs_record;
    bool wants = g->lease && end && request->history > cached && !(request->flags & WIRE_READ);
    if (cache->early) { /* the store may know of more, or of something else */
        const struct residence *r = m.owner == SKV_NONE ? NULL : residence_of(cache, m.owner);
        uint32_t resident = r ? r->tokens : 0;
        cached = cached < resident ? cached : resident;
    }
    if (cache->early || cache->ending) {
        cache->stats.append_refused += wants;
        wants = false;
    }
    if (!cached && !wants)
        return;
    if (!admit(cache, g->session->model, request->user, &m.owner))
        return;

    struct record *record = &cache->records.all[m.owner];
    record->last_use_s = cache->wall_s;
    skv_records_touch(&cache->records, m.owner);
    skv_residence_touch(&cache->residences, record->residence);
    struct residence *r = residence_at(cache, record->residence);
    /* An onboarded tail lies in a common extent: who is to append does without it. */
    if (wants && cache->residences.protect && cached > r->tokens)
        cached -= cached % size;
    uint32_t all = cached, before = cached < r->tokens ? cached : r->tokens, had = r->pages;
    uint64_t loading = r->load_job; /* by another batch, or for an earlier entry of this one */
    if (cached > r->tokens) {
        uint32_t want = pages_of(cache, cached);
        if (request->flags & WIRE_NO_ONBOARD || skv_is_unread(cache, record->generation))
            want = r->pages;
        else if (load(cache, g, m.owner, want, hashes) < want)
            cache->stats.full_pool++;
        if (cached > r->tokens)
            cached = r->tokens;
    }
    /* Gates need a job: without one, only what is there. */
    if (g->lease && r->load_job && pages_of(cache, cached) > r->ready && !onboard_of(cache, g))
        cached = r->ready * size;
    grant->cached = cached;
    grant->gpu_tokens = before;
    if (r->pages > had)
        grant->flags |= SKV_GRANT_STORE;
    if (wants && cached == all)
        append(cache, g, entry, m.owner, grant);
    if (grant->gpu_tokens > grant->cached)
        grant->gpu_tokens = grant->cached;

    /* Gated when it touches a page that is being loaded, to read it or to append into it. */
    uint32_t touched = pages_of(cache, grant->cached);
    if (r->load_job && touched > r->ready) {
        g->gated = true;
        grant->flags |= SKV_GRANT_GATED;
        if ((!g->job || loading != g->job->job.id) && loading > g->after)
            g->after = loading;
    }
    if (!g->lease) {
        skv_settle(cache, record->residence); /* none of it may have come */
        return;
    }
    lease->residence = record->residence;
    lease->generation = record->generation;
    r->leases++;
    /* A half-filled tail that the request could not prove by its own hash goes to the library; also
     * one that is to be replaced by a fresh page: if it was edited, the user is to be cut first. */
    if (m.committed % size && request->history > m.committed &&
        (grant->cached == m.committed || lease->state == LEASE_APPEND)) {
        uint32_t tail = m.committed / size;
        grant->tail_valid = m.committed % size;
        grant->tail_hash = r->pages > tail ? r->hash[tail] : record->hash_tail;
    }
    uint32_t *list = pages + g->page_offset;
    grant->page_offset = g->page_offset;
    grant->page_count = touched + (lease->state == LEASE_APPEND ? lease->owned : 0);
    memcpy(list, r->page, touched * sizeof *list);
    memcpy(list + touched, g->batch->own + lease->own,
           (grant->page_count - touched) * sizeof *list);
    g->page_offset += grant->page_count;
}

static void write_gates(struct skv_cache *cache, uint32_t *gate_row, bool gated)
{
    uint32_t layers = cache->geometry.layers;
    __atomic_store_n(&gate_row[layers], 0, __ATOMIC_RELAXED);
    /* The worker launches only after the completion was published with release: no order is needed
     * here. */
    for (uint32_t layer = 0; layer < layers; layer++)
        __atomic_store_n(&gate_row[layer], gated ? 0 : 1, __ATOMIC_RELAXED);
}

/* Hands the batch's job to the mover. */
static void start_job(struct skv_cache *cache, struct granting *g)
{
    struct onboard *job = g->job;
    job->job.after = g->after;
    if (g->lease) {
        job->session = g->slot;
        job->row = g->row;
        job->job.gate_row = g->session->gate_row[g->row];
        g->batch->job = job;
    }
    job->before = cache->newest;
    job->behind = NULL;
    *(cache->newest ? &cache->newest->behind : &cache->oldest) = job;
    cache->newest = job;
    cache->stats.onboard_jobs += job->job.move_count ? 1 : 0;
    skv_act(cache, SKV_ACTION_ONBOARD)->job = &job->job;
}

bool skv_cache_acquire(struct skv_cache *cache, uint32_t slot, uint32_t row, uint32_t count,
                       const struct skv_known *known, uint32_t known_count, bool lease,
                       struct wire_grant *grants, uint32_t *pages)
{
    struct session *session = &cache->sessions[slot];
    struct granting g = {.session = session,
                         .batch = &session->batches[row],
                         .slot = slot,
                         .row = row,
                         .lease = lease};
    struct batch *batch = g.batch;
    assert(session->state == SESSION_LIVE && !batch->open && !batch->job);
    batch->owned = 0;
    batch->serial++;
    batch->count = batch->open = 0;
    cache->stats.acquires += lease;
    for (uint32_t i = 0; i < count; i++) {
        struct wire_grant grant = {0};
        grant_one(cache, &g, i, known_for(known, known_count, i), &grant, pages);
        if (!lease)
            continue;
        grant.lease = lease_id(session->epoch, batch->serial, row, i);
        cache->stats.history_tokens += batch->input.requests[i].history;
        cache->stats.hit_gpu_tokens += grant.gpu_tokens;
        cache->stats.hit_store_tokens += grant.cached - grant.gpu_tokens;
        grants[i] = grant;
    }
    if (lease) {
        cache->stats.acquire_users += count;
        batch->count = batch->open = count;
        write_gates(cache, session->gate_row[row], g.gated);
    }
    if (g.job && (g.job->job.move_count || (lease && g.gated))) {
        start_job(cache, &g);
    } else if (g.job) { /* nothing came of it */
        cache->onboards--;
        free(g.job);
    }
    return g.gated;
}
