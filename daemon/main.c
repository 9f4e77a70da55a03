/* sidekvd: opens the device, the pool and the socket, has the store opened and read (arrival.c),
 * and serves. */
#include "daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "failpoint.h"
#include "log.h"
#include "notify.h"
#include "sigbus.h"

#define PROTECT_EXTENTS 128u /* of a protected pool: several for each of many workers */
#define PROTECT_FEW     16u  /* fewer: too few for workers to have some each */
#define PIN_AFTER_MS    100  /* later than that a killed daemon is seldom gone */
#define ARRIVAL_NS                                                                                 \
    UINT64_C(50000000) /* a hot restart waits for its store, from its claim on: small ones are     \
                          there, and no request is served without */

/* Makes the directory that the path lies in, if it is missing: one level, as a runtime directory
 * is. */
static void make_parent(const char *path)
{
    char parent[4096];
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (!slash || slash == parent)
        return;
    *slash = 0;
    mkdir(parent, 0755); /* what is wrong with it, bind() or the store says */
}

/* Is the start to end, now or within `wait_ms`? See skv_start_signals(). */
static bool told_to_end(const struct daemon *daemon, int wait_ms)
{
    struct pollfd told = {.fd = skv_start_signals(daemon), .events = POLLIN};
    return poll(&told, 1, wait_ms) == 1;
}

/* An earlier daemon that is still ending holds its locks and memory for a moment. */
static bool worth_waiting(struct daemon *daemon, const char *what)
{
    if (skv_now_ns() >= daemon->start_by_ns || told_to_end(daemon, 0))
        return false;
    if (daemon->awaited != what)
        skv_info("waiting for an earlier daemon's %s, for %u ms at most", what,
                 daemon->options.start_wait_ms);
    daemon->awaited = what;
    return !told_to_end(daemon, 200);
}

/* Takes the socket's path for this daemon's life, by a lock beside it: whoever holds that may
 * replace a stale socket. */
static int claim(struct daemon *daemon)
{
    const char *path = daemon->options.socket;
    char lock[4096];
    make_parent(path);
    snprintf(lock, sizeof lock, "%s.lock", path);
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
        skv_error("cannot make %s: %s; choose another --socket", lock, strerror(errno));
        return SKV_EIO;
    }
    int taken;
    while ((taken = flock(fd, LOCK_EX | LOCK_NB)) && worth_waiting(daemon, "socket"))
        ;
    if (taken) {
        if (!told_to_end(daemon, 0))
            skv_error("%s: another daemon listens there; stop it, or choose another --socket",
                      path);
        close(fd);
        return SKV_EBUSY;
    }
    return SKV_OK; /* held until the process ends */
}

/* Returns a socket that is bound to the path. */
static int bind_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, path, strlen(path)); /* options_parse() saw that it fits */
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        skv_error("socket: %s", strerror(errno));
        return SKV_EIO;
    }
    struct stat old;
    if (lstat(path, &old) == 0 && S_ISSOCK(old.st_mode))
        unlink(path); /* an earlier daemon's: its lock is ours */
    /* The file gets the socket's mode: umask() would be every thread's. */
    if (fchmod(fd, 0600) || bind(fd, (struct sockaddr *)&address, sizeof address)) {
        skv_error("cannot listen at %s: %s; choose another --socket", path, strerror(errno));
        close(fd);
        return SKV_EIO;
    }
    return fd;
}

/* Before anything is made that is to be served there: a path that does not do ends the start. */
static int try_socket(const char *path)
{
    int fd = bind_at(path);
    if (fd < 0)
        return fd;
    unlink(path); /* there is one when it is listened at */
    close(fd);
    return SKV_OK;
}

/* The last step of the start: who can connect is served. */
static int listen_at(const char *path)
{
    int fd = bind_at(path);
    if (fd >= 0 && listen(fd, 128)) {
        skv_error("cannot listen at %s: %s", path, strerror(errno));
        unlink(path);
        close(fd);
        return SKV_EIO;
    }
    return fd;
}

/* The descriptor table: a memfd. *made: for the keeper; -1: it came from there. */
static int make_table(struct daemon *daemon, uint64_t pages, int *made)
{
    *made = -1;
    if (daemon->kept.adopted)
        return SKV_OK;
    daemon->table_bytes = sizeof *daemon->table + pages * sizeof *daemon->table->entries;
    int fd = memfd_create("sidekv-pages", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)daemon->table_bytes) ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
        skv_error("page descriptors: %s", strerror(errno));
        if (fd >= 0)
            close(fd);
        return SKV_ENOMEM;
    }
    daemon->table = mmap(NULL, daemon->table_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (daemon->table == MAP_FAILED) {
        skv_error("page descriptors: %s", strerror(errno));
        close(fd);
        return SKV_ENOMEM;
    }
    *made = fd;
    return SKV_OK;
}

