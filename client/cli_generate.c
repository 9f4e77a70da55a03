/* Makes up a log with the shape of real ones: few users do most (Pareto), few items get most
 * (Zipf-like), users come in sittings of a few quick events and stay away for times that have a
 * heavy tail. Everything comes from one seed. */
#include "cli_log.h"

#include <math.h>
#include <stdlib.h>

#define ACTIVITY_ALPHA 1.1   /* of the Pareto law of events a user; smaller is heavier */
#define ACTIVITY_CAP   100.0 /* times the least active user */
#define PAUSE_ALPHA    0.6   /* of the time between two sittings */
#define PAUSE_CAP      500.0 /* times the least */
#define PAUSE_MEAN     18.0  /* of that law, cap included */
#define SITTING_EVENTS 12    /* mean events a sitting */
#define EVENT_MS       20000 /* at most, between two events of a sitting */
#define SPAN_MS        5e9   /* two months: who does more returns sooner */
#define ARRIVAL_MS     1e9   /* users first come within this */
#define ITEMS_MIN      1000  /* items to choose from: at least, else */
#define ITEMS_SHARE    10    /* events / this */
#define ACTIONS        10    /* half stars 1 to 10 */

/* Pareto with minimum 1: x = u^(-1/alpha), cut off at `cap`. */
static double pareto(uint64_t *random, double alpha, double cap)
{
    double x = pow(1.0 - replay_random_unit(random), -1.0 / alpha);
    return x < cap ? x : cap;
}

/* How many events each user has: at least one, Pareto shares of the rest, what rounding leaves goes
 * one by one to the first users. */
static void share_events(const struct replay_generate *options, uint64_t *random, double *weights,
                         uint64_t *counts)
{
    double sum = 0;
    for (uint64_t i = 0; i < options->users; i++)
        sum += weights[i] = pareto(random, ACTIVITY_ALPHA, ACTIVITY_CAP);
    uint64_t spare = options->events - options->users, given = 0;
    for (uint64_t i = 0; i < options->users; i++) {
        uint64_t share = (uint64_t)((double)spare * (weights[i] / sum));
        if (share > spare - given)
            share = spare - given;
        counts[i] = 1 + share;
        given += share;
    }
    for (uint64_t i = 0; given < spare; i = (i + 1) % options->users, given++)
        counts[i]++;
}

/* Log-uniform rank: density 1/rank, which is Zipf's law. */
static uint64_t popular_item(uint64_t *random, uint64_t items)
{
    uint64_t rank = (uint64_t)exp(replay_random_unit(random) * log((double)items + 1)) - 1;
    return 1 + (rank < items ? rank : items - 1);
}

static void generate_user(struct replay_event *events, uint64_t count, uint64_t user,
                          uint64_t items, uint64_t *random)
{
    int64_t now = (int64_t)(replay_random_unit(random) * ARRIVAL_MS);
    double pause_ms = SPAN_MS / PAUSE_MEAN / (1.0 + (double)count / SITTING_EVENTS); /* the least */
    uint64_t taste = replay_random_below(random, ACTIONS); /* a user's usual action */
    for (uint64_t i = 0; i < count; i++) {
        if (i > 0 && replay_random_below(random, SITTING_EVENTS) == 0)
            now += (int64_t)(pareto(random, PAUSE_ALPHA, PAUSE_CAP) * pause_ms);
        now += 1000 + (int64_t)replay_random_below(random, EVENT_MS);
        uint64_t action =
            replay_random_below(random, 2) ? taste : replay_random_below(random, ACTIONS);
        events[i] = (struct replay_event){.user = user,
                                          .item = popular_item(random, items),
                                          .time_ms = now,
                                          .action = (uint32_t)action + 1};
    }
}

int replay_log_generate(const struct replay_generate *options, struct replay_log *out)
{
    if (options->users == 0 || options->events < options->users || options->events > UINT32_MAX)
        return SKV_EINVAL;
    struct replay_log log = {.format = "generated", .count = options->events};
    log.events = calloc(options->events, sizeof *log.events);
    double *weights = calloc(options->users, sizeof *weights);
    uint64_t *counts = calloc(options->users, sizeof *counts);
    int rc = log.events && weights && counts ? 0 : SKV_ENOMEM;
    if (rc == 0) {
        uint64_t random = options->seed, items = options->events / ITEMS_SHARE, next = 0;
        if (items < ITEMS_MIN)
            items = ITEMS_MIN;
        share_events(options, &random, weights, counts);
        for (uint64_t i = 0; i < options->users; next += counts[i++])
            generate_user(log.events + next, counts[i], i + 1, items, &random);
        for (uint64_t i = 0; i < log.count; i++)
            log.events[i].order = (uint32_t)i;
        rc = replay_log_finish(&log);
    }
    free(weights);
    free(counts);
    if (rc)
        replay_log_close(&log);
    else
        *out = log;
    return rc;
}
