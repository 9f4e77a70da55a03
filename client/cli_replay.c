/* sidekv replay: its options, and what it does with them: a log, a plan, a daemon, a run, a report.
 *
 *   cli_log, cli_generate, cli_plan   what is replayed
 *   cli_dispatch, cli_result          one run
 *   cli_worker, cli_verify            in each worker process; cli_work.h is between the two
 *   cli_daemon, cli_child             processes
 *   cli_report                        what it says */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "cli_daemon.h"
#include "cli_report.h"
#include "hstu.h"
#include "log.h"
#include "refused.h"

struct options {
    const char *log; /* NULL: generate */
    struct replay_generate generate;
    struct replay_plan_options plan;
    struct replay_run run; /* without log and plan */
    struct replay_daemon_options daemon;
    const char *socket; /* NULL: a daemon of our own */
    bool generated, no_cache, compare, json, help;
};

static const char help[] =
    "usage: sidekv [--socket PATH] replay LOG|--generate [options]\n"
    "\n"
    "Replays a log of what users did as ranking requests that several worker processes serve out "
    "of\n"
    "one cache. LOG is MovieLens ratings.csv or a KuaiRand log, told apart by the header.\n"
    "\n"
    "what to replay\n"
    "  --generate             make a log up:\n"
    "    --users N            of so many users (default 200)\n"
    "    --events-total N     with so many events in all (default 20000)\n"
    "  --events N             new events of a user that make a request (default 8)\n"
    "  --gap SECONDS          also, before he goes on, when he was away so long (default: off)\n"
    "  --candidates N         items to rank a request, at most 4096 (default 128)\n"
    "  --top N                of these to keep, at most 16 (default 10)\n"
    "  --limit-requests N     only the first N requests\n"
    "  --seed N               of weights, candidates, the made-up log (default 1)\n"
    "\n"
    "who serves it\n"
    "  --model NAME           tiny (default), kuairand or bench; random weights\n"
    "  --device NAME          auto (default), host, cuda or cuda:N\n"
    "  --workers N            processes, at most 64 (default 2)\n"
    "  --threads N            CPU threads of each, on the host (default 1)\n"
    "  --batch N              users a pass, at most 64 (default 1, on CUDA 8)\n"
    "  --kill-worker-every N  after every N requests, kill a busy worker and start it again\n"
    "\n"
    "the cache: a private daemon, unless --socket names one\n"
    "  --store DIR            its store, kept afterwards (default: temporary)\n"
    "  --pool-bytes SIZE, --store-bytes SIZE\n"
    "  --protect|--trust      workers can write to extents of their own only; or to the whole "
    "pool\n"
    "  --no-cache             recompute everything, no daemon, none of the options above\n"
    "  --compare              with cache, then without, side by side\n"
    "  --verify FRACTION      recompute that share of requests without cache: scores and cached\n"
    "                         rows must be the same (on CUDA: nearly)\n"
    "  --flip-token           a test of --verify: recompute with one cached token changed\n"
    "\n"
    "  --json                 one object on stdout, its last line\n"
    "  -h, --help\n"
    "\n"
    "Exit status: 0 done; 1 failed, or something was wrong; 2 bad options or log.\n";

/* ---- options ---- */

enum {
    GENERATE = 256,
    USERS,
    EVENTS_TOTAL,
    EVENTS,
    GAP,
    CANDIDATES,
    TOP,
    LIMIT,
    SEED,
    MODEL,
    DEVICE,
    WORKERS,
    THREADS,
    BATCH,
    KILL,
    STORE,
    POOL_BYTES,
    STORE_BYTES,
    PROTECT,
    TRUST,
    NO_CACHE,
    COMPARE,
    VERIFY,
    FLIP,
    SOCKET,
    JSON,
    HELP,
};

