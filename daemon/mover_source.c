/* Where an onboard's bytes come from. Under the job's snapshot every page is located, and then
 *
 *   in a registered window, verified since:  its trailer is compared, it waits to be copied by
 *                                            layer;
 *   in a registered window, not verified:    the CPU verifies it in place, it is copied whole;
 *   elsewhere:                               a direct read into a staging slot, verified there,
 *                                            copied whole; the slot is free when the copy has
 *                                            landed.
 *
 * A page that is missing, cannot be read or is not what the job expects fails the job. Slots are
 * taken one by one and given back whatever becomes of a job, so that jobs larger than staging, and
 * many of them, only wait for each other's copies, never for each other's ends.
 *
 * Snapshots, slots and room for copies go to jobs in the order of onboard_next(): a prefetch gets
 * what the jobs that a worker waits for leave. */
#include "mover_internal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "hash.h"
#include "log.h"

#define VISIT_PAGES 256u /* of one job at most, before the next job has its turn */

/* ---- start and stop ---- */

int source_open(struct skv_mover *mover, uint8_t *memory, uint64_t bytes)
{
    /* A value begins 16 bytes into its extent, so page and trailer end within one more 4 KiB. */
    mover->slot_bytes = (mover->page_bytes + SKV_TRAILER_BYTES + 4096 + 4095) & ~UINT64_C(4095);
    uint64_t slots = bytes / mover->slot_bytes;
    assert(slots >= 4);
    mover->slot_count = slots > UINT32_MAX / 2 ? UINT32_MAX / 2 : (uint32_t)slots;
    mover->slots = calloc(mover->slot_count, sizeof *mover->slots);
    if (!mover->slots)
        return SKV_ENOMEM;
    int status = skv_direct_open(skv_store_file(mover->options.store), READS, &mover->direct);
    for (uint32_t i = 0; i < mover->slot_count; i++) {
        mover->slots[i].read.memory = memory + i * mover->slot_bytes;
        source_free(mover, &mover->slots[i]);
    }
    while (mover->readers_free < READERS && status == 0)
        if ((status =
                 skv_reader_open(mover->options.store, &mover->readers[mover->readers_free])) == 0)
            mover->readers_free++;
    return status;
}

void source_close(struct skv_mover *mover)
{
    skv_direct_close(mover->direct);
    while (mover->readers_free)
        skv_reader_close(mover->readers[--mover->readers_free]);
    free(mover->slots);
}

void source_free(struct skv_mover *mover, struct slot *slot)
{
    slot->next = mover->free_slot;
    mover->free_slot = slot;
}

/* ---- snapshots ---- */

static bool may_begin(const struct skv_mover *mover, const struct onboard *onboard)
{
    return onboard->stage == STAGE_QUEUED && !onboard->cancelled && mover->readers_free &&
           (onboard->job->gate_row || mover->prefetches < PREFETCHES);
}

bool source_begin(struct skv_mover *mover)
{
    bool any = false;
    struct onboard *onboard;
    for (; (onboard = onboard_next(mover, may_begin)); any = true) {
        int status = skv_reader_begin(mover->readers[mover->readers_free - 1]);
        if (status) {
            onboard_fail(mover, onboard, 0, status);
            continue;
        }
        onboard->reader = mover->readers[--mover->readers_free];
        mover->prefetches += !onboard->job->gate_row;
        onboard->stage = STAGE_FINDING;
    }
    return any;
}

void source_end(struct skv_mover *mover, struct onboard *onboard)
{
    if (!onboard->reader)
        return;
    skv_reader_end(onboard->reader);
    mover->readers[mover->readers_free++] = onboard->reader;
    mover->prefetches -= !onboard->job->gate_row;
    onboard->reader = NULL;
}

/* ---- whole pages, gathered into one call ---- */

void source_flush(struct skv_mover *mover)
{
    struct flight *batch = &mover->batch;
    if (!mover->copy_count)
        return;
    flight_start(mover, batch, mover->copy_count);
    mover->copy_count = 0;
    batch->bytes = 0;
    batch->slot_count = 0;
}

