/* The cache core against the simulated world of cache_workers.h: random operations, in worlds of a
 * thousand each, until a grant, a commit, a page or an invariant is not as it must be. A failing
 * world is then shrunk to a short trace.
 *
 * usage: stress_cache [OPERATIONS [SEED]]     200,000 and 1 when left out */
#include "cache_restarts.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define OPS_A_WORLD 1000u

enum kind {
    OPEN,
    ACQUIRE,
    STEP,
    END,
    FINISH, /* steps, then the end */
    EARLY_RELEASE,
    FENCE,
    GONE_NOW,
    ONBOARD_STEP,
    OFFLOAD,
    STORE_ALL,
    COPY,
    WRITE,
    EVENT,
    SETTLE,
    PREFETCH,
    TRUNCATE,
    FORGET,
    EVICT,
    EVICT_STORED,
    FLUSH,
    GROOM,
    TIME,
    DAMAGE,
    STRANGE_LEASE,
    RESTART,
    ARRIVE, /* after a hot restart one more user of the store is heard of */
    VIEWS,
    KINDS
};

static const char *const names[KINDS] = {
    "open",   "acquire",  "step",     "end",           "finish",  "release early", "fence",
    "gone",   "onboard",  "offload",  "store all",     "copy",    "write",         "event",
    "settle", "prefetch", "truncate", "forget",        "evict",   "evict stored",  "flush",
    "groom",  "time",     "damage",   "strange lease", "restart", "arrive",        "views"};

/* How often each is drawn, in a world of average taste. */
static const uint32_t weights[KINDS] = {
    [OPEN] = 30,         [ACQUIRE] = 60, [STEP] = 90,    [END] = 30,           [FINISH] = 40,
    [EARLY_RELEASE] = 6, [FENCE] = 3,    [GONE_NOW] = 8, [ONBOARD_STEP] = 110, [OFFLOAD] = 25,
    [STORE_ALL] = 4,     [COPY] = 25,    [WRITE] = 25,   [EVENT] = 60,         [SETTLE] = 6,
    [PREFETCH] = 5,      [TRUNCATE] = 3, [FORGET] = 1,   [EVICT] = 25,         [EVICT_STORED] = 1,
    [FLUSH] = 3,         [GROOM] = 4,    [TIME] = 6,     [DAMAGE] = 1,         [STRANGE_LEASE] = 3,
    [RESTART] = 4,       [ARRIVE] = 40,  [VIEWS] = 25};

struct op {
    enum kind kind;
    uint32_t seed; /* of all its choices */
};

static uint64_t random_state;
static uint32_t draw(uint32_t below) /* of an operation's own numbers */
{
    random_state += UINT64_C(0x9e3779b97f4a7c15);
    return (uint32_t)((mix64(random_state) >> 32) % below);
}

static bool chance(uint32_t percent)
{
    return draw(100) < percent;
}

static uint64_t next_token = 1;
static struct { /* of this world, percent */
    uint32_t grows, edits, shorter;
    uint32_t users; /* that are asked for, of the first model */
    uint32_t lags;  /* the writer: of what it might do, it leaves that for later */
    uint32_t cold;  /* of restarts */
    uint32_t starves;
} habits;

/* ---- the operations ---- */

static void grow(struct sim_user *user)
{
    if (user->length > WORLD_TOKENS - 40) /* its older half goes: a history anew */
        user->length = 0;
    for (uint32_t more = 1 + draw(40); more; more--)
        user->tokens[user->length++] = next_token++;
}

static void make_request(struct sim_session *session, struct view *view)
{
    bool second = skv_id_equal(session->model, world.users[WORLD_USERS - 1].model);
    view->user = second ? WORLD_USERS - 1 : draw(habits.users);
    struct sim_user *user = &world.users[view->user];
    if (!user->length || chance(habits.grows))
        grow(user);
    if (chance(habits.edits)) /* edited for good */
        user->tokens[draw(user->length)] = next_token++;
    memcpy(view->tokens, user->tokens, sizeof view->tokens);
    view->history = user->length;
    if (chance(habits.shorter))
        view->history = draw(user->length + 1);
    if (chance(habits.edits)) /* another's idea of the history */
        view->tokens[draw(WORLD_TOKENS)] = next_token++;
    view->max_cached = chance(90) ? UINT32_MAX : draw(WORLD_TOKENS);
    view->flags = (chance(10) ? WIRE_READ : 0) | (chance(4) ? WIRE_NO_ONBOARD : 0);
    view->tail_hash = 0;
}