static const struct option table[] = {
    {"generate", no_argument, NULL, GENERATE},
    {"users", required_argument, NULL, USERS},
    {"events-total", required_argument, NULL, EVENTS_TOTAL},
    {"events", required_argument, NULL, EVENTS},
    {"gap", required_argument, NULL, GAP},
    {"candidates", required_argument, NULL, CANDIDATES},
    {"top", required_argument, NULL, TOP},
    {"limit-requests", required_argument, NULL, LIMIT},
    {"seed", required_argument, NULL, SEED},
    {"model", required_argument, NULL, MODEL},
    {"device", required_argument, NULL, DEVICE},
    {"workers", required_argument, NULL, WORKERS},
    {"threads", required_argument, NULL, THREADS},
    {"batch", required_argument, NULL, BATCH},
    {"kill-worker-every", required_argument, NULL, KILL},
    {"store", required_argument, NULL, STORE},
    {"pool-bytes", required_argument, NULL, POOL_BYTES},
    {"store-bytes", required_argument, NULL, STORE_BYTES},
    {"protect", no_argument, NULL, PROTECT},
    {"trust", no_argument, NULL, TRUST},
    {"no-cache", no_argument, NULL, NO_CACHE},
    {"compare", no_argument, NULL, COMPARE},
    {"verify", required_argument, NULL, VERIFY},
    {"flip-token", no_argument, NULL, FLIP},
    {"socket", required_argument, NULL, SOCKET},
    {"json", no_argument, NULL, JSON},
    {"help", no_argument, NULL, HELP},
    {0},
};

static int usage(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int usage(const char *format, ...)
{
    va_list arguments;
    fputs("sidekv replay: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputs("\nTry 'sidekv replay --help'.\n", stderr);
    return CLI_USAGE;
}

/* Whole numbers: where each goes, and its range. */
static bool take_number(struct options *o, int option, const char *text)
{
    uint64_t gap_s = 0;
    const struct {
        int option;
        uint64_t least, most;
        uint64_t *wide;
        uint32_t *narrow;
    } numbers[] = {
        {USERS, 1, UINT32_MAX, &o->generate.users, NULL},
        {EVENTS_TOTAL, 1, UINT32_MAX, &o->generate.events, NULL},
        {EVENTS, 1, 1000000, NULL, &o->plan.events},
        {GAP, 1, UINT32_MAX, &gap_s, NULL},
        {CANDIDATES, 1, WORK_CANDIDATES_MAX, NULL, &o->run.header.candidates},
        {TOP, 1, WORK_TOP_MAX, NULL, &o->run.header.top},
        {LIMIT, 1, UINT64_MAX, &o->plan.limit, NULL},
        {SEED, 0, UINT64_MAX, &o->run.header.seed, NULL},
        {WORKERS, 1, REPLAY_WORKERS_MAX, NULL, &o->run.workers},
        {THREADS, 1, 1024, NULL, &o->run.header.threads},
        {BATCH, 1, SKV_MAX_BATCH, NULL, &o->run.header.batch},
        {KILL, 1, UINT64_MAX, &o->run.kill_every, NULL},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (numbers[i].option != option)
            continue;
        errno = 0;
        unsigned long long value = strtoull(text, NULL, 10);
        if (*text == 0 || text[strspn(text, "0123456789")] != 0 || errno != 0 ||
            value < numbers[i].least || value > numbers[i].most)
            return false;
        if (numbers[i].wide)
            *numbers[i].wide = value;
        else
            *numbers[i].narrow = (uint32_t)value;
        if (option == GAP)
            o->plan.gap_ms = (int64_t)gap_s * 1000;
        return true;
    }
    return false;
}

static bool take_fraction(const char *text, double *out)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != 0 || !(value >= 0 && value <= 1))
        return false;
    *out = value;
    return true;
}

static bool take_name(char *into, size_t bytes, const char *name)
{
    if (*name == 0 || strlen(name) >= bytes)
        return false;
    memset(into, 0, bytes);
    memcpy(into, name, strlen(name));
    return true;
}

static bool is_size(const char *text)
{
    size_t digits = strspn(text, "0123456789");
    return digits > 0 &&
           (text[digits] == 0 || (strchr("KMGTkmgt", text[digits]) && !text[digits + 1]));
}

static bool is_device(const char *name)
{
    if (strncmp(name, "cuda:", 5) == 0)
        return name[5] != 0 && name[5 + strspn(name + 5, "0123456789")] == 0;
    return strcmp(name, "auto") == 0 || strcmp(name, "host") == 0 || strcmp(name, "cuda") == 0;
}

