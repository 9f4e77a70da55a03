/* Rings and arenas: two clients of a real session each do anything to the memory that they share
 * with the daemon, while a second thread changes it under the daemon's eyes. The input is a script:
 * entries, requests, hashes and leases as the library would write them, or bytes anywhere. Its
 * first byte says who the clients are and how busy the second thread is (a quarter of the inputs do
 * without, so that they can be had again exactly). */
#include "fuzz_daemon.h"

#include <pthread.h>

#define CLIENTS 2u
#define USERS   8u
#define ROWS    2u

static struct raw clients[CLIENTS];

/* ---- the second thread ---- */

static struct {
    pthread_mutex_t lock; /* held while it writes, and while there is nothing to write to */
    pthread_cond_t there;
    uint8_t *memory[CLIENTS];
    uint64_t seed;
    uint32_t busy; /* 0 to 3 */
} flips = {.lock = PTHREAD_MUTEX_INITIALIZER, .there = PTHREAD_COND_INITIALIZER};

static uint64_t next_random(void)
{
    flips.seed ^= flips.seed << 13;
    flips.seed ^= flips.seed >> 7;
    return flips.seed ^= flips.seed << 17;
}

/* One byte that the daemon is likely to look at: mostly of entries and of what they point to, now
 * and then of the ring's indices. */
static void flip(uint8_t *memory)
{
    uint64_t r = next_random();
    uint32_t where = (uint32_t)(r >> 8) & 1023;
    uint8_t *slot = memory + WIRE_SLOTS_OFFSET + (r >> 40) % ROWS * sizeof(struct wire_slot);
    switch (r & 15) {
    case 0:
        memory[where % sizeof(struct wire_ring)] = (uint8_t)(r >> 32);
        break;
    case 1 ... 5:
        memory[WIRE_SQ_OFFSET + where] ^= (uint8_t)(r >> 32);
        break;
    case 6 ... 9:
        slot[offsetof(struct wire_slot, requests) + where % 512] ^= (uint8_t)(1u << (r >> 61));
        break;
    case 10 ... 12:
        slot[offsetof(struct wire_slot, leases) + where % 64] ^= (uint8_t)(r >> 32);
        break;
    default:
        slot[offsetof(struct wire_slot, hashes) + where % 256] ^= (uint8_t)(r >> 32);
    }
}

static void *flip_always(void *nothing)
{
    for (;;) {
        pthread_mutex_lock(&flips.lock);
        while (!flips.memory[0])
            pthread_cond_wait(&flips.there, &flips.lock);
        for (uint32_t i = 0; i < 8; i++)
            flip(flips.memory[i % CLIENTS]);
        uint32_t pause = 4096u >> 3 * flips.busy;
        pthread_mutex_unlock(&flips.lock);
        for (uint32_t i = 0; i < pause; i++)
            skv_relax();
    }
    return nothing;
}

/* Lets the thread at the workers' memory; none of them: keeps it away. */
static void let_flip(uint32_t workers, uint32_t busy)
{
    pthread_mutex_lock(&flips.lock);
    for (uint32_t i = 0; i < CLIENTS; i++)
        flips.memory[i] = workers ? clients[workers > i ? i : 0].memory : NULL;
    flips.busy = busy;
    pthread_cond_signal(&flips.there);
    pthread_mutex_unlock(&flips.lock);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    pthread_t thread;
    (void)argc, (void)argv;
    fuzz_start(true);
    flips.seed = 88172645463325252u;
    FUZZ_MUST(pthread_create(&thread, NULL, flip_always, NULL) == 0);
    pthread_detach(thread);
    return 0;
}

/* ---- memory that runs out ---- */

static uint32_t fail_at; /* the how-manyth request that the daemon wants to keep; 0: none */

void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size)
{
    bool kept = size == sizeof(struct request) || size == sizeof(struct skv_lookup_job);
    return kept && fail_at && --fail_at == 0 ? NULL : __real_calloc(count, size);
}

/* ---- what a client does ---- */

/* Publishes an entry, without waiting for room. */
static void submit(struct raw *raw, const struct wire_sqe *sqe)
{
    raw->sqes[raw->sq_tail & (WIRE_ENTRIES - 1)] = *sqe;
    __atomic_store_n(&raw->ring->sq_tail, ++raw->sq_tail, __ATOMIC_RELEASE);
}

static struct skv_id user_of(uint8_t number)
{
    return skv_user_integer(1 + number % USERS);
}

static void entry(struct fuzz_input *in, struct raw *raw)
{
    struct wire_sqe sqe = {.opcode = fuzz_u8(in) % (WIRE_OPCODES + 1)};
    uint8_t how = fuzz_u8(in);
    sqe.row = how & 1;
    sqe.count = fuzz_u8(in) % (SKV_MAX_BATCH + 2);
    if (how & 2)
        sqe.user = user_of(fuzz_u8(in));
    if (how & 4)
        sqe.argument = fuzz_u32(in);
    if (how & 8)
        sqe.model.lo = 77 + (how >> 7);
    submit(raw, &sqe);
}

/* Requests as the library writes them: users with histories of one of two kinds, which share a
 * beginning, and now and then a field that is not right. Then the ACQUIRE. */
