/* A log cut into ranking requests: who asks when, and over which window of his events. The plan
 * depends on the log and the options alone, never on who serves it, so that a run with the cache
 * and one without serve the same requests. */
#ifndef SKV_CLI_PLAN_H
#define SKV_CLI_PLAN_H

#include "cli_log.h"

struct replay_request {
    uint64_t user;       /* index into log.users and plan.users */
    int64_t time_ms;     /* when it comes */
    uint64_t first, end; /* its history: these events of the log, two tokens each */
    uint32_t reusable; /* tokens it shares with the user's request before: the most to be cached */
    bool restart;      /* its history was too long: dropped its oldest half, starts anew */
};

struct replay_plan_user {
    uint64_t first, count; /* requests */
};

struct replay_plan_options {
    uint32_t events;         /* new events that make a request, >= 1 */
    int64_t gap_ms;          /* a user who was away this long asks when he returns; 0: off */
    uint32_t history_tokens; /* the model's limit, >= 2 */
    uint64_t limit;          /* only the first so many requests of all; 0: all */
};

struct replay_plan {
    struct replay_request *requests; /* by user, in his order; `users` says which count */
    uint64_t count;                  /* of requests that count: all, or the first `limit` */
    struct replay_plan_user *users;  /* [user_count], as in the log; some without a request */
    uint64_t user_count;
    uint64_t tokens;   /* history tokens of all requests */
    uint64_t reusable; /* of these, the most that a cache can serve */
    uint64_t restarts;
};

/* The log must outlive the plan. Follow with replay_plan_close(). SKV_EINVAL, SKV_ENOMEM. */
int replay_plan_make(const struct replay_log *log, const struct replay_plan_options *options,
                     struct replay_plan *out);
void replay_plan_close(struct replay_plan *plan);

static inline uint32_t replay_history_tokens(const struct replay_request *request)
{
    return 2 * (uint32_t)(request->end - request->first);
}

/* Which of two requests comes first; never equal for two of a plan. */
static inline bool replay_before(const struct replay_request *a, const struct replay_request *b)
{
    return a->time_ms != b->time_ms ? a->time_ms < b->time_ms : a < b;
}

#endif
