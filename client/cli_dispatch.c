/* The order of things. Every user has one next request. A heap holds the users whose next request
 * may start, by its time; whoever is being served is not in it, so a user's requests never overlap
 * and never change places, whichever workers serve them. An idle worker gets some of the oldest few
 * at random. When a worker dies, the requests that it had go back into the heap.
 *
 *   worker:  STARTING --ready--> IDLE --job--> BUSY --done--> IDLE
 *            any --end of its socket--> started again, or GONE when the run is over */
#include "cli_dispatch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli_child.h"
#include "cli_report.h"
#include "clock.h"
#include "log.h"

#define DEATHS_IN_A_ROW 5      /* unasked-for, without an answer in between: give up */
#define FINISH_MS       60000u /* a worker that is told to finish */
#define TICK_MS         100    /* looks for signals and shows progress at least this often */

enum slot_state { GONE, STARTING, IDLE, BUSY };

struct slot {
    pid_t pid;
    int socket;
    enum slot_state state;
    bool killed; /* by us */
    struct work_job job;
};

struct dispatcher {
    const struct replay_run *run;
    const struct replay_plan *plan;
    struct replay_result *result;
    int memory;     /* the workers' header, tokens and items */
    uint64_t *heap; /* [heap_count] users whose next request may start, earliest first */
    uint64_t heap_count;
    uint64_t *answered; /* [user_count] of a user's requests */
    uint64_t random;
    uint64_t kill_at_ns; /* when the next worker dies; 0: not decided */
    uint64_t next_kill;  /* requests answered before that */
    uint32_t deaths_in_a_row;
    bool hopeless, over;
    struct slot slots[REPLAY_WORKERS_MAX];
};

/* ---- users by their next request ---- */

static const struct replay_request *next_request(const struct dispatcher *d, uint64_t user)
{
    return &d->plan->requests[d->plan->users[user].first + d->answered[user]];
}

static bool before(const struct dispatcher *d, uint64_t i, uint64_t j)
{
    return replay_before(next_request(d, d->heap[i]), next_request(d, d->heap[j]));
}

static void swap(uint64_t *a, uint64_t *b)
{
    uint64_t was = *a;
    *a = *b;
    *b = was;
}

static void push_user(struct dispatcher *d, uint64_t user)
{
    uint64_t i = d->heap_count++;
    d->heap[i] = user;
    for (; i > 0 && before(d, i, (i - 1) / 2); i = (i - 1) / 2)
        swap(&d->heap[i], &d->heap[(i - 1) / 2]);
}

static uint64_t pop_user(struct dispatcher *d)
{
    uint64_t first = d->heap[0];
    d->heap[0] = d->heap[--d->heap_count];
    for (uint64_t i = 0, least;; i = least) {
        least = i;
        for (uint64_t child = 2 * i + 1; child <= 2 * i + 2 && child < d->heap_count; child++)
            if (before(d, child, least))
                least = child;
        if (least == i)
            return first;
        swap(&d->heap[i], &d->heap[least]);
    }
}

/* ---- what workers map ---- */

static int write_memory(struct dispatcher *d)
{
    const struct replay_log *log = d->run->log;
    struct work_header header = d->run->header;
    header.token_count = 2 * log->count;
    header.item_count = log->item_count;
    uint64_t bytes = sizeof header + (header.token_count + header.item_count) * sizeof(uint64_t);
    d->memory = memfd_create("sidekv-replay", MFD_CLOEXEC);
    if (d->memory < 0 || ftruncate(d->memory, (off_t)bytes) != 0)
        goto fail;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, d->memory, 0);
    if (memory == MAP_FAILED)
        goto fail;
    memcpy(memory, &header, sizeof header);
    uint64_t *tokens = (uint64_t *)(memory + sizeof header);
    for (uint64_t i = 0; i < log->count; i++) {
        *tokens++ = replay_item_token(log->events[i].item);
        *tokens++ = replay_action_token(log->events[i].action);
    }
    memcpy(tokens, log->items, log->item_count * sizeof *tokens);
    munmap(memory, bytes);
    return 0;
fail:
    skv_error("memory for the log: %s", strerror(errno));
    return SKV_ENOMEM;
}

/* ---- workers ---- */

/* In the child. The two fds may be each other's targets: move them out of the way first. */
static void exec_worker(int socket, int memory)
{
    int far_socket = fcntl(socket, F_DUPFD_CLOEXEC, 16),
        far_memory = fcntl(memory, F_DUPFD_CLOEXEC, 16);
    if (dup2(far_socket, WORK_SOCKET_FD) >= 0 && dup2(far_memory, WORK_MEMORY_FD) >= 0)
        /* Not by path: the file may have been replaced meanwhile, by an update. */
        execv("/proc/self/exe", (char *[]){"sidekv", "replay", WORK_ARGUMENT, NULL});
    skv_error("a worker: %s", strerror(errno));
    _exit(127);
}

