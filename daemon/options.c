#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <unistd.h>

#include "refused.h"

#define GIB (UINT64_C(1) << 30)
#define MIB (UINT64_C(1) << 20)

static const struct {
    const char *name;
    struct skv_geometry geometry;
} models[] = {
    {"tiny", {.layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32}},
    {"kuairand", {.layers = 3, .heads = 4, .head_dim = 128, .page_tokens = 32}},
    {"bench", {.layers = 8, .heads = 4, .head_dim = 256, .page_tokens = 32}},
};

static const char help[] =
    "usage: sidekvd [options]\n"
    "The daemon of sidekv: owns the KV pages of one device and the store behind them.\n"
    "\n"
    "  --socket PATH        listen here (default $SIDEKV_SOCKET, else " SKV_DEFAULT_SOCKET ")\n"
    "  --store DIR|none     LMDB store (default /var/lib/sidekv); none: pages live in the pool "
    "only\n"
    "  --device NAME        auto, host, cuda or cuda:N (default auto: the first GPU, else the "
    "host)\n"
    "  --model NAME         geometry of tiny (default), kuairand or bench; or each by itself:\n"
    "  --layers N --heads N --head-dim 64|128|256 --page-tokens 16|32|64|128\n"
    "  --export fd|ipc      how workers get the pool: POSIX fds (default), or one CUDA IPC handle\n"
    "  --protect|--trust    workers map the pool read-only, but for extents of their own to append "
    "to\n"
    "                       (with fds only); or all of it for writing. Default: protected, where "
    "the\n"
    "                       pool comes to 16 extents or more\n"
    "  --pool-bytes SIZE    KV pages (default: CUDA free memory less the larger of 8G and a "
    "quarter;\n"
    "                       but 64 pages; host: an eighth of the memory, at most 4G)\n"
    "  --store-bytes SIZE   the store's map (default: 80 % of the free disk, at most 256G)\n"
    "  --pin-bytes SIZE     of the map registered for the device to read in place (default: a "
    "quarter\n"
    "                       of the memory, at most 32G; on the host a sixteenth)\n"
    "  --staging-bytes SIZE pinned memory for copies (default 512M; on the host 64M)\n"
    "  --durability LEVEL   process (default: survives kill -9) or power (survives power loss)\n"
    "  --tail-ms MS         store a half-filled page this long after its last append (default "
    "1000)\n"
    "  --lease-ms MS        fence an append lease held longer, when another worker wants it\n"
    "                       (default 5000)\n"
    "  --spin-us US         spin this long before sleeping (default 50; 0 on fewer than 4 cores)\n"
    "  --start-wait MS      wait this long for socket, store and memory that an earlier daemon "
    "still\n"
    "                       holds (default 5000)\n"
    "  --stop-wait MS       at SIGTERM store for this long at most, also where the store refuses\n"
    "                       (default 60000)\n"
    "  --standby WHEN       under sidekv-keeper: start the next daemon as soon as this one serves; "
    "it\n"
    "                       opens its device and waits. on, off, or auto (default): on with a GPU\n"
    "  --max-users N        users known at one time, 1024 to 268435456 (default 16777216)\n"
    "  --epoll              do not use io_uring\n"
    "  --help, --version\n"
    "\n"
    "SIZE takes K, M, G or T (powers of 1024). SIGTERM stores what is not stored yet and ends.\n"
    "SIDEKV_LOG=error|warn|info|debug sets what is logged to stderr. See sidekvd(8).\n";

enum {
    OPT_SOCKET = 256,
    OPT_STORE,
    OPT_DEVICE,
    OPT_MODEL,
    OPT_LAYERS,
    OPT_HEADS,
    OPT_HEAD_DIM,
    OPT_PAGE_TOKENS,
    OPT_EXPORT,
    OPT_PROTECT,
    OPT_TRUST,
    OPT_POOL,
    OPT_STORE_BYTES,
    OPT_PIN,
    OPT_STAGING,
    OPT_DURABILITY,
    OPT_TAIL,
    OPT_LEASE,
    OPT_SPIN,
    OPT_START_WAIT,
    OPT_STOP_WAIT,
    OPT_STANDBY,
    OPT_MAX_USERS,
    OPT_EPOLL,
    OPT_HELP,
    OPT_VERSION,
};

