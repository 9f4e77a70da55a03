/* What keeper and daemon read from each other, and the keeper from the manager's fd store. The
 * input is a script: a daemon that says anything to the keeper, keepers that die and are followed
 * by others, store entries that nobody knows, daemons that are given what is held, or anything.
 *
 * Always: what is held and what the store has copies of is the same; what is whole has all its
 * parts; a daemon takes what it was given or refuses it; and no descriptor stays behind. */
#include "fuzz_input.h"
#include "fuzz_quiet.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon.h"
#include "fdpass.h"
#include "keeper_held.h"
#include "notify.h"

#define EXTENT_BYTES (UINT64_C(2) << 20)
#define EXTENTS      2u
#define COPIES       256u
#define FIRST_FD     3   /* of those that a manager passes */
#define HIGH_FD      300 /* room below for those */

static const struct skv_geometry geometry = {
    .layers = 2, .heads = 1, .head_dim = 64, .page_tokens = 16};

/* Descriptors that a message may carry. */
enum kind { EXTENT, TABLE, SESSIONS, PROCESS, BELL, RUNG_BELL, SMALL, NOTHING, KINDS };
static int kinds[KINDS];

static struct wire_table *table;
static struct keeper_sessions *sessions;
static struct daemon fuzz_daemon;
static struct held held;
static int ends[2]; /* of the keeper's socket: its own, its daemon's */
static struct heard heard;

/* ---- the manager ---- */

static struct {
    bool there;
    bool full; /* it does not have what is held any more */
    uint32_t count;
    struct {
        char name[64];
        int fd;
    } copies[COPIES];
} manager;

static void copy_add(const char *name, int fd)
{
    manager.full = manager.full || manager.count == COPIES;
    if (manager.full)
        return;
    snprintf(manager.copies[manager.count].name, sizeof manager.copies->name, "%s", name);
    manager.copies[manager.count++].fd = fcntl(fd, F_DUPFD_CLOEXEC, HIGH_FD);
}

int __wrap_skv_notify_open(void);
int __wrap_skv_notify_open(void)
{
    return manager.there ? kinds[NOTHING] : -1;
}

int __wrap_skv_notify_store(int socket, const char *name, int fd);
int __wrap_skv_notify_store(int socket, const char *name, int fd)
{
    FUZZ_MUST(socket == kinds[NOTHING]);
    copy_add(name, fd);
    return 0;
}

int __wrap_skv_notify_drop(int socket, const char *name);
int __wrap_skv_notify_drop(int socket, const char *name)
{
    FUZZ_MUST(socket == kinds[NOTHING]);
    for (uint32_t i = 0; i < manager.count;)
        if (strcmp(manager.copies[i].name, name) == 0) {
            close(manager.copies[i].fd);
            manager.copies[i] = manager.copies[--manager.count];
        } else {
            i++;
        }
    return 0;
}

static uint32_t copies_of(const char *format, uint64_t number)
{
    char name[64];
    uint32_t count = 0;
    snprintf(name, sizeof name, format, (unsigned long long)number);
    for (uint32_t i = 0; i < manager.count; i++)
        count += strcmp(manager.copies[i].name, name) == 0;
    return count;
}

/* Copies that are called so, with a number as the keeper writes it. */
static uint32_t copies_numbered(const char *prefix, uint64_t limit)
{
    size_t length = strlen(prefix);
    uint32_t count = 0;
    for (uint32_t i = 0; i < manager.count; i++) {
        const char *number = manager.copies[i].name + length;
        uint64_t value = strtoull(number, NULL, 10);
        count += strncmp(manager.copies[i].name, prefix, length) == 0 && value < limit && *number &&
                 strspn(number, "0123456789") == strlen(number) && (*number != '0' || !number[1]);
    }
    return count;
}

