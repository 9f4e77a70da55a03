/* A real sidekvd for a test, on the host backend unless the rig names a device: started in a
 * temporary directory of its own, killed with the test. The program is $SIDEKVD, or bin/sidekvd
 * beside the tests' folder. */
#ifndef SKV_DAEMON_RIG_H
#define SKV_DAEMON_RIG_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sidekv.h"

static void (*rig_child)(void); /* runs in the daemon's process before it becomes the daemon */

struct rig {
    char directory[64], socket[96], store[96];
    const char *device; /* NULL: host */
    pid_t daemon;
};

static inline void rig_program(char *path, size_t bytes)
{
    const char *given = getenv("SIDEKVD");
    ssize_t length = given ? 0 : readlink("/proc/self/exe", path, bytes - 1);
    if (given || length < 0) {
        snprintf(path, bytes, "%s", given ? given : "sidekvd");
        return;
    }
    path[length] = 0;
    for (int up = 0; up < 2; up++) /* build/tests/test_x: build */
        *strrchr(path, '/') = 0;
    strncat(path, "/bin/sidekvd", bytes - strlen(path) - 1);
}

/* `extra`: more arguments, ended by NULL. */
static inline void rig_start(struct rig *rig, const char *const extra[])
{
    char program[512];
    rig_program(program, sizeof program);
    rig->daemon = fork();
    if (rig->daemon)
        return;
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* a keeper passes it on */
    const char *device = rig->device ? rig->device : "host";
    const char *arguments[32] = {program,    "--socket",    rig->socket, "--store",
                                 rig->store, "--device",    device,      "--store-bytes",
                                 "256M",     "--pin-bytes", "64M"};
    int count = 11;
    while (*extra && count < 31)
        arguments[count++] = *extra++;
    setenv("SIDEKV_LOG", "warn", 0);
    if (rig_child)
        rig_child();
    execv(program, (char *const *)(uintptr_t)arguments);
    perror(program);
    _exit(127);
}

static inline void rig_init(struct rig *rig)
{
    *rig = (struct rig){0};
    snprintf(rig->directory, sizeof rig->directory, "/tmp/sidekv-rig.XXXXXX");
    if (!mkdtemp(rig->directory))
        abort();
    snprintf(rig->socket, sizeof rig->socket, "%s/socket", rig->directory);
    snprintf(rig->store, sizeof rig->store, "%s/store", rig->directory);
}

static inline void rig_stop(struct rig *rig, int signal)
{
    if (rig->daemon <= 0)
        return;
    kill(rig->daemon, signal);
    waitpid(rig->daemon, NULL, 0);
    rig->daemon = 0;
}

/* For rig_child: what writes beyond a limit of files' sizes is told so, and lives. */
static inline void rig_may_be_limited(void)
{
    signal(SIGXFSZ, SIG_IGN);
}

/* From now on the store of a daemon that may be limited refuses what is put in it, as on a full
 * disk; or does so no more. */
static inline void rig_limit(pid_t daemon, bool refuses)
{
    struct rlimit limit;
    prlimit(daemon, RLIMIT_FSIZE, NULL, &limit);
    limit.rlim_cur = refuses ? 8192 : limit.rlim_max; /* LMDB's two meta pages */
    prlimit(daemon, RLIMIT_FSIZE, &limit, NULL);
}

/* The daemon is asked to end, so that leak checkers and coverage see all of it; after a minute it
 * is killed. */
static inline void rig_fini(struct rig *rig)
{
    char command[128];
    if (rig->daemon > 0)
        kill(rig->daemon, SIGTERM);
    for (int i = 0; rig->daemon > 0 && i < 6000; i++) {
        if (waitpid(rig->daemon, NULL, WNOHANG) != 0)
            rig->daemon = 0;
        else
            usleep(10000);
    }
    rig_stop(rig, SIGKILL);
    snprintf(command, sizeof command, "rm -rf %s", rig->directory);
    if (system(command))
        fprintf(stderr, "%s is left\n", rig->directory);
}

/* Opens a session, waiting for the daemon to be there: a minute, as its calls may take where the
 * test says nothing else. The machine may be busy. */
static inline int rig_connect(const struct rig *rig, struct skv_options options, struct skv **skv)
{
    int status = SKV_ELOST;
    options.socket = rig->socket;
    if (!options.timeout_ms)
        options.timeout_ms = 60000;
    for (int i = 0; i < 1200 && (status = skv_open(&options, skv)) == SKV_ELOST; i++)
        usleep(50000);
    return status;
}

#endif
