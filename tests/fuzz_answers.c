/* What the library reads from a daemon: the welcome and its fds, completions, grants, pages, views,
 * goodbyes. The input is a script for both: calls of a worker's or an admin's, and what the daemon
 * does meanwhile. It is a daemon in the same thread: it takes a turn whenever the library waits, so
 * that an input can be had again exactly. Time passes as it says, too. A quarter of the inputs have
 * a second thread, which changes the session's memory under the library's eyes, and under those of
 * the caller, who must not see it.
 *
 * Every call must end by its deadline with a status, every batch name pages that can be touched,
 * and no descriptor or mapping stay behind. */
#include "fuzz_input.h"
#include "fuzz_quiet.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fdpass.h"
#include "skv_session.h"

#define EXTENT_BYTES (UINT64_C(2) << 20)
#define MOST_EXTENTS 17u
#define ROWS         2u
#define USERS        4u /* a batch */
#define TOKENS       600u
#define TIMEOUT_MS   1000u
#define LATE_MS      (TIMEOUT_MS + 2 * SKV_SLEEP_SLICE_MS)
#define SILENT_TURNS 500u /* then a daemon without a script dies: FLUSH waits for that */

static const struct skv_geometry geometry = {
    .layers = 2, .heads = 1, .head_dim = 64, .page_tokens = 16};
static const struct skv_id model = {.lo = 11, .hi = 22};

/* Descriptors that a message may carry; a welcome wants the first three, extents the fourth. */
enum kind {
    MEMORY,
    SQ,
    CQ,
    EXTENT,
    SHORT,
    UNSEALED,
    READ_ONLY,
    FULL_BELL,
    PIPE_OUT,
    PIPE_IN,
    NOTHING,
    DIRECTORY,
    PROCESS,
    KINDS
};
static int kinds[KINDS];

static struct fuzz_input *script; /* the rest of the input; NULL: nobody plays */
static struct skv *skv;
static struct skv_batch batches[ROWS];
static uint64_t tokens[TOKENS];

static struct {
    char path[64];
    int listener, socket, gates;
    struct wire_hello hello;
    uint8_t uuid[16];
    uint32_t extents; /* of its pool */
    bool protect, kept;
    uint64_t session;
    uint8_t *memory; /* the session's, the same one every time */
    uint32_t sq_head, cq_tail;
    uint32_t turns; /* since the script is over */
    bool endless;   /* the caller's call has no deadline but the daemon's life */
    uint32_t woken; /* how often it waited for nothing */
} fake;

/* ---- time, and memory that is mapped ---- */

static __thread bool is_caller;
static uint64_t skew_ns, mapped_bytes;

int __real_clock_gettime(clockid_t clock, struct timespec *now);
int __wrap_clock_gettime(clockid_t clock, struct timespec *now);
int __wrap_clock_gettime(clockid_t clock, struct timespec *now)
{
    int rc = __real_clock_gettime(clock, now);
    if (clock == CLOCK_MONOTONIC && is_caller) {
        uint64_t ns = (uint64_t)now->tv_nsec + skew_ns;
        now->tv_sec += (time_t)(ns / 1000000000);
        now->tv_nsec = (long)(ns % 1000000000);
    }
    return rc;
}

void *__real_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset)
{
    void *mapped = __real_mmap(at, bytes, access, flags, fd, offset);
    if (is_caller && mapped != MAP_FAILED && !(flags & MAP_FIXED))
        mapped_bytes += bytes;
    return mapped;
}

int __real_munmap(void *at, size_t bytes);
int __wrap_munmap(void *at, size_t bytes);
int __wrap_munmap(void *at, size_t bytes)
{
    if (is_caller)
        mapped_bytes -= bytes;
    return __real_munmap(at, bytes);
}

/* ---- the second thread ---- */

static struct {
    pthread_mutex_t lock; /* held while it writes, and while it shall not */
    pthread_cond_t there;
    uint64_t seed;
    bool on;
} flips = {.lock = PTHREAD_MUTEX_INITIALIZER, .there = PTHREAD_COND_INITIALIZER};

