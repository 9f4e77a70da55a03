/* Clients that come and go, a hundred thousand times, in every way that they may go, several at
 * once; half of them under a keeper. Then everything is back at the baseline (promise 7). Prints
 * what a cycle costs. */
#include <sched.h>
#include <sys/mount.h>

#include "clock.h"
#include "daemon_watch.h"
#include "prove.h"
#include "raw_client.h"
#include "verifier.h"

#define CYCLES  100000u /* at scale 1 */
#define CLIENTS 4u      /* at once */

static const struct skv_id model = {.lo = 77};
static bool counts_files;

static bool batch(struct raw *raw, uint64_t user, bool commit)
{
    struct wire_cqe cqe;
    raw->slots[0].requests[0] =
        (struct wire_request){.user = {user}, .history = 64, .max_cached = UINT32_MAX};
    raw_submit(raw, &(struct wire_sqe){.opcode = WIRE_ACQUIRE, .count = 1});
    if (!raw_completion(raw, &cqe) || !commit)
        return !commit;
    raw->slots[0].leases[0] = raw->slots[0].grants[0].lease;
    raw_submit(raw, &(struct wire_sqe){.opcode = WIRE_COMMIT, .count = 1});
    return raw_completion(raw, &cqe) && cqe.status == 0;
}

/* One cycle in this process: a whole session, one with a batch, or a handshake in part. */
static bool cycle(const struct rig *rig, uint64_t i)
{
    struct raw raw;
    struct wire_hello hello = raw_hello(&tiny);
    if (i % 16 == 3) { /* connects and goes */
        close(raw_connect(rig));
        return true;
    }
    if (i % 16 == 7) { /* does not wait for its welcome */
        int fds[2] = {(int)syscall(SYS_pidfd_open, getpid(), 0), raw_gates(4096, true)};
        int fd = raw_connect(rig);
        bool sent = raw_send(fd, &hello, sizeof hello, fds, 2);
        close(fd);
        close(fds[0]);
        close(fds[1]);
        return sent;
    }
    bool fine = raw_open(&raw, rig, &tiny);
    if (fine && i % 8 == 5)
        fine = batch(&raw, i % 100, true);
    raw_close(&raw);
    return fine;
}

/* One whose process ends: by exit, or killed, with a batch open. */
static bool life(const struct rig *rig, uint64_t i)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        struct raw raw;
        if (!raw_open(&raw, rig, &tiny) || !batch(&raw, i % 100, i % 3))
            _exit(1);
        if (i % 2)
            kill(getpid(), SIGKILL);
        _exit(0);
    }
    return waitpid(pid, &status, 0) == pid &&
           (WIFSIGNALED(status) || (WIFEXITED(status) && WEXITSTATUS(status) == 0));
}

/* As many sessions at once as this will ever see: the daemon's heap grows to that. */
static uint64_t crowd(const struct rig *rig)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        struct raw raw;
        for (uint32_t i = 0; i < 100; i++) /* six fds each */
            if (!raw_open(&raw, rig, &tiny))
                _exit(1);
        _exit(0);
    }
    return waitpid(pid, &status, 0) != pid || status;
}

/* Returns how many did not come about. */
static uint64_t run(const struct rig *rig, uint64_t cycles)
{
    pid_t clients[CLIENTS];
    uint64_t failures = 0;
    for (uint32_t c = 0; c < CLIENTS; c++) {
        if ((clients[c] = fork()))
            continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        uint64_t bad = 0;
        for (uint64_t i = c; i < cycles; i += CLIENTS)
            bad += !(i / CLIENTS % 20 == 0 ? life(rig, i / CLIENTS / 20) : cycle(rig, i / CLIENTS));
        if (bad)
            fprintf(stderr, "client %u: %llu cycles failed\n", c, (unsigned long long)bad);
        _exit(bad > 0);
    }
    for (uint32_t c = 0; c < CLIENTS; c++) {
        int status;
        failures += waitpid(clients[c], &status, 0) != clients[c] || status;
    }
    return failures;
}

/* Gives this process and its children a /dev/shm of their own, where nobody else has files. */
static bool own_shared_files(void)
{
    return unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("tmpfs", "/dev/shm", "tmpfs", 0, NULL) == 0;
}

/* The file names in it. */
static uint64_t shared_files(void)
{
    uint64_t count = 0;
    DIR *directory = counts_files ? opendir("/dev/shm") : NULL;
    while (directory && readdir(directory))
        count++;
    if (directory)
        closedir(directory);
    return count;
}

static uint64_t keeper_settles(pid_t keeper, uint64_t before)
{
    for (int i = 0; i < 3000 && watch_fds(keeper) > before; i++)
        usleep(20000);
    printf("keeper: %llu fds, before: %llu\n", (unsigned long long)watch_fds(keeper),
           (unsigned long long)before);
    return watch_fds(keeper) > before;
}

static uint64_t cycles_of(bool keeper, bool epoll, uint64_t cycles)
{
    const char *const options[] = {"--pool-bytes", "16M", epoll ? "--epoll" : NULL, NULL};
    struct daemon_use before, after;
    struct rig rig;
    char path[512];
    rig_program(path, sizeof path);
    if (keeper)
        strcpy(strrchr(path, '/'), "/sidekv-keeper");
    setenv("SIDEKVD", path, 1);
    rig_init(&rig);
    rig_start(&rig, options);
    unsetenv("SIDEKVD");
    watch_start(&rig);
    uint64_t failures = crowd(&rig) + run(&rig, 400); /* till everything has its size */
    failures += watch_settle(&rig, &before, 0, NULL);
    uint64_t files = shared_files(), keeper_fds = keeper ? watch_fds(rig.daemon) : 0;
    uint64_t begin = skv_now_ns();
    failures += run(&rig, cycles);
    double us = (double)(skv_now_ns() - begin) / 1e3 / (double)cycles;
    printf("%s, %s: %.0f us a cycle, %u clients at once\n", keeper ? "keeper" : "no keeper",
           epoll ? "epoll" : "io_uring", us, CLIENTS);
    failures += watch_settle(&rig, &after, 0, &before);
    /* the heap's high water: the same after 15,000 and after 50,000 */
    failures += after.anonymous_kib > before.anonymous_kib + 8192;
    failures += shared_files() > files;
    if (keeper)
        failures += keeper_settles(rig.daemon, keeper_fds);
    failures += watch_forget(&rig, model) + watch_empty(&rig);
    rig_stop(&rig, SIGTERM);
    rig_fini(&rig);
    return failures;
}

int main(void)
{
    uint64_t cycles = prove_times(CYCLES), failures = 0;
    setenv("SIDEKV_LOG", "error", 0);
    if (!(counts_files = own_shared_files()))
        printf("files in /dev/shm are not counted: it takes root to have one's own\n");
    failures += cycles_of(false, false, cycles / 2);
    failures += cycles_of(false, true, cycles / 4);
    prove_line(7, "connect cycles leave no fd, map, memory, page or session", cycles / 4 * 3,
               failures);
    failures = cycles_of(true, false, cycles / 4);
    prove_line(7, "the same under a keeper, which holds no pidfd more", cycles / 4, failures);
    return prove_end();
}
