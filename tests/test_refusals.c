/* What a real sidekvd refuses, and that nobody else notices: each test keeps a good session beside
 * the bad one and uses it at the end. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <dirent.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "raw_client.h"

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static const struct skv_id model = {.lo = 5};
static struct rig rig;
static struct skv *good;
static uint64_t tokens[4096];
static struct skv_batch batch;

static void start(const char *const *options)
{
    rig_start(&rig, options);
    cr_assert_eq(rig_connect(&rig,
                             (struct skv_options){
                                 .geometry = tiny, .model = model, .rows = 1, .timeout_ms = 20000},
                             &good),
                 0);
}

static void set_up(void)
{
    static const char *const options[] = {"--pool-bytes", "8M", "--start-wait", "0", NULL};
    for (uint32_t i = 0; i < 4096; i++)
        tokens[i] = i * 2654435761u;
    rig_init(&rig);
    start(options);
}

static void set_up_epoll(void)
{
    static const char *const options[] = {"--pool-bytes", "8M", "--epoll", NULL};
    rig_init(&rig);
    start(options);
}

static void tear_down(void)
{
    skv_close(good);
    rig_fini(&rig);
}

static int append(uint64_t user, uint32_t history)
{
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = history,
                                  .max_cached = UINT32_MAX};
    int status = skv_acquire(good, 0, &request, 1, &batch);
    return status ? status : skv_commit(good, &batch, NULL);
}

static void expect_undisturbed(void)
{
    struct skv_user_info info;
    cr_assert_eq(append(1, 100), 0);
    cr_assert_eq(skv_lookup(good, (struct skv_id){0}, skv_user_integer(1), &info), 0);
    cr_assert_eq(info.committed, 100);
}

TestSuite(refusals, .init = set_up, .fini = tear_down, .timeout = 180);
TestSuite(refusals_epoll, .init = set_up_epoll, .fini = tear_down, .timeout = 180);

/* ---- handshakes ---- */

struct bad_hello {
    const char *what;
    struct wire_hello hello;
    size_t bytes;
    uint32_t fds;
    uint64_t gate_bytes;
    bool unsealed;
    int status;
    const char *text; /* of the answer, somewhere; NULL: whatever it is */
};

/* Says it, and returns the status of the answer. */
static int say_hello(const struct bad_hello *bad)
{
    char longer[256] = {0};
    int fds[2] = {(int)syscall(SYS_pidfd_open, getpid(), 0),
                  raw_gates(bad->gate_bytes, !bad->unsealed)};
    int socket = raw_connect(&rig);
    struct wire_welcome welcome = {.status = 1};
    memcpy(longer, &bad->hello, sizeof bad->hello);
    raw_send(socket, longer, bad->bytes, fds, bad->fds);
    ssize_t got = raw_receive(socket, &welcome, sizeof welcome, NULL, RAW_PATIENCE_MS);
    cr_expect(got == sizeof welcome && welcome.text[0], "%s: a reason in words", bad->what);
    cr_expect(!bad->text || strstr(welcome.text, bad->text), "%s: %s", bad->what, welcome.text);
    close(fds[0]);
    close(fds[1]);
    close(socket);
    return welcome.status;
}

