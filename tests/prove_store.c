/* Promise 5: a store damaged while the daemon was down, or its pages while it runs, is never a
 * crash and never wrong bytes; a cold start at worst, and counted.
 *
 * Every damage (store_damages.h) is met twice: by a start, which tries all pages of all users,
 * writes some, removes some and stops cleanly; and by the next start, which must find what the
 * first one left. Nine in ten meet the store's calls as sidekvd makes them, in a child process; one
 * in ten a real sidekvd and a client. PROVE_ONLY=N runs damage N alone, and talks. */
#include "store_damages.h"

#include <signal.h>
#include <sys/prctl.h>

#include "daemon_rig.h"
#include "prove.h"

#define DAMAGES_FULL 5200u
#define DAEMON_EVERY 10u
#define LIVE_FULL    10000u /* pages damaged under a running daemon */

static struct rig rig;

/* What a damage came to; the worse wins. */
enum outcome { UNHARMED, SHORTER, COLD, REFUSED, OUTCOMES, FAILED };
static const char *const outcomes[] = {"unharmed", "shorter", "cold", "refused"};

#define EXPECT(condition, ...)                                                                     \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "prove_store: line %d: %s:", __LINE__, #condition);                    \
            fprintf(stderr, " " __VA_ARGS__);                                                      \
            fprintf(stderr, "\n");                                                                 \
            return FAILED;                                                                         \
        }                                                                                          \
    } while (0)

/* The users that every first start writes anew, makes longer and removes. */
static struct user changed(uint32_t user, struct user had)
{
    if (user % 6 == 1)
        return (struct user){.version = had.version + 1000, .tokens = 20 + user};
    if (user % 6 == 3)
        return (struct user){.version = had.version, .tokens = had.tokens + 1 + user % 20};
    if (user % 12 == 5)
        return (struct user){0};
    return had;
}

/* ---- the store's calls ---- */

/* Tokens of this user that would be served, found and checked as the core and the copy thread do;
 * FAILED in *outcome when a byte is wrong. */
static uint32_t served(struct skv_reader *reader, uint32_t user, struct user u,
                       enum outcome *outcome)
{
    static uint64_t tokens[MOST], stored[SKV_MAX_USER_PAGES], hashes[SKV_MAX_USER_PAGES];
    struct skv_id id = skv_user_integer(user);
    struct skv_record record;
    uint32_t count, good = 0;
    if (skv_reader_record(reader, MODEL, id, &record, stored, SKV_MAX_USER_PAGES, &count))
        return 0;
    user_tokens(user, u.version, tokens);
    uint32_t most = record.tokens < u.tokens ? record.tokens : u.tokens;
    if (most < record.tokens)
        most -= most % S; /* of a longer history's page this one is no tail */
    count = skv_chain_hashes(MODEL, id, S, tokens, most, 0, hashes);
    for (uint32_t index = 0; index < count && stored[index] == hashes[index]; index++) {
        struct skv_location at;
        uint32_t valid = most - good < S ? most - good : S;
        if (skv_reader_locate(reader, MODEL, id, index, &at) ||
            skv_page_verify(at.value, PAGE_BYTES, MODEL, id, index, valid, hashes[index],
                            record.generation))
            break;
        for (uint32_t i = 0; i < valid; i++)
            if (!is_token(at.value, tokens, good + i)) {
                fprintf(stderr, "user %u, token %u: wrong bytes\n", user, good + i);
                *outcome = FAILED;
            }
        good += valid;
    }
    return good;
}

static int read_all(struct skv_store *store, const struct user users[USERS], uint32_t got[USERS])
{
    struct skv_reader *reader;
    enum outcome outcome = UNHARMED;
    EXPECT(skv_reader_open(store, &reader) == 0 && skv_reader_begin(reader) == 0);
    for (uint32_t user = 0; user < USERS; user++) {
        got[user] = served(reader, user, users[user], &outcome);
        if (got[user] < users[user].tokens && outcome == UNHARMED)
            outcome = SHORTER;
    }
    skv_reader_close(reader);
    return outcome;
}

