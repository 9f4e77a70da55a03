/* The batch: requests into the row's slot of the arena, one command, grants out of it.
 *
 * ACQUIRE's happy path touches the slot once each way and makes no system call. What comes back is
 * told, not promised: every field is copied once, page lists too, and checked against what was
 * asked before the caller sees the copy: the daemon may write to the slot at any time.
 *
 * Tails. The daemon may grant a half-filled tail page whose hash it cannot compare with ours (we
 * sent hashes of whole pages, and of h). It says where the tail ends and what its hash is; we hash
 * our own tokens up to there. Where they differ, the whole batch is released and acquired again
 * with that user's max_cached at the tail's start and the differing hash echoed, which is what lets
 * the daemon cut the user. max_cached only falls, so this ends; after SKV_TAIL_RETRIES rounds it
 * falls to 0 at once. */
#include "skv_session.h"

#include <string.h>

#define GRANT_FLAGS (SKV_GRANT_APPEND | SKV_GRANT_GATED | SKV_GRANT_STORE)

/* What this call asked for, apart from what stands in shared memory. */
struct asking {
    const struct skv_request *requests;
    uint32_t count;
    uint32_t hash_offset[SKV_MAX_BATCH]; /* of the request's first hash in the slot */
    uint32_t max_cached[SKV_MAX_BATCH];  /* falls where a tail differs */
};

static uint32_t pages_of(uint32_t tokens, uint32_t page_tokens)
{
    return (tokens + page_tokens - 1) / page_tokens;
}

static bool request_valid(const struct skv_request *r)
{
    return r->history <= SKV_MAX_TOKENS && (r->tokens || r->history == 0) &&
           !(r->flags & ~(uint32_t)(SKV_REQUEST_READ | SKV_REQUEST_NO_ONBOARD));
}

/* One request and its hashes into the slot, hashes from `offset` on. Returns where they end. */
static uint32_t write_request(const struct skv *skv, struct wire_slot *slot, uint32_t i,
                              const struct skv_request *r, uint32_t offset)
{
    uint32_t page_tokens = skv->options.geometry.page_tokens;
    uint32_t count = pages_of(r->history, page_tokens);
    slot->requests[i] = (struct wire_request){.user = r->user,
                                              .history = r->history,
                                              .max_cached = r->max_cached,
                                              .flags = r->flags,
                                              .hash_offset = offset};
    if (r->hashes && count)
        memcpy(slot->hashes + offset, r->hashes, count * sizeof *r->hashes);
    else
        skv_chain_hashes(skv->options.model, r->user, page_tokens, r->tokens, r->history, 0,
                         slot->hashes + offset);
    return offset + count;
}

/* ---- grants ---- */

/* Where a grant's half-filled tail begins, whether it is counted in `cached` or to be replaced. */
static uint32_t tail_start(const struct skv *skv, const struct wire_grant *g)
{
    return g->cached - g->cached % skv->options.geometry.page_tokens;
}

/* A page list out of the slot, each id read once. False: one is outside the pool. */
static bool copy_pages(uint32_t *pages, const uint32_t *told, uint32_t count, uint64_t pool_pages)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = __atomic_load_n(&told[i], __ATOMIC_RELAXED);
        if (page >= pool_pages)
            return false;
        pages[i] = page;
    }
    return true;
}

/* Checks grant `i` against what its request asked for, and copies it out, its page list to the same
 * place of the row's own. NULL, or what is wrong with it. */
static const char *read_grant(const struct skv *skv, uint32_t row, uint32_t i,
                              const struct asking *asking, struct wire_grant *g,
                              struct skv_grant *out)
{
    const struct skv_request *r = &asking->requests[i];
    const struct wire_slot *slot = skv_slot(skv, row);
    *g = slot->grants[i];
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* the compiler does not go back to the slot */
    *out = (struct skv_grant){.status = g->status};
    if (!skv_status_told(g->status))
        return "a grant's status is none";
    if (g->status)
        return NULL;