static void every_bad_hello(void)
{
    const struct bad_hello right = {.hello = raw_hello(&tiny),
                                    .bytes = sizeof(struct wire_hello),
                                    .fds = 2,
                                    .gate_bytes = wire_gate_bytes(2, 1)};
    struct bad_hello bad[20];
    int count = 0;
#define BAD(text, code, change)                                                                    \
    do {                                                                                           \
        bad[count] = right;                                                                        \
        bad[count].what = text;                                                                    \
        bad[count].status = code;                                                                  \
        bad[count].change;                                                                         \
        count++;                                                                                   \
    } while (0)
    BAD("truncated", SKV_EPROTO, bytes = 64);
    BAD("too long", SKV_EPROTO, bytes = 200);
    BAD("another magic", SKV_EPROTO, hello.magic ^= 1);
    BAD("a later version", SKV_EVERSION, hello.version++);
    bad[count - 1].text = "upgrade the daemon";
    BAD("a later version's length", SKV_EVERSION, hello.version++);
    bad[count - 1].bytes = 200;
    BAD("an earlier version", SKV_EVERSION, hello.version--);
    bad[count - 1].text = "restart it with the installed";
    BAD("an earlier version's length", SKV_EVERSION, hello.version--);
    bad[count - 1].bytes = 64;
    BAD("an unknown kind", SKV_EPROTO, hello.kind = 9);
    BAD("another geometry", SKV_EGEOMETRY, hello.geometry.heads = 4);
    BAD("no rows", SKV_EPROTO, hello.rows = 0);
    BAD("too many rows", SKV_EPROTO, hello.rows = SKV_MAX_ROWS + 1);
    BAD("another stride", SKV_EPROTO, hello.gate_stride += 64);
    BAD("no model", SKV_EPROTO, hello.model = (struct skv_id){0});
    BAD("a reserved word", SKV_EPROTO, hello.reserved[8] = 1);
    BAD("no gates", SKV_EPROTO, fds = 1);
    BAD("gates that are not sealed", SKV_EPROTO, unsealed = true);
    BAD("gates of another size", SKV_EPROTO, gate_bytes += 4096);
    BAD("an admin with rows", SKV_EPROTO, hello.kind = WIRE_ADMIN);
#undef BAD
    for (int i = 0; i < count; i++)
        cr_expect_eq(say_hello(&bad[i]), bad[i].status, "%s: %d, not %d", bad[i].what,
                     say_hello(&bad[i]), bad[i].status);
    expect_undisturbed();
}

Test(refusals, every_wrong_handshake_is_answered_with_its_reason)
{
    every_bad_hello();
}

Test(refusals_epoll, the_stats_say_so)
{
    struct skv_stats stats;
    cr_assert_eq(skv_stats(good, &stats), 0);
    cr_expect_eq(stats.epoll, 1);
}

Test(refusals_epoll, every_wrong_handshake_is_answered_with_its_reason)
{
    every_bad_hello();
}

Test(refusals, a_silent_client_is_dropped_and_holds_nobody_up)
{
    struct wire_welcome welcome;
    int socket = raw_connect(&rig);
    expect_undisturbed();
    cr_assert_eq(raw_receive(socket, &welcome, sizeof welcome, NULL, RAW_PATIENCE_MS),
                 sizeof welcome);
    cr_expect_eq(welcome.status, SKV_ETIMEDOUT);
    close(socket);
    expect_undisturbed();
}

Test(refusals, who_only_looks_whether_somebody_listens_is_not_refused)
{
    struct wire_welcome welcome;
    struct skv_stats stats;
    for (int i = 0; i < 3; i++)
        close(raw_connect(&rig));
    int empty = raw_connect(&rig);
    cr_assert(raw_send(empty, "", 0, NULL, 0));
    cr_assert_eq(raw_receive(empty, &welcome, sizeof welcome, NULL, RAW_PATIENCE_MS),
                 sizeof welcome);
    cr_expect_eq(welcome.status, SKV_EPROTO, "an empty message is no hang-up");
    close(empty);
    cr_assert_eq(skv_stats(good, &stats), 0);
    cr_expect_eq(stats.sessions_refused, 1);
    expect_undisturbed();
}

/* ---- ring entries ---- */