/* Nobody asked for a pool as small as the default is then. */
static void warn_of_least_pool(const struct options *o)
{
    if (o->least_pool)
        skv_warn("a pool of only %u pages: %llu MiB of the GPU are free, and the default leaves "
                 "8192. Free some, or say how much the pool may take: --pool-bytes",
                 OPTIONS_LEAST_PAGES, (unsigned long long)o->gpu_free_bytes >> 20);
}

/* An earlier daemon's memory may take a moment to go away after it died: tries for --start-wait. */
static int make_pool(struct daemon *daemon)
{
    struct options *o = &daemon->options;
    const struct skv_device_info *device = skv_device_info(daemon->device);
    bool split = o->protection != PROTECTION_OFF && o->export == SKV_EXPORT_FD;
    int taken = skv_kept_take_pool(daemon);
    if (taken != SKV_ENOENT)
        return taken;
    if (device->kind == SKV_DEVICE_HOST && o->pool_bytes > device->total_bytes) {
        skv_error("--pool-bytes %llu is more than this machine's memory (%llu)",
                  (unsigned long long)o->pool_bytes, (unsigned long long)device->total_bytes);
        return SKV_ENOMEM;
    }
    warn_of_least_pool(o);
    for (;;) {
        uint64_t page_bytes = skv_page_bytes(&o->geometry);
        int status = split ? skv_pool_create_split(daemon->device, o->pool_bytes, page_bytes,
                                                   PROTECT_EXTENTS, &daemon->pool)
                           : skv_pool_create(daemon->device, o->pool_bytes, page_bytes, o->export,
                                             &daemon->pool);
        if (status != SKV_ENOMEM || !worth_waiting(daemon, "memory"))
            return status;
    }
}

/* For the pool that there is, which an earlier daemon may have made with other options. */
static void decide_protection(struct daemon *daemon)
{
    enum protection wanted = daemon->options.protection;
    const struct skv_pool_handles *pool = skv_pool_exported(daemon->pool);
    bool few = pool->extents < PROTECT_FEW;
    daemon->protect = wanted == PROTECTION_ON || (wanted == PROTECTION_AUTO && !few);
    if (wanted == PROTECTION_ON && few)
        skv_warn("--protect: %u extents are few: each worker needs some of its own. A larger "
                 "--pool-bytes makes more",
                 pool->extents);
    else if (wanted == PROTECTION_AUTO && pool->export != SKV_EXPORT_FD)
        skv_warn("not protected: with --export ipc a worker's stray write can hit any page. "
                 "--export fd protects; --trust says that it is meant");
    else if (wanted == PROTECTION_AUTO && few)
        skv_warn("not protected: a worker's stray write can hit any page, since %u extents are too "
                 "few for workers to have some of their own. A larger --pool-bytes makes more; "
                 "--trust says that it is meant",
                 pool->extents);
}

/* Forks the process that checks the store: before there are threads or a device. */
static int prepare_store(struct daemon *daemon)
{
    const struct options *o = &daemon->options;
    return o->store ? skv_store_prepare(
                          &(struct skv_store_options){.path = o->store, .geometry = o->geometry},
                          &daemon->claimed)
                    : SKV_OK;
}

/* Its check runs from here on. */
static int claim_store(struct daemon *daemon)
{
    if (!daemon->claimed)
        return SKV_OK;
    make_parent(daemon->options.store);
    int status;
    while ((status = skv_store_claim(daemon->claimed)) == SKV_EBUSY &&
           worth_waiting(daemon, "store"))
        ;
    if (status == SKV_EBUSY && !told_to_end(daemon, 0))
        skv_error("store %s: another sidekvd is using it; stop that one first",
                  daemon->options.store);
    return status;
}

/* All that there is one of: waits until whoever had it before is gone. */
static int claim_all(struct daemon *daemon)
{
    int status = skv_kept_take(daemon);
    daemon->free_ns = skv_now_ns();
    daemon->session_ids = daemon->free_ns; /* never an id of an earlier daemon */
    daemon->start_by_ns = daemon->free_ns + (uint64_t)daemon->options.start_wait_ms * 1000000;
    if (!status)
        status = claim(daemon);
    if (!status)
        status = try_socket(daemon->options.socket);
    return status ? status : claim_store(daemon);
}

