/* Promise 6. Conditions that last, each made and ended while a daemon serves: it says that it
 * stores nothing and why, goes on serving, and resumes by itself. And call by call: every I/O or
 * allocation call of sidekvd, and of a worker's library, is failed once (shim_faults.c), in a run
 * of its own.
 *
 * A run: a daemon under the shim, a small pool and a store; users come, grow, are evicted, come
 * back from the store, are cut and forgotten; a FLUSH, a SIGTERM. Whatever call failed, the daemon
 * either ended before it served, with exit status 1 and words, or served to the end: every call of
 * the library ended with a status, no token that was granted was wrong, what was refused is done
 * later, and SIGTERM ended it in good order. Then a daemon without faults starts on the same store,
 * where everything acknowledged as stored is, and nothing that was forgotten. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "fault.h"
#include "prove.h"
#include "sidekv.h"

#define LANES      4u   /* runs at one time: some wait a second for the next try */
#define RUN_S      100u /* a run that takes longer hangs */
#define USERS      12u
#define MANY       128u /* of 16 pages: more than the smallest map holds */
#define BATCH      4u
#define ROUNDS     9u
#define SESSIONS   24u   /* of the worker whose library is under the shim */
#define AFTER      4u    /* of these at most after the failed call */
#define LASTING    10u   /* times each condition */
#define CALLS      1500u /* of a class, at most */
#define TRIES      200u  /* of what one fault may refuse: the store is tried again every second */
#define GEOMETRY   ((struct skv_geometry){.layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32})
#define MODEL      ((struct skv_id){.lo = 0xfa017, .hi = 6})
#define MAX_TOKENS 1024u

struct subject { /* a user */
    uint32_t version, history;
    uint32_t stored; /* acknowledged */
    bool forgotten;
};

struct run {
    enum fault_class class;
    uint32_t nth;
    const char *option; /* of the daemon, or NULL */
    char directory[64], socket[96], log[96];
    struct fault_control *control;
    pid_t daemon;
    struct skv *skv, *admin;
    const char *pool; /* --pool-bytes */
    uint32_t count;   /* users */
    struct subject users[MANY];
};

static struct shared { /* of all lanes */
    _Atomic uint32_t struck, failures, numbered, refused;
} * shared; /* [16] */

static char here[512]; /* the build directory */

/* ---- what went wrong ---- */

static void show_log(const struct run *run)
{
    char command[160];
    snprintf(command, sizeof command, "tail -n 12 %s", run->log);
    if (system(command))
        printf("(no log)\n");
}

__attribute__((format(printf, 2, 3), noreturn)) static void wrong(const struct run *run,
                                                                  const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("class %u call %u%s%s (%s): ", run->class, run->nth, run->option ? " " : "",
           run->option ? run->option : "", run->control->what);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    show_log(run);
    fflush(stdout);
    _exit(1);
}

/* ---- the daemon ---- */

