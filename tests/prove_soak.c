/* 64 workers that share their users, each comparing every byte that it is granted, some of them
 * killed all the time; and among equal workers none starves (promise 7).
 *
 * usage: prove_soak [SECONDS]   20 at scale 1; 3600 for a long one */
#include <errno.h>

#include "clock.h"
#include "daemon_watch.h"
#include "prove.h"
#include "raw_client.h"
#include "verifier.h"

#define WORKERS 64u

static const struct skv_id model = {.lo = 5};

/* ---- the soak ---- */

static struct shared {
    bool over;
    uint64_t requests, tokens, gated, failures;
} * shared;

static void tally(const struct verifier *v)
{
    __atomic_add_fetch(&shared->requests, v->requests, __ATOMIC_RELAXED);
    __atomic_add_fetch(&shared->tokens, v->tokens, __ATOMIC_RELAXED);
    __atomic_add_fetch(&shared->gated, v->gated, __ATOMIC_RELAXED);
    __atomic_add_fetch(&shared->failures, v->failures, __ATOMIC_RELAXED);
}

static pid_t start_worker(const struct rig *rig, uint32_t seed)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct verifier v = {.users = VERIFIER_USERS, .seed = seed};
    if (verifier_open(&v, rig, model)) {
        while (!__atomic_load_n(&shared->over, __ATOMIC_RELAXED) && v.failures < 100) {
            for (int i = 0; i < 16; i++)
                verifier_step(&v);
            tally(&v); /* it may be killed any time */
            v.requests = v.tokens = v.gated = v.failures = 0;
        }
        verifier_close(&v);
    }
    tally(&v);
    _exit(0);
}

static uint64_t soak(uint64_t seconds, uint64_t *requests)
{
    const char *const options[] = {"--pool-bytes", "6M", "--tail-ms", "50", NULL};
    struct rig rig;
    pid_t workers[WORKERS];
    uint32_t seed = (uint32_t)prove_seed(), kills = 0, died = 0;
    rig_init(&rig);
    rig_start(&rig, options);
    watch_start(&rig);
    for (uint32_t i = 0; i < WORKERS; i++)
        workers[i] = start_worker(&rig, seed + i);
    for (uint64_t until = skv_now_ns() + seconds * 1000000000; skv_now_ns() < until;) {
        usleep(20000);
        uint32_t victim = (uint32_t)rand_r(&seed) % WORKERS;
        died += waitpid(workers[victim], NULL, WNOHANG) != 0; /* by itself: it has said why */
        kill(workers[victim], SIGKILL);
        waitpid(workers[victim], NULL, 0);
        workers[victim] = start_worker(&rig, seed + WORKERS + kills++);
    }
    __atomic_store_n(&shared->over, true, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < WORKERS; i++)
        waitpid(workers[i], NULL, 0);
    printf("soak: %llu s, %u workers killed, %llu tokens compared, %llu batches gated\n",
           (unsigned long long)seconds, kills, (unsigned long long)shared->tokens,
           (unsigned long long)shared->gated);
    *requests = shared->requests;
    uint64_t failures = shared->failures + died;
    failures += watch_forget(&rig, model) + watch_empty(&rig);
    rig_stop(&rig, SIGTERM);
    rig_fini(&rig);
    return failures;
}

/* ---- fair turns ---- */

static uint32_t answered(const struct raw *raw)
{
    return __atomic_load_n(&raw->ring->cq_tail, __ATOMIC_ACQUIRE);
}

/* 64 workers ask for 64 things each at one moment, one of them for ever more, and hammers its
 * doorbell. Whenever that one has had N answers, each of the others has had N less two turns, or
 * all of its own: no time in it. Returns the failures. */
static uint64_t fair(const struct rig *rig, const struct wire_sqe *asked, uint64_t rounds)
{
    static struct raw raws[WORKERS];
    uint64_t failures = 0, hammered = 0, others = 0;
    for (uint32_t w = 0; w < WORKERS; w++)
        if (!raw_open(&raws[w], rig, &tiny))
            return 1;
    for (uint64_t round = 0; round < rounds; round++) {
        struct raw *hammer = &raws[round % WORKERS];
        uint32_t base[WORKERS], least = 0;
        kill(rig->daemon, SIGSTOP);
        for (uint32_t w = 0; w < WORKERS; w++) {
            base[w] = answered(&raws[w]);
            for (uint32_t i = 0; i < WIRE_ENTRIES; i++)
                raw_publish(&raws[w], asked);
            raw_bell(&raws[w]);
        }
        kill(rig->daemon, SIGCONT);
        for (uint64_t until = skv_now_ns() + UINT64_C(30000000000);
             least < WIRE_ENTRIES && skv_now_ns() < until;) {
            uint32_t had = answered(hammer) - base[hammer - raws]; /* before the others' */
            least = WIRE_ENTRIES;
            for (uint32_t w = 0; w < WORKERS; w++) {
                uint32_t got = answered(&raws[w]) - base[w];
                least = got < least ? got : least;
                failures += got < WIRE_ENTRIES && got + 2 * 16 < had;
            }
            while (hammer->cq_head != answered(hammer)) {
                __atomic_store_n(&hammer->ring->cq_head, ++hammer->cq_head, __ATOMIC_RELEASE);
                raw_publish(hammer, asked);
                raw_bell(hammer);
                hammered++;
            }
        }
        failures += least < WIRE_ENTRIES;
        others += WIRE_ENTRIES;
        while (hammer->cq_head != hammer->sq_tail) { /* its rest */
            struct wire_cqe cqe;
            if (!raw_completion(hammer, &cqe))
                return failures + 1;
        }
        for (uint32_t w = 0; w < WORKERS; w++) {
            raws[w].cq_head = answered(&raws[w]);
            __atomic_store_n(&raws[w].ring->cq_head, raws[w].cq_head, __ATOMIC_RELEASE);
        }
    }
    printf("fair turns: one that hammers had %.2f answers for one of each other\n",
           (double)(hammered + others) / (double)others);
    for (uint32_t w = 0; w < WORKERS; w++)
        raw_close(&raws[w]);
    return failures;
}

static uint64_t fair_turns(uint64_t rounds)
{
    static const struct wire_sqe asked[] = {{.opcode = WIRE_NOP},
                                            {.opcode = WIRE_LIST, .count = 64},
                                            {.opcode = WIRE_STATS},
                                            {.opcode = WIRE_FORGET, .user = {.lo = 1}}};
    uint64_t failures = 0;
    for (int epoll = 0; epoll < 2; epoll++) {
        const char *const options[] = {"--pool-bytes", "8M", epoll ? "--epoll" : NULL, NULL};
        struct rig rig;
        rig_init(&rig);
        rig_start(&rig, options);
        watch_start(&rig);
        for (uint32_t i = 0; i < sizeof asked / sizeof *asked; i++)
            failures += fair(&rig, &asked[i], rounds);
        rig_fini(&rig);
    }
    return failures;
}

int main(int argc, char **argv)
{
    double scaled = 20 * prove_scale();
    uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : scaled < 5 ? 5 : (uint64_t)scaled;
    uint64_t requests = 0, rounds = prove_times(100);
    setenv("SIDEKV_LOG", "error", 0);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t failures = soak(seconds, &requests);
    prove_line(7, "soak: requests of 64 workers, every byte right, some of them killed", requests,
               failures);
    failures = fair_turns(rounds);
    prove_line(7, "rounds of 64 workers, one of them hammering: each has its turns", rounds * 8,
               failures);
    return prove_end();
}
