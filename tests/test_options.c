/* What options_parse() takes, and what it refuses with exit status 2 before anything is opened. */
#include <criterion/criterion.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "options.h"

static struct options options;

/* With one option; NULL: none. */
static int parse(const char *option, const char *value)
{
    char *arguments[] = {"sidekvd", (char *)(uintptr_t)option, (char *)(uintptr_t)value, NULL};
    optind = 0; /* from the first one again */
    return options_parse(option ? 3 : 1, arguments, &options);
}

Test(options, the_socket_is_the_environments_unless_that_is_empty)
{
    setenv("SIDEKV_SOCKET", "/tmp/one", 1);
    cr_assert_eq(parse(NULL, NULL), -1);
    cr_expect_str_eq(options.socket, "/tmp/one");
    cr_assert_eq(parse("--socket", "/tmp/other"), -1);
    cr_expect_str_eq(options.socket, "/tmp/other");
    setenv("SIDEKV_SOCKET", "", 1);
    cr_assert_eq(parse(NULL, NULL), -1);
    cr_expect_str_eq(options.socket, SKV_DEFAULT_SOCKET);
    cr_expect_eq(parse("--socket", ""), 2);
}

Test(options, a_socket_has_a_path_of_107_bytes_at_most)
{
    char path[109];
    memset(path, 'x', sizeof path);
    path[107] = 0;
    cr_expect_eq(parse("--socket", path), -1);
    path[107] = 'x';
    path[108] = 0;
    cr_expect_eq(parse("--socket", path), 2);
    setenv("SIDEKV_SOCKET", path, 1);
    cr_expect_eq(parse(NULL, NULL), 2);
}

Test(options, a_device_has_a_devices_name)
{
    static const char *const right[] = {"auto", "host", "cuda", "cuda:0", "cuda:12"};
    static const char *const wrong[] = {"",        "bogus", "cuda:", "cuda:x",
                                        "cuda:-1", "cuda1", "auto "};
    for (size_t i = 0; i < sizeof right / sizeof *right; i++)
        cr_expect_eq(parse("--device", right[i]), -1, "%s", right[i]);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(parse("--device", wrong[i]), 2, "%s", wrong[i]);
}

/* Of a GPU, played, of which so much is free. */
static uint64_t default_pool(const char *free_bytes)
{
    struct skv_device *device;
    setenv("SIDEKV_TEST_GPU_FREE", free_bytes, 1);
    cr_assert_eq(parse(NULL, NULL), -1);
    cr_assert_eq(skv_device_open("host", &device), 0);
    options_defaults(&options, device);
    skv_device_close(device);
    return options.pool_bytes;
}

Test(options, the_default_pool_leaves_8_gib_or_a_quarter_of_a_gpu)
{
    const uint64_t gib = UINT64_C(1) << 30;
    cr_expect_eq(default_pool("17179869184"), 8 * gib); /* 16 GiB */
    cr_expect_not(options.least_pool);
    cr_expect_eq(default_pool("68719476736"), 48 * gib); /* 64 GiB */
    cr_expect_not(options.least_pool);
    const uint64_t least = 64 * skv_page_bytes(&options.geometry);
    cr_expect_eq(default_pool("8592031744"), least); /* 8 GiB and 64 pages */
    cr_expect_not(options.least_pool);
    cr_expect_eq(default_pool("8592031743"), least);
    cr_expect(options.least_pool);
    cr_expect_eq(default_pool("0"), least);
    cr_expect(options.least_pool);
}
