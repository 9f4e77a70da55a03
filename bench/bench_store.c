/* The store's speed, and what bounds it.
 *
 *   bench_store [--path DIR] [--mib N] [--sustained GIB [--batch PAGES]] [--quick]
 *
 * For each page size, durability and pages a transaction: N MiB put and committed into a fresh
 * store (fill), then again over random users (overwrite); GB/s over both, and the time of one
 * transaction. Then locating, verifying and cold direct reads. Beside them the bounds of the same
 * run: memcpy, checksum, write(2) into the page cache, write(2) + fdatasync. --sustained writes
 * that many GiB of 1 MiB pages, 16 a transaction, under `process`: the figure of issue "sustained
 * into the store". */
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "clock.h"
#include "direct.h"
#include "hash.h"
#include "store.h"

#define MIB          (UINT64_C(1) << 20)
#define SOURCE_PAGES 64u /* as staging would: the source is not in the cache */
#define USER_PAGES   64u
#define MAX_SAMPLES  65536u
#define DIRECT_DEPTH 16u
#define MODEL        ((struct skv_id){.lo = 1})

struct shape {
    const char *name;
    struct skv_geometry geometry;
};
static const struct shape shapes[] = {
    {"32 KiB", {.layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32}},
    {"128 KiB", {.layers = 4, .heads = 2, .head_dim = 128, .page_tokens = 32}},
    {"1 MiB", {.layers = 8, .heads = 4, .head_dim = 256, .page_tokens = 32}},
};
#define SHAPES (sizeof shapes / sizeof *shapes)

static const char *base;
static uint8_t *source; /* [SOURCE_PAGES][page + trailer] */
static uint64_t samples[MAX_SAMPLES];

static void die(const char *what)
{
    fprintf(stderr, "bench_store: %s failed\n", what);
    exit(1);
}

static double gbs(uint64_t bytes, uint64_t ns)
{
    return (double)bytes / (double)(ns ? ns : 1);
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static double percentile_us(uint32_t count, uint32_t percent)
{
    return (double)samples[(uint64_t)(count - 1) * percent / 100] / 1000;
}

/* ---- the store under test ---- */

struct run {
    struct skv_store *store;
    struct skv_geometry geometry;
    uint64_t page_bytes;
    uint32_t users;
    char path[512];
};

static void clear(const char *path)
{
    static const char *const names[] = {"data.mdb", "lock.mdb", "sidekv.store", ""};
    for (int i = 0; i < 4; i++) {
        char file[600];
        snprintf(file, sizeof file, "%s/%s", path, names[i]);
        if (remove(file) < 0 && i == 3)
            die("removing the store");
    }
}

static struct run open_run(const struct shape *shape, enum skv_durability durability,
                           uint64_t bytes)
{
    struct run run = {.geometry = shape->geometry, .page_bytes = skv_page_bytes(&shape->geometry)};
    snprintf(run.path, sizeof run.path, "%s/sidekv-bench-%d", base, (int)getpid());
    uint64_t pages = bytes / run.page_bytes;
    run.users = (uint32_t)((pages + USER_PAGES - 1) / USER_PAGES);
    struct skv_store_options options = {.path = run.path,
                                        .geometry = shape->geometry,
                                        .durability = durability,
                                        .map_bytes = bytes * 3 / 2 + 256 * MIB};
    if (skv_store_open(&options, &run.store))
        die("opening a store");
    return run;
}

static void close_run(struct run *run)
{
    skv_store_close(run->store);
    clear(run->path);
}

static uint64_t hashes[USER_PAGES];

static void put(struct run *run, uint32_t user, uint32_t first, uint32_t count)
{
    struct skv_record record = {.model = MODEL,
                                .user = {.lo = user},
                                .generation = 1,
                                .tokens = (first + count) * run->geometry.page_tokens};
    if (skv_store_begin(run->store))
        die("begin");
    for (uint32_t index = first; index < first + count; index++) {
        uint8_t *page = source + (uint64_t)((user * USER_PAGES + index) % SOURCE_PAGES) *
                                     (run->page_bytes + SKV_TRAILER_BYTES);
        if (skv_store_put_page(run->store, &record, index, run->geometry.page_tokens, 1,
                               hashes[index], page))
            die("put");
    }
    if (skv_store_put_record(run->store, &record, hashes) || skv_store_commit(run->store))
        die("commit");
}

/* Every user once, `batch` pages a transaction; in order, or (overwrite) shuffled. Bytes put. */
static uint64_t pass(struct run *run, uint32_t batch, bool shuffled, uint32_t *sampled)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < run->users; i++) {
        uint32_t user = shuffled ? (uint32_t)((uint64_t)i * 2654435761u % run->users) : i;
        for (uint32_t first = 0; first < USER_PAGES; first += batch) {
            uint64_t start = skv_now_ns();
            put(run, user, first, batch);
            uint64_t ns = skv_now_ns() - start;
            if (*sampled < MAX_SAMPLES)
                samples[(*sampled)++] = ns;
            bytes += batch * run->page_bytes;
        }
    }
    return bytes;
}

