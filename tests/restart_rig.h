/* What the tests of hot restarts share: a real keeper, a real daemon, and a worker that writes
 * bytes of its own into every token's rows and knows them again. */
#ifndef SKV_RESTART_RIG_H
#define SKV_RESTART_RIG_H

#include <poll.h>

#include "clock.h"
#include "daemon_rig.h"
#include "every_backend.h"
#include "page_bytes.h"
#include "slow_death.h"

#define USERS 40u
#define MOST  160u /* tokens of a history */
#define S     32u

static const struct skv_geometry geometry = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = S};
static struct rig rig;
static struct skv *skv;
static struct page_bytes bytes; /* of its pages */
static bool protect;            /* RESTART_PROTECT: under sidekvd --protect */
static const char *standby;     /* --standby */
static uint64_t tokens[USERS][MOST];

/* What a worker knows of a user: committed, and the end of a commit whose answer was lost. */
static struct {
    uint32_t committed, perhaps;
} known[USERS];

static inline void set_up(void)
{
    char keeper[512];
    rig_program(keeper, sizeof keeper);
    strcpy(strrchr(keeper, '/'), "/sidekv-keeper");
    setenv("SIDEKVD", keeper, 1);
    setenv("SIDEKV_TEST_NO_PAUSE", "1", 1);
    setenv("SIDEKV_LOG", "error", 0);
    protect = getenv("RESTART_PROTECT") != NULL;
    standby = "off";
    memset(known, 0, sizeof known);
    for (uint32_t u = 0; u < USERS; u++)
        for (uint32_t i = 0; i < MOST; i++)
            tokens[u][i] = (u * 1000 + i + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

static inline void tear_down(void)
{
    if (skv)
        page_bytes_close(&bytes);
    skv_close(skv);
    skv = NULL;
    rig_stop(&rig, SIGTERM); /* the keeper passes it on */
    rig_fini(&rig);
}

/* A test's first line. */
static inline void stage(const struct backend *backend)
{
    require(backend);
    rig_init(&rig);
    rig.device = backend->name;
}

static inline int connect_worker(struct skv **out, struct page_bytes *to)
{
    int status =
        rig_connect(&rig,
                    (struct skv_options){
                        .geometry = geometry, .model = {.lo = 5}, .rows = 1, .timeout_ms = 20000},
                    out);
    return status ? status : page_bytes_open(to, *out, MOST / S);
}

static inline void start_with(const char *const options[])
{
    rig_start(&rig, options);
    cr_assert_eq(connect_worker(&skv, &bytes), 0);
}

static inline void start(void)
{
    /* Protected, a worker's extents are common after a restart, and it takes others: more pool. */
    const char *const options[] = {
        "--pool-bytes", protect ? "512M" : "16M",     "--tail-ms", "0", "--standby",
        standby,        protect ? "--protect" : NULL, NULL};
    start_with(options);
}

static inline uint64_t word_of(uint32_t user, uint32_t token)
{
    return tokens[user][token] ^ (user + 1) * UINT64_C(0xd6e8feb86659fd93);
}

/* A user's rows of tokens [begin, end), each all one word: written, or compared. */
static inline void write_rows(struct page_bytes *to, const uint32_t *pages, uint32_t user,
                              uint32_t begin, uint32_t end)
{
    for (uint32_t token = begin; token < end; token++)
        for (uint32_t row = 0; row < page_bytes_rows(to); row++)
            for (uint32_t i = 0; i < 16; i++)
                page_bytes_row(to, pages, token, row, true)[i] = word_of(user, token) + row;
    cr_assert_eq(page_bytes_store(to, pages, begin, end), 0);
}

static inline void check_rows(const struct skv_grant *grant, uint32_t user)
{
    cr_assert_eq(page_bytes_fetch(&bytes, grant->pages, grant->cached), 0);
    for (uint32_t token = 0; token < grant->cached; token++)
        for (uint32_t row = 0; row < page_bytes_rows(&bytes); row++)
            for (uint32_t i = 0; i < 16; i++)
                cr_assert_eq(page_bytes_row(&bytes, grant->pages, token, row, false)[i],
                             word_of(user, token) + row, "user %u, token %u: another's bytes", user,
                             token);
}

static inline int acquire(struct skv *s, uint32_t user, uint32_t history, uint32_t flags,
                          struct skv_batch *batch)
{
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens[user],
                                  .history = history,
                                  .max_cached = UINT32_MAX,
                                  .flags = flags};
    return skv_acquire(s, 0, &request, 1, batch);
}

/* One request: verify what is cached, append the rest. */
static inline void serve(uint32_t user, uint32_t history)
{
    struct skv_batch batch;
    cr_assert_eq(acquire(skv, user, history, 0, &batch), 0);
    const struct skv_grant *grant = &batch.grants[0];
    uint32_t least = known[user].committed - known[user].committed % S;
    cr_assert(grant->cached >= (least < history ? least : history), "user %u: %u of %u", user,
              grant->cached, known[user].committed);
    check_rows(grant, user);
    bool appends = grant->flags & SKV_GRANT_APPEND;
    if (appends)
        write_rows(&bytes, grant->pages, user, grant->cached, history);
    struct skv_committed result;
    int status = skv_commit(skv, &batch, &result);
    cr_assert(status == 0 || status == SKV_ELOST, "%s", skv_strerror(status));
    if (status)
        known[user].perhaps = appends ? history : 0;
    else
        known[user].committed = result.committed;
    if (!status)
        known[user].perhaps = 0;
}

/* All of every user is in the pool, and right. Returns milliseconds to the first hit. */
static inline double check_all(uint64_t since_ns)
{
    double first_ms = 0;
    for (uint32_t u = 0; u < USERS; u++) {
        struct skv_batch batch;
        uint32_t most =
            known[u].perhaps > known[u].committed ? known[u].perhaps : known[u].committed;
        if (!most)
            continue;
        cr_assert_eq(acquire(skv, u, most, SKV_REQUEST_READ | SKV_REQUEST_NO_ONBOARD, &batch), 0);
        const struct skv_grant *grant = &batch.grants[0];
        cr_assert(grant->gpu_tokens >= known[u].committed && grant->gpu_tokens <= most,
                  "user %u has %u tokens in the pool, committed were %u", u, grant->gpu_tokens,
                  known[u].committed);
        if (!first_ms)
            first_ms = (double)(skv_now_ns() - since_ns) / 1e6;
        check_rows(grant, u);
        known[u].committed = grant->cached;
        known[u].perhaps = 0;
        cr_assert_eq(skv_release(skv, &batch), 0);
    }
    return first_ms;
}

static inline void fill(void)
{
    for (uint32_t u = 0; u < USERS; u++)
        serve(u, 20 + u * 3);
}

/* Free pages once everybody has settled; the pool's pages less those of the known users. */
static inline bool nothing_leaks(void)
{
    uint64_t used = 0;
    for (uint32_t u = 0; u < USERS; u++)
        used += (known[u].committed + S - 1) / S;
    struct skv_stats stats;
    for (int i = 0; i < 6000; i++) {
        if (skv_stats(skv, &stats))
            return false;
        if (stats.pool_pages - stats.pool_pages_free == used)
            return true;
        poll(NULL, 0, 10);
    }
    fprintf(stderr, "%llu pages in use, %llu expected\n",
            (unsigned long long)(stats.pool_pages - stats.pool_pages_free),
            (unsigned long long)used);
    return false;
}

/* The one that waits beside the daemon, its device open; not `before`, which is on its way out. */
static inline pid_t await_standby(pid_t before)
{
    struct skv_stats stats;
    pid_t pids[4] = {0}, daemon = (pid_t)skv_server(skv)->pid;
    for (int i = 0; i < 20000; i++, poll(NULL, 0, 1)) {
        uint32_t count = children(rig.daemon, pids);
        pid_t other = pids[pids[0] == daemon];
        /* Asked after that, and twice: what the daemon was told before it may hear after the first
         * question. */
        for (int again = 0; again < 2; again++)
            cr_assert_eq(skv_stats(skv, &stats), 0);
        if (stats.standby && count == 2 && other != before)
            return other;
    }
    cr_assert_fail("nobody waits");
    return 0;
}

static inline void await_new_daemon(uint32_t before)
{
    for (int i = 0; i < 20000 && skv_server(skv)->pid == before; i++) {
        skv_ping(skv, NULL);
        poll(NULL, 0, 1);
    }
    cr_assert_neq(skv_server(skv)->pid, before);
}

static inline bool store_awaited(void)
{
    struct skv_stats stats;
    cr_assert_eq(skv_stats(skv, &stats), 0);
    return stats.store_awaited;
}

static inline void await_store(void)
{
    for (int i = 0; i < 20000 && store_awaited(); i++)
        poll(NULL, 0, 1);
    cr_assert_not(store_awaited());
}

/* After a restart: all is there, and once the store is, some users grow. */
static inline void check_all_and_append(void)
{
    check_all(skv_now_ns());
    await_store();
    for (uint32_t u = 0; u < USERS; u += 5)
        serve(u, known[u].committed + 1);
}

/* A keeper whose daemons take more arguments from a file, the first one `first`. */
static inline void start_extensible(const char *const options[], const char *first, char *extra,
                                    size_t size)
{
    char path[512], command[1600];
    snprintf(extra, size, "%s/extra", rig.directory);
    rig_program(path, sizeof path); /* SIDEKVD: the keeper */
    *strrchr(path, '/') = 0;
    snprintf(command, sizeof command,
             "cp %s/sidekv-keeper %s/keeper && echo %s >%s && "
             "printf '#!/bin/sh\\nexec %s/sidekvd \"$@\" $(cat %s)\\n' >%s/sidekvd && "
             "chmod +x %s/sidekvd",
             path, rig.directory, first, extra, path, extra, rig.directory, rig.directory);
    cr_assert_eq(system(command), 0);
    snprintf(path, sizeof path, "%s/keeper", rig.directory);
    setenv("SIDEKVD", path, 1);
    start_with(options);
    fill();
}

#endif
