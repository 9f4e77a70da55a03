/* Onboard jobs: from arrival to last event; what is queued on the onboard stream for them.
 *
 * A job's pages are found and verified first (mover_source.c). Those that the CPU had to read or
 * to verify are copied whole as they come, slower than the bus anyway; the others, verified before
 * and lying in registered windows, are copied here, layer group by layer group, jobs in turn (one
 * of few pages has all its groups in one turn and so overtakes a large one; prefetches come last).
 * Gate l is queued behind the copies of its layer group: of this job, and of every job up to
 * `after`. One stream for all of it makes "queued before" mean "copied before".
 *
 * At most LAYER_BYTES are queued at a time: enough to keep the copy engine busy between turns, so
 * little that a job that arrives now is served soon. */
#include "mover_internal.h"

#include <assert.h>

#include "clock.h"
#include "failpoint.h"
#include "log.h"

/* ---- arrival and end ---- */

void onboard_accept(struct skv_mover *mover, struct skv_onboard *job)
{
    struct onboard *onboard = job->state;
    *onboard = (struct onboard){0};
    for (uint32_t i = 0; i < job->move_count; i++)
        assert(job->moves[i].user < job->user_count && job->moves[i].page < mover->pool_pages);
    onboard->job = job;
    onboard->stage = job->move_count ? STAGE_QUEUED : STAGE_GATES;
    onboard->groups = job->move_count ? 0 : mover->groups;
    onboard->turn = ++mover->turns;
    if (job->gate_row && mover->awaited < job->after)
        mover->awaited = job->after;
    assert(!mover->last || mover->last->job->id < job->id);
    onboard->prev = mover->last;
    *(mover->last ? &mover->last->next : &mover->first) = onboard;
    mover->last = onboard;
    if (job->gate_row && mover->gated++ == 0 && mover->options.pinner)
        skv_pinner_pause(mover->options.pinner, true);
}

void onboard_forget(struct skv_mover *mover, struct onboard *onboard)
{
    source_end(mover, onboard);
    *(onboard->prev ? &onboard->prev->next : &mover->first) = onboard->next;
    *(onboard->next ? &onboard->next->prev : &mover->last) = onboard->prev;
    if (onboard->job->gate_row && --mover->gated == 0 && mover->options.pinner)
        skv_pinner_pause(mover->options.pinner, false);
}

static void end(struct skv_mover *mover, struct onboard *onboard, enum skv_mover_event_kind kind)
{
    struct skv_onboard *job = onboard->job;
    int32_t status = onboard->cancelled ? onboard->cancel_status : 0;
    onboard_forget(mover, onboard);
    skv_failpoint(FAIL_onboard_ended);
    mover_event(mover, &(struct skv_mover_event){.kind = kind, .status = status, .job = job});
}

void onboard_cancel(struct skv_mover *mover, uint64_t id, int32_t status)
{
    struct onboard *onboard = mover->first;
    while (onboard && onboard->job->id != id)
        onboard = onboard->next;
    if (!onboard || onboard->cancelled)
        return; /* it has ended */
    onboard->cancelled = true;
    onboard->cancel_status = status;
    /* Those that rely on its copies: they will be cancelled too, and must not be quicker. */
    while ((onboard = onboard->next))
        onboard->orphaned |= onboard->job->after >= id;
}

void onboard_fail(struct skv_mover *mover, struct onboard *onboard, uint32_t move, int status)
{
    if (onboard->stage == STAGE_HALTED || onboard->cancelled)
        return;
    const struct skv_move *bad = &onboard->job->moves[move];
    const struct skv_record *user = &onboard->job->users[bad->user];
    skv_warn("page %u of user %016llx%016llx cannot be loaded: %s", bad->index,
             (unsigned long long)user->user.hi, (unsigned long long)user->user.lo,
             skv_strerror(status));
    if (status == SKV_ECORRUPT)
        mover->damaged_pages++;
    onboard->stage = STAGE_HALTED;
    mover_event(mover, &(struct skv_mover_event){.kind = SKV_MOVER_FAILED,
                                                 .status = status,
                                                 .user = bad->user,
                                                 .index = bad->index,
                                                 .job = onboard->job});
}

