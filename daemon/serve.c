/* The daemon's turn: serve every ring, carry out the core's actions, feed the mover, look after the
 * store, sleep when nothing is to do. */
#include "daemon.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "notify.h"

#define ENTRIES_A_TURN   16u                  /* of one session: 64 workers get fair turns */
#define PAGES_A_JOB      32u                  /* of an offload: its record moves forward as often */
#define STORE_CHECK_NS   UINT64_C(100000000)  /* how often watermarks are looked at */
#define STORE_RETRY_NS   UINT64_C(1000000000) /* how often a refused store is tried again */
#define STORE_EVICTIONS  8u                   /* under way at one time */
#define STORE_PAGE_SLACK 8192u                /* of a stored page, beside its bytes: at most */
#define IDLE_NS          UINT64_C(1000000000) /* the longest sleep */

static struct peer *peer_of(struct daemon *daemon, uint32_t slot)
{
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++)
        if (daemon->peers[i].slot == (int)slot && daemon->peers[i].state != PEER_FREE)
            return &daemon->peers[i];
    return NULL;
}

void skv_drain_actions(struct daemon *daemon)
{
    struct skv_action action;
    while (skv_cache_action(daemon->cache, &action)) {
        struct peer *peer;
        switch (action.kind) {
        case SKV_ACTION_ONBOARD:
            skv_mover_onboard(daemon->mover, action.job);
            break;
        case SKV_ACTION_CANCEL:
            skv_mover_cancel(daemon->mover, action.id, action.status);
            break;
        case SKV_ACTION_CHANGE:
            skv_mover_change(daemon->mover, action.job);
            break;
        case SKV_ACTION_FENCE:
            if ((peer = peer_of(daemon, action.session)))
                skv_peer_end(peer, SKV_ESTALE,
                             "it held an append lease too long, and another worker wants it");
            break;
        case SKV_ACTION_ROW:
            if ((peer = peer_of(daemon, action.session)) && peer->state == PEER_LIVE)
                skv_peer_row_free(peer, action.row);
            break;
        case SKV_ACTION_VIEWS:
            if ((peer = peer_of(daemon, action.session)) && peer->state == PEER_LIVE)
                skv_peer_views(peer);
            break;
        }
    }
}

/* ---- the mover's side ---- */

static void stop_offload(struct daemon *daemon, int status)
{
    static const char *const remedies[] = {
        [-SKV_ENOSPC] = "make room on its disk, or raise --store-bytes",
        [-SKV_EIO] = "look after its disk; the kernel's log says more",
        [-SKV_ENOMEM] = "raise the memory limit, or lower --pool-bytes",
    };
    daemon->store_checked_ns = daemon->now_ns;
    if (!daemon->offload_stopped || daemon->offload_status != status)
        skv_error("nothing can be stored (%s): offload stops, requests go on; it is tried again "
                  "every second: %s",
                  skv_strerror(status), remedies[-status]);
    daemon->offload_stopped = true;
    daemon->offload_status = status;
}

/* What a job for the store came to: it stops offload, or lets it go on. */
static void stored(struct daemon *daemon, int32_t status)
{
    if (status == SKV_ENOSPC || status == SKV_EIO || status == SKV_ENOMEM) {
        stop_offload(daemon, status);
    } else if (!status && daemon->offload_stopped) {
        skv_info("the store takes pages again");
        daemon->offload_stopped = false;
    }
}

static void changed(struct daemon *daemon, struct skv_change *change, int32_t status)
{
    bool removal = change->kind == SKV_CHANGE_RECORD && change->record.tokens == 0;
    if (!status)
        skv_cache_changed(daemon->cache, change);
    skv_commands_changed(daemon, change->id, status);
    /* A removal that went well does not say that a page would. */
    if (status || change->kind == SKV_CHANGE_SYNC)
        stored(daemon, status);
    if (status && change->kind == SKV_CHANGE_SYNC) {
        free(change); /* it asked, no more */
    } else if (status && !change->refused) {
        change->refused = true; /* it stays the mover's: that tries again */
        daemon->owed++;
    } else if (!status) {
        daemon->owed -= change->refused;
        daemon->evictions -= daemon->evictions && removal;
        free(change);
    }
}