/* What a keeper that follows would find is what this one holds. */
static void check(void)
{
    FUZZ_MUST(!held.whole || (held.extents && held.table >= 0 && held.sessions >= 0));
    for (uint32_t i = 0; held.whole && i < held.extents; i++)
        FUZZ_MUST(held.pool[i] >= 0);
    if (!manager.there || manager.full)
        return;
    for (uint32_t i = 0; i < held.extents; i++)
        FUZZ_MUST(copies_of("pool-%llu", i) == 1);
    for (uint32_t i = 0; i < held.worker_count; i++)
        FUZZ_MUST(copies_of("worker-%llu", held.workers[i].id));
    FUZZ_MUST(copies_numbered("pool-", KEEPER_FDS) == held.extents);
    FUZZ_MUST(copies_numbered("worker-", UINT64_MAX) == held.worker_count);
    FUZZ_MUST(copies_of("table-%llu", held.extent_bytes) == (held.table >= 0));
    FUZZ_MUST(copies_numbered("table-", UINT64_MAX) == (held.table >= 0));
    FUZZ_MUST(copies_of("sessions", 0) == (held.sessions >= 0));
}

/* ---- waiting ---- */

/* Nobody waits for what does not come: it takes as long as it may. */
int __real_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
    int ready = __real_poll(fds, count, 0);
    FUZZ_MUST(ready != 0 || timeout_ms >= 0);
    return ready;
}

/* ---- the start ---- */

static void make_kinds(void)
{
    const int fixed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    const uint64_t pages = EXTENTS * EXTENT_BYTES / skv_page_bytes(&geometry);
    uint64_t table_bytes = sizeof *table + pages * sizeof *table->entries;
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    const int made[KINDS] = {[EXTENT] = fuzz_memory(EXTENT_BYTES, fixed),
                             [TABLE] = fuzz_memory(table_bytes, fixed),
                             [SESSIONS] = fuzz_memory(sizeof *sessions, fixed),
                             [PROCESS] = (int)syscall(SYS_pidfd_open, child, 0),
                             [BELL] = eventfd(0, EFD_CLOEXEC),
                             [RUNG_BELL] = eventfd(1, EFD_CLOEXEC),
                             [SMALL] = fuzz_memory(100, fixed),
                             [NOTHING] = open("/dev/null", O_RDWR | O_CLOEXEC)};
    waitpid(child, NULL, 0); /* gone, and what is sent to it kills nobody */
    for (int i = 0; i < KINDS; i++) {
        kinds[i] = fcntl(made[i], F_DUPFD_CLOEXEC, HIGH_FD);
        close(made[i]);
        FUZZ_MUST(kinds[i] >= 0);
    }
    table = mmap(NULL, table_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, kinds[TABLE], 0);
    sessions = mmap(NULL, sizeof *sessions, PROT_READ | PROT_WRITE, MAP_SHARED, kinds[SESSIONS], 0);
    FUZZ_MUST(table != MAP_FAILED && sessions != MAP_FAILED);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    struct daemon *d = &fuzz_daemon;
    const char *what;
    (void)argc, (void)argv;
    signal(SIGPIPE, SIG_IGN);
    FUZZ_MUST(skv_fd_limit_raise(2 * KEEPER_FDS) == 0);
    make_kinds();
    for (int fd = FIRST_FD; fd < HIGH_FD; fd++) /* the loop goes elsewhere */
        dup2(kinds[NOTHING], fd);
    d->options =
        (struct options){.geometry = geometry, .export = SKV_EXPORT_FD, .standby = STANDBY_ON};
    d->device_bell = d->signals = -1;
    FUZZ_MUST(skv_device_open("host", &d->device) == 0);
    FUZZ_MUST(loop_open(&d->loop, true, &what) == 0);
    for (int fd = FIRST_FD; fd < HIGH_FD; fd++)
        close(fd);
    return 0;
}