static int start_worker(struct dispatcher *d, struct slot *slot)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
        skv_error("socketpair: %s", strerror(errno));
        return SKV_EIO;
    }
    pid_t pid = replay_fork(SIGKILL);
    if (pid == 0)
        exec_worker(ends[1], d->memory);
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return SKV_EIO;
    }
    slot->pid = pid;
    slot->socket = ends[0];
    slot->state = STARTING;
    slot->killed = false;
    slot->job.count = 0;
    return 0;
}

/* The socket has ended. Its requests go back, and unless the run is over it is started again. */
static void worker_ended(struct dispatcher *d, struct slot *slot)
{
    int status = 0;
    kill(slot->pid, SIGKILL); /* it has nothing more to say, whatever it still does */
    replay_wait(slot->pid, 0, &status);
    close(slot->socket);
    slot->socket = -1;
    bool starting = slot->state == STARTING;
    slot->state = GONE;
    for (uint32_t i = 0; i < slot->job.count; i++)
        push_user(d, d->plan->requests[slot->job.items[i].request].user);
    slot->job.count = 0;
    if (d->over)
        return;
    if (!slot->killed) {
        skv_warn("worker %d ended: %s", (int)slot->pid, replay_end_text(status));
        d->deaths_in_a_row++;
        if ((starting && WIFEXITED(status)) || d->deaths_in_a_row >= DEATHS_IN_A_ROW) {
            skv_error(starting ? "a worker did not start" : "workers keep dying");
            d->hopeless = true;
            return;
        }
    }
    d->result->restarts++;
    if (start_worker(d, slot) != 0)
        d->hopeless = true;
}

/* ---- jobs out ---- */

/* A stable coin for a request: the same ones are verified in every run of a seed. */
static bool to_verify(const struct dispatcher *d, uint64_t request)
{
    uint64_t random = d->run->header.seed + request * UINT64_C(0xd1342543de82ef95);
    return replay_random_unit(&random) < d->run->verify;
}

static struct work_item item_of(const struct dispatcher *d, uint64_t user)
{
    const struct replay_request *request = next_request(d, user);
    struct work_item item = {.request = (uint64_t)(request - d->plan->requests),
                             .user = d->run->log->users[user].id,
                             .first_token = 2 * request->first,
                             .history = replay_history_tokens(request)};
    if (to_verify(d, item.request)) {
        item.flags |= WORK_VERIFY;
        if (d->run->flip && !d->result->flipped && request->reusable > 0)
            item.flags |= WORK_FLIP;
    }
    return item;
}

static struct slot *idle_slot(struct dispatcher *d)
{
    struct slot *idle[REPLAY_WORKERS_MAX];
    uint32_t count = 0;
    for (uint32_t i = 0; i < d->run->workers; i++)
        if (d->slots[i].state == IDLE)
            idle[count++] = &d->slots[i];
    return count ? idle[replay_random_below(&d->random, count)] : NULL;
}

/* Of the oldest batch + workers users that wait, up to `batch` at random. */
static void hand_out(struct dispatcher *d)
{
    uint64_t oldest[SKV_MAX_BATCH + REPLAY_WORKERS_MAX];
    for (struct slot *slot; d->heap_count > 0 && (slot = idle_slot(d)) != NULL;) {
        uint32_t count = 0, batch = d->result->batch;
        while (count < batch + d->run->workers && d->heap_count > 0)
            oldest[count++] = pop_user(d);
        slot->job.count = batch < count ? batch : count;
        for (uint32_t i = 0; i < slot->job.count; i++) {
            swap(&oldest[i], &oldest[i + replay_random_below(&d->random, count - i)]);
            slot->job.items[i] = item_of(d, oldest[i]);
        }
        for (uint32_t i = slot->job.count; i < count; i++)
            push_user(d, oldest[i]);
        slot->state = BUSY;
        size_t bytes = offsetof(struct work_job, items) + slot->job.count * sizeof *slot->job.items;
        if (send(slot->socket, &slot->job, bytes, MSG_NOSIGNAL) != (ssize_t)bytes)
            skv_debug("worker %d takes no job: %s", (int)slot->pid, strerror(errno));
        /* Then it is dying: the end of its socket follows. */
    }
}

/* ---- answers in ---- */

static void take_done(struct dispatcher *d, struct slot *slot, const struct work_done *done)
{
    for (uint32_t i = 0; i < done->count; i++) {
        const struct replay_request *request = &d->plan->requests[done->results[i].request];
        uint64_t user = request->user;
        replay_result_add(d->result, request, d->run->log->users[user].id, &done->results[i]);
        d->answered[user]++;
        if (d->answered[user] < d->plan->users[user].count)
            push_user(d, user);
    }
    replay_result_add_job(d->result, done);
    d->deaths_in_a_row = 0;
    slot->job.count = 0;
    slot->state = IDLE;
}