static const struct option table[] = {
    {"socket", required_argument, NULL, OPT_SOCKET},
    {"store", required_argument, NULL, OPT_STORE},
    {"device", required_argument, NULL, OPT_DEVICE},
    {"model", required_argument, NULL, OPT_MODEL},
    {"layers", required_argument, NULL, OPT_LAYERS},
    {"heads", required_argument, NULL, OPT_HEADS},
    {"head-dim", required_argument, NULL, OPT_HEAD_DIM},
    {"page-tokens", required_argument, NULL, OPT_PAGE_TOKENS},
    {"export", required_argument, NULL, OPT_EXPORT},
    {"protect", no_argument, NULL, OPT_PROTECT},
    {"trust", no_argument, NULL, OPT_TRUST},
    {"pool-bytes", required_argument, NULL, OPT_POOL},
    {"store-bytes", required_argument, NULL, OPT_STORE_BYTES},
    {"pin-bytes", required_argument, NULL, OPT_PIN},
    {"staging-bytes", required_argument, NULL, OPT_STAGING},
    {"durability", required_argument, NULL, OPT_DURABILITY},
    {"tail-ms", required_argument, NULL, OPT_TAIL},
    {"lease-ms", required_argument, NULL, OPT_LEASE},
    {"spin-us", required_argument, NULL, OPT_SPIN},
    {"start-wait", required_argument, NULL, OPT_START_WAIT},
    {"stop-wait", required_argument, NULL, OPT_STOP_WAIT},
    {"standby", required_argument, NULL, OPT_STANDBY},
    {"max-users", required_argument, NULL, OPT_MAX_USERS},
    {"epoll", no_argument, NULL, OPT_EPOLL},
    {"help", no_argument, NULL, OPT_HELP},
    {"version", no_argument, NULL, OPT_VERSION},
    {NULL, 0, NULL, 0},
};

/* A whole number with a unit letter, or -1. */
static int64_t number(const char *text, bool units)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    unsigned shift = 0;
    if (units && *end) {
        const char *letters = "KMGT", *at = strchr(letters, *end >= 'a' ? *end - 32 : *end);
        if (!at)
            return -1;
        shift = 10 * (unsigned)(at - letters + 1);
        end++;
    }
    bool digits = *text >= '0' && *text <= '9';
    if (!digits || *end || errno || value > (UINT64_C(1) << 62) >> shift)
        return -1;
    return (int64_t)(value << shift);
}

static int choice(const char *text, const char *const names[], int count)
{
    for (int i = 0; i < count; i++)
        if (strcmp(text, names[i]) == 0)
            return i;
    return -1;
}

/* Where a plain number of 32 bits goes; NULL: another kind of option. */
static uint32_t *plain(struct options *o, int option)
{
    switch (option) {
    case OPT_LAYERS:
        return &o->geometry.layers;
    case OPT_HEADS:
        return &o->geometry.heads;
    case OPT_HEAD_DIM:
        return &o->geometry.head_dim;
    case OPT_PAGE_TOKENS:
        return &o->geometry.page_tokens;
    case OPT_TAIL:
        return &o->tail_ms;
    case OPT_LEASE:
        return &o->lease_ms;
    case OPT_SPIN:
        return &o->spin_us;
    case OPT_START_WAIT:
        return &o->start_wait_ms;
    case OPT_STOP_WAIT:
        return &o->stop_wait_ms;
    case OPT_MAX_USERS:
        return &o->max_users;
    default:
        return NULL;
    }
}

static uint64_t *size(struct options *o, int option)
{
    switch (option) {
    case OPT_POOL:
        return &o->pool_bytes;
    case OPT_STORE_BYTES:
        return &o->store_bytes;
    case OPT_PIN:
        return &o->pin_bytes;
    case OPT_STAGING:
        return &o->staging_bytes;
    default:
        return NULL;
    }
}

/* Has it a name's form? Whether there is such a device is found out by opening it. */
static bool is_device(const char *name)
{
    if (strncmp(name, "cuda:", 5) == 0)
        return number(name + 5, false) >= 0;
    return strcmp(name, "auto") == 0 || strcmp(name, "host") == 0 || strcmp(name, "cuda") == 0;
}

/* false: the value is not one of its option. */
static bool take(struct options *o, int option, const char *value)
{
    static const char *const exports[] = {"fd", "ipc"}, *const levels[] = {"process", "power"},
                             *const standbys[] = {"auto", "on", "off"};
    if (plain(o, option) || size(o, option)) {
        int64_t n = number(value, size(o, option) != NULL);
        if (n < 0 || (plain(o, option) && n > UINT32_MAX))
            return false;
        if (plain(o, option))
            *plain(o, option) = (uint32_t)n;
        else
            *size(o, option) = (uint64_t)n;
        return true;
    }
    int picked = 0;
    switch (option) {
    case OPT_SOCKET:
        o->socket = value;
        return true;
    case OPT_STORE:
        o->store = strcmp(value, "none") ? value : NULL;
        return true;
    case OPT_DEVICE:
        o->device = value;
        return is_device(value);
    case OPT_MODEL:
        for (size_t i = 0; i < sizeof models / sizeof *models; i++)
            if (strcmp(value, models[i].name) == 0) {
                o->geometry = models[i].geometry;
                return true;
            }
        return false;
    case OPT_EXPORT:
        o->export = (enum skv_export)(picked = choice(value, exports, 2));
        return picked >= 0;
    case OPT_DURABILITY:
        o->durability = (enum skv_durability)(picked = choice(value, levels, 2));
        return picked >= 0;
    case OPT_STANDBY:
        o->standby = (enum standby)(picked = choice(value, standbys, 3));
        return picked >= 0;
    case OPT_PROTECT:
        o->protection = PROTECTION_ON;
        return true;
    case OPT_TRUST:
        o->protection = PROTECTION_OFF;
        return true;
    case OPT_EPOLL:
        return o->epoll = true;
    default:
        return false;
    }
}

