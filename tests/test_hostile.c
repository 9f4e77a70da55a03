/* Clients that use what the daemon shares with them against it: doorbells, eventfds, the session's
 * memory, the backlog. Each harms its own session at most; a good one beside it goes on. */
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

#include "clock.h"
#include "flipper.h"
#include "hostile_lives.h"
#include "sigbus.h"

static struct rig rig;
static struct skv *good;

static void start(bool epoll)
{
    const char *const options[] = {"--pool-bytes", "8M", epoll ? "--epoll" : NULL, NULL};
    rig_init(&rig);
    rig_start(&rig, options);
    struct skv_options session = {.geometry = tiny, .model = {.lo = 5}, .rows = 1};
    cr_assert_eq(rig_connect(&rig, session, &good), 0);
}

static void set_up(void)
{
    start(false);
}

static void set_up_epoll(void)
{
    start(true);
}

static void tear_down(void)
{
    skv_close(good);
    rig_fini(&rig);
}

TestSuite(hostile, .init = set_up, .fini = tear_down, .timeout = 180);
TestSuite(hostile_epoll, .init = set_up_epoll, .fini = tear_down, .timeout = 180);

/* The good session is served, or one of its calls times out. */
static void ping_good(uint32_t pings)
{
    for (uint32_t i = 0; i < pings; i++) {
        cr_assert_eq(skv_ping(good, NULL), 0);
        usleep(2000); /* so that both fall asleep now and then */
    }
}

/* CPU time of the daemon, in ticks. */
static uint64_t daemon_ticks(void)
{
    char path[64], line[512] = {0};
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)rig.daemon);
    FILE *file = fopen(path, "re");
    if (file && fgets(line, sizeof line, file) && strrchr(line, ')'))
        sscanf(strrchr(line, ')') + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu",
               &user, &system);
    if (file)
        fclose(file);
    return user + system;
}

/* Somebody who does one thing to its doorbell until it is told to end. */
struct pest {
    struct raw raw;
    bool over;
    uint64_t times;
};

static bool goes_on(const struct pest *pest)
{
    return !__atomic_load_n(&pest->over, __ATOMIC_RELAXED);
}