static uint32_t take_events(struct daemon *daemon)
{
    struct skv_mover_event event;
    uint32_t taken = 0;
    while (daemon->mover && skv_mover_next(daemon->mover, &event)) {
        switch (event.kind) {
        case SKV_MOVER_ONBOARDED:
            skv_cache_onboarded(daemon->cache, event.job);
            break;
        case SKV_MOVER_FAILED:
            skv_cache_load_failed(daemon->cache, event.job, event.user, event.index, event.status);
            break;
        case SKV_MOVER_CANCELLED:
            skv_cache_cancelled(daemon->cache, event.job);
            break;
        case SKV_MOVER_COPIED:
            skv_cache_copied(daemon->cache, event.job);
            break;
        case SKV_MOVER_STORED:
            stored(daemon, event.status);
            skv_cache_stored(daemon->cache, event.job, event.status);
            break;
        case SKV_MOVER_CHANGED:
            changed(daemon, event.job, event.status);
            break;
        case SKV_MOVER_FOUND:
            skv_commands_found(daemon, event.job, event.status);
            break;
        case SKV_MOVER_BROKEN:
            daemon->broken = true;
            break;
        }
        skv_drain_actions(daemon);
        taken++;
    }
    if (taken)
        skv_commands_retry(daemon);
    return taken;
}

/* Hands the next pages that are due to the mover; false: none are, or no room for them now. */
static bool offload_one(struct daemon *daemon)
{
    uint32_t room = skv_mover_offload_pages(daemon->mover);
    struct skv_offload *job = skv_cache_next_offload(
        daemon->cache, room < PAGES_A_JOB ? room : PAGES_A_JOB, daemon->stopping);
    if (skv_cache_starved(daemon->cache))
        stop_offload(daemon, SKV_ENOMEM);
    if (!job)
        return false;
    if (skv_mover_offload(daemon->mover, job))
        return true;
    skv_cache_offload_undo(daemon->cache, job);
    return false;
}

static int found_stored(void *context, const struct skv_record *record, const void *hashes)
{
    (void)hashes;
    skv_cache_found_stored(context, record);
    return 0;
}

/* After LMDB gave the store up: what is under way ends, then the store is opened anew, with its map
 * elsewhere. While that fails, so does all that is asked of it. */
static int reopen_store(struct daemon *daemon)
{
    bool more = false;
    if (daemon->arrival)
        return SKV_EAGAIN; /* it is still being read */
    if (!daemon->halted)
        skv_mover_halt(daemon->mover);
    skv_pinner_stop(daemon->pinner);
    daemon->pinner = NULL;
    int status = skv_store_reopen(daemon->store, &more);
    if (status == 0 && daemon->options.pin_bytes)
        skv_pinner_start(daemon->store, daemon->device, daemon->options.pin_bytes, &daemon->pinner);
    take_events(daemon); /* of what ended: before the core hears what is stored */
    if (status == 0 && more)
        status = skv_store_scan(daemon->store, found_stored, daemon->cache);
    int resumed = skv_mover_resume(daemon->mover, daemon->pinner);
    daemon->halted = resumed != 0;
    return status ? status : resumed;
}

/* Does the store take something again? A job that is due, or none at all, behind what is owed. */
static void probe(struct daemon *daemon)
{
    daemon->offload_probes = false;
    if ((skv_store_broken(daemon->store) || daemon->halted) && reopen_store(daemon))
        return;
    if (offload_one(daemon))
        return;
    struct skv_change *change = calloc(1, sizeof *change);
    if (!change)
        return; /* next time */
    change->kind = SKV_CHANGE_SYNC;
    skv_mover_change(daemon->mover, change);
}

/* Do more pages fit below the mark where the store refuses puts, with all that is under way to it?
 * With nothing under way it shall say so itself. */
static bool store_has_room(const struct daemon *daemon)
{
    const uint64_t page_bytes = skv_page_bytes(&daemon->options.geometry) + STORE_PAGE_SLACK;
    const uint64_t staged = skv_mover_offload_staged(daemon->mover);
    uint64_t used, limit;
    if (!staged && !daemon->evictions)
        return true;
    skv_store_usage(daemon->store, &used, &limit);
    return used + (staged + PAGES_A_JOB) * page_bytes < limit / 100 * SKV_STORE_FULL_PERCENT;
}

