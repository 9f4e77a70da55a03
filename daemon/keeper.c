/* sidekv-keeper: the parent of sidekvd. Starts it anew when it dies, and gives the new one what
 * must outlive it (keeper_held.h: plain file descriptors). It maps nothing, has no CUDA context,
 * and does not look into what it holds. This file has the processes: the daemon that runs, the one
 * that is to follow, and when each is started and ended.
 *
 * When sidekvd ends:   status 0, or after a SIGTERM that was passed on: the keeper ends with it,
 *                      unless it leaves a pool that is not stored: see is_over()
 *                      KEEPER_RESTART (planned restart): started anew at once
 *                      a failed first start (it never served): the keeper ends with its status
 *                      anything else: started anew, at once, with growing pauses when it does not
 *                      live for a second
 * The next one is started while another serves, where that wants it (KEEPER_SERVES), else when
 * that is being killed, which it says before it is gone (KEEPER_LIFE). It opens its device, and
 * waits: it gets nothing until the one before has been reaped. One that dies waiting is replaced,
 * at growing pauses. It is called off when the daemon is told to end; and, another one started, at
 * a planned restart, where nothing is kept, and where the program's file is another one by then:
 * what takes over is what is installed. When the keeper dies: sidekvd notices and goes on without
 * one (see kept.c). Under systemd the keeper has the manager hold copies of all that it holds
 * (FDSTORE), and of sidekvd's pidfd: sidekvd then ends, and the keeper that systemd starts next
 * kills what is left of it, takes the copies back, and goes on. systemd has heard all that a keeper
 * said before it starts the next one: it reads its notify socket before it looks at who has died. A
 * daemon that was started early and was given nothing ends when its keeper has gone. */
#include "keeper_held.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "failpoint.h"
#include "fdpass.h"
#include "log.h"

#define SHORT_LIFE_NS UINT64_C(1000000000)
#define PAUSE_MS      50u /* after a second short life in a row; doubles up to */
#define PAUSE_MAX_MS  5000u
#define STANDBY_MS                                                                                 \
    1000u /* after a daemon serves, the next one is started: not beside its first requests */
#define AGAIN_MS     1000u /* one that died waiting: at once; next time after this, doubling up to */
#define AGAIN_MAX_MS 600000u
#define WAITED_NS    UINT64_C(60000000000) /* after so long its death is a first one again */
#define OPEN_NS      UINT64_C(10000000000) /* one whose device is not open by then hangs, maybe */
#define LAST_TURNS                                                                                 \
    64u /* more than a socket holds of messages; a child of its own may hold the end */

static struct held held;

struct child {
    pid_t pid;           /* 0: there is none */
    int socket;          /* our end */
    bool listening;      /* it has not closed its end */
    bool serves;         /* it has said so */
    bool told;           /* to end, while it lived */
    bool dying;          /* it is being killed: KEEPER_LIFE */
    bool waits;          /* given nothing yet, its device is open */
    uint64_t began_ns;   /* its start; given what is held: since then */
    struct stat program; /* what it was started from */
};

/* The daemon that is to follow the one that runs. */
static struct {
    struct child child;
    uint64_t wanted_ns; /* to be started then; 0: not before the other one is gone */
    uint32_t again_ms;  /* the pause after it dies waiting */
} next;

static char **command;   /* sidekvd's */
static sigset_t signals; /* that signal_fd tells */
static int signal_fd;
static int stopping; /* the signal that came: SIGTERM or SIGINT; 0: none */
static bool served;  /* a daemon has: whatever the next one ends with, it is started anew */
static bool hurry;   /* for tests: no pauses */

/* ---- starting it ---- */

/* sidekvd beside this program, else the one in PATH; NULL: neither. The text is valid till the next
 * call. */
static const char *find_program(void)
{
    static char path[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - sizeof "sidekvd");
    path[length > 0 ? length : 0] = '\0';
    char *slash = strrchr(path, '/');
    if (slash) {
        strcpy(slash + 1, "sidekvd");
        if (access(path, X_OK) == 0)
            return path;
    }
    for (const char *at = getenv("PATH"), *end; at && *at; at = *end ? end + 1 : end) {
        end = strchrnul(at, ':');
        snprintf(path, sizeof path, "%.*s/sidekvd", (int)(end - at), at);
        if (access(path, X_OK) == 0)
            return path;
    }
    return NULL;
}

