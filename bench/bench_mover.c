/* What the mover makes of the machine: onboard of a batch, layer by layer, against the peak of one
 * pinned copy in the same run; offload into staging and into the store. The pages are the benchmark
 * model's: 8 layers of 128 KiB, 32 tokens, 1 MiB.
 *
 * Onboard is timed from the call to the last gate seen open by the CPU, and every byte is compared
 * afterwards. Four sources: pages verified before, read by the device from the store's map; the
 * same at first touch (the CPU verifies each); pages in the page cache, not registered; pages on
 * disk.
 *
 * A file that grows takes memory for its page cache. In a fresh virtual machine the hypervisor has
 * to find that memory first; --touch has it found before the sustained run, as in a machine that
 * has been up for a while. */
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <getopt.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "hash.h"
#include "mover.h"

#define MIB   (UINT64_C(1) << 20)
#define MODEL ((struct skv_id){.lo = 0xbe7c4})

static struct {
    const char *device, *directory;
    uint32_t users, tokens, rounds;
    uint64_t sustained, touch; /* bytes */
    enum skv_durability durability;
} options = {.device = "auto", .directory = "/tmp", .users = 2, .tokens = 1024, .rounds = 5};

static const struct skv_geometry geometry = {
    .layers = 8, .heads = 4, .head_dim = 256, .page_tokens = 32};

static struct skv_device *device;
static struct skv_pool *pool;
static struct skv_stream *stream;
static struct skv_store *store;
static struct skv_pinner *pinner;
static struct skv_mover *mover;
static uint8_t *buffer; /* pinned, as large as the batch */
static uint32_t *row;
static uint64_t page_bytes, batch_bytes, last_id, last_user;
static uint32_t user_pages;
static char path[512];

static void must(int status, const char *what)
{
    if (status == 0)
        return;
    fprintf(stderr, "bench_mover: %s: %s\n", what, skv_strerror(status));
    exit(1);
}

static double seconds_since(uint64_t start_ns)
{
    return (double)(skv_now_ns() - start_ns) / 1e9;
}

static double median(double *values, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++)
        for (uint32_t j = i; j && values[j] < values[j - 1]; j--) {
            double swap = values[j];
            values[j] = values[j - 1];
            values[j - 1] = swap;
        }
    return values[count / 2];
}

/* ---- users and jobs ---- */

struct job {
    struct skv_offload offload;
    uint64_t *hashes;
    struct skv_move *moves;
};

/* User `id`, from pool pages [first_page, ..). */
static void make_job(struct job *job, uint64_t id, uint32_t first_page)
{
    uint64_t *tokens = malloc(options.tokens * sizeof *tokens);
    struct skv_id user = {.lo = id};
    job->hashes = malloc(user_pages * sizeof *job->hashes);
    job->moves = calloc(user_pages, sizeof *job->moves);
    for (uint32_t i = 0; i < options.tokens; i++)
        tokens[i] = id << 32 | i;
    skv_chain_hashes(MODEL, user, geometry.page_tokens, tokens, options.tokens, 0, job->hashes);
    free(tokens);
    for (uint32_t i = 0; i < user_pages; i++)
        job->moves[i] = (struct skv_move){.page = first_page + i,
                                          .index = i,
                                          .valid = geometry.page_tokens,
                                          .hash = job->hashes[i],
                                          .generation = 1};
    job->offload = (struct skv_offload){.id = ++last_id,
                                        .record = {.model = MODEL,
                                                   .user = user,
                                                   .generation = 1,
                                                   .hash_full = job->hashes[user_pages - 1],
                                                   .hash_tail = job->hashes[user_pages - 1],
                                                   .last_use_s = 1,
                                                   .tokens = options.tokens},
                                        .hashes = job->hashes,
                                        .move_count = user_pages,
                                        .moves = job->moves};
}

static void free_job(struct job *job)
{
    free(job->hashes);
    free(job->moves);
}