/* Hands out what is due for the store while the mover has staging and the store room. */
static void offload(struct daemon *daemon)
{
    if (daemon->offload_stopped && daemon->offload_probes)
        probe(daemon);
    while (!daemon->offload_stopped && daemon->store && store_has_room(daemon) &&
           offload_one(daemon))
        ;
}

static void change_generation(struct daemon *daemon)
{
    if (!daemon->store ||
        skv_cache_generation(daemon->cache) + GENERATIONS_AHEAD / 2 < daemon->generation_limit)
        return;
    struct skv_change *change = calloc(1, sizeof *change);
    if (!change)
        return; /* next time: half of them are left */
    daemon->generation_limit = skv_cache_generation(daemon->cache) + GENERATIONS_AHEAD;
    change->kind = SKV_CHANGE_GENERATION;
    change->record.generation = daemon->generation_limit;
    skv_mover_change(daemon->mover, change);
}

/* Watermarks: evict users from the store from 90 % on, as fast as it forgets them; wait for that
 * from 97 % on. (It refuses puts by itself from there on too.) */
static void look_after_store(struct daemon *daemon)
{
    if (!daemon->store || daemon->arrival)
        return;
    uint64_t used, limit;
    skv_store_usage(daemon->store, &used, &limit);
    if (used >= limit / 100 * 90) {
        while (daemon->evictions < STORE_EVICTIONS && skv_cache_evict_stored(daemon->cache))
            daemon->evictions++;
        if (skv_cache_starved(daemon->cache))
            stop_offload(daemon, SKV_ENOMEM);
        skv_drain_actions(daemon);
    }
    if (daemon->now_ns - daemon->store_checked_ns <
        (daemon->offload_stopped ? STORE_RETRY_NS : STORE_CHECK_NS))
        return;
    daemon->store_checked_ns = daemon->now_ns;
    if (daemon->offload_stopped) {
        daemon->offload_probes = true;
    } else if (used >= limit / 100 * SKV_STORE_FULL_PERCENT) {
        skv_warn("the store is %u %% full: offload waits for evictions", SKV_STORE_FULL_PERCENT);
        daemon->offload_stopped = true;
        daemon->offload_status = SKV_ENOSPC;
    }
}

/* ---- the turn ---- */

static uint32_t serve_rings(struct daemon *daemon)
{
    uint32_t done = 0;
    for (uint32_t i = 0; i < daemon->live_count;
         i++) /* one that ends gives its place to the last */
        done += skv_peer_serve(&daemon->peers[daemon->live[i]], ENTRIES_A_TURN);
    return done;
}

static void set_time(struct daemon *daemon, bool wall_too)
{
    daemon->now_ns = skv_now_ns();
    if (wall_too)
        daemon->wall_s = (uint32_t)time(NULL);
    skv_cache_time(daemon->cache, daemon->now_ns / 1000000, daemon->wall_s);
}

/* Slow things, every millisecond at most and before every sleep. Returns how long the daemon may
 * sleep. */
static uint64_t housekeeping(struct daemon *daemon)
{
    uint64_t sleep_ns = IDLE_NS;
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++) {
        struct peer *peer = &daemon->peers[i];
        skv_peer_tick(peer);
        if (peer->state != PEER_HELLO && peer->state != PEER_ENDING)
            continue;
        uint64_t left = peer->due_ns > daemon->now_ns ? peer->due_ns - daemon->now_ns : 1000000;
        sleep_ns = left < sleep_ns ? left : sleep_ns;
    }
    if (daemon->offload_stopped || daemon->arrival)
        skv_commands_retry(daemon); /* no event may come that would answer them */
    uint64_t kept_ns = skv_kept_tick(daemon);
    sleep_ns = kept_ns < sleep_ns ? kept_ns : sleep_ns;
    if (!daemon->accepting.pending && !daemon->stopping) { /* no descriptor was left */
        uint64_t wait_ns =
            daemon->accept_ns > daemon->now_ns ? daemon->accept_ns - daemon->now_ns : 0;
        if (!wait_ns)
            loop_poll(daemon->loop, &daemon->accepting, daemon->listener, POLLIN);
        else if (wait_ns < sleep_ns)
            sleep_ns = wait_ns;
    }
    skv_cache_groom(daemon->cache);
    look_after_store(daemon);
    change_generation(daemon);
    skv_drain_actions(daemon);
    uint64_t tail_ms = skv_cache_tail_due(daemon->cache);
    if (tail_ms < 1000 && !daemon->offload_stopped)
        sleep_ns = tail_ms * 1000000 < sleep_ns ? tail_ms * 1000000 : sleep_ns;
    if (daemon->offload_stopped || daemon->stopping || daemon->restarting || daemon->requests)
        sleep_ns = sleep_ns < STORE_CHECK_NS ? sleep_ns : STORE_CHECK_NS;
    return sleep_ns < 100000 ? 100000 : sleep_ns;
}