/* Everything that the worker has said, and its end if that is here. */
static void listen_to(struct dispatcher *d, struct slot *slot)
{
    static union {
        uint32_t kind;
        struct work_ready ready;
        struct work_done done;
        struct work_bye bye;
    } message;
    while (slot->socket >= 0) {
        ssize_t got = recv(slot->socket, &message, sizeof message, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (got <= 0) {
            worker_ended(d, slot);
            return;
        }
        if (message.kind == WORK_READY) {
            d->result->batch = message.ready.batch;
            d->result->cuda = message.ready.cuda != 0;
            memcpy(d->result->device, message.ready.device, sizeof d->result->device);
            slot->state = IDLE;
        } else if (message.kind == WORK_DONE) {
            take_done(d, slot, &message.done);
        } else if (message.kind == WORK_BYE) {
            replay_result_add_footprint(d->result, &message.bye);
        }
    }
}

static void wait_for_workers(struct dispatcher *d, int timeout_ms)
{
    struct pollfd fds[REPLAY_WORKERS_MAX];
    for (uint32_t i = 0; i < d->run->workers; i++)
        fds[i] = (struct pollfd){.fd = d->slots[i].socket, .events = POLLIN};
    if (poll(fds, d->run->workers, timeout_ms) <= 0)
        return;
    for (uint32_t i = 0; i < d->run->workers; i++)
        if (fds[i].revents)
            listen_to(d, &d->slots[i]);
}

/* ---- murder ---- */

/* When it is time, a busy worker dies, at a moment within an average request. Returns how long to
 * wait at most. */
static int kill_one(struct dispatcher *d)
{
    uint64_t every = d->run->kill_every, now = skv_now_ns();
    if (every == 0 || d->result->requests < d->next_kill)
        return TICK_MS;
    if (d->kill_at_ns == 0) {
        uint64_t mean = d->result->latency.total_ns / d->result->latency.count;
        d->kill_at_ns = now + replay_random_below(&d->random, mean + 1);
    }
    if (now < d->kill_at_ns) {
        uint64_t left_ms = (d->kill_at_ns - now) / 1000000;
        return left_ms < TICK_MS ? (int)left_ms : TICK_MS;
    }
    struct slot *busy[REPLAY_WORKERS_MAX];
    uint32_t count = 0;
    for (uint32_t i = 0; i < d->run->workers; i++)
        if (d->slots[i].state == BUSY)
            busy[count++] = &d->slots[i];
    if (count > 0) {
        struct slot *slot = busy[replay_random_below(&d->random, count)];
        slot->killed = true;
        kill(slot->pid, SIGKILL);
        d->kill_at_ns = 0;
        d->next_kill = d->result->requests + every;
    }
    return TICK_MS;
}

/* ---- a run ---- */

static int open_dispatcher(struct dispatcher *d)
{
    for (uint32_t i = 0; i < d->run->workers; i++)
        d->slots[i].socket = -1;
    d->heap = calloc(d->plan->user_count, sizeof *d->heap);
    d->answered = calloc(d->plan->user_count, sizeof *d->answered);
    if (!d->heap || !d->answered)
        return SKV_ENOMEM;
    for (uint64_t user = 0; user < d->plan->user_count; user++)
        if (d->plan->users[user].count > 0)
            push_user(d, user);
    int rc = write_memory(d);
    for (uint32_t i = 0; rc == 0 && i < d->run->workers; i++)
        rc = start_worker(d, &d->slots[i]);
    return rc;
}

static void close_dispatcher(struct dispatcher *d)
{
    d->over = true;
    uint64_t end = skv_now_ns() + FINISH_MS * UINT64_C(1000000);
    bool in_order = d->result->requests == d->plan->count;
    for (uint32_t i = 0; i < d->run->workers; i++)
        if (d->slots[i].socket >= 0 && (!in_order || shutdown(d->slots[i].socket, SHUT_WR) != 0))
            kill(d->slots[i].pid, SIGKILL);
    for (uint32_t i = 0; i < d->run->workers; i++) {
        while (d->slots[i].socket >= 0 && skv_now_ns() < end)
            wait_for_workers(d, TICK_MS);
        if (d->slots[i].socket >= 0)
            worker_ended(d, &d->slots[i]);
    }
    if (d->memory >= 0)
        close(d->memory);
    free(d->heap);
    free(d->answered);
}

int replay_dispatch(const struct replay_run *run, struct replay_result *out)
{
    *out = (struct replay_result){0};
    struct dispatcher *d = calloc(1, sizeof *d);
    if (!d)
        return SKV_ENOMEM;
    d->run = run;
    d->plan = run->plan;
    d->result = out;
    d->memory = -1;
    d->random = run->header.seed;
    d->next_kill = run->kill_every;

    int rc = open_dispatcher(d);
    uint64_t start = 0;
    while (rc == 0 && out->requests < d->plan->count) {
        hand_out(d);
        if (start == 0 && out->batch > 0)
            start = skv_now_ns(); /* the first worker is ready */
        wait_for_workers(d, kill_one(d));
        replay_progress(run, out);
        if (d->hopeless)
            rc = SKV_EIO;
        else if (replay_interrupted())
            rc = SKV_EAGAIN;
    }
    out->wall_ns = start ? skv_now_ns() - start : 0;
    replay_progress_end();
    close_dispatcher(d);
    free(d);
    replay_result_finish(out);
    return rc;
}