static struct sim_row *any_row(struct sim_session *session, uint32_t *r)
{
    *r = draw(ROWS);
    return &session->rows[*r];
}

static void do_acquire(uint32_t s, uint32_t r)
{
    struct sim_row *row = &sessions[s].rows[r];
    if (row->phase != IDLE && !(row->phase == WAITING && chance(5)))
        return;
    for (uint32_t i = 0; row->again && i < row->count; i++) {
        struct view *view = &row->views[i];
        if (view->proven)
            continue;
        view->flags |= WIRE_TAIL_DIFFERS;
        view->tail_hash = view->grant.tail_hash;
        view->max_cached = view->grant.cached - view->grant.cached % S;
    }
    if (!row->again && row->phase == IDLE) {
        row->count = 1 + draw(BATCH);
        for (uint32_t i = 0; i < row->count; i++)
            make_request(&sessions[s], &row->views[i]);
    }
    if (world.trace)
        fprintf(stderr, "    session %u row %u\n", s, r);
    bool free_row = acquire_begin(s, r, chance(95));
    CHECK(free_row || row->phase == WAITING);
    CHECK(!free_row || row->phase == LOOKING);
    if (free_row && (!row->known_count || chance(50)))
        acquire_end(s, r);
}

static void do_prefetch(uint32_t s)
{
    uint32_t r;
    struct sim_row *row = any_row(&sessions[s], &r);
    uint32_t running = 0;
    for (uint32_t i = 0; i < WORLD_JOBS; i++)
        running += world.onboards[i].job != NULL;
    if (row->phase != IDLE || row->again || running > WORLD_JOBS - 2 * SESSIONS)
        return;
    row->count = 1 + draw(BATCH);
    for (uint32_t i = 0; i < row->count; i++)
        make_request(&sessions[s], &row->views[i]);
    if (!acquire_begin(s, r, true))
        return;
    skv_cache_acquire(world.cache, sessions[s].slot, r, row->count, row->known, row->known_count,
                      false, grants, page_list);
    take_actions();
    sync_users(true);
    row->phase = IDLE;
}

static void do_step(uint32_t s)
{
    uint32_t r;
    struct sim_row *row = any_row(&sessions[s], &r);
    if (row->phase == LOOKING && sessions[s].state == LIVE)
        acquire_end(s, r);
    else
        run_step(&sessions[s], row, 1 + draw(40));
}

static void do_end(uint32_t s, bool early)
{
    uint32_t r;
    struct sim_row *row = any_row(&sessions[s], &r);
    if (early ? row->phase != GRANTED : row->phase != DONE)
        return;
    bool bad = row->again || row->gates[WORLD_LAYERS];
    row_end(s, r, !early && !bad && chance(90), chance(85) ? ~0u : draw(1 << BATCH));
}

static void do_manage(enum kind kind)
{
    uint32_t user = draw(WORLD_USERS), record = record_of(user), kept = 0;
    if (record == SKV_NONE || (world.early && kind != EVICT))
        return;
    struct skv_user_info info = info_of(user);
    uint64_t change = 0;
    if (kind == EVICT) {
        int status = skv_cache_evict(world.cache, record);
        take_actions();
        CHECK(status == 0 || status == SKV_EAGAIN || status == SKV_EBUSY);
        CHECK(status || info_of(user).resident == 0);
        sync_users(false);
        return;
    }
    uint32_t tokens = kind == FORGET ? 0 : draw(WORLD_TOKENS);
    int status = skv_cache_truncate(world.cache, record, tokens, NULL, &kept, &change);
    if (status == SKV_EAGAIN) {
        struct skv_known known = {0};
        uint64_t hashes[WORLD_PAGES];
        CHECK(kind != FORGET);
        if (!look_up(user, &known, hashes))
            return;
        status = skv_cache_truncate(world.cache, record, tokens, &known, &kept, &change);
    }
    CHECK(status == 0);
    CHECK(kept <= tokens || kept == info.committed);
    take_actions();
    CHECK(info_of(user).committed == kept);
    if (kind == FORGET && change) {
        world.users[user].forgotten_by = change;
        world.users[user].forgotten_generation = info.generation;
    }
    if (kind == FORGET && !change) /* nothing of it is in the store, nor comes there */
        CHECK(!world.store[user].tokens);
    sync_users(true);
}

