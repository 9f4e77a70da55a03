/* Which pools a real daemon protects, and what it says of the others. Extents of a protected one as
 * sessions end: they are others' once no view of them can be left, and not before. */
#include <criterion/criterion.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "daemon_rig.h"
#include "every_backend.h"
#include "writable.h"

static const struct skv_geometry geometry = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static struct rig rig;
static struct skv *admin;

static void set_up(void)
{
    static const char *const options[] = {"--protect", "--pool-bytes", "64M", NULL};
    setenv("SIDEKV_LOG", "error", 0);
    rig_init(&rig);
    rig_start(&rig, options);
    cr_assert_eq(rig_connect(&rig, (struct skv_options){.admin = true}, &admin), 0);
}

static void tear_down(void)
{
    skv_close(admin);
    rig_fini(&rig);
}

TestSuite(protect, .init = set_up, .fini = tear_down, .timeout = 180);

static struct skv *connect_worker(void)
{
    struct skv *skv = NULL;
    struct skv_options options = {
        .geometry = geometry, .model = {.lo = 5}, .rows = 1, .timeout_ms = 20000};
    return rig_connect(&rig, options, &skv) ? NULL : skv;
}

/* Appends to a user; false: it could not. */
static bool append(struct skv *skv, uint64_t user, uint32_t history)
{
    static uint64_t tokens[256];
    static struct skv_batch batch;
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = history,
                                  .max_cached = UINT32_MAX};
    if (skv_acquire(skv, 0, &request, 1, &batch))
        return false;
    const struct skv_grant *grant = &batch.grants[0];
    if (grant->flags & SKV_GRANT_APPEND) /* scribbles over the last page */
        memset((uint8_t *)skv_pool_append_base(skv) +
                   grant->pages[grant->page_count - 1] * skv_page_bytes(&geometry),
               7, skv_page_bytes(&geometry));
    return skv_commit(skv, &batch, NULL) == 0 && grant->flags & SKV_GRANT_APPEND;
}

static uint64_t owned(void)
{
    struct skv_stats stats;
    cr_assert_eq(skv_stats(admin, &stats), 0);
    cr_assert_eq(stats.extents, stats.extents_free + stats.extents_common + stats.extents_owned);
    cr_assert_eq(stats.extents, 32);
    return stats.extents_owned;
}

static bool becomes_owned(uint64_t count)
{
    for (int i = 0; i < 60000 && owned() != count; i++)
        poll(NULL, 0, 1);
    return owned() == count;
}

/* Every connection of this process to the daemon ends; nothing else of it does. */
static void hang_up(void)
{
    for (int fd = 3; fd < 1024; fd++) {
        struct sockaddr_un peer = {0};
        socklen_t size = sizeof peer;
        if (getpeername(fd, (struct sockaddr *)&peer, &size) == 0 && peer.sun_family == AF_UNIX &&
            strcmp(peer.sun_path, rig.socket) == 0)
            shutdown(fd, SHUT_RDWR);
    }
}

Test(protect, a_session_closed_in_order_gives_its_extents_back)
{
    struct skv *skv = connect_worker();
    cr_assert_not_null(skv);
    cr_expect(skv_server(skv)->protect);
    cr_assert(append(skv, 1, 100));
    cr_expect_eq(owned(), 1);
    skv_close(skv);
    cr_expect(becomes_owned(0), "this process lives on");
}

Test(protect, a_session_that_hung_up_keeps_them_until_its_process_is_gone)
{
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        skv_close(admin); /* the parent's */
        struct skv *skv = connect_worker();
        if (!skv || !append(skv, 1, 100))
            _exit(1);
        hang_up();
        for (;;)
            pause();
    }
    cr_expect(becomes_owned(1));
    struct skv_stats stats = {.sessions = 2};
    while (stats.sessions > 1) { /* but this one */
        cr_assert_eq(skv_stats(admin, &stats), 0);
        poll(NULL, 0, 1);
    }
    struct skv *skv = connect_worker();
    cr_assert_not_null(skv);
    for (int i = 0; i < 50; i++) {
        cr_assert(append(skv, 2, 10 + 4 * (uint32_t)i), "a grant needs nothing of that one");
        cr_assert_eq(owned(), 2, "its views are still mapped");
        poll(NULL, 0, 2);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    cr_expect(becomes_owned(1));
    skv_close(skv);
}