/* Tables of a pool of EXTENTS, with a session that may touch it. */
static void fill_tables(void)
{
    *table = (struct wire_table){.magic = WIRE_MAGIC,
                                 .version = WIRE_TABLE_VERSION,
                                 .geometry = geometry,
                                 .pages = EXTENTS * EXTENT_BYTES / skv_page_bytes(&geometry),
                                 .pool_id = 4711};
    *sessions = (struct keeper_sessions){
        .magic = KEEPER_MAGIC, .device_kind = SKV_DEVICE_HOST, .pool_id = 4711};
    memcpy(sessions->uuid, skv_device_info(fuzz_daemon.device)->uuid, sizeof sessions->uuid);
    for (uint32_t i = 0; i < 4; i++)
        sessions->sessions[i] = (struct keeper_session){.id = i, .pid = getpid(), .state = i % 3};
}

static void spoil(struct fuzz_input *in, void *bytes, size_t size, uint32_t changes)
{
    for (; changes > 0; changes--) {
        uint32_t where = fuzz_u8(in);
        ((uint8_t *)bytes)[where % size] = fuzz_u8(in);
    }
}

/* ---- the keeper's daemon ---- */

static void hear(void)
{
    if (ends[0] >= 0 && !skv_held_listen(&held, ends[0], &heard)) {
        close(ends[0]);
        ends[0] = -1;
    }
    check();
}

static void hang_up(void)
{
    if (ends[1] >= 0)
        close(ends[1]);
    ends[1] = -1;
    for (int i = 0; i < 100 && ends[0] >= 0; i++)
        hear();
    FUZZ_MUST(ends[0] < 0);
}

static void connect_daemon(void)
{
    int pair[2];
    hang_up();
    FUZZ_MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0);
    for (int i = 0; i < 2; i++) {
        ends[i] = fcntl(pair[i], F_DUPFD_CLOEXEC, HIGH_FD);
        close(pair[i]);
    }
}

static void say(int socket, const void *message, size_t bytes, const int *fds, uint32_t count)
{
    if (socket >= 0)
        skv_send_fds(socket, message, bytes, fds, count, MSG_DONTWAIT);
}

/* A message as it should be, then changed in places; or any bytes. */
static void message(struct fuzz_input *in, int socket)
{
    static const uint8_t usual[] = {
        [KEEPER_FRESH] = 0, [KEEPER_POOL] = 2,   [KEEPER_TABLE] = 1,   [KEEPER_SESSION_TABLE] = 1,
        [KEEPER_WHOLE] = 0, [KEEPER_WORKER] = 1, [KEEPER_GONE] = 0,    [KEEPER_END] = 0,
        [KEEPER_LIFE] = 1,  [KEEPER_WAITS] = 0,  [KEEPER_STANDBY] = 0, [KEEPER_SERVES] = 0};
    static const enum kind usually[] = {[KEEPER_TABLE] = TABLE,
                                        [KEEPER_SESSION_TABLE] = SESSIONS,
                                        [KEEPER_WORKER] = PROCESS,
                                        [KEEPER_LIFE] = BELL,
                                        [KEEPER_SERVES] = EXTENT};
    uint8_t bytes[256], what = fuzz_u8(in), how = fuzz_u8(in);
    int fds[SKV_FDS_PER_MESSAGE];
    struct keeper_message m = {
        .magic = KEEPER_MAGIC, .kind = what % 14, .extent_bytes = EXTENT_BYTES};
    size_t size = sizeof m;
    uint32_t count = m.kind <= KEEPER_SERVES ? usual[m.kind] : 0;
    enum kind kind = m.kind <= KEEPER_SERVES ? usually[m.kind] : EXTENT;
    if (how & 1 || m.kind == KEEPER_WORKER || m.kind == KEEPER_GONE)
        m.id = fuzz_u8(in) % 8;
    if (how & 2)
        count = fuzz_u8(in) % SKV_FDS_PER_MESSAGE;
    for (uint32_t i = 0; i < count; i++)
        fds[i] = kinds[kind];
    if (how & 4 && count) {
        int other = kinds[fuzz_u8(in) % KINDS];
        fds[fuzz_u8(in) % count] = other;
    }
    if (how & 8)
        m.extent_bytes = fuzz_u32(in);
    spoil(in, &m, sizeof m, how >> 4 & 3);
    memcpy(bytes, &m, sizeof m);
    if (how & 64) {
        size = fuzz_u8(in);
        fuzz_take(in, bytes + sizeof m, size > sizeof m ? size - sizeof m : 0);
    }
    for (uint32_t times = how & 128 ? fuzz_u8(in) % 96 : 1; times > 0; times--)
        say(socket, bytes, size, fds, count);
}

