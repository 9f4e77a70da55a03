/* The commands that look at the cache and manage it: one admin session each, opened, used and
 * closed. The library has logged in words why a session could not be had; what a command itself
 * reports says what to do next. */
#include "cli.h"

#include <inttypes.h>
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cli_result.h"
#include "clock.h"

#define LOOK_TIMEOUT_MS   5000u
#define CHANGE_TIMEOUT_MS 60000u /* a change waits for the store */
#define LIST_STEP         512u

static struct skv *open_admin(const struct cli *cli, uint32_t timeout_ms)
{
    struct skv_options options = {.socket = cli->socket, .admin = true, .timeout_ms = timeout_ms};
    struct skv *skv = NULL;
    return skv_open(&options, &skv) == SKV_OK ? skv : NULL;
}

/* The command's end: says what went wrong, closes, and gives the exit code. */
static int finish(struct skv *skv, int status, const char *what, const char *advice)
{
    skv_close(skv);
    if (status == SKV_OK)
        return CLI_OK;
    fprintf(stderr, "sidekv: %s: %s%s%s\n", what, skv_strerror(status), *advice ? "; " : "",
            advice);
    return CLI_FAILED;
}

static const char *advice_of(int status)
{
    switch (status) {
    case SKV_ENOENT:
        return "`sidekv users` lists who is cached";
    case SKV_EBUSY:
        return "a running batch holds it; try again when it has ended";
    case SKV_ENOSPC:
    case SKV_EIO:
        return "the store refuses writes; see offload_stopped and store_bytes in `sidekv stats`";
    case SKV_EAGAIN:
        return "nothing was done: the daemon awaits its store; try again when store_awaited in "
               "`sidekv stats` is 0";
    case SKV_ETIMEDOUT:
    case SKV_ELOST:
        return "see the daemon's log";
    }
    return "";
}

static void print_json(json_t *json)
{
    json_dumpf(json, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(json);
}

/* ---- ping ---- */

static void print_server(const struct skv_server *s)
{
    printf("sidekvd, process %u, on %s%s: %" PRIu64 " pages of %u tokens, %.1f KiB each "
           "(%u layers, %u heads of %u)\n",
           s->pid, s->device, s->mps ? " under MPS" : "", s->pool_pages, s->geometry.page_tokens,
           (double)skv_page_bytes(&s->geometry) / 1024, s->geometry.layers, s->geometry.heads,
           s->geometry.head_dim);
}

static double percentile_us(const struct replay_times *times, double share)
{
    return (double)replay_percentile(times, share) / 1e3;
}

int cli_ping(const struct cli *cli)
{
    struct replay_times times = {.ns = malloc(cli->count * sizeof *times.ns), .count = cli->count};
    if (!times.ns)
        return finish(NULL, SKV_ENOMEM, "ping", "ask for fewer");
    struct skv *skv = open_admin(cli, LOOK_TIMEOUT_MS);
    int status = SKV_OK;
    for (uint32_t i = 0; skv && i < cli->count && !status; i++)
        status = skv_ping(skv, &times.ns[i]);
    if (skv && !status) {
        replay_times_sort(&times);
        print_server(skv_server(skv));
        printf("%u round trips: fastest %.1f us, p50 %.1f us, p99 %.1f us, slowest %.1f us\n",
               cli->count, percentile_us(&times, 0), percentile_us(&times, 0.5),
               percentile_us(&times, 0.99), percentile_us(&times, 1));
    }
    free(times.ns);
    return skv ? finish(skv, status, "ping", advice_of(status)) : CLI_FAILED;
}

/* ---- stats ---- */

/* Bytes and milliseconds as people read them; "" for a plain count. */
static const char *readable(const char *name, uint64_t value, char *out, size_t size)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    size_t length = strlen(name);
    out[0] = '\0';
    if (length > 6 && strcmp(name + length - 6, "_bytes") == 0) {
        double amount = (double)value;
        int unit = 0;
        for (; amount >= 1024 && unit < 5; unit++)
            amount /= 1024;
        snprintf(out, size, unit ? "%.1f %s" : "%.0f %s", amount, units[unit]);
    } else if (length > 3 && strcmp(name + length - 3, "_ms") == 0) {
        snprintf(out, size, "%" PRIu64 ":%02u:%02u", value / 3600000,
                 (unsigned)(value / 60000 % 60), (unsigned)(value / 1000 % 60));
    }
    return out;
}

