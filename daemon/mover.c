/* The mover's outside, for the loop: start and stop, jobs in, events out. And the copy thread's
 * turns: take what the loop sent (a lookup is answered there and then), then a bounded bit of
 * everything else, then, when nothing came of it, a nap while copies or reads are in flight, or
 * sleep.
 *
 * When the device fails nothing is queued on it any more; lookups and the writer go on until the
 * daemon has gone. */
#include "mover_internal.h"

#include <assert.h>
#include <malloc.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "clock.h"
#include "log.h"

#define HEAP_VALUE_BYTES (32 << 20)  /* the most that glibc takes: larger pages are mapped */
#define HEAP_KEEP_BYTES  (256 << 20) /* a transaction under `power`, several times over */

/* ---- events ---- */

static struct skv_message message_of(const struct skv_mover_event *event)
{
    return (struct skv_message){.kind = event->kind,
                                .status = event->status,
                                .user = event->user,
                                .index = event->index,
                                .job = event->job};
}

void mover_event(struct skv_mover *mover, const struct skv_mover_event *event)
{
    struct skv_message message = message_of(event);
    skv_queue_push(&mover->copy_events, &message);
    skv_bell_ring(&mover->loop_bell);
}

void mover_break(struct skv_mover *mover, const char *what, int status)
{
    if (mover->broken)
        return;
    skv_error("the device failed, %s: %s", what, skv_strerror(status));
    mover->broken = true;
    mover_event(mover, &(struct skv_mover_event){.kind = SKV_MOVER_BROKEN, .status = status});
}

int skv_mover_fd(const struct skv_mover *mover)
{
    return mover->loop_bell.fd;
}

/* The writer's queue is looked at first, the copy thread's taken from first: what the copy thread
 * said of a job before it handed it to the writer comes before what the writer says. */
static bool take_event(struct skv_mover *mover, struct skv_mover_event *event)
{
    bool written = skv_queue_ready(&mover->write_events);
    struct skv_message message;
    if (!skv_queue_pop(&mover->copy_events, &message) &&
        !(written && skv_queue_pop(&mover->write_events, &message)))
        return false;
    *event = (struct skv_mover_event){.kind = (enum skv_mover_event_kind)message.kind,
                                      .status = message.status,
                                      .user = message.user,
                                      .index = message.index,
                                      .job = message.job};
    return true;
}

bool skv_mover_next(struct skv_mover *mover, struct skv_mover_event *event)
{
    if (take_event(mover, event))
        return true;
    if (atomic_load_explicit(&mover->loop_bell.armed, memory_order_relaxed))
        return false; /* the next one will ring */
    skv_bell_arm(&mover->loop_bell);
    return take_event(mover, event);
}

/* ---- jobs, from the loop ---- */

static void command(struct skv_mover *mover, const struct skv_message *message)
{
    skv_queue_push(&mover->commands, message);
    skv_bell_ring(&mover->copy_bell);
}

void skv_mover_onboard(struct skv_mover *mover, struct skv_onboard *job)
{
    assert(job->move_count == 0 || mover->options.store);
    command(mover, &(struct skv_message){.kind = COMMAND_ONBOARD, .job = job});
}

void skv_mover_cancel(struct skv_mover *mover, uint64_t id, int32_t status)
{
    command(mover, &(struct skv_message){.kind = COMMAND_CANCEL, .status = status, .id = id});
}

uint32_t skv_mover_offload_staged(const struct skv_mover *mover)
{
    /* Acquire: the writer is done with the slots. Pairs with its release. */
    uint64_t freed = atomic_load_explicit(&mover->out_freed, memory_order_acquire);
    return (uint32_t)(mover->out_taken - freed);
}

uint32_t skv_mover_offload_pages(const struct skv_mover *mover)
{
    return mover->out_slots - skv_mover_offload_staged(mover);
}

