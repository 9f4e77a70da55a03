/* A sidekvd that is told to end while workers go on: whatever it acknowledges until then is
 * stored. */
#include <criterion/criterion.h>

#include "daemon_rig.h"

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static const struct skv_id model = {.lo = 5};

enum { HISTORY = 100, MOST = 200 };

static struct skv *open_worker(const struct rig *rig)
{
    struct skv *skv;
    struct skv_options options = {.geometry = tiny, .model = model, .rows = 2};
    cr_assert_eq(rig_connect(rig, options, &skv), 0);
    return skv;
}

static bool acquire(struct skv *skv, uint32_t row, uint64_t user, struct skv_batch *batch)
{
    static const uint64_t tokens[HISTORY];
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = HISTORY,
                                  .max_cached = UINT32_MAX};
    cr_assert_eq(skv_acquire(skv, row, &request, 1, batch), 0);
    return batch->grants[0].flags & SKV_GRANT_APPEND;
}

static uint32_t commit(struct skv *skv, struct skv_batch *batch)
{
    struct skv_committed result;
    cr_assert_eq(skv_commit(skv, batch, &result), 0);
    return result.committed;
}

/* The store refuses till all is said, so that the daemon does not end meanwhile. */
Test(stop, what_is_acknowledged_while_the_daemon_ends_is_stored, .timeout = 300)
{
    static const char *const options[] = {"--pool-bytes", "64M", "--stop-wait", "200000", NULL};
    struct rig rig;
    struct skv_batch early, batch;
    rig_init(&rig);
    rig_child = rig_may_be_limited;
    rig_start(&rig, options);
    struct skv *skv = open_worker(&rig);
    rig_limit(rig.daemon, true);
    cr_assert(acquire(skv, 1, MOST + 1, &early));
    uint64_t users = 0;
    for (bool told = false; users < MOST && acquire(skv, 0, users + 1, &batch); users++) {
        cr_assert_eq(commit(skv, &batch), HISTORY);
        if (!told)
            kill(rig.daemon, SIGTERM);
        told = true;
        usleep(10000);
    }
    cr_expect_lt(users, MOST, "appends go on");
    if (users < MOST)
        cr_expect_eq(commit(skv, &batch), 0);
    cr_expect_eq(commit(skv, &early), HISTORY, "a lease from before counts");
    rig_limit(rig.daemon, false);
    int status;
    cr_assert_eq(waitpid(rig.daemon, &status, 0), rig.daemon);
    rig.daemon = 0;
    cr_expect_eq(status, 0);
    skv_close(skv);

    rig_start(&rig, options);
    skv = open_worker(&rig);
    for (uint64_t user = 1; user <= MOST + 1; user++) {
        struct skv_user_info info = {0};
        const bool was = user <= users || user == MOST + 1;
        cr_expect_eq(skv_lookup(skv, model, skv_user_integer(user), &info), was ? 0 : SKV_ENOENT);
        cr_expect_eq(info.stored, was ? HISTORY : 0, "user %llu", (unsigned long long)user);
    }
    skv_close(skv);
    rig_fini(&rig);
}