static uint64_t next_random(void)
{
    flips.seed ^= flips.seed << 13;
    flips.seed ^= flips.seed >> 7;
    return flips.seed ^= flips.seed << 17;
}

/* One byte that the library is likely to look at: mostly of grants and page lists. */
static void flip(void)
{
    uint64_t r = next_random();
    uint32_t where = (uint32_t)(r >> 8) & 1023;
    uint8_t value = (uint8_t)(r >> 32);
    uint8_t *slot = fake.memory + WIRE_SLOTS_OFFSET + (r >> 40) % ROWS * sizeof(struct wire_slot);
    switch (r & 15) {
    case 0:
        fake.memory[WIRE_VIEWS_OFFSET + where % 64] ^= value;
        break;
    case 1 ... 2:
        fake.memory[WIRE_CQ_OFFSET + where] ^= value;
        break;
    case 3 ... 6:
        slot[offsetof(struct wire_slot, grants) + where % 256] ^= (uint8_t)(1u << (r >> 61));
        break;
    case 7 ... 8:
        slot[offsetof(struct wire_slot, results) + where % 64] ^= value;
        break;
    case 9:
        slot[offsetof(struct wire_slot, pages) + where % 256] = value;
        break;
    default: /* wrong only for a moment */
        slot[offsetof(struct wire_slot, pages) + (where % 256 | 3)] = value;
        skv_relax();
        slot[offsetof(struct wire_slot, pages) + (where % 256 | 3)] = 0;
    }
}

static void *flip_always(void *nothing)
{
    for (;;) {
        pthread_mutex_lock(&flips.lock);
        while (!flips.on)
            pthread_cond_wait(&flips.there, &flips.lock);
        for (uint32_t i = 0; i < 64; i++)
            flip();
        pthread_mutex_unlock(&flips.lock);
        for (uint32_t i = 0; i < 256; i++)
            skv_relax();
    }
    return nothing;
}

static void let_flip(bool on)
{
    pthread_mutex_lock(&flips.lock);
    flips.on = on;
    pthread_cond_signal(&flips.there);
    pthread_mutex_unlock(&flips.lock);
}

/* ---- the daemon: its start ---- */

static void make_kinds(void)
{
    const int fixed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    const uint64_t session_bytes = wire_session_bytes(ROWS);
    int ends[2];
    FUZZ_MUST(pipe2(ends, O_CLOEXEC) == 0);
    const int made[KINDS] = {[MEMORY] = fuzz_memory(session_bytes, fixed),
                             [SQ] = eventfd(0, EFD_CLOEXEC),
                             [CQ] = eventfd(0, EFD_CLOEXEC),
                             [EXTENT] = fuzz_memory(EXTENT_BYTES, fixed),
                             [SHORT] = fuzz_memory(4096, fixed),
                             [UNSEALED] = fuzz_memory(session_bytes, F_SEAL_GROW),
                             [READ_ONLY] = fuzz_memory(session_bytes, fixed | F_SEAL_WRITE),
                             [FULL_BELL] = eventfd(0, EFD_CLOEXEC),
                             [PIPE_OUT] = ends[0],
                             [PIPE_IN] = ends[1],
                             [NOTHING] = open("/dev/null", O_RDWR | O_CLOEXEC),
                             [DIRECTORY] = open("/", O_RDONLY | O_CLOEXEC),
                             [PROCESS] = (int)syscall(SYS_pidfd_open, getpid(), 0)};
    memcpy(kinds, made, sizeof kinds);
    fake.memory = mmap(NULL, session_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, kinds[MEMORY], 0);
    FUZZ_MUST(fake.memory != MAP_FAILED);
}