static void open_device(struct daemon *daemon)
{
    daemon->device_ns[0] = skv_now_ns();
    daemon->device_status = skv_device_open(daemon->options.device, &daemon->device);
    daemon->device_ns[1] = skv_now_ns();
}

/* Pinned memory takes a GPU's driver longest, and holds up every other call meanwhile: who still
 * waits for its turn makes it now. Else, or if that fails, the mover does. */
static void pin_staging(struct daemon *daemon)
{
    struct pollfd turn = {.fd = daemon->turn, .events = POLLIN};
    if (!daemon->device_status && daemon->options.store && poll(&turn, 1, PIN_AFTER_MS) == 0 &&
        skv_pinned_alloc(daemon->device, options_staging(&daemon->options, daemon->device),
                         &daemon->staging))
        daemon->staging = NULL;
}

static void *open_device_meanwhile(void *context)
{
    struct daemon *daemon = context;
    open_device(daemon);
    pin_staging(daemon);
    eventfd_write(daemon->device_bell, 1);
    return NULL;
}

/* A GPU takes longer to open than all the rest of a start, and can be while an earlier daemon still
 * has it: a thread does it. */
static int claim_all_and_open_device(struct daemon *daemon)
{
    pthread_t opener;
    daemon->device_bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    daemon->turn = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int error = pthread_create(&opener, NULL, open_device_meanwhile, daemon);
    if (error) {
        skv_error("starting a thread for the device: %s", strerror(error));
        return SKV_ENOMEM;
    }
    int status = claim_all(daemon);
    eventfd_write(daemon->turn, 1);
    pthread_join(opener, NULL);
    close(daemon->device_bell);
    close(daemon->turn);
    if (status)
        return status;
    if (told_to_end(daemon, 0))
        return SKV_EAGAIN;
    while (daemon->device_status == SKV_ENOMEM && worth_waiting(daemon, "memory"))
        open_device(daemon);
    const uint64_t *ns = daemon->device_ns;
    skv_debug(
        "the device was open after %llu ms, %llu ms after the daemon of before was gone",
        (unsigned long long)((ns[1] - ns[0]) / 1000000),
        (unsigned long long)(ns[1] > daemon->free_ns ? (ns[1] - daemon->free_ns) / 1000000 : 0));
    return daemon->device_status;
}

/* After a hot restart: the users whose pages are in the pool already. */
static void adopt_users(struct daemon *daemon)
{
    uint64_t begin = skv_now_ns();
    skv_cache_time(daemon->cache, begin / 1000000, (uint32_t)time(NULL));
    uint32_t users = skv_cache_adopt(daemon->cache, daemon->kept.unsettled > 0);
    skv_info("%u users in the pool that an earlier daemon left, found in %llu ms; %u of its "
             "sessions may still be running",
             users, (unsigned long long)((skv_now_ns() - begin) / 1000000), daemon->kept.unsettled);
}

static int open_cache(struct daemon *daemon)
{
    const struct options *o = &daemon->options;
    uint64_t pages = daemon->table->pages;
    uint64_t extent_bytes = skv_pool_exported(daemon->pool)->extent_bytes;
    uint32_t extent_pages =
        daemon->protect ? (uint32_t)(extent_bytes / skv_page_bytes(&o->geometry)) : 0;
    int status =
        skv_cache_open(&(struct skv_cache_options){.geometry = o->geometry,
                                                   .pages = (uint32_t)pages,
                                                   .extent_pages = extent_pages,
                                                   .sessions = SKV_MAX_SESSIONS,
                                                   .max_records = o->max_users,
                                                   .generation = daemon->table->generation + 1,
                                                   .lease_ms = o->lease_ms,
                                                   .tail_ms = o->tail_ms,
                                                   .store = o->store != NULL,
                                                   .table = daemon->table},
                       &daemon->cache);
    if (!status && daemon->kept.adopted)
        adopt_users(daemon);
    if (!status && !o->store)
        skv_cache_restored(daemon->cache, UINT32_MAX); /* nothing is */
    return status;
}

