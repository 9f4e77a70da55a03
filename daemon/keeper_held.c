/* Happy path: a daemon that makes a pool says KEEPER_FRESH, its extents, tables and KEEPER_WHOLE,
 * then each session that comes and goes; the one after it is given all of that, in the same words.
 *
 * Under systemd each of these fds has a copy in the manager's fd store under a name that says what
 * it is: stored as it comes and dropped as it goes, so that the next keeper takes back what this
 * one had, whatever this one dies of.
 *
 * What can go wrong: a message that is not sidekvd's, or that lost its fds, drops everything until
 * a daemon starts afresh; a set of fds that is not whole when its daemon has gone, or when a keeper
 * starts, is given to nobody and dropped; copies that are not ours are closed. */
#include "keeper_held.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "failpoint.h"
#include "fdpass.h"
#include "log.h"
#include "notify.h"

/* ---- the copies ---- */

/* What a copy is called. systemd passes all names in one variable, which the kernel bounds to
 * 128 KiB: 8,192 extents and 1,024 workers take at most 108 KiB. */
#define POOL     "pool-"  /* and the index of an extent */
#define TABLE    "table-" /* and the size of an extent */
#define SESSIONS "sessions"
#define WORKER   "worker-" /* and its session */
#define DAEMON   "sidekvd"

/* Has the manager store a copy of `fd` under a name; -1: drop those of that name. */
__attribute__((format(printf, 3, 4))) static void copy(const struct held *held, int fd,
                                                       const char *format, ...)
{
    char name[64];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    if (held->manager >= 0 && (fd >= 0 ? skv_notify_store(held->manager, name, fd)
                                       : skv_notify_drop(held->manager, name)))
        skv_error("the service manager does not take %s: %s", name, strerror(errno));
}

void skv_held_daemon(const struct held *held, pid_t pid)
{
    int pidfd = held->manager >= 0 && pid ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
    if (pidfd >= 0 || !pid)
        copy(held, pidfd, DAEMON);
    if (pidfd >= 0)
        close(pidfd);
}

/* ---- letting go ---- */

static void drop_sessions(struct held *held)
{
    if (held->sessions < 0)
        return;
    copy(held, -1, SESSIONS);
    close(held->sessions);
    held->sessions = -1;
}

static void drop_table(struct held *held)
{
    if (held->table < 0)
        return;
    copy(held, -1, TABLE "%llu", (unsigned long long)held->extent_bytes);
    close(held->table);
    held->table = -1;
}

/* The tables' copies go first and come last: where both are there, the pool is whole. */
static void drop_all(struct held *held)
{
    held->whole = false;
    drop_sessions(held);
    drop_table(held);
    while (held->extents) {
        close(held->pool[--held->extents]);
        copy(held, -1, POOL "%u", held->extents);
    }
    while (held->worker_count) {
        close(held->workers[--held->worker_count].pidfd);
        copy(held, -1, WORKER "%llu", (unsigned long long)held->workers[held->worker_count].id);
    }
}

void skv_held_drop_life(struct held *held)
{
    if (held->life >= 0)
        close(held->life);
    held->life = -1;
}

static void drop_worker(struct held *held, uint64_t id)
{
    for (uint32_t i = 0; i < held->worker_count;) {
        if (held->workers[i].id != id) {
            i++;
            continue;
        }
        copy(held, -1, WORKER "%llu", (unsigned long long)id);
        close(held->workers[i].pidfd);
        held->workers[i] = held->workers[--held->worker_count];
    }
}

/* ---- what an earlier keeper left ---- */

struct leftovers {
    struct held *held;
    int daemon; /* pidfd of the earlier keeper's daemon; -1: there is none */
    bool twice; /* something was there twice: which one counts nobody knows */
};

/* Is it our name for something with a number? */
static bool numbered(const char *name, const char *prefix, uint64_t *number)
{
    size_t length = strlen(prefix);
    char again[64];
    if (strncmp(name, prefix, length) != 0)
        return false;
    *number = strtoull(name + length, NULL, 10);
    snprintf(again, sizeof again, "%s%llu", prefix, (unsigned long long)*number);
    return strcmp(name, again) == 0;
}