/* Is it what would be started now? Of a file that is gone it is all there is. */
static bool is_installed(const struct child *daemon)
{
    const struct stat *old = &daemon->program;
    struct stat now;
    const char *path = find_program();
    return !path || stat(path, &now) ||
           (now.st_dev == old->st_dev && now.st_ino == old->st_ino && now.st_size == old->st_size &&
            now.st_mtim.tv_sec == old->st_mtim.tv_sec &&
            now.st_mtim.tv_nsec == old->st_mtim.tv_nsec);
}

/* Starts it; it waits until it is given what is held. */
static bool start(struct child *daemon)
{
    int pair[2];
    const char *path = find_program();
    *daemon = (struct child){.listening = true, .began_ns = skv_now_ns()};
    if (path)
        stat(path, &daemon->program); /* before it runs: should that change now, it is too old */
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
        skv_error("socketpair: %s", strerror(errno));
        return false;
    }
    pid_t pid = fork();
    if (pid == 0) {
        char number[16];
        int fd = dup(pair[1]); /* not close-on-exec */
        snprintf(number, sizeof number, "%d", fd);
        setenv(KEEPER_FD, number, 1);
        setpgid(0, 0); /* a terminal's Ctrl-C comes once: from us */
        /* SIGTERM and SIGINT stay blocked, as sidekvd wants them: one that comes before it has come
         * so far waits for it. */
        sigset_t rest;
        sigemptyset(&rest);
        sigaddset(&rest, SIGCHLD);
        sigprocmask(SIG_UNBLOCK, &rest, NULL);
        command[0] = "sidekvd";
        if (path)
            execv(path, command);
        skv_error("sidekvd: %s",
                  path ? strerror(errno) : "neither beside this program nor in PATH");
        _exit(127);
    }
    close(pair[1]);
    if (pid < 0) {
        skv_error("fork: %s", strerror(errno));
        close(pair[0]);
        return false;
    }
    setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){.tv_sec = KEEPER_GIVE_S},
               sizeof(struct timeval));
    daemon->pid = pid;
    daemon->socket = pair[0];
    skv_failpoint(FAIL_keeper_started);
    return true;
}

/* Ends one that was started and will not be needed; it was given nothing. */
static void call_off(struct child *daemon)
{
    if (!daemon->pid)
        return;
    kill(daemon->pid, SIGKILL);
    waitpid(daemon->pid, NULL, 0);
    close(daemon->socket);
    daemon->pid = 0;
}

/* Gives the new daemon what is held. The daemon before it is gone. */
static void give(struct child *daemon)
{
    daemon->began_ns = skv_now_ns();
    daemon->waits = false;
    skv_held_daemon(&held, daemon->pid);
    if (skv_held_give(&held, daemon->socket) &&
        errno != EPIPE) /* it has ended, and how is told soon */
        skv_error("the new sidekvd did not take what was kept: %s", strerror(errno));
}

/* ---- watching it ---- */

static bool is_dying(struct child *daemon)
{
    struct pollfd life = {.fd = held.life, .events = POLLIN};
    if (poll(&life, 1, 0) == 1) {
        daemon->dying = true;
        skv_held_drop_life(&held);
    }
    return daemon->dying;
}

/* Passes the signal on; not to one that is being killed, which stores nothing any more. */
static void tell(struct child *daemon)
{
    if (is_dying(daemon))
        return;
    kill(daemon->pid, stopping);
    daemon->told = true;
}