static struct skv_mover_event next_event(void)
{
    struct skv_mover_event event;
    while (!skv_mover_next(mover, &event)) {
        struct pollfd ready = {.fd = skv_mover_fd(mover), .events = POLLIN};
        uint64_t count;
        if (poll(&ready, 1, 1000) == 1 && read(ready.fd, &count, sizeof count) < 0)
            exit(1);
    }
    if (event.status || event.kind == SKV_MOVER_BROKEN || event.kind == SKV_MOVER_FAILED) {
        fprintf(stderr, "bench_mover: event %d: %s\n", event.kind, skv_strerror(event.status));
        exit(1);
    }
    return event;
}

/* Hands in one offload a user, as staging allows. Returns seconds until the last was copied, and
 * until the last was stored. */
static void offload(uint32_t users, double *copied, double *stored)
{
    struct job *jobs = calloc(users, sizeof *jobs);
    for (uint32_t i = 0; i < users; i++)
        make_job(&jobs[i], ++last_user, i % options.users * user_pages);
    uint64_t start_ns = skv_now_ns();
    for (uint32_t sent = 0, were_copied = 0, were_stored = 0; were_stored < users;) {
        while (sent < users && skv_mover_offload(mover, &jobs[sent].offload))
            sent++;
        struct skv_mover_event event = next_event();
        if (event.kind == SKV_MOVER_COPIED && ++were_copied == users)
            *copied = seconds_since(start_ns);
        were_stored += event.kind == SKV_MOVER_STORED;
    }
    *stored = seconds_since(start_ns);
    for (uint32_t i = 0; i < users; i++)
        free_job(&jobs[i]);
    free(jobs);
}

struct timing {
    double call, first_gate, last_gate; /* seconds */
};

/* Users 1 to options.users into the whole pool, gated. */
static struct skv_onboard *make_onboard(void)
{
    struct skv_onboard *job = calloc(1, sizeof *job);
    job->id = ++last_id;
    job->gate_row = row;
    job->user_count = options.users;
    job->users = calloc(options.users, sizeof *job->users);
    job->move_count = options.users * user_pages;
    job->moves = calloc(job->move_count, sizeof *job->moves);
    for (uint32_t i = 0; i < options.users; i++) {
        struct job user;
        make_job(&user, i + 1, i * user_pages);
        job->users[i] = user.offload.record;
        for (uint32_t at = 0; at < user_pages; at++) {
            struct skv_move *move = &job->moves[i * user_pages + at];
            *move = user.moves[at];
            move->user = i;
        }
        free_job(&user);
    }
    job->state = malloc(SKV_ONBOARD_STATE_BYTES(job->move_count));
    memset(row, 0, 256);
    return job;
}

static void free_onboard(struct skv_onboard *job)
{
    free(job->users);
    free(job->moves);
    free(job->state);
    free(job);
}

static struct timing onboard(void)
{
    struct skv_onboard *job = make_onboard();
    struct timing timing;
    uint64_t start_ns = skv_now_ns();
    skv_mover_onboard(mover, job);
    timing.call = seconds_since(start_ns);
    for (uint32_t layer = 0; layer < geometry.layers; layer++) {
        while (!__atomic_load_n(&row[layer], __ATOMIC_ACQUIRE))
            sched_yield();
        if (layer == 0)
            timing.first_gate = seconds_since(start_ns);
    }
    timing.last_gate = seconds_since(start_ns);
    next_event();
    free_onboard(job);
    return timing;
}

