/* What the copy engines give, through device.h: the peak of one large pinned copy each way, batches
 * of scattered chunks beside it, both directions at once, the layered onboard of a gated batch, a
 * read-only file map as the source, and what opening a gate costs.
 *
 * Usage: bench_copy [--device NAME] [--mib N] [--rounds N]. Every rate is the median of the rounds;
 * "of peak" divides by the one-copy rate of the same direction in the same run. */
#include "device.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

#define KIB    UINT64_C(1024)
#define MIB    (1024 * KIB)
#define ROUNDS 64
#define WINDOW (16 * MIB) /* a registration of the store's map */

static struct skv_device *device;
static struct skv_pool *pool;
static struct skv_stream *stream, *other_stream;
static char *pinned, *other_pinned;
static uint64_t total_bytes;
static unsigned rounds = 10;
static struct skv_copy *copies; /* [total_bytes / 64 KiB] */

static void must(int status, const char *what)
{
    if (status) {
        fprintf(stderr, "bench_copy: %s: %s\n", what, skv_strerror(status));
        exit(1);
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile(double *values, unsigned count, double p)
{
    qsort(values, count, sizeof *values, by_value);
    unsigned at = (unsigned)(p * (count - 1) + 0.5);
    return values[at];
}

static void finish(struct skv_stream *of)
{
    uint64_t mark;
    must(skv_stream_mark(of, &mark), "mark");
    must(skv_stream_wait(of, mark, 60000), "wait");
}

static char *device_base(void)
{
    return skv_pool_address(pool);
}

/* Fills copies[] with chunks in an order scattered over the pool, as a user's pages are. */
static uint32_t scatter(enum skv_direction direction, char *host, uint64_t chunk, uint64_t bytes)
{
    uint32_t count = (uint32_t)(bytes / chunk);
    uint64_t at = 0;
    for (uint32_t i = 0; i < count; i++) {
        at = (at + 2654435761u) % count; /* prime: visits each once when count is a power of two */
        char *on_device = device_base() + at * chunk, *on_host = host + i * chunk;
        bool up = direction == SKV_TO_DEVICE;
        copies[i] = (struct skv_copy){up ? on_device : on_host, up ? on_host : on_device, chunk};
    }
    return count;
}

struct rate {
    double gb_s;      /* 10^9 bytes a second, median */
    double submit_us; /* CPU time of the submission, a chunk */
};

static struct rate measure(enum skv_direction direction, char *host, uint64_t chunk)
{
    double seconds[ROUNDS], submit[ROUNDS];
    uint32_t count = scatter(direction, host, chunk, total_bytes);
    for (unsigned i = 0; i < rounds + 1; i++) {
        uint64_t start = skv_now_ns();
        must(skv_stream_copy(stream, direction, copies, count), "copy");
        uint64_t submitted = skv_now_ns();
        finish(stream);
        if (i == 0)
            continue; /* warm-up */
        seconds[i - 1] = (double)(skv_now_ns() - start) / 1e9;
        submit[i - 1] = (double)(submitted - start) / 1e3 / count;
    }
    return (struct rate){(double)total_bytes / percentile(seconds, rounds, 0.5) / 1e9,
                         percentile(submit, rounds, 0.5)};
}

/* Both directions at once, over two halves of the pool; each side's rate while both run. */
static double both_ways(void)
{
    double seconds[ROUNDS];
    uint64_t half = total_bytes / 2;
    struct skv_copy up = {device_base(), pinned, half};
    struct skv_copy down = {other_pinned, device_base() + half, half};
    for (unsigned i = 0; i < rounds; i++) {
        uint64_t start = skv_now_ns();
        must(skv_stream_copy(stream, SKV_TO_DEVICE, &up, 1), "copy");
        must(skv_stream_copy(other_stream, SKV_TO_HOST, &down, 1), "copy");
        finish(stream);
        finish(other_stream);
        seconds[i] = (double)(skv_now_ns() - start) / 1e9;
    }
    return 2.0 * (double)half / percentile(seconds, rounds, 0.5) / 1e9;
}

/* A gated batch: 1 MiB pages, 8 slices of 128 KiB each, layer by layer, a gate after each. */
static double by_layers(void)
{
    const uint64_t page = MIB, layers = 8, slice = page / layers;
    uint64_t pages = total_bytes / page;
    uint32_t *gates = (uint32_t *)other_pinned;
    double seconds[ROUNDS];
    for (unsigned i = 0; i < rounds + 1; i++) {
        uint64_t start = skv_now_ns();
        for (uint64_t l = 0; l < layers; l++) {
            for (uint64_t p = 0; p < pages; p++)
                copies[p] = (struct skv_copy){device_base() + (p * 7919 % pages) * page + l * slice,
                                              pinned + p * page + l * slice, slice};
            must(skv_stream_copy(stream, SKV_TO_DEVICE, copies, (uint32_t)pages), "copy");
            must(skv_stream_write32(stream, &gates[l], i + 1), "gate");
        }
        finish(stream);
        if (i)
            seconds[i - 1] = (double)(skv_now_ns() - start) / 1e9;
    }
    return (double)total_bytes / percentile(seconds, rounds, 0.5) / 1e9;
}

/* From submitting a gate's write to seeing it, on an idle stream; and a 64 KiB copy before it. */
static void gates(uint64_t copy_bytes, double *submit_us, double *p50_us, double *p99_us)
{
    enum { SAMPLES = 1000 };
    static double submit[SAMPLES], seen[SAMPLES];
    uint32_t *gate = (uint32_t *)other_pinned;
    struct skv_copy copy = {device_base(), pinned, copy_bytes};
    for (uint32_t i = 0; i < SAMPLES; i++) {
        __atomic_store_n(gate, 0, __ATOMIC_RELEASE);
        uint64_t start = skv_now_ns();
        if (copy_bytes)
            must(skv_stream_copy(stream, SKV_TO_DEVICE, &copy, 1), "copy");
        must(skv_stream_write32(stream, gate, i + 1), "gate");
        submit[i] = (double)(skv_now_ns() - start) / 1e3;
        while (__atomic_load_n(gate, __ATOMIC_ACQUIRE) == 0)
            skv_relax();
        seen[i] = (double)(skv_now_ns() - start) / 1e3;
    }
    finish(stream);
    *submit_us = percentile(submit, SAMPLES, 0.5);
    *p50_us = percentile(seen, SAMPLES, 0.5);
    *p99_us = percentile(seen, SAMPLES, 0.99);
}

/* A file in the current folder, mapped read-only and registered in windows, as the store's map. */
static void file_map(double peak)
{
    char path[] = "./bench-copy-XXXXXX";
    int file = mkstemp(path);
    if (file < 0 || unlink(path) != 0)
        return;
    for (uint64_t at = 0; at < total_bytes;) {
        ssize_t written = pwrite(file, pinned + at, total_bytes - at, (off_t)at);
        if (written <= 0) {
            printf("%-34s no room for %llu MiB here\n", "file map",
                   (unsigned long long)(total_bytes / MIB));
            close(file);
            return;
        }
        at += (uint64_t)written;
    }
    char *map = mmap(NULL, total_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    uint64_t windows = total_bytes / WINDOW, start = skv_now_ns();
    for (uint64_t i = 0; i < windows; i++)
        must(skv_host_register(device, map + i * WINDOW, WINDOW, true), "register");
    double register_ms = (double)(skv_now_ns() - start) / 1e6 / (double)windows;
    struct rate rate = measure(SKV_TO_DEVICE, map, MIB);
    printf("%-34s %7.2f GB/s  %5.1f %% of peak  %.2f us a chunk; %.2f ms to register 16 MiB\n",
           "H2D from a file map, 1 MiB chunks", rate.gb_s, 100 * rate.gb_s / peak, rate.submit_us,
           register_ms);
    for (uint64_t i = 0; i < windows; i++)
        must(skv_host_unregister(device, map + i * WINDOW), "unregister");
    munmap(map, total_bytes);
    close(file);
}

static void print_machine(void)
{
    const struct skv_device_info *info = skv_device_info(device);
    char line[256], cpu[128] = "unknown CPU", date[32];
    FILE *file = fopen("/proc/cpuinfo", "re");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %127[^\n]", cpu) == 1)
            break;
    if (file)
        fclose(file);
    time_t now = time(NULL);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    printf("bench_copy: device %s%s, %s, %ld cores, %s; %llu MiB, median of %u\n", info->name,
           info->mps ? " (MPS)" : "", cpu, sysconf(_SC_NPROCESSORS_ONLN), date,
           (unsigned long long)(total_bytes / MIB), rounds);
}

static void measure_chunks(enum skv_direction direction, double peak)
{
    const uint64_t chunks[] = {64 * KIB, 128 * KIB, MIB};
    for (int i = 0; i < 3; i++) {
        char what[64];
        struct rate rate = measure(direction, pinned, chunks[i]);
        snprintf(what, sizeof what, "%s in chunks of %llu KiB",
                 direction == SKV_TO_DEVICE ? "H2D" : "D2H", (unsigned long long)(chunks[i] / KIB));
        printf("%-34s %7.2f GB/s  %5.1f %% of peak  %.2f us a chunk\n", what, rate.gb_s,
               100 * rate.gb_s / peak, rate.submit_us);
    }
}

static void measure_all(void)
{
    double up = measure(SKV_TO_DEVICE, pinned, total_bytes).gb_s;
    double down = measure(SKV_TO_HOST, pinned, total_bytes).gb_s;
    printf("%-34s %7.2f GB/s  peak\n", "H2D pinned, one copy", up);
    printf("%-34s %7.2f GB/s  peak\n", "D2H pinned, one copy", down);
    double both = both_ways();
    printf("%-34s %7.2f GB/s  %5.1f %% of the sum of peaks\n", "both at once, in all", both,
           100 * both / (up + down));
    measure_chunks(SKV_TO_DEVICE, up);
    measure_chunks(SKV_TO_HOST, down);
    double layered = by_layers();
    printf("%-34s %7.2f GB/s  %5.1f %% of peak\n", "H2D 8 layers of 128 KiB, gated", layered,
           100 * layered / up);
    file_map(up);
    double submit, p50, p99;
    gates(0, &submit, &p50, &p99);
    printf("%-34s p50 %6.2f us, p99 %6.2f us to be seen; %.2f us to submit\n", "a gate's write",
           p50, p99, submit);
    gates(64 * KIB, &submit, &p50, &p99);
    printf("%-34s p50 %6.2f us, p99 %6.2f us to be seen; %.2f us to submit\n",
           "64 KiB H2D, then a gate's write", p50, p99, submit);
}

int main(int count, char **arguments)
{
    const char *name = "auto";
    uint64_t mib = 0;
    for (int i = 1; i < count; i += 2) {
        bool more = i + 1 < count;
        if (more && strcmp(arguments[i], "--device") == 0) {
            name = arguments[i + 1];
        } else if (more && strcmp(arguments[i], "--mib") == 0) {
            mib = strtoull(arguments[i + 1], NULL, 10);
        } else if (more && strcmp(arguments[i], "--rounds") == 0) {
            rounds = (unsigned)strtoul(arguments[i + 1], NULL, 10);
        } else {
            fprintf(stderr, "usage: bench_copy [--device auto|host|cuda[:N]] [--mib N] "
                            "[--rounds N, at most 64]\n");
            return 2;
        }
    }
    must(skv_device_open(name, &device), "device");
    bool cuda = skv_device_info(device)->kind == SKV_DEVICE_CUDA;
    total_bytes = mib ? mib * MIB / WINDOW * WINDOW : (cuda ? 512 : 128) * MIB;
    if (total_bytes == 0 || rounds == 0 || rounds > ROUNDS) {
        fprintf(stderr, "bench_copy: at least 16 MiB, 1 to %d rounds\n", ROUNDS);
        return 2;
    }
    must(skv_pool_create(device, total_bytes, MIB, SKV_EXPORT_FD, &pool), "pool");
    must(skv_pinned_alloc(device, total_bytes, (void **)&pinned), "pinned memory");
    must(skv_pinned_alloc(device, total_bytes, (void **)&other_pinned), "pinned memory");
    must(skv_stream_open(device, &stream), "stream");
    must(skv_stream_open(device, &other_stream), "stream");
    copies = calloc(total_bytes / (64 * KIB), sizeof *copies);
    if (!copies)
        return 1;
    memset(pinned, 1, total_bytes);
    memset(other_pinned, 2, total_bytes);
    print_machine();
    measure_all();
    free(copies);
    skv_stream_close(other_stream);
    skv_stream_close(stream);
    skv_pinned_free(device, other_pinned);
    skv_pinned_free(device, pinned);
    skv_pool_close(pool);
    skv_device_close(device);
    return 0;
}
