/* A client by hand, for saying what the library never would. */
#ifndef SKV_RAW_CLIENT_H
#define SKV_RAW_CLIENT_H

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "daemon_rig.h"
#include "fdpass.h"
#include "ring.h"

#define RAW_PATIENCE_MS 60000 /* for what the daemon does at once, on a busy machine */

struct raw {
    int socket;
    struct wire_welcome welcome;
    uint32_t *gates;
    uint8_t *memory;
    struct wire_ring *ring;
    struct wire_sqe *sqes;
    struct wire_cqe *cqes;
    struct wire_slot *slots;
    uint32_t sq_tail, cq_head;
    int sq_fd, cq_fd, memory_fd, gate_fd;
};

static inline int raw_connect(const struct rig *rig)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, rig->socket, sizeof address.sun_path - 1);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    for (int i = 0; i < 1200; i++) {
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
            return fd;
        usleep(50000);
    }
    close(fd);
    return -1;
}

static inline struct wire_hello raw_hello(const struct skv_geometry *geometry)
{
    return (struct wire_hello){.magic = WIRE_MAGIC,
                               .version = WIRE_VERSION,
                               .kind = WIRE_WORKER,
                               .geometry = *geometry,
                               .model = {.lo = 77},
                               .rows = 1,
                               .gate_stride = wire_gate_stride(geometry->layers)};
}

static inline int raw_gates(uint64_t bytes, bool sealed)
{
    int fd = memfd_create("gates", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (ftruncate(fd, (off_t)bytes) ||
        (sealed && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)))
        abort();
    return fd;
}

/* With more fds than skv_send_fds() would. false: it cannot be sent. */
static inline bool raw_send(int socket, const void *message, size_t bytes, const int *fds,
                            uint32_t count)
{
    char room[CMSG_SPACE(256 * sizeof(int))] = {0};
    struct iovec part = {.iov_base = (void *)(uintptr_t)message, .iov_len = bytes};
    struct msghdr out = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        out.msg_control = room;
        out.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&out);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    }
    return sendmsg(socket, &out, MSG_NOSIGNAL) >= 0;
}

/* The next message, within `timeout_ms`; its fds (up to 8) too. Returns its length, 0 at the end,
 * -1 for nothing in time. */
static inline ssize_t raw_receive(int socket, void *message, size_t bytes, int *fds, int timeout_ms)
{
    int came[SKV_FDS_PER_MESSAGE];
    uint32_t count;
    struct pollfd wait = {.fd = socket, .events = POLLIN};
    if (poll(&wait, 1, timeout_ms) <= 0)
        return -1;
    ssize_t got = skv_receive_fds(socket, message, bytes, came, SKV_FDS_PER_MESSAGE, &count, 0);
    for (uint32_t i = 0; i < count; i++)
        if (fds && i < 8)
            fds[i] = came[i];
        else
            close(came[i]);
    return got < 0 ? 0 : got;
}

/* Takes the welcome and all that follows it. */
static inline bool raw_welcome(struct raw *raw, uint32_t rows)
{
    int fds[8] = {-1, -1, -1, -1};
    if (raw_receive(raw->socket, &raw->welcome, sizeof raw->welcome, fds, RAW_PATIENCE_MS) !=
            sizeof raw->welcome ||
        raw->welcome.status)
        return false;
    struct wire_extents part;
    for (uint32_t seen = 0; seen < raw->welcome.extents; seen += part.count)
        if (raw_receive(raw->socket, &part, sizeof part, NULL, RAW_PATIENCE_MS) != sizeof part)
            return false;
    raw->memory =
        mmap(NULL, raw->welcome.session_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    raw->ring = (struct wire_ring *)(void *)raw->memory;
    raw->sqes = (struct wire_sqe *)(void *)(raw->memory + WIRE_SQ_OFFSET);
    raw->cqes = (struct wire_cqe *)(void *)(raw->memory + WIRE_CQ_OFFSET);
    raw->slots = (struct wire_slot *)(void *)(raw->memory + WIRE_SLOTS_OFFSET);
    raw->memory_fd = fds[0];
    raw->sq_fd = fds[1];
    raw->cq_fd = fds[2];
    return raw->memory != MAP_FAILED && raw->welcome.session_bytes == wire_session_bytes(rows);
}

/* A whole session; a worker's has these gates. */
static inline bool raw_open_as(struct raw *raw, const struct rig *rig,
                               const struct wire_hello *hello, int gate_fd)
{
    int mine[2] = {(int)syscall(SYS_pidfd_open, getpid(), 0), gate_fd};
    bool worker = hello->kind == WIRE_WORKER;
    uint64_t bytes = wire_gate_bytes(hello->geometry.layers, hello->rows);
    *raw = (struct raw){.socket = raw_connect(rig), .gate_fd = gate_fd};
    if (worker)
        raw->gates = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, gate_fd, 0);
    raw_send(raw->socket, hello, sizeof *hello, mine, worker ? 2 : 1);
    close(mine[0]);
    return raw_welcome(raw, hello->rows);
}

