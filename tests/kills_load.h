/* The load under which prove_kills kills: workers whose every row of K and V is known from user,
 * token and edition (kills_ledger.h). Each is the prover's program, started anew with the board's
 * fd: a GPU's context does not cross a fork. */
#ifndef SKV_KILLS_LOAD_H
#define SKV_KILLS_LOAD_H

#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>

#include "clock.h"
#include "daemon_rig.h"
#include "kills_ledger.h"
#include "page_bytes.h"

static struct page_bytes bytes; /* of this process' session */

/* ---- rows: [layer][K|V][head] of 128 bytes each, all one word ---- */

static uint64_t word_of(uint32_t user, uint32_t token, uint64_t editions)
{
    uint64_t edition = editions >> (token / S * 8) & 0xff;
    return token_of(user, token) ^ (user + 1) * UINT64_C(0xd6e8feb86659fd93) ^ edition << 40;
}

static void write_rows(const struct skv_grant *grant, uint32_t user, uint32_t history,
                       uint64_t editions)
{
    for (uint32_t token = grant->cached; token < history; token++)
        for (uint32_t row = 0; row < 8; row++) {
            uint64_t *at = page_bytes_row(&bytes, grant->pages, token, row, true);
            for (uint32_t i = 0; i < 16; i++)
                at[i] = word_of(user, token, editions) + row;
        }
    int status = page_bytes_store(&bytes, grant->pages, grant->cached, history);
    if (status)
        wrong("user %u: writing tokens %u to %u: %s", user, grant->cached, history,
              skv_strerror(status));
}

static void check_rows(const struct skv_grant *grant, uint32_t user, uint64_t editions)
{
    int status = page_bytes_fetch(&bytes, grant->pages, grant->cached);
    if (status)
        wrong("user %u: reading %u tokens: %s", user, grant->cached, skv_strerror(status));
    for (uint32_t token = 0; !status && token < grant->cached; token++)
        for (uint32_t row = 0; row < 8; row++) {
            const uint64_t *at = page_bytes_row(&bytes, grant->pages, token, row, false);
            for (uint32_t i = 0; i < 16; i++) {
                uint64_t expected = word_of(user, token, editions) + row;
                if (at[i] == expected)
                    continue;
                wrong("user %u, token %u of %u cached (page %u): %016llx in row %u, not %016llx",
                      user, token, grant->cached, grant->pages[token / S],
                      (unsigned long long)at[i], row, (unsigned long long)expected);
                return;
            }
        }
    __atomic_add_fetch(&board->tokens, status ? 0 : grant->cached, __ATOMIC_RELAXED);
}

/* Waits for a gated batch's gates. Its status. */
static int pass(struct skv *skv, const struct skv_batch *batch)
{
    uint32_t *gates = skv_gate_row(skv, batch->row);
    for (uint32_t layer = 0; batch->gated && layer < geometry.layers; layer++)
        if (skv_gate_wait(&gates[layer], WAIT_MS))
            wrong("gate %u never opened", layer);
    __atomic_add_fetch(&board->gated, batch->gated, __ATOMIC_RELAXED);
    return skv_batch_status(skv, batch);
}

/* Asks for the cut that is noted. 0, or what the library said: then it stays noted. */
static int ask_cut(struct skv *skv, uint32_t u)
{
    struct user *user = &board->users[u];
    uint32_t keep = user->cutting - 1;
    int status = keep ? skv_truncate(skv, model, skv_user_integer(u), keep * S)
                      : skv_forget(skv, model, skv_user_integer(u));
    if (status && status != SKV_ENOENT)
        return status;
    struct skv_user_info info;
    if (!skv_lookup(skv, model, skv_user_integer(u), &info) && info.committed > keep * S)
        wrong("user %u was cut to %u tokens, and has %u", u, keep * S, info.committed);
    end_cut(user);
    __atomic_add_fetch(&board->cuts, 1, __ATOMIC_RELAXED);
    return 0;
}

/* ---- a worker ---- */