static uint64_t flushes[4];
static uint32_t flush_count[4][WORLD_USERS];
static uint64_t flush_generation[4][WORLD_USERS], flush_dropped[4];

static void do_flush(void)
{
    uint32_t slot = draw(4);
    flushes[slot] = skv_cache_flush(world.cache);
    flush_dropped[slot] = world.dropped_tokens;
    for (uint32_t i = 0; i < WORLD_USERS; i++) {
        flush_count[slot][i] = world.users[i].count;
        flush_generation[slot][i] = info_of(i).generation;
    }
}

static void check_flushes(void)
{
    for (uint32_t f = 0; f < 4; f++) {
        if (!flushes[f] || !skv_cache_flushed(world.cache, flushes[f]))
            continue;
        flushes[f] = 0;
        for (uint32_t i = 0; i < WORLD_USERS; i++) {
            struct skv_user_info info = info_of(i);
            if (world.options.store && info.generation == flush_generation[f][i] &&
                world.dropped_tokens == flush_dropped[f])
                CHECK(world.store[i].tokens >= flush_count[f][i]);
        }
    }
}

static void do_strange_lease(uint32_t s)
{
    uint64_t lease = (uint64_t)draw(1u << 31) << 24 | draw(1 << 24);
    struct wire_committed result;
    uint32_t r = draw(ROWS), other = draw(SESSIONS);
    if (chance(50)) /* another session's, or row's, or one that has ended */
        lease = sessions[other].rows[draw(ROWS)].views[draw(BATCH)].grant.lease;
    for (uint32_t i = 0; i < BATCH; i++)
        if (sessions[s].rows[r].views[i].open && sessions[s].rows[r].views[i].grant.lease == lease)
            return;
    skv_cache_end(world.cache, sessions[s].slot, r, &lease, 1, chance(50), &result);
    CHECK(result.status == SKV_ESTALE);
    take_actions();
}

static void do_store(enum kind kind)
{
    static const int32_t errors[] = {SKV_ENOSPC, SKV_EIO};
    if (kind == WRITE) {
        bool fails = chance(6);
        write_step(fails ? errors[draw(2)] : chance(80) ? SKV_ESTALE : 0, draw(3));
    } else if (kind == COPY) {
        for (uint32_t i = 0; i < world.write_count; i++)
            if (offload_copy(i))
                return;
    } else if (kind == EVICT_STORED) {
        if (world.write_count > WORLD_QUEUE / 2 || world.early)
            return;
        skv_cache_evict_stored(world.cache);
        take_actions();
        sync_users(true);
    } else if (kind == DAMAGE) {
        struct stored_page *page = &world.store[draw(WORLD_USERS)].pages[draw(WORLD_PAGES)];
        page->damaged = page->present;
    } else if (world.write_count + world.write_event_count > WORLD_QUEUE / 4) {
        return;
    } else if (kind == STORE_ALL) {
        while (offload_begin(4, true))
            settle_mover();
        sync_users(true);
    } else {
        if (chance(15)) {
            uint64_t generation = skv_cache_generation(world.cache);
            struct skv_offload *job = skv_cache_next_offload(world.cache, 2, false);
            if (job)
                skv_cache_offload_undo(world.cache, job);
            CHECK(generation == skv_cache_generation(world.cache));
        } else {
            offload_begin(1 + draw(4), chance(5));
        }
    }
}