/* Nothing of it is in flight: the status first, so that whoever sees a gate sees it too. */
static void finish_cancel(struct skv_mover *mover, struct onboard *onboard)
{
    uint32_t *row = onboard->job->gate_row, layers = mover->options.geometry.layers;
    if (row && onboard->cancel_status) /* pairs with the worker's load after its pass */
        __atomic_store_n(&row[layers], (uint32_t)onboard->cancel_status, __ATOMIC_RELEASE);
    for (uint32_t layer = 0; row && layer < layers; layer++)
        skv_gate_store(&row[layer], 1);
    end(mover, onboard, SKV_MOVER_CANCELLED);
}

/* ---- whose turn it is ---- */

/* Does a worker wait for it, for its own gates or for those of a job that comes after it? Or has it
 * been passed over for so long that its snapshot is in the store's way? */
static bool is_urgent(const struct skv_mover *mover, const struct onboard *onboard)
{
    return onboard->job->gate_row || onboard->job->id <= mover->awaited ||
           mover->turns - onboard->turn >= STARVE_TURNS;
}

static bool goes_before(const struct skv_mover *mover, const struct onboard *a,
                        const struct onboard *b)
{
    bool urgent = is_urgent(mover, a);
    return urgent != is_urgent(mover, b) ? urgent : a->turn < b->turn;
}

struct onboard *onboard_next(const struct skv_mover *mover,
                             bool (*may)(const struct skv_mover *, const struct onboard *))
{
    struct onboard *next = NULL;
    for (struct onboard *onboard = mover->first; onboard; onboard = onboard->next)
        if (may(mover, onboard) && (!next || goes_before(mover, onboard, next)))
            next = onboard;
    return next;
}

/* ---- flights: what is queued on the stream, in order ---- */

static void take_off(struct skv_mover *mover, struct flight *flight)
{
    assert(mover->flight_count < FLIGHTS);
    int status = skv_stream_mark(mover->stream, &flight->mark);
    if (status)
        mover_break(mover, "marking the onboard stream", status);
    mover->flights[(mover->flight_first + mover->flight_count++) % FLIGHTS] = *flight;
    mover->flight_bytes += flight->bytes;
}

void flight_start(struct skv_mover *mover, struct flight *flight, uint32_t copy_count)
{
    int status = skv_stream_copy(mover->stream, SKV_TO_DEVICE, mover->copies, copy_count);
    if (status)
        mover_break(mover, "copying to the pool", status);
    mover->onboard_bytes += flight->bytes;
    flight->onboard->copies++;
    take_off(mover, flight);
}

bool onboard_land(struct skv_mover *mover)
{
    bool any = false;
    for (; mover->flight_count && !mover->broken; any = true) {
        struct flight *flight = &mover->flights[mover->flight_first];
        int status = skv_stream_query(mover->stream, flight->mark);
        if (status == SKV_EAGAIN)
            break;
        if (status) {
            mover_break(mover, "onboarding", status);
            break;
        }
        for (uint32_t i = 0; i < flight->slot_count; i++)
            source_free(mover, flight->slots[i]);
        *(flight->bytes ? &flight->onboard->copies : &flight->onboard->openings) -= 1;
        mover->flight_bytes -= flight->bytes;
        mover->flight_first = (mover->flight_first + 1) % FLIGHTS;
        mover->flight_count--;
    }
    return any;
}

uint32_t copies_add(struct skv_mover *mover, uint32_t count, uint32_t page, const uint8_t *value,
                    uint64_t from, uint64_t bytes)
{
    uint8_t *dst = mover->pool + page * mover->page_bytes + from;
    const uint8_t *src = value + from;
    uint64_t in_map = (uintptr_t)src - (uintptr_t)mover->map;
    bool windows = in_map < mover->map_bytes;
    while (bytes) {
        uint64_t piece = bytes;
        uint64_t window = SKV_WINDOW_BYTES - in_map % SKV_WINDOW_BYTES;
        if (windows && piece > window)
            piece = window;
        mover->copies[count++] = (struct skv_copy){.dst = dst, .src = src, .bytes = piece};
        dst += piece;
        src += piece;
        in_map += piece;
        bytes -= piece;
    }
    return count;
}

/* ---- gates ---- */

/* Groups that are queued in this job and in every job up to `after`. */
static uint32_t openable(const struct skv_mover *mover, const struct onboard *onboard)
{
    uint32_t groups = onboard->orphaned ? 0 : onboard->groups;
    for (const struct onboard *other = mover->first;
         other && other != onboard && other->job->id <= onboard->job->after; other = other->next)
        if (other->groups < groups)
            groups = other->groups;
    return groups;
}

