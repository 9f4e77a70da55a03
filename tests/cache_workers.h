/* Workers over the simulated world: sessions whose passes read what their grants say is there and
 * write what they compute, step by step, while everything else goes on; and the judgement of every
 * grant and every commit. Restarts: cache_restarts.h. */
#ifndef SKV_CACHE_WORKERS_H
#define SKV_CACHE_WORKERS_H

#include "cache_world.h"

#define SESSIONS 5u /* the last one serves the second model */
#define ROWS     2u
#define BATCH    3u

enum phase {
    IDLE,    /* the row is free, as far as the worker knows */
    LOOKING, /* its records are being read */
    GRANTED, /* its pass has not begun */
    RUNNING, /* some of what it appends is written */
    DONE,    /* the pass is over: COMMIT or RELEASE may follow */
    WAITING, /* RELEASE or COMMIT said to wait for the row */
};

struct view { /* one user of a batch */
    uint32_t user, history, max_cached, flags;
    uint64_t tail_hash; /* to echo */
    uint64_t tokens[WORLD_TOKENS], hashes[WORLD_PAGES];
    tag tags[WORLD_TOKENS];
    bool open, proven; /* holds its lease; its tail is its own tokens' */
    struct wire_grant grant;
    uint32_t pages[WORLD_PAGES];
    uint32_t written; /* tokens of its history that are in its pages */
    uint64_t generation, load_failures;
};

struct sim_row {
    enum phase phase;
    bool again; /* acquire the same once more, with TAIL_DIFFERS */
    bool gated;
    bool unanswered; /* a COMMIT or RELEASE waits for the row's copies */
    uint32_t count, known_count;
    struct view views[BATCH];
    struct skv_known known[BATCH];
    uint64_t hashes[BATCH][WORLD_PAGES];
    uint32_t gates[16];
};

struct sim_session {
    enum { CLOSED, LIVE, ZOMBIE, GONE } state; /* ZOMBIE: fenced, its passes go on */
    uint32_t slot;
    struct skv_id model;
    uint64_t serial;
    uint64_t views; /* extents that its worker can write to: those of its grants, and its list */
    struct sim_row rows[ROWS];
};

static struct sim_session sessions[SESSIONS];
static uint64_t serials;
static uint16_t readers[WORLD_POOL][S], writers[WORLD_POOL][S]; /* leases that may touch a slot */

static struct wire_grant grants[SKV_MAX_BATCH];
static uint32_t page_list[WIRE_SLOT_PAGES];

/* Adds a grant's slots, or takes them away; nobody may write what another may touch. */
static inline void occupy(const struct view *view, int by)
{
    const struct wire_grant *grant = &view->grant;
    for (uint32_t i = 0; i < grant->cached; i++) {
        CHECK(by < 0 || !writers[view->pages[i / S]][i % S]);
        readers[view->pages[i / S]][i % S] += (uint16_t)by;
    }
    for (uint32_t i = grant->cached; grant->flags & SKV_GRANT_APPEND && i < view->history; i++) {
        CHECK(by < 0 || !writers[view->pages[i / S]][i % S]);
        CHECK(by < 0 || !readers[view->pages[i / S]][i % S]);
        writers[view->pages[i / S]][i % S] += (uint16_t)by;
    }
}

static inline void end_view(struct view *view)
{
    if (view->open)
        occupy(view, -1);
    view->open = false;
}

/* Does a pass that runs right now touch the page? */
static inline bool touched_now(uint32_t page)
{
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t r = 0; r < ROWS; r++) {
            const struct sim_row *row = &sessions[s].rows[r];
            for (uint32_t i = 0; row->phase == RUNNING && i < row->count; i++)
                for (uint32_t p = 0; row->views[i].open && p < row->views[i].grant.page_count; p++)
                    if (row->views[i].pages[p] == page)
                        return true;
        }
    return false;
}

/* The first `tokens` of its history must be in its pages, and be its own. */
static inline void check_content(const struct view *view, uint32_t tokens)
{
    for (uint32_t i = 0; i < tokens; i++)
        if (world.pool[view->pages[i / S]][i % S] != view->tags[i]) {
            fprintf(stderr, "user %u, token %u of %u (cached %u): page %u holds another's\n",
                    view->user, i, view->history, view->grant.cached, view->pages[i / S]);
            abort();
        }
}

