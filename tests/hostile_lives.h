/* More scripts (hostile_scripts.h): what a client may do with its socket and its process, from a
 * second hello to a stop that lasts. */
#ifndef SKV_HOSTILE_LIVES_H
#define SKV_HOSTILE_LIVES_H

#include "hostile_scripts.h"

/* ---- the socket ---- */

static inline void second_hello(struct scene *s)
{
    struct wire_hello hello = raw_hello(&tiny);
    int fds[2] = {gift_fd(PIDFD), gift_fd(GATES)};
    NEED(opens(s));
    raw_send(s->raw.socket, &hello, sizeof hello, fds, 2);
    ended(s);
}

static inline void hello_in_two_messages(struct scene *s)
{
    struct wire_hello hello = raw_hello(&tiny);
    struct wire_welcome answer = {0};
    int fds[2] = {gift_fd(PIDFD), gift_fd(GATES)};
    int fd = raw_connect(s->rig);
    raw_send(fd, &hello, 64, fds, 2);
    raw_send(fd, (char *)&hello + 64, 64, NULL, 0);
    NEED(raw_receive(fd, &answer, sizeof answer, NULL, RAW_PATIENCE_MS) == sizeof answer);
    tell(s, answer.status, answer.text);
}

static inline void words_after_the_handshake(struct scene *s)
{
    NEED(opens(s));
    raw_send(s->raw.socket, "hello?", 6, NULL, 0);
    ended(s);
}

static inline void gifts_after_the_handshake(struct scene *s)
{
    int fds[253];
    NEED(opens(s));
    for (int i = 0; i < 253; i++)
        fds[i] = s->raw.cq_fd;
    NEED(raw_send(s->raw.socket, "take", 4, fds, 253));
    ended(s);
}

static inline void empty_message_after_the_handshake(struct scene *s)
{
    NEED(opens(s));
    raw_send(s->raw.socket, "", 0, NULL, 0);
    ended(s);
}

static inline void goodbye_read_late(struct scene *s)
{
    NEED(opens(s));
    raw_submit(&s->raw, &(struct wire_sqe){.opcode = 200});
    struct pollfd over = {.fd = s->raw.socket, .events = POLLIN};
    NEED(poll(&over, 1, RAW_PATIENCE_MS) == 1);
    for (int i = 0; i < 20; i++) { /* goes on as if nothing had been said */
        raw_publish(&s->raw, &(struct wire_sqe){.opcode = 200});
        raw_bell(&s->raw);
        raw_send(s->raw.socket, "x", 1, NULL, 0);
        usleep(1000);
    }
    ended(s);
}

static inline void speaks_no_more(struct scene *s)
{
    NEED(opens(s));
    shutdown(s->raw.socket, SHUT_WR);
    ended(s);
}

static inline void listens_no_more(struct scene *s)
{
    NEED(opens(s));
    shutdown(s->raw.socket, SHUT_RD);
    lives(s);
}

static inline void listens_to_no_welcome(struct scene *s)
{
    struct wire_hello hello = raw_hello(&tiny);
    int fds[2] = {gift_fd(PIDFD), gift_fd(GATES)};
    s->raw.socket = raw_connect(s->rig);
    shutdown(s->raw.socket, SHUT_RD);
    raw_send(s->raw.socket, &hello, sizeof hello, fds, 2);
    struct pollfd over = {.fd = s->raw.socket};
    NEED(poll(&over, 1, RAW_PATIENCE_MS) == 1 && over.revents & POLLHUP);
    tell(s, 0, CLOSED);
}

static inline void connects_and_leaves(struct scene *s)
{
    for (int i = 0; i < 10; i++)
        close(raw_connect(s->rig));
    tell(s, 0, CLOSED);
}

static inline void says_nothing(struct scene *s)
{
    struct wire_welcome answer;
    int fd = raw_connect(s->rig);
    NEED(raw_receive(fd, &answer, sizeof answer, NULL, RAW_PATIENCE_MS) == sizeof answer);
    tell(s, answer.status, answer.text);
}

static inline void leaves_after_its_hello(struct scene *s)
{
    struct wire_hello hello = raw_hello(&tiny);
    int fds[2] = {gift_fd(PIDFD), gift_fd(GATES)};
    for (int i = 0; i < 5; i++) {
        int fd = raw_connect(s->rig);
        raw_send(fd, &hello, sizeof hello, fds, 2);
        close(fd);
    }
    tell(s, 0, CLOSED);
}

static inline void leaves_after_its_welcome(struct scene *s)
{
    struct wire_hello hello = raw_hello(&tiny);
    struct wire_welcome answer;
    int fds[2] = {gift_fd(PIDFD), gift_fd(GATES)}, fd = raw_connect(s->rig);
    raw_send(fd, &hello, sizeof hello, fds, 2);
    NEED(raw_receive(fd, &answer, sizeof answer, NULL, RAW_PATIENCE_MS) == sizeof answer);
    close(fd);
    tell(s, 0, CLOSED);
}

static inline void leaves_with_everything_open(struct scene *s)
{
    struct wire_cqe cqe;
    for (int i = 0; i < 3; i++)
        NEED(raw_open(&s->raw, s->rig, &tiny) && acquires(&s->raw, 0, own_user(), 300, &cqe));
    tell(s, 0, CLOSED); /* the process ends now */
}