static void start(struct run *run, bool shim)
{
    char program[600], preload[600], faults[96];
    snprintf(program, sizeof program, "%s/bin/sidekvd", here);
    snprintf(preload, sizeof preload, "%s/tests/shim_faults.so", here);
    snprintf(faults, sizeof faults, "%s/faults", run->directory);
    char store[96];
    snprintf(store, sizeof store, "%s/store", run->directory);
    run->daemon = fork();
    if (run->daemon)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int log = open(run->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(log, STDERR_FILENO);
    setenv("SIDEKV_LOG", "info", 1);
    if (shim) {
        setenv("LD_PRELOAD", preload, 1);
        setenv(FAULTS_VARIABLE, faults, 1);
    }
    execl(program, program, "--socket", run->socket, "--store", store, "--device", "host",
          "--pool-bytes", run->pool, "--store-bytes", "64M", "--pin-bytes", "32M",
          "--staging-bytes", "1M", "--tail-ms", "5", "--max-users", "1024", run->option, NULL);
    _exit(127);
}

/* Has the daemon ended? Its wait status then. */
static bool ended(struct run *run, int *status)
{
    if (run->daemon <= 0 || waitpid(run->daemon, status, WNOHANG) != run->daemon)
        return false;
    run->daemon = 0;
    return true;
}

static void must_live(struct run *run)
{
    int status;
    if (ended(run, &status))
        wrong(run, "the daemon died while it served, wait status %#x", status);
}

/* ---- what a client does: every call until it works ---- */

static int connect_once(struct run *run, bool admin, struct skv **skv)
{
    return skv_open(&(struct skv_options){.socket = run->socket,
                                          .admin = admin,
                                          .geometry = GEOMETRY,
                                          .model = MODEL,
                                          .timeout_ms = 30000},
                    skv);
}

/* false: the daemon has refused to start. */
static bool reach(struct run *run, bool admin, struct skv **skv, bool started)
{
    int status = SKV_ELOST, exited;
    for (uint32_t i = 0; i < 30 * TRIES; i++) {
        if (access(run->socket, F_OK) == 0 && (status = connect_once(run, admin, skv)) == 0)
            return true;
        if (status == SKV_ETIMEDOUT)
            wrong(run, "a handshake was not answered");
        if (ended(run, &exited)) {
            if (started || !WIFEXITED(exited) || WEXITSTATUS(exited) != 1)
                wrong(run, "the daemon ended with wait status %#x", exited);
            return false;
        }
        poll(NULL, 0, 2);
    }
    wrong(run, "no connection: %s", skv_strerror(status));
}

static void reconnect(struct run *run, struct skv *skv)
{
    int status = SKV_ELOST;
    for (uint32_t i = 0; i < TRIES && status; i++) {
        must_live(run);
        if ((status = skv_reconnect(skv, 10000)) != 0)
            poll(NULL, 0, 20);
    }
    if (status)
        wrong(run, "no reconnect: %s", skv_strerror(status));
}

/* A status that is no success: may the call be tried again? It must be a refusal. */
static void refused(struct run *run, struct skv *skv, const char *what, int status, uint32_t tries)
{
    must_live(run);
    if (status == SKV_ETIMEDOUT || status == SKV_EPROTO || status == SKV_EINVAL || tries > TRIES)
        wrong(run, "%s: %s, after %u tries", what, skv_strerror(status), tries);
    if (skv_lost(skv))
        reconnect(run, skv);
    poll(NULL, 0, tries < 5 ? 2 : 50);
}

static int or_absent(int status)
{
    return status == SKV_ENOENT ? SKV_OK : status;
}

#define UNTIL_DONE(skv, what, call)                                                                \
    do {                                                                                           \
        int status_;                                                                               \
        for (uint32_t tries_ = 0; (status_ = (call)) < 0; tries_++)                                \
            refused(run, skv, what, status_, tries_);                                              \
    } while (0)

/* ---- tokens and what stands for their keys and values ---- */

static uint64_t token_of(uint32_t user, uint32_t version, uint32_t at)
{
    uint64_t x = (uint64_t)user << 40 | (uint64_t)version << 32 | at;
    x = (x + UINT64_C(0x9e3779b97f4a7c15)) * UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ x >> 29;
}

/* The bytes of token slot `slot` of a page: every run of it is written, or compared. */
static bool slot_bytes(uint8_t *page, uint32_t slot, uint64_t value, bool write)
{
    const struct skv_geometry g = GEOMETRY;
    for (uint32_t i = 0; i < g.layers * 2 * g.heads; i++) {
        uint64_t run[16], mark = value + i;
        uint8_t *at = page + ((uint64_t)i * g.page_tokens + slot) * sizeof run;
        for (uint32_t k = 0; k < 16; k++)
            run[k] = mark * (2 * k + 1);
        if (write)
            memcpy(at, run, sizeof run);
        else if (memcmp(at, run, sizeof run) != 0)
            return false;
    }
    return true;
}

static void fill(struct run *run, struct skv *skv, const uint64_t *tokens, uint32_t user,
                 const struct skv_grant *grant, uint32_t from, uint32_t to, bool write)
{
    uint8_t *pool = write ? skv_pool_append_base(skv) : skv_pool_base(skv);
    for (uint32_t t = from; t < to; t++) {
        uint8_t *page = pool + grant->pages[t / 32] * skv_page_bytes(&GEOMETRY);
        if (!slot_bytes(page, t % 32, tokens[t], write))
            wrong(run, "user %u token %u of %u is wrong", user, t, grant->cached);
    }
}

/* One batch: BATCH users from `first` on, at the histories that they have. Their grants are checked
 * byte for byte, what is new is appended. */
static int batch_once(struct run *run, uint32_t first, uint32_t row, uint32_t flags)
{
    static uint64_t tokens[BATCH][MAX_TOKENS];
    struct skv_request requests[BATCH];
    struct skv_committed done[BATCH];
    struct skv_batch batch;
    for (uint32_t i = 0; i < BATCH; i++) {
        const struct subject *user = &run->users[first + i];
        for (uint32_t t = 0; t < user->history; t++)
            tokens[i][t] = token_of(first + i, user->version, t);
        requests[i] = (struct skv_request){.user = skv_user_integer(first + i),
                                           .tokens = tokens[i],
                                           .history = user->history,
                                           .max_cached = UINT32_MAX,
                                           .flags = flags};
    }
    int status = skv_acquire(run->skv, row, requests, BATCH, &batch);
    if (status)
        return status;
    for (uint32_t layer = 0; batch.gated && layer < GEOMETRY.layers; layer++)
        if (skv_gate_wait(&skv_gate_row(run->skv, row)[layer], 30000))
            wrong(run, "a gate stays shut");
    status = skv_batch_status(run->skv, &batch);
    if (status) {
        skv_release(run->skv, &batch);
        return status;
    }
    for (uint32_t i = 0; i < BATCH; i++) {
        const struct skv_grant *grant = &batch.grants[i];
        fill(run, run->skv, tokens[i], first + i, grant, 0, grant->cached, false);
        if (grant->flags & SKV_GRANT_APPEND)
            fill(run, run->skv, tokens[i], first + i, grant, grant->cached, requests[i].history,
                 true);
    }
    status = skv_commit(run->skv, &batch, done);
    for (uint32_t i = 0; status == 0 && i < BATCH; i++)
        if (done[i].status == 0 && done[i].stored > run->users[first + i].stored)
            run->users[first + i].stored = done[i].stored;
    return status;
}

static void everybody(struct run *run, uint32_t flags)
{
    for (uint32_t first = 0; first < run->count; first += BATCH)
        UNTIL_DONE(run->skv, "a batch", batch_once(run, first, first / BATCH % 2, flags));
}

static void flush(struct run *run)
{
    UNTIL_DONE(run->skv, "FLUSH", skv_flush(run->skv));
    for (uint32_t i = 0; i < run->count; i++) {
        struct skv_user_info info = {0};
        UNTIL_DONE(run->skv, "LOOKUP",
                   or_absent(skv_lookup(run->skv, MODEL, skv_user_integer(i), &info)));
        if (info.stored < run->users[i].stored)
            wrong(run, "user %u: %u tokens are stored, %u were", i, info.stored,
                  run->users[i].stored);
        run->users[i].stored = info.stored;
    }
}

static void manage(struct run *run)
{
    struct skv_user_info infos[USERS];
    struct skv_stats stats;
    uint64_t cursor = 0;
    struct skv_id forgotten = skv_user_integer(2), cut = skv_user_integer(1);
    UNTIL_DONE(run->admin, "STATS", skv_stats(run->admin, &stats));
    do
        UNTIL_DONE(run->admin, "LIST", skv_list(run->admin, &cursor, infos, USERS));
    while (cursor);
    if (run->users[1].stored > 32)
        run->users[1].stored = 32; /* before: it may be done, and its answer lost */
    UNTIL_DONE(run->admin, "TRUNCATE", or_absent(skv_truncate(run->admin, MODEL, cut, 32)));
    run->users[2].stored = 0;
    UNTIL_DONE(run->admin, "FORGET", or_absent(skv_forget(run->admin, MODEL, forgotten)));
    run->users[2].forgotten = true;
    UNTIL_DONE(run->skv, "EVICT", or_absent(skv_evict(run->skv, MODEL, skv_user_integer(3))));
    struct skv_request prefetch = {.user = skv_user_integer(3),
                                   .history = 64,
                                   .max_cached = UINT32_MAX,
                                   .tokens = (uint64_t[MAX_TOKENS]){0}};
    uint64_t *tokens = (uint64_t *)(uintptr_t)prefetch.tokens;
    for (uint32_t t = 0; t < 64; t++)
        tokens[t] = token_of(3, run->users[3].version, t);
    UNTIL_DONE(run->skv, "PREFETCH", skv_prefetch(run->skv, &prefetch));
}

/* The whole of it; false: the daemon did not start, and said why. */
static bool script(struct run *run)
{
    if (!reach(run, false, &run->skv, false))
        return false;
    reach(run, true, &run->admin, true);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        for (uint32_t i = 0; i < USERS; i++)
            run->users[i].history += 37 + 3 * i;
        everybody(run, 0);
        flush(run);
    }
    everybody(run, SKV_REQUEST_READ);
    manage(run);
    for (uint32_t i = 4; i < USERS; i++)
        run->users[i].history += 21;
    for (uint32_t first = BATCH; first < run->count; first += BATCH)
        UNTIL_DONE(run->skv, "a batch", batch_once(run, first, 0, 0));
    flush(run);
    skv_close(run->skv);
    skv_close(run->admin);
    reach(run, false, &run->skv, true);
    UNTIL_DONE(run->skv, "a batch", batch_once(run, BATCH, 0, 0));
    struct skv_stats stats;
    UNTIL_DONE(run->skv, "STATS", skv_stats(run->skv, &stats));
    if (stats.offload_stopped)
        wrong(run, "offload is stopped for good");
    skv_close(run->skv);
    return true;
}

