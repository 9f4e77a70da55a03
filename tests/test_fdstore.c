/* A keeper under a service manager with an fd store: the test plays systemd. It takes the keeper's
 * messages and fds, and starts the next keeper with the fds that were not dropped, in the manager's
 * own way (LISTEN_FDS). What dies meanwhile: keeper, daemon, both, a daemon that the keeper has
 * started early. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "daemon_rig.h"
#include "device.h"
#include "fdpass.h"
#include "slow_death.h"

#define USERS 12u
#define MOST  64u  /* fds that the manager may keep */
#define HIGH  1000 /* above what a child has open */

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static struct rig rig;
static struct skv *skv;
static uint64_t tokens[200];
static const char *standby = "off"; /* --standby of the keepers to come */

static struct {
    int socket;
    struct sockaddr_un address;
    pthread_t thread;
    sem_t heard; /* "HEARD": all that was said before it */
    pthread_mutex_t lock;
    uint32_t count, ready;
    struct {
        char name[64];
        int fd;
    } fds[MOST];
} manager = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- the manager ---- */

static void take(const char *text, const int *fds, uint32_t count)
{
    const char *name = strstr(text, "FDNAME=");
    pthread_mutex_lock(&manager.lock);
    manager.ready += strstr(text, "READY=1") != NULL;
    if (name && strncmp(text, "FDSTORE=1\n", 10) == 0 && count == 1 && manager.count < MOST) {
        snprintf(manager.fds[manager.count].name, sizeof manager.fds->name, "%s", name + 7);
        manager.fds[manager.count++].fd = fds[0];
    } else if (name && strncmp(text, "FDSTOREREMOVE=1\n", 16) == 0) {
        for (uint32_t i = 0; i < manager.count;)
            if (strcmp(manager.fds[i].name, name + 7) == 0) {
                close(manager.fds[i].fd);
                manager.fds[i] = manager.fds[--manager.count];
            } else {
                i++;
            }
    }
    pthread_mutex_unlock(&manager.lock);
}

static void *manage(void *unused)
{
    for (;;) {
        char text[256] = {0};
        int fds[SKV_FDS_PER_MESSAGE];
        uint32_t count = 0;
        ssize_t got = skv_receive_fds(manager.socket, text, sizeof text - 1, fds,
                                      SKV_FDS_PER_MESSAGE, &count, 0);
        if (got > 0 && strcmp(text, "END") == 0)
            return unused;
        if (got > 0 && strcmp(text, "HEARD") == 0)
            sem_post(&manager.heard);
        else if (got > 0)
            take(text, fds, count);
    }
}

static void tell_manager(const char *text)
{
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    sendto(fd, text, strlen(text), 0, (struct sockaddr *)&manager.address, sizeof manager.address);
    close(fd);
}

static uint32_t stored(const char *prefix)
{
    uint32_t count = 0;
    pthread_mutex_lock(&manager.lock);
    for (uint32_t i = 0; i < manager.count; i++)
        count += strncmp(manager.fds[i].name, prefix, strlen(prefix)) == 0;
    pthread_mutex_unlock(&manager.lock);
    return count;
}

/* Waits until so many are stored; systemd too hears things one after the other. */
static bool becomes(const char *prefix, uint32_t count)
{
    for (int i = 0; i < 6000; i++, usleep(10000))
        if (stored(prefix) == count)
            return true;
    return false;
}

/* The fds of the store from 3 on, last in first out, as systemd gives them. In the child. */
static void give_fds(void)
{
    char names[MOST * 64] = "", number[16];
    for (uint32_t i = 0; i < manager.count; i++)
        dup2(manager.fds[i].fd, HIGH + (int)i);
    for (uint32_t i = 0; i < manager.count; i++) {
        uint32_t from = manager.count - 1 - i;
        dup2(HIGH + (int)from, 3 + (int)i);
        strcat(strcat(names, i ? ":" : ""), manager.fds[from].name);
    }
    for (uint32_t i = 0; i < manager.count; i++)
        close(HIGH + (int)i);
    snprintf(number, sizeof number, "%d", (int)getpid());
    setenv("LISTEN_PID", number, 1);
    snprintf(number, sizeof number, "%u", manager.count);
    setenv("LISTEN_FDS", number, 1);
    setenv("LISTEN_FDNAMES", names, 1);
}

