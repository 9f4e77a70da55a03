#include "arrival.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clock.h"
#include "daemon.h"
#include "failpoint.h"
#include "log.h"
#include "queue.h"

#define CHUNK_BYTES (64u << 10)         /* of users, at most 1,000: 0.3 ms of the loop */
#define CHUNKS      16u                 /* sent and not taken, at most */
#define SORT_STEP   4096u               /* users put in order in a turn: 0.5 ms */
#define WORKERS_NS  UINT64_C(300000000) /* the mover waits for workers, from the claim on */

struct chunk { /* of users: records, each with its hashes behind it */
    uint32_t bytes;
    _Alignas(8) uint8_t data[CHUNK_BYTES];
};
_Static_assert(CHUNK_BYTES > sizeof(struct skv_record) + SKV_MAX_USER_PAGES * 8, "any user fits");

enum message { OPENED, USERS, ALL, FAILED };

struct arrival {
    struct skv_store *store;
    struct daemon *daemon; /* its device, pool and options are read by the thread */
    pthread_t thread;
    struct skv_queue messages; /* thread -> loop */
    sem_t room;                /* chunks that may be sent */
    _Atomic bool stopped;      /* by the loop: nobody takes anything any more */
    uint64_t workers_by_ns; /* the mover waits for workers of before, till then; 0: it does not */
    struct skv_bell workers_bell; /* loop -> thread: they are in */

    /* The thread's until OPENED or FAILED is taken. */
    struct skv_pinner *pinner;
    struct skv_mover *mover;
    uint64_t
        generation; /* the last one that may have been used; the table's, then the store's too */
    struct chunk *chunk; /* being filled */
    int status;          /* why the scan stopped */

    /* The loop's. */
    bool workers_first; /* they are not in yet */
    uint64_t began_ns;
    bool all; /* are taken, not yet in order */
};

static struct skv_store_options store_options(const struct options *o)
{
    return (struct skv_store_options){.path = o->store,
                                      .geometry = o->geometry,
                                      .map_bytes = o->store_bytes,
                                      .durability = o->durability};
}

static uint32_t pages_of(const struct arrival *a, const struct skv_record *record)
{
    uint32_t size = a->daemon->options.geometry.page_tokens;
    return (record->tokens + size - 1) / size;
}

static int start_mover(const struct daemon *daemon, struct skv_store *store,
                       struct skv_pinner *pinner, struct skv_mover **mover)
{
    const struct options *o = &daemon->options;
    return skv_mover_start(&(struct skv_mover_options){.device = daemon->device,
                                                       .pool = daemon->pool,
                                                       .geometry = o->geometry,
                                                       .store = store,
                                                       .pinner = pinner,
                                                       .durability = o->durability,
                                                       .staging_bytes = o->staging_bytes,
                                                       .staging = daemon->staging},
                           mover);
}

/* ---- the thread ---- */

static void send(struct arrival *a, enum message kind, int status, void *job)
{
    skv_queue_push(&a->messages, &(struct skv_message){.kind = kind, .status = status, .job = job});
    skv_bell_ring(&a->daemon->arrival_bell);
}

static bool send_chunk(struct arrival *a)
{
    while (sem_wait(&a->room) && errno == EINTR)
        ;
    if (atomic_load(&a->stopped))
        return false;
    send(a, USERS, 0, a->chunk);
    a->chunk = NULL;
    return true;
}

static int gather(void *context, const struct skv_record *record, const void *hashes)
{
    struct arrival *a = context;
    uint32_t bytes = pages_of(a, record) * 8;
    if (a->chunk && a->chunk->bytes + sizeof *record + bytes > CHUNK_BYTES && !send_chunk(a))
        return a->status = SKV_EAGAIN;
    if (!a->chunk) {
        if (!(a->chunk = malloc(sizeof *a->chunk)))
            return a->status = SKV_ENOMEM;
        a->chunk->bytes = 0;
    }
    memcpy(a->chunk->data + a->chunk->bytes, record, sizeof *record);
    memcpy(a->chunk->data + a->chunk->bytes + sizeof *record, hashes, bytes);
    a->chunk->bytes += (uint32_t)sizeof *record + bytes;
    return 0;
}

/* Generations that this daemon hands out are reserved before the first is: none is ever used twice.
 */