static void every_bad_entry(void)
{
    static const struct {
        const char *what;
        struct wire_sqe sqe;
    } bad[] = {
        {"an unknown opcode", {.opcode = WIRE_OPCODES}},
        {"opcode 255", {.opcode = 255}},
        {"a reserved byte", {.opcode = WIRE_NOP, .reserved0 = 1}},
        {"a reserved word", {.opcode = WIRE_NOP, .reserved = 1}},
        {"a row with NOP", {.opcode = WIRE_NOP, .row = 1}},
        {"a count with NOP", {.opcode = WIRE_NOP, .count = 1}},
        {"an argument with NOP", {.opcode = WIRE_NOP, .argument = 1}},
        {"a user with FLUSH", {.opcode = WIRE_FLUSH, .user = {.lo = 1}}},
        {"a row out of range", {.opcode = WIRE_ACQUIRE, .row = 1, .count = 1}},
        {"no users", {.opcode = WIRE_ACQUIRE}},
        {"too many users", {.opcode = WIRE_ACQUIRE, .count = SKV_MAX_BATCH + 1}},
        {"a history too long", {.opcode = WIRE_ACQUIRE, .count = 1}},
        {"unknown flags", {.opcode = WIRE_ACQUIRE, .count = 2}},
        {"hashes outside", {.opcode = WIRE_ACQUIRE, .count = 3}},
        {"a reserved word of a request", {.opcode = WIRE_ACQUIRE, .count = 4}},
        {"no leases", {.opcode = WIRE_COMMIT}},
        {"too many leases", {.opcode = WIRE_RELEASE, .count = SKV_MAX_BATCH + 1}},
        {"another model", {.opcode = WIRE_LOOKUP, .model = {.lo = 1}}},
        {"another model's user to forget",
         {.opcode = WIRE_FORGET, .model = {.lo = 1}, .user = {.lo = 1}}},
        {"tokens beyond any history", {.opcode = WIRE_TRUNCATE, .argument = SKV_MAX_TOKENS + 1}},
        {"a list of nobody", {.opcode = WIRE_LIST}},
        {"a list too long", {.opcode = WIRE_LIST, .count = WIRE_LIST_USERS + 1}},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct raw raw;
        cr_assert(raw_open(&raw, &rig, &tiny), "%s", bad[i].what);
        struct wire_request *r =
            raw.slots[0].requests; /* of the four entries that name them by their count */
        r[0] = (struct wire_request){.history = bad[i].sqe.count == 1 ? SKV_MAX_TOKENS + 1 : 0};
        r[1] = (struct wire_request){.flags = bad[i].sqe.count == 2 ? 1u << 31 : 0};
        r[2] = (struct wire_request){.history = 64,
                                     .hash_offset = WIRE_SLOT_PAGES - (bad[i].sqe.count == 3)};
        r[2].history = bad[i].sqe.count == 3 ? 64 : 0;
        r[3] = (struct wire_request){.reserved = {0, 0, bad[i].sqe.count == 4}};
        raw_submit(&raw, &bad[i].sqe);
        cr_expect_eq(raw_goodbye(&raw), SKV_EPROTO, "%s ends the session", bad[i].what);
        raw_close(&raw);
    }
    expect_undisturbed();
    struct skv_stats stats;
    cr_assert_eq(skv_stats(good, &stats), 0);
    cr_expect_eq(stats.sessions_violations, sizeof bad / sizeof *bad);
}

Test(refusals, every_field_out_of_range_ends_only_its_own_session)
{
    every_bad_entry();
}

Test(refusals_epoll, every_field_out_of_range_ends_only_its_own_session)
{
    every_bad_entry();
}

Test(refusals, an_index_that_jumps_ends_the_session)
{
    struct raw raw;
    uint64_t one = 1;
    cr_assert(raw_open(&raw, &rig, &tiny));
    __atomic_store_n(&raw.ring->sq_tail, 1000, __ATOMIC_RELEASE);
    cr_assert_eq(write(raw.sq_fd, &one, sizeof one), 8);
    cr_expect_eq(raw_goodbye(&raw), SKV_EPROTO);
    raw_close(&raw);
    expect_undisturbed();
}

Test(refusals, a_message_after_the_handshake_ends_the_session)
{
    struct raw raw;
    cr_assert(raw_open(&raw, &rig, &tiny));
    raw_send(raw.socket, "hello?", 6, NULL, 0);
    cr_expect_eq(raw_goodbye(&raw), SKV_EPROTO);
    raw_close(&raw);
    expect_undisturbed();
}

/* More than the daemon will read: it looks at one message and throws the others away, or its own
 * last words would be lost. */
static void say_much(int socket)
{
    static const char *const words[] = {"much", "", "more", "", "", "than", "is read", ""};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        raw_send(socket, words[i], strlen(words[i]), NULL, 0);
}

Test(refusals, what_nobody_reads_takes_no_goodbye_back)
{
    struct raw raw;
    struct wire_welcome answer = {0};
    cr_assert(raw_open(&raw, &rig, &tiny));
    int fresh = raw_connect(&rig);
    kill(rig.daemon, SIGSTOP);
    say_much(raw.socket);
    say_much(fresh);
    kill(rig.daemon, SIGCONT);
    cr_expect_eq(raw_goodbye(&raw), SKV_EPROTO);
    cr_expect_eq(raw_receive(fresh, &answer, sizeof answer, NULL, RAW_PATIENCE_MS), sizeof answer);
    cr_expect_eq(answer.status, SKV_EPROTO);
    close(fresh);
    raw_close(&raw);
    expect_undisturbed();
}

