/* What `sidekv ping` says of its times, which a session played here gives (--wrap). */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "cli_result.h"

int __wrap_skv_open(const struct skv_options *options, struct skv **out);
int __wrap_skv_ping(struct skv *skv, uint64_t *round_trip_ns);
const struct skv_server *__wrap_skv_server(const struct skv *skv);
void __wrap_skv_close(struct skv *skv);

static uint64_t next_us; /* of the next round trip */

int __wrap_skv_open(const struct skv_options *options, struct skv **out)
{
    (void)options;
    *out = (struct skv *)&next_us;
    return SKV_OK;
}

int __wrap_skv_ping(struct skv *skv, uint64_t *round_trip_ns)
{
    (void)skv;
    *round_trip_ns = next_us-- * 1000;
    return SKV_OK;
}

const struct skv_server *__wrap_skv_server(const struct skv *skv)
{
    static const struct skv_server server = {.device = "host"};
    (void)skv;
    return &server;
}

void __wrap_skv_close(struct skv *skv)
{
    (void)skv;
}

/* cli_main.c's, for other commands */
void cli_print_hex(char out[CLI_HEX_BYTES], struct skv_id id)
{
    (void)id;
    out[0] = 0;
}

/* Of `count` round trips that took 1, 2, 3, ... us, the slowest first: is `text` said? */
static bool says(uint32_t count, const char *text)
{
    char *said = NULL;
    size_t bytes;
    FILE *real = stdout;
    stdout = open_memstream(&said, &bytes);
    next_us = count;
    int status = cli_ping(&(struct cli){.count = count});
    fclose(stdout);
    stdout = real;
    bool found = status == CLI_OK && strstr(said, text);
    free(said);
    return found;
}

Test(ping, percentiles_are_the_nearest_round_trips)
{
    cr_expect(says(100, "fastest 1.0 us, p50 51.0 us, p99 99.0 us, slowest 100.0 us"));
    cr_expect(says(101, "fastest 1.0 us, p50 51.0 us, p99 100.0 us, slowest 101.0 us"));
    cr_expect(says(3, "fastest 1.0 us, p50 2.0 us, p99 3.0 us, slowest 3.0 us"));
    cr_expect(says(1, "fastest 1.0 us, p50 1.0 us, p99 1.0 us, slowest 1.0 us"));
}

Test(ping, percentiles_of_no_times_are_0)
{
    cr_expect_eq(replay_percentile(&(struct replay_times){0}, 0.5), 0);
}