static void acquire(struct fuzz_input *in, struct raw *raw)
{
    static uint64_t tokens[SKV_MAX_TOKENS];
    uint8_t how = fuzz_u8(in);
    uint32_t row = how & 1, count = 1 + (how >> 1 & 3), hashes = 0;
    struct wire_slot *slot = &raw->slots[row];
    for (uint32_t i = 0; i < count; i++) {
        uint8_t kind = fuzz_u8(in);
        struct wire_request r = {.user = user_of(kind),
                                 .history = fuzz_u8(in) * 3u,
                                 .max_cached = UINT32_MAX,
                                 .hash_offset = hashes};
        uint64_t differs = kind & 8 ? fuzz_u8(in) : UINT64_MAX; /* from this token on */
        for (uint32_t t = 0; t < r.history; t++)
            tokens[t] = (kind % USERS) << 16 | t | (t >= differs ? UINT64_C(1) << 32 : 0);
        if (kind & 16)
            r.flags = fuzz_u8(in) & WIRE_REQUEST_FLAGS;
        if (kind & 32)
            r.max_cached = fuzz_u8(in);
        if (kind & 64) { /* the tail of the last grant differs */
            r.tail_hash = slot->grants[i].tail_hash;
            r.max_cached =
                slot->grants[i].cached / fuzz_geometry.page_tokens * fuzz_geometry.page_tokens;
            r.flags |= WIRE_TAIL_DIFFERS;
        }
        if (kind & 128) {
            uint8_t where = fuzz_u8(in) % sizeof r;
            ((uint8_t *)&r)[where] = fuzz_u8(in);
        }
        hashes +=
            skv_chain_hashes((struct skv_id){.lo = 77}, user_of(kind), fuzz_geometry.page_tokens,
                             tokens, r.history <= 765 ? r.history : 0, 0, slot->hashes + hashes);
        slot->requests[i] = r;
    }
    submit(raw, &(struct wire_sqe){.opcode = how & 8 ? WIRE_PREFETCH : WIRE_ACQUIRE,
                                   .row = (uint16_t)row,
                                   .count = count});
}

/* The end of the batch whose grants lie in a row, or of others. */
static void end_batch(struct fuzz_input *in, struct raw *raw)
{
    uint8_t how = fuzz_u8(in);
    uint32_t row = how & 1, count = 1 + (how >> 1 & 3);
    struct wire_slot *slot = &raw->slots[row];
    for (uint32_t i = 0; i < count; i++)
        slot->leases[i] = slot->grants[i].lease;
    if (how & 8)
        slot->leases[0] ^= UINT64_C(1) << fuzz_u8(in) % 64;
    submit(raw, &(struct wire_sqe){.opcode = how & 16 ? WIRE_RELEASE : WIRE_COMMIT,
                                   .row = (uint16_t)row,
                                   .count = count});
}

/* Bytes anywhere; or an index that jumps, a hole in the memory, a bell rung dry or too often. */
static void poke(struct fuzz_input *in, struct raw *raw)
{
    uint32_t where = fuzz_u32(in);
    int bell;
    uint64_t rings = fuzz_u8(in) % 3 ? 1 : UINT64_MAX - 1;
    switch (where >> 29) {
    case 0:
        fallocate(raw->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(where % raw->welcome.session_bytes & ~4095u), 4096);
        break;
    case 1:
        raw->ring->sq_tail = raw->sq_tail += where & 127;
        break;
    case 2:
        raw->ring->cq_head = raw->cq_head += where & 255;
        break;
    case 3:
        bell = where & 1 ? raw->sq_fd : raw->cq_fd;
        fcntl(bell, F_SETFL, O_NONBLOCK);
        if (where & 2 && write(bell, &rings, sizeof rings) < 0)
            break;     /* full: never mind */
        if (where & 4) /* dry */
            rings = read(bell, &rings, sizeof rings) > 0;
        fcntl(bell, F_SETFL, where & 8 ? O_NONBLOCK : 0);
        raw->ring->cq_flags = WIRE_NEED_WAKEUP;
        break;
    default:
        where %= WIRE_SLOTS_OFFSET + sizeof(struct wire_slot) - 64;
        fuzz_take(in, raw->memory + where, fuzz_u8(in) % 64);
    }
}

static void take_completions(struct raw *raw)
{
    struct wire_cqe cqe;
    for (uint32_t i = 0; i < WIRE_CQ_ENTRIES && fuzz_completion(raw, &cqe); i++)
        ;
}

static void hang_up(struct raw *raw)
{
    if (raw->socket >= 0)
        close(raw->socket);
    raw->socket = -1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {.at = data, .end = data + size};
    uint8_t who = fuzz_u8(&in);
    fuzz_begin();
    for (uint32_t i = 0; i < CLIENTS; i++)
        fuzz_open(&clients[i], i == 1 && who & 4 ? 0 : ROWS);
    if (who & 3)
        let_flip(who & 4 ? 1 : CLIENTS, who & 3);
    while (fuzz_more(&in)) {
        uint8_t step = fuzz_u8(&in);
        struct raw *raw = &clients[step >> 7];
        bool admin = who & 4 && raw == &clients[1];
        switch (step & 15) {
        case 0 ... 3:
            if (!admin)
                acquire(&in, raw);
            break;
        case 4 ... 6:
            if (!admin)
                end_batch(&in, raw);
            break;
        case 7:
        case 8:
            entry(&in, raw);
            break;
        case 9:
            fuzz_take(&in, &raw->sqes[raw->sq_tail & (WIRE_ENTRIES - 1)], sizeof *raw->sqes);
            raw->ring->sq_tail = ++raw->sq_tail;
            break;
        case 10:
            if (!admin)
                poke(&in, raw);
            break;
        case 11:
            hang_up(raw);
            break;
        case 12: /* time for the mover, too */
            usleep(200);
            fuzz_daemon.kept_ns = 0;
            break;
        case 13:
            fail_at = 1 + (step >> 4 & 3);
            break;
        default:
            take_completions(raw);
        }
        if (step & 64)
            fuzz_turn();
    }
    fuzz_turn();
    fail_at = 0;
    let_flip(0, 0);
    for (uint32_t i = 0; i < CLIENTS; i++) {
        hang_up(&clients[i]);
        raw_close(&clients[i]);
    }
    fuzz_settle();
    return 0;
}