static void print_stats(const struct skv_stats *stats)
{
    char text[32];
#define X(name, about)                                                                             \
    printf("%-24s %20" PRIu64 " %10s  %s\n", #name, stats->name,                                   \
           readable(#name, stats->name, text, sizeof text), about);
    SKV_STATS_MAP(X)
#undef X
    if (stats->history_tokens) {
        double all = (double)stats->history_tokens;
        printf("\n%.2f %% of history tokens came from the cache: %.2f %% from the pool, %.2f %% "
               "from the store\n",
               100 * (double)(stats->hit_gpu_tokens + stats->hit_store_tokens) / all,
               100 * (double)stats->hit_gpu_tokens / all,
               100 * (double)stats->hit_store_tokens / all);
    }
}

static json_t *stats_json(const struct skv_stats *stats)
{
    json_t *json = json_object();
#define X(name, about) json_object_set_new(json, #name, json_integer((json_int_t)stats->name));
    SKV_STATS_MAP(X)
#undef X
    return json;
}

int cli_stats(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, LOOK_TIMEOUT_MS);
    if (!skv)
        return CLI_FAILED;
    struct skv_stats stats;
    int status = skv_stats(skv, &stats);
    if (!status && cli->json)
        print_json(stats_json(&stats));
    else if (!status)
        print_stats(&stats);
    return finish(skv, status, "stats", advice_of(status));
}

/* ---- users ---- */

/* The integer of an integer user, else the key's hex digits. */
static const char *user_name(struct skv_id user, char out[CLI_HEX_BYTES])
{
    if (user.hi)
        cli_print_hex(out, user);
    else
        snprintf(out, CLI_HEX_BYTES, "%" PRIu64, user.lo);
    return out;
}

static json_t *user_json(const struct skv_user_info *info)
{
    char model[CLI_HEX_BYTES], name[CLI_HEX_BYTES], key[CLI_HEX_BYTES];
    cli_print_hex(model, info->model);
    cli_print_hex(key, info->user);
    return json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I}", "model", model, "user",
                     user_name(info->user, name), "key", key, "committed_tokens",
                     (json_int_t)info->committed, "resident_tokens", (json_int_t)info->resident,
                     "stored_tokens", (json_int_t)info->stored, "leases", (json_int_t)info->leases,
                     "last_use_s", (json_int_t)info->last_use_s, "generation",
                     (json_int_t)info->generation);
}

static const char *time_text(uint64_t seconds, char out[32])
{
    time_t when = (time_t)seconds;
    struct tm parts;
    if (!seconds || !localtime_r(&when, &parts) || !strftime(out, 32, "%Y-%m-%d %H:%M:%S", &parts))
        strcpy(out, "-");
    return out;
}

static void print_user_row(const struct skv_user_info *info)
{
    char model[CLI_HEX_BYTES], name[CLI_HEX_BYTES], when[32];
    cli_print_hex(model, info->model);
    printf("%-32s %-32s %9u %9u %9u  %s\n", model, user_name(info->user, name), info->committed,
           info->resident, info->stored, time_text(info->last_use_s, when));
}

int cli_users(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, LOOK_TIMEOUT_MS);
    if (!skv)
        return CLI_FAILED;
    static struct skv_user_info infos[LIST_STEP];
    json_t *array = cli->json ? json_array() : NULL;
    if (!cli->json)
        printf("%-32s %-32s %9s %9s %9s  %s\n", "MODEL", "USER", "COMMITTED", "RESIDENT", "STORED",
               "LAST USE");
    uint64_t cursor = 0, shown = 0;
    int got = 0;
    do {
        got = shown < cli->limit ? skv_list(skv, &cursor, infos, LIST_STEP) : 0;
        for (int i = 0; i < got && shown < cli->limit; i++) {
            if (!skv_id_is_zero(cli->model) && !skv_id_equal(cli->model, infos[i].model))
                continue;
            shown++;
            if (array)
                json_array_append_new(array, user_json(&infos[i]));
            else
                print_user_row(&infos[i]);
        }
    } while (got >= 0 && cursor && shown < cli->limit);
    if (array && got >= 0)
        print_json(array);
    else
        json_decref(array);
    return finish(skv, got < 0 ? got : SKV_OK, "users", advice_of(got));
}