/* ---- afterwards ---- */

static void stop(struct run *run)
{
    int status;
    kill(run->daemon, SIGTERM);
    if (waitpid(run->daemon, &status, 0) != run->daemon || !WIFEXITED(status) ||
        WEXITSTATUS(status) != 0)
        wrong(run, "SIGTERM: wait status %#x", status);
    run->daemon = 0;
}

/* It refused to start: in words? The cause, or for want of memory the remedy. */
static void check_refusal(struct run *run)
{
    char text[8192] = "";
    FILE *log = fopen(run->log, "r");
    size_t got = log ? fread(text, 1, sizeof text - 1, log) : 0;
    if (log)
        fclose(log);
    text[got] = 0;
    const char *first = strstr(text, "error: ");
    if (!first || !strstr(text, "error: not started: "))
        wrong(run, "the daemon does not say why it does not start");
    if (!strstr(first + 1, "error: ") && !strstr(first, "ask for less"))
        wrong(run, "the daemon says nothing but \"not started\"");
    shared->refused++;
}

static void check_after(struct run *run)
{
    start(run, false);
    if (!reach(run, false, &run->skv, false))
        wrong(run, "a daemon without faults does not start");
    for (uint32_t i = 0; i < run->count; i++) {
        struct skv_user_info info = {0};
        int status = skv_lookup(run->skv, MODEL, skv_user_integer(i), &info);
        if (status && status != SKV_ENOENT)
            wrong(run, "LOOKUP after the restart: %s", skv_strerror(status));
        if (info.stored < run->users[i].stored)
            wrong(run, "user %u: %u tokens of %u acknowledged ones are stored", i, info.stored,
                  run->users[i].stored);
        if (run->users[i].forgotten && info.committed)
            wrong(run, "user %u was forgotten and is back", i);
    }
    everybody(run, SKV_REQUEST_READ);
    struct skv_stats stats;
    if (skv_stats(run->skv, &stats) || stats.onboard_failures || stats.store_damaged_pages)
        wrong(run, "a stored page could not be loaded after the restart");
    skv_close(run->skv);
    kill(run->daemon, SIGKILL);
    waitpid(run->daemon, NULL, 0);
}