static int reserve_generations(struct arrival *a)
{
    uint64_t last = skv_store_generation(a->store);
    if (last > a->generation) /* else an earlier daemon's pool has later ones */
        a->generation = last;
    int status = skv_store_begin(a->store);
    if (!status)
        status = skv_store_put_generation(a->store, a->generation + GENERATIONS_AHEAD);
    if (!status)
        status = skv_store_commit(a->store);
    if (status)
        skv_error("the store cannot be written: %s", skv_strerror(status));
    skv_failpoint(FAIL_start_numbered);
    return status;
}

/* Till when the earlier daemon's workers come before the mover; 0: nobody is waited for. Pinning
 * its staging takes a GPU's driver 0.3 s, in which no session can be let in. */
static uint64_t workers_come_first(const struct daemon *daemon)
{
    /* For tests, on the host backend too: so long. */
    const char *wait_ms = getenv("SIDEKV_TEST_WORKERS_FIRST_MS");
    if (!daemon->kept.unsettled)
        return 0;
    if (wait_ms)
        return daemon->free_ns + strtoull(wait_ms, NULL, 10) * 1000000;
    bool slow = skv_device_info(daemon->device)->kind == SKV_DEVICE_CUDA && !daemon->staging;
    return slow ? daemon->free_ns + WORKERS_NS : 0;
}

static int let_workers_in(struct arrival *a)
{
    uint64_t now_ns = skv_now_ns();
    if (now_ns < a->workers_by_ns)
        skv_bell_wait(&a->workers_bell, a->workers_by_ns - now_ns);
    return atomic_load(&a->stopped) ? SKV_EAGAIN : SKV_OK;
}

static int open_all(struct arrival *a)
{
    const struct options *o = &a->daemon->options;
    const struct skv_store_options options = store_options(o);
    int status = skv_store_open_claimed(a->store, &options);
    if (!status)
        status = reserve_generations(a);
    if (!status)
        status = let_workers_in(a);
    if (!status && o->pin_bytes)
        status = skv_pinner_start(a->store, a->daemon->device, o->pin_bytes, &a->pinner);
    return status ? status : start_mover(a->daemon, a->store, a->pinner, &a->mover);
}

static void *run(void *context)
{
    struct arrival *a = context;
    int status = open_all(a);
    if (!status) {
        send(a, OPENED, 0, NULL);
        skv_failpoint(FAIL_start_opened);
        status = skv_store_scan(a->store, gather, a);
    }
    if (!status)
        status = a->status;
    if (!status && a->chunk && !send_chunk(a))
        status = SKV_EAGAIN;
    send(a, status ? FAILED : ALL, status, NULL);
    return NULL;
}

/* ---- the loop ---- */

static int restore(struct daemon *daemon, const struct chunk *chunk)
{
    for (uint32_t at = 0; at < chunk->bytes;) {
        const struct skv_record *record = (const void *)(chunk->data + at);
        int status = skv_cache_restore(daemon->cache, record,
                                       (const void *)(chunk->data + at + sizeof *record));
        if (status == SKV_EINVAL)
            skv_warn("a stored user with an impossible record is left out");
        else if (status == SKV_EFULL)
            skv_error(
                "the store holds more users than --max-users %u, which can be raised, or more "
                "than %u models",
                daemon->options.max_users, SKV_MAX_MODELS);
        if (status && status != SKV_EINVAL)
            return status;
        skv_drain_actions(daemon);
        at += (uint32_t)sizeof *record + pages_of(daemon->arrival, record) * 8;
    }
    return 0;
}

static void take_message(struct daemon *daemon, const struct skv_message *message)
{
    struct arrival *a = daemon->arrival;
    switch ((enum message)message->kind) {
    case OPENED:
        daemon->store = a->store;
        daemon->pinner = a->pinner;
        daemon->mover = a->mover;
        daemon->generation_limit = a->generation + GENERATIONS_AHEAD;
        skv_cache_number_above(daemon->cache, a->generation);
        a->began_ns = skv_now_ns();
        break;
    case USERS:
        if (!daemon->arrival_status)
            daemon->arrival_status = restore(daemon, message->job);
        free(message->job);
        sem_post(&a->room);
        break;
    case ALL:
        a->all = true;
        break;
    case FAILED:
        daemon->arrival_status = message->status;
        break;
    }
}

/* The thread has ended. */
static void arrived(struct daemon *daemon)
{
    struct skv_stats stats;
    skv_cache_stats(daemon->cache, &stats);
    skv_info("%llu users in the store, read in %llu ms", (unsigned long long)stats.users_stored,
             (unsigned long long)((skv_now_ns() - daemon->arrival->began_ns) / 1000000));
    skv_arrival_stop(daemon);
    skv_commands_arrived(daemon);
}