int cli_user(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, LOOK_TIMEOUT_MS);
    if (!skv)
        return CLI_FAILED;
    struct skv_user_info info;
    int status = skv_lookup(skv, cli->model, cli->user, &info);
    if (!status && cli->json) {
        print_json(user_json(&info));
    } else if (!status) {
        char model[CLI_HEX_BYTES], when[32];
        cli_print_hex(model, info.model);
        printf("%s\n  model      %s\n  committed  %u tokens\n  resident   %u tokens, in the pool\n"
               "  stored     %u tokens\n  leases     %u\n  last use   %s\n  generation %" PRIu64
               "\n",
               cli->user_text, model, info.committed, info.resident, info.stored, info.leases,
               time_text(info.last_use_s, when), info.generation);
    }
    return finish(skv, status, cli->user_text, advice_of(status));
}

/* ---- changes ---- */

int cli_evict(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, CHANGE_TIMEOUT_MS);
    if (!skv)
        return CLI_FAILED;
    int status = skv_evict(skv, cli->model, cli->user);
    if (!status)
        printf("%s: no longer in the pool\n", cli->user_text);
    return finish(skv, status, cli->user_text, advice_of(status));
}

int cli_forget(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, CHANGE_TIMEOUT_MS);
    if (!skv)
        return CLI_FAILED;
    int status = skv_forget(skv, cli->model, cli->user);
    if (!status)
        printf("%s: forgotten\n", cli->user_text);
    return finish(skv, status, cli->user_text, advice_of(status));
}

int cli_truncate(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, CHANGE_TIMEOUT_MS);
    if (!skv)
        return CLI_FAILED;
    int status = skv_truncate(skv, cli->model, cli->user, cli->tokens);
    if (!status) {
        struct skv_user_info info;
        bool left = skv_lookup(skv, cli->model, cli->user, &info) == SKV_OK;
        printf("%s: %u tokens committed\n", cli->user_text, left ? info.committed : 0);
    }
    return finish(skv, status, cli->user_text, advice_of(status));
}

int cli_flush(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, CHANGE_TIMEOUT_MS);
    if (!skv)
        return CLI_FAILED;
    uint64_t start = skv_now_ns();
    int status = skv_flush(skv);
    if (!status)
        printf("everything committed is stored (%.1f ms)\n", (double)(skv_now_ns() - start) / 1e6);
    return finish(skv, status, "flush", advice_of(status));
}

/* ---- restart ---- */

#define RESTART_MS 60000u

int cli_restart(const struct cli *cli)
{
    struct skv *skv = open_admin(cli, RESTART_MS);
    if (!skv)
        return CLI_FAILED;
    uint32_t before = skv_server(skv)->pid;
    uint64_t start = skv_now_ns();
    int status = skv_restart(skv);
    if (status == SKV_ENOTSUP)
        return finish(skv, status, "restart",
                      "no keeper runs: start the daemon by sidekv-keeper, or restart it by hand");
    while (!status && !skv_lost(skv) && skv_now_ns() - start < RESTART_MS * UINT64_C(1000000))
        poll(NULL, 0, 1);
    if (!status)
        status = skv_lost(skv) ? skv_reconnect(skv, RESTART_MS) : SKV_ETIMEDOUT;
    if (!status)
        printf("restarted: process %u instead of %u, after %.0f ms\n", skv_server(skv)->pid, before,
               (double)(skv_now_ns() - start) / 1e6);
    return finish(skv, status, "restart", advice_of(status));
}