Test(protect, a_reconnect_begins_with_no_view)
{
    struct skv *skv = connect_worker();
    cr_assert_not_null(skv);
    cr_assert(append(skv, 1, 100));
    void *base = skv_pool_base(skv), *write = skv_pool_append_base(skv);
    skv_close(admin);
    hang_up();
    while (!skv_lost(skv))
        poll(NULL, 0, 1);
    cr_assert_eq(skv_reconnect(skv, 20000), 0);
    cr_expect_eq(skv_pool_base(skv), base);
    cr_expect_eq(skv_pool_append_base(skv), write);
    cr_assert_eq(rig_connect(&rig, (struct skv_options){.admin = true}, &admin), 0);
    cr_expect(becomes_owned(0));
    cr_assert(append(skv, 1, 101));
    cr_expect_eq(owned(), 1);
    skv_close(skv);
}

/* ---- which pools are ---- */

static char log_path[128];

static void log_to_file(void)
{
    setenv("SIDEKV_LOG", "warn", 1);
    if (!freopen(log_path, "w", stderr))
        abort();
}

static bool says(const char *what)
{
    char line[512];
    bool found = false;
    FILE *file = fopen(log_path, "re");
    while (file && !found && fgets(line, sizeof line, file))
        found = strstr(line, what);
    if (file)
        fclose(file);
    return found;
}

/* Does a daemon with these options protect its pool? It and its stats are of one opinion. */
static bool protects(const struct backend *backend, const char *const options[])
{
    require(backend);
    rig_init(&rig);
    rig.device = backend->name;
    snprintf(log_path, sizeof log_path, "%s/log", rig.directory);
    rig_child = log_to_file;
    rig_start(&rig, options);
    cr_assert_eq(rig_connect(&rig, (struct skv_options){.admin = true}, &admin), 0);
    struct skv_stats stats;
    cr_assert_eq(skv_stats(admin, &stats), 0);
    cr_expect_eq(stats.pool_protected, skv_server(admin)->protect);
    cr_expect_eq(stats.extents != 0, stats.pool_protected);
    return stats.pool_protected;
}

/* Can a process store to the page where it reads it, on the host? */
static bool page_writable(const struct skv *skv, uint64_t page)
{
    return writable((uint8_t *)skv_pool_base(skv) + page * skv_page_bytes(&geometry));
}

#define ON_EVERY_BACKEND(claim)                                                                    \
    TEST_ON_EVERY_BACKEND(protection, claim, .fini = tear_down, .timeout = 180)

ON_EVERY_BACKEND(is_the_default_where_the_pool_has_extents_enough)
{
    static const char *const options[] = {"--pool-bytes", "32M", NULL};
    cr_expect(protects(backend, options));
    cr_expect_not(says("protect"));
    struct skv *skv = connect_worker();
    cr_assert_not_null(skv);
    cr_expect_neq(skv_pool_append_base(skv), skv_pool_base(skv));
    bool host = !skv_server(skv)->cuda;
    for (uint64_t page = 0; host && page < skv_pool_pages(skv); page += 64) /* one of each extent */
        cr_expect_not(page_writable(skv, page));
    skv_close(skv);
}

ON_EVERY_BACKEND(is_not_where_the_pool_is_small_and_the_log_says_so)
{
    static const char *const options[] = {"--pool-bytes", "30M", NULL};
    cr_expect_not(protects(backend, options));
    cr_expect(says("not protected"));
    cr_expect(says("15 extents"));
    cr_expect(says("--pool-bytes"), "what to do");
    struct skv *skv = connect_worker();
    cr_assert_not_null(skv);
    cr_expect_eq(skv_pool_append_base(skv), skv_pool_base(skv));
    skv_close(skv);
}

ON_EVERY_BACKEND(is_had_in_a_small_pool_by_asking_for_it)
{
    static const char *const options[] = {"--protect", "--pool-bytes", "30M", NULL};
    cr_expect(protects(backend, options));
    cr_expect(says("15 extents are few"));
}

ON_EVERY_BACKEND(ends_with_trust)
{
    static const char *const options[] = {"--trust", "--pool-bytes", "64M", NULL};
    cr_expect_not(protects(backend, options));
    cr_expect_not(says("protect"), "it is meant");
    struct skv *skv = connect_worker();
    cr_assert_not_null(skv);
    cr_expect(skv_server(skv)->cuda || page_writable(skv, 0));
    skv_close(skv);
}

/* The host has no IPC handles. */
Test(protection, is_not_had_with_ipc_and_the_log_says_so, .fini = tear_down, .timeout = 180)
{
    static const char *const options[] = {"--export", "ipc", "--pool-bytes", "64M", NULL};
    cr_expect_not(protects(&backends[1], options));
    cr_expect(says("not protected"));
    cr_expect(says("--export fd"), "what to do");
}
