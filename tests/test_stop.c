/* A sidekvd that is told to end while workers go on: whatever it acknowledges until then is
 * stored. */
#include <criterion/criterion.h>

#include "daemon_rig.h"

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static const struct skv_id model = {.lo = 5};

enum { HISTORY = 100, MOST = 200, EARLY = 64 /* users of 4 pages of 32 KiB: 8 MiB */ };

static struct skv *open_worker(const struct rig *rig)
{
    struct skv *skv;
    struct skv_options options = {.geometry = tiny, .model = model, .rows = 2};
    cr_assert_eq(rig_connect(rig, options, &skv), 0);
    return skv;
}

/* `count` users from this one on: may they append? */
static bool acquire(struct skv *skv, uint32_t row, uint64_t user, uint32_t count,
                    struct skv_batch *batch)
{
    static const uint64_t tokens[HISTORY];
    struct skv_request requests[EARLY];
    uint32_t append = 0;
    for (uint32_t i = 0; i < count; i++)
        requests[i] = (struct skv_request){.user = skv_user_integer(user + i),
                                           .tokens = tokens,
                                           .history = HISTORY,
                                           .max_cached = UINT32_MAX};
    cr_assert_eq(skv_acquire(skv, row, requests, count, batch), 0);
    for (uint32_t i = 0; i < count; i++)
        append += batch->grants[i].flags & SKV_GRANT_APPEND ? 1 : 0;
    cr_assert(append == 0 || append == count);
    return append;
}

/* The tokens of all users. */
static uint32_t commit(struct skv *skv, struct skv_batch *batch)
{
    struct skv_committed results[EARLY];
    uint32_t committed = 0, count = batch->count;
    cr_assert_eq(skv_commit(skv, batch, results), 0);
    for (uint32_t i = 0; i < count; i++)
        committed += results[i].committed;
    return committed;
}

/* The store refuses till all is said, so that the daemon does not end meanwhile. Then it takes the
 * pages in many pieces, those from before the signal first. */
Test(stop, what_is_acknowledged_while_the_daemon_ends_is_stored, .timeout = 300)
{
    static const char *const options[] = {"--pool-bytes",    "64M", "--stop-wait", "200000",
                                          "--staging-bytes", "1M",  NULL};
    struct rig rig;
    struct skv_batch early, batch;
    rig_init(&rig);
    rig_child = rig_may_be_limited;
    rig_start(&rig, options);
    struct skv *skv = open_worker(&rig);
    rig_limit(rig.daemon, true);
    cr_assert(acquire(skv, 1, MOST + 1, EARLY, &early));
    uint64_t users = 0;
    for (bool told = false; users < MOST && acquire(skv, 0, users + 1, 1, &batch); users++) {
        cr_assert_eq(commit(skv, &batch), HISTORY);
        if (!told)
            kill(rig.daemon, SIGTERM);
        told = true;
        usleep(10000);
    }
    cr_expect_lt(users, MOST, "appends go on");
    if (users < MOST)
        cr_expect_eq(commit(skv, &batch), 0);
    cr_expect_eq(commit(skv, &early), EARLY * HISTORY, "leases from before count");
    rig_limit(rig.daemon, false);
    int status;
    cr_assert_eq(waitpid(rig.daemon, &status, 0), rig.daemon);
    rig.daemon = 0;
    cr_expect_eq(status, 0);
    skv_close(skv);

    rig_start(&rig, options);
    skv = open_worker(&rig);
    for (uint64_t user = 1; user <= MOST + EARLY; user++) {
        struct skv_user_info info = {0};
        const bool was = user <= users || user > MOST;
        cr_expect_eq(skv_lookup(skv, model, skv_user_integer(user), &info), was ? 0 : SKV_ENOENT);
        cr_expect_eq(info.stored, was ? HISTORY : 0, "user %llu", (unsigned long long)user);
    }
    skv_close(skv);
    rig_fini(&rig);
}
