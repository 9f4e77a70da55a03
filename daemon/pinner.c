/* The pinner, see pinner.h: one thread that walks the map's windows in file order.
 *
 * The happy path, per window: wait until the store has used all of it (the last one: until the
 * store has stopped growing for a second, holes cost a stall), fault it in, wait until nobody
 * pauses, register it, publish it. Failure: a window that cannot be faulted in (a bad disk block)
 * is left out; a registration refused (the locked-memory limit, a device that cannot) ends the walk
 * with one warning: what is registered stays. */
#include "pinner.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "log.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

#define BLOCK_BYTES  UINT64_C(4096) /* LMDB's pages: a value begins in one of its own */
#define WINDOW_WORDS (SKV_WINDOW_BYTES / BLOCK_BYTES / 64)
#define POLL_NS      100000000L
#define STABLE_POLLS 10u /* a second without growth: the last window is as full as it gets */

_Static_assert(SKV_WINDOW_BYTES % (BLOCK_BYTES * 64) == 0, "a window's bits fill whole words");

struct skv_pinner {
    struct skv_store *store;
    struct skv_device *device;
    const uint8_t *map;
    uint64_t map_bytes, pin_bytes;
    uint64_t windows; /* of the map; the last one may be short */

    /* Written by the pinner thread, released after the window's bits were cleared; the copy thread
     * and the writer acquire it in covers(). */
    _Atomic uint8_t *registered; /* [windows] */
    /* Set by the copy thread and the writer (release: after they verified or put), read by the copy
     * thread (acquire). */
    _Atomic uint64_t *verified; /* [windows * WINDOW_WORDS], mapped without reserve */
    _Atomic uint64_t bytes;     /* registered; a statistic */

    pthread_t thread;
    pthread_mutex_t lock; /* held over a registration, which looks at pauses first */
    pthread_cond_t changed;
    /* Raised before the lock is asked for, so that the thread, which may take it again sooner than
     * a pauser does, begins no second registration. */
    _Atomic uint32_t pauses;
    bool stopping; /* under the lock */
};

static uint64_t window_bytes(const struct skv_pinner *pinner, uint64_t window)
{
    uint64_t rest = pinner->map_bytes - window * SKV_WINDOW_BYTES;
    return rest < SKV_WINDOW_BYTES ? rest : SKV_WINDOW_BYTES;
}

static void *window_start(const struct skv_pinner *pinner, uint64_t window)
{
    return (void *)(uintptr_t)(pinner->map + window * SKV_WINDOW_BYTES);
}

/* ---- the thread ---- */

/* Sleeps until the next poll, a change of the pauses, or the end. */
static void doze(struct skv_pinner *pinner)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += POLL_NS;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    pthread_cond_timedwait(&pinner->changed, &pinner->lock, &until);
}

/* Waits until this window is worth registering and nobody pauses; false: the end. Lock held. */
static bool wait_for(struct skv_pinner *pinner, uint64_t window)
{
    const uint64_t start = window * SKV_WINDOW_BYTES;
    const uint64_t end = start + window_bytes(pinner, window);
    uint64_t seen = 0;
    for (uint32_t stable = 0; !pinner->stopping;) {
        uint64_t used = skv_store_high_water(pinner->store);
        bool ready = used >= end || (used > start && stable >= STABLE_POLLS);
        if (ready && pinner->pauses == 0)
            return true;
        stable = used == seen ? stable + 1 : 0;
        seen = used;
        doze(pinner);
    }
    return false;
}

/* Brings a window's pages in, in large reads, without the device. */
static bool fault_in(struct skv_pinner *pinner, uint64_t window)
{
    uint8_t *start = window_start(pinner, window);
    uint64_t bytes = window_bytes(pinner, window);
    madvise(start, bytes, MADV_WILLNEED); /* the map is without read-ahead otherwise */
    int rc;
    do
        rc = madvise(start, bytes, MADV_POPULATE_READ);
    while (rc < 0 && errno == EINTR);
    if (rc == 0)
        return true;
    if (errno == EINVAL) { /* an older kernel: touch */
        for (uint64_t at = 0; at < bytes; at += BLOCK_BYTES)
            (void)*(volatile uint8_t *)(start + at);
        return true;
    }
    skv_warn("pinner: window %" PRIu64 " of the store cannot be read in place: %s", window,
             strerror(errno));
    return false;
}

/* Lock held, nobody pauses. */
static int publish(struct skv_pinner *pinner, uint64_t window)
{
    uint64_t bytes = window_bytes(pinner, window);
    int rc = skv_host_register(pinner->device, window_start(pinner, window), bytes, true);
    if (rc)
        return rc;
    for (uint64_t word = 0; word < WINDOW_WORDS; word++)
        atomic_store_explicit(&pinner->verified[window * WINDOW_WORDS + word], 0,
                              memory_order_relaxed);
    atomic_store_explicit(&pinner->registered[window], 1, memory_order_release);
    atomic_fetch_add_explicit(&pinner->bytes, bytes, memory_order_relaxed);
    return 0;
}

static void say_refused(const struct skv_pinner *pinner, int rc)
{
    uint64_t mib = atomic_load_explicit(&pinner->bytes, memory_order_relaxed) >> 20;
    if (rc == SKV_ENOMEM)
        skv_warn("pinner: no more of the store can be locked in memory, %" PRIu64
                 " MiB are: raise the locked-memory limit (ulimit -l, LimitMEMLOCK=infinity) or "
                 "lower --pin-bytes; the rest is read through staging",
                 mib);
    else
        skv_warn("pinner: the device does not register more of the store's map (%s), %" PRIu64
                 " MiB are; the rest is read through staging",
                 skv_strerror(rc), mib);
}

