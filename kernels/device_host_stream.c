/* Streams of the host backend: a queue of copies and writes, and a thread that executes them one
 * after the other. Nothing takes effect before the thread reaches it, so a caller that forgets to
 * wait sees stale bytes here as it would on a GPU.
 *
 * One mutex guards the queue; the thread holds it only to take an operation and to count it done.
 * A mark is the number of operations queued so far, and it is reached when as many are done. */
#include "device_host.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"

/* To begin with; it doubles when a caller queues more. A gated batch of 64 users x 2,048 pages is
 * 131,072 slices a layer at the very most, a usual one some hundreds. */
#define QUEUE_START 1024u

struct operation {
    void *dst;
    const void *src; /* NULL: store `value` at dst and wake its waiters */
    uint64_t bytes;
    uint64_t due_ns; /* not before this; 0: at once */
    uint32_t value;
};

struct host_stream {
    struct skv_stream stream;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work;     /* something was queued, or closing */
    pthread_cond_t progress; /* done moved, for waiters */
    struct operation *queue; /* [capacity], a power of two; slot i % capacity */
    uint64_t capacity;
    uint64_t queued;       /* operations ever queued; under lock */
    _Atomic uint64_t done; /* operations ever done; written by the thread under lock */
    unsigned waiters;
    bool closing;
    const char *hold; /* the device's */
};

static struct host_stream *host_of(struct skv_stream *stream)
{
    return (struct host_stream *)stream;
}