static void do_op(struct op op)
{
    random_state = op.seed;
    uint32_t s = draw(SESSIONS), r;
    if ((op.kind == WRITE || op.kind == SETTLE || op.kind == STORE_ALL) && chance(habits.lags))
        return;
    world.starved = chance(habits.starves);
    bool live = sessions[s].state == LIVE;
    switch (op.kind) {
    case OPEN:
        if (sessions[s].state == CLOSED)
            session_open(s);
        break;
    case ACQUIRE:
        any_row(&sessions[s], &r);
        if (live)
            do_acquire(s, r);
        break;
    case STEP:
        do_step(s);
        break;
    case END:
    case EARLY_RELEASE:
        if (live || chance(10))
            do_end(s, op.kind == EARLY_RELEASE);
        break;
    case FINISH:
        any_row(&sessions[s], &r);
        while (run_step(&sessions[s], &sessions[s].rows[r], WORLD_TOKENS))
            ;
        if (live)
            do_end(s, false);
        break;
    case FENCE:
        if (live)
            fence(s);
        break;
    case GONE_NOW:
        if (sessions[s].state == ZOMBIE || sessions[s].state == GONE)
            session_gone(s);
        break;
    case ONBOARD_STEP:
        for (uint32_t i = 0, at = draw(WORLD_JOBS); i < WORLD_JOBS; i++)
            if (onboard_step(&world.onboards[(at + i) % WORLD_JOBS]))
                break;
        break;
    case EVENT:
        take_event();
        sync_users(true);
        break;
    case SETTLE:
        settle_mover();
        sync_users(true);
        break;
    case PREFETCH:
        if (live)
            do_prefetch(s);
        break;
    case TRUNCATE:
    case FORGET:
    case EVICT:
        do_manage(op.kind);
        break;
    case FLUSH:
        do_flush();
        break;
    case GROOM:
        skv_cache_groom(world.cache);
        break;
    case TIME:
        world.now_ms += draw(400);
        world.clock_s += draw(3);
        skv_cache_time(world.cache, world.now_ms, (uint32_t)world.clock_s);
        break;
    case STRANGE_LEASE:
        if (sessions[s].state == LIVE || sessions[s].state == ZOMBIE)
            do_strange_lease(s);
        break;
    case RESTART:
        if (chance(60)) {
            memset(flushes, 0, sizeof flushes);
            if (chance(habits.cold))
                restart();
            else if (world.options.store && world.options.max_records > WORLD_USERS && chance(50))
                hot_restart_begin(chance(50));
            else
                hot_restart(chance(50));
        }
        break;
    case ARRIVE:
        if (world.early)
            hot_restart_step();
        break;
    case VIEWS:
        if (live)
            look_at_views(s);
        break;
    default:
        do_store(op.kind);
    }
}

/* ---- worlds and traces ---- */

/* Small pools make everything collide. */
static void open_world(uint64_t seed)
{
    random_state = mix64(seed);
    habits.grows = 10 + draw(70);
    habits.edits = draw(3) ? draw(5) : 15;
    habits.shorter = draw(30);
    habits.users = 1 + draw(WORLD_USERS - 1);
    habits.lags = chance(50) ? 0 : 20 + draw(80);
    habits.cold = chance(30) ? 50 : 5;
    habits.starves = chance(70) ? 0 : 10 + draw(90);
    memset(flushes, 0, sizeof flushes);
    next_token = 1;
    world_open((struct skv_cache_options){.pages = 6 + draw(chance(50) ? WORLD_POOL - 6 : 10),
                                          .extent_pages = chance(50) ? 0 : 1 + draw(9),
                                          .sessions = SESSIONS,
                                          .max_records = chance(80) ? 64 : 4,
                                          .lease_ms = 300,
                                          .tail_ms = 500,
                                          .store = chance(90)});
    workers_open();
}

