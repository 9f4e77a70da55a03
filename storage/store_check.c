/* The check at every start: a child process walks data.mdb (store_tree.c) while this one goes on
 * starting. What the walk cannot survive (a SIGBUS of a file that cannot be read, a bug of ours met
 * by bytes nobody thought of) then ends the child, not the daemon.
 *
 * The child is forked, so this is done before there are threads or a device; it waits until the
 * store is claimed. It closes every descriptor that it has of its parent, whose store's lock and
 * device stay the parent's alone, and ends with the thread that forked it. What it found comes back
 * in a page of shared memory; only a verdict written there counts. A child that makes no progress
 * for STUCK_NS is killed: no verdict (a slow disk makes progress). A child that somebody else
 * killed has said nothing of the store: the start fails. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "store_private.h"

#define STUCK_NS      UINT64_C(30000000000)
#define TEST_STUCK_NS UINT64_C(300000000)
#define POLL_MS       100
#define TEST_CHECK                                                                                 \
    "SIDEKV_TEST_CHECK" /* for tests: "crash" or "hang" in the child, or a path: waits while there \
                           is such a file */

static void close_all_but(int fd)
{
    if (fd > 3)
        syscall(SYS_close_range, 3u, (unsigned)fd - 1, 0u);
    syscall(SYS_close_range, (unsigned)fd + 1, ~0u, 0u);
}

/* Opens, maps and walks data.mdb. 0, SKV_ECORRUPT, or why it could not. */
static int check(const struct skv_store *store, struct skv_tree_report *report)
{
    char path[PATH_MAX];
    struct stat st;
    snprintf(path, sizeof path, "%s/data.mdb", store->path);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st)) {
        int error = errno;
        skv_error("store: cannot open %s: %s", path, strerror(error));
        return skv_errno_status(error);
    }
    if (st.st_size == 0) {
        snprintf(report->why, sizeof report->why, "the file is empty");
        return SKV_ECORRUPT;
    }
    size_t bytes = (size_t)st.st_size;
    void *file = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (file == MAP_FAILED)
        return skv_errno_status(errno);
    madvise(file, bytes, MADV_RANDOM);
    return skv_tree_walk(store, file, bytes, report);
}

static _Noreturn void run_child(const struct skv_store *store, pid_t parent)
{
    struct skv_tree_report *report = store->check.report;
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGTERM, SIGINT};
    const char *test = getenv(TEST_CHECK);
    eventfd_t claimed;
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++)
        signal(fatal[i], SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_NAME, "skv-check");
    if (getppid() != parent)
        _exit(1);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0});
    close_all_but(store->check.claimed);
    if (eventfd_read(store->check.claimed, &claimed))
        _exit(1);
    if (test && strcmp(test, "crash") == 0)
        raise(SIGSEGV);
    while (test && strcmp(test, "hang") == 0)
        pause();
    while (test && *test == '/' && access(test, F_OK) == 0) {
        atomic_fetch_add_explicit(&report->progress, 1, memory_order_relaxed);
        usleep(1000);
    }
    report->status = check(store, report);
    atomic_store_explicit(&report->verdict, true, memory_order_release);
    _exit(0);
}

int skv_check_fork(struct skv_store *store)
{
    struct skv_check *check = &store->check;
    check->report = mmap(NULL, sizeof *check->report, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (check->report == MAP_FAILED) {
        check->report = NULL;
        return SKV_ENOMEM;
    }
    pid_t parent = getpid();
    check->claimed = eventfd(0, EFD_CLOEXEC);
    check->child = check->claimed < 0 ? -1 : fork();
    if (check->child == 0)
        run_child(store, parent);
    if (check->child > 0)
        return 0;
    skv_error("store: cannot start the process that checks it: %s", strerror(errno));
    skv_check_stop(store);
    return SKV_ENOMEM;
}

int skv_check_start(struct skv_store *store)
{
    store->check.started_ns = skv_now_ns();
    return eventfd_write(store->check.claimed, 1) ? skv_errno_status(errno) : 0;
}

/* Until the child is gone. Returns how waitpid() tells it. */
static int await_child(struct skv_check *check)
{
    int pidfd = (int)syscall(SYS_pidfd_open, check->child, 0), status = 0;
    uint64_t progress = 0, since_ns = skv_now_ns();
    const char *test = getenv(TEST_CHECK);
    const uint64_t stuck_ns = test && strcmp(test, "hang") == 0 ? TEST_STUCK_NS : STUCK_NS;
    for (;;) {
        pid_t ended = waitpid(check->child, &status, WNOHANG);
        if (ended != 0 && !(ended < 0 && errno == EINTR))
            break;
        uint64_t now = atomic_load_explicit(&check->report->progress, memory_order_relaxed);
        if (now != progress)
            since_ns = skv_now_ns();
        progress = now;
        if (skv_now_ns() - since_ns > stuck_ns)
            check->stuck = kill(check->child, SIGKILL) == 0;
        if (atomic_load_explicit(&check->abandoned, memory_order_relaxed))
            kill(check->child, SIGKILL);
        poll(&(struct pollfd){.fd = pidfd, .events = POLLIN}, 1, POLL_MS);
    }
    if (pidfd >= 0)
        close(pidfd);
    check->child = 0;
    return status;
}

int skv_check_wait(struct skv_store *store)
{
    struct skv_check *check = &store->check;
    struct skv_tree_report *report = check->report;
    int how = await_child(check), rc = SKV_ECORRUPT;
    if (atomic_load_explicit(&report->verdict, memory_order_acquire)) {
        rc = report->status;
    } else if (atomic_load_explicit(&check->abandoned, memory_order_relaxed)) {
        rc = SKV_EAGAIN;
    } else if (check->stuck) {
        snprintf(report->why, sizeof report->why, "the process that checked it got stuck");
    } else if (WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL) {
        skv_error("store: the process that checks it was killed");
        rc = SKV_ENOMEM;
    } else {
        snprintf(report->why, sizeof report->why, "the process that checked it crashed (%s %d)",
                 WIFSIGNALED(how) ? "signal" : "exit status",
                 WIFSIGNALED(how) ? WTERMSIG(how) : WEXITSTATUS(how));
    }
    if (rc == 0)
        skv_info("store: checked in %llu ms: %llu users, %llu pages",
                 (unsigned long long)((skv_now_ns() - check->started_ns) / 1000000),
                 (unsigned long long)report->users, (unsigned long long)report->pages);
    return rc;
}

void skv_store_open_abandon(struct skv_store *store)
{
    atomic_store_explicit(&store->check.abandoned, true, memory_order_relaxed);
}

void skv_check_stop(struct skv_store *store)
{
    struct skv_check *check = &store->check;
    if (check->child > 0) {
        kill(check->child, SIGKILL);
        await_child(check);
    }
    if (check->report) {
        munmap(check->report, sizeof *check->report);
        if (check->claimed >= 0)
            close(check->claimed);
    }
    check->child = 0;
    check->report = NULL;
}