bool skv_mover_offload(struct skv_mover *mover, struct skv_offload *job)
{
    assert(job->move_count > 0);
    if (job->move_count > skv_mover_offload_pages(mover))
        return false;
    job->state = mover->out_memory + mover->out_taken % mover->out_slots * mover->out_slot_bytes;
    mover->out_taken += job->move_count;
    command(mover, &(struct skv_message){.kind = COMMAND_OFFLOAD, .job = job});
    return true;
}

void skv_mover_change(struct skv_mover *mover, struct skv_change *job)
{
    command(mover, &(struct skv_message){.kind = COMMAND_CHANGE, .job = job});
}

void skv_mover_lookup(struct skv_mover *mover, struct skv_lookup_job *job)
{
    command(mover, &(struct skv_message){.kind = COMMAND_LOOKUP, .job = job});
}

void skv_mover_counters(const struct skv_mover *mover, struct skv_mover_counters *out)
{
    *out = (struct skv_mover_counters){
        .onboard_bytes = mover->onboard_bytes,
        .onboard_in_place_bytes = mover->onboard_in_place_bytes,
        .offload_bytes = mover->offload_bytes,
        .offload_pages = mover->offload_pages,
        .store_errors = mover->store_errors,
        .damaged_pages = mover->damaged_pages,
    };
}

/* ---- the copy thread ---- */

static void look_up(struct skv_mover *mover, struct skv_lookup_job *job)
{
    int status = SKV_ENOENT;
    if (mover->options.store && (status = skv_reader_begin(mover->lookup_reader)) == 0) {
        status = skv_reader_record(mover->lookup_reader, job->record.model, job->record.user,
                                   &job->record, job->hashes, SKV_MAX_USER_PAGES, &job->count);
        skv_reader_end(mover->lookup_reader);
    }
    mover_event(mover,
                &(struct skv_mover_event){.kind = SKV_MOVER_FOUND, .status = status, .job = job});
}

static bool take_commands(struct skv_mover *mover)
{
    struct skv_message message;
    bool any = false;
    for (; skv_queue_pop(&mover->commands, &message); any = true) {
        switch ((enum command)message.kind) {
        case COMMAND_ONBOARD:
            onboard_accept(mover, message.job);
            break;
        case COMMAND_CANCEL:
            onboard_cancel(mover, message.id, message.status);
            break;
        case COMMAND_CHANGE:
            if (!mover->options.store) {
                mover_event(mover, &(struct skv_mover_event){.kind = SKV_MOVER_CHANGED,
                                                             .job = message.job});
                break;
            } /* fall through */
        case COMMAND_OFFLOAD:
            skv_queue_push(&mover->out, &message);
            break;
        case COMMAND_LOOKUP:
            look_up(mover, message.job);
            break;
        case COMMAND_STOP:
            mover->stopping = true;
            break;
        }
    }
    return any;
}

/* Everything else, a bounded bit of each. */
static bool work(struct skv_mover *mover)
{
    uint64_t deadline_ns = skv_now_ns() + TURN_NS;
    bool any = onboard_land(mover);
    any |= offload_land(mover);
    any |= onboard_layers(mover, deadline_ns); /* first: keeps the copy engine busy */
    any |= source_begin(mover);
    any |= source_find(mover, deadline_ns);
    any |= onboard_gates(mover);
    any |= offload_copy(mover);
    return any;
}

static bool all_done(const struct skv_mover *mover)
{
    return mover->broken || (!mover->first && !skv_queue_ready(&mover->out) &&
                             !mover->out_flight_count && !mover->flight_count);
}

static void rest(struct skv_mover *mover)
{
    uint64_t timeout_ns = UINT64_MAX;
    if (!mover->broken && (mover->flight_count || mover->out_flight_count || mover->reads))
        timeout_ns = NAP_NS;
    else if (!mover->broken)
        timeout_ns = offload_patience_ns(mover);
    skv_bell_arm(&mover->copy_bell);
    if (!skv_queue_ready(&mover->commands))
        skv_bell_wait(&mover->copy_bell, timeout_ns);
}