static void make_run(struct run *run)
{
    char path[96];
    snprintf(run->directory, sizeof run->directory, "%s/sidekv-faults.XXXXXX",
             access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    if (!mkdtemp(run->directory))
        abort();
    snprintf(run->socket, sizeof run->socket, "%s/socket", run->directory);
    snprintf(run->log, sizeof run->log, "%s/log", run->directory);
    snprintf(path, sizeof path, "%s/faults", run->directory);
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, sizeof *run->control))
        abort();
    run->count = USERS;
    run->pool = "2M";
    run->control = mmap(NULL, sizeof *run->control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    run->control->class = run->class;
    run->control->nth = run->nth;
    int log = open(run->log, O_WRONLY | O_CREAT, 0600);
    close(log);
}

static void one_run(struct run *run)
{
    start(run, true);
    if (script(run))
        stop(run);
    else
        check_refusal(run);
    shared->numbered = run->control->counted[run->class];
    check_after(run);
}

/* ---- the client library ---- */

/* In a worker under the shim: sessions that come and go. */
static int client(const char *directory)
{
    /* As the shim does: these calls have no number. */
    int fd = (int)syscall(SYS_openat, AT_FDCWD, getenv(FAULTS_VARIABLE), O_RDWR | O_CLOEXEC);
    struct fault_control *control =
        (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct run *run = &(struct run){.control = control, .count = USERS};
    if (control == MAP_FAILED)
        return 1;
    close(fd);
    snprintf(run->directory, sizeof run->directory, "%s", directory);
    snprintf(run->socket, sizeof run->socket, "%s/socket", directory);
    snprintf(run->log, sizeof run->log, "%s/log", directory);
    for (uint32_t i = 0; i < USERS; i++)
        run->users[i].history = 40 + 13 * i;
    for (uint32_t session = 0, after = 0; session < SESSIONS && after < AFTER; session++) {
        struct skv_stats stats;
        reach(run, false, &run->skv, true);
        reach(run, true, &run->admin, true);
        everybody(run, 0);
        flush(run);
        UNTIL_DONE(run->admin, "STATS", skv_stats(run->admin, &stats));
        skv_close(run->admin);
        skv_close(run->skv);
        after += control->failed > 0;
    }
    return 0;
}

static void one_client_run(struct run *run)
{
    char self[600], preload[600], faults[96];
    int status;
    start(run, false);
    snprintf(self, sizeof self, "%s/tests/prove_faults", here);
    snprintf(preload, sizeof preload, "%s/tests/shim_faults.so", here);
    snprintf(faults, sizeof faults, "%s/faults", run->directory);
    pid_t worker = fork();
    if (worker == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setenv("LD_PRELOAD", preload, 1);
        setenv(FAULTS_VARIABLE, faults, 1);
        execl(self, self, "client", run->directory, NULL);
        _exit(127);
    }
    waitpid(worker, &status, 0);
    if (status)
        wrong(run, "the worker ended with wait status %#x", status);
    shared->numbered = run->control->counted[run->class];
    must_live(run);
    kill(run->daemon, SIGKILL);
    waitpid(run->daemon, NULL, 0);
}

/* A run in a process of its own, so that whatever happens to it, it ends. Returns how many of its
 * calls were failed. */
static void guarded(struct run *run, void (*body)(struct run *))
{
    make_run(run);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int log = open(run->log, O_WRONLY | O_APPEND);
        dup2(log, STDERR_FILENO); /* the library's words */
        alarm(RUN_S);
        body(run);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) {
        printf("class %u call %u (%s): %s\n", run->class, run->nth, run->control->what,
               WTERMSIG(status) == SIGALRM ? "it hangs" : strsignal(WTERMSIG(status)));
        show_log(run);
    }
    shared->failures += status != 0;
    shared->struck += run->control->failed > 0;
    munmap(run->control, sizeof *run->control);
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", run->directory);
    if (system(command))
        printf("%s is left\n", run->directory);
}

