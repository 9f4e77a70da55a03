/* Clients coming and going: the handshake, what a session maps, how it ends.
 *
 * The loop never waits for a client: the handshake is read when it is there and answered without
 * blocking; a client that does not read its answer, or says nothing within two seconds, is dropped.
 */
#include "daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "clock.h"
#include "failpoint.h"
#include "fdpass.h"
#include "hash.h"
#include "log.h"
#include "sigbus.h"

_Static_assert(SKV_SIGBUS_RANGES >= 2 * SKV_MAX_PEERS, "memory and gates of each");
_Static_assert(WIRE_FDS_PER_MESSAGE <= SKV_FDS_PER_MESSAGE, "a message of the wire fits");

#define BELL_BYTES 4096                 /* one ring would do */
#define HELLO_NS   UINT64_C(2000000000) /* a handshake's deadline */
#define ACCEPT_NS  UINT64_C(200000000)  /* between tries when no file descriptor is left */

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

static struct peer free_peer(struct daemon *daemon, uint32_t index)
{
    return (struct peer){.daemon = daemon,
                         .index = index,
                         .socket = -1,
                         .pidfd = -1,
                         .memory_fd = -1,
                         .sq_fd = -1,
                         .cq_fd = -1,
                         .cq_client_fd = -1,
                         .slot = -1};
}

void skv_peers_init(struct daemon *daemon)
{
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++)
        daemon->peers[i] = free_peer(daemon, i);
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Gives back what a peer holds. Its watches must be forgotten. */
static void peer_free(struct peer *peer)
{
    if (peer->session && !peer->admin)
        skv_kept_forget(peer->daemon, peer->session);
    skv_sigbus_unwatch(2 * peer->index);
    skv_sigbus_unwatch(2 * peer->index + 1);
    if (peer->gates) {
        skv_host_unregister(peer->daemon->device, peer->gates);
        munmap(peer->gates, peer->gates_bytes);
    }
    if (peer->ring)
        munmap(peer->ring, wire_session_bytes(peer->rows));
    free(peer->holding);
    close_fd(&peer->socket);
    close_fd(&peer->pidfd);
    close_fd(&peer->memory_fd);
    close_fd(&peer->sq_fd);
    close_fd(&peer->cq_fd);
    close_fd(&peer->cq_client_fd);
    *peer = free_peer(peer->daemon, peer->index);
}

/* Frees it once nothing of it is under way; else a later tick does. */
void skv_peer_gone(struct peer *peer)
{
    struct daemon *daemon = peer->daemon;
    peer->dead = true;
    bool quiet = loop_forget(daemon->loop, &peer->hangup);
    quiet = loop_forget(daemon->loop, &peer->bell) && quiet;
    quiet = loop_forget(daemon->loop, &peer->death) && quiet;
    if (peer->slot >= 0 && skv_cache_session_gone(daemon->cache, (uint32_t)peer->slot))
        peer->slot = -1;
    skv_drain_actions(daemon);
    skv_failpoint(FAIL_session_gone);
    if (quiet && peer->slot < 0 && peer->state == PEER_ENDING)
        peer_free(peer);
}

static void on_death(void *context, int32_t result)
{
    struct peer *peer = context;
    (void)result;
    peer->due_ns = skv_now_ns() + GONE_NS; /* the turn's time is of before its sleep */
}

static void forget_live(struct daemon *daemon, uint32_t index)
{
    uint32_t at = 0;
    while (daemon->live[at] != index)
        at++;
    daemon->live[at] = daemon->live[--daemon->live_count];
}

/* Throws away what a client said and nobody read: closing a socket over it would take our goodbye
 * back. It can say no more, so this ends. Every message comes with credentials that there is no
 * room for, which tells an empty one from the end. */
static void drain(int socket)
{
    struct msghdr in;
    setsockopt(socket, SOL_SOCKET, SO_PASSCRED, &(int){1}, sizeof(int));
    do
        in = (struct msghdr){0};
    while (recvmsg(socket, &in, MSG_DONTWAIT) >= 0 && in.msg_flags & MSG_CTRUNC);
}