struct part { /* of a batch */
    uint32_t user;
    bool locked;
    uint32_t history;
    uint64_t stored, editions; /* as read before the ACQUIRE */
};

static uint64_t random_state;

static uint32_t chance(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 33) % n;
}

static void nap(uint32_t us)
{
    nanosleep(&(struct timespec){.tv_nsec = us * 1000l}, NULL);
}

static uint32_t choose(struct skv *skv, uint32_t me, struct part *parts)
{
    uint32_t count = 0, wanted = 1 + chance(BATCH), robbed = load32(&board->robbed);
    for (uint32_t i = 0; i < wanted; i++) {
        uint32_t u = !i && robbed && chance(2) ? robbed - 1 : chance(USERS);
        struct user *user = &board->users[u];
        bool twice = false;
        for (uint32_t other = 0; other < count; other++)
            twice = twice || parts[other].user == u;
        if (twice)
            continue;
        struct part part = {.user = u, .locked = try_lock(u, me)};
        if (part.locked && !settled(user)) {
            if (!load32(&user->cutting))
                begin_cut(user, 0); /* it was killed before it had noted all of a cut, or after */
            if (ask_cut(skv, u)) {
                unlock(u);
                break;
            }
        }
        uint32_t known = tokens_of(load64(&user->least)), most = load32(&user->most);
        part.history = part.locked ? known + 1 + chance(24) : 1 + chance(most ? most : 1);
        if (part.history > MOST)
            part.history = MOST;
        part.stored = load64(&user->stored);
        part.editions = load64(&user->editions);
        parts[count++] = part;
    }
    return count;
}

static void check_part(const struct part *part, const struct skv_grant *grant)
{
    const struct user *user = &board->users[part->user];
    uint32_t cuts = high(part->stored), most = load32(&user->most);
    bool same = !(cuts & 1) && high(load64(&user->stored)) == cuts;
    if (grant->status || !same)
        return; /* what was read of the ledger may not be what the daemon did */
    if (grant->cached > most)
        wrong("user %u has %u tokens cached, of which at most %u were ever committed", part->user,
              grant->cached, most);
    else
        check_rows(grant, part->user, part->editions);
}

/* What a user, whose lock is held, has once its daemon's store is there: before, not all is known
 * of it. false: that daemon is gone. */
static bool know_all(struct skv *skv, uint32_t user, uint32_t *committed)
{
    struct skv_stats stats;
    struct skv_user_info info = {0};
    int status;
    while ((status = skv_stats(skv, &stats)) == 0 && stats.store_awaited)
        nap(500);
    if (!status)
        status = skv_lookup(skv, model, skv_user_integer(user), &info);
    *committed = info.committed;
    return status == 0 || status == SKV_ENOENT;
}

static void note(struct skv *skv, const struct part *part, const struct skv_grant *grant,
                 const struct skv_committed *result, uint32_t life, uint64_t before)
{
    struct user *user = &board->users[part->user];
    uint64_t least = load64(&user->least);
    bool appends = grant->flags & SKV_GRANT_APPEND;
    if (result->status) {
        __atomic_add_fetch(&board->stale, 1, __ATOMIC_RELAXED);
        return;
    }
    __atomic_add_fetch(appends ? &board->appends : &board->reads, 1, __ATOMIC_RELAXED);
    if (appends && result->committed < part->history)
        wrong("user %u: COMMIT of %u tokens says %u", part->user, part->history, result->committed);
    if (high(least) != life)
        return; /* answered by a daemon whose pool is gone */
    uint32_t committed = result->committed;
    if (!may_have(user, committed) &&
        (!know_all(skv, part->user, &committed) || load32(&board->life) != life))
        return;
    if (!may_have(user, committed))
        wrong("user %u: COMMIT says %u tokens, %u were committed, %u stored; %s", part->user,
              result->committed, tokens_of(least), tokens_of(load64(&user->stored)), state_of(skv));
    __atomic_store_n(&user->drops, before, __ATOMIC_SEQ_CST);
    grow(&user->least, life, result->committed);
    grow(&user->stored, high(part->stored), result->stored);
}