/* ---- conditions that last ---- */

static bool log_says(const struct run *run, const char *words)
{
    static char text[1 << 20];
    FILE *log = fopen(run->log, "r");
    size_t got = log ? fread(text, 1, sizeof text - 1, log) : 0;
    if (log)
        fclose(log);
    text[got] = 0;
    return strstr(text, words) != NULL;
}

/* What can be stored is refused with `status`, in stats and log; requests are served. */
static void must_be_stopped(struct run *run, int status)
{
    struct skv_stats stats = {0};
    char words[128];
    int got = SKV_OK;
    /* Both at once: a try in between may have stored something, and that is a resumption. */
    for (uint32_t tries = 0; tries < TRIES && (got != status || !stats.offload_stopped); tries++) {
        everybody(run, 0);
        got = skv_flush(run->skv);
        must_live(run);
        for (uint32_t i = 0; got == 0 && i < run->count; i++)
            run->users[i].history += 16;
        UNTIL_DONE(run->admin, "STATS", skv_stats(run->admin, &stats));
    }
    snprintf(words, sizeof words, "(%s): offload stops", skv_strerror(status));
    if (got != status || !stats.offload_stopped || !log_says(run, words))
        wrong(run, "FLUSH says %s, stopped is %u, the log %s", skv_strerror(got),
              (unsigned)stats.offload_stopped, log_says(run, words) ? "tells" : "does not tell");
    for (uint32_t i = 0; i < 10; i++) /* and go on being served, well into its next tries */
        everybody(run, i % 2 ? SKV_REQUEST_READ : 0);
}