static int count_users(void *context, const struct skv_record *record, const void *hashes)
{
    (void)record, (void)hashes;
    ++*(uint32_t *)context;
    return 0;
}

/* Two starts on what lies in the directory. */
static int meet(const char *directory, const struct golden *g)
{
    struct skv_store *store;
    struct user users[USERS];
    uint32_t got[USERS], again[USERS], count = 0;
    uint64_t cold, cold_again, records;
    memcpy(users, g->users, sizeof users);
    if (open_in(directory, &store))
        return REFUSED;
    uint64_t generation = skv_store_generation(store) + 1;
    skv_store_damage(store, &cold, &records);
    EXPECT(skv_store_begin(store) == 0 && skv_store_put_generation(store, generation + 1000) == 0 &&
           skv_store_commit(store) == 0);
    EXPECT(skv_store_scan(store, count_users, &count) == 0);
    int outcome = read_all(store, users, got);
    EXPECT(outcome != FAILED);
    EXPECT(!cold || count == 0, "cold, and yet %u users", count);
    for (uint32_t user = 0; user < USERS; user++) {
        struct user had = users[user];
        users[user] = changed(user, had);
        if (memcmp(&had, &users[user], sizeof had) == 0) {
            users[user].tokens = got[user];
            continue;
        }
        bool longer = users[user].version == had.version && got[user] == had.tokens;
        EXPECT(put_user(store, user, users[user], longer ? had.tokens : 0, generation++) == 0,
               "user %u", user);
    }
    EXPECT(read_all(store, users, again) == UNHARMED, "what was written, and what there was");
    skv_store_close(store);
    EXPECT(open_in(directory, &store) == 0);
    skv_store_damage(store, &cold_again, &records);
    EXPECT(cold_again == cold, "a store that was in use starts cold");
    EXPECT(read_all(store, users, again) == UNHARMED, "after another start");
    skv_store_close(store);
    return cold ? COLD : outcome;
}

/* The same in a child process; a store of another owner is met by somebody else. */
static int meet_in_child(int kind, const char *directory, const struct golden *g)
{
    pid_t child = fork();
    if (child == 0) {
        if (kind == DAMAGE_PERMISSION && setuid(65534))
            _exit(FAILED);
        _exit(meet(directory, g));
    }
    int status;
    EXPECT(child > 0 && waitpid(child, &status, 0) == child);
    EXPECT(WIFEXITED(status), "it died of signal %d", WTERMSIG(status));
    return WEXITSTATUS(status);
}

/* ---- a real daemon ---- */

static void start_daemon(const char *pin_bytes)
{
    const char *const extra[] = {"--layers",
                                 "1",
                                 "--heads",
                                 "1",
                                 "--head-dim",
                                 "64",
                                 "--page-tokens",
                                 "16",
                                 "--pool-bytes",
                                 "16M",
                                 "--staging-bytes",
                                 "4M",
                                 "--tail-ms",
                                 "0",
                                 "--store-bytes",
                                 "64M",
                                 "--pin-bytes",
                                 pin_bytes,
                                 NULL};
    rig_start(&rig, extra);
}

static bool daemon_ended(int *status)
{
    if (waitpid(rig.daemon, status, WNOHANG) != rig.daemon)
        return false;
    rig.daemon = 0;
    return true;
}

/* Stops it; was that in good order? */
static bool stop_daemon(void)
{
    int status = -1;
    kill(rig.daemon, SIGTERM);
    if (waitpid(rig.daemon, &status, 0) != rig.daemon)
        status = -1;
    rig.daemon = 0;
    return status == 0;
}

/* 0; SKV_ELOST: the daemon has ended, *status says how. */
static int connect_to_daemon(struct skv **skv, int *status)
{
    struct skv_options options = {
        .socket = rig.socket, .geometry = geometry, .model = MODEL, .rows = 1, .timeout_ms = 60000};
    for (int i = 0; i < 30000; i++) {
        int rc = skv_open(&options, skv);
        if (rc != SKV_ELOST)
            return rc;
        if (daemon_ended(status))
            return SKV_ELOST;
        usleep(2000);
    }
    return SKV_ETIMEDOUT;
}