static void *run(void *context)
{
    struct skv_pinner *pinner = context;
    uint64_t pinned = 0;
    int rc = 0;
    pthread_mutex_lock(&pinner->lock);
    for (uint64_t window = 0; rc == 0 && window < pinner->windows; window++) {
        if (pinned + window_bytes(pinner, window) > pinner->pin_bytes)
            break;
        if (!wait_for(pinner, window))
            break;
        pthread_mutex_unlock(&pinner->lock);
        bool present = fault_in(pinner, window);
        pthread_mutex_lock(&pinner->lock);
        while (pinner->pauses && !pinner->stopping)
            pthread_cond_wait(&pinner->changed, &pinner->lock);
        if (pinner->stopping)
            break;
        if (!present)
            continue;
        rc = publish(pinner, window);
        if (rc)
            say_refused(pinner, rc);
        else
            pinned += window_bytes(pinner, window);
    }
    pthread_mutex_unlock(&pinner->lock);
    return NULL;
}

/* ---- its life ---- */

static void release(struct skv_pinner *pinner)
{
    if (pinner->verified)
        munmap((void *)pinner->verified, pinner->windows * WINDOW_WORDS * sizeof(uint64_t));
    free((void *)pinner->registered);
    pthread_cond_destroy(&pinner->changed);
    pthread_mutex_destroy(&pinner->lock);
    free(pinner);
}

int skv_pinner_start(struct skv_store *store, struct skv_device *device, uint64_t pin_bytes,
                     struct skv_pinner **out)
{
    struct skv_pinner *pinner = calloc(1, sizeof *pinner);
    if (!pinner)
        return SKV_ENOMEM;
    pinner->store = store;
    pinner->device = device;
    pinner->pin_bytes = pin_bytes;
    pinner->map = skv_store_map(store, &pinner->map_bytes);
    pinner->windows = (pinner->map_bytes + SKV_WINDOW_BYTES - 1) / SKV_WINDOW_BYTES;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&pinner->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&pinner->lock, NULL);
    pinner->registered = calloc(pinner->windows, sizeof *pinner->registered);
    void *bits = mmap(NULL, pinner->windows * WINDOW_WORDS * sizeof(uint64_t),
                      PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pinner->verified = bits == MAP_FAILED ? NULL : bits;
    if (!pinner->registered || !pinner->verified ||
        pthread_create(&pinner->thread, NULL, run, pinner) != 0) {
        skv_error("pinner: no memory or no thread");
        release(pinner);
        return SKV_ENOMEM;
    }
    *out = pinner;
    return 0;
}

void skv_pinner_stop(struct skv_pinner *pinner)
{
    if (!pinner)
        return;
    pthread_mutex_lock(&pinner->lock);
    pinner->stopping = true;
    pthread_cond_broadcast(&pinner->changed);
    pthread_mutex_unlock(&pinner->lock);
    pthread_join(pinner->thread, NULL);
    for (uint64_t window = 0; window < pinner->windows; window++)
        if (pinner->registered[window])
            skv_host_unregister(pinner->device, window_start(pinner, window));
    release(pinner);
}

void skv_pinner_pause(struct skv_pinner *pinner, bool pause)
{
    if (pause)
        atomic_fetch_add(&pinner->pauses, 1);
    pthread_mutex_lock(&pinner->lock); /* waits for a registration under way */
    if (!pause) {
        uint32_t before = atomic_fetch_sub(&pinner->pauses, 1);
        assert(before > 0);
        if (before == 1)
            pthread_cond_broadcast(&pinner->changed);
    }
    pthread_mutex_unlock(&pinner->lock);
}

/* ---- asking and marking ---- */

bool skv_pinner_covers(const struct skv_pinner *pinner, const void *memory, uint64_t bytes)
{
    uint64_t start = (uintptr_t)memory - (uintptr_t)pinner->map; /* huge when before the map */
    if (bytes == 0 || start >= pinner->map_bytes || bytes > pinner->map_bytes - start)
        return false;
    uint64_t last = (start + bytes - 1) / SKV_WINDOW_BYTES;
    for (uint64_t window = start / SKV_WINDOW_BYTES; window <= last; window++)
        if (!atomic_load_explicit(&pinner->registered[window], memory_order_acquire))
            return false;
    return true;
}

/* The bit of the value that begins here. */
static _Atomic uint64_t *bit_of(const struct skv_pinner *pinner, const void *value, uint64_t *mask)
{
    uint64_t block = ((uintptr_t)value - (uintptr_t)pinner->map) / BLOCK_BYTES;
    assert(block < pinner->map_bytes / BLOCK_BYTES);
    *mask = UINT64_C(1) << block % 64;
    return &pinner->verified[block / 64];
}

bool skv_pinner_verified(const struct skv_pinner *pinner, const void *value)
{
    uint64_t mask;
    _Atomic uint64_t *word = bit_of(pinner, value, &mask);
    return atomic_load_explicit(word, memory_order_acquire) & mask;
}

void skv_pinner_mark(struct skv_pinner *pinner, const void *value)
{
    uint64_t mask;
    _Atomic uint64_t *word = bit_of(pinner, value, &mask);
    atomic_fetch_or_explicit(word, mask, memory_order_release);
}

uint64_t skv_pinner_bytes(const struct skv_pinner *pinner)
{
    return atomic_load_explicit(&pinner->bytes, memory_order_relaxed);
}