static void must_resume(struct run *run)
{
    struct skv_stats stats;
    flush(run);
    for (uint32_t tries = 0; tries < TRIES; tries++) {
        UNTIL_DONE(run->admin, "STATS", skv_stats(run->admin, &stats));
        if (!stats.offload_stopped)
            break;
        poll(NULL, 0, 50);
    }
    if (stats.offload_stopped || !log_says(run, "the store takes pages again"))
        wrong(run, "it does not resume, or does not say so");
    everybody(run, SKV_REQUEST_READ);
    skv_close(run->skv);
    skv_close(run->admin);
    stop(run);
    check_after(run);
}

static void open_run(struct run *run)
{
    start(run, true);
    if (!reach(run, false, &run->skv, false))
        wrong(run, "it does not start");
    reach(run, true, &run->admin, true);
    for (uint32_t i = 0; i < USERS; i++)
        run->users[i].history = 60 + 5 * i;
    everybody(run, 0);
    flush(run);
}

static void lasting(struct run *run, uint32_t condition, int status)
{
    open_run(run);
    run->control->lasting = condition;
    for (uint32_t i = 0; i < USERS; i++)
        run->users[i].history += 50;
    must_be_stopped(run, status);
    run->control->lasting = 0;
    must_resume(run);
}

static void disk_error(struct run *run)
{
    lasting(run, FAULT_DISK_ERROR, SKV_EIO);
}

static void meta_error(struct run *run)
{
    lasting(run, FAULT_META_ERROR, SKV_EIO);
}

static void no_memory(struct run *run)
{
    lasting(run, FAULT_NO_MEMORY, SKV_ENOMEM);
}

/* A file system of 6 MiB and a file that fills it; as no root: the shim says that it is full. */
static void disk_full(struct run *run)
{
    char store[96], filler[128];
    static const uint8_t some[65536];
    snprintf(store, sizeof store, "%s/store", run->directory);
    snprintf(filler, sizeof filler, "%s/filler", store);
    mkdir(store, 0700);
    if (mount("tmpfs", store, "tmpfs", 0, "size=6m")) {
        lasting(run, FAULT_DISK_FULL, SKV_ENOSPC);
        return;
    }
    open_run(run);
    int fd = open(filler, O_WRONLY | O_CREAT, 0600);
    for (size_t piece = sizeof some; piece; piece /= 2)
        while (write(fd, some, piece) > 0)
            ;
    close(fd);
    for (uint32_t i = 0; i < USERS; i++)
        run->users[i].history += 50;
    must_be_stopped(run, SKV_ENOSPC);
    unlink(filler);
    must_resume(run);
    umount2(store, MNT_DETACH);
}

/* More users in the pool than the map may hold: some are forgotten then. */
static void map_full(struct run *run)
{
    run->pool = "96M";
    run->count = MANY;
    for (uint32_t i = 0; i < MANY; i++)
        run->users[i].history = 512;
    start(run, true);
    if (!reach(run, false, &run->skv, false))
        wrong(run, "it does not start");
    reach(run, true, &run->admin, true);
    must_be_stopped(run, SKV_ENOSPC);
    for (uint32_t i = 0; i < MANY / 4; i++) {
        UNTIL_DONE(run->admin, "FORGET", skv_forget(run->admin, MODEL, skv_user_integer(i)));
        run->users[i] = (struct subject){.forgotten = true, .history = 16, .version = 1};
    }
    flush(run);
    for (uint32_t i = 0; i < MANY / 4; i++)
        run->users[i].forgotten = false; /* they may come back as somebody else */
    must_resume(run);
}

/* RLIMIT_NOFILE as low as what is open: sessions go on, a new one gets a status, then one works. */
static void no_fds(struct run *run)
{
    struct rlimit before, none = {.rlim_cur = 3, .rlim_max = 0};
    struct skv *second = NULL;
    open_run(run);
    prlimit(run->daemon, RLIMIT_NOFILE, NULL, &before);
    none.rlim_max = before.rlim_max;
    prlimit(run->daemon, RLIMIT_NOFILE, &none, NULL);
    for (uint32_t i = 0; i < USERS; i++)
        run->users[i].history += 50;
    int status = skv_open(
        &(struct skv_options){
            .socket = run->socket, .geometry = GEOMETRY, .model = MODEL, .timeout_ms = 500},
        &second);
    if (status == 0)
        wrong(run, "a session was opened without descriptors");
    everybody(run, 0);
    flush(run);
    if (!log_says(run, "accept: Too many open files"))
        wrong(run, "the log does not tell");
    prlimit(run->daemon, RLIMIT_NOFILE, &before, NULL);
    reach(run, false, &second, true);
    skv_close(second);
    everybody(run, SKV_REQUEST_READ);
    skv_close(run->skv);
    skv_close(run->admin);
    stop(run);
    check_after(run);
}

