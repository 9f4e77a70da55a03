/* A store that is smaller than all users: a real sidekvd evicts from it as fast as new ones come,
 * stores them, and never runs into the end meanwhile. */
#include <criterion/criterion.h>

#include "daemon_rig.h"

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32}; /* pages of 32 KiB */
static const struct skv_id model = {.lo = 5};

enum { PAGES = 4, HISTORY = PAGES * 32, USERS = 2000 /* 250 MiB */, POOL_PAGES = 1024 };

/* Once nearly all of the pool is stored, so that little is dropped from it (what is on its way to
 * the store holds pages too). */
static void append(struct skv *skv, uint64_t user, const uint64_t *tokens)
{
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = HISTORY,
                                  .max_cached = UINT32_MAX};
    for (int tries = 0; tries < 60000; tries++, usleep(1000)) {
        struct skv_stats stats;
        struct skv_committed result;
        struct skv_batch batch;
        cr_assert_eq(skv_stats(skv, &stats), 0);
        if (stats.offload_backlog > POOL_PAGES / 16)
            continue;
        cr_assert_eq(skv_acquire(skv, 0, &request, 1, &batch), 0);
        cr_assert_eq(skv_commit(skv, &batch, &result), 0);
        if (result.committed == HISTORY)
            return;
    }
    cr_assert_fail("no room for user %llu", (unsigned long long)user);
}

Test(full_store, users_come_faster_than_the_watermarks_are_looked_at, .timeout = 300)
{
    static const char *const options[] = {"--pool-bytes", "32M", "--store-bytes", "64M", NULL};
    static uint64_t tokens[HISTORY];
    struct rig rig;
    struct skv *skv;
    struct skv_stats stats;
    for (uint32_t i = 0; i < HISTORY; i++)
        tokens[i] = i * UINT64_C(2654435761);
    rig_init(&rig);
    rig_start(&rig, options);
    cr_assert_eq(
        rig_connect(&rig, (struct skv_options){.geometry = tiny, .model = model, .rows = 1}, &skv),
        0);
    for (uint64_t user = 1; user <= USERS; user++)
        append(skv, user, tokens);
    cr_expect_eq(skv_flush(skv), 0);
    cr_assert_eq(skv_stats(skv, &stats), 0);
    cr_expect_eq(stats.store_errors, 0, "%llu", (unsigned long long)stats.store_errors);
    cr_expect_eq(stats.offload_pages + stats.dropped_tokens / 32, USERS * PAGES);
    cr_expect_gt(stats.store_evicted_users, USERS / 10);
    skv_close(skv);
    rig_fini(&rig);
}
