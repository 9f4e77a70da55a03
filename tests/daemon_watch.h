/* What a daemon holds, seen from outside: for tests that want it back at the baseline. */
#ifndef SKV_DAEMON_WATCH_H
#define SKV_DAEMON_WATCH_H

#include <dirent.h>
#include <stdint.h>

#include "daemon_rig.h"

struct daemon_use {
    uint64_t sessions, fds, maps, anonymous_kib;
};

static inline uint64_t watch_lines(pid_t pid, const char *name, const char *field)
{
    char path[64], line[512];
    uint64_t lines = 0;
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file)) {
        if (field && strncmp(line, field, strlen(field)) == 0)
            lines = strtoull(line + strlen(field), NULL, 10);
        lines += !field;
    }
    if (file)
        fclose(file);
    return lines;
}

static inline uint64_t watch_fds(pid_t pid)
{
    char path[64];
    uint64_t count = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *directory = opendir(path);
    while (directory && readdir(directory))
        count++;
    if (directory)
        closedir(directory);
    return count;
}

/* Waits till the daemon listens. */
static inline void watch_start(const struct rig *rig)
{
    for (int i = 0; i < 6000 && access(rig->socket, F_OK); i++)
        usleep(10000);
    usleep(10000); /* between bind() and listen() */
}

static inline struct skv *watch_admin(const struct rig *rig)
{
    struct skv *admin;
    if (rig_connect(rig, (struct skv_options){.admin = true, .timeout_ms = 60000}, &admin)) {
        fprintf(stderr, "no daemon to look at\n");
        exit(1);
    }
    return admin;
}

/* Waits till `sessions` are left (and no more is held than `baseline` says). Returns 0, or 1 and
 * says what is left over. */
static inline uint64_t watch_settle(const struct rig *rig, struct daemon_use *use,
                                    uint64_t sessions, const struct daemon_use *baseline)
{
    struct skv_stats stats;
    struct skv *admin = watch_admin(rig);
    pid_t pid = (pid_t)skv_server(admin)->pid;
    bool good = false;
    for (int i = 0; i < 3000 && !good; i++) {
        usleep(20000);
        if (skv_stats(admin, &stats))
            break;
        *use = (struct daemon_use){.sessions = stats.sessions - 1,
                                   .fds = watch_fds(pid),
                                   .maps = watch_lines(pid, "maps", NULL),
                                   .anonymous_kib = watch_lines(pid, "status", "RssAnon:")};
        good = use->sessions == sessions && !stats.pool_pages_quarantined &&
               (baseline ? use->fds <= baseline->fds && use->maps <= baseline->maps + 8 &&
                               use->anonymous_kib <= baseline->anonymous_kib + 16384
                         : i > 10);
    }
    skv_close(admin);
    if (!good || baseline)
        printf("%llu sessions, %llu fds, %llu maps, %llu KiB; before: %llu fds, %llu maps, %llu "
               "KiB\n",
               (unsigned long long)use->sessions, (unsigned long long)use->fds,
               (unsigned long long)use->maps, (unsigned long long)use->anonymous_kib,
               (unsigned long long)(baseline ? baseline->fds : 0),
               (unsigned long long)(baseline ? baseline->maps : 0),
               (unsigned long long)(baseline ? baseline->anonymous_kib : 0));
    return !good;
}

/* Forgets every user of a model. Returns the failures. */
static inline uint64_t watch_forget(const struct rig *rig, struct skv_id model)
{
    struct skv_user_info users[64];
    struct skv *admin = watch_admin(rig);
    uint64_t cursor = 0, failures = 0;
    do {
        int count = skv_list(admin, &cursor, users, 64);
        failures += count < 0;
        for (int i = 0; i < count; i++)
            if (memcmp(&users[i].model, &model, sizeof model) == 0) {
                int status = skv_forget(admin, model, users[i].user);
                failures += status && status != SKV_ENOENT;
            }
    } while (cursor && !failures);
    skv_close(admin);
    return failures;
}

/* Every page free again, and nobody there? */
static inline uint64_t watch_empty(const struct rig *rig)
{
    struct skv *admin = watch_admin(rig);
    struct skv_stats stats = {0};
    for (int i = 0; i < 3000; i++) {
        if (skv_stats(admin, &stats) ||
            (stats.pool_pages_free == stats.pool_pages && stats.sessions == 1))
            break;
        usleep(20000);
    }
    skv_close(admin);
    if (stats.pool_pages && stats.pool_pages_free == stats.pool_pages && stats.sessions == 1)
        return 0;
    printf("left over: %llu pages, %llu sessions, %llu users\n",
           (unsigned long long)(stats.pool_pages - stats.pool_pages_free),
           (unsigned long long)stats.sessions - 1, (unsigned long long)stats.users_known);
    return 1;
}

#endif