/* A verified page: at `value`, in `slot` or (NULL) in the map. */
static void gather(struct skv_mover *mover, struct onboard *onboard, uint32_t move,
                   const uint8_t *value, struct slot *slot)
{
    struct flight *batch = &mover->batch;
    if (batch->onboard != onboard)
        source_flush(mover);
    batch->onboard = onboard;
    mover->copy_count = copies_add(mover, mover->copy_count, onboard->job->moves[move].page, value,
                                   0, mover->page_bytes);
    batch->bytes += mover->page_bytes;
    if (slot)
        batch->slots[batch->slot_count++] = slot;
    else
        mover->onboard_in_place_bytes += mover->page_bytes;
    if (batch->slot_count == STREAM_PAGES || mover->copy_count >= CHUNK_COPIES ||
        batch->bytes >= CHUNK_BYTES)
        source_flush(mover);
}

/* ---- finding ---- */

static int verify(const struct skv_mover *mover, const struct onboard *onboard, uint32_t move,
                  const uint8_t *value)
{
    const struct skv_move *want = &onboard->job->moves[move];
    const struct skv_record *user = &onboard->job->users[want->user];
    return skv_page_verify(value, mover->page_bytes, user->model, user->user, want->index,
                           want->valid, want->hash, want->generation);
}

/* The bytes are known to be as they were put; is it the page that the job expects? */
static int verify_trailer(const struct skv_mover *mover, const struct onboard *onboard,
                          uint32_t move, const uint8_t *value)
{
    const struct skv_move *want = &onboard->job->moves[move];
    const struct skv_record *user = &onboard->job->users[want->user];
    struct skv_trailer trailer;
    memcpy(&trailer, value + mover->page_bytes, sizeof trailer);
    bool same = skv_id_equal(trailer.model, user->model) &&
                skv_id_equal(trailer.user, user->user) && trailer.index == want->index &&
                trailer.valid == want->valid && trailer.hash == want->hash &&
                trailer.generation <= want->generation;
    return same ? 0 : SKV_ECORRUPT;
}

/* For one more page? Gathering it may start two flights. */
static bool has_room(const struct skv_mover *mover)
{
    return mover->flight_count + 2 <= PAGE_FLIGHTS && mover->flight_bytes < PAGE_BYTES;
}

/* Starts reading it. SKV_EAGAIN: no slot, or enough reads in flight. */
static int read_page(struct skv_mover *mover, struct onboard *onboard, uint32_t move,
                     const struct skv_location *location)
{
    uint64_t used = location->value_offset + mover->page_bytes + SKV_TRAILER_BYTES;
    if (location->extent_bytes > mover->slot_bytes || used > location->extent_bytes)
        return SKV_EIO;
    struct slot *slot = mover->free_slot;
    if (!slot || mover->reads == READS)
        return SKV_EAGAIN;
    slot->read = (struct skv_direct_read){.offset = location->extent_offset,
                                          .bytes = location->extent_bytes,
                                          .memory = slot->read.memory};
    int status = skv_direct_submit(mover->direct, &slot->read);
    if (status)
        return status;
    mover->free_slot = slot->next;
    slot->onboard = onboard;
    slot->move = move;
    slot->value_offset = location->value_offset;
    onboard->reads++;
    mover->reads++;
    return 0;
}

/* One page: 0, SKV_EAGAIN (later), or why it cannot be had. */
static int find_page(struct skv_mover *mover, struct onboard *onboard, uint32_t move)
{
    const struct skv_move *want = &onboard->job->moves[move];
    const struct skv_record *user = &onboard->job->users[want->user];
    struct skv_pinner *pinner = mover->options.pinner;
    struct skv_location location;
    int status =
        skv_reader_locate(onboard->reader, user->model, user->user, want->index, &location);
    if (status)
        return status;
    const uint8_t *value = location.value;
    if (!pinner || !skv_pinner_covers(pinner, value, mover->page_bytes + SKV_TRAILER_BYTES))
        return read_page(mover, onboard, move, &location);
    if (skv_pinner_verified(pinner, value)) {
        status = verify_trailer(mover, onboard, move, value);
        if (status == 0)
            onboard->pages[onboard->page_count++] =
                (struct layered){.value = value, .page = want->page};
        return status;
    }
    status = verify(mover, onboard, move, value);
    if (status)
        return status;
    skv_pinner_mark(pinner, value);
    gather(mover, onboard, move, value, NULL);
    return 0;
}