    uint32_t page_tokens = skv->options.geometry.page_tokens;
    bool append = g->flags & SKV_GRANT_APPEND;
    if (g->flags & ~(uint32_t)GRANT_FLAGS || (append && r->flags & SKV_REQUEST_READ))
        return "a grant's flags";
    if (g->cached > r->history || g->cached > asking->max_cached[i] || g->gpu_tokens > g->cached)
        return "a grant of more tokens than asked for";
    if (g->page_count != pages_of(append ? r->history : g->cached, page_tokens) ||
        g->page_offset > WIRE_SLOT_PAGES || g->page_count > WIRE_SLOT_PAGES - g->page_offset)
        return "a grant's page list";
    /* It is counted, or a fresh page replaces it; the history goes on behind it. */
    uint32_t start = tail_start(skv, g), end = start + g->tail_valid;
    if (g->tail_valid && (g->tail_valid >= page_tokens || end >= r->history ||
                          (g->cached != end && !(append && g->cached == start))))
        return "a grant's tail";
    if (g->lease == 0)
        return "a grant without a lease";
    uint32_t *pages = skv->pages[row] + g->page_offset;
    if (!copy_pages(pages, slot->pages + g->page_offset, g->page_count, skv->server.pool_pages))
        return "a page outside the pool";

    out->flags = g->flags;
    out->cached = g->cached;
    out->gpu_tokens = g->gpu_tokens;
    out->page_count = g->page_count;
    out->pages = pages;
    out->lease = g->lease;
    return NULL;
}

/* Is the tail that was granted the one of our own tokens? */
static bool tail_equal(const struct skv *skv, const struct wire_slot *slot, uint32_t i,
                       const struct asking *asking, const struct wire_grant *g)
{
    if (g->status || !g->tail_valid)
        return true;
    const struct skv_request *r = &asking->requests[i];
    uint32_t start = tail_start(skv, g), page = start / skv->options.geometry.page_tokens;
    uint64_t previous = page ? slot->hashes[asking->hash_offset[i] + page - 1]
                             : skv_chain_start(skv->options.model, r->user);
    return skv_chain_link(previous, r->tokens + start, g->tail_valid) == g->tail_hash;
}

/* Reads all grants; echoes the tails that differ into their requests and counts them. */
static int read_grants(struct skv *skv, struct asking *asking, struct skv_batch *batch, int round,
                       uint32_t *differing)
{
    struct wire_slot *slot = skv_slot(skv, batch->row);
    *differing = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        struct wire_grant grant;
        const char *wrong = read_grant(skv, batch->row, i, asking, &grant, &batch->grants[i]);
        if (wrong)
            return skv_violation(skv, wrong);
        if (batch->grants[i].flags & SKV_GRANT_GATED && !batch->gated)
            return skv_violation(skv, "a gated grant in an ungated batch");
        if (tail_equal(skv, slot, i, asking, &grant))
            continue;
        ++*differing;
        uint32_t start = tail_start(skv, &grant);
        asking->max_cached[i] = round < SKV_TAIL_RETRIES ? start : 0;
        slot->requests[i].max_cached = asking->max_cached[i];
        slot->requests[i].flags = asking->requests[i].flags | WIRE_TAIL_DIFFERS;
        slot->requests[i].tail_hash = grant.tail_hash;
    }
    return SKV_OK;
}

/* ---- ending a batch ---- */

/* COMMIT or RELEASE of the leases that the batch holds, in its order. A batch in which no user got
 * anything holds no lease, so no row either: nothing to say. */