static void bench_puts(const struct shape *shape, enum skv_durability durability, uint32_t batch,
                       uint64_t bytes)
{
    struct run run = open_run(shape, durability, bytes);
    uint32_t count = 0;
    uint64_t start = skv_now_ns();
    uint64_t filled = pass(&run, batch, false, &count);
    uint64_t fill_ns = skv_now_ns() - start;
    count = 0;
    start = skv_now_ns();
    pass(&run, batch, true, &count);
    uint64_t over_ns = skv_now_ns() - start, used, limit;
    qsort(samples, count, sizeof *samples, by_value);
    skv_store_usage(run.store, &used, &limit);
    printf("%-8s %-8s %3u %10.2f %10.2f %10.0f %10.0f %9.3f\n", shape->name,
           durability == SKV_POWER ? "power" : "process", batch, gbs(filled, fill_ns),
           gbs(filled, over_ns), percentile_us(count, 50), percentile_us(count, 99),
           (double)skv_store_high_water(run.store) / (double)(used ? used : 1));
    close_run(&run);
}

static void bench_reads(const struct shape *shape, uint64_t bytes)
{
    struct run run = open_run(shape, SKV_PROCESS, bytes);
    uint32_t count = 0, pages = run.users * USER_PAGES;
    pass(&run, 16, false, &count);
    struct skv_reader *reader;
    struct skv_location where;
    if (skv_reader_open(run.store, &reader) || skv_reader_begin(reader))
        die("reader");
    uint64_t start = skv_now_ns(), sum = 0;
    for (uint32_t i = 0; i < pages; i++) {
        uint32_t at = (uint32_t)((uint64_t)i * 2654435761u % pages);
        if (skv_reader_locate(reader, MODEL, (struct skv_id){.lo = at / USER_PAGES},
                              at % USER_PAGES, &where))
            die("locate");
        sum += where.extent_offset;
    }
    double locate_ns = (double)(skv_now_ns() - start) / pages;
    start = skv_now_ns();
    for (uint32_t i = 0; i < pages; i++) {
        struct skv_id user = {.lo = i / USER_PAGES};
        if (skv_reader_locate(reader, MODEL, user, i % USER_PAGES, &where) ||
            skv_page_verify(where.value, run.page_bytes, MODEL, user, i % USER_PAGES,
                            run.geometry.page_tokens, hashes[i % USER_PAGES], 1))
            die("verify");
    }
    double verify = gbs(pages * run.page_bytes, skv_now_ns() - start);

    struct skv_direct *direct;
    uint64_t map_bytes, cold_bytes = 0;
    const uint8_t *map = skv_store_map(run.store, &map_bytes);
    char file[600];
    snprintf(file, sizeof file, "%s/data.mdb", run.path);
    int fd = open(file, O_RDWR);
    fsync(fd);
    madvise((void *)(uintptr_t)map, map_bytes, MADV_DONTNEED);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    if (skv_direct_open(skv_store_file(run.store), DIRECT_DEPTH, &direct))
        die("direct");
    struct skv_direct_read reads[DIRECT_DEPTH], *done;
    uint32_t next = 0, free_reads = DIRECT_DEPTH, stack[DIRECT_DEPTH];
    for (uint32_t i = 0; i < DIRECT_DEPTH; i++) {
        stack[i] = i;
        reads[i].memory = aligned_alloc(4096, where.extent_bytes);
    }
    start = skv_now_ns();
    while (next < pages || free_reads < DIRECT_DEPTH) {
        while (next < pages && free_reads) {
            uint32_t at = (uint32_t)((uint64_t)next++ * 2654435761u % pages);
            uint32_t slot = stack[--free_reads];
            skv_reader_locate(reader, MODEL, (struct skv_id){.lo = at / USER_PAGES},
                              at % USER_PAGES, &where);
            reads[slot].offset = where.extent_offset;
            reads[slot].bytes = where.extent_bytes;
            reads[slot].tag = slot;
            if (skv_direct_submit(direct, &reads[slot]))
                die("submit");
        }
        done = skv_direct_poll(direct, true);
        if (!done || done->status)
            die("direct read");
        cold_bytes += run.page_bytes;
        stack[free_reads++] = (uint32_t)done->tag;
    }
    uint64_t cold_ns = skv_now_ns() - start;
    printf("%-8s locate %6.0f ns   verify %6.2f GB/s   cold direct reads, depth %u: %6.2f GB/s\n",
           shape->name, locate_ns, verify, DIRECT_DEPTH, gbs(cold_bytes, cold_ns));
    for (uint32_t i = 0; i < DIRECT_DEPTH; i++)
        free(reads[i].memory);
    skv_direct_close(direct);
    skv_reader_close(reader);
    close_run(&run);
    if (sum == 1)
        printf("\n");
}