/* The good session is served while the pest is at it. */
static void beside(void *(*body)(void *))
{
    struct pest pest = {0};
    pthread_t thread;
    cr_assert(raw_open(&pest.raw, &rig, &tiny));
    cr_assert_eq(pthread_create(&thread, NULL, body, &pest), 0);
    while (!__atomic_load_n(&pest.times, __ATOMIC_RELAXED))
        usleep(1000);
    ping_good(100);
    __atomic_store_n(&pest.over, true, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    ping_good(1);
    raw_close(&pest.raw);
}

static void *ring_the_bell(void *argument)
{
    struct pest *pest = argument;
    uint64_t one = 1;
    while (goes_on(pest) && write(pest->raw.sq_fd, &one, sizeof one) == sizeof one)
        __atomic_add_fetch(&pest->times, 1, __ATOMIC_RELAXED);
    return NULL;
}

Test(hostile, a_doorbell_storm_stops_nobody)
{
    beside(ring_the_bell);
}

Test(hostile_epoll, a_doorbell_storm_stops_nobody)
{
    beside(ring_the_bell);
}

/* It rings its doorbell and takes the ring back before the daemon looks. */
static void *steal_rings(void *argument)
{
    struct pest *pest = argument;
    int bell = pest->raw.sq_fd;
    uint64_t counter, one = 1;
    fcntl(bell, F_SETFL, O_NONBLOCK);
    while (goes_on(pest)) {
        fcntl(bell, F_SETFL, 0); /* a read that is not told not to would wait now */
        if (write(bell, &one, sizeof one) < 0)
            break;
        fcntl(bell, F_SETFL, O_NONBLOCK);
        if (read(bell, &counter, sizeof counter) < 0 && errno != EAGAIN)
            break;
        fcntl(bell, F_SETFL, 0);
        __atomic_add_fetch(&pest->times, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

Test(hostile, a_stolen_ring_stops_nobody)
{
    beside(steal_rings);
}

Test(hostile_epoll, a_stolen_ring_stops_nobody)
{
    beside(steal_rings);
}

Test(hostile, a_doorbell_made_non_blocking_costs_no_cpu)
{
    struct raw raw;
    struct wire_cqe cqe;
    cr_assert(raw_open(&raw, &rig, &tiny));
    fcntl(raw.sq_fd, F_SETFL, O_NONBLOCK);
    raw_submit(&raw, &(struct wire_sqe){.opcode = WIRE_NOP, .user_data = 1});
    cr_assert(raw_completion(&raw, &cqe));
    uint64_t before = daemon_ticks();
    usleep(1000000);
    cr_expect_lt(daemon_ticks() - before, (uint64_t)sysconf(_SC_CLK_TCK) / 2, "it does not spin");
    raw_submit(&raw, &(struct wire_sqe){.opcode = WIRE_NOP, .user_data = 2});
    cr_assert(raw_completion(&raw, &cqe), "and still hears the bell");
    raw_close(&raw);
}

/* Wants to be woken more often than its bell has room for. */
static void fill(void)
{
    struct raw raw;
    cr_assert(raw_open(&raw, &rig, &tiny));
    cr_assert(raw_takes_no_ring(&raw, 100));
    ping_good(20);
    int waiting = 0;
    cr_expect_eq(ioctl(raw.cq_fd, FIONREAD, &waiting), 0);
    cr_expect(waiting >= 8 && waiting < 100 * 8, "%d bytes of rings: it was full", waiting);
    raw_close(&raw);
}

Test(hostile, a_full_bell_stops_nobody)
{
    fill();
}

Test(hostile_epoll, a_full_bell_stops_nobody)
{
    fill();
}

/* A descriptor that stayed in it, of the session's own socket, say, would outlive its sender. */
Test(hostile, a_bell_takes_nothing_from_its_client)
{
    struct raw raw;
    cr_assert(raw_open(&raw, &rig, &tiny));
    cr_expect_eq(skv_send_fds(raw.cq_fd, "x", 1, &raw.socket, 1, 0), -1);
    cr_expect_eq(errno, EPIPE);
    raw_close(&raw);
}

Test(hostile, silent_handshakes_have_two_seconds_and_leave_room)
{
    int sockets[24];
    struct skv *other;
    struct wire_welcome welcome;
    usleep(1200000); /* the daemon sleeps: its turn's time is old by now */
    uint64_t begin = skv_now_ns();
    for (int i = 0; i < 24; i++)
        cr_assert_geq(sockets[i] = raw_connect(&rig), 0);
    struct skv_options session = {.geometry = tiny, .model = {.lo = 5}, .rows = 1};
    cr_assert_eq(rig_connect(&rig, session, &other), 0);
    skv_close(other);
    for (int i = 0; i < 24; i++) {
        cr_expect_eq(raw_receive(sockets[i], &welcome, sizeof welcome, NULL, RAW_PATIENCE_MS),
                     sizeof welcome);
        cr_expect_eq(welcome.status, SKV_ETIMEDOUT);
        if (i == 0)
            cr_expect_geq(skv_now_ns() - begin, UINT64_C(1900000000));
        close(sockets[i]);
    }
    cr_assert_eq(skv_ping(good, NULL), 0);
}

/* Punches the whole session memory out: every index is 0 again. */
Test(hostile, a_hole_in_its_memory_ends_only_its_session)
{
    struct raw raw;
    struct wire_cqe cqe;
    uint64_t one = 1;
    cr_assert(raw_open(&raw, &rig, &tiny));
    for (uint32_t i = 0; i < WIRE_ENTRIES + 3; i++) {
        raw_submit(&raw, &(struct wire_sqe){.opcode = WIRE_NOP});
        cr_assert(raw_completion(&raw, &cqe));
    }
    cr_assert_eq(fallocate(raw.memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                           (off_t)raw.welcome.session_bytes),
                 0);
    cr_assert_eq(write(raw.sq_fd, &one, sizeof one), 8);
    cr_expect_eq(raw_goodbye(&raw), SKV_EPROTO);
    cr_expect_neq(ftruncate(raw.memory_fd, 4096), 0, "and it cannot be cut short");
    raw_close(&raw);
    cr_assert_eq(skv_ping(good, NULL), 0);
}

Test(hostile, memory_that_changes_all_the_time_harms_only_its_session)
{
    int ended = 0; /* some must be found out: on a busy machine it may take more than forty */
    for (uint32_t session = 0; session < 40 || !ended; session++) {
        int over = flipper_session(&rig, session % 2);
        cr_assert_geq(over, 0);
        ended += over;
        cr_assert_eq(skv_ping(good, NULL), 0);
    }
}

static void play(void (*script)(struct scene *), const char *text)
{
    struct scene scene = {.rig = &rig};
    script(&scene);
    cr_expect_str_eq(scene.out.text, text);
    raw_close(&scene.raw);
    cr_assert_eq(skv_ping(good, NULL), 0);
}

Test(hostile, a_client_that_guesses_its_own_id_and_says_it_has_drained_lives)
{
    play(drained_of_itself, LIVES);
}

Test(hostile, descriptors_that_come_with_an_empty_message_are_closed)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/200", (int)rig.daemon);
    for (int i = 0; i < 150; i++) {
        int fds[2] = {gift_fd(PIDFD), gift_fd(GATES)}, fd = raw_connect(&rig);
        raw_send(fd, "", 0, fds, 2);
        close(fd);
        close(fds[0]);
        close(fds[1]);
    }
    cr_assert_eq(skv_ping(good, NULL), 0);
    cr_expect_neq(access(path, F_OK), 0, "it does not hold 200 of them");
}

/* ---- the SIGBUS handler by itself ---- */

/* A mapping whose file has been cut off under it. */
static uint8_t *cut_off(void)
{
    int fd = memfd_create("cut", MFD_CLOEXEC);
    cr_assert_eq(ftruncate(fd, 8192), 0);
    uint8_t *memory = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cr_assert_neq(memory, MAP_FAILED);
    cr_assert_eq(ftruncate(fd, 0), 0);
    return memory;
}

Test(sigbus, a_fault_in_a_watched_range_is_survived_and_told)
{
    uint8_t *memory = cut_off();
    skv_sigbus_init();
    skv_sigbus_watch(7, memory, 8192);
    cr_expect(!skv_sigbus_hit(7));
    memory[5000] = 3;
    cr_expect(skv_sigbus_hit(7) && !skv_sigbus_hit(6));
    cr_expect(memory[5000] == 3 && memory[0] == 0, "zeros of its own");
    skv_sigbus_unwatch(7);
    skv_sigbus_watch(7, memory, 8192);
    cr_expect(!skv_sigbus_hit(7), "another use of it begins afresh");
}

Test(sigbus, a_fault_elsewhere_ends_the_process, .signal = SIGBUS)
{
    uint8_t *memory = cut_off();
    skv_sigbus_init();
    skv_sigbus_watch(7, memory, 4096);
    memory[4096] = 1;
}

Test(sigbus, one_that_was_sent_ends_the_process, .signal = SIGBUS)
{
    skv_sigbus_init();
    kill(getpid(), SIGBUS);
}