/* Have those that may still touch pages reattached, or are gone, and is nobody in a handshake? */
static bool workers_are_in(const struct daemon *daemon)
{
    bool in = !daemon->kept.unsettled;
    for (uint32_t i = 0; i < SKV_MAX_PEERS && in; i++)
        in = daemon->peers[i].state != PEER_HELLO;
    return in;
}

uint32_t skv_arrival_take(struct daemon *daemon)
{
    struct arrival *a = daemon->arrival;
    struct skv_message message;
    if (!a || daemon->arrival_status)
        return 0;
    if (a->workers_first && workers_are_in(daemon)) {
        a->workers_first = false;
        skv_bell_ring(&a->workers_bell);
    }
    if (a->all) {
        if (skv_cache_restored(daemon->cache, SORT_STEP))
            arrived(daemon);
        return 1;
    }
    bool any = skv_queue_pop(&a->messages, &message);
    if (!any) {
        skv_bell_arm(&daemon->arrival_bell);
        any = skv_queue_pop(&a->messages, &message);
    }
    if (any)
        take_message(daemon, &message);
    return any;
}

int skv_arrival_await(struct daemon *daemon, uint64_t until_ns)
{
    struct pollfd fds[] = {{.fd = daemon->arrival_bell.fd, .events = POLLIN},
                           {.fd = skv_start_signals(daemon), .events = POLLIN}};
    uint64_t now_ns;
    while (daemon->arrival && !daemon->arrival->workers_first && !daemon->arrival_status &&
           (now_ns = skv_now_ns()) < until_ns) {
        uint64_t wait_ns = skv_arrival_take(daemon) ? 0 : until_ns - now_ns;
        struct timespec timeout = {.tv_sec = (time_t)(wait_ns / 1000000000u),
                                   .tv_nsec = (long)(wait_ns % 1000000000u)};
        if (ppoll(fds, 2, until_ns == UINT64_MAX && wait_ns ? NULL : &timeout, NULL) > 0 &&
            fds[1].revents)
            return SKV_EAGAIN;
        if (wait_ns)
            skv_bell_wait(&daemon->arrival_bell, 0); /* takes the ring */
    }
    return daemon->arrival_status;
}

static void destroy(struct arrival *a)
{
    struct skv_message message;
    while (skv_queue_pop(&a->messages, &message))
        free(message.job);
    free(a->chunk);
    skv_queue_fini(&a->messages);
    skv_bell_fini(&a->workers_bell);
    sem_destroy(&a->room);
    free(a);
}

int skv_arrival_start(struct daemon *daemon)
{
    if (!daemon->claimed)
        return start_mover(daemon, NULL, NULL, &daemon->mover);
    struct arrival *a = calloc(1, sizeof *a);
    if (!a)
        return SKV_ENOMEM;
    *a = (struct arrival){
        .store = daemon->claimed,
        .daemon = daemon,
        .workers_by_ns = workers_come_first(daemon),
        .workers_bell.fd = -1,
        .generation = daemon->table->generation,
    };
    a->workers_first = a->workers_by_ns != 0;
    sem_init(&a->room, 0, CHUNKS);
    int error = 0;
    if (!skv_queue_init(&a->messages) || skv_bell_init(&daemon->arrival_bell) ||
        skv_bell_init(&a->workers_bell) || (error = pthread_create(&a->thread, NULL, run, a))) {
        if (error)
            skv_error("starting a thread for the store: %s", strerror(error));
        destroy(a);
        return SKV_ENOMEM;
    }
    pthread_setname_np(a->thread, "skv-arrival");
    daemon->claimed = NULL;
    daemon->arrival = a;
    return SKV_OK;
}

void skv_arrival_stop(struct daemon *daemon)
{
    struct arrival *a = daemon->arrival;
    if (!a)
        return;
    atomic_store(&a->stopped, true);
    skv_store_open_abandon(a->store);
    sem_post(&a->room); /* it may wait there, or */
    skv_bell_ring(&a->workers_bell);
    pthread_join(a->thread, NULL);
    daemon->store = a->store;
    daemon->pinner = a->pinner;
    daemon->mover = a->mover;
    daemon->arrival = NULL;
    destroy(a);
}