static int open_all(struct daemon *daemon)
{
    struct options *o = &daemon->options;
    const char *what;
    int status = prepare_store(daemon);
    if (status || (status = skv_kept_open(daemon)) ||
        (status = loop_open(&daemon->loop, o->epoll, &what)))
        return status;
    daemon->stats.epoll = strcmp(what, "epoll") == 0;
    daemon->pool_requested = o->pool_bytes;
    if ((status = claim_all_and_open_device(daemon)))
        return status;
    if (skv_device_info(daemon->device)->mps)
        skv_warn("this daemon runs under MPS: " SKV_MPS_RISK);
    options_defaults(o, daemon->device);
    /* For tests, on the host backend: copies as slow as a slow device's. */
    const char *delay = getenv("SIDEKV_TEST_COPY_DELAY_US");
    if (delay)
        skv_device_delay(daemon->device, strtoull(delay, NULL, 10));
    if ((status = make_pool(daemon)))
        return status;
    uint64_t page_bytes = skv_page_bytes(&o->geometry);
    uint64_t pages = skv_pool_exported(daemon->pool)->pool_bytes / page_bytes;
    if (pages >= UINT32_MAX) {
        skv_error("a pool of %llu pages is more than the %u that page ids can name",
                  (unsigned long long)pages, UINT32_MAX - 1);
        return SKV_EINVAL;
    }
    decide_protection(daemon);
    int made;
    if ((status = make_table(daemon, pages, &made)))
        return status;
    daemon->table->pages = pages;
    /* A new pool has nothing to serve; that of an earlier daemon is not kept from anybody. */
    if ((status = open_cache(daemon)) || (status = skv_arrival_start(daemon)) ||
        (status = skv_arrival_await(daemon, daemon->kept.adopted ? daemon->free_ns + ARRIVAL_NS
                                                                 : UINT64_MAX)))
        return status;
    if (made >= 0) { /* no keeper has the pool of a start that fails */
        skv_kept_hand_over(daemon, made);
        close(made);
    }
    skv_kept_watch(daemon);
    skv_failpoint(FAIL_start_listening);
    if ((daemon->listener = status = listen_at(o->socket)) < 0)
        return status;
    skv_info("%s at %s: %s, %llu pages of %llu KiB, store %s, %s", SKV_VERSION, o->socket,
             skv_device_info(daemon->device)->name, (unsigned long long)pages,
             (unsigned long long)page_bytes >> 10, o->store ? o->store : "none", what);
    return SKV_OK;
}

static void close_all(struct daemon *daemon)
{
    if (daemon->listener >= 0) {
        close(daemon->listener);
        unlink(daemon->options.socket);
    }
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++)
        if (daemon->peers[i].socket >= 0)
            close(daemon->peers[i].socket);
    skv_arrival_stop(daemon);
    if (daemon->mover && daemon->store && !daemon->broken)
        skv_finish(daemon);
    skv_mover_stop(daemon->mover);
    if (daemon->pinner)
        skv_pinner_stop(daemon->pinner);
    skv_store_close(daemon->store);
    skv_store_close(daemon->claimed);
    skv_bell_fini(&daemon->arrival_bell);
    skv_cache_close(daemon->cache);
    skv_pool_close(daemon->pool);
    if (daemon->device)
        skv_pinned_free(daemon->device, daemon->staging);
    skv_device_close(daemon->device);
    loop_close(daemon->loop);
    skv_kept_close(daemon);
}

/* Says so. Returns the exit status. */
static int failed_start(const struct daemon *daemon, int status)
{
    if (told_to_end(daemon, 0)) {
        skv_info("told to end during its start: ending, with nothing to store");
        skv_notify("STOPPING=1");
        return 0;
    }
    skv_error("not started: %s", status == SKV_ENOMEM
                                     ? "raise the memory limit, or ask for less (--pool-bytes, "
                                       "--max-users, --staging-bytes)"
                                     : "see the lines above");
    return 1;
}

int main(int argc, char **argv)
{
    static struct daemon daemon = {.listener = -1, .arrival_bell.fd = -1};
    int result = options_parse(argc, argv, &daemon.options);
    if (result >= 0)
        return result;
    skv_log_init("sidekvd", SKV_LOG_INFO);
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    /* Blocked before any thread starts: the start looks for them where it waits, then the loop. */
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN);  /* a terminal that closes takes no cache with it */
    signal(SIGCHLD, SIG_DFL); /* ignored by whoever started us, the store's check would be lost */
    skv_sigbus_init();
    daemon.signals = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (daemon.signals < 0) /* it could not be stopped in order */
        skv_error("signalfd: %s; raise the limit of open files", strerror(errno));
    daemon.now_ns = skv_now_ns();
    skv_peers_init(&daemon);
    int status = daemon.signals < 0 ? SKV_EIO : open_all(&daemon);
    if (status < 0) {
        result = failed_start(&daemon, status);
        close_all(&daemon);
        return result;
    }
    skv_kept_serves(&daemon);
    skv_notify("READY=1");
    result = skv_serve(&daemon);
    if (daemon.broken)
        skv_kept_disown(&daemon);
    skv_failpoint(FAIL_stop_stored);
    close_all(&daemon);
    skv_info("ended");
    return result;
}
