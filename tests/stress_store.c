/* Threads on one store, for ThreadSanitizer: a writer that overwrites, cuts and removes users, two
 * readers that check every byte of what their snapshot holds (in the map and by direct reads), the
 * pinner, and a thread that pauses it. Seconds by argument; 3 by default, longer until each has
 * done something. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "direct.h"
#include "hash.h"
#include "pinner.h"

#define USERS 64u
#define PAGES 12u
#define MODEL ((struct skv_id){.lo = 5})
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "stress_store: %s:%d: %s\n", __FILE__, __LINE__, #condition);          \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static const struct skv_geometry geometry = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static struct skv_store *store;
static struct skv_pinner *pinner;
static uint64_t page_bytes;
static atomic_bool over;
static _Atomic uint64_t commits, pages_in_map, pages_direct;

/* The page's content says who it is; its chain hash is made of the same numbers. */
static uint64_t hash_of(uint64_t user, uint32_t index, uint64_t generation)
{
    return user * 1000003 + index * 101 + generation * UINT64_C(0x9e3779b97f4a7c15);
}

static void *write_users(void *context)
{
    uint8_t *page = malloc(page_bytes + SKV_TRAILER_BYTES);
    (void)context;
    for (uint64_t step = 1; !atomic_load(&over); step++) {
        uint64_t user = step * 2654435761u % USERS;
        uint32_t count = step % 7 == 0 ? 0 : (uint32_t)(step % PAGES) + 1;
        uint64_t hashes[PAGES];
        CHECK(skv_store_begin(store) == 0);
        struct skv_record record = {.model = MODEL,
                                    .user = {.lo = user},
                                    .generation = step,
                                    .tokens = count * geometry.page_tokens};
        int status = 0;
        for (uint32_t index = 0; index < count && !status; index++) {
            hashes[index] = hash_of(user, index, step);
            memset(page, (int)(hashes[index] & 0xff), page_bytes);
            status = skv_store_put_page(store, &record, index, geometry.page_tokens, step,
                                        hashes[index], page);
        }
        if (status == 0)
            status = skv_store_put_record(store, &record, hashes);
        if (status == 0)
            status = skv_store_commit(store);
        if (status == SKV_ENOSPC) { /* a reader that did not get to run holds a snapshot */
            usleep(1000);
            continue;
        }
        CHECK(status == 0);
        atomic_fetch_add(&commits, 1);
    }
    free(page);
    return NULL;
}

static void check_page(const uint8_t *value, uint64_t user, uint32_t index,
                       const struct skv_record *record, uint64_t hash)
{
    CHECK(skv_page_verify(value, page_bytes, MODEL, (struct skv_id){.lo = user}, index,
                          geometry.page_tokens, hash, record->generation) == 0);
    CHECK(value[page_bytes / 2] == (uint8_t)hash);
}

static void *read_users(void *context)
{
    struct skv_reader *reader;
    struct skv_direct *direct;
    uint64_t seed = (uintptr_t)context;
    void *staging = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(staging != MAP_FAILED);
    CHECK(skv_reader_open(store, &reader) == 0);
    CHECK(skv_direct_open(skv_store_file(store), 2, &direct) == 0);
    for (uint64_t step = seed; !atomic_load(&over); step++) {
        uint64_t user = step * 40503 % USERS, hashes[PAGES];
        struct skv_record record;
        uint32_t count;
        CHECK(skv_reader_begin(reader) == 0);
        int rc = skv_reader_record(reader, MODEL, (struct skv_id){.lo = user}, &record, hashes,
                                   PAGES, &count);
        CHECK(rc == 0 || rc == SKV_ENOENT);
        for (uint32_t index = 0; rc == 0 && index < count; index++) {
            struct skv_location where;
            CHECK(hashes[index] == hash_of(user, index, record.generation));
            CHECK(skv_reader_locate(reader, MODEL, record.user, index, &where) == 0);
            bool covered = skv_pinner_covers(pinner, where.value, page_bytes + SKV_TRAILER_BYTES);
            if (covered || index % 4) {
                check_page(where.value, user, index, &record, hashes[index]);
                if (covered && !skv_pinner_verified(pinner, where.value))
                    skv_pinner_mark(pinner, where.value);
                atomic_fetch_add(&pages_in_map, 1);
                continue;
            }
            struct skv_direct_read read = {
                .offset = where.extent_offset, .bytes = where.extent_bytes, .memory = staging};
            CHECK(skv_direct_submit(direct, &read) == 0);
            CHECK(skv_direct_poll(direct, true) == &read && read.status == 0);
            check_page((uint8_t *)staging + where.value_offset, user, index, &record,
                       hashes[index]);
            atomic_fetch_add(&pages_direct, 1);
        }
        skv_reader_end(reader);
    }
    skv_direct_close(direct);
    skv_reader_close(reader);
    munmap(staging, 1 << 20);
    return NULL;
}

static void *pause_pinner(void *context)
{
    (void)context;
    while (!atomic_load(&over)) {
        uint64_t used, limit;
        skv_pinner_pause(pinner, true);
        uint64_t bytes = skv_pinner_bytes(pinner);
        usleep(3000);
        CHECK(skv_pinner_bytes(pinner) == bytes);
        skv_pinner_pause(pinner, false);
        skv_store_usage(store, &used, &limit);
        CHECK(used <= limit);
        usleep(2000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const unsigned seconds = argc > 1 ? (unsigned)atoi(argv[1]) : 3;
    char path[256];
    snprintf(path, sizeof path, "%s/sidekv-stress-XXXXXX",
             getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    CHECK(mkdtemp(path));
    page_bytes = skv_page_bytes(&geometry);
    struct skv_store_options options = {
        .path = path, .geometry = geometry, .map_bytes = UINT64_C(128) << 20};
    struct skv_device *device;
    CHECK(skv_store_open(&options, &store) == 0);
    CHECK(skv_device_open("host", &device) == 0);
    CHECK(skv_pinner_start(store, device, options.map_bytes, &pinner) == 0);
    pthread_t threads[4];
    CHECK(pthread_create(&threads[0], NULL, write_users, NULL) == 0);
    CHECK(pthread_create(&threads[1], NULL, read_users, (void *)1) == 0);
    CHECK(pthread_create(&threads[2], NULL, read_users, (void *)1000) == 0);
    CHECK(pthread_create(&threads[3], NULL, pause_pinner, NULL) == 0);
    sleep(seconds);
    while (!commits || !pages_in_map || !pages_direct) /* or it hangs */
        sleep(1);
    atomic_store(&over, true);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    printf("stress_store: %llu commits, %llu pages checked in the map, %llu by direct reads, "
           "%llu MiB registered\n",
           (unsigned long long)commits, (unsigned long long)pages_in_map,
           (unsigned long long)pages_direct, (unsigned long long)(skv_pinner_bytes(pinner) >> 20));
    skv_pinner_stop(pinner);
    skv_device_close(device);
    skv_store_close(store);
    char command[300];
    snprintf(command, sizeof command, "rm -r %s", path);
    return system(command) == 0 ? 0 : 1;
}