static void fake_end(void)
{
    unlink(fake.path);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    pthread_t thread;
    (void)argc, (void)argv;
    signal(SIGPIPE, SIG_IGN);
    make_kinds();
    struct skv_device *device;
    FUZZ_MUST(skv_device_open("host", &device) == 0);
    memcpy(fake.uuid, skv_device_info(device)->uuid, sizeof fake.uuid);
    skv_device_close(device);
    snprintf(fake.path, sizeof fake.path, "/tmp/sidekv-fuzz-%d", (int)getpid());
    memcpy(address.sun_path, fake.path, sizeof fake.path);
    fake.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    fake.socket = fake.gates = -1;
    unlink(fake.path);
    FUZZ_MUST(bind(fake.listener, (struct sockaddr *)&address, sizeof address) == 0);
    FUZZ_MUST(listen(fake.listener, 16) == 0);
    atexit(fake_end);
    for (uint32_t i = 0; i < TOKENS; i++)
        tokens[i] = i + 1;
    flips.seed = 88172645463325252u;
    FUZZ_MUST(pthread_create(&thread, NULL, flip_always, NULL) == 0);
    pthread_detach(thread);
    return 0;
}

/* ---- the daemon: what it says ---- */

/* Whatever a daemon says after the handshake ends the session: the watcher has seen it. */
static void await_loss(void)
{
    for (uint32_t i = 0; skv && skv->connected && !skv_lost(skv); i++) {
        FUZZ_MUST(i < 10000);
        i < 1000 ? sched_yield() : usleep(1000);
    }
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void hang_up(void)
{
    bool connected = fake.socket >= 0;
    close_fd(&fake.socket);
    close_fd(&fake.gates);
    if (connected)
        await_loss();
}

static void say(const void *message, size_t bytes, const int *fds, uint32_t count)
{
    if (fake.socket >= 0 &&
        skv_send_fds(fake.socket, message, bytes, fds, count, MSG_DONTWAIT) == 0)
        await_loss();
}

/* Changes some bytes of what is there, most often none. */
static void spoil(struct fuzz_input *in, void *bytes, size_t size, uint32_t changes)
{
    for (; changes > 0; changes--) {
        uint32_t where = fuzz_u8(in);
        where |= size > 256 ? (uint32_t)fuzz_u8(in) << 8 : 0;
        ((uint8_t *)bytes)[where % size] = fuzz_u8(in);
    }
}

/* Takes a connection and its hello; the one before is over. */
static void accept_one(void)
{
    int fds[WIRE_HELLO_FDS];
    uint32_t count;
    int socket = accept4(fake.listener, NULL, NULL, SOCK_CLOEXEC);
    if (socket < 0)
        return;
    hang_up();
    fake.socket = socket;
    if (skv_receive_fds(socket, &fake.hello, sizeof fake.hello, fds, WIRE_HELLO_FDS, &count,
                        MSG_DONTWAIT) != sizeof fake.hello) {
        FUZZ_MUST(count == 0);
        return;
    }
    FUZZ_MUST(fake.hello.magic == WIRE_MAGIC && count == (fake.hello.rows ? 2 : 1));
    close(fds[0]);
    if (count == 2)
        fake.gates = fds[1];
    fake.sq_head = fake.cq_tail = 0;
    memset(fake.memory, 0, WIRE_SLOTS_OFFSET);
    for (uint32_t row = 0; row < ROWS; row++) {
        struct wire_slot *slot =
            (struct wire_slot *)(void *)(fake.memory + WIRE_SLOTS_OFFSET) + row;
        memset(slot, 0, offsetof(struct wire_slot, hashes));
        memset(slot->pages, 0, 4096);
    }
    static const uint64_t full = UINT64_MAX - 1;
    eventfd_t rings;
    for (int kind = SQ; kind <= CQ; kind++)
        if (poll(&(struct pollfd){.fd = kinds[kind], .events = POLLIN}, 1, 0) > 0)
            eventfd_read(kinds[kind], &rings);
    if (poll(&(struct pollfd){.fd = kinds[FULL_BELL], .events = POLLIN}, 1, 0) <= 0)
        FUZZ_MUST(write(kinds[FULL_BELL], &full, sizeof full) == sizeof full);
}

/* A right welcome, changed in places, cut short, or with other fds. */
static void welcome(struct fuzz_input *in, uint8_t how)
{
    uint64_t pool_bytes = fake.extents * EXTENT_BYTES;
    struct wire_welcome w = {.magic = WIRE_MAGIC,
                             .version = WIRE_VERSION,
                             .daemon_pid = 1,
                             .geometry = geometry,
                             .session = ++fake.session,
                             .pool_pages = pool_bytes / skv_page_bytes(&geometry),
                             .pool_bytes = pool_bytes,
                             .extent_bytes = EXTENT_BYTES,
                             .extents = fake.extents,
                             .export = SKV_EXPORT_FD,
                             .device_kind = SKV_DEVICE_HOST,
                             .device = "host",
                             .session_bytes = wire_session_bytes(fake.hello.rows),
                             .pool_id = fake.kept ? 4711 : 0,
                             .protect = fake.protect};
    memcpy(w.uuid, fake.uuid, sizeof w.uuid);
    int fds[6] = {kinds[MEMORY], kinds[SQ], kinds[CQ], kinds[SQ], kinds[SQ], kinds[SQ]};
    uint32_t count = WIRE_WELCOME_FDS;
    size_t bytes = sizeof w;
    spoil(in, &w, sizeof w, how & 3);
    if (how & 4) { /* another fd somewhere */
        uint8_t which = fuzz_u8(in);
        fds[which % 3] = kinds[(which >> 2) % KINDS];
    }
    if (how & 8)
        count = fuzz_u8(in) % 7;
    if (how & 16)
        bytes -= fuzz_u8(in);
    if (how & 32)
        w.status = -(int32_t)(fuzz_u8(in) % 24);
    say(&w, bytes, fds, count);
}

/* All extents, or one message that is not quite right. */
static void extents(struct fuzz_input *in, uint8_t how)
{
    struct wire_extents message = {.magic = WIRE_MAGIC, .count = fake.extents};
    int fds[SKV_FDS_PER_MESSAGE];
    for (uint32_t i = 0; i < SKV_FDS_PER_MESSAGE; i++)
        fds[i] = kinds[EXTENT];
    uint32_t count = message.count;
    if (how & 4)
        count = fuzz_u8(in) % SKV_FDS_PER_MESSAGE;
    if (how & 8)
        message.count = count;
    if (how & 16)
        message.first = fuzz_u8(in);
    if (how & 32) {
        int kind = kinds[fuzz_u8(in) % KINDS];
        fds[fuzz_u8(in) % MOST_EXTENTS] = kind;
    }
    spoil(in, &message, sizeof message, how & 3);
    say(&message, sizeof message, fds, count);
}

static void goodbye(struct fuzz_input *in, uint8_t how)
{
    struct wire_goodbye bye = {
        .magic = WIRE_MAGIC, .status = how & 4 ? SKV_EAGAIN : SKV_EPROTO, .text = "so it is"};
    spoil(in, &bye, sizeof bye, how & 3);
    say(&bye, how & 8 ? fuzz_u8(in) % (sizeof bye + 1) : sizeof bye, NULL, 0);
}

static void anything(struct fuzz_input *in, uint8_t how)
{
    uint8_t bytes[512];
    int fds[SKV_FDS_PER_MESSAGE];
    uint32_t size = fuzz_u8(in) << (how & 1), count = how & 2 ? fuzz_u8(in) % 8 : 0;
    fuzz_take(in, bytes, size);
    for (uint32_t i = 0; i < count; i++)
        fds[i] = kinds[fuzz_u8(in) % KINDS];
    say(bytes, size, fds, count);
}

/* ---- the daemon: its ring ---- */

static struct wire_slot *slot_of(uint32_t row)
{
    return (struct wire_slot *)(void *)(fake.memory + WIRE_SLOTS_OFFSET) + row % ROWS;
}

/* A right grant for request `i`, as far as the input wants that. */
static void grant(struct fuzz_input *in, struct wire_slot *slot, uint32_t i)
{
    const struct wire_request *r = &slot->requests[i];
    uint8_t how = fuzz_u8(in);
    uint32_t most = r->history < r->max_cached ? r->history : r->max_cached;
    uint32_t cached = most * (how & 7) / 7, page_tokens = geometry.page_tokens;
    bool append = how & 8 && !(r->flags & SKV_REQUEST_READ);
    struct wire_grant g = {.flags = append ? SKV_GRANT_APPEND : 0,
                           .cached = cached,
                           .gpu_tokens = cached,
                           .page_offset = i * SKV_MAX_USER_PAGES,
                           .page_count = ((append ? r->history : cached) + 15) / 16,
                           .lease = 1000 + i};
    if (how & 16 && cached < r->history) { /* a tail to check: ours, or another */
        g.tail_valid = cached % page_tokens;
        uint32_t start = cached - g.tail_valid, page = start / page_tokens;
        uint64_t before =
            page ? slot->hashes[r->hash_offset + page - 1] : skv_chain_start(model, r->user);
        g.tail_hash = skv_chain_link(before, tokens + start, g.tail_valid) + (how & 32 ? 1 : 0);
        if (append && how & 64) /* a fresh page is to replace it */
            g.cached = g.gpu_tokens = start;
    }
    if (how & 64)
        g.flags |= SKV_GRANT_GATED;
    for (uint32_t page = 0; page < g.page_count; page++)
        slot->pages[g.page_offset + page] = how & 128 ? page * 97 : 3 * i + page;
    if ((how & 224) == 224)
        spoil(in, &g, sizeof g, 1);
    slot->grants[i] = g;
}

/* Takes the next command and answers it. False: there is none. */
static bool answer(struct fuzz_input *in, uint8_t how)
{
    struct wire_ring *ring = (struct wire_ring *)(void *)fake.memory;
    uint32_t waiting = __atomic_load_n(&ring->sq_tail, __ATOMIC_ACQUIRE) - fake.sq_head;
    if (waiting == 0 || waiting > WIRE_ENTRIES) /* scribbled over */
        return false;
    struct wire_sqe sqe =
        ((struct wire_sqe *)(void *)(fake.memory + WIRE_SQ_OFFSET))[fake.sq_head % WIRE_ENTRIES];
    __atomic_store_n(&ring->sq_head, ++fake.sq_head, __ATOMIC_RELEASE);
    struct wire_cqe cqe = {.user_data = sqe.user_data};
    struct wire_slot *slot = slot_of(sqe.row);
    switch (sqe.opcode) {
    case WIRE_ACQUIRE:
        cqe.value[0] = how & 4 ? 1 : 0;
        for (uint32_t i = 0; i < sqe.count % (USERS + 1); i++)
            grant(in, slot, i);
        break;
    case WIRE_COMMIT:
        for (uint32_t i = 0; i < sqe.count % (USERS + 1); i++)
            slot->results[i] = (struct wire_committed){.committed = 32, .stored = 16};
        if (how & 4)
            spoil(in, slot->results, sizeof *slot->results * USERS, 2);
        break;
    case WIRE_LIST:
        cqe.count = how & 4 ? fuzz_u32(in) : sqe.count;
        cqe.value[0] = fuzz_u8(in);
        break;
    case WIRE_STATS:
        cqe.count = how & 4 ? fuzz_u32(in) : sizeof(struct skv_stats) / sizeof(uint64_t);
        break;
    }
    if (how & 8)
        cqe.status = -(int32_t)(fuzz_u8(in) % 24);
    spoil(in, &cqe, sizeof cqe, how & 3);
    ((struct wire_cqe *)(void *)(fake.memory + WIRE_CQ_OFFSET))[fake.cq_tail % WIRE_CQ_ENTRIES] =
        cqe;
    __atomic_store_n(&ring->cq_tail, ++fake.cq_tail, __ATOMIC_RELEASE);
    eventfd_write(kinds[CQ], 1);
    return true;
}

/* Bytes of the session's memory: what the library reads of it, and what it does not. */
static void scribble(struct fuzz_input *in, uint8_t how)
{
    static const size_t at[] = {0,
                                WIRE_VIEWS_OFFSET,
                                WIRE_CQ_OFFSET,
                                WIRE_SCRATCH_OFFSET,
                                WIRE_SLOTS_OFFSET + offsetof(struct wire_slot, grants),
                                WIRE_SLOTS_OFFSET + offsetof(struct wire_slot, results),
                                WIRE_SLOTS_OFFSET + offsetof(struct wire_slot, hashes),
                                WIRE_SLOTS_OFFSET + offsetof(struct wire_slot, pages)};
    spoil(in, fake.memory + at[how & 7], 256, 1 + (how >> 3 & 3));
}

/* Another list of views, whole or still being written. */
static void list_views(struct fuzz_input *in, uint8_t how)
{
    struct wire_views *views = (struct wire_views *)(void *)(fake.memory + WIRE_VIEWS_OFFSET);
    views->begun++;
    views->extents[0] = fuzz_u32(in);
    views->extents[1] = how & 4 ? UINT64_MAX : 0;
    if (!(how & 8))
        __atomic_store_n(&views->sequence, views->begun, __ATOMIC_RELEASE);
}

/* The status that goes with a row's gates. */
static void tell_status(struct fuzz_input *in)
{
    int32_t status = -(int32_t)(fuzz_u8(in) % 24);
    uint32_t at = fuzz_u8(in) % ROWS * wire_gate_stride(geometry.layers) + 4 * geometry.layers;
    if (fake.gates >= 0)
        FUZZ_MUST(pwrite(fake.gates, &status, sizeof status, at) == sizeof status);
}

/* One thing that the daemon does. False: nothing, time passes. */
static bool take_turn(struct fuzz_input *in)
{
    if (!fuzz_more(in)) {
        if (++fake.turns == SILENT_TURNS)
            hang_up();
        return false;
    }
    uint8_t step = fuzz_u8(in), how = step >> 4;
    if (step & 8 && fuzz_more(in))
        how |= (uint8_t)(fuzz_u8(in) << 4);
    switch (step & 7) {
    case 0: /* all that is right, at once */
        accept_one();
        while (answer(in, 0))
            ;
        if (fake.sq_head == 0) {
            welcome(in, 0);
            extents(in, 0);
        }
        return true;
    case 1:
        return answer(in, how);
    case 2:
        accept_one();
        welcome(in, how);
        return true;
    case 3:
        extents(in, how);
        return true;
    case 4:
        scribble(in, how);
        return true;
    case 5:
        list_views(in, how);
        return true;
    case 6:
        tell_status(in);
        return !(how & 1);
    }
    switch (how & 7) {
    case 0:
        hang_up();
        break;
    case 1:
        goodbye(in, how >> 3);
        break;
    case 2:
        anything(in, how >> 3);
        break;
    case 3:
        eventfd_write(kinds[CQ], 1);
        break;
    case 4:
        accept_one();
        break;
    default:
        return false;
    }
    return true;
}

/* The caller waits: the daemon acts until that has an end, or time passes. */
int __real_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
    if (!is_caller || !script)
        return __real_poll(fds, count, timeout_ms);
    struct fuzz_input *in = script;
    script = NULL; /* what the daemon waits for it waits for */
    int ready;
    while ((ready = count ? __real_poll(fds, count, 0) : 0) == 0 && take_turn(in))
        ;
    if (fake.endless && ready && ++fake.woken % 64 == 0) /* a bell may ring always */
        take_turn(in);
    script = in;
    FUZZ_MUST(timeout_ms >= 0);
    if (ready == 0)
        skew_ns += (uint64_t)timeout_ms * 1000000;
    return ready;
}

