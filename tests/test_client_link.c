/* The handshake as the client sees it, against a scripted daemon: what a right one gives, and how
 * every wrong one is refused, with nothing left open. */
#include <criterion/criterion.h>

#include <sys/syscall.h>

#include "fake_daemon.h"
#include "skv_session.h"

static struct fake fake;

static void setup(void)
{
    fake_init(&fake);
}

static void teardown(void)
{
    fake_fini(&fake);
}

TestSuite(client_link, .init = setup, .fini = teardown, .timeout = 180);

/* Opens against `script` and expects `status`; no fd may stay behind. */
static void expect_refusal(const char *name, void (*script)(struct fake *), int status,
                           uint32_t timeout_ms)
{
    struct skv_options options = fake_options(&fake);
    options.timeout_ms = timeout_ms;
    struct skv *skv = NULL;
    fake_start(&fake, script);
    int before = fake_open_fds();
    int got = skv_open(&options, &skv);
    cr_expect_eq(got, status, "%s: %s, not %s", name, skv_strerror(got), skv_strerror(status));
    cr_expect_null(skv, "%s", name);
    cr_expect_eq(fake_open_fds(), before, "%s leaves fds open", name);
    skv_close(skv);
    int code = fake_end(&fake);
    cr_expect_eq(code, 0, "%s: the script ended with %d", name, code);
}

/* ---- nobody, somebody else, nonsense arguments ---- */

Test(client_link, nobody_listening_is_lost_at_once)
{
    struct skv_options options = fake_options(&fake);
    struct skv *skv = NULL;
    options.timeout_ms = 3600000; /* the suite's is shorter */
    cr_assert_eq(skv_open(&options, &skv), SKV_ELOST);
    fake_listen(&fake);
    close(fake.listener); /* a socket file without a listener */
    cr_assert_eq(skv_open(&options, &skv), SKV_ELOST);
}

Test(client_link, a_file_that_is_no_socket_is_no_daemon)
{
    struct skv_options options = fake_options(&fake);
    struct skv *skv = NULL;
    int before = fake_open_fds();
    close(creat(fake.path, 0400)); /* nobody but root may write to it: another errno */
    cr_expect_eq(skv_open(&options, &skv), SKV_EPROTO);
    options.socket = fake.directory;
    cr_expect_eq(skv_open(&options, &skv), SKV_EPROTO);
    cr_expect_eq(fake_open_fds(), before);
}