static bool any_ready(struct daemon *daemon, bool sleep)
{
    bool ready = false;
    for (uint32_t i = 0; i < daemon->live_count; i++) {
        struct peer *peer = &daemon->peers[daemon->live[i]];
        if (!sleep)
            ring_awake(&peer->sq);
        else if (!ring_sleep(&peer->sq))
            ready = ready || ring_room(&peer->cq) > peer->unanswered;
    }
    return ready;
}

/* Waits for something; every ring's client is told to ring its bell meanwhile. */
static int sleep_a_while(struct daemon *daemon, uint64_t sleep_ns)
{
    int ran = 0;
    if (!any_ready(daemon, true))
        ran = loop_turn(daemon->loop, true, sleep_ns);
    any_ready(daemon, false);
    return ran;
}

static void on_moved(void *context, int32_t result)
{
    struct daemon *daemon = context; /* the turn takes the events anyway */
    (void)result;
    loop_read(daemon->loop, &daemon->moved, skv_mover_fd(daemon->mover));
}

static void on_arriving(void *context, int32_t result)
{
    struct daemon *daemon = context; /* likewise */
    (void)result;
    loop_read(daemon->loop, &daemon->arriving, daemon->arrival_bell.fd);
}

/* From now on: storing at SIGTERM takes no longer than this. */
static uint64_t stop_time(const struct daemon *daemon)
{
    return skv_now_ns() + (uint64_t)daemon->options.stop_wait_ms * 1000000;
}

static uint64_t unstored_pages(const struct daemon *daemon)
{
    struct skv_stats stats;
    skv_cache_stats(daemon->cache, &stats);
    return stats.offload_backlog + skv_mover_offload_staged(daemon->mover);
}

static void on_signal(void *context, int32_t result)
{
    struct daemon *daemon = context;
    struct signalfd_siginfo info;
    (void)result;
    if (read(daemon->signals, &info, sizeof info) == sizeof info && !daemon->stopping) {
        skv_info("signal %u: storing what is not stored, then ending", info.ssi_signo);
        skv_notify("STOPPING=1");
        daemon->stopping = true;
        daemon->restarting = false; /* that stores nothing */
        if (daemon->store && skv_store_broken(daemon->store))
            reopen_store(daemon);
        daemon->offload_stopped = false;
        daemon->stop_by_ns = stop_time(daemon);
        skv_cache_end_appends(daemon->cache);
        daemon->stop_epoch = skv_cache_flush(daemon->cache);
    } else if (daemon->stopping) {
        skv_warn("asked twice: not waiting for the store");
        daemon->stop_by_ns = 0;
    }
    loop_poll(daemon->loop, &daemon->signalled, daemon->signals, POLLIN);
}

/* Is everything stored that will be? */
static bool stopped(struct daemon *daemon)
{
    if (!daemon->stopping)
        return false;
    if (daemon->arrival && daemon->stop_by_ns) { /* asked once: till then the time does not begin */
        daemon->stop_by_ns = stop_time(daemon);
        return false;
    }
    if (skv_cache_flushed(daemon->cache, daemon->stop_epoch)) {
        /* And what was committed meanwhile, by leases from before. */
        daemon->stop_epoch = skv_cache_flush(daemon->cache);
        if (skv_cache_flushed(daemon->cache, daemon->stop_epoch))
            return true;
    }
    if (daemon->now_ns > daemon->stop_by_ns) {
        skv_error("%llu pages were not stored", (unsigned long long)unstored_pages(daemon));
        return true;
    }
    if (daemon->offload_stopped && !daemon->stop_waits) {
        skv_warn("the store refuses %llu pages (%s): tried again every second for %llu ms, then "
                 "they are lost; a second signal ends this at once",
                 (unsigned long long)unstored_pages(daemon), skv_strerror(daemon->offload_status),
                 (unsigned long long)(daemon->stop_by_ns - daemon->now_ns) / 1000000);
        daemon->stop_waits = true;
    }
    return false;
}