static int end_batch(struct skv *skv, struct skv_batch *batch, enum wire_opcode opcode,
                     uint64_t deadline_ns)
{
    struct wire_slot *slot = skv_slot(skv, batch->row);
    uint32_t count = 0;
    for (uint32_t i = 0; i < batch->count; i++)
        if (batch->grants[i].status == SKV_OK)
            slot->leases[count++] = batch->grants[i].lease;
    if (count) {
        struct wire_sqe sqe = {
            .opcode = (uint8_t)opcode, .row = (uint16_t)batch->row, .count = count};
        struct wire_cqe cqe;
        int status = skv_call(skv, &sqe, deadline_ns, &cqe);
        if (status)
            return status;
    }
    skv->rows[batch->row] = (struct skv_row){0};
    skv_views_look(skv);
    return SKV_OK;
}

static uint64_t first_lease(const struct skv_batch *batch)
{
    for (uint32_t i = 0; i < batch->count; i++)
        if (batch->grants[i].status == SKV_OK)
            return batch->grants[i].lease;
    return 0;
}

/* SKV_ESTALE: this batch has ended, or belongs to an earlier session. */
static int batch_current(const struct skv *skv, const struct skv_batch *batch)
{
    if (!batch || batch->row >= skv->options.rows || batch->count == 0 ||
        batch->count > SKV_MAX_BATCH)
        return SKV_EINVAL;
    const struct skv_row *row = &skv->rows[batch->row];
    return row->held && row->lease == first_lease(batch) ? SKV_OK : SKV_ESTALE;
}

static void forget_leases(struct skv_batch *batch)
{
    for (uint32_t i = 0; i < batch->count; i++) {
        batch->grants[i].lease = 0;
        batch->grants[i].pages = NULL;
        batch->grants[i].page_count = 0;
    }
}

/* The caller ends a batch of a lost session, or of one that is lost by that, so its pass has
 * completed: the row holds nothing back any more. Returns `status`. */
static int end_lost(struct skv *skv, const struct skv_batch *batch, int status)
{
    if (skv_lost(skv) && batch_current(skv, batch) == SKV_OK)
        skv->rows[batch->row] = (struct skv_row){0};
    return status;
}

/* One ACQUIRE of what stands in the slot. */
static int acquire_once(struct skv *skv, struct asking *asking, struct skv_batch *batch, int round,
                        uint64_t deadline_ns, uint32_t *differing)
{
    struct wire_sqe sqe = {
        .opcode = WIRE_ACQUIRE, .row = (uint16_t)batch->row, .count = asking->count};
    struct wire_cqe cqe;
    int status = skv_call(skv, &sqe, deadline_ns, &cqe);
    skv_failpoint(FAIL_client_granted);
    if (status)
        return status;
    if (cqe.value[0] > 1)
        return skv_violation(skv, "ACQUIRE's completion");
    batch->count = asking->count;
    batch->gated = cqe.value[0];
    status = read_grants(skv, asking, batch, round, differing);
    if (!status)
        skv->rows[batch->row] = (struct skv_row){.held = true, .lease = first_lease(batch)};
    return status;
}

/* The whole of an ACQUIRE, with as many rounds as differing tails take. */
static int acquire_all(struct skv *skv, const struct skv_request *requests, uint32_t count,
                       struct skv_batch *batch, uint64_t deadline)
{
    struct wire_slot *slot = skv_slot(skv, batch->row);
    struct asking asking = {.requests = requests, .count = count};
    uint32_t offset = 0;
    for (uint32_t i = 0; i < count; i++) {
        asking.hash_offset[i] = offset;
        asking.max_cached[i] = requests[i].max_cached;
        offset = write_request(skv, slot, i, &requests[i], offset);
    }

    uint32_t differing = 0;
    int round = 0, status;
    do {
        status = acquire_once(skv, &asking, batch, round++, deadline, &differing);
        if (!status && differing)
            status = end_batch(skv, batch, WIRE_RELEASE, deadline);
    } while (!status && differing);
    int viewed = status ? SKV_OK : skv_views_grant(skv, batch);
    if (viewed && !skv_lost(skv))
        status = end_batch(skv, batch, WIRE_RELEASE, deadline);
    status = status ? status : viewed;
    if (status && skv_lost(skv))
        skv->rows[batch->row] = (struct skv_row){0}; /* nobody has seen this batch */
    return status;
}

