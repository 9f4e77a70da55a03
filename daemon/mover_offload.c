/* Pool to staging: offloads are copied in the order in which they came, each handed to the writer
 * when its last copy has landed. Changes of the store keep their place in that order.
 *
 * While an onboard with a gate row lives nothing is queued here, so that a worker that waits has
 * the bus, and the memory behind it, for itself. Under unbroken load that would be for ever: an
 * offload held back for OUT_STARVE_NS may copy OUT_ALLOWANCE all the same. */
#include "mover_internal.h"

#include <assert.h>

#include "clock.h"
#include "failpoint.h"

static void forward(struct skv_mover *mover, const struct skv_message *message)
{
    skv_queue_push(&mover->writes, message);
    skv_bell_ring(&mover->write_bell);
}

bool offload_land(struct skv_mover *mover)
{
    bool any = false;
    for (; mover->out_flight_count && !mover->broken; any = true) {
        struct out_flight *flight = &mover->out_flights[mover->out_flight_first];
        int status = skv_stream_query(mover->out_stream, flight->mark);
        if (status == SKV_EAGAIN)
            break;
        if (status) {
            mover_break(mover, "offloading", status);
            break;
        }
        struct skv_offload *job = flight->last_of;
        mover->out_flight_bytes -= flight->bytes;
        mover->out_flight_first = (mover->out_flight_first + 1) % FLIGHTS;
        mover->out_flight_count--;
        if (job) {
            skv_failpoint(FAIL_offload_copied);
            mover_event(mover, &(struct skv_mover_event){.kind = SKV_MOVER_COPIED, .job = job});
            forward(mover, &(struct skv_message){.kind = COMMAND_OFFLOAD, .job = job});
        }
    }
    return any;
}

/* May something be copied now? */
static bool allowed(struct skv_mover *mover)
{
    if (!mover->gated) {
        mover->out_held_since = mover->out_allowance = 0;
        return true;
    }
    uint64_t now_ns = skv_now_ns();
    if (mover->out_allowance)
        return true;
    if (!mover->out_held_since)
        mover->out_held_since = now_ns;
    if (now_ns - mover->out_held_since < OUT_STARVE_NS)
        return false;
    mover->out_held_since = 0;
    mover->out_allowance = OUT_ALLOWANCE;
    return true;
}

uint64_t offload_patience_ns(const struct skv_mover *mover)
{
    if (!mover->gated || !mover->out_held_since || !skv_queue_ready(&mover->out))
        return UINT64_MAX;
    uint64_t held_ns = skv_now_ns() - mover->out_held_since;
    return held_ns < OUT_STARVE_NS ? OUT_STARVE_NS - held_ns : 0;
}

/* One call's worth of a job's pages. */
static void copy_some(struct skv_mover *mover, struct skv_offload *job)
{
    struct out_flight flight = {0};
    uint32_t count = 0;
    while (mover->out_at < job->move_count && count < CHUNK_COPIES &&
           flight.bytes < OUT_CHUNK_BYTES) {
        const struct skv_move *move = &job->moves[mover->out_at];
        assert(move->page < mover->pool_pages);
        mover->copies[count++] =
            (struct skv_copy){.dst = out_slot(mover, job, mover->out_at++),
                              .src = mover->pool + move->page * mover->page_bytes,
                              .bytes = mover->page_bytes};
        flight.bytes += mover->page_bytes;
    }
    int status = skv_stream_copy(mover->out_stream, SKV_TO_HOST, mover->copies, count);
    if (status == 0)
        status = skv_stream_mark(mover->out_stream, &flight.mark);
    if (status)
        mover_break(mover, "copying to staging", status);
    if (mover->out_at == job->move_count)
        flight.last_of = job;
    mover->offload_bytes += flight.bytes;
    mover->out_allowance -=
        flight.bytes < mover->out_allowance ? flight.bytes : mover->out_allowance;
    mover->out_flight_bytes += flight.bytes;
    mover->out_flights[(mover->out_flight_first + mover->out_flight_count++) % FLIGHTS] = flight;
}

bool offload_copy(struct skv_mover *mover)
{
    bool any = false;
    struct skv_message message;
    while (!mover->broken && skv_queue_peek(&mover->out, &message)) {
        if (message.kind == COMMAND_CHANGE) {
            if (mover->out_flight_count)
                break; /* offloads before it are on their way */
            forward(mover, &message);
            skv_queue_pop(&mover->out, &message);
        } else {
            if (mover->out_flight_count == FLIGHTS ||
                mover->out_flight_bytes >= 4 * OUT_CHUNK_BYTES || !allowed(mover))
                break;
            copy_some(mover, message.job);
            if (mover->out_at == ((struct skv_offload *)message.job)->move_count) {
                mover->out_at = 0;
                skv_queue_pop(&mover->out, &message);
            }
        }
        any = true;
    }
    return any;
}