/* A worker's with one row. */
static inline bool raw_open(struct raw *raw, const struct rig *rig,
                            const struct skv_geometry *geometry)
{
    struct wire_hello hello = raw_hello(geometry);
    return raw_open_as(raw, rig, &hello, raw_gates(wire_gate_bytes(geometry->layers, 1), true));
}

static inline void raw_bell(struct raw *raw)
{
    uint64_t one = 1;
    if (write(raw->sq_fd, &one, sizeof one) < 0)
        perror("doorbell");
}

/* Publishes an entry without a bell. */
static inline void raw_publish(struct raw *raw, const struct wire_sqe *sqe)
{
    raw->sqes[raw->sq_tail & (WIRE_ENTRIES - 1)] = *sqe;
    __atomic_store_n(&raw->ring->sq_tail, ++raw->sq_tail, __ATOMIC_RELEASE);
}

static inline void raw_submit(struct raw *raw, const struct wire_sqe *sqe)
{
    raw_publish(raw, sqe);
    raw_bell(raw);
}

/* The next completion. */
static inline bool raw_completion(struct raw *raw, struct wire_cqe *cqe)
{
    for (int i = 0; i < RAW_PATIENCE_MS; i++) {
        if (__atomic_load_n(&raw->ring->cq_tail, __ATOMIC_ACQUIRE) != raw->cq_head) {
            *cqe = raw->cqes[raw->cq_head & (WIRE_CQ_ENTRIES - 1)];
            __atomic_store_n(&raw->ring->cq_head, ++raw->cq_head, __ATOMIC_RELEASE);
            return true;
        }
        usleep(1000);
    }
    return false;
}

/* Makes its bell blocking, wants to be woken for each of so many completions, and takes no ring. */
static inline bool raw_takes_no_ring(struct raw *raw, uint32_t rings)
{
    struct wire_cqe cqe;
    bool fine = fcntl(raw->cq_fd, F_SETFL, 0) == 0;
    __atomic_store_n(&raw->ring->cq_flags, WIRE_NEED_WAKEUP, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; fine && i < rings; i++) {
        raw_submit(raw, &(struct wire_sqe){.opcode = WIRE_NOP});
        fine = raw_completion(raw, &cqe);
    }
    return fine;
}

/* Why the daemon ended the session: the goodbye's status, 0 when it did not. */
static inline int raw_goodbye(struct raw *raw)
{
    struct wire_goodbye bye;
    bool said = raw_receive(raw->socket, &bye, sizeof bye, NULL, RAW_PATIENCE_MS) == sizeof bye;
    return said ? bye.status : 0;
}

static inline void raw_close(struct raw *raw)
{
    if (raw->memory)
        munmap(raw->memory, raw->welcome.session_bytes);
    if (raw->gates)
        munmap(raw->gates, 4096);
    close(raw->memory_fd);
    close(raw->sq_fd);
    close(raw->cq_fd);
    close(raw->gate_fd);
    close(raw->socket);
}

#endif