/* ---- outside ---- */

int skv_acquire(struct skv *skv, uint32_t row, const struct skv_request *requests, uint32_t count,
                struct skv_batch *batch)
{
    int status = *skv->owner ? SKV_OK : SKV_EPERM;
    if (status)
        return status;
    if (row >= skv->options.rows || !requests || !batch || count == 0 || count > SKV_MAX_BATCH)
        return SKV_EINVAL;
    for (uint32_t i = 0; i < count; i++)
        if (!request_valid(&requests[i]))
            return SKV_EINVAL;
    if (skv->rows[row].held)
        return skv_lost(skv) ? SKV_ELOST : SKV_EBUSY;

    uint64_t deadline = skv_deadline(skv);
    batch->row = row;
    status = skv_session_usable(skv);
    do
        status = status ? status : acquire_all(skv, requests, count, batch, deadline);
    while (status == SKV_ELOST && (status = skv_session_return(skv, deadline)) == SKV_OK);
    if (status)
        batch->count = 0;
    return status;
}

int skv_commit(struct skv *skv, struct skv_batch *batch, struct skv_committed *results)
{
    int status = skv_session_usable(skv);
    if (!status)
        status = batch_current(skv, batch);
    if (!status)
        status = end_batch(skv, batch, WIRE_COMMIT, skv_deadline(skv));
    skv_failpoint(FAIL_client_committed);
    if (status)
        return end_lost(skv, batch, status);
    const struct wire_slot *slot = skv_slot(skv, batch->row);
    uint32_t lease = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        struct skv_committed one = {.status = batch->grants[i].status};
        if (one.status == SKV_OK) {
            struct wire_committed told = slot->results[lease++];
            if (told.status > 0 || told.status < SKV_EFULL || told.stored > told.committed)
                return skv_violation(skv, "COMMIT's result");
            one = (struct skv_committed){
                .status = told.status, .committed = told.committed, .stored = told.stored};
        }
        if (results)
            results[i] = one;
    }
    forget_leases(batch);
    return SKV_OK;
}

int skv_release(struct skv *skv, struct skv_batch *batch)
{
    int status = skv_session_usable(skv);
    if (!status)
        status = batch_current(skv, batch);
    if (!status)
        status = end_batch(skv, batch, WIRE_RELEASE, skv_deadline(skv));
    if (!status)
        forget_leases(batch);
    return end_lost(skv, batch, status);
}

int skv_batch_status(const struct skv *skv, const struct skv_batch *batch)
{
    if (*skv->owner == 0)
        return SKV_EPERM;
    int status = batch_current(skv, batch);
    if (status || !batch->gated)
        return status;
    /* Pairs with the watcher's and the daemon's store of the status before they open gates. */
    const uint32_t *words = skv_gate_row(skv, batch->row);
    int32_t told = (int32_t)__atomic_load_n(&words[skv->options.geometry.layers], __ATOMIC_ACQUIRE);
    return skv_status_told(told) ? told : SKV_EPROTO;
}

int skv_prefetch(struct skv *skv, const struct skv_request *request)
{
    uint64_t deadline = skv_deadline(skv);
    int status = skv_session_ready(skv, deadline);
    if (status)
        return status;
    if (!request || !request_valid(request) || skv->options.admin)
        return SKV_EINVAL;
    uint32_t row = 0;
    while (row < skv->options.rows && skv->rows[row].held)
        row++;
    if (row == skv->options.rows)
        return SKV_EBUSY;
    write_request(skv, skv_slot(skv, row), 0, request, 0);
    struct wire_sqe sqe = {.opcode = WIRE_PREFETCH, .row = (uint16_t)row, .count = 1};
    struct wire_cqe cqe;
    return skv_call(skv, &sqe, deadline, &cqe);
}
