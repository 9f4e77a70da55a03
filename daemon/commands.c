/* What clients ask: one table of commands, each copied, validated, done, completed. A field that is
 * out of range ends the session; what is only refused (busy, stale, unknown) is a status in the
 * completion. */
#include "daemon.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "failpoint.h"
#include "hash.h"
#include "log.h"

#define LIST_LOOKS 4096u                /* records looked at for one LIST: some 100 us */
#define HELD_NS    UINT64_C(1000000000) /* less than any client's deadline */
#define RESTART_NS UINT64_C(2000000000) /* a planned restart waits for open batches no longer */

/* ---- completions ---- */

void skv_complete(struct peer *peer, const struct wire_cqe *cqe)
{
    if (peer->state != PEER_LIVE)
        return;
    /* There is room: no entry is taken that could not be answered. */
    peer->cqes[peer->cq.index & (WIRE_CQ_ENTRIES - 1)] = *cqe;
    ring_publish(&peer->cq, 1); /* release: pairs with the client's ring_ready() */
    peer->unanswered--;
    peer->answered = true;
}

static void answer(struct peer *peer, const struct wire_sqe *sqe, int status)
{
    skv_complete(peer, &(struct wire_cqe){.user_data = sqe->user_data, .status = status});
}

/* ---- commands that are answered later ---- */

static struct request *later(struct peer *peer, int kind, const struct wire_sqe *sqe)
{
    struct request *request = calloc(1, sizeof *request);
    if (!request)
        return NULL;
    request->kind = kind;
    request->peer = peer->index;
    request->session = peer->session;
    request->sqe = *sqe;
    request->since_ns = peer->daemon->now_ns;
    request->next = peer->daemon->requests;
    peer->daemon->requests = request;
    return request;
}

/* Its client, if it is still there. */
static struct peer *asker(struct daemon *daemon, const struct request *request)
{
    struct peer *peer = &daemon->peers[request->peer];
    return peer->state == PEER_LIVE && peer->session == request->session ? peer : NULL;
}

static void drop(struct daemon *daemon, struct request *request)
{
    struct request **link = &daemon->requests;
    while (*link != request)
        link = &(*link)->next;
    *link = request->next;
    for (uint32_t i = 0; i < request->lookup_count; i++) {
        if (request->lookups[i])
            free(request->lookups[i]->hashes);
        free(request->lookups[i]);
    }
    free(request->changes);
    free(request);
}

static void answer_later(struct daemon *daemon, struct request *request)
{
    struct peer *peer = asker(daemon, request);
    if (peer)
        skv_complete(peer, &(struct wire_cqe){.user_data = request->sqe.user_data,
                                              .status = request->status,
                                              .value = {request->value}});
    drop(daemon, request);
}

static bool look_up(struct daemon *daemon, struct request *request, uint32_t entry,
                    const struct skv_record *record)
{
    struct skv_lookup_job *job = calloc(1, sizeof *job);
    uint64_t *hashes = malloc(SKV_MAX_USER_PAGES * sizeof *hashes);
    if (!job || !hashes || request->lookup_count == SKV_MAX_BATCH) {
        free(job);
        free(hashes);
        return false;
    }
    job->record = *record;
    job->hashes = hashes;
    request->known[request->lookup_count].entry = entry;
    request->lookups[request->lookup_count++] = job;
    request->looking++;
    skv_mover_lookup(daemon->mover, job);
    return true;
}

/* ---- batches ---- */