/* ---- the caller ---- */

static void check_batch(const struct skv_batch *batch, const struct skv_request *requests)
{
    uint64_t page_bytes = skv_page_bytes(&geometry);
    for (uint32_t i = 0; i < batch->count; i++) {
        const struct skv_grant *g = &batch->grants[i];
        if (g->status)
            continue;
        FUZZ_MUST(g->lease && g->cached <= requests[i].history && g->gpu_tokens <= g->cached);
        bool append = g->flags & SKV_GRANT_APPEND;
        FUZZ_MUST(g->page_count == ((append ? requests[i].history : g->cached) + 15) / 16);
        for (uint32_t page = 0; page < g->page_count; page++) {
            uint64_t at = g->pages[page] * page_bytes;
            (void)*((volatile uint8_t *)skv_pool_base(skv) + at);
            if (append && page >= g->cached / 16)
                *((volatile uint8_t *)skv_pool_append_base(skv) + at) = 1;
        }
    }
}

static int acquire(struct fuzz_input *in, uint32_t row)
{
    struct skv_request requests[USERS];
    uint8_t how = fuzz_u8(in);
    uint32_t count = 1 + how % USERS;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t kind = fuzz_u8(in);
        requests[i] = (struct skv_request){.user = skv_user_integer(1 + i),
                                           .tokens = tokens,
                                           .history = kind * 2u,
                                           .max_cached = how & 4 ? kind : UINT32_MAX,
                                           .flags = how >> 3 & 3};
    }
    int status = skv_acquire(skv, row, requests, count, &batches[row]);
    if (status == 0 && batches[row].count)
        check_batch(&batches[row], requests);
    return status;
}

