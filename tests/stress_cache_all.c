/* The cache core against the simulated world of cache_workers.h: every sequence of a few operations
 * over three users and two clients, from three beginnings. stress_cache's worlds map their memory;
 * these keep it (kept_maps.h).
 *
 * usage: stress_cache_all [LENGTH]     2 when left out; 4: some minutes */
#include "cache_restarts.h"
#include "kept_maps.h"

#include <sys/wait.h>
#include <unistd.h>

static uint64_t next_token;

enum { CLIENTS = 2, THREE = 3, BEGINNINGS = 3 };

/* What may happen: one of each, for every client and user. */
static const struct {
    const char *name;
    uint32_t count; /* of variants: clients, users, or both */
} alphabet[] = {
    {"acquire", CLIENTS *THREE},
    {"acquire an edited history", CLIENTS *THREE},
    {"acquire all", CLIENTS},
    {"finish", CLIENTS},
    {"release", CLIENTS},
    {"fence", CLIENTS},
    {"gone", CLIENTS},
    {"truncate", THREE},
    {"forget", THREE},
    {"evict", THREE},
    {"offload", 1},
    {"write", 1},
    {"load", 1},
    {"events", 1},
    {"damage", 1},
    {"restart", 1},
};
#define ALPHABET (sizeof alphabet / sizeof *alphabet)

static void fill_request(struct view *view, uint32_t u, bool edited)
{
    struct sim_user *user = &world.users[u];
    *view = (struct view){.user = u, .max_cached = UINT32_MAX};
    if (edited && user->length)
        user->tokens[user->length - 1] = next_token++;
    for (uint32_t more = 0; more < 10 && user->length < WORLD_TOKENS; more++)
        user->tokens[user->length++] = next_token++;
    memcpy(view->tokens, user->tokens, sizeof view->tokens);
    view->history = user->length;
}

static void acquire_letter(uint32_t client, uint32_t first, uint32_t count, bool edited)
{
    struct sim_session *session = &sessions[client];
    if (session->state == CLOSED)
        session_open(client);
    for (uint32_t r = 0; r < ROWS && session->state == LIVE; r++) {
        if (session->rows[r].phase != IDLE)
            continue;
        session->rows[r].count = count;
        for (uint32_t i = 0; i < count; i++)
            fill_request(&session->rows[r].views[i], first + i, edited);
        CHECK(acquire_begin(client, r, true));
        acquire_end(client, r);
        break;
    }
}

static void end_letter(uint32_t client, bool finish)
{
    struct sim_session *session = &sessions[client];
    for (uint32_t r = 0; r < ROWS; r++) {
        struct sim_row *row = &session->rows[r];
        if (row->phase == IDLE || row->phase == WAITING)
            continue;
        while (finish && run_step(session, row, WORLD_TOKENS))
            ;
        if (session->state == LIVE && (!finish || row->phase == DONE))
            row_end(client, r, finish && !row->again && !row->gates[WORLD_LAYERS], ~0u);
        break;
    }
}

static void user_letter(const char *name, uint32_t user)
{
    uint32_t record = record_of(user), kept;
    uint64_t change;
    struct skv_known known = {0};
    uint64_t hashes[WORLD_PAGES];
    if (record == SKV_NONE)
        return;
    if (name[0] == 'e') {
        skv_cache_evict(world.cache, record);
    } else if (skv_cache_truncate(world.cache, record, name[0] == 't' ? S : 0, NULL, &kept,
                                  &change) == SKV_EAGAIN &&
               look_up(user, &known, hashes)) {
        CHECK(skv_cache_truncate(world.cache, record, S, &known, &kept, &change) == 0);
    }
    take_actions();
    sync_users(true);
}

static void do_letter(uint32_t letter)
{
    uint32_t kind = 0;
    while (letter >= alphabet[kind].count)
        letter -= alphabet[kind++].count;
    switch (kind) {
    case 0:
    case 1:
        acquire_letter(letter / THREE, letter % THREE, 1, kind == 1);
        break;
    case 2:
        acquire_letter(letter, 0, THREE, false);
        break;
    case 3:
    case 4:
        end_letter(letter, kind == 3);
        break;
    case 5:
        if (sessions[letter].state == LIVE)
            fence(letter);
        break;
    case 6:
        if (sessions[letter].state == ZOMBIE || sessions[letter].state == GONE)
            session_gone(letter);
        break;
    case 7:
    case 8:
    case 9:
        user_letter(alphabet[kind].name, letter);
        break;
    case 10:
        offload_begin(4, true);
        break;
    case 11:
        for (uint32_t i = 0; i < world.write_count; i++)
            offload_copy(i);
        write_step(SKV_ESTALE, 0);
        break;
    case 12:
        for (uint32_t i = 0; i < WORLD_JOBS; i++)
            while (onboard_step(&world.onboards[i]))
                ;
        break;
    case 13:
        while (take_event())
            ;
        sync_users(true);
        break;
    case 14:
        world.store[0].pages[0].damaged = world.store[0].pages[0].present;
        break;
    default:
        restart();
    }
}

/* Users with 24 tokens each: 0: none; 1: resident and stored; 2: stored only. */
static void begin_world(uint32_t start)
{
    next_token = 1;
    world_open((struct skv_cache_options){.pages = 7,
                                          .sessions = CLIENTS,
                                          .max_records = 8,
                                          .lease_ms = 300,
                                          .tail_ms = 500,
                                          .store = true});
    workers_open();
    for (uint32_t u = 0; start && u < THREE; u++) {
        acquire_letter(0, u, 1, false);
        end_letter(0, true);
        acquire_letter(0, u, 1, false);
        end_letter(0, true);
        while (offload_begin(4, true))
            settle_mover();
        sync_users(true);
    }
    if (start == 2)
        restart();
}

static void run_from(uint32_t start, uint32_t length, uint32_t letters, uint64_t count)
{
    uint32_t word[16] = {0};
    for (uint64_t n = 0; n < count; n++) {
        uint64_t rest = n;
        for (uint32_t i = 0; i < length; i++, rest /= letters)
            word[i] = (uint32_t)(rest % letters);
        snprintf(failed_at, sizeof failed_at, "beginning %u, sequence %llu", start,
                 (unsigned long long)n);
        begin_world(start);
        for (uint32_t i = 0; i < length; i++) {
            do_letter(word[i]);
            skv_cache_check(world.cache);
        }
        check_table();
        check_quiet();
        world_cache_close();
        CHECK(!kept_mapped);
    }
}

/* A process a beginning. */
static int run_exhaustive(uint32_t length)
{
    uint32_t letters = 0;
    uint64_t count = 1;
    int status = 0, failed = 0;
    for (uint32_t kind = 0; kind < ALPHABET; kind++)
        letters += alphabet[kind].count;
    for (uint32_t i = 0; i < length; i++)
        count *= letters;
    printf("stress_cache_all: all %llu sequences of %u operations out of %u, from 3 beginnings\n",
           (unsigned long long)count, length, letters);
    fflush(NULL);
    for (uint32_t start = 0; start < BEGINNINGS; start++) {
        pid_t child = fork();
        if (child == 0) {
            run_from(start, length, letters, count);
            exit(0); /* not _exit: the leak check of a sanitizer */
        }
        failed += child < 0;
    }
    while (wait(&status) > 0)
        failed += status != 0;
    if (!failed)
        printf("stress_cache_all: %llu worlds, ok\n", (unsigned long long)(BEGINNINGS * count));
    return failed != 0;
}

int main(int argc, char **argv)
{
    return run_exhaustive(argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 2);
}