/* Serves one request as a worker does: waits for the gates, tries again where a page did not load,
 * checks every cached byte, and appends the rest if that is granted. Returns the tokens that are
 * cached after it, or -1. */
static int request(struct skv *skv, uint32_t user, struct user u, bool append)
{
    static uint64_t tokens[MOST];
    user_tokens(user, u.version, tokens);
    struct skv_request r = {.user = skv_user_integer(user),
                            .tokens = tokens,
                            .history = u.tokens,
                            .max_cached = UINT32_MAX,
                            .flags = append ? 0 : SKV_REQUEST_READ};
    for (int tries = 0; tries < 400; tries++) {
        struct skv_batch batch;
        int rc = skv_acquire(skv, 0, &r, 1, &batch);
        if (rc)
            return fprintf(stderr, "acquire: %s\n", skv_strerror(rc)), -1;
        const uint32_t *gates = skv_gate_row(skv, 0);
        while (batch.gated && !__atomic_load_n(gates, __ATOMIC_ACQUIRE))
            usleep(20);
        if (skv_batch_status(skv, &batch)) {
            skv_release(skv, &batch);
            continue;
        }
        const struct skv_grant *grant = &batch.grants[0];
        uint32_t cached = grant->cached, all = grant->flags & SKV_GRANT_APPEND ? u.tokens : cached;
        uint8_t *base = skv_pool_base(skv), *append_base = skv_pool_append_base(skv);
        for (uint32_t i = 0; i < cached; i++)
            if (!is_token(base + grant->pages[i / S] * (uint64_t)PAGE_BYTES, tokens, i))
                return fprintf(stderr, "user %u, token %u: wrong bytes\n", user, i), -1;
        for (uint32_t i = cached; i < all; i++)
            write_token(append_base + grant->pages[i / S] * (uint64_t)PAGE_BYTES, tokens, i);
        rc = append ? skv_commit(skv, &batch, NULL) : skv_release(skv, &batch);
        return rc ? -1 : (int)all;
    }
    return fprintf(stderr, "user %u: never loads\n", user), -1;
}

static int request_all(struct skv *skv, struct user users[USERS])
{
    int outcome = UNHARMED;
    for (uint32_t user = 0; user < USERS; user++) {
        if (!users[user].tokens)
            continue;
        int got = request(skv, user, users[user], false);
        EXPECT(got >= 0 && got <= (int)users[user].tokens);
        if (got < (int)users[user].tokens)
            outcome = SHORTER;
        users[user].tokens = (uint32_t)got;
    }
    return outcome;
}

static int meet_by_daemon(const struct golden *g)
{
    struct user users[USERS];
    struct skv *skv;
    struct skv_stats stats;
    int ended = 0;
    memcpy(users, g->users, sizeof users);
    start_daemon("16M");
    int rc = connect_to_daemon(&skv, &ended);
    if (rc == SKV_ELOST && WIFEXITED(ended) && WEXITSTATUS(ended) == 1)
        return REFUSED;
    EXPECT(rc == 0, "%s; it ended with %x", skv_strerror(rc), (unsigned)ended);
    EXPECT(skv_stats(skv, &stats) == 0);
    uint64_t cold = stats.store_cold_starts;
    int outcome = request_all(skv, users), appended = 0;
    EXPECT(outcome != FAILED);
    for (uint32_t user = 0; user < USERS; user++) {
        struct user to = changed(user, users[user]);
        if (to.tokens && memcmp(&to, &users[user], sizeof to) != 0) {
            /* No append where the store has a longer user and these few tokens disprove it not. */
            int now = request(skv, user, to, true);
            EXPECT(now >= 0);
            to.tokens = (uint32_t)now;
        } else if (!to.tokens && users[user].tokens) {
            EXPECT(skv_forget(skv, (struct skv_id){0}, skv_user_integer(user)) == 0);
        }
        appended += to.tokens > users[user].tokens;
        users[user] = to;
    }
    EXPECT(appended > 0);
    EXPECT(skv_flush(skv) == 0);
    skv_close(skv);
    EXPECT(stop_daemon());
    start_daemon("16M");
    EXPECT(connect_to_daemon(&skv, &ended) == 0, "after another start: %x", (unsigned)ended);
    EXPECT(request_all(skv, users) == UNHARMED, "after another start");
    EXPECT(skv_stats(skv, &stats) == 0);
    EXPECT(stats.store_cold_starts == cold, "a store that was in use starts cold");
    skv_close(skv);
    EXPECT(stop_daemon());
    return cold ? COLD : outcome;
}