/* One request: what is cached is compared, the rest appended. */
static void serve(struct skv *skv, uint32_t me)
{
    struct slot *slot = &board->workers[me];
    struct part parts[BATCH];
    struct skv_request requests[BATCH];
    struct skv_batch batch;
    struct skv_committed results[BATCH];
    uint32_t life = load32(&board->life), count = choose(skv, me, parts);
    uint64_t before = drops();
    for (uint32_t i = 0; i < count; i++)
        requests[i] = (struct skv_request){.user = skv_user_integer(parts[i].user),
                                           .tokens = tokens_of_user(parts[i].user),
                                           .history = parts[i].history,
                                           .max_cached = UINT32_MAX,
                                           .flags = parts[i].locked ? 0 : SKV_REQUEST_READ};
    int status = count ? skv_acquire(skv, chance(2), requests, count, &batch) : SKV_EAGAIN;
    if (!status && (status = pass(skv, &batch))) {
        __atomic_add_fetch(&board->loads_failed, status == SKV_ELOAD, __ATOMIC_RELAXED);
        skv_release(skv, &batch);
    }
    for (uint32_t i = 0; !status && i < count; i++) {
        check_part(&parts[i], &batch.grants[i]);
        struct user *user = &board->users[parts[i].user];
        if (parts[i].locked && batch.grants[i].flags & SKV_GRANT_APPEND &&
            user->most < parts[i].history)
            __atomic_store_n(&user->most, parts[i].history, __ATOMIC_SEQ_CST);
    }
    __atomic_store_n(&slot->phase, status ? NOTING : OPEN, __ATOMIC_SEQ_CST);
    bool early =
        chance(2); /* stopped now, it writes to pages that may be others' when it goes on */
    if (!status && early && !chance(2))
        nap(chance(3000));
    for (uint32_t i = 0; !status && i < count; i++)
        if (batch.grants[i].flags & SKV_GRANT_APPEND)
            write_rows(&batch.grants[i], parts[i].user, parts[i].history, parts[i].editions);
    bool open = !status;
    if (open && !early && !chance(2))
        nap(chance(3000));
    if (open && chance(10))
        status = skv_commit(skv, &batch, results);
    else if (open)
        status = skv_release(skv, &batch) ? SKV_ELOST : SKV_EAGAIN;
    if (!open || exchange32(&slot->phase, OPEN, NOTING)) {
        for (uint32_t i = 0; i < count; i++) {
            if (!parts[i].locked)
                continue;
            if (!status)
                note(skv, &parts[i], &batch.grants[i], &results[i], life, before);
            unlock(parts[i].user);
        }
        __atomic_add_fetch(&board->batches, !status, __ATOMIC_RELAXED);
        __atomic_add_fetch(&slot->served, !status, __ATOMIC_SEQ_CST);
    }
    __atomic_store_n(&slot->phase, IDLE, __ATOMIC_SEQ_CST);
}

/* What was committed before it is stored: of users that were not dropped before it. */
static void flush(struct skv *skv)
{
    static uint64_t stored[USERS], least[USERS], dropped[USERS];
    uint32_t life = load32(&board->life);
    for (uint32_t u = 0; u < USERS; u++) {
        stored[u] = load64(&board->users[u].stored);
        dropped[u] = load64(&board->users[u].drops); /* before `least`: which falls first */
        least[u] = load64(&board->users[u].least);
    }
    if (skv_flush(skv) || load32(&board->life) != life)
        return;
    for (uint32_t u = 0; u < USERS; u++)
        if (!(high(stored[u]) & 1) && high(least[u]) == life && dropped[u] == drops())
            grow(&board->users[u].stored, high(stored[u]), tokens_of(least[u]));
    __atomic_add_fetch(&board->flushes, 1, __ATOMIC_RELAXED);
}

