/* Handshakes: up to four clients that connect, send messages of any length and content with any
 * descriptors, do not read, shut down, hang up and let time pass, in any order. The input is a
 * script: after a byte that says what the kernel knows of them, a byte says who does what, the
 * bytes behind it how.
 */
#include "fuzz_daemon.h"

#include "fdpass.h"

#define CLIENTS 4u
#define KINDS   12u

static int kinds[KINDS]; /* descriptors that a message may carry; a hello wants 0 and 1 */

static int sealed(uint64_t bytes, int seals)
{
    int fd = raw_gates(bytes, false);
    FUZZ_MUST(fcntl(fd, F_ADD_SEALS, seals) == 0);
    return fd;
}

static void make_kinds(void)
{
    const uint64_t gates = wire_gate_bytes(fuzz_geometry.layers, 1);
    const int fixed = F_SEAL_SHRINK | F_SEAL_GROW;
    int ends[2];
    FUZZ_MUST(pipe2(ends, O_CLOEXEC) == 0);
    const int made[KINDS] = {(int)syscall(SYS_pidfd_open, getpid(), 0),
                             sealed(gates, fixed),
                             sealed(gates, fixed | F_SEAL_SEAL),
                             sealed(gates, F_SEAL_GROW),
                             sealed(gates + 4096, fixed),
                             sealed(gates, fixed | F_SEAL_FUTURE_WRITE),
                             open("/dev/null", O_RDWR | O_CLOEXEC),
                             open("/", O_RDONLY | O_CLOEXEC),
                             (int)syscall(SYS_pidfd_open, getppid(), 0),
                             fuzz_daemon.listener,
                             ends[0],
                             ends[1]};
    memcpy(kinds, made, sizeof kinds);
}

/* What the kernel says of a socket's other end. Before Linux 6.5 not its pidfd: then the one sent
 * is looked at. */
static enum { KERNEL_OLD = 1, KERNEL_FOREIGN = 2, KERNEL_SILENT = 4 } kernel;

int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
{
    if (level == SOL_SOCKET &&
        ((kernel & KERNEL_OLD && name == 77 /* SO_PEERPIDFD */) || kernel == KERNEL_SILENT)) {
        errno = ENOPROTOOPT;
        return -1;
    }
    int rc = (int)syscall(SYS_getsockopt, fd, level, name, value, size);
    if (level == SOL_SOCKET && name == SO_PEERCRED && kernel & KERNEL_FOREIGN)
        ((struct ucred *)value)->uid = 1234;
    return rc;
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_start(false);
    make_kinds();
    return 0;
}

/* A message: descriptors, then a hello changed in places, or any bytes. */
static void send_message(struct fuzz_input *in, int socket)
{
    uint8_t message[1024] = {0};
    int fds[8];
    uint8_t how = fuzz_u8(in);
    uint32_t count = how & 7;
    for (uint32_t i = 0; i < count; i++)
        fds[i] = kinds[fuzz_u8(in) % KINDS];
    if (count > 2 && count < 7) /* mostly no more than a hello may have */
        count = 2;
    size_t bytes = sizeof(struct wire_hello);
    if (how & 8) {
        bytes = fuzz_u32(in) % sizeof message;
        fuzz_take(in, message, bytes);
    } else {
        struct wire_hello hello = raw_hello(&fuzz_geometry);
        if (how & 16)
            hello = (struct wire_hello){
                .magic = WIRE_MAGIC, .version = WIRE_VERSION, .kind = WIRE_ADMIN};
        if (how & 32) /* an earlier session of this process, perhaps */
            hello.drained = fuzz_daemon.session_ids - fuzz_u8(in) % 8;
        memcpy(message, &hello, sizeof hello);
        for (uint32_t changes = how >> 6; changes > 0; changes--) {
            uint8_t where = fuzz_u8(in) % sizeof hello;
            message[where] = fuzz_u8(in);
        }
    }
    uint64_t drained;
    memcpy(&drained, message + offsetof(struct wire_hello, drained), sizeof drained);
    if (drained == fuzz_witness.welcome.session) /* of our process, so it could be ended */
        return;
    if (socket >= 0)
        /* It may have been shut down, or full: nobody reads meanwhile. */
        skv_send_fds(socket, message, bytes, fds, count, MSG_DONTWAIT);
}

/* Takes what the daemon said; all of it must be sense. */
static void read_messages(int socket)
{
    union {
        struct wire_welcome welcome;
        struct wire_extents extents;
        struct wire_goodbye goodbye;
    } said;
    int fds[8];
    for (;;) {
        memset(fds, -1, sizeof fds);
        ssize_t got = raw_receive(socket, &said, sizeof said, fds, 0);
        if (got <= 0)
            break;
        FUZZ_MUST(said.welcome.magic == WIRE_MAGIC);
        FUZZ_MUST(got == sizeof said.welcome || got == sizeof said.extents ||
                  got == sizeof said.goodbye);
        FUZZ_MUST(got != sizeof said.welcome || (said.welcome.status < 0) == (fds[0] < 0));
        for (int i = 0; i < 8; i++)
            if (fds[i] >= 0)
                close(fds[i]);
    }
}

static void time_passes(void)
{
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++)
        if (fuzz_daemon.peers[i].state == PEER_HELLO)
            fuzz_daemon.peers[i].due_ns = 0;
    fuzz_daemon.kept_ns = 0;
}

/* An event of before, when there is nothing to read any more. */
static void wake_for_nothing(void)
{
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++) {
        struct peer *peer = &fuzz_daemon.peers[i];
        if ((peer->state == PEER_HELLO || peer->state == PEER_LIVE) &&
            loop_forget(fuzz_daemon.loop, &peer->hangup))
            peer->hangup.done(peer, POLLIN);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {.at = data, .end = data + size};
    int clients[CLIENTS] = {-1, -1, -1, -1};
    uint32_t connects = 0;
    kernel = (uint8_t)(fuzz_u8(&in) & 7);
    fuzz_begin();
    while (fuzz_more(&in)) {
        uint8_t step = fuzz_u8(&in);
        int *client = &clients[step >> 6];
        if (*client < 0) {
            if (++connects > FUZZ_BACKLOG / 2) /* a turn takes one: connect() shall not wait */
                fuzz_turn();
            *client = raw_connect(&fuzz_rig);
        }
        switch (step & 7) {
        case 0:
        case 1:
            send_message(&in, *client);
            break;
        case 2:
            fuzz_turn();
            break;
        case 3:
            read_messages(*client);
            break;
        case 4:
            if (step & 16)
                wake_for_nothing();
            else
                shutdown(*client, step & 8 ? SHUT_RD : SHUT_WR);
            break;
        case 5:
            close(*client);
            *client = -1;
            break;
        case 6:
            time_passes();
            break;
        case 7: /* all of it at once */
            send_message(&in, *client);
            for (int i = 0; i < 3; i++)
                fuzz_turn();
            read_messages(*client);
        }
    }
    for (uint32_t i = 0; i < CLIENTS; i++)
        if (clients[i] >= 0)
            close(clients[i]);
    fuzz_settle();
    return 0;
}