Test(client_link, options_out_of_range_are_refused)
{
    struct skv *skv = NULL;
    struct skv_options options = fake_options(&fake);
    options.rows = SKV_MAX_ROWS + 1;
    cr_expect_eq(skv_open(&options, &skv), SKV_EINVAL);
    options = fake_options(&fake);
    options.model = (struct skv_id){0};
    cr_expect_eq(skv_open(&options, &skv), SKV_EINVAL);
    options = fake_options(&fake);
    options.geometry.head_dim = 65;
    cr_expect_eq(skv_open(&options, &skv), SKV_EINVAL);
    options = fake_options(&fake);
    char path[200];
    memset(path, 'x', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    options.socket = path;
    cr_expect_eq(skv_open(&options, &skv), SKV_EINVAL);
    cr_expect_eq(skv_open(NULL, &skv), SKV_EINVAL);
    skv_close(NULL);
}

/* ---- refusals ---- */

static void refuse(struct fake *f, int status, const char *text)
{
    fake_accept(f);
    f->welcome =
        (struct wire_welcome){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .status = status};
    snprintf(f->welcome.text, sizeof f->welcome.text, "%s", text);
    fake_send(f, &f->welcome, sizeof f->welcome, NULL, 0);
}

static void refuse_geometry(struct fake *f)
{
    refuse(f, SKV_EGEOMETRY, "this daemon serves 4 layers \x1b[31m");
}

static void refuse_unknown_status(struct fake *f)
{
    refuse(f, -4711, "?");
}

/* As long as the script's argument says; its version stands there too. */
static void another_version(struct fake *f)
{
    static char message[sizeof(struct wire_welcome) + 64];
    const uint32_t *how = f->argument;
    fake_accept(f);
    const struct wire_welcome welcome = {.magic = WIRE_MAGIC,
                                         .version = (uint16_t)how[0],
                                         .status = SKV_EVERSION,
                                         .text = "not ours to read"};
    memcpy(message, &welcome, sizeof welcome);
    fake_send(f, message, how[1], NULL, 0);
}

static void another_magic(struct fake *f)
{
    fake_accept(f);
    fake_send(f, "HTTP/1.1 400 Bad Request", 24, NULL, 0);
}

Test(client_link, a_refusal_keeps_the_daemons_status)
{
    expect_refusal("geometry", refuse_geometry, SKV_EGEOMETRY, FAKE_PATIENCE_MS);
    expect_refusal("unknown status", refuse_unknown_status, SKV_EPROTO, FAKE_PATIENCE_MS);
    expect_refusal("magic", another_magic, SKV_EPROTO, FAKE_PATIENCE_MS);
}

Test(client_link, another_version_is_told_with_what_to_do)
{
    static const uint32_t versions[] = {WIRE_VERSION - 1, WIRE_VERSION + 1},
                          lengths[] = {16, sizeof(struct wire_welcome),
                                       sizeof(struct wire_welcome) + 64};
    static const char *const remedies[] = {"restart the daemon", "restart this process"};
    const struct wire_hello hello = {
        .magic = WIRE_MAGIC, .version = WIRE_VERSION, .kind = WIRE_ADMIN};
    int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    for (uint32_t v = 0; v < 2; v++)
        for (uint32_t l = 0; l < 3; l++) {
            struct skv_link link;
            char numbers[64];
            fake.argument = (uint32_t[]){versions[v], lengths[l]};
            fake_start(&fake, another_version);
            cr_expect_eq(skv_link_open(&link, fake.path, &hello, &pidfd, 1,
                                       skv_now_ns() + FAKE_PATIENCE_MS * UINT64_C(1000000)),
                         SKV_EVERSION);
            snprintf(numbers, sizeof numbers, "speaks protocol %u, this library %u", versions[v],
                     WIRE_VERSION);
            cr_expect(strstr(link.reason, numbers) && strstr(link.reason, remedies[v]), "%s",
                      link.reason);
            cr_expect_eq(fake_end(&fake), 0);
        }
    close(pidfd);
}

/* ---- silence and hang-ups ---- */

static void await_give_up(struct fake *f)
{
    fake_await_hang_up(f);
}

static void silent_after_hello(struct fake *f)
{
    fake_accept(f);
    await_give_up(f);
}

static void silent_after_welcome(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    if (!fake_try_send(f, &f->welcome, sizeof f->welcome, f->fds, WIRE_WELCOME_FDS))
        return; /* too slow: the client gave up before */
    fake_here(f);
    await_give_up(f);
}

static void never_accepts(struct fake *f)
{
    fake_wait_go(f, 1);
}

Test(client_link, a_silent_daemon_times_out)
{
    expect_refusal("after hello", silent_after_hello, SKV_ETIMEDOUT, 200);
    for (uint32_t ms = 200; !fake.shared->here; ms *= 2)
        expect_refusal("after welcome", silent_after_welcome, SKV_ETIMEDOUT, ms);

    struct skv_options options = fake_options(&fake);
    options.timeout_ms = 100;
    struct skv *skv = NULL;
    fake_start(&fake, never_accepts);
    for (int i = 0; i < 8; i++) /* until its backlog is full, and beyond */
        cr_expect_eq(skv_open(&options, &skv), SKV_ETIMEDOUT);
    fake_go(&fake);
    cr_assert_eq(fake_end(&fake), 0);
}

static void hang_up_before_hello(struct fake *f)
{
    close(accept(f->listener, NULL, NULL));
}

static void hang_up_after_hello(struct fake *f)
{
    fake_accept(f);
}

static void hang_up_after_welcome(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    fake_send_welcome(f);
}

Test(client_link, a_hang_up_at_any_step_is_lost)
{
    expect_refusal("before hello", hang_up_before_hello, SKV_ELOST, FAKE_PATIENCE_MS);
    expect_refusal("after hello", hang_up_after_hello, SKV_ELOST, FAKE_PATIENCE_MS);
    expect_refusal("after welcome", hang_up_after_welcome, SKV_ELOST, FAKE_PATIENCE_MS);
}

/* ---- a welcome that lies ---- */

static void truncated(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    fake_send(f, &f->welcome, sizeof f->welcome - 8, f->fds, WIRE_WELCOME_FDS);
}

static void overlong(struct fake *f)
{
    static char message[sizeof(struct wire_welcome) + 8];
    fake_accept(f);
    fake_prepare(f);
    memcpy(message, &f->welcome, sizeof f->welcome);
    fake_send(f, message, sizeof message, f->fds, WIRE_WELCOME_FDS);
}

static void two_fds(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    fake_send(f, &f->welcome, sizeof f->welcome, f->fds, WIRE_WELCOME_FDS - 1);
}

static void four_fds(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    fake_send(f, &f->welcome, sizeof f->welcome, f->fds, WIRE_WELCOME_FDS + 1);
}

static void small_memory(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    f->fds[0] = fake_memory(f->welcome.session_bytes - 1, F_SEAL_SHRINK);
    fake_send_welcome(f);
}

static void unsealed_memory(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    f->fds[0] = fake_memory(f->welcome.session_bytes, F_SEAL_GROW);
    fake_send_welcome(f);
}

static void small_extent(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    fake_send_welcome(f);
    int fd = fake_memory(4096, F_SEAL_SHRINK);
    struct wire_extents message = {.magic = WIRE_MAGIC, .count = 1};
    fake_send(f, &message, sizeof message, &fd, 1);
}

Test(client_link, messages_and_memory_of_the_wrong_size_are_refused)
{
    expect_refusal("truncated welcome", truncated, SKV_EPROTO, FAKE_PATIENCE_MS);
    expect_refusal("overlong welcome", overlong, SKV_EPROTO, FAKE_PATIENCE_MS);
    expect_refusal("two fds", two_fds, SKV_EPROTO, FAKE_PATIENCE_MS);
    expect_refusal("four fds", four_fds, SKV_EPROTO, FAKE_PATIENCE_MS);
    expect_refusal("small session memory", small_memory, SKV_EPROTO, FAKE_PATIENCE_MS);
    expect_refusal("unsealed session memory", unsealed_memory, SKV_EPROTO, FAKE_PATIENCE_MS);
    expect_refusal("small extent", small_extent, SKV_EPROTO, FAKE_PATIENCE_MS);
}

static const struct lie {
    const char *name;
    size_t offset;
    uint64_t value;
    size_t size;
} lies[] = {
#define LIE(field, what)                                                                           \
    {                                                                                              \
#field, offsetof(struct wire_welcome, field), what,                                        \
            sizeof(((struct wire_welcome *)0)->field)                                              \
    }
    LIE(geometry.layers, 3),
    LIE(session, 0),
    LIE(session_bytes, 1 << 20),
    LIE(pool_pages, 0),
    LIE(pool_pages, UINT64_MAX / 4),
    LIE(pool_bytes, UINT64_C(1) << 62),
    LIE(extent_bytes, 0),
    LIE(extent_bytes, 4096),
    LIE(extents, 0),
    LIE(extents, UINT32_MAX),
    LIE(export, 2),
    LIE(export, SKV_EXPORT_IPC),
    LIE(device_kind, 7),
    LIE(mps, 2),
    LIE(reserved0, 1),
    LIE(protect, 2),
    LIE(reserved1, 1),
    LIE(reserved[6], 1),
    LIE(status, 1),
};

static void tell_lie(struct fake *f)
{
    const struct lie *lie = f->argument;
    fake_accept(f);
    fake_prepare(f);
    memcpy((uint8_t *)&f->welcome + lie->offset, &lie->value, lie->size);
    fake_send_welcome(f);
}

Test(client_link, every_field_of_a_welcome_is_checked)
{
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        fake.argument = &lies[i];
        expect_refusal(lies[i].name, tell_lie, SKV_EPROTO, FAKE_PATIENCE_MS);
    }
}