/* Copies the requests of a row to the core's private memory and checks the copies. */
static const char *copy_requests(struct peer *peer, const struct wire_sqe *sqe,
                                 struct skv_batch_input *input)
{
    const struct wire_slot *slot = &peer->slots[sqe->row];
    uint32_t size = peer->daemon->options.geometry.page_tokens;
    memcpy(input->requests, slot->requests, sqe->count * sizeof *input->requests);
    for (uint32_t i = 0; i < sqe->count; i++) {
        const struct wire_request *request = &input->requests[i];
        if (request->history > SKV_MAX_TOKENS)
            return "a history longer than the limit";
        uint32_t pages = (request->history + size - 1) / size;
        if (request->flags & ~(uint32_t)WIRE_REQUEST_FLAGS || request->reserved[0] ||
            request->reserved[1] || request->reserved[2])
            return "unknown flags or reserved fields in a request";
        if (request->hash_offset > WIRE_SLOT_PAGES ||
            pages > WIRE_SLOT_PAGES - request->hash_offset)
            return "hashes outside the arena";
        memcpy(input->hashes + request->hash_offset, slot->hashes + request->hash_offset,
               pages * sizeof *input->hashes);
    }
    return NULL;
}

static void acquire_now(struct peer *peer, const struct wire_sqe *sqe,
                        const struct skv_known *known, uint32_t known_count)
{
    struct wire_slot *slot = &peer->slots[sqe->row];
    bool lease = sqe->opcode == WIRE_ACQUIRE;
    if (lease)
        skv_kept_touches(peer);
    bool gated = skv_cache_acquire(peer->daemon->cache, (uint32_t)peer->slot, sqe->row, sqe->count,
                                   known, known_count, lease, slot->grants, slot->pages);
    skv_failpoint(FAIL_grant_silent);
    skv_complete(peer, &(struct wire_cqe){.user_data = sqe->user_data,
                                          .count = sqe->count,
                                          .value = {lease && gated}});
    skv_failpoint(FAIL_grant_told);
}

static const char *do_acquire(struct peer *peer, const struct wire_sqe *sqe)
{
    struct skv_cache *cache = peer->daemon->cache;
    struct skv_batch_input *input;
    if (!sqe->count || sqe->count > SKV_MAX_BATCH)
        return "a batch of no users, or of too many";
    if (peer->acquiring[sqe->row] ||
        skv_cache_input(cache, (uint32_t)peer->slot, sqe->row, &input)) {
        answer(peer, sqe, SKV_EBUSY);
        return NULL;
    }
    const char *wrong = copy_requests(peer, sqe, input);
    if (wrong)
        return wrong;
    struct request *request = NULL;
    struct skv_record record;
    uint32_t entry = 0;
    while ((entry = skv_cache_needs(cache, (uint32_t)peer->slot, sqe->row, entry, sqe->count,
                                    &record)) != SKV_NONE) {
        if (!request && !(request = later(peer, REQUEST_ACQUIRE, sqe)))
            break; /* no memory: a shorter hit */
        look_up(peer->daemon, request, entry++, &record);
    }
    if (request && request->looking) {
        peer->acquiring[sqe->row] = true;
        return NULL;
    }
    if (request)
        drop(peer->daemon, request);
    acquire_now(peer, sqe, NULL, 0);
    return NULL;
}

static const char *do_end(struct peer *peer, const struct wire_sqe *sqe)
{
    struct wire_slot *slot = &peer->slots[sqe->row];
    uint64_t leases[SKV_MAX_BATCH];
    struct wire_committed results[SKV_MAX_BATCH];
    if (!sqe->count || sqe->count > SKV_MAX_BATCH)
        return "a batch of no leases, or of too many";
    if (peer->acquiring[sqe->row]) {
        answer(peer, sqe, SKV_EBUSY);
        return NULL;
    }
    memcpy(leases, slot->leases, sqe->count * sizeof *leases);
    bool wait = skv_cache_end(peer->daemon->cache, (uint32_t)peer->slot, sqe->row, leases,
                              sqe->count, sqe->opcode == WIRE_COMMIT, results);
    memcpy(slot->results, results, sqe->count * sizeof *results);
    skv_failpoint(FAIL_commit_silent);
    struct wire_cqe done = {.user_data = sqe->user_data, .count = sqe->count};
    if (wait) /* room for all: what is unanswered is bounded by the CQ */
        peer->holding[sqe->row * WIRE_CQ_ENTRIES + peer->held[sqe->row]++] = done;
    else
        skv_complete(peer, &done);
    return NULL;
}