static int usage(const char *what, const char *value)
{
    fprintf(stderr, "sidekvd: %s%s%s\nTry 'sidekvd --help'.\n", what, value ? ": " : "",
            value ? value : "");
    return 2;
}

int options_parse(int argc, char **argv, struct options *out)
{
    const char *socket = getenv("SIDEKV_SOCKET");
    *out = (struct options){
        .socket = socket && *socket ? socket : SKV_DEFAULT_SOCKET,
        .store = "/var/lib/sidekv",
        .device = "auto",
        .geometry = models[0].geometry,
        .tail_ms = 1000,
        .lease_ms = 5000,
        .spin_us = sysconf(_SC_NPROCESSORS_ONLN) < 4 ? 0 : 50,
        .start_wait_ms = 5000,
        .stop_wait_ms = 60000,
        .max_users = 1u << 24,
    };
    int option, index = 0;
    opterr = 0;
    while ((option = getopt_long(argc, argv, "", table, &index)) != -1) {
        if (option == OPT_HELP)
            return fputs(help, stdout) < 0 || fflush(stdout);
        if (option == OPT_VERSION)
            return puts("sidekvd " SKV_VERSION) < 0 || fflush(stdout);
        if (option == '?')
            return usage("unknown option or missing value", skv_refused_option(argv, ""));
        if (!take(out, option, optarg)) {
            char what[64];
            snprintf(what, sizeof what, "not a value of --%s", table[index].name);
            return usage(what, optarg);
        }
    }
    if (optind < argc)
        return usage("unexpected argument", argv[optind]);
    if (!*out->socket)
        return usage("--socket takes a path", NULL);
    if (strlen(out->socket) >= sizeof((struct sockaddr_un *)0)->sun_path)
        return usage("the socket's path is longer than 107 bytes", out->socket);
    if (skv_geometry_check(&out->geometry))
        return usage(
            "a geometry has 1 to 64 layers and heads, head dim 64, 128 or 256, and 16, 32, "
            "64 or 128 tokens a page",
            NULL);
    if (out->protection == PROTECTION_ON && out->export != SKV_EXPORT_FD)
        return usage("--protect needs --export fd", NULL);
    if (out->max_users < 1024 || out->max_users > 1u << 28)
        return usage("--max-users takes 1024 to 268435456", NULL);
    return -1;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

uint64_t options_staging(const struct options *o, struct skv_device *device)
{
    uint64_t eight_pages = 8 * (skv_page_bytes(&o->geometry) + 8192), bytes = o->staging_bytes;
    if (!bytes)
        bytes = skv_device_info(device)->kind == SKV_DEVICE_CUDA ? 512 * MIB : 64 * MIB;
    return bytes < eight_pages ? eight_pages : bytes;
}

/* A quarter, or 8 GiB where that is more, is left to the workers' models. */
static uint64_t gpu_pool(struct options *o, uint64_t free_bytes)
{
    uint64_t room = free_bytes / 4 > 8 * GIB ? free_bytes / 4 : 8 * GIB;
    uint64_t least_bytes = OPTIONS_LEAST_PAGES * skv_page_bytes(&o->geometry);
    o->gpu_free_bytes = free_bytes;
    o->least_pool = free_bytes < room + least_bytes;
    return o->least_pool ? least_bytes : free_bytes - room;
}

void options_defaults(struct options *o, struct skv_device *device)
{
    bool cuda = skv_device_info(device)->kind == SKV_DEVICE_CUDA;
    /* For tests, on the host: as on a GPU of which so many bytes are free. */
    const char *played = getenv("SIDEKV_TEST_GPU_FREE");
    uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    if (!o->pool_bytes && (cuda || played)) {
        o->pool_bytes =
            gpu_pool(o, cuda ? skv_device_free_bytes(device) : strtoull(played, NULL, 10));
    } else if (!o->pool_bytes) {
        o->pool_bytes = least(memory / 8, 4 * GIB);
    }
    if (!o->store_bytes) {
        struct statvfs disk;
        /* the directory may not exist yet: then its parent's disk, and failing that a modest size
         */
        char path[4096];
        snprintf(path, sizeof path, "%s", o->store ? o->store : "/");
        bool known = statvfs(path, &disk) == 0;
        char *slash = strrchr(path, '/');
        if (!known && slash) {
            slash[slash == path] = 0;
            known = statvfs(path, &disk) == 0;
        }
        uint64_t room = known ? (uint64_t)disk.f_bavail * disk.f_frsize / 5 * 4 : 16 * GIB;
        o->store_bytes = least(room, 256 * GIB);
        if (o->store_bytes < 64 * MIB)
            o->store_bytes = 64 * MIB;
    }
    if (!o->pin_bytes)
        o->pin_bytes = cuda ? least(memory / 4, 32 * GIB) : memory / 16;
    o->staging_bytes = options_staging(o, device);
}