/* ---- processes ---- */

static inline bool is_stopped(pid_t pid)
{
    char path[64], line[512] = {0};
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "re");
    bool stopped = file && fgets(line, sizeof line, file) && strstr(line, ") T ");
    if (file)
        fclose(file);
    return stopped;
}

static inline void stopped_and_let_go(struct scene *s)
{
    struct wire_cqe cqe;
    pid_t me = getpid(), helper;
    NEED(opens(s) && acquires(&s->raw, 0, own_user(), 40, &cqe));
    if ((helper = fork()) == 0) {
        raw_close(&s->raw);
        for (int i = 0; i < RAW_PATIENCE_MS && !is_stopped(me); i++)
            usleep(1000);
        usleep(50000);
        _exit(kill(me, SIGCONT));
    }
    raw_submit(&s->raw, &(struct wire_sqe){.opcode = WIRE_NOP});
    kill(me, SIGSTOP);
    waitpid(helper, NULL, 0);
    NEED(raw_completion(&s->raw, &cqe));
    NEED(ends(&s->raw, WIRE_COMMIT, 0, &cqe) && s->raw.slots[0].results[0].committed == 40);
    lives(s);
}

/* The one that shook hands ends; its child has the session now. */
static inline void child_goes_on(struct scene *s)
{
    int pipes[2], status;
    NEED(!pipe(pipes));
    pid_t parent = fork();
    if (parent == 0) {
        pid_t me = getpid();
        bool fine = opens(s);
        if (fork() != 0)
            _exit(0);
        while (getppid() == me)
            usleep(1000);
        usleep(30000); /* time enough to be taken for gone */
        if (fine)
            lives(s);
        _exit(write(pipes[1], &s->out, sizeof s->out) < 0);
    }
    NEED(waitpid(parent, &status, 0) == parent);
    close(pipes[1]);
    NEED(read(pipes[0], &s->out, sizeof s->out) == sizeof s->out);
}

static inline void drained_of_another_process(struct scene *s)
{
    struct wire_hello hello = raw_hello(&tiny);
    int pipes[2], back[2];
    NEED(!pipe(pipes) && !pipe(back));
    pid_t other = fork();
    if (other == 0) {
        char byte;
        bool fine = raw_open(&s->raw, s->rig, &tiny);
        fine = write(pipes[1], &s->raw.welcome.session, 8) == 8 && fine;
        fine = read(back[0], &byte, 1) == 1 && fine;
        lives(s);
        fine = write(pipes[1], &s->out, sizeof s->out) > 0 && fine;
        _exit(!fine);
    }
    NEED(read(pipes[0], &hello.drained, 8) == 8);
    NEED(raw_open_as(&s->raw, s->rig, &hello, gift_fd(GATES)));
    NEED(write(back[1], "", 1) == 1 && read(pipes[0], &s->out, sizeof s->out) > 0);
    waitpid(other, NULL, 0);
}

/* Session ids can be guessed: its own comes next, or one of the next. */
static inline void drained_of_itself(struct scene *s)
{
    struct wire_hello hello = raw_hello(&tiny);
    NEED(raw_open(&s->raw, s->rig, &tiny));
    uint64_t seen = s->raw.welcome.session;
    raw_close(&s->raw);
    for (uint64_t i = 1; i < 6; i++) {
        hello.drained = seen + i;
        NEED(raw_open_as(&s->raw, s->rig, &hello, gift_fd(GATES)));
        if (i < 5)
            raw_close(&s->raw);
    }
    lives(s);
}

static inline void more_commands_than_answers(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny) && acquires(&s->raw, 0, own_user(), 40, &cqe));
    NEED(ends(&s->raw, WIRE_COMMIT, 0, &cqe));
    static const uint8_t waits[] = {WIRE_FLUSH, WIRE_EVICT, WIRE_FORGET, WIRE_FLUSH};
    for (uint32_t i = 0; i < WIRE_ENTRIES; i++)
        raw_publish(&s->raw,
                    &(struct wire_sqe){.opcode = waits[i % 4],
                                       .user = {i % 4 % 3 ? own_user() : 0, i % 4 % 3 ? 1 : 0}});
    raw_bell(&s->raw);
    for (uint32_t i = 0; i < WIRE_ENTRIES; i++)
        NEED(raw_completion(&s->raw, &cqe));
    lives(s);
}

static inline void cursors_out_of_this_world(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(opens(s));
    for (uint32_t i = 0; i < 64; i++)
        NEED(does(&s->raw,
                  (struct wire_sqe){.opcode = WIRE_LIST,
                                    .count = WIRE_LIST_USERS,
                                    .argument = UINT64_MAX << i | i},
                  &cqe));
    lives(s);
}

static inline bool opens_admin(struct scene *s)
{
    const struct wire_hello hello = {
        .magic = WIRE_MAGIC, .version = WIRE_VERSION, .kind = WIRE_ADMIN};
    return raw_open_as(&s->raw, s->rig, &hello, -1);
}

static inline void restart_without_a_keeper(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(opens_admin(s));
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_RESTART}, &cqe));
    NEED(cqe.status == SKV_ENOTSUP);
    lives(s);
}

#endif