/* A planned restart: is everybody quiet, or the time over? Or the keeper has gone, and another one
 * comes. */
static bool restarts(struct daemon *daemon)
{
    if (daemon->kept.orphaned && !daemon->stopping)
        return true;
    if (!daemon->restarting)
        return false;
    for (uint32_t i = 0; daemon->now_ns < daemon->restart_by_ns && i < SKV_MAX_PEERS; i++)
        if (daemon->peers[i].state == PEER_LIVE && !skv_peer_quiet(&daemon->peers[i]))
            return false;
    return true;
}

uint32_t skv_work(struct daemon *daemon)
{
    set_time(daemon, daemon->kept_ns == 0 || daemon->now_ns - daemon->kept_ns >= 1000000);
    uint32_t done = serve_rings(daemon);
    done += take_events(daemon);
    done += skv_arrival_take(daemon);
    if (done)
        offload(daemon);
    if (daemon->now_ns - daemon->kept_ns >= 1000000) {
        housekeeping(daemon);
        offload(daemon);
        daemon->kept_ns = daemon->now_ns;
    }
    return done;
}

int skv_serve(struct daemon *daemon)
{
    uint64_t spin_ns = (uint64_t)daemon->options.spin_us * 1000, busy_ns = 0;
    daemon->moved = (struct watch){.done = on_moved, .context = daemon};
    daemon->signalled = (struct watch){.done = on_signal, .context = daemon};
    daemon->accepting = (struct watch){.done = skv_accept, .context = daemon};
    daemon->arriving = (struct watch){.done = on_arriving, .context = daemon};
    if (daemon->arrival)
        loop_read(daemon->loop, &daemon->arriving, daemon->arrival_bell.fd);
    loop_poll(daemon->loop, &daemon->signalled, daemon->signals, POLLIN);
    loop_poll(daemon->loop, &daemon->accepting, daemon->listener, POLLIN);
    while (!daemon->broken && !daemon->arrival_status && !stopped(daemon) && !restarts(daemon)) {
        uint32_t done = skv_work(daemon);
        if (daemon->mover && !daemon->moved.pending)
            loop_read(daemon->loop, &daemon->moved, skv_mover_fd(daemon->mover));
        if (done)
            busy_ns = daemon->now_ns;
        int ran = 0;
        if (done || daemon->now_ns - busy_ns < spin_ns) {
            ran = loop_turn(daemon->loop, false, 0);
            skv_relax();
        } else {
            uint64_t sleep_ns = housekeeping(daemon);
            offload(daemon);
            serve_rings(daemon); /* completions of what housekeeping ended */
            ran = sleep_a_while(daemon, sleep_ns);
            daemon->kept_ns = 0;
        }
        if (ran < 0) {
            skv_error("the event loop broke: %s", strerror(-ran));
            return 1;
        }
    }
    if (daemon->arrival_status) {
        skv_error("ending: no store: %s", skv_strerror(daemon->arrival_status));
        return 1;
    }
    if (!daemon->broken && !daemon->stopping) {
        skv_info("restarting");
        skv_peers_goodbye(daemon);
        return KEEPER_RESTART;
    }
    if (daemon->broken)
        skv_error("the device failed: ending, so that a new daemon can start with a new pool");
    return daemon->broken;
}

void skv_finish(struct daemon *daemon)
{
    skv_mover_halt(daemon->mover);
    /* What the last events lead to is done as well: of a cut the store is told when the offload
     * that was in flight is done. That leads to nothing more. */
    for (int more = 2; take_events(daemon) > 0 && more > 0; more--) {
        if (daemon->halted || skv_store_broken(daemon->store))
            return;
        if (skv_mover_resume(daemon->mover, daemon->pinner) != 0) {
            skv_error("no thread to tell the store of the last cuts: such users may be back");
            return;
        }
        skv_mover_halt(daemon->mover);
    }
}