/* An index of the daemon's comes to `value`. */
static void await_word(const uint32_t *word, uint32_t value)
{
    int32_t left = 0;
    for (int i = 0; i < RAW_PATIENCE_MS; i++, usleep(1000))
        if ((left = (int32_t)(value - __atomic_load_n(word, __ATOMIC_ACQUIRE))) <= 0)
            return;
    cr_assert_leq(left, 0, "the daemon takes no more");
}

Test(refusals, completions_that_nobody_takes_stop_only_their_own_session)
{
    struct raw raw;
    struct wire_cqe cqe;
    cr_assert(raw_open(&raw, &rig, &tiny));
    /* As many as have room on both sides: they are taken until the completions are full. */
    for (uint32_t i = 0; i < WIRE_CQ_ENTRIES + WIRE_ENTRIES; i++) {
        await_word(&raw.ring->sq_head, raw.sq_tail + 1 - WIRE_ENTRIES);
        raw_submit(&raw, &(struct wire_sqe){.opcode = WIRE_NOP, .user_data = i});
    }
    await_word(&raw.ring->cq_tail, WIRE_CQ_ENTRIES);
    expect_undisturbed();
    cr_expect_eq(__atomic_load_n(&raw.ring->cq_tail, __ATOMIC_ACQUIRE), WIRE_CQ_ENTRIES,
                 "as many as fit");
    cr_expect_eq(__atomic_load_n(&raw.ring->sq_head, __ATOMIC_ACQUIRE), WIRE_CQ_ENTRIES,
                 "and no more is taken");
    uint64_t one = 1;
    for (uint32_t i = 0; i < WIRE_CQ_ENTRIES + WIRE_ENTRIES; i++) {
        cr_assert_eq(write(raw.sq_fd, &one, sizeof one), 8);
        cr_assert(raw_completion(&raw, &cqe), "the rest comes once there is room");
        cr_expect_eq(cqe.user_data, i);
    }
    raw_close(&raw);
}

/* ---- leases ---- */

Test(refusals, a_stale_or_foreign_lease_is_stale_and_the_session_lives)
{
    struct raw raw;
    struct wire_cqe cqe;
    struct skv_request request = {
        .user = skv_user_integer(9), .tokens = tokens, .history = 64, .max_cached = UINT32_MAX};
    cr_assert_eq(skv_acquire(good, 0, &request, 1, &batch), 0);
    cr_assert(raw_open(&raw, &rig, &tiny));
    const uint64_t foreign[2] = {batch.grants[0].lease, UINT64_C(0x123456789abcdef0)};
    memcpy(raw.slots[0].leases, foreign, sizeof foreign);
    raw_submit(&raw, &(struct wire_sqe){.opcode = WIRE_COMMIT, .count = 2, .user_data = 3});
    cr_assert(raw_completion(&raw, &cqe));
    cr_expect_eq(cqe.status, 0);
    cr_expect_eq(raw.slots[0].results[0].status, SKV_ESTALE);
    cr_expect_eq(raw.slots[0].results[1].status, SKV_ESTALE);
    struct skv_committed committed;
    struct skv_batch again = batch;
    cr_assert_eq(skv_commit(good, &batch, &committed), 0);
    cr_expect_eq(committed.committed, 64, "the owner's commit counts all the same");
    cr_expect_neq(skv_commit(good, &again, NULL), 0, "but only once");
    raw_close(&raw);
}

Test(refusals, a_full_pool_grants_without_append_or_less_and_never_hangs)
{
    struct skv *other;
    static struct skv_batch held;
    cr_assert_eq(rig_connect(&rig,
                             (struct skv_options){.geometry = tiny, .model = model, .rows = 1},
                             &other),
                 0);
    struct skv_request big[3];
    for (uint32_t i = 0; i < 3; i++)
        big[i] = (struct skv_request){.user = skv_user_integer(100 + i),
                                      .tokens = tokens,
                                      .history = 4096,
                                      .max_cached = UINT32_MAX};
    cr_assert_eq(skv_acquire(other, 0, big, 2, &held), 0); /* 256 pages: all that 8 MiB hold */
    cr_expect(held.grants[0].flags & SKV_GRANT_APPEND);
    cr_expect(held.grants[1].flags & SKV_GRANT_APPEND);
    cr_assert_eq(skv_acquire(good, 0, &big[2], 1, &batch), 0);
    cr_expect_eq(batch.grants[0].status, 0);
    cr_expect_eq(batch.grants[0].flags & SKV_GRANT_APPEND, 0, "every page is leased");
    cr_assert_eq(skv_release(good, &batch), 0);
    cr_assert_eq(skv_release(other, &held), 0);
    skv_close(other);
    expect_undisturbed();
}