/* Has the last page been verified? Then the layers' turn has come. */
static void found_all(struct skv_mover *mover, struct onboard *onboard)
{
    if (onboard->stage != STAGE_FINDING || onboard->found < onboard->job->move_count ||
        onboard->reads)
        return;
    source_flush(mover); /* before its gates */
    onboard->stage = STAGE_LAYERS;
    if (onboard->page_count == 0) {
        onboard->groups = mover->groups;
        onboard->stage = STAGE_GATES;
    }
}

/* As many as were found before: the copy engine has those to copy meanwhile, and begins with the
 * first EARLY_PAGES. */
static uint32_t visit_pages(uint32_t found)
{
    return found < EARLY_PAGES ? EARLY_PAGES : found < VISIT_PAGES ? found : VISIT_PAGES;
}

static bool find_some(struct skv_mover *mover, struct onboard *onboard, uint64_t deadline_ns)
{
    uint32_t before = onboard->found, most = visit_pages(before);
    int status = 0;
    while (status == 0 && onboard->found < onboard->job->move_count &&
           onboard->found - before < most && has_room(mover)) {
        status = find_page(mover, onboard, onboard->found);
        if (status == 0)
            onboard->found++;
        else if (status != SKV_EAGAIN)
            onboard_fail(mover, onboard, onboard->found, status);
        if (skv_now_ns() >= deadline_ns)
            break;
    }
    found_all(mover, onboard);
    return onboard->found > before || onboard->stage != STAGE_FINDING;
}

/* ---- what was read ---- */

static bool collect(struct skv_mover *mover, uint64_t deadline_ns)
{
    struct skv_direct_read *read;
    bool any = false;
    for (; mover->reads && skv_now_ns() < deadline_ns &&
           (read = skv_direct_poll(mover->direct, false));
         any = true) {
        struct slot *slot = (struct slot *)read; /* its first member */
        mover->reads--;
        slot->next = slot->onboard->read_slot;
        slot->onboard->read_slot = slot;
    }
    return any;
}

static void verify_slot(struct skv_mover *mover, struct slot *slot)
{
    struct onboard *onboard = slot->onboard;
    onboard->reads--;
    if (onboard->stage != STAGE_FINDING || onboard->cancelled) {
        source_free(mover, slot);
        return;
    }
    const uint8_t *value = (const uint8_t *)slot->read.memory + slot->value_offset;
    int status = slot->read.status;
    if (status == 0)
        status = verify(mover, onboard, slot->move, value);
    if (status) {
        source_free(mover, slot);
        onboard_fail(mover, onboard, slot->move, status);
        return;
    }
    gather(mover, onboard, slot->move, value, slot);
    found_all(mover, onboard);
}

static bool verify_some(struct skv_mover *mover, struct onboard *onboard, uint64_t deadline_ns)
{
    bool any = false;
    struct slot *slot;
    while ((slot = onboard->read_slot) && has_room(mover) && !mover->broken) {
        onboard->read_slot = slot->next;
        verify_slot(mover, slot);
        any = true;
        if (skv_now_ns() >= deadline_ns)
            break;
    }
    return any;
}

/* ---- turns ---- */

static bool may_visit(const struct skv_mover *mover, const struct onboard *onboard)
{
    bool finding = onboard->stage == STAGE_FINDING && !onboard->cancelled;
    return onboard->visit != mover->visits && (finding || onboard->read_slot);
}

bool source_find(struct skv_mover *mover, uint64_t deadline_ns)
{
    bool any = collect(mover, deadline_ns);
    struct onboard *onboard;
    mover->visits++;
    while (!mover->broken && (onboard = onboard_next(mover, may_visit))) {
        onboard->visit = mover->visits;
        bool moved = verify_some(mover, onboard, deadline_ns);
        if (onboard->stage == STAGE_FINDING && !onboard->cancelled)
            moved |= find_some(mover, onboard, deadline_ns);
        if (moved) /* one who could not goes first when there is room */
            onboard->turn = ++mover->turns;
        any |= moved;
        if (skv_now_ns() >= deadline_ns) {
            any = true; /* the others may have something to do: no rest before they were asked */
            break;
        }
    }
    source_flush(mover);
    return any;
}