/* Record lookups, one after the other, while an onboard runs. Seconds each; returns how many. */
static uint32_t look_up(double *seconds, uint32_t capacity)
{
    struct skv_onboard *job = make_onboard();
    struct skv_lookup_job lookup = {.hashes = malloc(SKV_MAX_USER_PAGES * sizeof(uint64_t))};
    struct skv_mover_event event;
    uint32_t count = 0;
    bool onboarded = false;
    skv_mover_onboard(mover, job);
    while (!onboarded) {
        lookup.record = (struct skv_record){.model = MODEL, .user = {.lo = 1}};
        uint64_t start_ns = skv_now_ns();
        skv_mover_lookup(mover, &lookup);
        do { /* spins: as a busy loop thread would */
            while (!skv_mover_next(mover, &event))
                sched_yield();
            must(event.status, "event");
            onboarded |= event.kind == SKV_MOVER_ONBOARDED;
        } while (event.kind != SKV_MOVER_FOUND);
        if (count < capacity)
            seconds[count++] = seconds_since(start_ns);
    }
    free(lookup.hashes);
    free_onboard(job);
    return count;
}

/* ---- the pool's bytes, over the bus ---- */

static double copy_all(enum skv_direction direction)
{
    struct skv_copy copy = {.bytes = batch_bytes};
    uint64_t mark, start_ns = skv_now_ns();
    void *pages = skv_pool_address(pool);
    copy.dst = direction == SKV_TO_DEVICE ? pages : buffer;
    copy.src = direction == SKV_TO_DEVICE ? buffer : pages;
    must(skv_stream_copy(stream, direction, &copy, 1), "copy");
    must(skv_stream_mark(stream, &mark), "mark");
    must(skv_stream_wait(stream, mark, 60000), "wait");
    return seconds_since(start_ns);
}

static double peak(enum skv_direction direction)
{
    double best = 1e9;
    for (uint32_t round = 0; round < options.rounds + 1; round++) {
        double seconds = copy_all(direction);
        if (seconds < best)
            best = seconds;
    }
    return best;
}

static void fill_buffer(void)
{
    uint64_t x = 88172645463325252u;
    for (uint64_t at = 0; at < batch_bytes; at += 8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(buffer + at, &x, 8);
    }
}

/* ---- figures ---- */