static void foreign_device(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    f->welcome.uuid[0] ^= 1;
    fake_send_welcome(f);
    fake_send_extents(f);
}

Test(client_link, a_device_that_this_process_cannot_see_is_no_device)
{
    expect_refusal("device", foreign_device, SKV_ENODEVICE, FAKE_PATIENCE_MS);
}

/* A doorbell that nobody reads is full one day, and a write to it waits. */
static void full_doorbell(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    FAKE_CHECK(eventfd_write(f->fds[1], UINT64_MAX - 1) == 0);
    ((struct wire_ring *)(void *)f->memory)->sq_flags = WIRE_NEED_WAKEUP;
    fake_send_welcome(f);
    fake_send_extents(f);
    fake_await_hang_up(f);
}

Test(client_link, a_full_doorbell_holds_no_call_up)
{
    struct skv *skv = NULL;
    cr_assert_neq(fake_open_impatient(&fake, full_doorbell, &skv), 0);
    cr_expect_eq(skv_ping(skv, NULL), SKV_ETIMEDOUT);
    skv_close(skv);
    cr_assert_eq(fake_end(&fake), 0);
}

/* ---- extents ---- */

#define MANY 450u

static void many_extents(struct fake *f)
{
    static int fds[MANY];
    uint64_t bytes = UINT64_C(2) << 20;
    bool spoil = f->argument != NULL;
    fake_accept(f);
    fake_prepare(f);
    f->welcome.extents = MANY;
    f->welcome.extent_bytes = bytes;
    f->welcome.pool_bytes = bytes * MANY;
    fake_send_welcome(f);
    for (uint32_t i = 0; i < MANY; i++)
        fds[i] = fake_memory(bytes, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    for (uint32_t first = 0; first < MANY; first += WIRE_FDS_PER_MESSAGE) {
        uint32_t left = MANY - first;
        struct wire_extents message = {.magic = WIRE_MAGIC, .first = first};
        message.count = left < WIRE_FDS_PER_MESSAGE ? left : WIRE_FDS_PER_MESSAGE;
        if (spoil && first)
            message.first++;
        fake_send(f, &message, sizeof message, fds + first, message.count);
        if (spoil && first)
            return;
    }
    fake_await_hang_up(f);
}

Test(client_link, a_pool_of_many_extents_comes_in_several_messages)
{
    struct skv_options options = fake_options(&fake);
    struct skv *skv = NULL;
    fake_start(&fake, many_extents);
    int before = fake_open_fds();
    cr_assert_eq(skv_open(&options, &skv), 0);
    cr_expect_not_null(skv_pool_base(skv));
    cr_expect_lt(fake_open_fds(), before + 50, "extents are closed after the import");
    skv_close(skv);
    cr_expect_eq(fake_open_fds(), before);
    cr_assert_eq(fake_end(&fake), 0);
}

Test(client_link, extents_in_disorder_are_refused)
{
    fake.argument = &fake;
    expect_refusal("disorder", many_extents, SKV_EPROTO, FAKE_PATIENCE_MS);
}

/* ---- a right one ---- */

static void well_behaved(struct fake *f)
{
    fake_handshake(f);
    fake_await_hang_up(f);
}

Test(client_link, a_right_handshake_maps_pool_and_gates)
{
    struct skv_options options = fake_options(&fake);
    struct skv *skv = NULL;
    fake_start(&fake, well_behaved);
    int before = fake_open_fds();
    cr_assert_eq(skv_open(&options, &skv), 0);
    cr_expect_not(skv_lost(skv));
    cr_expect_eq(skv_pool_pages(skv), FAKE_POOL_BYTES / skv_page_bytes(&fake_geometry));
    memset(skv_pool_base(skv), 1, FAKE_POOL_BYTES);
    cr_expect_not_null(skv_session_device(skv));
    uint32_t stride = wire_gate_stride(fake_geometry.layers) / 4;
    cr_expect_eq(skv_gate_row(skv, 1), skv_gate_row(skv, 0) + stride);
    cr_expect_null(skv_gate_row(skv, 2));
    const struct skv_server *server = skv_server(skv);
    cr_expect_eq(server->pid, (uint32_t)fake.pid);
    cr_expect_str_eq(server->device, "host");
    cr_expect_not(server->cuda);
    skv_close(skv);
    cr_expect_eq(fake_open_fds(), before);
    cr_assert_eq(fake_end(&fake), 0);
}

/* Who asks for what the daemon would end the session for, still has it. */
Test(client_link, wrong_arguments_cost_no_session)
{
    struct skv_options options = fake_options(&fake);
    struct skv *skv = NULL;
    const struct skv_id other = {.lo = 5, .hi = 6}, user = skv_user_integer(1);
    fake_start(&fake, fake_serve_a_ping);
    cr_assert_eq(skv_open(&options, &skv), 0);
    cr_expect_eq(skv_truncate(skv, fake_model, user, SKV_MAX_TOKENS + 1), SKV_EINVAL);
    cr_expect_eq(skv_truncate(skv, other, user, 1), SKV_EINVAL);
    cr_expect_eq(skv_lookup(skv, other, user, NULL), SKV_EINVAL);
    cr_expect_eq(skv_evict(skv, other, user), SKV_EINVAL);
    cr_expect_eq(skv_forget(skv, other, user), SKV_EINVAL);
    cr_expect_eq(skv_restart(skv), SKV_EINVAL, "a worker's session");
    cr_expect_eq(skv_ping(skv, NULL), 0);
    skv_close(skv);
    cr_assert_eq(fake_end(&fake), 0);
}

Test(client_link, an_admin_has_neither_pool_nor_gates)
{
    struct skv_options options = fake_options(&fake);
    options.admin = true;
    struct skv *skv = NULL;
    fake_start(&fake, well_behaved);
    cr_assert_eq(skv_open(&options, &skv), 0);
    cr_expect_null(skv_pool_base(skv));
    cr_expect_null(skv_gate_row(skv, 0));
    cr_expect_eq(skv_server(skv)->geometry.layers, fake_geometry.layers);
    struct skv_request request = {.user = skv_user_integer(1)};
    struct skv_batch batch;
    cr_expect_eq(skv_acquire(skv, 0, &request, 1, &batch), SKV_EINVAL);
    cr_expect_eq(skv_prefetch(skv, &request), SKV_EINVAL);
    skv_close(skv);
    cr_assert_eq(fake_end(&fake), 0);
}
