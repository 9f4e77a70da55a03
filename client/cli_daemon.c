/* Readiness comes as from systemd: the daemon sends READY=1 to the datagram socket that
 * NOTIFY_SOCKET names. A daemon that ends instead is noticed at once. */
#include "cli_daemon.h"

#include <errno.h>
#include <ftw.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "sidekv.h"

#define READY_MS 60000u  /* a pool of 100 GB on a GPU takes seconds */
#define STOP_MS  120000u /* it may have gigabytes to store */

#define BASE_MAX 78 /* of a directory, so that a socket's path in it fits */

/* In $TMPDIR, unless that is too long for a socket's path. */
static int make_directory(struct replay_daemon *daemon)
{
    const char *base = getenv("TMPDIR");
    if (base && strlen(base) > BASE_MAX)
        skv_warn("TMPDIR is too long for a socket's path; /tmp instead");
    if (!base || !*base || strlen(base) > BASE_MAX)
        base = "/tmp";
    snprintf(daemon->directory, sizeof daemon->directory, "%s/sidekv-replay-XXXXXX", base);
    if (!mkdtemp(daemon->directory)) {
        skv_error("%s: %s", daemon->directory, strerror(errno));
        daemon->directory[0] = 0;
        return SKV_EIO;
    }
    snprintf(daemon->socket, sizeof daemon->socket, "%s/socket", daemon->directory);
    return 0;
}

static int remove_one(const char *path, const struct stat *file, int kind, struct FTW *where)
{
    (void)file, (void)kind, (void)where;
    return remove(path);
}

static void remove_directory(struct replay_daemon *daemon)
{
    if (daemon->directory[0] && nftw(daemon->directory, remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0)
        skv_warn("%s: %s", daemon->directory, strerror(errno));
    daemon->directory[0] = 0;
}

static int open_notify(const struct replay_daemon *daemon, struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    _Static_assert(BASE_MAX + sizeof "/sidekv-replay-XXXXXX/socket" <= sizeof address->sun_path,
                   "");
    snprintf(address->sun_path, sizeof address->sun_path, "%.*s/notify", BASE_MAX + 22,
             daemon->directory);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)address, sizeof *address) != 0) {
        skv_error("%s: %s", address->sun_path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return -1;
    }
    return fd;
}

static void exec_daemon(const struct replay_daemon_options *options, struct replay_daemon *daemon,
                        const char *notify)
{
    static const char *const places[] = {"sidekvd", "../sbin/sidekvd"}; /* as built; as installed */
    char path[PATH_MAX + sizeof "../sbin/sidekvd"], store[128];
    char *argv[16], **next = argv;
    snprintf(store, sizeof store, "%s/store", daemon->directory);
    const char *pairs[][2] = {
        {"--socket", daemon->socket},          {"--store", options->store ? options->store : store},
        {"--model", options->model},           {"--device", options->device},
        {"--pool-bytes", options->pool_bytes}, {"--store-bytes", options->store_bytes},
    };
    *next++ = "sidekvd";
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (pairs[i][1]) {
            *next++ = (char *)(uintptr_t)pairs[i][0];
            *next++ = (char *)(uintptr_t)pairs[i][1];
        }
    if (options->protection)
        *next++ = (char *)(uintptr_t)options->protection;
    *next = NULL;
    setenv("NOTIFY_SOCKET", notify, 1);
    setenv("SIDEKV_LOG", "warn", 0);

    ssize_t length = readlink("/proc/self/exe", path, PATH_MAX - 1);
    if (length > 0) {
        path[length] = 0;
        char *name = strrchr(path, '/') + 1;
        for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
            strcpy(name, places[i]);
            execv(path, argv);
        }
    }
    execvp("sidekvd", argv);
    skv_error("sidekvd: neither beside this program, nor in ../sbin from there, nor in PATH: %s",
              strerror(errno));
    _exit(127);
}

/* Until READY=1 has come. */
static int wait_ready(struct replay_daemon *daemon, int notify)
{
    uint64_t end = skv_now_ns() + (uint64_t)READY_MS * 1000000u;
    while (skv_now_ns() < end && !replay_interrupted()) {
        char text[256] = "";
        struct pollfd ready = {.fd = notify, .events = POLLIN};
        int status;
        if (poll(&ready, 1, 20) > 0 && recv(notify, text, sizeof text - 1, 0) > 0 &&
            strstr(text, "READY=1"))
            return 0;
        if (replay_wait(daemon->pid, 1, &status)) {
            daemon->pid = 0;
            bool missing = WIFEXITED(status) && WEXITSTATUS(status) == 127; /* said there */
            if (!missing)
                skv_error("sidekvd ended before it was ready: %s", replay_end_text(status));
            return SKV_ELOST;
        }
    }
    if (!replay_interrupted())
        skv_error("sidekvd was not ready within %u s", READY_MS / 1000);
    return SKV_ETIMEDOUT;
}

int replay_daemon_start(const struct replay_daemon_options *options, struct replay_daemon *daemon)
{
    *daemon = (struct replay_daemon){0};
    int rc = make_directory(daemon);
    if (rc)
        return rc;
    struct sockaddr_un address;
    int notify = open_notify(daemon, &address);
    rc = SKV_EIO;
    if (notify >= 0) {
        daemon->pid = replay_fork(SIGTERM);
        if (daemon->pid == 0)
            exec_daemon(options, daemon, address.sun_path);
        if (daemon->pid > 0)
            rc = wait_ready(daemon, notify);
        close(notify);
    }
    if (rc)
        replay_daemon_stop(daemon);
    return rc;
}

int replay_daemon_stop(struct replay_daemon *daemon)
{
    int status = 0, rc = 0;
    if (daemon->pid > 0) {
        kill(daemon->pid, SIGTERM);
        if (!replay_wait(daemon->pid, STOP_MS, &status)) {
            skv_error("sidekvd did not end within %u s; killed", STOP_MS / 1000);
            kill(daemon->pid, SIGKILL);
            replay_wait(daemon->pid, 0, &status);
        }
        if (status != 0) {
            skv_error("sidekvd ended with %s", replay_end_text(status));
            rc = SKV_ELOST;
        }
    }
    daemon->pid = 0;
    remove_directory(daemon);
    return rc;
}