static void take_back(void *context, const char *name, int fd)
{
    struct leftovers *left = context;
    struct held *held = left->held;
    uint64_t number;
    int *at = NULL;
    if (numbered(name, POOL, &number) && number < KEEPER_FDS) {
        while (held->extents <= number)
            held->pool[held->extents++] = -1;
        at = &held->pool[number];
    } else if (numbered(name, WORKER, &number) && held->worker_count < KEEPER_SESSIONS) {
        held->workers[held->worker_count].id = number;
        at = &held->workers[held->worker_count].pidfd;
        *at = -1;
        held->worker_count++;
    } else if (numbered(name, TABLE, &number)) {
        at = &held->table;
        if (*at < 0)
            held->extent_bytes = number;
    } else if (strcmp(name, SESSIONS) == 0) {
        at = &held->sessions;
    } else if (strcmp(name, DAEMON) == 0) {
        at = &left->daemon;
    }
    if (at && *at < 0) {
        *at = fd;
        return;
    }
    if (at) {
        left->twice = true;
        copy(held, -1, "%s", name);
    }
    close(fd); /* not ours, or twice */
}

/* What an earlier keeper's daemon may still do to the pool ends here. */
static bool end_daemon(const struct held *held, int pidfd)
{
    syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
    struct pollfd gone = {.fd = pidfd, .events = POLLIN};
    bool ended = poll(&gone, 1, KEEPER_GIVE_S * 1000) == 1;
    if (!ended)
        skv_error("the earlier keeper's sidekvd does not die: its pool is not used again");
    copy(held, -1, DAEMON);
    close(pidfd);
    return ended;
}

void skv_held_open(struct held *held)
{
    *held = (struct held){.table = -1, .sessions = -1, .life = -1, .manager = skv_notify_open()};
    if (held->manager >= 0)
        setsockopt(held->manager, SOL_SOCKET, SO_SNDTIMEO,
                   &(struct timeval){.tv_sec = KEEPER_GIVE_S}, sizeof(struct timeval));
    struct leftovers left = {.held = held, .daemon = -1};
    skv_notify_stored(take_back, &left);
    bool ended = left.daemon < 0 || end_daemon(held, left.daemon);
    held->whole = ended && !left.twice && held->extents && held->table >= 0 && held->sessions >= 0;
    for (uint32_t i = 0; i < held->extents; i++)
        held->whole = held->whole && held->pool[i] >= 0;
    if (held->whole)
        skv_info("an earlier keeper left %u extents and %u workers", held->extents,
                 held->worker_count);
    else
        drop_all(held);
}

/* ---- what the daemon says ---- */

/* Takes a message's fds into what is held, or closes those of a kind that it does not know. false:
 * it makes no sense, and they are the caller's. */
static bool hold(struct held *held, const struct keeper_message *m, const int *fds, uint32_t count)
{
    switch (m->kind) {
    case KEEPER_FRESH:
        if (count)
            return false;
        drop_all(held);
        return true;
    case KEEPER_POOL:
        if (!count || held->extents + count > KEEPER_FDS || held->table >= 0 ||
            (held->extents && held->extent_bytes != m->extent_bytes))
            return false;
        held->extent_bytes = m->extent_bytes;
        for (uint32_t i = 0; i < count; i++) {
            copy(held, fds[i], POOL "%u", held->extents);
            held->pool[held->extents++] = fds[i];
        }
        skv_failpoint(FAIL_keeper_part);
        return true;
    case KEEPER_TABLE:
        if (count != 1 || held->table >= 0)
            return false;
        held->table = fds[0];
        copy(held, held->table, TABLE "%llu", (unsigned long long)held->extent_bytes);
        return true;
    case KEEPER_SESSION_TABLE:
        if (count != 1 || held->sessions >= 0)
            return false;
        held->sessions = fds[0];
        copy(held, held->sessions, SESSIONS);
        return true;
    case KEEPER_WHOLE:
        if (count)
            return false;
        skv_failpoint(FAIL_keeper_unwhole);
        held->whole = held->extents && held->table >= 0 && held->sessions >= 0;
        return true;
    case KEEPER_WORKER:
        if (count != 1)
            return false;
        drop_worker(held, m->id);
        if (held->worker_count == KEEPER_SESSIONS) {
            close(fds[0]); /* the next daemon will ask for it by its pid */
            return true;
        }
        held->workers[held->worker_count].id = m->id;
        copy(held, fds[0], WORKER "%llu", (unsigned long long)m->id);
        held->workers[held->worker_count++].pidfd = fds[0];
        skv_failpoint(FAIL_keeper_pidfd);
        return true;
    case KEEPER_GONE:
        if (count)
            return false;
        drop_worker(held, m->id);
        return true;
    case KEEPER_LIFE:
        if (count != 1)
            return false;
        skv_held_drop_life(held);
        held->life = fds[0];
        return true;
    }
    while (count)
        close(fds[--count]);
    return true;
}

