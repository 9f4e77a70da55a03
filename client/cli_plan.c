/* Cuts a log into requests: every so many new events of a user, or when he returns after a pause.
 * A history longer than the model takes drops its oldest half; later requests of that user extend
 * the shorter one. */
#include "cli_plan.h"

#include <stdlib.h>

struct cutter {
    const struct replay_plan_options *options;
    struct replay_plan *plan;
    uint64_t capacity; /* of plan->requests */
    uint64_t user;     /* index of the current one */
    uint64_t first;    /* where his window starts */
    uint64_t asked;    /* where the window of his last request ended */
};

/* One request over the events up to `end`. */
static int ask(struct cutter *cutter, uint64_t end, int64_t now_ms)
{
    struct replay_plan *plan = cutter->plan;
    struct replay_request request = {.user = cutter->user, .time_ms = now_ms, .end = end};
    while (2 * (end - cutter->first) > cutter->options->history_tokens) {
        cutter->first += (end - cutter->first + 1) / 2;
        request.restart = true;
    }
    request.first = cutter->first;
    cutter->asked = end;

    struct replay_plan_user *user = &plan->users[cutter->user];
    if (user->count++ > 0 && !request.restart)
        request.reusable = replay_history_tokens(&plan->requests[plan->count - 1]);
    if (plan->count == cutter->capacity) {
        cutter->capacity = cutter->capacity ? 2 * cutter->capacity : 1024;
        struct replay_request *more = reallocarray(plan->requests, cutter->capacity, sizeof *more);
        if (!more)
            return SKV_ENOMEM;
        plan->requests = more;
    }
    plan->requests[plan->count++] = request;
    return 0;
}

static int cut_user(struct cutter *cutter, const struct replay_log *log)
{
    const struct replay_plan_options *options = cutter->options;
    const struct replay_user *user = &log->users[cutter->user];
    const struct replay_event *events = log->events;
    cutter->first = cutter->asked = user->first;
    cutter->plan->users[cutter->user] = (struct replay_plan_user){.first = cutter->plan->count};

    int rc = 0;
    for (uint64_t next = user->first; !rc && next < user->first + user->count; next++) {
        int64_t now_ms = events[next].time_ms;
        if (options->gap_ms > 0 && next > cutter->asked &&
            now_ms - events[next - 1].time_ms >= options->gap_ms)
            rc = ask(cutter, next, now_ms); /* he returns: ranked before he acts */
        if (!rc && next + 1 - cutter->asked >= options->events)
            rc = ask(cutter, next + 1, now_ms);
    }
    return rc;
}

static int by_time(const void *left, const void *right)
{
    const struct replay_request *a = *(const struct replay_request *const *)left;
    const struct replay_request *b = *(const struct replay_request *const *)right;
    return replay_before(a, b) ? -1 : replay_before(b, a);
}

/* Keeps the first `limit` requests by time: of every user the first few, since his are in order. */
static int keep_first(struct replay_plan *plan, uint64_t limit)
{
    const struct replay_request **sorted = calloc(plan->count, sizeof *sorted);
    if (!sorted)
        return SKV_ENOMEM;
    for (uint64_t i = 0; i < plan->count; i++)
        sorted[i] = &plan->requests[i];
    qsort(sorted, plan->count, sizeof *sorted, by_time);
    for (uint64_t i = limit; i < plan->count; i++)
        plan->users[sorted[i]->user].count--;
    free(sorted);
    plan->count = limit;
    return 0;
}

int replay_plan_make(const struct replay_log *log, const struct replay_plan_options *options,
                     struct replay_plan *out)
{
    if (options->events == 0 || options->gap_ms < 0 || options->history_tokens < 2)
        return SKV_EINVAL;
    struct replay_plan plan = {.user_count = log->user_count};
    struct cutter cutter = {.options = options, .plan = &plan};
    plan.users = calloc(log->user_count, sizeof *plan.users);
    int rc = plan.users ? 0 : SKV_ENOMEM;
    for (; !rc && cutter.user < log->user_count; cutter.user++)
        rc = cut_user(&cutter, log);
    if (!rc && options->limit > 0 && options->limit < plan.count)
        rc = keep_first(&plan, options->limit);
    for (uint64_t u = 0; !rc && u < plan.user_count; u++)
        for (uint64_t i = 0; i < plan.users[u].count; i++) {
            const struct replay_request *request = &plan.requests[plan.users[u].first + i];
            plan.tokens += replay_history_tokens(request);
            plan.reusable += request->reusable;
            plan.restarts += request->restart;
        }
    if (rc)
        replay_plan_close(&plan);
    else
        *out = plan;
    return rc;
}

void replay_plan_close(struct replay_plan *plan)
{
    free(plan->requests);
    free(plan->users);
    *plan = (struct replay_plan){0};
}