/* false: not a value of that option. */
static bool take(struct options *o, int option, const char *value)
{
    switch (option) {
    case GENERATE:
        return o->generated = true;
    case PROTECT:
        o->daemon.protection = "--protect";
        return true;
    case TRUST:
        o->daemon.protection = "--trust";
        return true;
    case NO_CACHE:
        return o->no_cache = true;
    case COMPARE:
        return o->compare = true;
    case FLIP:
        return o->run.flip = true;
    case JSON:
        return o->json = true;
    case HELP:
        return o->help = true;
    case VERIFY:
        return take_fraction(value, &o->run.verify);
    case MODEL:
        o->daemon.model = value;
        return hstu_model_history(value) > 0 &&
               take_name(o->run.header.model, sizeof o->run.header.model, value);
    case DEVICE:
        o->daemon.device = value;
        return is_device(value) &&
               take_name(o->run.header.device, sizeof o->run.header.device, value);
    case STORE:
        o->daemon.store = value;
        return *value != 0;
    case POOL_BYTES:
        o->daemon.pool_bytes = value;
        return is_size(value);
    case STORE_BYTES:
        o->daemon.store_bytes = value;
        return is_size(value);
    case SOCKET:
        o->socket = value;
        return *value != 0;
    default:
        return take_number(o, option, value);
    }
}

/* Options that contradict each other, or lack what they need. */
static int check_options(const struct options *o, uint64_t given)
{
    bool own =
        o->daemon.store || o->daemon.pool_bytes || o->daemon.store_bytes || o->daemon.protection;
    if (o->generated == (o->log != NULL))
        return usage(o->log ? "LOG and --generate exclude each other"
                            : "what to replay? Name a LOG, or --generate one");
    if (!o->generated && given & (1u << (USERS - GENERATE) | 1u << (EVENTS_TOTAL - GENERATE)))
        return usage("--users and --events-total are for --generate");
    if (o->generated && o->generate.events < o->generate.users)
        return usage("--events-total: at least one event a user, %" PRIu64, o->generate.users);
    if (o->no_cache && (o->run.verify > 0 || o->compare || o->socket))
        return usage("--no-cache uses no daemon, and leaves nothing to verify or compare");
    if (own && (o->socket || o->no_cache))
        return usage("--store, --pool-bytes, --store-bytes, --protect and --trust are for a daemon "
                     "of replay's own, %s",
                     o->socket ? "not for the one at --socket" : "and --no-cache has none");
    if (o->run.flip && o->run.verify == 0)
        return usage("--flip-token is found by --verify");
    if (o->socket && strlen(o->socket) >= sizeof o->run.header.socket)
        return usage("--socket: longer than %zu bytes", sizeof o->run.header.socket - 1);
    return CLI_OK;
}

static int parse(int argc, char **argv, struct options *o)
{
    static const char letters[] = ":h";
    uint64_t given = 0;
    optind = 0;
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, letters, table, NULL)) != -1;) {
        if (option == ':')
            return usage("a value is missing: %s", argv[optind - 1]);
        if (option == '?')
            return usage("no such option: %s", skv_refused_option(argv, letters));
        if (option == 'h')
            option = HELP;
        if (!take(o, option, optarg))
            return usage("not a value of --%s: %s", table[option - GENERATE].name, optarg);
        given |= UINT64_C(1) << (option - GENERATE);
    }
    if (o->help)
        return CLI_OK;
    if (optind < argc)
        o->log = argv[optind++];
    if (optind < argc)
        return usage("one LOG at a time: %s", argv[optind]);
    return check_options(o, given);
}

/* ---- what is replayed ---- */

static int load(const struct options *o, struct replay_log *log)
{
    if (o->generated)
        return replay_log_generate(&o->generate, log);
    FILE *in = fopen(o->log, "r");
    if (!in) {
        fprintf(stderr, "sidekv replay: %s: %s\n", o->log, strerror(errno));
        return SKV_ENOENT;
    }
    int rc = replay_log_read(in, o->log, stderr, log);
    fclose(in);
    return rc;
}

static int prepare(struct options *o, struct replay_log *log, struct replay_plan *plan)
{
    int rc = load(o, log);
    if (!rc)
        rc = replay_plan_make(log, &o->plan, plan);
    if (rc == SKV_ENOMEM)
        fprintf(stderr, "sidekv replay: %s\n", skv_strerror(rc));
    if (!rc && plan->count == 0) {
        fprintf(stderr, "sidekv replay: no user has %u events: no request\n", o->plan.events);
        rc = SKV_EINVAL;
    }
    if (rc)
        return rc == SKV_ENOMEM || rc == SKV_EIO ? CLI_FAILED : CLI_USAGE;
    if (o->run.header.candidates > log->item_count) {
        o->run.header.candidates = (uint32_t)log->item_count;
        fprintf(stderr, "sidekv replay: the log has only %u items to rank\n",
                o->run.header.candidates);
    }
    o->run.log = log;
    o->run.plan = plan;
    return CLI_OK;
}

/* ---- runs ---- */