static inline uint32_t proven_tokens(const struct view *view)
{
    return view->proven ? view->grant.cached : view->grant.cached - view->grant.cached % S;
}

/* ---- the reference: what may be expected of a request ---- */

struct expected {
    uint32_t cached, committed; /* after the cut, if there is one */
    bool end;                   /* all of it: it may be appended to */
    bool held;                  /* by one that appends */
    bool cut;
};

static inline struct expected expect(const struct view *view)
{
    const struct sim_user *user = &world.users[view->user];
    uint32_t count = user->count, full = count / S, start = full * S, h = view->history;
    uint32_t n = h / S < full ? h / S : full, m = 0;
    struct expected e = {.committed = count};
    while (m < n && user->committed[(m + 1) * S - 1] == view->tags[(m + 1) * S - 1])
        m++;
    e.cached = m * S;
    bool cut = m < n, proven = false;
    if (!cut && m == full && start < count && h >= count) {
        bool differs = user->committed[count - 1] != view->tags[count - 1];
        cut = h == count && differs;
        proven = view->flags & WIRE_TAIL_DIFFERS && differs; /* if it saw this tail */
        if (!cut)
            e.cached = count;
    }
    if (cut)
        e.committed = e.cached;
    e.cut = cut || proven;
    if (e.cached > view->max_cached)
        e.cached = view->max_cached;
    uint32_t last = e.committed - e.committed % S;
    if (e.cached > last && e.cached < e.committed)
        e.cached = last;
    e.end = e.cached == e.committed || (proven && e.cached == start);
    return e;
}

/* Brings the reference in line with what the cache did by itself: only for a reason. */
static inline void sync_users(bool may_cut)
{
    struct skv_stats stats = stats_now();
    bool dropped = stats.dropped_tokens > world.dropped_tokens;
    world.dropped_tokens = stats.dropped_tokens;
    for (uint32_t i = 0; i < WORLD_USERS; i++) {
        struct sim_user *user = &world.users[i];
        struct skv_user_info info = info_of(i);
        bool cut = info.generation != user->generation;
        CHECK(!info.generation || info.generation >= user->generation);
        CHECK(info.committed <= user->count || !"more than was ever committed");
        CHECK(info.stored <= info.committed && info.resident <= info.committed);
        if (info.committed < user->count) {
            CHECK(dropped || (cut && may_cut));
            /* what is left is resident, or the stored history, whose tail may be an older one */
            if (info.stored == info.committed)
                memcpy(user->committed, user->stored, info.committed * sizeof(tag));
            user->count = info.committed;
        }
        CHECK(info.stored <= user->stored_count);
        CHECK(info.stored == user->stored_count || cut);
        user->stored_count = info.stored;
        if (info.generation)
            user->generation = info.generation;
    }
}

static inline bool is_of_now(const struct skv_change *change, uint32_t u)
{
    return user_of(change->record.model, change->record.user) == u &&
           change->record.generation == info_of(u).generation;
}

/* Does the user's next token belong to the page of a stored tail, while a change of its generation
 * is on its way to the store, or the answer on its way back, or was not made? */
static inline bool in_untold_tail(uint32_t u, uint32_t tokens)
{
    bool untold = world.users[u].untold && world.users[u].untold == info_of(u).generation;
    for (uint32_t i = 0; i < world.write_count; i++) {
        const struct sim_write *write = &world.writes[(world.write_first + i) % WORLD_QUEUE];
        untold = untold || (write->change && is_of_now(write->change, u));
    }
    for (uint32_t i = 0; i < world.write_event_count; i++) {
        const struct skv_mover_event *event =
            &world.write_events[(world.write_event_first + i) % WORLD_QUEUE];
        untold = untold || (event->kind == SKV_MOVER_CHANGED && is_of_now(event->job, u));
    }
    return untold && tokens / S < pages_for(info_of(u).stored);
}

/* ---- views ---- */