/* Queues the openings that are due. */
static bool open_gates(struct skv_mover *mover, struct onboard *onboard)
{
    uint32_t until = openable(mover, onboard), *row = onboard->job->gate_row;
    if (!row)
        until = onboard->groups;
    if (onboard->opened >= until || mover->flight_count == FLIGHTS)
        return false;
    uint32_t layer = onboard->opened * mover->group_layers, end_layer = until * mover->group_layers;
    onboard->opened = until;
    if (!row)
        return true;
    if (end_layer > mover->options.geometry.layers)
        end_layer = mover->options.geometry.layers;
    int status = 0;
    skv_failpoint(FAIL_gate_shut);
    while (layer < end_layer && status == 0)
        status = skv_stream_write32(mover->stream, &row[layer++], 1);
    if (status)
        mover_break(mover, "opening a gate", status);
    onboard->openings++;
    take_off(mover, &(struct flight){.onboard = onboard});
    skv_failpoint(FAIL_gate_open);
    return true;
}

bool onboard_gates(struct skv_mover *mover)
{
    bool any = false;
    struct onboard *next;
    for (struct onboard *onboard = mover->first; onboard && !mover->broken; onboard = next) {
        next = onboard->next;
        bool copying = onboard->reads || onboard->copies;
        bool stuck = onboard->stage == STAGE_HALTED || onboard->orphaned;
        if (mover->stopping && stuck)
            onboard_cancel(mover, onboard->job->id, SKV_ELOAD);
        if (!copying && (onboard->cancelled || onboard->stage >= STAGE_GATES))
            source_end(mover, onboard);
        if (onboard->cancelled) {
            if (copying || onboard->openings)
                continue;
            finish_cancel(mover, onboard);
            any = true;
        } else if (onboard->stage == STAGE_LAYERS || onboard->stage == STAGE_GATES) {
            any |= open_gates(mover, onboard);
            if (onboard->opened == mover->groups && !copying && !onboard->openings) {
                end(mover, onboard, SKV_MOVER_ONBOARDED);
                any = true;
            }
        }
    }
    return any;
}

/* ---- layers ---- */

/* The first group may begin while the last pages are being found; it ends, and its gates open, only
 * after that. */
static bool has_layers(const struct skv_mover *mover, const struct onboard *onboard)
{
    (void)mover;
    if (onboard->cancelled)
        return false;
    return onboard->stage == STAGE_LAYERS ||
           (onboard->stage == STAGE_FINDING && onboard->page_count - onboard->at >= EARLY_PAGES);
}

/* One call's worth of the layer group at hand. */
static void queue_layers(struct skv_mover *mover, struct onboard *onboard)
{
    uint32_t first = onboard->groups * mover->group_layers;
    uint32_t layers = mover->options.geometry.layers - first;
    if (layers > mover->group_layers)
        layers = mover->group_layers;
    uint64_t bytes = layers * mover->slice_bytes;
    struct flight flight = {.onboard = onboard};
    uint32_t count = 0;
    while (onboard->at < onboard->page_count && count < CHUNK_COPIES &&
           flight.bytes < CHUNK_BYTES) {
        const struct layered *page = &onboard->pages[onboard->at++];
        count =
            copies_add(mover, count, page->page, page->value, first * mover->slice_bytes, bytes);
        flight.bytes += bytes;
    }
    if (count)
        flight_start(mover, &flight, count);
    mover->onboard_in_place_bytes += flight.bytes;
    onboard->turn_bytes += flight.bytes;
    if (onboard->at < onboard->page_count || onboard->stage == STAGE_FINDING)
        return;
    onboard->at = 0;
    if (++onboard->groups == mover->groups)
        onboard->stage = STAGE_GATES;
    if (onboard->turn_bytes >= TURN_BYTES) {
        onboard->turn = ++mover->turns;
        onboard->turn_bytes = 0;
    }
}

bool onboard_layers(struct skv_mover *mover, uint64_t deadline_ns)
{
    bool any = false;
    struct onboard *onboard;
    while (!mover->broken && mover->flight_count < LAYER_FLIGHTS &&
           mover->flight_bytes < LAYER_BYTES && (onboard = onboard_next(mover, has_layers))) {
        queue_layers(mover, onboard);
        open_gates(mover, onboard); /* right behind, before another job's turn */
        any = true;
        if (skv_now_ns() >= deadline_ns)
            break;
    }
    return any;
}