/* ---- bounds ---- */

static double raw_write(uint64_t bytes, bool sync)
{
    char file[600];
    snprintf(file, sizeof file, "%s/sidekv-bench-raw-%d", base, (int)getpid());
    int fd = open(file, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0)
        die("the raw file");
    uint64_t start = skv_now_ns();
    for (uint64_t at = 0; at < bytes; at += MIB) {
        if (pwrite(fd, source + at % (SOURCE_PAGES * MIB), MIB, (off_t)at) != (ssize_t)MIB)
            die("a raw write");
        if (sync && at % (16 * MIB) == 15 * MIB)
            fdatasync(fd);
    }
    uint64_t ns = skv_now_ns() - start;
    close(fd);
    unlink(file);
    return gbs(bytes, ns);
}

static void bench_bounds(uint64_t bytes)
{
    uint8_t *target = malloc(SOURCE_PAGES * MIB);
    memset(target, 1, SOURCE_PAGES * MIB);
    uint64_t start = skv_now_ns(), sum = 0;
    for (int i = 0; i < 8; i++)
        memcpy(target, source, SOURCE_PAGES * MIB);
    double copy = gbs(8 * SOURCE_PAGES * MIB, skv_now_ns() - start);
    start = skv_now_ns();
    for (uint32_t i = 0; i < 8 * SOURCE_PAGES; i++)
        sum += skv_checksum(source + i % SOURCE_PAGES * MIB, MIB);
    double check = gbs(8 * SOURCE_PAGES * MIB, skv_now_ns() - start);
    start = skv_now_ns();
    for (int i = 0; i < 8; i++) /* of half of each page: 16 of 32 tokens */
        for (uint64_t at = 0; at < SOURCE_PAGES * MIB; at += 16384)
            memset(target + at, 0, 8192);
    double zero = gbs(4 * SOURCE_PAGES * MIB, skv_now_ns() - start);
    start = skv_now_ns();
    for (uint32_t i = 0; i < 8 * SOURCE_PAGES; i++)
        sum += skv_checksum_copy(target, source + i % SOURCE_PAGES * MIB, MIB);
    double both = gbs(8 * SOURCE_PAGES * MIB, skv_now_ns() - start);
    printf("bounds: memcpy %.2f, checksum %.2f, both in one pass %.2f, zeroing %.2f, write(2) "
           "%.2f, write(2) + fdatasync "
           "per 16 MiB %.2f GB/s%s\n",
           copy, check, both, zero, raw_write(bytes, false), raw_write(bytes, true),
           sum == 1 ? " " : "");
    free(target);
}

static void print_machine(void)
{
    struct utsname name;
    char line[256], cpu[256] = "unknown CPU";
    uname(&name);
    FILE *in = fopen("/proc/cpuinfo", "r");
    while (in && fgets(line, sizeof line, in))
        if (sscanf(line, "model name : %255[^\n]", cpu) == 1)
            break;
    if (in)
        fclose(in);
    printf("machine: %s, %ld cores, Linux %s; store under %s\n", cpu, sysconf(_SC_NPROCESSORS_ONLN),
           name.release, base);
}