static void *copy_run(void *argument)
{
    struct skv_mover *mover = argument;
    prctl(PR_SET_TIMERSLACK, 1000ul, 0ul, 0ul, 0ul); /* a nap of 20 us takes 20 us, not 70 */
    for (;;) {
        bool any = take_commands(mover);
        if (!mover->broken)
            any |= work(mover);
        if (mover->stopping && all_done(mover))
            break;
        if (!any)
            rest(mover);
    }
    skv_queue_push(&mover->writes, &(struct skv_message){.kind = COMMAND_STOP});
    skv_bell_ring(&mover->write_bell);
    return NULL;
}

/* ---- start and stop ---- */

static void destroy(struct skv_mover *mover)
{
    skv_stream_close(mover->stream);
    skv_stream_close(mover->out_stream);
    while (mover->first)
        onboard_forget(mover, mover->first);
    source_close(mover);
    skv_reader_close(mover->lookup_reader);
    skv_reader_close(mover->writer.reader);
    if (!mover->options.staging)
        skv_pinned_free(mover->options.device, mover->staging);
    skv_queue_fini(&mover->commands);
    skv_queue_fini(&mover->writes);
    skv_queue_fini(&mover->copy_events);
    skv_queue_fini(&mover->write_events);
    skv_queue_fini(&mover->out);
    skv_bell_fini(&mover->copy_bell);
    skv_bell_fini(&mover->write_bell);
    skv_bell_fini(&mover->loop_bell);
    free(mover->copies);
    free(mover);
}

static int open_threads_wares(struct skv_mover *mover)
{
    mover->copy_bell.fd = mover->write_bell.fd = mover->loop_bell.fd = -1;
    if (!skv_queue_init(&mover->commands) || !skv_queue_init(&mover->writes) ||
        !skv_queue_init(&mover->copy_events) || !skv_queue_init(&mover->write_events) ||
        !skv_queue_init(&mover->out))
        return SKV_ENOMEM;
    int status = skv_bell_init(&mover->copy_bell);
    if (status == 0)
        status = skv_bell_init(&mover->write_bell);
    return status ? status : skv_bell_init(&mover->loop_bell);
}

static int open_staging(struct skv_mover *mover)
{
    const struct skv_mover_options *options = &mover->options;
    mover->staging = options->staging;
    return mover->staging
               ? 0
               : skv_pinned_alloc(options->device, options->staging_bytes, &mover->staging);
}

static int open_offload(struct skv_mover *mover, uint8_t *memory, uint64_t bytes)
{
    mover->out_slot_bytes = (mover->page_bytes + SKV_TRAILER_BYTES + 4095) & ~UINT64_C(4095);
    uint64_t slots = bytes / mover->out_slot_bytes;
    assert(slots >= 4);
    mover->out_slots = slots > UINT32_MAX / 2 ? UINT32_MAX / 2 : (uint32_t)slots;
    mover->out_memory = memory;
    return mover->options.pinner ? skv_reader_open(mover->options.store, &mover->writer.reader) : 0;
}

/* Signals are the daemon's business: the threads take none. */
static int start_thread(pthread_t *thread, const char *name, void *(*run)(void *),
                        struct skv_mover *mover)
{
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* a fault of its own; see daemon/sigbus.c */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, NULL, run, mover);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        skv_error("starting thread %s: %s", name, strerror(error));
        return SKV_ENOMEM;
    }
    pthread_setname_np(*thread, name);
    return 0;
}

static int start_threads(struct skv_mover *mover)
{
    int status = start_thread(&mover->writer_thread, "skv-writer", writer_run, mover);
    if (status)
        return status;
    status = start_thread(&mover->copy_thread, "skv-copy", copy_run, mover);
    if (status) {
        skv_queue_push(&mover->writes, &(struct skv_message){.kind = COMMAND_STOP});
        skv_bell_ring(&mover->write_bell);
        pthread_join(mover->writer_thread, NULL);
    }
    return status;
}