static inline uint64_t extent_bit(uint32_t page)
{
    return UINT64_C(1) << page / world.options.extent_pages;
}

static inline uint64_t list_of(const struct sim_session *session, uint32_t *sequence)
{
    uint64_t extents[WIRE_MAX_EXTENTS / 64];
    *sequence = skv_cache_views(world.cache, session->slot, extents);
    return extents[0];
}

/* The worker looks at its list of extents: maps, unmaps, says so. */
static inline void look_at_views(uint32_t s)
{
    uint32_t sequence;
    sessions[s].views = list_of(&sessions[s], &sequence);
    skv_cache_viewed(world.cache, sessions[s].slot, sequence);
}

/* What a grant lets it write to is its own, and in view from now on. */
static inline void view_grant(struct sim_session *session, const struct view *view)
{
    uint32_t sequence;
    uint64_t own = world.options.extent_pages ? list_of(session, &sequence) : 0;
    for (uint32_t i = view->grant.cached / S; own && i < view->grant.page_count; i++) {
        CHECK(own & extent_bit(view->pages[i]));
        session->views |= extent_bit(view->pages[i]);
    }
}

/* ---- commands ---- */

static inline void session_open(uint32_t s)
{
    struct sim_session *session = &sessions[s];
    uint32_t *gates[ROWS];
    memset(session, 0, sizeof *session);
    for (uint32_t r = 0; r < ROWS; r++)
        gates[r] = session->rows[r].gates;
    session->model = world.users[s + 1 == SESSIONS ? WORLD_USERS - 1 : 0].model;
    int slot = skv_cache_session_open(world.cache, session->model, ROWS, gates);
    CHECK(slot >= 0);
    session->slot = (uint32_t)slot;
    session->state = LIVE;
    session->serial = ++serials;
}

static inline void fence(uint32_t s)
{
    skv_cache_session_fence(world.cache, sessions[s].slot);
    sessions[s].state = ZOMBIE;
    take_actions();
}

/* Its process is gone: it touches nothing any more. */
static inline void session_gone(uint32_t s)
{
    struct sim_session *session = &sessions[s];
    for (uint32_t r = 0; r < ROWS; r++) {
        for (uint32_t i = 0; i < BATCH; i++)
            end_view(&session->rows[r].views[i]);
        session->rows[r].phase = IDLE;
    }
    session->state = GONE;
    session->views = 0;
    if (skv_cache_session_gone(world.cache, session->slot))
        session->state = CLOSED;
    take_actions();
}

static inline void on_fence(uint32_t slot)
{
    for (uint32_t s = 0; s < SESSIONS; s++)
        if (sessions[s].slot == slot && sessions[s].state == LIVE) {
            sessions[s].state = ZOMBIE;
            if (world.trace)
                fprintf(stderr, "    session %u is fenced\n", s);
        }
}

static inline void on_row(uint32_t slot, uint32_t r)
{
    for (uint32_t s = 0; s < SESSIONS; s++) {
        struct sim_row *row = &sessions[s].rows[r];
        if (sessions[s].slot != slot || sessions[s].state == CLOSED)
            continue;
        row->unanswered = false;
        if (row->phase == WAITING)
            row->phase = IDLE;
    }
}

/* Copies the row's requests to the core, and reads the records that they need. false: the row is
 * owned. */
