/* What prove_kills knows: a board in memory that prover and workers share, on which they meet, and
 * on it a ledger of what must be there, kept so that it is right wherever a worker is killed.
 *
 * A worker that may change a user holds the user's lock; whoever kills the worker gives its locks
 * back. Under the lock: `most` is raised before a COMMIT goes out, `least` after its answer; a cut
 * is noted before it is asked for, and asked for again by the next holder until it is answered. So
 * `least` <= committed <= `most` at all times, whatever was in flight. A token's edition grows with
 * each cut of its page: what comes back from before a FORGET has the wrong bytes.
 *
 * Workers without the lock read the same users at the same time, and know by `cuts` whether the
 * editions that they compare with are those of their grant. */
#ifndef SKV_KILLS_LEDGER_H
#define SKV_KILLS_LEDGER_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/types.h>

#include "failpoint_plan.h"
#include "sidekv.h"

#define USERS   160u
#define S       32u
#define MOST    160u /* tokens of a history */
#define WORKERS 4u
#define BATCH   3u
#define WAIT_MS 20000u /* nothing takes longer on any machine */

static const struct skv_geometry geometry = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = S};
static const struct skv_id model = {.lo = 5};

struct user {
    uint32_t lock;     /* worker + 1; 0: nobody's */
    uint32_t cutting;  /* pages to keep + 1: a cut is asked for, not answered */
    uint64_t least;    /* life << 32 | tokens that were acknowledged as committed in that life */
    uint64_t stored;   /* cuts << 32 | tokens that were acknowledged as stored */
    uint64_t editions; /* a byte a page */
    uint64_t next;     /* they, once the cut is answered */
    uint32_t most;     /* committed are no more than these */
    uint64_t drops;    /* as of drops() when `least` was last found true */
};

/* A worker's batch:  idle --granted--> open --ended--> noting (its ledger) --> idle
 *                                        '--stopped, its locks taken away--> robbed --> idle */
enum phase { IDLE, OPEN, NOTING, ROBBED };

struct slot {
    pid_t pid;
    uint32_t phase, parked;
    uint32_t served;    /* batches */
    uint64_t resume_ns; /* the prover's: stopped until then */
};

struct board {
    char socket[96]; /* the daemon's */
    uint64_t seed;
    uint32_t rig;
    uint32_t life;   /* grows when a daemon starts from the store alone */
    uint32_t pause;  /* workers are to park */
    uint32_t away;   /* no daemon is there meanwhile */
    uint32_t robbed; /* user + 1, of a stopped worker's batch: others want it more than the rest */
    uint32_t failures;
    char deed[80]; /* what the prover does now */
    struct slot workers[WORKERS];
    struct user users[USERS];
    uint64_t batches, tokens, gated, reads, appends, cuts, flushes, evictions, stale, loads_failed,
        dropped;
};

static struct board *board;
static struct failpoint_plan *plan;

__attribute__((format(printf, 1, 2))) static void wrong(const char *format, ...)
{
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (__atomic_add_fetch(&board->failures, 1, __ATOMIC_RELAXED) > 4)
        return;
    printf("kills: seed %llu, rig %u, %s: %s\n", (unsigned long long)board->seed, board->rig,
           board->deed, text);
    fflush(stdout);
}

/* ---- the ledger ---- */

static uint32_t high(uint64_t word)
{
    return (uint32_t)(word >> 32);
}

static uint32_t tokens_of(uint64_t word)
{
    return (uint32_t)word;
}

static uint64_t pack(uint32_t upper, uint32_t tokens)
{
    return (uint64_t)upper << 32 | tokens;
}

static uint64_t load64(const uint64_t *at)
{
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}

static uint32_t load32(const uint32_t *at)
{
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}