static void say_onboard(const char *source, double peak_s, void (*prepare)(void), uint64_t want)
{
    double last[64], first[64], call[64];
    uint32_t rounds = options.rounds < 64 ? options.rounds : 64;
    for (uint32_t round = 0; round < rounds; round++) {
        memset(buffer, 0, batch_bytes);
        copy_all(SKV_TO_DEVICE);
        if (prepare)
            prepare();
        struct timing timing = onboard();
        last[round] = timing.last_gate;
        first[round] = timing.first_gate;
        call[round] = timing.call;
        copy_all(SKV_TO_HOST);
        if (skv_checksum(buffer, batch_bytes) != want) {
            fprintf(stderr, "bench_mover: %s: wrong bytes\n", source);
            exit(1);
        }
    }
    double seconds = median(last, rounds);
    printf("onboard, %-28s %8.2f ms %7.2f GB/s  %5.1f %% of the pinned H2D peak  "
           "(first gate %.2f ms, call %.1f us; worst of %u: %.2f ms)\n",
           source, seconds * 1e3, (double)batch_bytes / seconds / 1e9, 100 * peak_s / seconds,
           median(first, rounds) * 1e3, median(call, rounds) * 1e6, rounds, last[rounds - 1] * 1e3);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void say_lookups(const char *source)
{
    static double seconds[100000];
    uint32_t count = look_up(seconds, 100000);
    qsort(seconds, count, sizeof *seconds, by_size);
    printf(
        "record lookups while it runs, %s: %u, p50 %.1f us, p99 %.1f us, worst %.1f us (bound: a "
        "turn, 1000)\n",
        source, count, seconds[count / 2] * 1e6, seconds[count * 99 / 100] * 1e6,
        seconds[count - 1] * 1e6);
}

static void start_mover(void)
{
    struct skv_mover_options start = {.device = device,
                                      .pool = pool,
                                      .geometry = geometry,
                                      .store = store,
                                      .pinner = pinner,
                                      .staging_bytes = 2 * (batch_bytes + batch_bytes / 32),
                                      .durability = options.durability};
    must(skv_mover_start(&start, &mover), "mover");
}

static void forget_page_cache(void)
{
    char file[600];
    snprintf(file, sizeof file, "%s/data.mdb", path);
    int fd = open(file, O_RDONLY);
    if (fd < 0 || fdatasync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0)
        fprintf(stderr, "bench_mover: %s stays in the page cache: %s\n", file, strerror(errno));
    close(fd);
}

/* A new pinner: everything registered, nothing verified. */
static void register_anew(void)
{
    uint64_t bytes;
    skv_mover_stop(mover);
    skv_pinner_stop(pinner);
    skv_store_map(store, &bytes);
    uint64_t want = skv_store_high_water(store), start_ns = skv_now_ns();
    must(skv_pinner_start(store, device, bytes, &pinner), "pinner");
    while (skv_pinner_bytes(pinner) < want && seconds_since(start_ns) < 120)
        usleep(10000);
    if (skv_pinner_bytes(pinner) < want)
        fprintf(stderr, "bench_mover: only %llu of %llu MiB could be registered\n",
                (unsigned long long)(skv_pinner_bytes(pinner) / MIB),
                (unsigned long long)(want / MIB));
    start_mover();
}

static void say_machine(void)
{
    char line[256], cpu[200] = "?";
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %199[^\n]", cpu) == 1)
            break;
    if (file)
        fclose(file);
    printf("machine: %s, %s, %ld cores; store in %s, durability %s\n",
           skv_device_info(device)->name, cpu, sysconf(_SC_NPROCESSORS_ONLN), options.directory,
           options.durability == SKV_POWER ? "power" : "process");
    printf("batch: %u users x %u tokens = %.0f MiB in pages of %.0f KiB; %u rounds, medians\n",
           options.users, options.tokens, (double)batch_bytes / MIB, (double)page_bytes / 1024,
           options.rounds);
}

/* Has that much of the machine's free memory used once, then gives it back to the kernel. */
static void touch_memory(uint64_t bytes)
{
    uint64_t start_ns = skv_now_ns();
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    must(memory == MAP_FAILED ? SKV_ENOMEM : 0, "touching memory");
    munmap(memory, bytes);
    double seconds = seconds_since(start_ns);
    printf("touched %.2f GiB of memory in %.2f s, %.2f GB/s\n", (double)bytes / (1u << 30), seconds,
           (double)bytes / seconds / 1e9);
}

static void measure(void)
{
    double to_device, to_host, copied, stored;
    fill_buffer();
    uint64_t sum = skv_checksum(buffer, batch_bytes);
    copy_all(SKV_TO_DEVICE);
    to_host = peak(SKV_TO_HOST);
    to_device = peak(SKV_TO_DEVICE);
    printf("pinned copy, the bound: H2D %.2f GB/s, D2H %.2f GB/s\n",
           (double)batch_bytes / to_device / 1e9, (double)batch_bytes / to_host / 1e9);
    start_mover();
    offload(options.users, &copied, &stored);
    printf(
        "offload burst of %.0f MiB: staged in %.2f ms, %.2f GB/s, %.1f %% of the D2H peak; stored "
        "after %.2f s, %.2f GB/s\n",
        (double)batch_bytes / MIB, copied * 1e3, (double)batch_bytes / copied / 1e9,
        100 * to_host / copied, stored, (double)batch_bytes / stored / 1e9);
    uint32_t users = (uint32_t)(options.sustained / (user_pages * page_bytes));
    say_onboard("page cache, not registered", to_device, NULL, sum);
    say_onboard("disk, O_DIRECT", to_device, forget_page_cache, sum);
    say_onboard("registered, first touch", to_device, register_anew, sum);
    say_onboard("registered and verified", to_device, NULL, sum);
    say_lookups("verified");
    register_anew();
    say_lookups("first touch");
    if (users == 0)
        return;
    if (options.touch)
        touch_memory(options.touch);
    uint64_t bytes = users * (user_pages * page_bytes), first_user = last_user;
    for (uint32_t pass = 0; pass < 2; pass++) {
        last_user = first_user;
        offload(users, &copied, &stored);
        printf("offload sustained, %.2f GiB, %u users, %s: %.2f s, %.2f GB/s, checksummed "
               "(target 2)\n",
               (double)bytes / (1u << 30), users, pass ? "stored over" : "the file grows", stored,
               (double)bytes / stored / 1e9);
    }
}

/* ---- start and end ---- */

static int remove_one(const char *file, const struct stat *st, int kind, struct FTW *walk)
{
    (void)st, (void)kind, (void)walk;
    return remove(file);
}

static void parse(int argc, char **argv)
{
    static const struct option known[] = {
        {"device", 1, NULL, 'd'}, {"store", 1, NULL, 's'},      {"users", 1, NULL, 'u'},
        {"tokens", 1, NULL, 't'}, {"rounds", 1, NULL, 'r'},     {"gib", 1, NULL, 'g'},
        {"touch", 1, NULL, 'm'},  {"durability", 1, NULL, 'p'}, {NULL, 0, NULL, 0}};
    int option;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
        switch (option) {
        case 'd':
            options.device = optarg;
            break;
        case 's':
            options.directory = optarg;
            break;
        case 'u':
            options.users = (uint32_t)atoi(optarg);
            break;
        case 't':
            options.tokens = (uint32_t)atoi(optarg);
            break;
        case 'r':
            options.rounds = (uint32_t)atoi(optarg);
            break;
        case 'g':
            options.sustained = (uint64_t)(atof(optarg) * 1024) * MIB;
            break;
        case 'm':
            options.touch = (uint64_t)(atof(optarg) * 1024) * MIB;
            break;
        case 'p':
            options.durability = strcmp(optarg, "power") == 0 ? SKV_POWER : SKV_PROCESS;
            break;
        default:
            fprintf(stderr, "usage: bench_mover [--device auto|host|cuda] [--store DIRECTORY] "
                            "[--users 8] [--tokens 4096] [--rounds N] [--gib 16] [--touch GIB] "
                            "[--durability process|power]\n"
                            "--gib: sustained offload of that much; --touch: before it, have that "
                            "much of the machine's memory used once\n");
            exit(2);
        }
    options.tokens -= options.tokens % geometry.page_tokens;
    if (!options.users || !options.tokens || options.tokens > SKV_MAX_TOKENS || !options.rounds) {
        fprintf(stderr, "bench_mover: users, rounds and a page of tokens at least\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    page_bytes = skv_page_bytes(&geometry);
    user_pages = options.tokens / geometry.page_tokens;
    batch_bytes = options.users * user_pages * page_bytes;
    void *memory;
    snprintf(path, sizeof path, "%s/bench-mover-XXXXXX", options.directory);
    must(mkdtemp(path) ? 0 : SKV_EIO, path);
    must(skv_device_open(options.device, &device), "device");
    must(skv_pool_create(device, batch_bytes, page_bytes, SKV_EXPORT_FD, &pool), "pool");
    must(skv_pinned_alloc(device, batch_bytes, &memory), "pinned memory");
    buffer = memory;
    must(skv_pinned_alloc(device, 4096, &memory), "gates");
    row = memory;
    must(skv_stream_open(device, &stream), "stream");
    must(skv_store_open(
             &(struct skv_store_options){.path = path,
                                         .geometry = geometry,
                                         .map_bytes =
                                             (batch_bytes + options.sustained) * 5 / 4 + 256 * MIB,
                                         .durability = options.durability},
             &store),
         "store");
    say_machine();
    measure();
    skv_mover_stop(mover);
    skv_pinner_stop(pinner);
    skv_store_close(store);
    skv_stream_close(stream);
    skv_pinned_free(device, row);
    skv_pinned_free(device, buffer);
    skv_pool_close(pool);
    skv_device_close(device);
    nftw(path, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    return 0;
}