/* What the one before has said is heard first: systemd too reads its notify socket before it looks
 * at who has died. */
static void start_keeper(void)
{
    char program[512];
    tell_manager("HEARD");
    while (sem_wait(&manager.heard))
        ;
    rig_program(program, sizeof program);
    strcpy(strrchr(program, '/'), "/sidekv-keeper");
    pthread_mutex_lock(&manager.lock);
    rig.daemon = fork();
    if (rig.daemon == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        give_fds();
        execl(program, program, "--socket", rig.socket, "--store", rig.store, "--device", "host",
              "--pool-bytes", "80M", "--store-bytes", "256M", "--tail-ms", "0", "--standby",
              standby, NULL);
        _exit(127);
    }
    pthread_mutex_unlock(&manager.lock);
}

/* ---- a worker that knows its bytes ---- */

static void connect_worker(void)
{
    struct skv_options session = {
        .geometry = tiny, .model = {.lo = 5}, .rows = 1, .timeout_ms = 20000};
    cr_assert_eq(rig_connect(&rig, session, &skv), 0);
}

static uint64_t *page_of(void *base, uint32_t page)
{
    return (uint64_t *)(void *)((uint8_t *)base + page * skv_page_bytes(&tiny));
}

static int serve(uint64_t user, uint32_t history, uint32_t *in_pool)
{
    struct skv_batch batch;
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = history,
                                  .max_cached = UINT32_MAX};
    int status = skv_acquire(skv, 0, &request, 1, &batch);
    if (status)
        return status;
    const struct skv_grant *grant = &batch.grants[0];
    *in_pool = grant->gpu_tokens;
    for (uint32_t layer = 0; batch.gated && layer < tiny.layers; layer++)
        cr_assert_eq(skv_gate_wait(skv_gate_row(skv, 0) + layer, 20000), 0);
    uint64_t words = skv_page_bytes(&tiny) / 8;
    for (uint32_t page = 0; page < (history + 31) / 32; page++)
        for (uint64_t i = 0; i < words; i++)
            if (page * 32 < grant->cached)
                cr_assert_eq(page_of(skv_pool_base(skv), grant->pages[page])[i],
                             user * 1000 + page);
            else if (grant->flags & SKV_GRANT_APPEND)
                page_of(skv_pool_append_base(skv), grant->pages[page])[i] = user * 1000 + page;
    return skv_commit(skv, &batch, NULL);
}

static void fill(void)
{
    uint32_t in_pool;
    for (uint64_t user = 1; user <= USERS; user++)
        cr_assert_eq(serve(user, 96, &in_pool), 0);
}

/* The daemon of the dead keeper ends: by itself, or the next one ends it. Till then it may serve.
 */
static void await_its_end(void)
{
    while (!skv_lost(skv))
        usleep(1000);
}

/* Every user, whole, from the next daemon's pool, byte for byte; after the reconnect that the
 * library does by itself. */
static void expect_all_there(void)
{
    uint32_t in_pool;
    await_its_end();
    for (uint64_t user = 1; user <= USERS; user++) {
        int status = serve(user, 96, &in_pool);
        for (int i = 0; i < 20 && status == SKV_ELOST; i++) {
            skv_reconnect(skv, 20000);
            status = serve(user, 96, &in_pool);
        }
        cr_assert_eq(status, 0, "%s", skv_strerror(status));
        cr_assert_eq(in_pool, 96, "user %llu has %u tokens in the pool", (unsigned long long)user,
                     in_pool);
    }
}

static void set_up(void)
{
    struct sockaddr_un *address = &manager.address;
    for (uint32_t i = 0; i < 200; i++)
        tokens[i] = i + 1;
    rig_init(&rig);
    address->sun_family = AF_UNIX;
    snprintf(address->sun_path, sizeof address->sun_path, "%s/notify", rig.directory);
    manager.socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(bind(manager.socket, (struct sockaddr *)address, sizeof *address), 0);
    sem_init(&manager.heard, 0, 0);
    setenv("NOTIFY_SOCKET", address->sun_path, 1);
    setenv("SIDEKV_TEST_NO_PAUSE", "1", 1);
    setenv("SIDEKV_LOG", "warn", 0);
    cr_assert_eq(pthread_create(&manager.thread, NULL, manage, NULL), 0);
    start_keeper();
    connect_worker();
    fill();
    cr_assert(becomes("sessions", 1) && becomes("worker-", 1));
}