static int open_all(struct skv_mover *mover)
{
    const struct skv_mover_options *options = &mover->options;
    mover->page_bytes = skv_page_bytes(&options->geometry);
    mover->slice_bytes = skv_slice_bytes(&options->geometry);
    mover->group_layers = (uint32_t)((GROUP_BYTES + mover->slice_bytes - 1) / mover->slice_bytes);
    mover->groups = (options->geometry.layers + mover->group_layers - 1) / mover->group_layers;
    mover->pool = skv_pool_address(options->pool);
    mover->pool_pages = skv_pool_exported(options->pool)->pool_bytes / mover->page_bytes;
    mover->copies_slack = (uint32_t)(mover->page_bytes / SKV_WINDOW_BYTES) + 2;
    mover->copies = malloc((CHUNK_COPIES + mover->copies_slack) * sizeof *mover->copies);
    int status = open_threads_wares(mover);
    if (status == 0 && !mover->copies)
        status = SKV_ENOMEM;
    if (status == 0)
        status = skv_stream_open(options->device, &mover->stream);
    if (status == 0)
        status = skv_stream_open(options->device, &mover->out_stream);
    if (status || !options->store)
        return status;
    mover->map = skv_store_map(options->store, &mover->map_bytes);
    status = skv_reader_open(options->store, &mover->lookup_reader);
    if (status == 0)
        status = open_staging(mover);
    uint64_t half = options->staging_bytes / 2 & ~UINT64_C(4095);
    if (status == 0)
        status = source_open(mover, mover->staging, half);
    return status ? status : open_offload(mover, (uint8_t *)mover->staging + half, half);
}

int skv_mover_start(const struct skv_mover_options *options, struct skv_mover **out)
{
    assert(options->store || !options->pinner);
    struct skv_mover *mover = calloc(1, sizeof *mover);
    if (!mover)
        return SKV_ENOMEM;
    mover->options = *options;
    /* LMDB mallocs a transaction's dirty pages: let the heap keep them, not fault them in anew. */
    mallopt(M_MMAP_THRESHOLD, HEAP_VALUE_BYTES);
    mallopt(M_TRIM_THRESHOLD, HEAP_KEEP_BYTES);
    int status = open_all(mover);
    if (status == 0)
        status = start_threads(mover);
    if (status)
        goto fail;
    *out = mover;
    return 0;
fail:
    destroy(mover);
    return status;
}

static void join(struct skv_mover *mover)
{
    if (mover->halted)
        return;
    command(mover, &(struct skv_message){.kind = COMMAND_STOP});
    pthread_join(mover->copy_thread, NULL);
    pthread_join(mover->writer_thread, NULL);
    mover->halted = true;
    mover->stopping = false;
}

void skv_mover_halt(struct skv_mover *mover)
{
    join(mover);
    skv_reader_release(mover->lookup_reader);
    if (mover->writer.reader)
        skv_reader_release(mover->writer.reader);
    for (uint32_t i = 0; i < mover->readers_free; i++) /* all of them: nothing is under way */
        skv_reader_release(mover->readers[i]);
}

int skv_mover_resume(struct skv_mover *mover, struct skv_pinner *pinner)
{
    mover->options.pinner = pinner;
    mover->map = skv_store_map(mover->options.store, &mover->map_bytes);
    int status = start_threads(mover);
    mover->halted = status != 0;
    return status;
}

void skv_mover_stop(struct skv_mover *mover)
{
    if (!mover)
        return;
    join(mover);
    if (mover->writer.owed)
        skv_error("changes of the store that failed are given up: users that were cut or removed "
                  "may be back");
    destroy(mover);
}