/* ---- users ---- */

/* Walks the records that {model, user} of an entry names: one, or for an admin with no model, one a
 * model. */
struct named {
    struct skv_id model, user;
    uint32_t at;
};

static const char *name(struct peer *peer, const struct wire_sqe *sqe, struct named *named)
{
    *named = (struct named){.model = sqe->model, .user = sqe->user};
    if (peer->admin)
        return NULL;
    if (!skv_id_is_zero(sqe->model) && !skv_id_equal(sqe->model, peer->model))
        return "a worker names another model";
    named->model = peer->model;
    return NULL;
}

static uint32_t next_named(const struct skv_cache *cache, struct named *named)
{
    if (skv_id_is_zero(named->model))
        return skv_cache_find_any(cache, named->user, &named->at);
    return named->at++ ? SKV_NONE : skv_cache_find(cache, named->model, named->user);
}

static const char *do_lookup(struct peer *peer, const struct wire_sqe *sqe)
{
    struct named named;
    const char *wrong = name(peer, sqe, &named);
    if (wrong)
        return wrong;
    uint32_t record = next_named(peer->daemon->cache, &named);
    if (record == SKV_NONE) {
        answer(peer, sqe, SKV_ENOENT);
        return NULL;
    }
    struct skv_user_info info;
    skv_cache_info(peer->daemon->cache, record, &info);
    skv_complete(peer,
                 &(struct wire_cqe){.user_data = sqe->user_data,
                                    .value = {info.generation,
                                              info.committed | (uint64_t)info.resident << 32,
                                              info.stored | (uint64_t)info.leases << 32,
                                              info.last_use_s, info.model.lo, info.model.hi}});
    return NULL;
}

/* Cuts one record; true: the request waits for something of it. */
static void truncate_one(struct daemon *daemon, struct request *request, uint32_t record,
                         const struct skv_known *known)
{
    uint32_t kept;
    uint64_t change;
    int status = skv_cache_truncate(daemon->cache, record, (uint32_t)request->sqe.argument, known,
                                    &kept, &change);
    if (status == SKV_EAGAIN) {
        struct skv_user_info info;
        skv_cache_info(daemon->cache, record, &info);
        struct skv_record wanted = {.model = info.model, .user = info.user};
        if (!look_up(daemon, request, 0, &wanted))
            request->status = SKV_ENOMEM;
        return;
    }
    if (status) {
        request->status = status;
        return;
    }
    if (kept > request->value)
        request->value = kept;
    if (!change)
        return;
    uint64_t *grown = realloc(request->changes, (request->records + 1) * sizeof *grown);
    if (!grown) {
        request->status = SKV_ENOMEM; /* done, but not waited for */
        return;
    }
    request->changes = grown;
    request->changes[request->records++] = change;
    request->waiting++;
}

/* Cuts whom a TRUNCATE names, and answers it unless it waits for something. */
static void truncate_named(struct daemon *daemon, struct request *request)
{
    struct named named = {.model = request->sqe.model, .user = request->sqe.user};
    bool found = false;
    for (uint32_t record; (record = next_named(daemon->cache, &named)) != SKV_NONE; found = true)
        truncate_one(daemon, request, record, NULL);
    if (!found) /* who asks again, since the store failed, shall not hear that it is done */
        request->status = daemon->owed ? daemon->offload_status : SKV_ENOENT;
    if (!request->waiting && !request->looking)
        answer_later(daemon, request);
}