static void manage(struct skv *skv, uint32_t me)
{
    uint32_t u = chance(USERS), what = chance(30);
    struct user *user = &board->users[u];
    if (what == 0) {
        flush(skv);
    } else if (what < 4) {
        int status = skv_evict(skv, model, skv_user_integer(u));
        __atomic_add_fetch(&board->evictions, !status, __ATOMIC_RELAXED);
    } else if (what < 7) {
        skv_prefetch(skv, &(struct skv_request){.user = skv_user_integer(u),
                                                .tokens = tokens_of_user(u),
                                                .history = MOST,
                                                .max_cached = UINT32_MAX});
    } else if (try_lock(u, me)) {
        /* Never to more than is there: that would be no cut, and a stopped worker may yet commit.
         */
        uint32_t known = tokens_of(load64(&user->least)), pages = known ? (known - 1) / S : 0;
        if (settled(user) && (known + 24 > MOST || !chance(4)))
            begin_cut(user, chance(3) || !pages ? 0 : 1 + chance(pages));
        if (load32(&user->cutting))
            ask_cut(skv, u);
        unlock(u);
    }
}

/* A session, and the way to its pages. */
static int open_worker(const struct rig *rig, uint32_t rows, struct skv **skv)
{
    struct skv_options options = {
        .geometry = geometry, .model = model, .rows = rows, .timeout_ms = WAIT_MS};
    int status = rig_connect(rig, options, skv);
    return status ? status : page_bytes_open(&bytes, *skv, MOST / S);
}

static void work(uint32_t me, uint64_t seed)
{
    struct slot *slot = &board->workers[me];
    struct rig rig = {0};
    struct skv *skv;
    random_state = seed;
    memcpy(rig.socket, board->socket, sizeof rig.socket);
    int status = open_worker(&rig, 2, &skv);
    while (!status) {
        if (skv_lost(skv) && !load32(&board->away))
            status = skv_reconnect(skv, WAIT_MS);
        if (load32(&board->pause)) {
            __atomic_store_n(&slot->parked, !skv_lost(skv) || load32(&board->away),
                             __ATOMIC_SEQ_CST);
            nap(200);
            continue;
        }
        __atomic_store_n(&slot->parked, 0, __ATOMIC_SEQ_CST);
        if (status || skv_lost(skv))
            continue;
        if (chance(8))
            serve(skv, me);
        else
            manage(skv, me);
    }
    wrong("a worker cannot connect: %s", skv_strerror(status));
    _exit(1);
}

/* ---- its process ---- */

/* The plan of a file that is there. Every process that finds FAILPOINTS_FILE obeys it. */
static struct failpoint_plan *map_plan(const char *path)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    void *at =
        fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        abort();
    close(fd);
    return at;
}

static struct board *map_board(int fd)
{
    void *at = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        abort();
    return at;
}

/* Nothing of the prover's, its driver's files least of all, is open in what it starts. */
static void shut_files(void)
{
    close_range(3, ~0u, CLOSE_RANGE_CLOEXEC);
}

#define WORKER_ARGUMENT "--worker" /* board's fd, slot, seed */

/* In a child of the prover: becomes a worker. */
static void exec_worker(int board_fd, uint32_t me, uint64_t seed)
{
    char fd[16], slot[16], number[32];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    shut_files();
    fcntl(board_fd, F_SETFD, 0);
    snprintf(fd, sizeof fd, "%d", board_fd);
    snprintf(slot, sizeof slot, "%u", me);
    snprintf(number, sizeof number, "%llu", (unsigned long long)seed);
    execl("/proc/self/exe", "prove_kills", WORKER_ARGUMENT, fd, slot, number, NULL);
    _exit(127);
}

/* main() of a process that exec_worker() began; does not return. */
static void be_worker(char **arguments)
{
    int fd = atoi(arguments[0]);
    board = map_board(fd);
    close(fd);
    plan = map_plan(getenv(FAILPOINTS_FILE));
    work((uint32_t)atoi(arguments[1]), strtoull(arguments[2], NULL, 10));
}

#endif