static void run(uint64_t seed, const struct op *ops, uint32_t count, bool trace)
{
    open_world(seed);
    world.trace = trace;
    for (uint32_t i = 0; i < count; i++) {
        if (trace)
            fprintf(stderr, "  %s %u\n", names[ops[i].kind], ops[i].seed);
        do_op(ops[i]);
        check_flushes();
        if (trace || i % 4 == 0) {
            skv_cache_check(world.cache);
            check_views();
            check_table();
        }
    }
    check_quiet();
    world_cache_close();
}

static void make_ops(uint64_t seed, struct op *ops)
{
    static const uint32_t factors[] = {0, 1, 1, 1, 2, 6};
    uint32_t total = 0, weight[KINDS];
    random_state = mix64(~seed);
    for (uint32_t kind = 0; kind < KINDS; kind++) { /* each world has its own mix */
        uint32_t factor = factors[draw(6)];
        if (!factor && (kind == OPEN || kind == ACQUIRE || kind == FINISH))
            factor = 1; /* without them hardly anything happens */
        total += weight[kind] = weights[kind] * factor;
    }
    for (uint32_t i = 0; i < OPS_A_WORLD; i++) {
        uint32_t at = draw(total), kind = 0;
        while (at >= weight[kind])
            at -= weight[kind++];
        ops[i] = (struct op){.kind = i < SESSIONS ? OPEN : kind, .seed = draw(1u << 31)};
    }
}

/* Where this trace fails: a line of the tests, 0 for an assert of the core, -1: it does not. In a
 * child, that says nothing unless asked. */
static int fails(uint64_t seed, const struct op *ops, uint32_t count, bool trace)
{
    fflush(NULL);
    *failed_line = 0;
    pid_t child = fork();
    if (child == 0) {
        if (!trace && !freopen("/dev/null", "w", stderr))
            _exit(0);
        alarm(20);
        run(seed, ops, count, trace);
        _exit(0);
    }
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return status ? *failed_line : -1;
}

/* Leaves out whatever can be left out, and shows the rest. */
static void shrink(uint64_t seed)
{
    struct op ops[OPS_A_WORLD], fewer[OPS_A_WORLD];
    uint32_t count = OPS_A_WORLD;
    make_ops(seed, ops);
    int line = fails(seed, ops, count, false);
    if (line < 0) {
        fprintf(stderr, "it does not fail again by itself\n");
        return;
    }
    for (uint32_t chunk = count / 2; chunk; chunk /= 2)
        for (uint32_t from = 0; from < count;) {
            uint32_t n = chunk < count - from ? chunk : count - from;
            memcpy(fewer, ops, from * sizeof *ops);
            memcpy(fewer + from, ops + from + n, (count - from - n) * sizeof *ops);
            if (fails(seed, fewer, count - n, false) == line) {
                count -= n;
                memcpy(ops, fewer, count * sizeof *ops);
            } else {
                from += n;
            }
        }
    fprintf(stderr, "the shortest trace of seed %llu, %u operations:\n", (unsigned long long)seed,
            count);
    fails(seed, ops, count, true);
}

static int run_random(uint64_t total, uint64_t seed)
{
    uint64_t *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    failed_line = (int *)(at + 1);
    printf("stress_cache: %llu operations, seed %llu\n", (unsigned long long)total,
           (unsigned long long)seed);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct op ops[OPS_A_WORLD];
        for (uint64_t done = 0; done < total; done += OPS_A_WORLD) {
            *at = seed + done / OPS_A_WORLD;
            make_ops(*at, ops);
            run(*at, ops, OPS_A_WORLD, false);
        }
        _exit(0);
    }
    int status;
    if (child > 0 && waitpid(child, &status, 0) == child && status == 0) {
        printf("stress_cache: ok\n");
        return 0;
    }
    fprintf(stderr, "stress_cache: seed %llu fails (status %#x); shrinking\n",
            (unsigned long long)*at, (unsigned)status);
    shrink(*at);
    return 1;
}

int main(int argc, char **argv)
{
    uint64_t total = argc > 1 ? strtoull(argv[1], NULL, 10) : 200000;
    return run_random(total, argc > 2 ? strtoull(argv[2], NULL, 10) : 1);
}