/* ---- the process ---- */

/* Runs a second daemon with these options until it ends; its exit status. */
static int second_daemon(const char *socket, const char *store, const char *const extra[])
{
    struct rig second = {.daemon = 0};
    int status;
    snprintf(second.socket, sizeof second.socket, "%s", socket);
    snprintf(second.store, sizeof second.store, "%s", store);
    setenv("SIDEKV_LOG", "error", 1);
    rig_start(&second, extra);
    cr_assert_eq(waitpid(second.daemon, &status, 0), second.daemon);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

Test(refusals, a_start_that_cannot_work_ends_with_an_error)
{
    static const char *const plain[] = {"--pool-bytes", "8M", "--start-wait", "0", NULL};
    static const char *const large[] = {"--pool-bytes", "900T", "--start-wait", "0", NULL};
    static const char *const other[] = {"--pool-bytes", "8M", "--start-wait", "0", "--head-dim",
                                        "128",          NULL};
    static const char *const wrong[] = {"--pool-bytes", "-3", NULL};
    static const char *const nowhere[] = {"--device", "bogus", NULL};
    char socket[128], store[128], file[128];
    snprintf(socket, sizeof socket, "%s/second", rig.directory);
    snprintf(store, sizeof store, "%s/other", rig.directory);
    cr_expect_eq(second_daemon(rig.socket, store, plain), 1, "the socket is in use");
    cr_expect_eq(second_daemon(socket, rig.store, plain), 1, "the store is in use");
    cr_expect_eq(second_daemon(socket, store, large), 1, "a pool larger than the memory");
    cr_expect_eq(second_daemon(socket, "/proc/version", plain), 1,
                 "a store path that is no directory");
    cr_expect_eq(second_daemon(socket, "/usr", plain), 1, "a directory that is no store");
    cr_expect_eq(second_daemon(socket, store, wrong), 2, "a value that is none");
    cr_expect_eq(second_daemon(socket, store, nowhere), 2, "a device that cannot be");
    cr_expect_eq(second_daemon("", store, plain), 2, "no path for the socket");
    snprintf(file, sizeof file, "%s/store/data.mdb", rig.directory);
    cr_expect_eq(second_daemon(file, store, plain), 1, "a file where the socket is to be");
    cr_expect_eq(access(file, F_OK), 0, "which stays");
    expect_undisturbed();
    rig_stop(&rig, SIGTERM);
    cr_expect_eq(second_daemon(socket, rig.store, other), 1, "a store of another geometry");
}

Test(refusals, the_socket_is_its_owners_alone)
{
    struct stat about;
    cr_assert_eq(stat(rig.socket, &about), 0);
    cr_expect_eq(about.st_mode & 0777, 0600);
}

static void restart(int signal)
{
    static const char *const options[] = {"--pool-bytes", "8M", NULL};
    struct skv_user_info info;
    cr_assert_eq(append(3, 1000), 0);
    if (signal == SIGKILL)
        cr_assert_eq(skv_flush(good), 0);
    rig_stop(&rig, signal);
    cr_expect_eq(append(3, 1000), SKV_ELOST);
    rig_start(&rig, options);
    cr_assert_eq(skv_reconnect(good, 20000), 0);
    cr_assert_eq(skv_lookup(good, (struct skv_id){0}, skv_user_integer(3), &info), 0);
    cr_expect_eq(info.stored, 1000);
    cr_expect_eq(info.resident, 0);
}

Test(refusals, sigterm_stores_what_is_committed)
{
    restart(SIGTERM);
}

Test(refusals, kill_9_keeps_what_is_stored)
{
    restart(SIGKILL);
}

/* Has somebody begun to start at the socket? */
static bool is_claimed(const char *socket)
{
    char lock[128];
    snprintf(lock, sizeof lock, "%s.lock", socket);
    int fd = open(lock, O_RDWR | O_CLOEXEC);
    bool claimed = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0;
    if (fd >= 0)
        close(fd);
    return claimed;
}

/* A daemon that waits in its start is told to end: it does, well. */
static void end_while_starting(struct rig *starting, const char *const options[], int signal)
{
    int status;
    rig_start(starting, options);
    for (int i = 0; i < RAW_PATIENCE_MS && !is_claimed(starting->socket); i++)
        usleep(1000);
    cr_assert(is_claimed(starting->socket));
    usleep(200000); /* it may be further then; it ends wherever it is */
    cr_expect_eq(waitpid(starting->daemon, &status, WNOHANG), 0, "it does not wait");
    kill(starting->daemon, signal);
    cr_assert_eq(waitpid(starting->daemon, &status, 0), starting->daemon);
    starting->daemon = 0;
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "wait status %#x", (unsigned)status);
    cr_expect_neq(access(starting->socket, F_OK), 0, "its socket is gone");
}