static void tear_down(void)
{
    skv_close(skv);
    rig_stop(&rig, SIGTERM);
    tell_manager("END");
    pthread_join(manager.thread, NULL);
    rig_fini(&rig);
}

TestSuite(fdstore, .init = set_up, .fini = tear_down, .timeout = 300);

Test(fdstore, the_manager_holds_all_that_a_successor_needs)
{
    cr_expect_geq(stored("pool-"), 40, "80 MiB are forty extents");
    cr_expect_eq(stored("table"), 1);
    cr_expect_eq(stored("sessions"), 1);
    cr_expect_eq(stored("worker-"), 1);
    cr_expect_eq(stored("sidekvd"), 1);
    cr_expect_eq(manager.ready, 1);
    skv_close(skv);
    skv = NULL;
    cr_expect(becomes("worker-", 0), "a session that has ended is dropped");
}

static void expect_all_held(void)
{
    cr_expect(becomes("sidekvd", 1) && becomes("table", 1) && becomes("worker-", 1));
}

Test(fdstore, a_killed_keeper_is_a_hot_restart)
{
    for (int round = 0; round < 3; round++) {
        rig_stop(&rig, SIGKILL);
        start_keeper();
        expect_all_there();
        expect_all_held();
    }
}

/* At any step of the next daemon's start. */
Test(fdstore, a_keeper_killed_soon_after_its_daemon_is_a_hot_restart)
{
    static const useconds_t after_us[] = {0, 500, 1000, 2000, 5000, 10000, 20000, 50000};
    for (size_t i = 0; i < sizeof after_us / sizeof *after_us; i++) {
        kill((pid_t)skv_server(skv)->pid, SIGKILL);
        usleep(after_us[i]);
        rig_stop(&rig, SIGKILL);
        start_keeper();
        expect_all_there();
        expect_all_held();
    }
}

Test(fdstore, a_keeper_killed_while_the_next_daemon_waits)
{
    pid_t daemon = (pid_t)skv_server(skv)->pid, next = kill_slowly(rig.daemon, daemon), pids[4];
    struct pollfd end = {.fd = (int)syscall(SYS_pidfd_open, next, 0), .events = POLLIN};
    rig_stop(&rig, SIGKILL);
    cr_expect_eq(poll(&end, 1, 20000), 1, "it waits on, for nobody");
    close(end.fd);
    start_keeper();
    poll(NULL, 0, 200); /* it comes as far as it will */
    cr_expect_eq(children(rig.daemon, pids), 0, "it did not wait for the daemon to be gone");
    let_die(daemon);
    expect_all_there();
    expect_all_held();
}

/* It ends by itself, or is held up and cannot: no keeper cares. */
Test(fdstore, a_standby_of_a_dead_keeper_is_in_nobodys_way)
{
    rig_stop(&rig, SIGKILL);
    standby = "on";
    start_keeper();
    expect_all_there();
    for (int round = 0; round < 6; round++) {
        struct skv_stats stats = {0};
        pid_t daemon = (pid_t)skv_server(skv)->pid, pids[4];
        for (int i = 0; i < 20000 && !stats.standby; i++, usleep(1000))
            cr_assert_eq(skv_stats(skv, &stats), 0);
        cr_assert_eq(children(rig.daemon, pids), 2);
        pid_t waiting = pids[pids[0] == daemon];
        bool held_up = round % 2, ends_first = round == 4;
        struct pollfd end = {.fd = (int)syscall(SYS_pidfd_open, waiting, 0), .events = POLLIN};
        expect_all_held();
        if (held_up) {
            if (ptrace(PTRACE_SEIZE, waiting, NULL, 0))
                cr_skip_test("no ptrace() here");
            cr_assert_eq(ptrace(PTRACE_INTERRUPT, waiting, NULL, 0), 0);
            cr_assert_eq(waitpid(waiting, NULL, __WALL), waiting);
        }
        if (round / 2 == 1) {
            kill(rig.daemon, SIGSTOP); /* or it may be in time to hand over */
            kill(daemon, SIGKILL);
        }
        rig_stop(&rig, SIGKILL);
        if (ends_first)
            cr_expect_eq(poll(&end, 1, 20000), 1, "it waits on, for nobody");
        start_keeper();
        expect_all_there();
        expect_all_held();
        if (held_up) {
            cr_expect_eq(poll(&end, 1, 0), 0);
            cr_assert_eq(ptrace(PTRACE_DETACH, waiting, NULL, 0), 0);
        }
        cr_expect_eq(poll(&end, 1, 20000), 1, "it waits on, for nobody");
        close(end.fd);
        cr_expect_neq(skv_server(skv)->pid, (uint32_t)waiting);
    }
}