/* All that a daemon says at its start. */
static void hand_over(void)
{
    struct keeper_message m = {.magic = KEEPER_MAGIC, .extent_bytes = EXTENT_BYTES};
    const int extents[EXTENTS] = {kinds[EXTENT], kinds[EXTENT]};
    m.kind = KEEPER_FRESH;
    say(ends[1], &m, sizeof m, NULL, 0);
    m.kind = KEEPER_POOL;
    say(ends[1], &m, sizeof m, extents, EXTENTS);
    m.kind = KEEPER_TABLE;
    say(ends[1], &m, sizeof m, &kinds[TABLE], 1);
    m.kind = KEEPER_SESSION_TABLE;
    say(ends[1], &m, sizeof m, &kinds[SESSIONS], 1);
    m.kind = KEEPER_WHOLE;
    say(ends[1], &m, sizeof m, NULL, 0);
}

/* ---- keepers that come and go ---- */

/* The process has ended: its descriptors are closed, and nobody was told. */
static void die(void)
{
    for (uint32_t i = 0; i < held.extents; i++)
        close(held.pool[i]);
    for (uint32_t i = 0; i < held.worker_count; i++)
        close(held.workers[i].pidfd);
    for (int *fd = (int[]){held.table, held.sessions, held.life, -2}; *fd != -2; fd++)
        if (*fd >= 0)
            close(*fd);
    held = (struct held){.table = -1, .sessions = -1, .life = -1, .manager = -1};
}

static void junk(struct fuzz_input *in)
{
    static const char *const names[] = {"pool-0",     "pool-1",  "pool-7x",  "pool-8192", "pool--1",
                                        "table-4096", "table-",  "worker-0", "worker-x",  "sidekvd",
                                        "sidekvd",    "a-thing", "sessions", "pool-01",   ""};
    uint8_t which = fuzz_u8(in) % 16;
    char text[16] = {0};
    fuzz_take(in, text, which == 15 ? sizeof text - 1 : 0);
    for (char *c = text; *c; c++)
        *c = *c == ':' ? '.' : *c;
    copy_add(which == 15 ? text : names[which], kinds[fuzz_u8(in) % KINDS]);
}

/* A keeper starts, with what the manager has. */
static void start(struct fuzz_input *in, uint8_t how)
{
    char names[COPIES * 64] = "", number[16];
    uint32_t given = manager.there ? manager.count : 0;
    for (uint32_t i = 0; i < given; i++) {
        FUZZ_MUST(fcntl(FIRST_FD + (int)i, F_GETFD) < 0);
        dup2(manager.copies[i].fd, FIRST_FD + (int)i);
        strcat(strcat(names, i ? ":" : ""), manager.copies[i].name);
    }
    snprintf(number, sizeof number, "%d", (int)getpid());
    setenv("LISTEN_PID", number, 1);
    snprintf(number, sizeof number, "%u", how & 2 ? given + fuzz_u8(in) * 10000000u : given);
    setenv("LISTEN_FDS", number, 1);
    setenv("LISTEN_FDNAMES", names, 1);
    if (how & 4) { /* then nobody knows what they are */
        unsetenv("LISTEN_FDNAMES");
        manager.full = true;
    }
    skv_held_open(&held);
    FUZZ_MUST(!getenv("LISTEN_FDS"));
}

/* ---- a daemon, given what is held or anything ---- */

