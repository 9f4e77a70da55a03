#include "kept.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon.h"
#include "failpoint.h"
#include "fdpass.h"
#include "log.h"

#define DEVICE_OLD_NS                                                                              \
    UINT64_C(1000000000) /* whoever has waited longer may have a device that failed meanwhile */
#define KEEPER_MS                                                                                  \
    100 /* the loop waits for a keeper that is behind: some 200 sessions came or went since it ran \
         */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- being killed ---- */

struct guard {
    int fd;
    bool alone;
    sem_t ready;
};

/* A process that is killed closes its files last, after its memory, and some of a GPU's take long:
 * the keeper would hear of it late. Its threads die at once. This one has a table of descriptors of
 * its own, with nothing in it but the end of a pipe. */
static void *stand_guard(void *context)
{
    struct guard *guard = context;
    unsigned fd = (unsigned)guard->fd;
    bool alone = syscall(SYS_close_range, fd + 1, ~0u, CLOSE_RANGE_UNSHARE) == 0 &&
                 syscall(SYS_close_range, 0u, fd - 1, 0u) == 0;
    guard->alone = alone;
    sem_post(&guard->ready); /* `guard` ends here */
    if (!alone)
        return NULL;
    for (;;)
        pause();
}

/* Returns the pipe's other end, or -1: the keeper will do without. */
static int post_guard(void)
{
    int ends[2];
    pthread_t thread;
    sigset_t all, before;
    if (pipe2(ends, O_CLOEXEC))
        return -1;
    struct guard guard = {.fd = ends[1]};
    sem_init(&guard.ready, 0, 0);
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* as everywhere; see sigbus.h */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, stand_guard, &guard) == 0) {
        pthread_setname_np(thread, "skv-guard");
        pthread_detach(thread);
        while (sem_wait(&guard.ready))
            ;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    sem_destroy(&guard.ready);
    close(ends[1]);
    if (!guard.alone)
        close_fd(&ends[0]);
    return ends[0];
}

/* ---- what an earlier daemon left ---- */

static void drop_left(struct kept *kept)
{
    for (uint32_t i = 0; i < kept->handles.extents; i++)
        close(kept->handles.fds[i]);
    free(kept->handles.fds);
    kept->handles = (struct skv_pool_handles){0};
    close_fd(&kept->table_fd);
    close_fd(&kept->sessions_fd);
    if (kept->sessions)
        munmap(kept->sessions, sizeof *kept->sessions);
    kept->sessions = NULL;
    for (uint32_t i = 0; i < kept->worker_count; i++)
        close_fd(&kept->workers[i].pidfd);
    kept->worker_count = 0;
}

static int say(struct kept *kept, enum keeper_kind kind, uint64_t id, uint64_t extent_bytes,
               const int *fds, uint32_t count, int flags)
{
    struct keeper_message m = {
        .magic = KEEPER_MAGIC, .kind = kind, .id = id, .extent_bytes = extent_bytes};
    if (kept->socket < 0)
        return -1;
    if (skv_send_fds(kept->socket, &m, sizeof m, fds, count, flags) == 0)
        return 0;
    struct pollfd room = {.fd = kept->socket, .events = POLLOUT};
    if (errno != EAGAIN || poll(&room, 1, KEEPER_MS) != 1)
        return -1;
    return skv_send_fds(kept->socket, &m, sizeof m, fds, count, flags);
}

/* What was left is not used: the keeper lets go of it too, so that its memory is free. */
static void refuse_left(struct kept *kept, const char *why)
{
    if (!kept->handles.extents)
        return;
    skv_warn("the pool that an earlier daemon left is not used: %s", why);
    drop_left(kept);
    say(kept, KEEPER_FRESH, 0, 0, NULL, 0, 0);
}