Test(fdstore, a_daemon_that_outlives_its_keeper_is_ended_by_the_next)
{
    pid_t daemon = (pid_t)skv_server(skv)->pid;
    struct pollfd end = {.fd = (int)syscall(SYS_pidfd_open, daemon, 0), .events = POLLIN};
    int status;
    /* Its loop is held up, so that it cannot notice. SIGSTOP would not do: the kernel continues who
     * is stopped when its parent dies. */
    if (ptrace(PTRACE_SEIZE, daemon, NULL, NULL) || ptrace(PTRACE_INTERRUPT, daemon, NULL, NULL))
        cr_skip_test("no ptrace() here");
    cr_assert_eq(waitpid(daemon, &status, __WALL), daemon);
    cr_assert(WIFSTOPPED(status));
    rig_stop(&rig, SIGKILL);
    start_keeper();
    cr_assert_eq(poll(&end, 1, 60000), 1, "it lives on");
    close(end.fd);
    cr_assert_eq(waitpid(daemon, &status, __WALL), daemon);
    cr_expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    expect_all_there();
}

Test(fdstore, a_worker_killed_with_its_keeper_leaves_no_page_behind)
{
    struct skv_stats stats;
    pid_t child = fork();
    if (child == 0) {
        struct skv_batch batch;
        struct skv_request request = {.user = skv_user_integer(99),
                                      .tokens = tokens,
                                      .history = 192,
                                      .max_cached = UINT32_MAX};
        struct skv *mine;
        struct skv_options session = {.geometry = tiny, .model = {.lo = 5}, .rows = 1};
        if (rig_connect(&rig, session, &mine) || skv_acquire(mine, 0, &request, 1, &batch))
            _exit(1);
        kill(getpid(), SIGSTOP);
        _exit(0);
    }
    int status;
    cr_assert_eq(waitpid(child, &status, WUNTRACED), child);
    cr_assert(WIFSTOPPED(status));
    cr_assert(becomes("worker-", 2));
    rig_stop(&rig, SIGKILL);
    start_keeper();
    expect_all_there();
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    for (int i = 0; i < 6000; i++, usleep(10000)) {
        cr_assert_eq(skv_stats(skv, &stats), 0);
        if (stats.pool_pages - stats.pool_pages_free == USERS * 3)
            break;
    }
    cr_expect_eq(stats.pool_pages - stats.pool_pages_free, USERS * 3);
    cr_expect(becomes("worker-", 1));
}

Test(fdstore, a_store_that_lost_something_is_a_cold_start)
{
    uint32_t in_pool;
    cr_assert_eq(skv_flush(skv), 0);
    rig_stop(&rig, SIGKILL);
    take("FDSTOREREMOVE=1\nFDNAME=sessions", NULL, 0);
    start_keeper();
    await_its_end();
    int status = SKV_ELOST;
    for (int i = 0; i < 20 && status == SKV_ELOST; i++) {
        skv_reconnect(skv, 20000);
        status = serve(1, 96, &in_pool);
    }
    cr_assert_eq(status, 0);
    cr_expect_eq(in_pool, 0, "from the store");
    cr_expect(becomes("sessions", 1), "and a new pool is held");
}