static bool exchange32(uint32_t *at, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(at, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Raises the tokens of a word whose upper half is still `upper`. */
static void grow(uint64_t *at, uint32_t upper, uint32_t tokens)
{
    uint64_t word = load64(at);
    while (high(word) == upper && tokens_of(word) < tokens &&
           !__atomic_compare_exchange_n(at, &word, pack(upper, tokens), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
        ;
}

/* Users evicted by any daemon that were not stored yet: the pool was too small. Tokens may be lost
 * then; of users found whole since, none are. */
static uint64_t drops(void)
{
    return __atomic_load_n(&plan->reached[FAIL_evict_unstored], __ATOMIC_SEQ_CST);
}

/* Is it right that a user, whose lock is held, has so few tokens? */
static bool may_have(struct user *user, uint32_t committed)
{
    uint64_t least = load64(&user->least);
    if (committed >= tokens_of(least))
        return true;
    if (committed < tokens_of(load64(&user->stored)) || drops() == user->drops)
        return false;
    __atomic_store_n(&user->least, pack(high(least), committed), __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&board->dropped, 1, __ATOMIC_RELAXED);
    return true;
}

/* Of the daemon that serves now, for a failure's message. */
static const char *state_of(struct skv *skv)
{
    static char text[160];
    struct skv_stats s = {0};
    skv_stats(skv, &s);
    snprintf(
        text, sizeof text,
        "daemon up %llu ms, %llu cuts, %llu evicted, %llu tokens dropped, %llu failed onboards, "
        "%llu damaged",
        (unsigned long long)s.uptime_ms, (unsigned long long)s.cuts,
        (unsigned long long)s.evicted_users, (unsigned long long)s.dropped_tokens,
        (unsigned long long)s.onboard_failures, (unsigned long long)s.store_damaged_pages);
    return text;
}

static bool try_lock(uint32_t user, uint32_t me)
{
    return exchange32(&board->users[user].lock, 0, me + 1);
}

static void unlock(uint32_t user)
{
    __atomic_store_n(&board->users[user].lock, 0, __ATOMIC_SEQ_CST);
}

/* Of a worker that is dead, or stopped and robbed. */
static void unlock_all(uint32_t worker)
{
    for (uint32_t u = 0; u < USERS; u++)
        exchange32(&board->users[u].lock, worker + 1, 0);
}

static uint64_t token_of(uint32_t user, uint32_t i)
{
    return (user * 1000 + i + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

static const uint64_t *tokens_of_user(uint32_t user)
{
    static uint64_t all[USERS][MOST];
    if (!all[user][0])
        for (uint32_t i = 0; i < MOST; i++)
            all[user][i] = token_of(user, i);
    return all[user];
}

/* ---- cuts: FORGET, TRUNCATE; under the user's lock ---- */

static void begin_cut(struct user *user, uint32_t keep)
{
    uint64_t next = user->editions, stored = load64(&user->stored), least = load64(&user->least);
    for (uint32_t page = keep; page < MOST / S; page++)
        next = (next & ~(UINT64_C(0xff) << page * 8)) | (((next >> page * 8) + 1) & 0xff)
                                                            << page * 8;
    user->next = next;
    /* Odd first: from here on nobody notes a FLUSH of before. */
    while (!__atomic_compare_exchange_n(
        &user->stored, &stored,
        pack(high(stored) | 1, tokens_of(stored) < keep * S ? tokens_of(stored) : keep * S), false,
        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
    if (tokens_of(least) > keep * S)
        __atomic_store_n(&user->least, pack(high(least), keep * S), __ATOMIC_SEQ_CST);
    __atomic_store_n(&user->cutting, keep + 1, __ATOMIC_SEQ_CST);
}

/* Answered. Each line may be done twice: the worker may be killed between any two. */
static void end_cut(struct user *user)
{
    uint32_t keep = user->cutting - 1;
    user->editions = user->next;
    if (user->most > keep * S)
        user->most = keep * S;
    uint64_t stored = load64(&user->stored);
    __atomic_store_n(&user->cutting, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&user->stored, pack((high(stored) | 1) + 1, tokens_of(stored)),
                     __ATOMIC_SEQ_CST);
}

/* A killed worker may have left `stored` odd with no cut noted, or the other way round. */
static bool settled(const struct user *user)
{
    return !load32(&user->cutting) && !(high(load64(&user->stored)) & 1);
}

#endif