/* Takes the fds of one message. */
static bool take(struct kept *kept, const struct keeper_message *m, const int *fds, uint32_t count)
{
    struct skv_pool_handles *h = &kept->handles;
    int *table;
    switch (m->kind) {
    case KEEPER_POOL:
        if (m->id != h->extents || h->extents + count > KEEPER_FDS)
            return false;
        memcpy(h->fds + h->extents, fds, count * sizeof *fds);
        h->extents += count;
        h->extent_bytes = m->extent_bytes;
        return true;
    case KEEPER_TABLE:
    case KEEPER_SESSION_TABLE:
        table = m->kind == KEEPER_TABLE ? &kept->table_fd : &kept->sessions_fd;
        if (count != 1 || *table >= 0)
            return false;
        *table = fds[0];
        return true;
    case KEEPER_WORKER:
        if (count != 1 || kept->worker_count == KEEPER_SESSIONS)
            return false;
        kept->workers[kept->worker_count++] = (struct kept_worker){.id = m->id, .pidfd = fds[0]};
        return true;
    }
    return false;
}

/* Waits until it is given something, or its keeper has gone, for as long as another daemon lives.
 * Until then it is nobody: told to end it does, and one whose device does not open leaves it to the
 * keeper to try again. */
static int await_turn(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    struct pollfd fds[] = {{.fd = kept->socket, .events = POLLIN},
                           {.fd = daemon->signals, .events = POLLIN},
                           {.fd = daemon->device_bell, .events = POLLIN}};
    eventfd_t rung;
    char byte;
    prctl(PR_SET_NAME, "sidekvd-standby"); /* for ps */
    while (poll(fds, 3, -1) < 0 || !fds[0].revents) {
        if (fds[1].revents)
            _exit(0);
        if (!fds[2].revents)
            continue;
        eventfd_read(daemon->device_bell, &rung);
        if (daemon->device_status)
            return daemon->device_status;
        say(kept, KEEPER_WAITS, 0, 0, NULL, 0, 0);
    }
    prctl(PR_SET_NAME, "sidekvd");
    if (recv(kept->socket, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0) {
        skv_info("the keeper has gone, and gave nothing: ending");
        _exit(0);
    }
    return SKV_OK;
}

static int receive(struct kept *kept)
{
    kept->handles.fds = malloc(KEEPER_FDS * sizeof(int));
    if (!kept->handles.fds)
        return SKV_ENOMEM;
    for (;;) {
        struct keeper_message m;
        int fds[SKV_FDS_PER_MESSAGE];
        uint32_t count;
        ssize_t got =
            skv_receive_fds(kept->socket, &m, sizeof m, fds, SKV_FDS_PER_MESSAGE, &count, 0);
        bool fine = got == sizeof m && m.magic == KEEPER_MAGIC;
        if (fine && m.kind == KEEPER_END && !count) {
            kept->succeeded = m.id == KEEPER_SUCCEEDED;
            return SKV_OK;
        }
        if (fine && take(kept, &m, fds, count))
            continue;
        while (count)
            close(fds[--count]);
        if (got == 0) {
            skv_error("the keeper has gone before it gave what it holds");
            return SKV_EAGAIN;
        }
        skv_error("the keeper's messages make no sense: %s",
                  got < 0 ? strerror(errno) : "install it and sidekvd from one release");
        return SKV_EPROTO;
    }
}

/* Maps the session table; false: it is none. */
static bool map_sessions(struct kept *kept)
{
    struct stat about;
    if (fstat(kept->sessions_fd, &about) || about.st_size != sizeof *kept->sessions)
        return false;
    void *memory = mmap(NULL, sizeof *kept->sessions, PROT_READ | PROT_WRITE, MAP_SHARED,
                        kept->sessions_fd, 0);
    if (memory == MAP_FAILED)
        return false;
    kept->sessions = memory;
    return kept->sessions->magic == KEEPER_MAGIC;
}

/* Why the table cannot be used; NULL: it can, and is mapped. */
static const char *check_left(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    const struct options *o = &daemon->options;
    struct stat about;
    uint64_t pool_bytes = kept->handles.extents * kept->handles.extent_bytes;
    if (o->export != SKV_EXPORT_FD)
        return "--export is not fd any more";
    if (!map_sessions(kept))
        return "its session table is of another release";
    if (fstat(kept->table_fd, &about) || (uint64_t)about.st_size < sizeof *daemon->table)
        return "its page descriptors are too short";
    daemon->table_bytes = (uint64_t)about.st_size;
    void *table =
        mmap(NULL, daemon->table_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, kept->table_fd, 0);
    if (table == MAP_FAILED)
        return "its page descriptors cannot be mapped";
    daemon->table = table;
    const struct wire_table *t = table;
    if (t->magic != WIRE_MAGIC || t->version != WIRE_TABLE_VERSION)
        return "its page descriptors are of another release";
    if (memcmp(&t->geometry, &o->geometry, sizeof t->geometry) != 0)
        return "the geometry is another one";
    if (kept->sessions->requested_bytes != o->pool_bytes)
        return "--pool-bytes is another one";
    if (!t->pool_id || t->pool_id != kept->sessions->pool_id ||
        t->pages != pool_bytes / skv_page_bytes(&t->geometry) ||
        daemon->table_bytes != sizeof *t + t->pages * sizeof *t->entries)
        return "its parts do not belong together";
    return NULL;
}

int skv_kept_open(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    const char *number = getenv(KEEPER_FD);
    *kept = (struct kept){.socket = -1, .life = -1, .table_fd = -1, .sessions_fd = -1};
    if (!number)
        return SKV_OK;
    int fd = atoi(number);
    unsetenv(KEEPER_FD);
    if (fd < 3 || fcntl(fd, F_SETFD, FD_CLOEXEC)) {
        skv_error(KEEPER_FD "=%s is no socket", number);
        return SKV_EINVAL;
    }
    kept->socket = fd;
    kept->life = post_guard();
    return SKV_OK;
}

int skv_kept_take(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    if (kept->socket < 0)
        return SKV_OK;
    int status = await_turn(daemon);
    if (!status)
        status = receive(kept);
    if (status)
        return status;
    if (!kept->handles.extents)
        drop_left(kept); /* what comes without a pool belongs to none */
    const char *why = kept->handles.extents ? check_left(daemon) : NULL;
    if (!why)
        return SKV_OK;
    if (daemon->table)
        munmap(daemon->table, daemon->table_bytes);
    daemon->table = NULL;
    refuse_left(kept, why);
    return SKV_OK;
}

/* The workers that may still touch pages: those recorded, with their pidfds. */
static void take_workers(struct kept *kept)
{
    uint32_t given = kept->worker_count, count = 0;
    struct kept_worker *left = calloc(given + 1, sizeof *left);
    if (left)
        memcpy(left, kept->workers, given * sizeof *left);
    else
        given = 0;
    for (uint32_t i = 0; i < KEEPER_SESSIONS; i++) {
        struct keeper_session *s = &kept->sessions->sessions[i];
        if (s->state != KEEPER_TOUCHES) {
            s->state = KEEPER_FREE;
            continue;
        }
        int pidfd = -1;
        for (uint32_t w = 0; w < given; w++)
            if (left[w].id == s->id && left[w].pidfd >= 0) {
                pidfd = left[w].pidfd;
                left[w].pidfd = -1;
            }
        if (pidfd < 0) /* the keeper was another one then */
            pidfd = (int)syscall(SYS_pidfd_open, s->pid, 0);
        if (pidfd < 0) {
            s->state = KEEPER_FREE;
            continue;
        }
        kept->workers[count++] = (struct kept_worker){.id = s->id, .pid = s->pid, .pidfd = pidfd};
    }
    for (uint32_t w = 0; w < given; w++)
        if (left[w].pidfd >= 0) { /* killed before it was recorded, or after it was forgotten */
            say(kept, KEEPER_GONE, left[w].id, 0, NULL, 0, MSG_DONTWAIT);
            close(left[w].pidfd);
        }
    free(left);
    kept->worker_count = kept->unsettled = count;
}

int skv_kept_take_pool(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    const struct skv_device_info *device = skv_device_info(daemon->device);
    if (!kept->handles.extents)
        return SKV_ENOENT;
    kept->handles.export = SKV_EXPORT_FD;
    kept->handles.pool_bytes = kept->handles.extents * kept->handles.extent_bytes;
    const char *why = NULL;
    int status = SKV_OK;
    if (kept->sessions->device_kind != (uint32_t)device->kind ||
        memcmp(kept->sessions->uuid, device->uuid, sizeof device->uuid) != 0)
        why = "the device is another one";
    else if ((status = skv_pool_adopt(daemon->device, &kept->handles,
                                      skv_page_bytes(&daemon->options.geometry), &daemon->pool)))
        why = "its memory cannot be mapped";
    if (status && daemon->free_ns > daemon->device_ns[1] + DEVICE_OLD_NS) {
        skv_error("the device does not take the pool that an earlier daemon left: ending, so that "
                  "a new daemon opens it anew and tries");
        return status;
    }
    if (why) {
        munmap(daemon->table, daemon->table_bytes);
        daemon->table = NULL;
        refuse_left(kept, why);
        return SKV_ENOENT;
    }
    kept->handles = (struct skv_pool_handles){0}; /* the pool's now */
    kept->adopted = kept->holds = true;
    take_workers(kept);
    return SKV_OK;
}

/* ---- handing over ---- */

/* The session table of a new pool. */
static int make_sessions(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    const struct skv_device_info *device = skv_device_info(daemon->device);
    kept->sessions_fd = memfd_create("sidekv-sessions", MFD_CLOEXEC);
    if (kept->sessions_fd < 0 || ftruncate(kept->sessions_fd, sizeof *kept->sessions))
        return -1;
    void *memory = mmap(NULL, sizeof *kept->sessions, PROT_READ | PROT_WRITE, MAP_SHARED,
                        kept->sessions_fd, 0);
    if (memory == MAP_FAILED ||
        getrandom(&daemon->table->pool_id, sizeof daemon->table->pool_id, 0) < 0)
        return -1;
    kept->sessions = memory;
    daemon->table->pool_id |= 1; /* not 0 */
    *kept->sessions = (struct keeper_sessions){.magic = KEEPER_MAGIC,
                                               .device_kind = device->kind,
                                               .pool_id = daemon->table->pool_id,
                                               .requested_bytes = daemon->pool_requested};
    memcpy(kept->sessions->uuid, device->uuid, sizeof device->uuid);
    return 0;
}

static int send_all(struct daemon *daemon, int table_fd)
{
    struct kept *kept = &daemon->kept;
    const struct skv_pool_handles *h = skv_pool_exported(daemon->pool);
    int failed = say(kept, KEEPER_FRESH, 0, 0, NULL, 0, 0);
    for (uint32_t i = 0; i < h->extents && !failed; i += SKV_FDS_PER_MESSAGE) {
        uint32_t left = h->extents - i;
        failed = say(kept, KEEPER_POOL, i, h->extent_bytes, h->fds + i,
                     left < SKV_FDS_PER_MESSAGE ? left : SKV_FDS_PER_MESSAGE, 0);
        skv_failpoint(FAIL_start_handing);
    }
    return failed || say(kept, KEEPER_TABLE, 0, h->extent_bytes, &table_fd, 1, 0) ||
           say(kept, KEEPER_SESSION_TABLE, 0, h->extent_bytes, &kept->sessions_fd, 1, 0) ||
           say(kept, KEEPER_WHOLE, 0, h->extent_bytes, NULL, 0, 0);
}

void skv_kept_hand_over(struct daemon *daemon, int table_fd)
{
    struct kept *kept = &daemon->kept;
    if (kept->socket < 0)
        return;
    if (daemon->options.export != SKV_EXPORT_FD) {
        skv_warn("with --export ipc the pool ends with this daemon: restarts are cold");
        return;
    }
    if (make_sessions(daemon) || send_all(daemon, table_fd))
        skv_error("the keeper does not take the pool: %s; restarts are cold", strerror(errno));
    else
        kept->holds = true;
    skv_failpoint(FAIL_start_whole);
}

/* ---- while it runs ---- */

static void lose_keeper(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    if (kept->socket < 0)
        return;
    loop_forget(daemon->loop, &kept->watch);
    close_fd(&kept->socket);
    daemon->stats.standby = 0;
    kept->orphaned = kept->succeeded;
    if (kept->orphaned) {
        skv_warn("the keeper has gone: ending, so that the next one starts a daemon on the pool");
        return;
    }
    skv_warn("the keeper has gone: serving on without one; the pool ends with this daemon, and "
             "nobody starts it anew");
    kept->holds = false;
}

static void await_keeper(struct daemon *daemon)
{
    loop_poll(daemon->loop, &daemon->kept.watch, daemon->kept.socket, POLLIN | POLLRDHUP);
}

/* After KEEPER_END it has one thing to say. */
static void on_keeper(void *context, int32_t result)
{
    struct daemon *daemon = context;
    struct keeper_message m;
    (void)result;
    if (recv(daemon->kept.socket, &m, sizeof m, MSG_DONTWAIT) != sizeof m ||
        m.magic != KEEPER_MAGIC || m.kind != KEEPER_STANDBY) {
        lose_keeper(daemon);
        return;
    }
    daemon->stats.standby = m.id != 0;
    await_keeper(daemon);
}

static void on_death(void *context, int32_t result)
{
    struct kept_worker *worker = context;
    (void)result;
    worker->dead = true;
}

void skv_kept_watch(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    if (kept->life >= 0)
        say(kept, KEEPER_LIFE, 0, 0, &kept->life, 1, 0);
    close_fd(&kept->life);
    kept->watch = (struct watch){.done = on_keeper, .context = daemon};
    if (kept->socket >= 0)
        await_keeper(daemon);
    for (uint32_t i = 0; i < kept->worker_count; i++) {
        kept->workers[i].death = (struct watch){.done = on_death, .context = &kept->workers[i]};
        loop_poll(daemon->loop, &kept->workers[i].death, kept->workers[i].pidfd, POLLIN);
    }
}

void skv_kept_serves(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    const enum standby standby = daemon->options.standby;
    const bool slow = skv_device_info(daemon->device)->kind == SKV_DEVICE_CUDA; /* to open */
    const bool next = kept->holds && (standby == STANDBY_ON || (standby == STANDBY_AUTO && slow));
    say(kept, KEEPER_SERVES, next, 0, NULL, 0, 0);
}

void skv_kept_close(struct daemon *daemon)
{
    drop_left(&daemon->kept);
    close_fd(&daemon->kept.socket);
    close_fd(&daemon->kept.life);
}

void skv_kept_disown(struct daemon *daemon)
{
    if (daemon->kept.holds)
        say(&daemon->kept, KEEPER_FRESH, 0, 0, NULL, 0, 0);
    daemon->kept.holds = false;
}

uint64_t skv_kept_pool_id(const struct daemon *daemon)
{
    return daemon->kept.holds ? daemon->table->pool_id : 0;
}

const char *skv_kept_record(struct peer *peer, int *status)
{
    struct daemon *daemon = peer->daemon;
    struct kept *kept = &daemon->kept;
    *status = SKV_OK;
    if (!kept->holds)
        return NULL;
    struct keeper_session *slot = NULL;
    for (uint32_t i = 0; i < KEEPER_SESSIONS && !slot; i++)
        if (!kept->sessions->sessions[i].state)
            slot = &kept->sessions->sessions[i];
    *status = SKV_EFULL;
    if (!slot)
        return "the keeper holds too many sessions";
    if (say(kept, KEEPER_WORKER, peer->session, 0, &peer->pidfd, 1, MSG_DONTWAIT)) {
        if (errno == EAGAIN || errno == ETOOMANYREFS)
            return "the keeper does not take its pidfd";
        lose_keeper(daemon);
        *status = kept->orphaned ? SKV_EAGAIN : SKV_OK;
        /* a session that the next daemon does not know must not begin */
        return kept->orphaned ? "the keeper has died: a new daemon comes" : NULL;
    }
    skv_failpoint(FAIL_hello_pidfd);
    slot->id = peer->session;
    slot->pid = peer->pid;
    __atomic_store_n(&slot->state, KEEPER_WELCOMED, __ATOMIC_RELEASE); /* for the next daemon */
    peer->recorded = slot;
    skv_failpoint(FAIL_hello_recorded);
    *status = SKV_OK;
    return NULL;
}

void skv_kept_touches(struct peer *peer)
{
    if (peer->recorded) /* before the grant can be seen */
        __atomic_store_n(&peer->recorded->state, KEEPER_TOUCHES, __ATOMIC_RELEASE);
}

void skv_kept_forget(struct daemon *daemon, uint64_t session)
{
    struct kept *kept = &daemon->kept;
    for (uint32_t i = 0; kept->sessions && i < KEEPER_SESSIONS; i++) {
        struct keeper_session *slot = &kept->sessions->sessions[i];
        if (!slot->state || slot->id != session)
            continue;
        __atomic_store_n(&slot->state, KEEPER_FREE, __ATOMIC_RELEASE);
        say(kept, KEEPER_GONE, session, 0, NULL, 0,
            MSG_DONTWAIT); /* lost: a pidfd too many till the next daemon */
        return;
    }
}

static void settle(struct daemon *daemon, struct kept_worker *worker)
{
    struct kept *kept = &daemon->kept;
    skv_kept_forget(daemon, worker->id);
    skv_failpoint(FAIL_settle_one);
    loop_forget(daemon->loop, &worker->death);
    worker->id = 0;
    if (--kept->unsettled)
        return;
    skv_cache_settle(daemon->cache);
    skv_info("the earlier daemon's workers have reattached or are gone, %llu ms after the start",
             (unsigned long long)((daemon->now_ns - daemon->free_ns) / 1000000));
}

void skv_kept_drained(struct daemon *daemon, uint64_t session, pid_t pid)
{
    struct kept *kept = &daemon->kept;
    for (uint32_t i = 0; session && i < kept->worker_count; i++)
        if (kept->workers[i].id == session && kept->workers[i].pid == pid)
            settle(daemon, &kept->workers[i]);
}

uint64_t skv_kept_tick(struct daemon *daemon)
{
    struct kept *kept = &daemon->kept;
    uint64_t next_ns = UINT64_MAX;
    for (uint32_t i = 0; i < kept->worker_count; i++) {
        struct kept_worker *worker = &kept->workers[i];
        if (worker->id && worker->dead && !worker->due_ns)
            worker->due_ns = daemon->now_ns + GONE_NS;
        if (worker->id && worker->due_ns && daemon->now_ns >= worker->due_ns)
            settle(daemon, worker);
        else if (worker->id && worker->due_ns && worker->due_ns - daemon->now_ns < next_ns)
            next_ns = worker->due_ns - daemon->now_ns;
        if (!worker->id && worker->pidfd >= 0 && loop_forget(daemon->loop, &worker->death))
            close_fd(&worker->pidfd);
    }
    while (kept->worker_count && !kept->workers[kept->worker_count - 1].id &&
           kept->workers[kept->worker_count - 1].pidfd < 0)
        kept->worker_count--;
    return next_ns;
}
