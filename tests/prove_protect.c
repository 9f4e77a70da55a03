/* Promise 4: with sidekvd --protect a worker's stray writes reach only pages that it filled.
 *
 * A real daemon, a pool that is too small, and workers of their own users each. Now and then a
 * worker goes wild: it stores to random places of random pages, through every address range it has.
 * Each store faults, or damages what the worker filled itself; after it the worker forgets its
 * users and starts again. All the others compare every byte of every cached token, whatever the
 * daemon has evicted, cleared, onboarded and handed on meanwhile; some workers are killed while
 * wild. */
#include <poll.h>
#include <setjmp.h>
#include <sys/mman.h>

#include "daemon_rig.h"
#include "prove.h"

#define WORKERS   4u
#define USERS     24u   /* of each */
#define MOST      1024u /* tokens of a history: all of all are three times the pool */
#define MORE      128u  /* tokens that a request adds, at most */
#define S         32u
#define STORES    20000u /* of one going wild */
#define CALM      150u   /* batches between two of them, on average */
#define TOKEN     128u   /* bytes of a row: one token of a head, K or V of a layer */
#define ROWS      8u
#define TIMEOUT_S 300u

static const struct skv_geometry geometry = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = S};

static struct shared { /* with the workers */
    uint64_t to_do;    /* stores, counted down */
    uint64_t stores, faults, hits;
    uint64_t reached;  /* stores through the read-only mapping that did not fault */
    uint64_t compared; /* tokens */
    uint64_t wrong;    /* of these, with another's bytes */
    uint64_t trouble;  /* calls that failed */
} * shared;

static struct rig rig;

/* ---- one worker ---- */

static uint32_t me;
static uint64_t state; /* of its random numbers */
static struct skv *skv;
static uint32_t length[USERS];
static uint64_t tokens[USERS][MOST];

static uint32_t draw(uint32_t below)
{
    state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)((state >> 33) % below);
}

static void add(uint64_t *counter, uint64_t by)
{
    __atomic_add_fetch(counter, by, __ATOMIC_RELAXED);
}

static struct skv_id id_of(uint32_t u)
{
    return skv_user_integer(1 + me * USERS + u);
}

/* A token's place in a page, row by row. */
static uint64_t *row_of(void *base, uint32_t page, uint32_t token, uint32_t row)
{
    uint8_t *at = (uint8_t *)base + page * skv_page_bytes(&geometry);
    return (uint64_t *)(void *)(at + (row * S + token % S) * TOKEN);
}

static uint64_t word_of(uint32_t u, uint32_t token, uint32_t row)
{
    return tokens[u][token] * 31 + token * ROWS + row;
}

static void compare(uint32_t u, const struct skv_grant *grant)
{
    void *base = skv_pool_base(skv);
    uint64_t wrong = 0;
    for (uint32_t t = 0; t < grant->cached; t++) {
        bool right = true;
        for (uint32_t row = 0; row < ROWS; row++)
            for (uint32_t i = 0; i < TOKEN / 8; i++)
                right = right && row_of(base, grant->pages[t / S], t, row)[i] == word_of(u, t, row);
        wrong += !right;
    }
    add(&shared->compared, grant->cached);
    add(&shared->wrong, wrong);
}

static void compute(uint32_t u, const struct skv_grant *grant)
{
    void *base = skv_pool_append_base(skv);
    for (uint32_t t = grant->cached; t < length[u]; t++)
        for (uint32_t row = 0; row < ROWS; row++)
            for (uint32_t i = 0; i < TOKEN / 8; i++)
                row_of(base, grant->pages[t / S], t, row)[i] = word_of(u, t, row);
}

static void forget(uint32_t u)
{
    int status = skv_forget(skv, (struct skv_id){0}, id_of(u));
    add(&shared->trouble, status != 0 && status != SKV_ENOENT);
    length[u] = 0;
}

static void serve(uint32_t u)
{
    if (length[u] + MORE > MOST)
        forget(u);
    for (uint32_t more = 1 + draw(MORE); more; more--)
        tokens[u][length[u]++] = state + more;
    struct skv_request request = {
        .user = id_of(u), .tokens = tokens[u], .history = length[u], .max_cached = UINT32_MAX};
    struct skv_batch batch;
    if (skv_acquire(skv, 0, &request, 1, &batch)) {
        add(&shared->trouble, 1);
        return;
    }
    uint32_t *gate = skv_gate_row(skv, 0);
    for (uint32_t layer = 0; layer < geometry.layers; layer++)
        while (!__atomic_load_n(&gate[layer], __ATOMIC_ACQUIRE))
            poll(NULL, 0, 1);
    if (skv_batch_status(skv, &batch)) {
        add(&shared->trouble, skv_release(skv, &batch) != 0);
        return;
    }
    compare(u, &batch.grants[0]);
    if (batch.grants[0].flags & SKV_GRANT_APPEND)
        compute(u, &batch.grants[0]);
    add(&shared->trouble, skv_commit(skv, &batch, NULL) != 0);
}