static int list(struct fuzz_input *in)
{
    static struct skv_user_info infos[WIRE_LIST_USERS];
    uint64_t cursor = fuzz_u8(in);
    uint32_t capacity = 1 + fuzz_u8(in) % 8u;
    int got = skv_list(skv, &cursor, infos, capacity);
    FUZZ_MUST(got <= (int)capacity);
    return got > 0 ? 0 : got;
}

static int call(struct fuzz_input *in)
{
    uint8_t op = fuzz_u8(in);
    uint32_t row = op >> 4 & 1;
    struct skv_id user = skv_user_integer(op);
    struct skv_committed results[SKV_MAX_BATCH];
    struct skv_user_info info;
    struct skv_stats stats;
    uint64_t ns;
    switch (op & 15) {
    case 0 ... 2:
        return acquire(in, row);
    case 3 ... 4:
        return skv_commit(skv, &batches[row], op & 32 ? results : NULL);
    case 5:
        return skv_release(skv, &batches[row]);
    case 6:
        return skv_batch_status(skv, &batches[row]);
    case 7: {
        struct skv_request request = {.user = user, .tokens = tokens, .history = op};
        return skv_prefetch(skv, &request);
    }
    case 8:
        return skv_ping(skv, &ns);
    case 9:
        return skv_lookup(skv, (struct skv_id){0}, user, &info);
    case 10:
        return list(in);
    case 11:
        return skv_stats(skv, &stats);
    case 12:
        return skv_truncate(skv, model, user, 16);
    case 13:
        return row ? skv_restart(skv) : skv_forget(skv, model, user);
    case 14:
        return row ? skv_flush(skv) : skv_evict(skv, model, user);
    default:
        return skv_reconnect(skv, TIMEOUT_MS);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {.at = data, .end = data + size};
    uint8_t who = fuzz_u8(&in);
    struct skv_options options = {.socket = fake.path,
                                  .admin = (who & 7) == 7,
                                  .geometry = geometry,
                                  .model = model,
                                  .rows = ROWS,
                                  .timeout_ms = TIMEOUT_MS,
                                  .no_spin_default = true};
    bool flipped = who >> 6 == 3;
    fake.extents = who & 8 ? MOST_EXTENTS : 1;
    fake.protect = who & 16;
    fake.kept = who & 32;
    fake.turns = 0;
    memset(batches, 0, sizeof batches);
    uint32_t fds = fuzz_count_fds();
    uint64_t mapped = mapped_bytes;
    is_caller = true;
    let_flip(flipped);
    for (uint32_t opened = 0; fuzz_more(&in) && (skv || opened < 4);) {
        uint64_t before_ns = skew_ns;
        fake.endless = skv && (*in.at & 31) == 30; /* FLUSH */
        script = &in;
        int status;
        if (skv) {
            status = call(&in);
        } else {
            opened++;
            status = skv_open(&options, &skv);
            FUZZ_MUST((status == 0) == (skv != NULL));
        }
        script = NULL;
        FUZZ_MUST(skv_status_told(status));
        FUZZ_MUST(fake.endless || skew_ns - before_ns <= LATE_MS * UINT64_C(1000000));
    }
    let_flip(false);
    skv_close(skv);
    skv = NULL;
    is_caller = false;
    hang_up();
    for (int waiting; (waiting = accept(fake.listener, NULL, NULL)) >= 0;)
        close(waiting);
    FUZZ_MUST(mapped_bytes == mapped);
    FUZZ_MUST(fuzz_count_fds() == fds);
    return 0;
}