static void sleep_until(uint64_t due_ns)
{
    struct timespec due = {.tv_sec = (time_t)(due_ns / 1000000000u),
                           .tv_nsec = (long)(due_ns % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
        ;
}

static void execute(const struct operation *operation, const char *hold)
{
    if (operation->due_ns > skv_now_ns())
        sleep_until(operation->due_ns);
    while (hold && access(hold, F_OK) == 0)
        sleep_until(skv_now_ns() + 1000000);
    if (operation->src)
        memcpy(operation->dst, operation->src, operation->bytes);
    else
        skv_gate_store(operation->dst, operation->value);
}

static void *run(void *argument)
{
    struct host_stream *host = argument;
    pthread_mutex_lock(&host->lock);
    for (;;) {
        uint64_t done = atomic_load_explicit(&host->done, memory_order_relaxed); /* own writes */
        if (done == host->queued) {
            if (host->closing)
                break;
            pthread_cond_wait(&host->work, &host->lock);
            continue;
        }
        struct operation operation = host->queue[done & (host->capacity - 1)];
        pthread_mutex_unlock(&host->lock);
        execute(&operation, host->hold);
        pthread_mutex_lock(&host->lock);
        /* Release: whoever sees the count, in skv_host_stream_query, sees the bytes. */
        atomic_store_explicit(&host->done, done + 1, memory_order_release);
        if (host->waiters)
            pthread_cond_broadcast(&host->progress);
    }
    pthread_mutex_unlock(&host->lock);
    return NULL;
}

/* Makes room for `count` more. Under lock. */
static int reserve(struct host_stream *host, uint64_t count)
{
    uint64_t done = atomic_load_explicit(&host->done, memory_order_relaxed); /* under lock */
    uint64_t capacity = host->capacity;
    while (capacity < host->queued - done + count)
        capacity *= 2;
    if (capacity == host->capacity)
        return 0;
    struct operation *queue = malloc(capacity * sizeof *queue);
    if (!queue)
        return SKV_ENOMEM;
    for (uint64_t i = done; i < host->queued; i++)
        queue[i & (capacity - 1)] = host->queue[i & (host->capacity - 1)];
    free(host->queue);
    host->queue = queue;
    host->capacity = capacity;
    return 0;
}

static uint64_t due(const struct host_stream *host)
{
    const struct skv_host_device *device = (struct skv_host_device *)host->stream.device;
    uint64_t delay_ns = atomic_load_explicit(&device->delay_ns, memory_order_relaxed);
    return delay_ns ? skv_now_ns() + delay_ns : 0;
}

int skv_host_stream_copy(struct skv_stream *stream, enum skv_direction direction,
                         const struct skv_copy *copies, uint32_t count)
{
    (void)direction;
    struct host_stream *host = host_of(stream);
    uint64_t due_ns = due(host);
    pthread_mutex_lock(&host->lock);
    int status = reserve(host, count);
    for (uint32_t i = 0; status == 0 && i < count; i++)
        host->queue[host->queued++ & (host->capacity - 1)] = (struct operation){
            .dst = copies[i].dst,
            .src = copies[i].src,
            .bytes = copies[i].bytes,
            .due_ns = due_ns,
        };
    pthread_cond_signal(&host->work);
    pthread_mutex_unlock(&host->lock);
    return status;
}

int skv_host_stream_write32(struct skv_stream *stream, uint32_t *word, uintptr_t on_device,
                            uint32_t value)
{
    (void)on_device;
    struct host_stream *host = host_of(stream);
    uint64_t due_ns = due(host);
    pthread_mutex_lock(&host->lock);
    int status = reserve(host, 1);
    if (status == 0)
        host->queue[host->queued++ & (host->capacity - 1)] =
            (struct operation){.dst = word, .due_ns = due_ns, .value = value};
    pthread_cond_signal(&host->work);
    pthread_mutex_unlock(&host->lock);
    return status;
}

int skv_host_stream_mark(struct skv_stream *stream, uint64_t *mark)
{
    struct host_stream *host = host_of(stream);
    pthread_mutex_lock(&host->lock);
    *mark = host->queued;
    pthread_mutex_unlock(&host->lock);
    return 0;
}

int skv_host_stream_query(struct skv_stream *stream, uint64_t mark)
{
    /* Acquire: pairs with the release in run(). */
    uint64_t done = atomic_load_explicit(&host_of(stream)->done, memory_order_acquire);
    return done >= mark ? 0 : SKV_EAGAIN;
}

int skv_host_stream_wait(struct skv_stream *stream, uint64_t mark, uint64_t deadline_ns)
{
    struct host_stream *host = host_of(stream);
    struct timespec deadline = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
                                .tv_nsec = (long)(deadline_ns % 1000000000u)};
    int error = 0;
    pthread_mutex_lock(&host->lock);
    host->waiters++;
    while (atomic_load_explicit(&host->done, memory_order_relaxed) < mark && error != ETIMEDOUT)
        error = pthread_cond_timedwait(&host->progress, &host->lock, &deadline);
    host->waiters--;
    bool reached = atomic_load_explicit(&host->done, memory_order_relaxed) >= mark;
    pthread_mutex_unlock(&host->lock);
    return reached ? 0 : SKV_ETIMEDOUT;
}

/* Signals are the program's business: the thread takes none. */
static int start_thread(struct host_stream *host)
{
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* a fault of its own; see daemon/sigbus.c */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&host->thread, NULL, run, host);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        skv_error("host device: a stream's thread: %s", strerror(error));
        return SKV_ENOMEM;
    }
    pthread_setname_np(host->thread, "skv-stream");
    return 0;
}

static void destroy(struct host_stream *host)
{
    pthread_cond_destroy(&host->progress);
    pthread_cond_destroy(&host->work);
    pthread_mutex_destroy(&host->lock);
    free(host->queue);
    free(host);
}

int skv_host_stream_open(struct skv_device *device, struct skv_stream **out)
{
    struct host_stream *host = calloc(1, sizeof *host);
    struct operation *queue = malloc(QUEUE_START * sizeof *queue);
    if (!host || !queue) {
        free(host);
        free(queue);
        return SKV_ENOMEM;
    }
    host->stream.device = device;
    host->hold = ((struct skv_host_device *)device)->hold;
    host->queue = queue;
    host->capacity = QUEUE_START;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&host->lock, NULL);
    pthread_cond_init(&host->work, &monotonic);
    pthread_cond_init(&host->progress, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int status = start_thread(host);
    if (status)
        destroy(host);
    else
        *out = &host->stream;
    return status;
}

void skv_host_stream_close(struct skv_stream *stream)
{
    struct host_stream *host = host_of(stream);
    pthread_mutex_lock(&host->lock);
    host->closing = true;
    pthread_cond_signal(&host->work);
    pthread_mutex_unlock(&host->lock);
    pthread_join(host->thread, NULL);
    assert(host->done == host->queued);
    destroy(host);
}