static void take_and_serve(struct fuzz_input *in, int keeper, int mine)
{
    struct daemon *d = &fuzz_daemon;
    d->kept = (struct kept){.socket = mine, .life = -1, .table_fd = -1, .sessions_fd = -1};
    d->table = NULL;
    d->free_ns = 0;
    int status = skv_kept_take(d);
    bool taken = status == 0 && d->kept.handles.extents;
    FUZZ_MUST(!taken || (d->table && d->kept.sessions));
    if (status == 0 && skv_kept_take_pool(d) == 0)
        FUZZ_MUST(taken && d->pool && d->kept.adopted && skv_kept_pool_id(d));
    if (status == 0) {
        skv_kept_watch(d);
        for (uint32_t said = fuzz_u8(in) % 4; said > 0; said--) {
            message(in, keeper);
            loop_turn(d->loop, false, 0);
        }
        skv_kept_record(&(struct peer){.daemon = d, .session = 4, .pidfd = kinds[PROCESS]},
                        &status);
        skv_kept_forget(d, 4);
    }
    close(keeper);
    loop_turn(d->loop, false, 0);
    if (d->kept.socket >= 0)
        loop_forget(d->loop, &d->kept.watch);
    for (uint32_t i = 0; i < d->kept.worker_count; i++)
        loop_forget(d->loop, &d->kept.workers[i].death);
    skv_kept_close(d);
    skv_pool_close(d->pool);
    d->pool = NULL;
    if (d->table)
        munmap(d->table, d->table_bytes);
    fill_tables();
}

static void give(struct fuzz_input *in, uint8_t how)
{
    int pair[2];
    FUZZ_MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){.tv_usec = 1},
               sizeof(struct timeval));
    uint8_t spoilt = how & 1 ? fuzz_u8(in) : 0;
    spoil(in, table, 128, spoilt & 3);
    spoil(in, sessions, 128, spoilt >> 2 & 3);
    if (how & 2)
        message(in, pair[0]);
    if (how & 4)
        for (uint32_t said = 1 + fuzz_u8(in) % 8; said > 0; said--)
            message(in, pair[0]);
    else
        skv_held_give(&held, pair[0]);
    check();
    shutdown(pair[0], SHUT_WR);
    char byte;
    if (recv(pair[1], &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0) { /* it would end */
        close(pair[0]);
        close(pair[1]);
    } else {
        take_and_serve(in, pair[0], pair[1]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {.at = data, .end = data + size};
    uint32_t fds = fuzz_count_fds();
    int aside = fcntl(FIRST_FD, F_DUPFD_CLOEXEC, HIGH_FD); /* libFuzzer's, when it merges */
    if (aside >= 0)
        close(FIRST_FD);
    manager.there = fuzz_u8(&in) & 1;
    manager.full = false;
    ends[0] = ends[1] = -1;
    fill_tables();
    skv_held_open(&held);
    check();
    connect_daemon();
    while (fuzz_more(&in)) {
        uint8_t step = fuzz_u8(&in), how = step >> 3;
        switch (step & 7) {
        case 0:
            hand_over();
            hear();
            break;
        case 1 ... 2:
            message(&in, ends[1]);
            if (how & 1)
                hear();
            break;
        case 3:
            hear();
            break;
        case 4:
            connect_daemon();
            if (how & 1)
                message(&in, ends[0]); /* which it does not read */
            break;
        case 5: /* the keeper dies, and another one comes */
            if (manager.full)
                break;
            hear();
            die();
            if (how & 1)
                junk(&in);
            start(&in, how);
            check();
            break;
        default:
            hear();
            give(&in, how);
        }
    }
    hang_up();
    skv_held_drop_life(&held);
    held.whole = false;
    int nobody = kinds[NOTHING];
    skv_held_give(&held, nobody); /* what is not whole is dropped */
    FUZZ_MUST(!held.extents && !held.worker_count && held.table < 0 && held.sessions < 0);
    check();
    while (manager.count)
        close(manager.copies[--manager.count].fd);
    if (aside >= 0) {
        dup2(aside, FIRST_FD);
        close(aside);
    }
    FUZZ_MUST(fuzz_count_fds() == fds);
    return 0;
}