static const char *do_truncate(struct peer *peer, const struct wire_sqe *sqe)
{
    struct daemon *daemon = peer->daemon;
    struct named named;
    struct wire_sqe copy = *sqe;
    if (sqe->opcode == WIRE_FORGET)
        copy.argument = 0;
    else if (sqe->argument > SKV_MAX_TOKENS)
        return "more tokens to keep than a history may have";
    const char *wrong = name(peer, sqe, &named);
    if (wrong)
        return wrong;
    copy.model = named.model;
    struct request *request = later(peer, REQUEST_TRUNCATE, &copy);
    if (!request) {
        answer(peer, sqe, SKV_ENOMEM);
        return NULL;
    }
    request->held = daemon->arrival != NULL;
    if (!request->held)
        truncate_named(daemon, request);
    return NULL;
}

/* Tries an eviction; SKV_EAGAIN: something of it is being stored. */
static int try_evict(struct peer *peer, const struct wire_sqe *sqe)
{
    struct named named;
    int result = SKV_ENOENT;
    name(peer, sqe, &named);
    for (uint32_t record; (record = next_named(peer->daemon->cache, &named)) != SKV_NONE;) {
        int status = skv_cache_evict(peer->daemon->cache, record);
        if (result == SKV_ENOENT || status == SKV_EBUSY || (status && result == SKV_OK))
            result = status;
    }
    return result;
}

static const char *do_evict(struct peer *peer, const struct wire_sqe *sqe)
{
    struct named named;
    const char *wrong = name(peer, sqe, &named);
    if (wrong)
        return wrong;
    int status = try_evict(peer, sqe);
    if (status == SKV_EAGAIN && peer->daemon->offload_stopped)
        status = peer->daemon->offload_status;
    if (status != SKV_EAGAIN)
        answer(peer, sqe, status);
    else if (!later(peer, REQUEST_EVICT, sqe))
        answer(peer, sqe, SKV_ENOMEM);
    return NULL;
}

static const char *do_flush(struct peer *peer, const struct wire_sqe *sqe)
{
    struct daemon *daemon = peer->daemon;
    uint64_t epoch = skv_cache_flush(daemon->cache);
    if (skv_cache_flushed(daemon->cache, epoch)) {
        answer(peer, sqe, SKV_OK);
        return NULL;
    }
    struct request *request = daemon->offload_stopped ? NULL : later(peer, REQUEST_FLUSH, sqe);
    if (!request)
        answer(peer, sqe, daemon->offload_stopped ? daemon->offload_status : SKV_ENOMEM);
    else
        request->value = epoch;
    return NULL;
}

static const char *do_list(struct peer *peer, const struct wire_sqe *sqe)
{
    struct skv_cache *cache = peer->daemon->cache;
    uint64_t cursor = sqe->argument, end = cursor + LIST_LOOKS; /* far enough for one command */
    uint32_t filled = 0, record;
    if (!sqe->count || sqe->count > WIRE_LIST_USERS)
        return "a list of no users, or of too many";
    while (filled < sqe->count &&
           (record = skv_cache_next(cache, &cursor, (uint32_t)(end - cursor))) != SKV_NONE) {
        struct skv_user_info info;
        skv_cache_info(cache, record, &info);
        if (peer->admin || skv_id_equal(info.model, peer->model))
            memcpy(peer->scratch + filled++ * sizeof info, &info, sizeof info);
        if (!cursor)
            break;
    }
    skv_complete(
        peer, &(struct wire_cqe){.user_data = sqe->user_data, .count = filled, .value = {cursor}});
    return NULL;
}