static inline bool acquire_begin(uint32_t s, uint32_t r, bool read_records)
{
    struct sim_session *session = &sessions[s];
    struct sim_row *row = &session->rows[r];
    struct skv_batch_input *input;
    if (skv_cache_input(world.cache, session->slot, r, &input))
        return false;
    for (uint32_t i = 0; i < row->count; i++) {
        struct view *view = &row->views[i];
        uint32_t offset = (row->count - 1 - i) * (WORLD_PAGES + 1);
        make_tags(&world.users[view->user], view->tokens, view->history, view->tags);
        skv_chain_hashes(session->model, world.users[view->user].id, S, view->tokens, view->history,
                         0, view->hashes);
        memcpy(input->hashes + offset, view->hashes, sizeof view->hashes);
        input->requests[i] = (struct wire_request){.user = world.users[view->user].id,
                                                   .history = view->history,
                                                   .max_cached = view->max_cached,
                                                   .flags = view->flags,
                                                   .hash_offset = offset,
                                                   .tail_hash = view->tail_hash};
    }
    row->known_count = 0;
    uint32_t entry = 0;
    struct skv_record record;
    while ((entry = skv_cache_needs(world.cache, session->slot, r, entry, row->count, &record)) !=
           SKV_NONE) {
        struct skv_known *known = &row->known[row->known_count];
        uint32_t user = user_of(record.model, record.user);
        CHECK(user == row->views[entry].user);
        if (read_records && look_up(user, known, row->hashes[row->known_count])) {
            known->entry = entry;
            row->known_count++;
        }
        entry++;
    }
    row->phase = LOOKING;
    return true;
}

/* Is there a live lease, outside the batch of `but`, that appends to this user? `maybe`: or one
 * that may have been cut off. */
static inline bool has_appender(uint32_t user, const struct view *but, bool maybe)
{
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t r = 0; r < ROWS && sessions[s].state == LIVE; r++)
            for (uint32_t i = 0; i < BATCH; i++) {
                const struct view *view = &sessions[s].rows[r].views[i];
                bool same =
                    but >= sessions[s].rows[r].views && but < &sessions[s].rows[r].views[BATCH];
                if (!same && view->open && view->user == user &&
                    view->grant.flags & SKV_GRANT_APPEND &&
                    (maybe || (view->generation == info_of(user).generation &&
                               view->load_failures == world.load_failures)))
                    return true;
            }
    return false;
}

/* Is an onboard in flight? */
static inline bool loading(void)
{
    for (uint32_t i = 0; i < WORLD_JOBS; i++)
        if (world.onboards[i].job)
            return true;
    return false;
}

static inline void judge_grant(struct sim_session *session, struct sim_row *row, struct view *view,
                               const struct expected *e, const struct skv_user_info *before,
                               uint64_t free_pages)
{
    const struct wire_grant *grant = &view->grant;
    bool appends = grant->flags & SKV_GRANT_APPEND;
    uint32_t h = view->history, pages = pages_for(appends ? h : grant->cached);
    CHECK(grant->status == 0 && grant->lease && grant->page_count == pages);
    CHECK(grant->cached <= h && grant->cached <= view->max_cached);
    CHECK(grant->gpu_tokens <= grant->cached);
    for (uint32_t i = 0; i < pages; i++) {
        view->pages[i] = page_list[grant->page_offset + i];
        CHECK(view->pages[i] < world.options.pages);
    }
    view->open = true;
    view->written = grant->cached;
    view->load_failures = world.load_failures;
    view->generation = info_of(view->user).generation;
    occupy(view, +1);
    if (appends)
        view_grant(session, view);

    if (world.trace)
        fprintf(stderr,
                "    user %u h %u max %u flags %u: cached %u flags %u tail %u (expected %u of %u, "
                "end %d; resident %u)\n",
                view->user, h, view->max_cached, view->flags, grant->cached, grant->flags,
                grant->tail_valid, e->cached, e->committed, e->end, before->resident);
    /* What was to be had, by the reference: never more, and all of it when it was resident. */
    CHECK(grant->cached <= e->cached);
    if (before->resident >= e->cached)
        CHECK(grant->cached >= e->cached - e->cached % S);
    CHECK(!appends || (!(view->flags & WIRE_READ) && h > grant->cached));
    CHECK(!appends || e->end);
    CHECK(!appends || !has_appender(view->user, view, false));
    if (e->cached == e->committed && h > e->cached && !(view->flags & WIRE_READ) &&
        (before->generation || world.options.max_records > WORLD_USERS) && !e->held &&
        before->resident == before->committed && free_pages >= pages_for(h) && !world.early &&
        !in_untold_tail(view->user, e->cached))
        CHECK(appends);
    CHECK(!appends || !in_untold_tail(view->user, e->cached));
    CHECK(!world.early || !(appends || grant->flags & (SKV_GRANT_STORE | SKV_GRANT_GATED)));

    /* A tail that only the worker can judge. */
    bool tail = e->committed % S && h > e->committed &&
                (grant->cached == e->committed || (appends && !e->cut));
    CHECK(!tail == !grant->tail_valid);
    view->proven = true;
    if (tail) {
        CHECK(grant->tail_valid == e->committed % S);
        uint64_t hash[WORLD_PAGES];
        skv_chain_hashes(world.users[view->user].model, world.users[view->user].id, S, view->tokens,
                         e->committed, 0, hash);
        view->proven = hash[e->committed / S] == grant->tail_hash;
        row->again = row->again || !view->proven;
    }
    if (!(grant->flags & SKV_GRANT_GATED))
        check_content(view, proven_tokens(view));
    CHECK(row->gated || !(grant->flags & SKV_GRANT_GATED));
}