static void prove_lasting(void)
{
    static const struct {
        const char *what;
        void (*body)(struct run *);
    } conditions[] = {
        {"disk full for a while: served, said, resumed", disk_full},
        {"I/O errors for a while: served, said, resumed", disk_error},
        {"I/O errors of LMDB's meta page: served, said, resumed", meta_error},
        {"map full for a while: served, said, resumed", map_full},
        {"no memory for a while: served, said, resumed", no_memory},
        {"no descriptors for a while: served, said, resumed", no_fds},
    };
    const uint32_t count = sizeof conditions / sizeof *conditions;
    uint64_t times = prove_times(LASTING);
    struct shared *all = shared;
    for (uint32_t c = 0; c < count; c++) {
        shared = &all[c];
        *shared = (struct shared){0};
        if (fork())
            continue;
        for (uint32_t i = 0; i < times; i++)
            guarded(&(struct run){.option = i % 2 ? "--epoll" : "--durability=power"},
                    conditions[c].body);
        _exit(0);
    }
    while (wait(NULL) > 0)
        ;
    for (uint32_t c = 0; c < count; c++)
        prove_line(6, conditions[c].what, times, all[c].failures);
    shared = all;
}

/* Each call of a class, LANES runs at a time. */
static void prove(const char *what, enum fault_class class, const char *option,
                  void (*body)(struct run *))
{
    *shared = (struct shared){0};
    guarded(&(struct run){.class = class, .option = option},
            body); /* no fault: how many are there? */
    uint32_t numbered = shared->numbered, calls = numbered < CALLS ? numbered : CALLS;
    uint32_t stride = (uint32_t)(1 / prove_scale() + 0.5);
    stride = stride ? stride : 1;
    printf("%s: the first %u of %u calls\n", what, calls, numbered);
    fflush(stdout);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        if (fork())
            continue;
        for (uint32_t nth = 1 + (uint32_t)prove_seed() % stride + lane * stride; nth <= calls;
             nth += LANES * stride)
            guarded(&(struct run){.class = class, .nth = nth, .option = option}, body);
        _exit(0);
    }
    while (wait(NULL) > 0)
        ;
    printf("%s: %u starts refused\n", what, shared->refused);
    prove_line(6, what, shared->struck, shared->failures);
}

int main(int argc, char **argv)
{
    ssize_t length = readlink("/proc/self/exe", here, sizeof here - 1);
    here[length > 0 ? length : 0] = 0;
    for (int up = 0; up < 2 && strchr(here, '/'); up++)
        *strrchr(here, '/') = 0;
    shared =
        mmap(NULL, 16 * sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    signal(SIGPIPE, SIG_IGN);
    if (argc == 3)
        return client(argv[2]);
    if (argc == 4) { /* one run: CLASS NTH OPTION|client */
        guarded(&(struct run){.class = (enum fault_class)atoi(argv[1]),
                              .nth = (uint32_t)atoi(argv[2]),
                              .option = argv[3][0] == '-' ? argv[3] : NULL},
                strcmp(argv[3], "client") == 0 ? one_client_run : one_run);
        printf("%u calls numbered, %u failures\n", shared->numbered, shared->failures);
        return shared->failures != 0;
    }
    prove_lasting();
    prove("I/O calls of sidekvd, durability power, each failed once", FAULT_IO,
          "--durability=power", one_run);
    prove("I/O calls of sidekvd on epoll, each failed once", FAULT_IO, "--epoll", one_run);
    prove("allocation calls of sidekvd, each failed once", FAULT_MEMORY, NULL, one_run);
    prove("I/O calls of a worker's library, each failed once", FAULT_IO, NULL, one_client_run);
    prove("allocation calls of a worker's library, each failed once", FAULT_MEMORY, NULL,
          one_client_run);
    return prove_end();
}