static const char *do_stats(struct peer *peer, const struct wire_sqe *sqe)
{
    struct daemon *daemon = peer->daemon;
    struct skv_stats stats;
    skv_cache_stats(daemon->cache, &stats);
    const struct skv_stats *own = &daemon->stats;
    struct skv_mover_counters moved = {0};
    if (daemon->mover)
        skv_mover_counters(daemon->mover, &moved);
    stats.uptime_ms = (daemon->now_ns - daemon->free_ns) / 1000000;
    stats.epoll = own->epoll;
    stats.sessions = own->sessions;
    stats.sessions_total = own->sessions_total;
    stats.sessions_refused = own->sessions_refused;
    stats.sessions_violations = own->sessions_violations;
    stats.onboard_bytes = moved.onboard_bytes;
    stats.onboard_in_place_bytes = moved.onboard_in_place_bytes;
    stats.offload_bytes = moved.offload_bytes;
    stats.offload_pages = moved.offload_pages;
    stats.offload_stopped = daemon->offload_stopped;
    stats.store_errors = moved.store_errors;
    stats.store_damaged_pages = moved.damaged_pages;
    stats.mps = skv_device_info(daemon->device)->mps;
    stats.mps_workers = own->mps_workers;
    stats.store_awaited = daemon->arrival != NULL;
    stats.standby = own->standby;
    if (daemon->store) {
        skv_store_usage(daemon->store, &stats.store_bytes, &stats.store_limit_bytes);
        skv_store_damage(daemon->store, &stats.store_cold_starts, &stats.store_damaged_records);
    }
    if (daemon->pinner)
        stats.pinned_bytes = skv_pinner_bytes(daemon->pinner);
    memcpy(peer->scratch, &stats, sizeof stats);
    skv_complete(peer, &(struct wire_cqe){.user_data = sqe->user_data,
                                          .count = sizeof stats / sizeof(uint64_t)});
    return NULL;
}

static const char *do_nop(struct peer *peer, const struct wire_sqe *sqe)
{
    answer(peer, sqe, SKV_OK);
    return NULL;
}

static const char *do_restart(struct peer *peer, const struct wire_sqe *sqe)
{
    struct daemon *daemon = peer->daemon;
    if (daemon->kept.socket < 0) {
        answer(peer, sqe, SKV_ENOTSUP);
        return NULL;
    }
    answer(peer, sqe, SKV_OK);
    if (!daemon->restarting && !daemon->stopping) {
        skv_info("pid %d asks for a restart", (int)peer->pid);
        daemon->restarting = true;
        daemon->restart_by_ns = daemon->now_ns + RESTART_NS;
    }
    return NULL;
}

static const char *do_under_mps(struct peer *peer, const struct wire_sqe *sqe)
{
    struct daemon *daemon = peer->daemon;
    if (!daemon->stats.mps_workers)
        skv_warn("pid %d runs under MPS: " SKV_MPS_RISK, (int)peer->pid);
    daemon->stats.mps_workers += !peer->mps;
    peer->mps = true;
    answer(peer, sqe, SKV_OK);
    return NULL;
}

/* ---- the table ---- */

enum {
    FOR_WORKERS = 1,
    NAMES_ROW = 2,
    NAMES_USER = 4,
    TAKES_COUNT = 8,
    TAKES_ARGUMENT = 16,
    FOR_ADMINS = 32
};

/* Does a command; returns what is wrong with its entry, or NULL. */
static const struct {
    const char *(*act)(struct peer *peer, const struct wire_sqe *sqe);
    unsigned takes;
} commands[WIRE_OPCODES] = {
    [WIRE_NOP] = {do_nop, 0},
    [WIRE_LOOKUP] = {do_lookup, NAMES_USER},
    [WIRE_ACQUIRE] = {do_acquire, FOR_WORKERS | NAMES_ROW | TAKES_COUNT},
    [WIRE_COMMIT] = {do_end, FOR_WORKERS | NAMES_ROW | TAKES_COUNT},
    [WIRE_RELEASE] = {do_end, FOR_WORKERS | NAMES_ROW | TAKES_COUNT},
    [WIRE_PREFETCH] = {do_acquire, FOR_WORKERS | NAMES_ROW | TAKES_COUNT},
    [WIRE_TRUNCATE] = {do_truncate, NAMES_USER | TAKES_ARGUMENT},
    [WIRE_EVICT] = {do_evict, NAMES_USER},
    [WIRE_FORGET] = {do_truncate, NAMES_USER},
    [WIRE_FLUSH] = {do_flush, 0},
    [WIRE_LIST] = {do_list, TAKES_COUNT | TAKES_ARGUMENT},
    [WIRE_STATS] = {do_stats, 0},
    [WIRE_RESTART] = {do_restart, FOR_ADMINS},
    [WIRE_UNDER_MPS] = {do_under_mps, FOR_WORKERS},
};

