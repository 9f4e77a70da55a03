/* Several threads on one device: two copy through streams of their own and check what arrives, one
 * registers and unregisters memory all the while, and gates pass between them. A plain program, for
 * ThreadSanitizer. Usage: stress_device [SECONDS [DEVICE]]; the default is 2 host. */
#include "device.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "clock.h"

#define PAGE    (UINT64_C(64) << 10)
#define PAGES   64u
#define WORKERS 2u

static struct skv_device *device;
static struct skv_pool *pool;
static atomic_bool stop;
static _Atomic uint64_t rounds, registrations;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "stress_device, line %d: %s\n", __LINE__, #condition);                 \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct worker {
    pthread_t thread;
    uint32_t number;
};

/* Up, down, gate, look: over pages of its own, from one pinned half to the other. */
static void *copy_and_look(void *argument)
{
    const struct worker *worker = argument;
    struct skv_stream *stream;
    char *pinned;
    uint32_t *gate;
    char *base = (char *)skv_pool_address(pool) + worker->number * PAGES * PAGE;
    CHECK(skv_stream_open(device, &stream) == 0);
    CHECK(skv_pinned_alloc(device, 2 * PAGES * PAGE, (void **)&pinned) == 0);
    CHECK(skv_pinned_alloc(device, 4096, (void **)&gate) == 0);
    for (uint32_t round = 1; !atomic_load(&stop); round++) {
        struct skv_copy up[PAGES], down[PAGES];
        uint32_t count = 1 + round % PAGES;
        uint64_t mark;
        for (uint32_t i = 0; i < count; i++) {
            memset(pinned + i * PAGE, (int)(round + i), PAGE);
            up[i] = (struct skv_copy){base + i * PAGE, pinned + i * PAGE, PAGE};
            down[i] = (struct skv_copy){pinned + (PAGES + i) * PAGE, base + i * PAGE, PAGE};
        }
        __atomic_store_n(gate, 0, __ATOMIC_RELAXED); /* nothing is queued */
        CHECK(skv_stream_copy(stream, SKV_TO_DEVICE, up, count) == 0);
        CHECK(skv_stream_copy(stream, SKV_TO_HOST, down, count) == 0);
        CHECK(skv_stream_write32(stream, gate, round) == 0);
        CHECK(skv_stream_mark(stream, &mark) == 0);
        CHECK(skv_gate_wait(gate, 60000) == 0);
        for (uint32_t i = 0; i < count; i++)
            CHECK(memcmp(pinned + i * PAGE, pinned + (PAGES + i) * PAGE, PAGE) == 0);
        CHECK(skv_stream_wait(stream, mark, 60000) == 0);
        atomic_fetch_add(&rounds, 1);
    }
    skv_stream_close(stream);
    skv_pinned_free(device, gate);
    skv_pinned_free(device, pinned);
    return NULL;
}

static void *register_windows(void *unused)
{
    (void)unused;
    const uint64_t window = 256 << 10, windows = 8;
    char *map =
        mmap(NULL, windows * window, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED);
    while (!atomic_load(&stop)) {
        for (uint64_t i = 0; i < windows; i++)
            CHECK(skv_host_register(device, map + i * window, window, i % 2) == 0);
        for (uint64_t i = 0; i < windows; i++)
            CHECK(skv_host_unregister(device, map + i * window) == 0);
        atomic_fetch_add(&registrations, windows);
    }
    munmap(map, windows * window);
    return NULL;
}

int main(int count, char **arguments)
{
    double seconds = count > 1 ? atof(arguments[1]) : 2;
    const char *name = count > 2 ? arguments[2] : "host";
    struct worker workers[WORKERS];
    pthread_t registrar;
    CHECK(skv_device_open(name, &device) == 0);
    CHECK(skv_pool_create(device, WORKERS * PAGES * PAGE, PAGE, SKV_EXPORT_FD, &pool) == 0);
    for (uint32_t i = 0; i < WORKERS; i++) {
        workers[i].number = i;
        CHECK(pthread_create(&workers[i].thread, NULL, copy_and_look, &workers[i]) == 0);
    }
    CHECK(pthread_create(&registrar, NULL, register_windows, NULL) == 0);
    uint64_t end = skv_now_ns() + (uint64_t)(seconds * 1e9);
    struct timespec nap = {.tv_nsec = 10000000};
    while (skv_now_ns() < end)
        nanosleep(&nap, NULL);
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < WORKERS; i++)
        pthread_join(workers[i].thread, NULL);
    pthread_join(registrar, NULL);
    skv_pool_close(pool);
    skv_device_close(device);
    printf("stress_device: %s, %llu rounds of copies checked, %llu registrations\n", name,
           (unsigned long long)rounds, (unsigned long long)registrations);
    return 0;
}