/* `daemon`: the one that runs; NULL: none does. */
static void take_signals(struct child *daemon)
{
    struct signalfd_siginfo info;
    while (read(signal_fd, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD) {
            stopping = (int)info.ssi_signo;
            if (daemon)
                tell(daemon);
        }
}

static void want_next(uint32_t in_ms)
{
    next.wanted_ns = skv_now_ns() + in_ms * UINT64_C(1000000);
}

/* What has come of the one that serves. */
static void listen_to(struct child *daemon)
{
    struct heard heard = {0};
    daemon->listening = skv_held_listen(&held, daemon->socket, &heard);
    daemon->serves = daemon->serves || heard.serves;
    served = served || heard.serves;
    if (heard.standby)
        want_next(hurry ? 0 : STANDBY_MS);
}

static bool lived_long(const struct child *daemon)
{
    return skv_now_ns() - daemon->began_ns >= SHORT_LIFE_NS;
}

static const char *end_text(int status, char *out, size_t size)
{
    if (WIFSIGNALED(status))
        snprintf(out, size, "signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        snprintf(out, size, "exit status %d", WEXITSTATUS(status));
    return out;
}

/* ---- the one that is to follow ---- */

/* Says to the daemon that serves whether another one waits; what it does not take it does not know.
 */
static void tell_waits(const struct child *daemon, bool waits)
{
    struct keeper_message m = {.magic = KEEPER_MAGIC, .kind = KEEPER_STANDBY, .id = waits};
    if (daemon->listening)
        skv_send_fds(daemon->socket, &m, sizeof m, NULL, 0, MSG_DONTWAIT);
}

/* The one that waits has one thing to say. */
static void listen_to_next(const struct child *daemon)
{
    struct keeper_message m;
    if (recv(next.child.socket, &m, sizeof m, MSG_DONTWAIT) != sizeof m ||
        m.magic != KEEPER_MAGIC || m.kind != KEEPER_WAITS) {
        next.child.listening = false; /* it ends */
        return;
    }
    skv_info("sidekvd (pid %d) waits to follow", (int)next.child.pid);
    next.child.waits = true;
    tell_waits(daemon, true);
}

/* It died waiting, or could not be started: another one, in a while. */
static void want_again(void)
{
    want_next(hurry && next.again_ms ? PAUSE_MS : next.again_ms);
    next.again_ms = next.again_ms ? next.again_ms * 2 : AGAIN_MS;
    if (next.again_ms > AGAIN_MAX_MS)
        next.again_ms = AGAIN_MAX_MS;
}

static void reap_next(const struct child *daemon)
{
    int status;
    char text[64];
    if (!next.child.pid || waitpid(next.child.pid, &status, WNOHANG) != next.child.pid)
        return;
    if (skv_now_ns() - next.child.began_ns >= WAITED_NS)
        next.again_ms = 0;
    if (next.again_ms == 0)
        skv_warn("sidekvd (pid %d), which was to follow, ended with %s: another one is started, "
                 "should that end too at growing pauses",
                 (int)next.child.pid, end_text(status, text, sizeof text));
    if (next.child.waits)
        tell_waits(daemon, false);
    close(next.child.socket);
    next.child.pid = 0;
    want_again();
}

/* Starts it when it is time. Returns for how many milliseconds there is nothing to do; -1: no end.
 */
static int look_after_next(struct child *daemon)
{
    if (daemon->told)
        call_off(&next.child);
    reap_next(daemon);
    if (stopping || next.child.pid || !next.wanted_ns)
        return -1;
    uint64_t now_ns = skv_now_ns();
    if (now_ns < next.wanted_ns)
        return (int)((next.wanted_ns - now_ns) / 1000000 + 1);
    next.wanted_ns = 0;
    if (start(&next.child))
        return -1;
    want_again();
    return 0;
}

/* May the one that was started ahead take what is held? */
static bool is_fit(const struct child *daemon)
{
    return daemon->pid && daemon->listening && held.whole && is_installed(daemon) &&
           (daemon->waits || skv_now_ns() - daemon->began_ns < OPEN_NS);
}

/* Who follows: the one that waits, or a new one. `anew`: not the one that waits. Where all is to
 * end, it stores what it was given, and does. */
static bool succeed(struct child *daemon, bool anew)
{
    struct child waiting = next.child;
    bool takes = !anew && is_fit(&waiting);
    memset(&next, 0, sizeof next);
    if (takes)
        *daemon = waiting;
    else if (!start(daemon))
        daemon->pid = 0;
    if (!takes)
        call_off(&waiting); /* and the new one opens its device meanwhile */
    if (daemon->pid)
        give(daemon);
    if (daemon->pid && stopping)
        tell(daemon);
    return daemon->pid;
}

/* Until it has ended and been reaped. Returns its wait status. */
static int watch(struct child *daemon)
{
    int status;
    for (;;) {
        if (waitpid(daemon->pid, &status, WNOHANG) == daemon->pid)
            break;
        int timeout_ms = look_after_next(daemon);
        struct pollfd fds[4] = {
            {.fd = signal_fd, .events = POLLIN},
            {.fd = daemon->listening ? daemon->socket : -1, .events = POLLIN},
            {.fd = held.life, .events = POLLIN},
            {.fd = next.child.pid && next.child.listening ? next.child.socket : -1,
             .events = POLLIN}};
        if (poll(fds, 4, timeout_ms) < 0 && errno != EINTR)
            skv_error("poll: %s", strerror(errno));
        if (fds[0].revents)
            take_signals(daemon);
        if (fds[1].revents)
            listen_to(daemon);
        /* One that ends in order has hung up before. */
        if (fds[2].revents && is_dying(daemon) && daemon->listening && held.whole &&
            (hurry || lived_long(daemon)))
            want_next(0);
        if (fds[3].revents)
            listen_to_next(daemon);
    }
    for (uint32_t turn = 0; daemon->listening && turn < LAST_TURNS; turn++)
        listen_to(daemon); /* what it said last */
    close(daemon->socket);
    daemon->listening = false;
    skv_held_drop_life(&held);
    reap_next(daemon); /* they may have been killed together */
    return status;
}

/* Does the keeper end too? *code: with which status. Told to end, it does so once what is kept is
 * stored, or cannot be: not after a daemon that was being killed when it was told, nor after one
 * that was about to restart, or that ended before it had looked at what it was given. */
static bool is_over(const struct child *daemon, int status, int *code)
{
    *code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    bool ends = stopping && !held.whole;
    if (*code == 0)
        return daemon->serves || !held.whole;
    if (*code == KEEPER_RESTART) {
        *code = ends ? 0 : *code;
        return ends;
    }
    return ends || daemon->told || (WIFEXITED(status) && !served);
}

static uint32_t longer(uint32_t pause_ms)
{
    uint32_t ms = pause_ms ? pause_ms * 2 : PAUSE_MS;
    return ms < PAUSE_MAX_MS ? ms : PAUSE_MAX_MS;
}

/* Waits before the next one, unless it is told to stop. */
static void rest(uint32_t ms)
{
    struct pollfd wait = {.fd = signal_fd, .events = POLLIN};
    for (uint64_t until = skv_now_ns() + ms * UINT64_C(1000000); !stopping && skv_now_ns() < until;)
        if (poll(&wait, 1, (int)((until - skv_now_ns()) / 1000000 + 1)) > 0)
            take_signals(NULL);
}

/* Where none can be started now, for want of memory say, what is held is worth waiting with.
 * false: the keeper ends. */
static bool start_next(struct child *daemon, bool anew)
{
    for (uint32_t ms = PAUSE_MS; !succeed(daemon, anew); ms = longer(ms)) {
        if (stopping || !(served || held.whole))
            return false;
        rest(ms);
    }
    return true;
}

static int keep(void)
{
    uint32_t short_lives = 0, pause_ms = 0;
    bool planned = false;
    struct child daemon;
    int code = 1;
    while (start_next(&daemon, planned)) {
        int status = watch(&daemon);
        skv_held_daemon(&held, 0);
        skv_failpoint(FAIL_keeper_reaped);
        if (is_over(&daemon, status, &code))
            break;
        planned = code == KEEPER_RESTART;
        if (planned) {
            skv_info("a planned restart: starting sidekvd anew, with %u extents and %u workers",
                     held.whole ? held.extents : 0, held.worker_count);
            continue;
        }
        short_lives = lived_long(&daemon) ? 0 : short_lives + 1;
        pause_ms = short_lives < 2 || hurry ? 0 : longer(pause_ms);
        char text[64];
        skv_error("sidekvd (pid %d) ended with %s: starting it anew%s; %u extents and %u workers "
                  "are kept",
                  (int)daemon.pid, end_text(status, text, sizeof text),
                  stopping   ? " to store what is kept"
                  : pause_ms ? " after a pause, for it does not live long"
                             : "",
                  held.whole ? held.extents : 0, held.worker_count);
        rest(pause_ms);
        if (stopping && !held.whole)
            break;
    }
    call_off(&next.child);
    return code;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--help") == 0)
        return puts("usage: sidekv-keeper [options of sidekvd]\n"
                    "Runs sidekvd, keeps its pool when it dies, and starts it anew. "
                    "`sidekvd --help` tells its options;\nsee sidekv-keeper(8).") < 0;
    skv_log_init("sidekv-keeper", SKV_LOG_INFO);
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGCHLD, SIG_DFL); /* whoever started us may have it ignored: nobody would be reaped */
    signal(SIGHUP, SIG_IGN);  /* a terminal that closes does not end the cache */
    signal(SIGPIPE, SIG_IGN); /* nor does a log that nobody reads any more */
    signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signal_fd < 0) {
        skv_error("signalfd: %s", strerror(errno));
        return 1;
    }
    hurry = getenv("SIDEKV_TEST_NO_PAUSE") != NULL;
    command = argv;
    skv_held_open(&held);
    return keep();
}