/* Is anybody there? Workers would wait for a daemon that is being restarted. */
static int greet_daemon(const char *socket)
{
    struct skv *skv;
    int rc = skv_open(&(struct skv_options){.socket = socket, .admin = true}, &skv);
    if (rc == 0)
        skv_close(skv);
    return rc;
}

static int run_cached(struct options *o, struct replay_result *result)
{
    struct replay_daemon daemon = {0};
    const char *path = o->socket ? o->socket : daemon.socket;
    int rc = o->socket ? greet_daemon(path) : replay_daemon_start(&o->daemon, &daemon);
    if (rc)
        return rc;
    struct replay_run run = o->run;
    run.name = "cached";
    take_name(run.header.socket, sizeof run.header.socket, path);
    run.header.verify = run.verify > 0;
    rc = replay_dispatch(&run, result);
    int ended = o->socket ? 0 : replay_daemon_stop(&daemon);
    o->run.header = run.header; /* the report shows where it ran */
    return rc ? rc : ended;
}

static int run_uncached(const struct options *o, struct replay_result *result)
{
    struct replay_run run = o->run;
    run.name = "uncached";
    run.verify = 0;
    run.flip = false;
    memset(run.header.socket, 0, sizeof run.header.socket);
    run.header.verify = false;
    return replay_dispatch(&run, result);
}

static void print_json(json_t *all)
{
    if (all)
        json_dumpf(all, stdout, JSON_COMPACT | JSON_REAL_PRECISION(8));
    putchar('\n');
    json_decref(all);
}

/* The object of a comparison is the cached run's, with the uncached run's as a member. */
static json_t *pair_json(const struct replay_run *run, const struct replay_result *cached,
                         const struct replay_result *uncached)
{
    struct replay_run other = *run;
    other.header.socket[0] = 0;
    json_t *all = replay_report_json(run, cached);
    json_object_set_new(all, "uncached", replay_report_json(&other, uncached));
    json_object_set_new(all, "scores_same", json_boolean(cached->digest == uncached->digest));
    return all;
}

static int run_all(struct options *o)
{
    struct replay_result result = {0}, uncached = {0};
    int rc = o->no_cache ? run_uncached(o, &result) : run_cached(o, &result);
    if (!rc && o->compare)
        rc = run_uncached(o, &uncached);
    bool wrong = result.scores_wrong || result.rows_wrong;
    if (result.requests > 0)
        replay_report(&o->run, &result);
    if (!rc && o->compare) {
        replay_report_pair(&o->run, &result, &uncached);
        wrong = wrong || (!result.cuda && result.digest != uncached.digest);
    }
    if (rc == SKV_EAGAIN)
        fprintf(stderr, "sidekv replay: interrupted\n");
    else if (rc)
        fprintf(stderr, "sidekv replay: failed: %s\n",
                rc == SKV_ELOST ? "no daemon, or it did not live to the end" : skv_strerror(rc));
    if (wrong)
        fprintf(stderr, "sidekv replay: WRONG: %" PRIu64 " scores, %" PRIu64 " rows\n",
                result.scores_wrong, result.rows_wrong);
    if (o->json && result.requests > 0)
        print_json(!rc && o->compare ? pair_json(&o->run, &result, &uncached)
                                     : replay_report_json(&o->run, &result));
    replay_result_close(&result);
    replay_result_close(&uncached);
    return rc || wrong ? CLI_FAILED : CLI_OK;
}

int cli_replay(int argc, char **argv, const char *socket)
{
    if (argc == 2 && strcmp(argv[1], WORK_ARGUMENT) == 0)
        return replay_worker();
    struct options o = {
        .generate = {.users = 200, .events = 20000},
        .plan = {.events = 8},
        .run = {.workers = 2,
                .header = {.model = "tiny",
                           .device = "auto",
                           .seed = 1,
                           .threads = 1,
                           .candidates = 128,
                           .top = 10}},
        .daemon = {.model = "tiny", .device = "auto"},
        .socket = socket,
    };
    int status = parse(argc, argv, &o);
    if (status)
        return status;
    if (o.help) {
        fputs(help, stdout);
        return CLI_OK;
    }
    o.generate.seed = o.run.header.seed;
    o.run.header.history = o.plan.history_tokens = hstu_model_history(o.run.header.model);

    struct replay_log log = {0};
    struct replay_plan plan = {0};
    status = prepare(&o, &log, &plan);
    if (status == CLI_OK) {
        replay_catch_signals();
        status = run_all(&o);
    }
    replay_plan_close(&plan);
    replay_log_close(&log);
    return status;
}
