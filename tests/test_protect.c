/* Extents of a real protected daemon as sessions end: they are others' once no view of them can be
 * left, and not before. */
#include <criterion/criterion.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "daemon_rig.h"

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

TestSuite(protect, .init = set_up, .fini = tear_down, .timeout = 120);

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
    for (int i = 0; i < 10000 && owned() != count; i++)
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
