/* One run: starts the workers, hands them the plan's requests at random, kills one now and then if
 * asked to, and adds up what they report. */
#ifndef SKV_CLI_DISPATCH_H
#define SKV_CLI_DISPATCH_H

#include "cli_plan.h"
#include "cli_result.h"

#define REPLAY_WORKERS_MAX 64u

/* What a run is. The log and the plan must outlive it. */
struct replay_run {
    const struct replay_log *log;
    const struct replay_plan *plan;
    struct work_header header; /* without the counts */
    const char *name;          /* for progress: "cached", "uncached" */
    uint32_t workers;
    double verify;       /* share of requests to recompute */
    bool flip;           /* recompute one with a changed token */
    uint64_t kill_every; /* requests; 0: never */
};

/* Returns 0 when every request was answered, SKV_EIO when workers keep dying or do not start
 * (logged), SKV_EAGAIN when interrupted; `out` holds what there is in any case. Follow with
 * replay_result_close(). */
int replay_dispatch(const struct replay_run *run, struct replay_result *out);

#endif
