/* A log of what users did: what replay replays. Read from a CSV file or generated, then the same to
 * everybody: events sorted by user and, stably, by time.
 *
 *   cli_log.c       reads MovieLens ratings.csv and KuaiRand, told apart by their headers
 *   cli_generate.c  makes one up: heavy-tailed histories, popularity and return times
 *   cli_plan.c      cuts it into ranking requests */
#ifndef SKV_CLI_LOG_H
#define SKV_CLI_LOG_H

#include <stdio.h>

#include "sidekv.h"

#define REPLAY_ITEM_LIMIT  (UINT64_C(1) << 60) /* item ids are below; the high bits tell kinds */
#define REPLAY_LINE_BYTES  4096u /* a longer line is broken: 19 columns of 20 digits */
#define REPLAY_COLUMNS     64u   /* of a header */
#define REPLAY_COMPLAINTS  10u   /* broken lines reported one by one */
#define REPLAY_RATING_MAX  10.0  /* MovieLens: 5.0 */
#define REPLAY_TOKEN_ITEMS 1u    /* kinds of tokens, in bits 60 and up */
#define REPLAY_TOKEN_ACTS  2u

/* One event is two tokens: what, then how it was liked. The two spaces are disjoint. */
static inline uint64_t replay_item_token(uint64_t item)
{
    return (uint64_t)REPLAY_TOKEN_ITEMS << 60 | item;
}
static inline uint64_t replay_action_token(uint32_t action)
{
    return (uint64_t)REPLAY_TOKEN_ACTS << 60 | action;
}

struct replay_event {
    uint64_t user;   /* as in the file */
    uint64_t item;   /* < REPLAY_ITEM_LIMIT */
    int64_t time_ms; /* >= 0 */
    uint32_t action; /* MovieLens: half stars; KuaiRand: a bit per feedback column */
    uint32_t order;  /* place in the file: ties of time keep it */
};

struct replay_user {
    uint64_t id;
    uint64_t first; /* of its events */
    uint64_t count;
};

struct replay_log {
    const char *format;          /* "MovieLens", "KuaiRand" or "generated" */
    struct replay_event *events; /* [count], by user, time, order */
    uint64_t count;
    struct replay_user *users; /* [user_count], by id */
    uint64_t user_count;
    uint64_t *items; /* [item_count], each once, ascending: where candidates come from */
    uint64_t item_count;
    uint64_t lines_skipped; /* broken lines */
};

/* Reads a CSV file from `in`; `name` is for messages. Broken lines are skipped and counted, the
 * first REPLAY_COMPLAINTS also reported to `complaints`, with their numbers. Blank lines are
 * nothing. Follow with replay_log_close(). Returns 0, SKV_EINVAL (no header that is known, no good
 * line: said to `complaints`), SKV_EIO, SKV_ENOMEM. */
int replay_log_read(FILE *in, const char *name, FILE *complaints, struct replay_log *out);

struct replay_generate {
    uint64_t seed;
    uint64_t users;  /* >= 1 */
    uint64_t events; /* in all; at least one a user */
};

/* The same options give the same log. SKV_EINVAL, SKV_ENOMEM. */
int replay_log_generate(const struct replay_generate *options, struct replay_log *out);

/* Sorts, finds users and items. For the two above. SKV_ENOMEM; the events stay the log's. */
int replay_log_finish(struct replay_log *log);

void replay_log_close(struct replay_log *log);

/* A small random generator (splitmix64), for everything in replay that is seeded. */
static inline uint64_t replay_random(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/* In [0, limit), limit > 0. */
static inline uint64_t replay_random_below(uint64_t *state, uint64_t limit)
{
    return (uint64_t)((unsigned __int128)replay_random(state) * limit >> 64);
}

/* In [0, 1). */
static inline double replay_random_unit(uint64_t *state)
{
    return (double)(replay_random(state) >> 11) * 0x1p-53;
}

#endif