bool skv_held_listen(struct held *held, int socket, struct heard *heard)
{
    for (uint32_t turn = 0; turn < HELD_TURN; turn++) {
        struct keeper_message m;
        int fds[SKV_FDS_PER_MESSAGE];
        uint32_t count;
        ssize_t got =
            skv_receive_fds(socket, &m, sizeof m, fds, SKV_FDS_PER_MESSAGE, &count, MSG_DONTWAIT);
        if (got < 0 && errno == EAGAIN)
            return true;
        if (got < 0 && errno == ECONNRESET)
            continue; /* it left something unread: said once, before what it said last */
        if (got == 0 || (got < 0 && errno != EPROTO && errno != EMSGSIZE))
            return false;
        if (got == sizeof m && m.magic == KEEPER_MAGIC && hold(held, &m, fds, count)) {
            heard->serves = heard->serves || m.kind == KEEPER_SERVES;
            heard->standby = heard->standby || (m.kind == KEEPER_SERVES && m.id);
            continue;
        }
        while (count)
            close(fds[--count]);
        skv_error("a message that is not sidekvd's, or that lost its fds: nothing is kept from now "
                  "on");
        drop_all(held); /* until a daemon starts afresh */
    }
    return true;
}

/* ---- giving it on ---- */

static int say(const struct held *held, int socket, enum keeper_kind kind, uint64_t id,
               const int *fds, uint32_t count)
{
    struct keeper_message m = {
        .magic = KEEPER_MAGIC, .kind = kind, .id = id, .extent_bytes = held->extent_bytes};
    return skv_send_fds(socket, &m, sizeof m, fds, count, 0);
}

int skv_held_give(struct held *held, int socket)
{
    if (!held->whole)
        drop_all(held);
    int failed = 0;
    for (uint32_t i = 0; i < held->extents && !failed; i += SKV_FDS_PER_MESSAGE) {
        uint32_t left = held->extents - i;
        failed = say(held, socket, KEEPER_POOL, i, held->pool + i,
                     left < SKV_FDS_PER_MESSAGE ? left : SKV_FDS_PER_MESSAGE);
        skv_failpoint(FAIL_keeper_giving);
    }
    if (held->whole && !failed)
        failed = say(held, socket, KEEPER_TABLE, 0, &held->table, 1) ||
                 say(held, socket, KEEPER_SESSION_TABLE, 0, &held->sessions, 1);
    for (uint32_t i = 0; i < held->worker_count && !failed; i++)
        failed = say(held, socket, KEEPER_WORKER, held->workers[i].id, &held->workers[i].pidfd, 1);
    if (!failed)
        failed = say(held, socket, KEEPER_END, held->manager >= 0 ? KEEPER_SUCCEEDED : 0, NULL, 0);
    if (!failed)
        return 0;
    int error = errno;
    shutdown(socket, SHUT_WR); /* whoever has a part shall not wait for the rest */
    errno = error;
    return -1;
}