static const char *check_entry(const struct peer *peer, const struct wire_sqe *sqe)
{
    if (sqe->opcode >= WIRE_OPCODES)
        return "an unknown opcode";
    unsigned takes = commands[sqe->opcode].takes;
    if (takes & FOR_WORKERS && peer->admin)
        return "a worker's command from an admin";
    if (takes & FOR_ADMINS && !peer->admin)
        return "an admin's command from a worker";
    if (takes & NAMES_ROW ? sqe->row >= peer->rows : sqe->row != 0)
        return "a gate row out of range";
    bool named = !skv_id_is_zero(sqe->model) || !skv_id_is_zero(sqe->user);
    if (sqe->reserved0 || sqe->reserved || (named && !(takes & NAMES_USER)) ||
        (sqe->count && !(takes & TAKES_COUNT)) || (sqe->argument && !(takes & TAKES_ARGUMENT)))
        return "a field that the command does not take is not zero";
    return NULL;
}

/* Wakes a client that sleeps. One whose bell takes nothing more has been rung already; one that has
 * closed it wants no waking. */
static void wake(const struct peer *peer)
{
    const uint64_t one = 1;
    (void)!send(peer->cq_fd, &one, sizeof one, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Ends the session of one that broke the rules; where its memory is gone, for that: what else is
 * wrong is the zeros'. */
static void end_for(struct peer *peer, const char *wrong)
{
    bool hole = skv_peer_faulted(peer);
    if (hole || wrong)
        skv_peer_end(peer, SKV_EPROTO,
                     hole ? "a hole in its memory, and no memory to fill it" : wrong);
}

/* Takes an entry and does it. */
static void serve_entry(struct peer *peer)
{
    struct wire_sqe sqe;
    /* read once: the client may change it behind our back */
    memcpy(&sqe, &peer->sqes[peer->sq.index & (WIRE_ENTRIES - 1)], sizeof sqe);
    ring_publish(&peer->sq, 1);
    peer->unanswered++;
    const char *wrong = check_entry(peer, &sqe);
    if (!wrong)
        wrong = commands[sqe.opcode].act(peer, &sqe);
    skv_drain_actions(peer->daemon);
    end_for(peer, wrong);
}

uint32_t skv_peer_serve(struct peer *peer, uint32_t limit)
{
    uint32_t done = 0;
    if (peer->daemon->protect && peer->slot >= 0) {
        /* Pairs with the client's release: it has unmapped by now. */
        uint32_t viewed = __atomic_load_n(&peer->ring->viewed, __ATOMIC_ACQUIRE);
        if (viewed != peer->viewed)
            skv_cache_viewed(peer->daemon->cache, (uint32_t)peer->slot, viewed);
        peer->viewed = viewed;
    }
    while (peer->state == PEER_LIVE && done < limit) {
        if (peer->daemon->restarting && skv_peer_quiet(peer))
            break; /* the next daemon does them; what holds leases may go on to its COMMIT */
        uint32_t ready = ring_ready(&peer->sq), room = ring_room(&peer->cq);
        if (!ready) /* the next entry's line comes while its index is still on the way */
            __builtin_prefetch(&peer->sqes[peer->sq.index & (WIRE_ENTRIES - 1)]);
        bool jumped = ready == UINT32_MAX || (ready && room == UINT32_MAX);
        end_for(peer, jumped ? "a ring index that jumped" : NULL);
        if (jumped || !ready || room <= peer->unanswered || peer->state != PEER_LIVE)
            break; /* nothing to do, or it does not take its completions: it gets no more */
        serve_entry(peer);
        done++;
    }
    if (peer->answered && peer->state == PEER_LIVE) {
        peer->answered = false;
        if (ring_must_wake(&peer->cq))
            wake(peer);
    }
    return done;
}

/* ---- what comes back ---- */

static void records_found(struct daemon *daemon, struct request *request)
{
    struct peer *peer = asker(daemon, request);
    uint32_t count = 0;
    struct skv_known known[SKV_MAX_BATCH];
    for (uint32_t i = 0; i < request->lookup_count; i++)
        if (request->known[i].hashes)
            known[count++] = request->known[i];
    if (request->kind == REQUEST_ACQUIRE) {
        if (peer) {
            peer->acquiring[request->sqe.row] = false;
            acquire_now(peer, &request->sqe, known, count);
        }
        drop(daemon, request);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t record =
            skv_cache_find(daemon->cache, known[i].record.model, known[i].record.user);
        if (record != SKV_NONE)
            truncate_one(daemon, request, record, &known[i]);
    }
    if (!request->waiting)
        answer_later(daemon, request);
}

void skv_commands_found(struct daemon *daemon, struct skv_lookup_job *lookup, int status)
{
    for (struct request *request = daemon->requests; request; request = request->next)
        for (uint32_t i = 0; i < request->lookup_count; i++) {
            if (request->lookups[i] != lookup)
                continue;
            struct skv_known *known = &request->known[i];
            if (!status) {
                known->record = lookup->record;
                known->count = lookup->count;
                known->hashes = lookup->hashes;
            } else if (request->kind == REQUEST_TRUNCATE) {
                request->status = status;
            }
            if (--request->looking == 0)
                records_found(daemon, request);
            return;
        }
}

void skv_commands_changed(struct daemon *daemon, uint64_t change, int status)
{
    for (struct request *request = daemon->requests; request; request = request->next)
        for (uint32_t i = 0; i < request->records; i++) {
            if (request->changes[i] != change)
                continue;
            request->changes[i] = 0; /* one that is owed is answered once more */
            if (status)
                request->status = status;
            if (--request->waiting == 0 && !request->looking) {
                skv_failpoint(FAIL_cut_silent);
                answer_later(daemon, request);
            }
            return;
        }
}

/* Has it waited so long for a store that is not there that its client shall ask again? */
static bool is_overdue(const struct daemon *daemon, const struct request *request)
{
    return daemon->arrival && daemon->now_ns - request->since_ns > HELD_NS;
}

void skv_commands_arrived(struct daemon *daemon)
{
    struct request *next;
    for (struct request *request = daemon->requests; request; request = next) {
        next = request->next;
        if (!request->held)
            continue;
        request->held = false;
        truncate_named(daemon, request);
    }
    skv_drain_actions(daemon);
    skv_commands_retry(daemon);
}

void skv_commands_retry(struct daemon *daemon)
{
    struct request *next;
    for (struct request *request = daemon->requests; request; request = next) {
        next = request->next;
        struct peer *peer = asker(daemon, request);
        if (request->kind == REQUEST_FLUSH) {
            bool flushed = skv_cache_flushed(daemon->cache, request->value);
            if (peer && !flushed && !daemon->offload_stopped)
                continue;
            request->status = flushed ? SKV_OK : daemon->offload_status;
            request->value = 0;
            skv_failpoint(FAIL_flush_silent);
            answer_later(daemon, request);
        } else if (request->kind == REQUEST_EVICT) {
            request->status = peer ? try_evict(peer, &request->sqe) : SKV_OK;
            if (request->status == SKV_EAGAIN && daemon->offload_stopped)
                request->status = daemon->offload_status;
            if (request->status != SKV_EAGAIN || is_overdue(daemon, request))
                answer_later(daemon, request);
        } else if (request->held && is_overdue(daemon, request)) {
            request->status = SKV_EAGAIN;
            answer_later(daemon, request);
        }
    }
}