/* ---- going wild ---- */

static sigjmp_buf after;

static void on_fault(int signal)
{
    (void)signal;
    siglongjmp(after, 1);
}

/* Stores garbage; false: it faulted. */
static bool stray(void *base, uint64_t offset, uint64_t garbage)
{
    if (sigsetjmp(after, 0))
        return false;
    *(volatile uint64_t *)(void *)((uint8_t *)base + offset) = garbage;
    return true;
}

static void go_wild(void)
{
    uint32_t pages = (uint32_t)skv_pool_pages(skv), words = (uint32_t)skv_page_bytes(&geometry) / 8;
    for (uint32_t i = 0; i < STORES; i++) {
        bool through_view = draw(2);
        void *base = through_view ? skv_pool_append_base(skv) : skv_pool_base(skv);
        uint64_t offset = draw(pages) * skv_page_bytes(&geometry) + draw(words) * sizeof(uint64_t);
        bool hit = stray(base, offset, ~state);
        add(hit ? &shared->hits : &shared->faults, 1);
        add(&shared->reached, hit && !through_view);
    }
    add(&shared->stores, STORES);
    if (__atomic_fetch_sub(&shared->to_do, STORES, __ATOMIC_RELAXED) <= STORES)
        __atomic_store_n(&shared->to_do, 0, __ATOMIC_RELAXED);
}

static bool goes_on(void)
{
    int64_t left = (int64_t)__atomic_load_n(&shared->to_do, __ATOMIC_RELAXED);
    return left > 0 && left < INT64_MAX;
}

static void work(void)
{
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    struct skv_options options = {
        .geometry = geometry, .model = {.lo = 5}, .rows = 1, .timeout_ms = 60000};
    if (rig_connect(&rig, options, &skv)) {
        add(&shared->trouble, 1);
        _exit(1);
    }
    for (uint32_t u = 0; u < USERS; u++)
        forget(u); /* what an earlier one of us may have damaged */
    while (goes_on()) {
        serve(draw(USERS));
        if (draw(CALM))
            continue;
        go_wild();
        if (!draw(4))
            kill(getpid(), SIGKILL);
        for (uint32_t u = 0; u < USERS; u++)
            forget(u);
    }
    for (uint32_t u = 0; u < USERS; u++)
        serve(u);
    skv_close(skv);
    _exit(0);
}

/* ---- all of them ---- */

static pid_t start_worker(uint32_t index, uint64_t seed)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    me = index;
    state = seed * 1000003 + index;
    work();
    return 0;
}

/* Runs them until their stores are done, those that are killed anew. Returns how many were. */
static uint64_t run_workers(uint64_t seed)
{
    pid_t pid[WORKERS];
    uint64_t killed = 0;
    uint32_t running = WORKERS;
    for (uint32_t i = 0; i < WORKERS; i++)
        pid[i] = start_worker(i, seed);
    while (running) {
        int status;
        pid_t ended = wait(&status);
        for (uint32_t i = 0; i < WORKERS; i++) {
            if (pid[i] != ended)
                continue;
            if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
                pid[i] = start_worker(i, seed + ++killed);
            } else {
                shared->trouble += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
                running--;
            }
        }
        if (ended == rig.daemon || ended < 0) {
            fprintf(stderr, "prove_protect: the daemon ended\n");
            exit(1);
        }
    }
    return killed;
}

int main(void)
{
    static const char *const options[] = {"--protect", "--pool-bytes", "32M",
                                          "--tail-ms", "50",           NULL};
    uint64_t seed = prove_seed();
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return 1;
    setenv("SIDEKV_LOG", "error", 0);
    alarm(TIMEOUT_S);
    shared->to_do = prove_times(1000000);
    rig_init(&rig);
    rig_start(&rig, options);
    uint64_t killed = run_workers(seed);
    struct skv_stats stats = {0};
    if (rig_connect(&rig, (struct skv_options){.admin = true}, &skv) || skv_stats(skv, &stats))
        shared->trouble++;
    skv_close(skv);
    rig_stop(&rig, SIGTERM);
    printf("prove_protect: seed %llu, %llu stores: %llu faulted, %llu hit the worker's own; %llu "
           "workers killed, %llu users evicted, %llu tokens onboarded, %llu appends refused\n",
           (unsigned long long)seed, (unsigned long long)shared->stores,
           (unsigned long long)shared->faults, (unsigned long long)shared->hits,
           (unsigned long long)killed, (unsigned long long)stats.evicted_users,
           (unsigned long long)stats.hit_store_tokens, (unsigned long long)stats.append_refused);
    prove_line(4, "stray writes to random pages: faulted, or hit what the worker filled",
               shared->hits && shared->faults ? shared->stores : 0,
               shared->reached + shared->wrong + shared->trouble);
    prove_line(4, "tokens compared meanwhile by the other workers, byte for byte", shared->compared,
               shared->wrong);
    rig_fini(&rig);
    return prove_end();
}