/* ---- pages damaged under a running daemon ---- */

/* Damages users' pages in data.mdb, headers included, while nothing is being written. Returns how
 * many. */
static uint64_t damage_live(uint8_t *map, uint64_t *random, uint64_t count)
{
    uint64_t damaged = 0;
    for (uint64_t tries = 0; damaged < count && tries < 100000; tries++) {
        uint64_t number, page = draw(random, MAP_BYTES / 4096 - 1), at = 16;
        struct skv_trailer trailer;
        uint8_t *extent = map + page * 4096;
        memcpy(&number, extent, 8);
        memcpy(&trailer, extent + 16 + PAGE_BYTES, sizeof trailer);
        if (number != page || extent[10] != 4 || !skv_id_equal(trailer.model, MODEL))
            continue;
        at = draw(random, 8) ? 16 + draw(random, PAGE_BYTES + SKV_TRAILER_BYTES) : draw(random, 16);
        extent[at] ^= (uint8_t)(1u << draw(random, 8));
        damaged++;
    }
    return damaged;
}

static int damage_running(uint64_t pages, uint64_t *random, uint64_t *damaged)
{
    struct user users[USERS];
    struct skv *skv;
    struct skv_stats stats;
    char path[160];
    int ended = 0;
    clear(rig.store);
    start_daemon("1"); /* none registered: each page is verified each time it is read */
    EXPECT(connect_to_daemon(&skv, &ended) == 0);
    store_path(path, sizeof path, rig.store, "data.mdb");
    int fd = open(path, O_RDWR);
    uint8_t *map = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    EXPECT(fd >= 0 && map != MAP_FAILED);
    for (uint32_t user = 0; user < USERS; user++)
        users[user] = (struct user){.version = 1, .tokens = 40 + user};
    while (*damaged < pages) {
        for (uint32_t user = 0; user < USERS; user++) {
            if (draw(random, 4) == 0)
                users[user] = (struct user){(uint32_t)draw(random, 1000), 40 + user};
            EXPECT(request(skv, user, users[user], true) >= 0);
        }
        EXPECT(skv_flush(skv) == 0);
        for (uint32_t user = 0; user < USERS; user++)
            EXPECT(skv_evict(skv, (struct skv_id){0}, skv_user_integer(user)) == 0);
        *damaged += damage_live(map, random, 100);
    }
    EXPECT(request_all(skv, users) != FAILED);
    EXPECT(skv_stats(skv, &stats) == 0);
    EXPECT(stats.store_damaged_pages > 0, "no damage was met");
    EXPECT(stats.store_errors == 0);
    munmap(map, MAP_BYTES);
    close(fd);
    skv_close(skv);
    EXPECT(stop_daemon());
    start_daemon("1");
    EXPECT(connect_to_daemon(&skv, &ended) == 0);
    EXPECT(skv_stats(skv, &stats) == 0 && stats.store_cold_starts == 0, "its trees are whole");
    EXPECT(request_all(skv, users) != FAILED);
    skv_close(skv);
    EXPECT(stop_daemon());
    return UNHARMED;
}

/* ---- all of it ---- */

static struct golden goldens[3]; /* closed, killed, closed: each another history */