static double seconds(struct timeval t)
{
    return (double)t.tv_sec + (double)t.tv_usec / 1e6;
}

static void bench_sustained(uint64_t bytes, uint32_t batch)
{
    struct run run = open_run(&shapes[SHAPES - 1], SKV_PROCESS, bytes);
    for (int round = 0; round < 2; round++) {
        uint32_t count = 0;
        struct rusage before, after;
        getrusage(RUSAGE_SELF, &before);
        uint64_t start = skv_now_ns();
        uint64_t put_bytes = pass(&run, batch, round == 1, &count);
        uint64_t ns = skv_now_ns() - start;
        getrusage(RUSAGE_SELF, &after);
        qsort(samples, count, sizeof *samples, by_value);
        printf("sustained, %s: %.1f GiB of 1 MiB pages, %u a transaction, checksummed: %.2f GB/s; "
               "transaction p50 %.0f us, p99 %.0f us, worst %.0f us\n",
               round ? "overwrite" : "fill", (double)put_bytes / (1024 * MIB), batch,
               gbs(put_bytes, ns), percentile_us(count, 50), percentile_us(count, 99),
               percentile_us(count, 100));
        printf("    of %.1f s: %.1f user, %.1f system; %.0f faults a GiB\n", (double)ns / 1e9,
               seconds(after.ru_utime) - seconds(before.ru_utime),
               seconds(after.ru_stime) - seconds(before.ru_stime),
               (double)(after.ru_minflt - before.ru_minflt) * (1024.0 * MIB) / (double)put_bytes);
        fflush(stdout);
    }
    close_run(&run);
}

struct plan {
    uint64_t bytes, sustained;
    uint32_t batch; /* pages a transaction, when sustained */
    bool quick;
};

/* Not in the main thread: malloc treats others differently, and the daemon's writer is one. */
static void *bench(void *context)
{
    static const uint32_t batches[] = {1, 4, 16, 64};
    const struct plan *plan = context;
    const uint64_t bytes = plan->bytes, sustained = plan->sustained;
    print_machine();
    bench_bounds(bytes);
    if (sustained) {
        bench_sustained(sustained, plan->batch);
        bench_bounds(sustained < bytes ? sustained : bytes);
        return NULL;
    }
    printf("%llu MiB a run; high/used: the file's growth over what is live\n",
           (unsigned long long)(bytes / MIB));
    printf("%-8s %-8s %3s %10s %10s %10s %10s %9s\n", "page", "durab.", "txn", "fill GB/s",
           "over GB/s", "p50 us", "p99 us", "high/used");
    for (unsigned shape = 0; shape < SHAPES; shape++)
        for (int power = 0; power < 2; power++)
            for (unsigned b = 0; b < 4; b++)
                if (!plan->quick || batches[b] == 16) {
                    bench_puts(&shapes[shape], power ? SKV_POWER : SKV_PROCESS, batches[b], bytes);
                    fflush(stdout);
                }
    for (unsigned shape = 0; shape < SHAPES; shape++)
        bench_reads(&shapes[shape], bytes);
    return NULL;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"path", required_argument, NULL, 'p'},      {"mib", required_argument, NULL, 'm'},
        {"sustained", required_argument, NULL, 's'}, {"batch", required_argument, NULL, 'b'},
        {"quick", no_argument, NULL, 'q'},           {NULL, 0, NULL, 0}};
    struct plan plan = {.bytes = 512 * MIB, .batch = 1};
    base = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c == 'p')
            base = optarg;
        else if (c == 'm')
            plan.bytes = strtoull(optarg, NULL, 10) * MIB;
        else if (c == 's')
            plan.sustained = strtoull(optarg, NULL, 10) * 1024 * MIB;
        else if (c == 'b')
            plan.batch = (uint32_t)strtoul(optarg, NULL, 10);
        else if (c == 'q')
            plan.quick = true;
        else
            return 2;
    }
    source = malloc(SOURCE_PAGES * (MIB + SKV_TRAILER_BYTES));
    for (uint64_t i = 0; i < SOURCE_PAGES * MIB / 8; i++)
        ((uint64_t *)source)[i] = i * UINT64_C(0x9e3779b97f4a7c15);
    pthread_t thread;
    if (pthread_create(&thread, NULL, bench, &plan) != 0)
        die("a thread");
    pthread_join(thread, NULL);
    return 0;
}