/* Leases, after acquire_begin(). */
static inline void acquire_end(uint32_t s, uint32_t r)
{
    struct sim_session *session = &sessions[s];
    struct sim_row *row = &session->rows[r];
    struct skv_user_info before[BATCH];
    for (uint32_t i = 0; i < row->count; i++)
        before[i] = info_of(row->views[i].user);
    struct expected e[BATCH];
    for (uint32_t i = 0; i < row->count; i++)
        e[i] = expect(&row->views[i]);
    for (uint32_t i = 0; i < row->count; i++)
        e[i].held = has_appender(row->views[i].user, &row->views[i], true);
    struct skv_stats then = stats_now();
    bool loads = loading(), fresh = !skv_cache_has_views(world.cache, session->slot);
    memset(row->gates, 0x55, sizeof row->gates);
    row->gated = skv_cache_acquire(world.cache, session->slot, r, row->count, row->known,
                                   row->known_count, true, grants, page_list);
    take_actions(); /* whom it fenced */
    for (uint32_t layer = 0; layer < WORLD_LAYERS; layer++)
        CHECK(row->gates[layer] == !row->gated);
    CHECK(row->gates[WORLD_LAYERS] == 0);
    struct skv_stats now = stats_now();
    uint64_t free_pages =
        then.pool_pages_free < now.pool_pages_free ? then.pool_pages_free : now.pool_pages_free;
    if (world.options.extent_pages) { /* what may be had for certain: one extent, by a newcomer */
        uint32_t rest = world.options.pages % world.options.extent_pages;
        bool left = then.extents == 1 || then.extents_free + then.extents_common > 1;
        fresh = fresh && row->count == 1 && then.extents_free && left;
        free_pages = !fresh ? 0 : rest ? rest : world.options.extent_pages;
    }
    row->phase = GRANTED;
    row->again = false;
    for (uint32_t i = 0; i < row->count; i++) {
        struct view *view = &row->views[i];
        view->grant = grants[i];
        bool exact = !e[i].cut || !loads; /* then a cut user loses what it is being loaded */
        for (uint32_t j = 0; j < row->count; j++)
            exact = exact && (j == i || row->views[j].user != view->user);
        if (!exact || (i && now.dropped_tokens > then.dropped_tokens)) {
            /* another entry changed what was to be had */
            uint32_t c = view->grant.cached;
            uint32_t valid = view->grant.tail_valid;
            e[i] = (struct expected){
                .cached = c, .committed = valid ? c - c % S + valid : UINT32_MAX, .end = true};
        }
        if (!exact || (i && now.evicted_users > then.evicted_users))
            before[i].resident = 0; /* nothing is known to be certain */
        judge_grant(session, row, view, &e[i], &before[i], free_pages);
        if (!exact && now.cuts > then.cuts)
            view->generation = UINT64_MAX; /* before the cut, or after it */
    }
    sync_users(true);
}

static inline void write_tag(struct sim_session *session, uint32_t page, uint32_t slot, tag value)
{
    if (world.options.extent_pages) {
        CHECK(session->views & extent_bit(page));
        CHECK(!slot || world.filled_by[page] == session->serial); /* its own tail */
    }
    world.filled_by[page] = session->serial;
    world.pool[page][slot] = value;
}