/* Damage number n. Its random numbers are its own, so that it can be had again alone. */
static int run(uint64_t n, bool by_daemon, int *kind)
{
    uint64_t random = mix(prove_seed() * 1000003 + n);
    const struct golden *g = &goldens[draw(&random, 3)], *other = &goldens[draw(&random, 3)];
    *kind = (int)(n / (by_daemon ? DAEMON_EVERY : 1) % KINDS);
    if (*kind == DAMAGE_PERMISSION && by_daemon)
        *kind = DAMAGE_STATE_GARBAGE; /* its socket would not be its own either */
    make_damaged(*kind, rig.store, g, other, &random);
    uint64_t before = MAY_REFUSE(*kind) ? digest(rig.store) : 0;
    int outcome = by_daemon ? meet_by_daemon(g) : meet_in_child(*kind, rig.store, g);
    EXPECT(outcome != REFUSED || MAY_REFUSE(*kind), "it did not start");
    EXPECT(outcome != REFUSED || digest(rig.store) == before, "refused, and changed");
    return outcome;
}

int main(void)
{
    static uint64_t tally[2][KINDS][OUTCOMES];
    uint64_t damages = prove_times(DAMAGES_FULL), failures[2] = {0}, times[2] = {0}, damaged = 0;
    uint64_t sums[OUTCOMES] = {0}, random = prove_seed();
    const char *only = getenv("PROVE_ONLY");
    setenv("SIDEKV_LOG", only ? "info" : "error", 0);
    rig_init(&rig);
    if (access("/dev/shm", W_OK) == 0) { /* nothing here needs a disk */
        snprintf(rig.store, sizeof rig.store, "/dev/shm/sidekv-prove.%d", (int)getpid());
    }
    for (int i = 0; i < 3; i++)
        make_golden(rig.store, mix(prove_seed() + (uint64_t)i), i == 1, &goldens[i]);
    for (uint64_t n = only ? strtoull(only, NULL, 0) : 0; n < damages; n++) {
        int kind, by_daemon = n % DAEMON_EVERY == 0;
        int outcome = run(n, by_daemon, &kind);
        times[by_daemon]++;
        if (outcome < OUTCOMES) {
            tally[by_daemon][kind][outcome]++;
            sums[outcome]++;
        } else {
            fprintf(stderr,
                    "prove_store: damage %llu failed: %s; PROVE_SEED=%llu PROVE_ONLY=%llu\n",
                    (unsigned long long)n, damage_name(kind), (unsigned long long)prove_seed(),
                    (unsigned long long)n);
            failures[by_daemon]++;
            rig_stop(&rig, SIGKILL);
        }
        if (only)
            break;
    }
    for (int kind = 0; kind < KINDS && !only; kind++) {
        printf("%-56s", damage_name(kind));
        for (int outcome = 0; outcome < OUTCOMES; outcome++)
            printf(" %s %llu", outcomes[outcome],
                   (unsigned long long)(tally[0][kind][outcome] + tally[1][kind][outcome]));
        printf("\n");
    }
    char text[200];
    snprintf(text, sizeof text,
             "store damages: %llu cold, %llu shorter, %llu unharmed, %llu refused",
             (unsigned long long)sums[COLD], (unsigned long long)sums[SHORTER],
             (unsigned long long)sums[UNHARMED], (unsigned long long)sums[REFUSED]);
    failures[0] += !only && (!sums[COLD] || !sums[SHORTER] || !sums[UNHARMED]);
    prove_line(5, text, times[0], failures[0]);
    prove_line(5, "of these more, met by a real daemon and a client", times[1], failures[1]);
    if (!only) {
        int failed = damage_running(prove_times(LIVE_FULL), &random, &damaged) != UNHARMED;
        prove_line(5, "stored pages damaged under a running daemon", damaged, (uint64_t)failed);
    }
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", rig.store);
    rig_stop(&rig, SIGKILL);
    if (system(command))
        fprintf(stderr, "%s is left\n", rig.store);
    rig_fini(&rig);
    return prove_end();
}
