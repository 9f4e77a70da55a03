/* Onboards: what happens when their copies are done, when a stored page turns out missing or
 * damaged, and when it cannot be read now. */
#include "cache_internal.h"

/* Nothing loads it any more: all its pages are there. */
static void loaded(struct skv_cache *cache, uint32_t index)
{
    struct residence *r = residence_at(cache, index);
    uint32_t first = r->ready;
    r->load_job = 0;
    r->ready = r->pages;
    if (r->record == SKV_NONE)
        return;
    for (uint32_t page = first; page < r->pages; page++) {
        skv_describe(cache, r, page);
        skv_failpoint(FAIL_load_page);
    }
    skv_requeue(cache, index);
}

/* The job is over: its residences are no longer copied to, its row is. */
static void finish(struct skv_cache *cache, struct onboard *job)
{
    *(job->before ? &job->before->behind : &cache->oldest) = job->behind;
    *(job->behind ? &job->behind->before : &cache->newest) = job->before;
    for (uint32_t i = 0; i < job->job.user_count; i++) {
        struct residence *r = residence_at(cache, job->residence[i]);
        r->copies--;
        if (--r->loads == 0)
            loaded(cache, job->residence[i]);
        skv_settle(cache, job->residence[i]);
    }
    if (job->session != SKV_NONE) {
        cache->sessions[job->session].batches[job->row].job = NULL;
        struct skv_action *action = skv_act(cache, SKV_ACTION_ROW);
        action->session = job->session;
        action->row = job->row;
    }
    cache->onboards--;
    free(job);
}

void skv_cache_onboarded(struct skv_cache *cache, struct skv_onboard *done)
{
    finish(cache, (struct onboard *)done);
}

/* Its pages will not come: the users fall back to what they had, and whoever waits for these copies
 * is told. */
static void abandon(struct skv_cache *cache, struct onboard *job)
{
    job->cancelled = true;
    for (uint32_t i = 0; i < job->job.user_count; i++) {
        struct residence *r = residence_at(cache, job->residence[i]);
        if (r->record == SKV_NONE)
            continue;
        uint32_t tokens = r->ready * cache->geometry.page_tokens;
        uint32_t next = skv_succeed(cache, job->residence[i], r->ready,
                                    tokens < r->tokens ? tokens : r->tokens);
        if (next != SKV_NONE)
            skv_settle(cache, next);
    }
    struct skv_action *action = skv_act(cache, SKV_ACTION_CANCEL);
    action->id = job->job.id;
    action->status = SKV_ELOAD;
}

void skv_cache_load_failed(struct skv_cache *cache, struct skv_onboard *failed, uint32_t user,
                           uint32_t index, int32_t status)
{
    struct onboard *job = (struct onboard *)failed;
    cache->stats.onboard_failures++;
    uint32_t owner = skv_cache_find(cache, failed->users[user].model, failed->users[user].user);
    struct residence *r = residence_at(cache, job->residence[user]);
    uint32_t tokens = index * cache->geometry.page_tokens;
    /* Of the same generation its list begins with these hashes, detached or not. */
    uint64_t generation = failed->users[user].generation;
    bool lost = status == SKV_ECORRUPT || status == SKV_ENOENT; /* for good, so the user is cut */
    if (owner != SKV_NONE && cache->records.all[owner].generation == generation &&
        (!lost || skv_cut(cache, owner, tokens, r->hash, NULL)))
        skv_unread(cache, generation);
    /* Batches that wait for these copies wait for nothing now; `after` may name more jobs than they
     * share users with: a batch too many acquires again, none waits in vain. */
    uint64_t id = failed->id;
    for (struct onboard *other = cache->oldest; other; other = other->behind)
        if (!other->cancelled && (other == job || other->job.after >= id))
            abandon(cache, other);
}

void skv_cache_cancelled(struct skv_cache *cache, struct skv_onboard *job)
{
    finish(cache, (struct onboard *)job);
}