/* A step of the pass: its beginning, or some of its writing. false: it waits, or is over. */
static inline bool run_step(struct sim_session *session, struct sim_row *row, uint32_t tokens)
{
    if (row->phase == GRANTED) {
        for (uint32_t layer = 0; layer < WORLD_LAYERS; layer++)
            if (!row->gates[layer])
                return false;
        if (row->gates[WORLD_LAYERS] || row->again) {
            row->phase = DONE;
            return true;
        }
        for (uint32_t i = 0; i < row->count; i++)
            if (row->views[i].open)
                check_content(&row->views[i], proven_tokens(&row->views[i]));
        row->phase = RUNNING;
        return true;
    }
    if (row->phase != RUNNING)
        return false;
    bool over = true;
    for (uint32_t i = 0; i < row->count; i++) {
        struct view *view = &row->views[i];
        if (!view->open)
            continue;
        for (uint32_t t = 0; t < tokens && view->grant.flags & SKV_GRANT_APPEND; t++)
            if (view->written < view->history) {
                write_tag(session, view->pages[view->written / S], view->written % S,
                          view->tags[view->written]);
                view->written++;
            }
        over = over && (view->written == view->history || !(view->grant.flags & SKV_GRANT_APPEND));
    }
    for (uint32_t i = 0; over && i < row->count; i++)
        if (row->views[i].open)
            check_content(&row->views[i], row->views[i].written);
    if (over)
        row->phase = DONE;
    return true;
}

static inline void judge_commit(const struct sim_session *session, struct view *view, bool ok,
                                const struct wire_committed *result, bool loads)
{
    struct sim_user *user = &world.users[view->user];
    struct skv_user_info info = info_of(view->user);
    bool appends = view->grant.flags & SKV_GRANT_APPEND;
    if (session->state != LIVE) {
        CHECK(result->status == SKV_ESTALE);
        return;
    }
    if (!appends || !ok) {
        CHECK(result->status == 0);
    } else if (result->status) {
        CHECK(result->status == SKV_ESTALE);
        CHECK(view->generation != info.generation || view->load_failures != world.load_failures ||
              loads);
    } else {
        CHECK(view->generation == info.generation || view->generation == UINT64_MAX);
        CHECK(view->history > user->count && view->grant.cached <= user->count);
        CHECK(memcmp(user->committed, view->tags, view->grant.cached * sizeof(tag)) == 0);
        memcpy(user->committed, view->tags, view->history * sizeof(tag));
        user->count = view->history;
    }
    CHECK(result->committed == info.committed && result->stored == info.stored);
}

/* COMMIT or RELEASE of those entries of the row that `which` says; also by a session that was
 * fenced meanwhile: its leases live on then. */
static inline void row_end(uint32_t s, uint32_t r, bool commit, uint32_t which)
{
    struct sim_session *session = &sessions[s];
    struct sim_row *row = &session->rows[r];
    uint64_t leases[BATCH];
    uint32_t of[BATCH], count = 0;
    struct wire_committed results[BATCH];
    for (uint32_t i = 0; i < row->count; i++)
        if (row->views[i].open && which & (1u << i)) {
            of[count] = i;
            leases[count++] = row->views[i].grant.lease;
        }
    bool wait = false, loads = loading();
    for (uint32_t i = 0; i < count; i++) {
        struct view *view = &row->views[of[i]];
        wait = skv_cache_end(world.cache, session->slot, r, &leases[i], 1, commit, &results[i]);
        if (session->state == LIVE)
            end_view(view);
        judge_commit(session, view, commit, &results[i], loads);
        take_actions();
        sync_users(false);
    }
    row->unanswered = wait;
    bool open = false;
    for (uint32_t i = 0; i < row->count; i++)
        open = open || row->views[i].open;
    if (!open && session->state == LIVE)
        row->phase = wait ? WAITING : IDLE;
}

static inline void workers_open(void)
{
    memset(sessions, 0, sizeof sessions);
    memset(readers, 0, sizeof readers);
    memset(writers, 0, sizeof writers);
    world.on_fence = on_fence;
    world.on_row = on_row;
    world.is_touched = touched_now;
}

#endif