void skv_peer_end(struct peer *peer, int status, const char *reason)
{
    struct daemon *daemon = peer->daemon;
    if (peer->state != PEER_HELLO && peer->state != PEER_LIVE)
        return;
    bool live = peer->state == PEER_LIVE;
    if (status) {
        struct wire_goodbye bye = {.magic = WIRE_MAGIC, .status = status};
        snprintf(bye.text, sizeof bye.text, "%s", reason);
        skv_warn("ending the session of pid %d: %s", (int)peer->pid, reason);
        if (live && send(peer->socket, &bye, sizeof bye, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            skv_debug("pid %d did not take its goodbye: %s", (int)peer->pid, strerror(errno));
    }
    daemon->stats.sessions_violations += live && status == SKV_EPROTO;
    daemon->stats.sessions -= live;
    daemon->stats.mps_workers -= peer->mps;
    peer->mps = false;
    if (live)
        forget_live(daemon, peer->index);
    peer->state = PEER_ENDING;
    loop_forget(daemon->loop, &peer->hangup);
    loop_forget(daemon->loop, &peer->bell);
    shutdown(peer->socket, SHUT_RDWR);
    drain(peer->socket);
    peer->due_ns = daemon->now_ns;
    if (peer->slot >= 0) {
        uint32_t slot = (uint32_t)peer->slot;
        skv_cache_session_fence(daemon->cache, slot);
        skv_failpoint(FAIL_session_fenced);
        bool idle = skv_cache_session_idle(daemon->cache, slot);
        if (idle && __atomic_load_n(&peer->ring->viewed, __ATOMIC_ACQUIRE) == WIRE_NO_VIEWS)
            skv_cache_unviewed(daemon->cache, slot);
        if (!idle || skv_cache_has_views(daemon->cache, slot)) {
            peer->due_ns = UINT64_MAX; /* its process may still touch its pages */
            loop_poll(daemon->loop, &peer->death, peer->pidfd, POLLIN);
        }
    }
    skv_peer_tick(peer);
}

bool skv_peer_quiet(const struct peer *peer)
{
    return !peer->unanswered &&
           (peer->slot < 0 || skv_cache_session_idle(peer->daemon->cache, (uint32_t)peer->slot));
}

bool skv_peer_faulted(const struct peer *peer)
{
    return skv_sigbus_hit(2 * peer->index) || (peer->gates && skv_sigbus_hit(2 * peer->index + 1));
}

void skv_peers_goodbye(struct daemon *daemon)
{
    struct wire_goodbye bye = {
        .magic = WIRE_MAGIC, .status = SKV_EAGAIN, .text = "the daemon restarts"};
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++)
        if (daemon->peers[i].state == PEER_LIVE)
            send(daemon->peers[i].socket, &bye, sizeof bye, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void on_hangup(void *context, int32_t result)
{
    struct peer *peer = context;
    char byte;
    ssize_t got = recv(peer->socket, &byte, sizeof byte, MSG_DONTWAIT);
    (void)result;
    if (got > 0)
        skv_peer_end(peer, SKV_EPROTO, "a message after the handshake");
    else if (got < 0 && (errno == EAGAIN || errno == EINTR))
        loop_poll(peer->daemon->loop, &peer->hangup, peer->socket, POLLIN | POLLRDHUP);
    else
        skv_peer_end(peer, SKV_OK, "it hung up");
}

/* The turn serves every ring anyway: this only empties the bell. The client has it too, may read it
 * empty first or change its flags, so whether the read waits is said with the read. */
static void on_bell(void *context, int32_t result)
{
    struct peer *peer = context;
    uint64_t rings;
    struct iovec part = {.iov_base = &rings, .iov_len = sizeof rings};
    if (result < 0 ||
        (preadv2(peer->sq_fd, &part, 1, -1, RWF_NOWAIT) < 0 && errno != EAGAIN && errno != EINTR)) {
        skv_peer_end(peer, SKV_EPROTO, "its doorbell broke");
        return;
    }
    loop_poll(peer->daemon->loop, &peer->bell, peer->sq_fd, POLLIN);
}

/* ---- the handshake ---- */

struct hello {
    struct wire_hello message;
    int fds[WIRE_HELLO_FDS];
    uint32_t fd_count;
};

/* One message of the handshake; false: the client does not read. */
static bool say(struct peer *peer, const void *message, size_t bytes, const int *fds,
                uint32_t count)
{
    return skv_send_fds(peer->socket, message, bytes, fds, count, MSG_DONTWAIT) == 0;
}

static void refuse(struct peer *peer, int status, const char *reason)
{
    struct wire_welcome answer = {.magic = WIRE_MAGIC,
                                  .version = WIRE_VERSION,
                                  .status = status,
                                  .daemon_pid = (uint32_t)getpid(),
                                  .geometry = peer->daemon->options.geometry};
    snprintf(answer.text, sizeof answer.text, "%s", reason);
    say(peer, &answer, sizeof answer, NULL, 0);
    peer->daemon->stats.sessions_refused++;
    skv_peer_end(peer, status, reason);
}

/* Has it hung up? An empty message reads the same. */
static bool hung_up(const struct peer *peer)
{
    struct pollfd now = {.fd = peer->socket, .events = POLLRDHUP};
    return poll(&now, 1, 0) == 1 && now.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

/* Of another release: what to do; NULL: it is not. Whatever else may be wrong with it then. */
static const char *check_version(const struct wire_hello *m)
{
    if (m->magic != WIRE_MAGIC || m->version == WIRE_VERSION)
        return NULL;
    return m->version < WIRE_VERSION
               ? "a library of an earlier release than the daemon: restart it with the installed "
                 "one"
               : "a library of a later release than the daemon: upgrade the daemon, or restart it";
}

/* Reads the hello: 1, 0 (not yet), or -1: it was none (it is refused, unless it said nothing at
 * all, as who only tries whether somebody listens). The fds are the caller's. */
static int receive(struct peer *peer, struct hello *hello)
{
    hello->message = (struct wire_hello){0};
    ssize_t got = skv_receive_fds(peer->socket, &hello->message, sizeof hello->message, hello->fds,
                                  WIRE_HELLO_FDS, &hello->fd_count, MSG_DONTWAIT);
    int error = got < 0 ? errno : 0;
    if (error == EAGAIN)
        return 0;
    if (got == sizeof hello->message)
        return 1;
    while (hello->fd_count)
        close(hello->fds[--hello->fd_count]);
    const char *version = check_version(&hello->message);
    if (version) {
        refuse(peer, SKV_EVERSION, version);
    } else if (error == EPROTO) {
        refuse(peer, SKV_EPROTO,
               "descriptors that no handshake has, or more than the daemon can open");
    } else if (got > 0 || error == EMSGSIZE) {
        refuse(peer, SKV_EPROTO, "a handshake of the wrong size");
    } else if (!hung_up(peer)) {
        refuse(peer, SKV_EPROTO, "an empty message for a handshake");
    } else {
        skv_debug("pid %d connected and hung up", (int)peer->pid);
        skv_peer_end(peer, SKV_OK, "");
    }
    return -1;
}

static bool all_zero(const void *bytes, size_t count)
{
    const uint8_t *at = bytes;
    uint8_t any = 0;
    for (size_t i = 0; i < count; i++)
        any |= at[i];
    return !any;
}

/* What is wrong with a hello; NULL: nothing. */
static const char *check_hello(const struct daemon *daemon, const struct hello *hello, int *status)
{
    const struct wire_hello *m = &hello->message;
    const struct skv_geometry *ours = &daemon->options.geometry;
    *status = SKV_EPROTO;
    if (m->magic != WIRE_MAGIC)
        return "not a sidekv handshake";
    *status = SKV_EVERSION;
    const char *version = check_version(m);
    if (version)
        return version;
    *status = SKV_EPROTO;
    if (!all_zero(m->reserved, sizeof m->reserved))
        return "reserved bytes of the handshake are not zero";
    if (m->kind == WIRE_ADMIN) {
        if (m->rows || m->gate_stride || hello->fd_count != 1 || !skv_id_is_zero(m->model) ||
            !all_zero(&m->geometry, sizeof m->geometry))
            return "an admin's handshake with a worker's fields";
        return NULL;
    }
    if (m->kind != WIRE_WORKER)
        return "an unknown kind of client";
    if (hello->fd_count != 2)
        return "a worker's handshake carries a pidfd and a gate memfd";
    if (!m->rows || m->rows > SKV_MAX_ROWS ||
        m->gate_stride != wire_gate_stride(m->geometry.layers))
        return "gate rows out of range";
    if (skv_id_is_zero(m->model))
        return "the model fingerprint is zero";
    *status = SKV_EGEOMETRY;
    if (memcmp(&m->geometry, ours, sizeof *ours) != 0)
        return "the worker's KV geometry is not the daemon's: start a daemon with the model's";
    return NULL;
}

/* The process behind the socket: its pidfd, held by us. The kernel's word where it gives it (6.5),
 * else the one sent, if it is of the pid that the socket names. */
static const char *check_process(struct peer *peer, int sent)
{
    if (peer->pid < 0)
        return "its credentials cannot be read";
    if (peer->uid != 0 && peer->uid != geteuid())
        return "another user's process: the daemon serves its own user and root";
    int fd;
    socklen_t size = sizeof fd;
    if (getsockopt(peer->socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &size) == 0) {
        peer->pidfd = fd;
        return NULL;
    }
    char path[64], line[128];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", sent);
    FILE *info = fopen(path, "re");
    int pid = -1;
    while (info && fgets(line, sizeof line, info))
        if (sscanf(line, "Pid: %d", &pid) == 1)
            break;
    if (info)
        fclose(info);
    if (pid != peer->pid)
        return "its pidfd is not of its own process";
    peer->pidfd = fcntl(sent, F_DUPFD_CLOEXEC, 0);
    return peer->pidfd < 0 ? "no file descriptor left" : NULL;
}

/* Maps the worker's gates and registers them with the device. */
static const char *map_gates(struct peer *peer, int fd, uint32_t rows)
{
    uint32_t layers = peer->daemon->options.geometry.layers;
    struct stat about;
    int seals = fcntl(fd, F_GET_SEALS), wanted = F_SEAL_SHRINK | F_SEAL_GROW;
    peer->gates_bytes = wire_gate_bytes(layers, rows);
    if (seals < 0 || (seals & wanted) != wanted)
        return "the gate memfd is not sealed against shrinking and growing";
    if (fstat(fd, &about) || (uint64_t)about.st_size != peer->gates_bytes)
        return "the gate memfd has the wrong size";
    void *memory =
        mmap(NULL, peer->gates_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED)
        return "the gate memfd cannot be mapped";
    if (skv_host_register(peer->daemon->device, memory, peer->gates_bytes, false)) {
        munmap(memory, peer->gates_bytes);
        return "the gate memory cannot be registered with the device";
    }
    peer->gates = memory;
    skv_sigbus_watch(2 * peer->index + 1, memory, peer->gates_bytes);
    return NULL;
}

/* The session's memory and bells. The client's is no eventfd: a write to one can be made to block,
 * as whoever shares it may fill it and clear O_NONBLOCK, at any time. */
static const char *make_session(struct peer *peer, uint32_t rows)
{
    uint64_t bytes = wire_session_bytes(rows);
    int bell[2] = {-1, -1};
    peer->rows = rows;
    peer->memory_fd = memfd_create("sidekv-session", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    peer->sq_fd = eventfd(0, EFD_CLOEXEC);
    bool paired = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, bell) == 0;
    shutdown(bell[0], SHUT_RD); /* what it sent would stay there, descriptors too */
    setsockopt(bell[0], SOL_SOCKET, SO_SNDBUF, &(int){BELL_BYTES}, sizeof(int));
    peer->cq_fd = bell[0];
    peer->cq_client_fd = bell[1];
    if (peer->memory_fd < 0 || peer->sq_fd < 0 || !paired ||
        ftruncate(peer->memory_fd, (off_t)bytes) ||
        fcntl(peer->memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return "no memory or file descriptor left for a session";
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, peer->memory_fd, 0);
    peer->holding = calloc((size_t)SKV_MAX_ROWS * WIRE_CQ_ENTRIES, sizeof *peer->holding);
    if (memory == MAP_FAILED || !peer->holding) {
        if (memory != MAP_FAILED)
            munmap(memory, bytes);
        return "no memory left for a session";
    }
    skv_sigbus_watch(2 * peer->index, memory, bytes);
    uint8_t *at = memory;
    peer->ring = memory;
    peer->sqes = (struct wire_sqe *)(void *)(at + WIRE_SQ_OFFSET);
    peer->cqes = (struct wire_cqe *)(void *)(at + WIRE_CQ_OFFSET);
    peer->scratch = at + WIRE_SCRATCH_OFFSET;
    peer->slots = (struct wire_slot *)(void *)(at + WIRE_SLOTS_OFFSET);
    peer->sq = (struct ring_side){.mine = &peer->ring->sq_head,
                                  .theirs = &peer->ring->sq_tail,
                                  .flags = &peer->ring->sq_flags,
                                  .entries = WIRE_ENTRIES};
    peer->cq = (struct ring_side){.mine = &peer->ring->cq_tail,
                                  .theirs = &peer->ring->cq_head,
                                  .flags = &peer->ring->cq_flags,
                                  .entries = WIRE_CQ_ENTRIES};
    return NULL;
}

/* A client that says its earlier session's streams have drained: nothing of that one is running any
 * more. Copies for it may be: they would open gates of the new session's batches, for the gate
 * memory is the same. false: they are still in flight. */
static bool release_drained(const struct peer *peer, uint64_t session)
{
    struct daemon *daemon = peer->daemon;
    bool released = true;
    skv_kept_drained(daemon, session, peer->pid);
    for (uint32_t i = 0; session && i < SKV_MAX_PEERS; i++) {
        struct peer *old = &daemon->peers[i];
        if (old->session != session || old->pid != peer->pid || old == peer)
            continue; /* ids can be guessed: the one it is about to get is no earlier one */
        skv_peer_end(old, SKV_OK, "it reconnected"); /* its hang-up may not have been seen yet */
        if (old->state == PEER_ENDING) {
            old->due_ns = daemon->now_ns;
            skv_peer_tick(old);
        }
        released = old->state == PEER_FREE || old->slot < 0;
    }
    return released;
}

static bool welcome(struct peer *peer)
{
    struct daemon *daemon = peer->daemon;
    const struct skv_device_info *device = skv_device_info(daemon->device);
    const struct skv_pool_handles *handles = skv_pool_exported(daemon->pool);
    struct wire_welcome answer = {
        .magic = WIRE_MAGIC,
        .version = WIRE_VERSION,
        .daemon_pid = (uint32_t)getpid(),
        .geometry = daemon->options.geometry,
        .session = peer->session,
        .pool_pages = daemon->table->pages,
        .pool_bytes = handles->pool_bytes,
        .extent_bytes = handles->extent_bytes,
        .extents = peer->admin ? 0 : handles->extents,
        .export = handles->export,
        .device_kind = device->kind,
        .mps = device->mps,
        .session_bytes = wire_session_bytes(peer->rows),
        .pool_id = skv_kept_pool_id(daemon),
        .protect = daemon->protect,
    };
    memcpy(answer.uuid, device->uuid, sizeof answer.uuid);
    memcpy(answer.ipc, handles->ipc, sizeof answer.ipc);
    snprintf(answer.device, sizeof answer.device, "%s", device->name);
    const int fds[WIRE_WELCOME_FDS] = {peer->memory_fd, peer->sq_fd, peer->cq_client_fd};
    if (!say(peer, &answer, sizeof answer, fds, WIRE_WELCOME_FDS))
        return false;
    close_fd(&peer->cq_client_fd);
    for (uint32_t first = 0; first < answer.extents; first += WIRE_FDS_PER_MESSAGE) {
        uint32_t count = answer.extents - first;
        if (count > WIRE_FDS_PER_MESSAGE)
            count = WIRE_FDS_PER_MESSAGE;
        struct wire_extents part = {.magic = WIRE_MAGIC, .first = first, .count = count};
        if (!say(peer, &part, sizeof part, handles->fds + first, count))
            return false;
    }
    return true;
}

/* Everything between a good hello and the welcome; the reason when it does not work out. */
static const char *let_in(struct peer *peer, const struct hello *hello, int *status)
{
    struct daemon *daemon = peer->daemon;
    const struct wire_hello *m = &hello->message;
    const char *wrong = check_hello(daemon, hello, status);
    if (wrong)
        return wrong;
    *status = SKV_EPERM;
    if ((wrong = check_process(peer, hello->fds[0])))
        return wrong;
    peer->admin = m->kind == WIRE_ADMIN;
    peer->model = m->model;
    *status = SKV_EAGAIN;
    if (!release_drained(peer, m->drained))
        return "copies of its earlier session are still in flight";
    *status = SKV_EPROTO;
    if (!peer->admin && (wrong = map_gates(peer, hello->fds[1], m->rows)))
        return wrong;
    *status = SKV_ENOMEM;
    if ((wrong = make_session(peer, m->rows)) || peer->admin)
        return wrong;
    uint32_t *rows[SKV_MAX_ROWS];
    for (uint32_t row = 0; row < m->rows; row++)
        rows[row] = (uint32_t *)(void *)(peer->gates + row * (size_t)m->gate_stride);
    peer->slot = skv_cache_session_open(daemon->cache, m->model, m->rows, rows);
    *status = peer->slot < 0 ? peer->slot : SKV_OK;
    if (peer->slot < 0)
        return "no room for another session or model";
    return skv_kept_record(peer, status);
}

static void on_hello(void *context, int32_t result)
{
    struct peer *peer = context;
    struct daemon *daemon = peer->daemon;
    struct hello hello;
    (void)result;
    int got = receive(peer, &hello);
    if (got < 0)
        return;
    if (got == 0) {
        loop_poll(daemon->loop, &peer->hangup, peer->socket, POLLIN | POLLRDHUP);
        return;
    }
    int status;
    const char *wrong = let_in(peer, &hello, &status);
    for (uint32_t i = 0; i < hello.fd_count; i++)
        close(hello.fds[i]);
    if (wrong) {
        refuse(peer, status, wrong);
        return;
    }
    peer->state = PEER_LIVE;
    daemon->live[daemon->live_count++] = peer->index;
    daemon->stats.sessions++;
    daemon->stats.sessions_total++;
    if (!welcome(peer)) {
        skv_peer_end(peer, SKV_EPROTO, "it does not read its welcome");
        return;
    }
    skv_failpoint(FAIL_hello_welcomed);
    skv_debug("pid %d: session %llu, %s", (int)peer->pid, (unsigned long long)peer->session,
              peer->admin ? "admin" : "worker");
    peer->hangup.done = on_hangup;
    loop_poll(daemon->loop, &peer->hangup, peer->socket, POLLIN | POLLRDHUP);
    loop_poll(daemon->loop, &peer->bell, peer->sq_fd, POLLIN);
}

/* Who it is; pid -1: that cannot be read. */
static void read_credentials(struct peer *peer)
{
    struct ucred who;
    socklen_t size = sizeof who;
    bool known = getsockopt(peer->socket, SOL_SOCKET, SO_PEERCRED, &who, &size) == 0;
    peer->pid = known ? who.pid : -1;
    peer->uid = known ? who.uid : (uid_t)-1;
}

void skv_accept(void *context, int32_t result)
{
    struct daemon *daemon = context;
    (void)result;
    int fd = accept4(daemon->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct peer *peer = NULL;
    if (fd >= 0)
        daemon->accept_ns = 0;
    for (uint32_t i = 0; fd >= 0 && i < SKV_MAX_PEERS && !peer; i++)
        if (daemon->peers[i].state == PEER_FREE)
            peer = &daemon->peers[i];
    if (fd >= 0 && !peer) {
        daemon->stats.sessions_refused++;
        skv_warn("refusing a connection: %u are open", SKV_MAX_PEERS);
        close(fd);
    } else if (fd >= 0) {
        peer->state = PEER_HELLO;
        peer->socket = fd;
        read_credentials(peer);
        peer->session = ++daemon->session_ids;
        peer->due_ns = skv_now_ns() + HELLO_NS;
        peer->hangup = (struct watch){.done = on_hello, .context = peer};
        peer->bell = (struct watch){.done = on_bell, .context = peer};
        peer->death = (struct watch){.done = on_death, .context = peer};
        loop_poll(daemon->loop, &peer->hangup, fd, POLLIN | POLLRDHUP);
    } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
        /* no descriptors left: clients wait in the backlog, the loop does not spin on them */
        if (!daemon->accept_ns)
            skv_error("accept: %s; it is tried again: raise the limit of open files (ulimit -n, "
                      "LimitNOFILE=)",
                      strerror(errno));
        daemon->accept_ns = skv_now_ns() + ACCEPT_NS;
        return;
    }
    if (!daemon->stopping)
        loop_poll(daemon->loop, &daemon->accepting, daemon->listener, POLLIN);
}

void skv_peer_tick(struct peer *peer)
{
    if (peer->state == PEER_FREE || peer->state == PEER_LIVE || peer->daemon->now_ns < peer->due_ns)
        return;
    if (peer->state == PEER_HELLO)
        refuse(peer, SKV_ETIMEDOUT, "no handshake within two seconds");
    else
        skv_peer_gone(peer);
}

void skv_peer_views(struct peer *peer)
{
    struct wire_views *views =
        (struct wire_views *)(void *)((uint8_t *)peer->ring + WIRE_VIEWS_OFFSET);
    uint64_t extents[WIRE_MAX_EXTENTS / 64];
    uint32_t sequence = skv_cache_views(peer->daemon->cache, (uint32_t)peer->slot, extents);
    __atomic_store_n(&views->begun, sequence, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE); /* no bit before `begun` */
    for (uint32_t i = 0; i < WIRE_MAX_EXTENTS / 64; i++)
        __atomic_store_n(&views->extents[i], extents[i], __ATOMIC_RELAXED);
    __atomic_store_n(&views->sequence, sequence, __ATOMIC_RELEASE);
}

void skv_peer_row_free(struct peer *peer, uint32_t row)
{
    for (uint32_t i = 0; i < peer->held[row]; i++)
        skv_complete(peer, &peer->holding[row * WIRE_CQ_ENTRIES + i]);
    peer->held[row] = 0;
}