Test(refusals, sigterm_ends_a_start_that_waits_for_an_earlier_daemon)
{
    static const char *const options[] = {"--pool-bytes", "8M", "--start-wait", "600000", NULL};
    struct rig second = rig;
    snprintf(second.socket, sizeof second.socket, "%s/second", rig.directory);
    end_while_starting(&second, options, SIGTERM);
    expect_undisturbed();
}

Test(refusals, sigint_ends_a_start_that_waits_for_its_check_and_loses_nothing)
{
    static const char *const options[] = {"--pool-bytes", "8M", NULL};
    struct skv_user_info info;
    char hold[128];
    snprintf(hold, sizeof hold, "%s/hold", rig.directory);
    cr_assert_eq(append(3, 1000), 0);
    rig_stop(&rig, SIGTERM);
    close(open(hold, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    setenv("SIDEKV_TEST_CHECK", hold, 1);
    end_while_starting(&rig, options, SIGINT);
    unlink(hold);
    unsetenv("SIDEKV_TEST_CHECK");
    rig_start(&rig, options);
    cr_assert_eq(skv_reconnect(good, 20000), 0);
    cr_assert_eq(skv_lookup(good, (struct skv_id){0}, skv_user_integer(3), &info), 0);
    cr_expect_eq(info.stored, 1000);
}

Test(refusals, a_terminal_that_closes_takes_no_cache_with_it)
{
    cr_assert_eq(append(3, 1000), 0);
    kill(rig.daemon, SIGHUP);
    expect_undisturbed();
}

/* ---- SIGTERM while the store refuses ---- */

static int log_pipe[2];
static char log_text[65536];

static void to_the_pipe(void)
{
    rig_may_be_limited();
    dup2(log_pipe[1], STDERR_FILENO);
}

/* Reads the daemon's log till it says so. false: it never did. */
static bool log_says(const char *words)
{
    size_t length = strlen(log_text);
    ssize_t got = 1;
    while (!strstr(log_text, words) && got > 0) {
        got = read(log_pipe[0], log_text + length, sizeof log_text - 1 - length);
        length += got > 0 ? (size_t)got : 0;
    }
    return strstr(log_text, words) != NULL;
}

/* A daemon whose store has refused 1,000 tokens of user 3 is told to end: it is to wait for that
 * store, for `wait` milliseconds at most. */
static void end_a_refused_one(const char *wait)
{
    const char *const options[] = {"--pool-bytes", "8M", "--stop-wait", wait, NULL};
    rig_stop(&rig, SIGTERM);
    cr_assert_eq(append(3, 1000), SKV_ELOST);
    cr_assert_eq(pipe(log_pipe), 0);
    setenv("SIDEKV_LOG", "warn", 1);
    rig_child = to_the_pipe;
    rig_start(&rig, options);
    rig_child = NULL;
    close(log_pipe[1]);
    cr_assert_eq(skv_reconnect(good, 20000), 0);
    rig_limit(rig.daemon, true);
    cr_assert_eq(append(3, 1000), 0);
    cr_assert_eq(skv_flush(good), SKV_ENOSPC);
    kill(rig.daemon, SIGTERM);
}

/* It has ended in order; what was stored is there for the next one. */
static void expect_stored(bool all)
{
    static const char *const options[] = {"--pool-bytes", "8M", NULL};
    struct skv_user_info info = {0};
    int status;
    cr_assert_eq(waitpid(rig.daemon, &status, 0), rig.daemon);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_expect_eq(log_says("pages were not stored"), !all);
    close(log_pipe[0]);
    cr_assert_eq(append(3, 1000), SKV_ELOST);
    rig_start(&rig, options);
    cr_assert_eq(skv_reconnect(good, 20000), 0);
    status = skv_lookup(good, (struct skv_id){0}, skv_user_integer(3), &info);
    cr_expect_eq(status, all ? 0 : SKV_ENOENT);
    cr_expect_eq(info.stored, all ? 1000 : 0);
    expect_undisturbed();
}

#define AN_HOUR "3600000"

Test(refusals, sigterm_waits_for_a_store_that_refuses)
{
    end_a_refused_one(AN_HOUR);
    cr_assert(log_says("the store refuses"));
    cr_expect_eq(append(3, 1000), 0, "and serves meanwhile");
    rig_limit(rig.daemon, false);
    expect_stored(true);
}

Test(refusals, sigterm_waits_for_no_longer_than_it_was_told)
{
    end_a_refused_one("50");
    expect_stored(false);
}

Test(refusals, a_second_sigterm_ends_the_wait)
{
    end_a_refused_one(AN_HOUR);
    cr_assert(log_says("the store refuses"));
    kill(rig.daemon, SIGTERM);
    expect_stored(false);
}

static int open_files(pid_t pid)
{
    char path[64];
    int count = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *directory = opendir(path);
    while (directory && readdir(directory))
        count++;
    closedir(directory);
    return count;
}

Test(refusals, clients_that_come_and_go_leave_nothing_behind)
{
    struct skv *other;
    struct skv_stats stats;
    expect_undisturbed();
    int before = open_files(rig.daemon);
    for (int i = 0; i < 300; i++) {
        cr_assert_eq(rig_connect(&rig,
                                 (struct skv_options){.geometry = tiny, .model = model, .rows = 1},
                                 &other),
                     0);
        struct skv_request request = {.user = skv_user_integer(50),
                                      .tokens = tokens,
                                      .history = 64,
                                      .max_cached = UINT32_MAX};
        cr_assert_eq(skv_acquire(other, 0, &request, 1, &batch), 0);
        if (i % 2)
            cr_assert_eq(skv_commit(other, &batch, NULL), 0);
        else
            cr_assert_eq(skv_release(other, &batch), 0);
        skv_close(other);
    }
    for (int i = 0; i < 3000 && open_files(rig.daemon) > before; i++)
        usleep(20000);
    cr_expect_leq(open_files(rig.daemon), before);
    cr_assert_eq(skv_stats(good, &stats), 0);
    cr_expect_eq(stats.sessions, 1);
}

Test(refusals, a_killed_worker_gives_its_pages_back_once_it_is_gone)
{
    struct skv_stats before, stats;
    expect_undisturbed();
    cr_assert_eq(skv_stats(good, &before), 0);
    pid_t child = fork();
    if (child == 0) {
        struct raw raw;
        if (!raw_open(&raw, &rig, &tiny))
            _exit(1);
        raw.slots[0].requests[0] =
            (struct wire_request){.user = {.lo = 8}, .history = 320, .max_cached = UINT32_MAX};
        raw_submit(&raw, &(struct wire_sqe){.opcode = WIRE_ACQUIRE, .count = 1});
        struct wire_cqe cqe;
        raw_completion(&raw, &cqe);
        kill(getpid(), SIGSTOP);
        shutdown(raw.socket, SHUT_RDWR); /* it hangs up, and lives */
        kill(getpid(), SIGSTOP);
        _exit(0);
    }
    int status;
    cr_assert_eq(waitpid(child, &status, WUNTRACED), child);
    cr_assert(WIFSTOPPED(status));
    cr_assert_eq(skv_stats(good, &stats), 0);
    cr_expect_eq(stats.pool_pages_free + 10, before.pool_pages_free, "ten pages to append to");
    kill(child, SIGCONT);
    cr_assert_eq(waitpid(child, &status, WUNTRACED), child);
    cr_assert(WIFSTOPPED(status));
    for (int i = 0; i < 6000 && !stats.fenced_leases; i++) {
        usleep(10000);
        cr_assert_eq(skv_stats(good, &stats), 0);
    }
    usleep(100000); /* it would have given them back */
    cr_assert_eq(skv_stats(good, &stats), 0);
    cr_expect_eq(stats.pool_pages_free + 10, before.pool_pages_free, "it may still write to them");
    cr_expect_eq(stats.pool_pages_quarantined, 10);
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    for (int i = 0; i < 6000 && stats.pool_pages_free != before.pool_pages_free; i++) {
        usleep(10000);
        cr_assert_eq(skv_stats(good, &stats), 0);
    }
    cr_expect_eq(stats.pool_pages_free, before.pool_pages_free);
    cr_expect_eq(stats.fenced_leases, 1);
}
