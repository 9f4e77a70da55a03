/* A daemon that takes long to die, as one with a GPU does: for tests of what its keeper does
 * meanwhile. ptrace() holds its main thread up on the way out. Its other threads are gone then; its
 * files, its memory and its locks are still there. */
#ifndef SKV_SLOW_DEATH_H
#define SKV_SLOW_DEATH_H

#include <criterion/criterion.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

/* A keeper's children, four at most. */
static inline uint32_t children(pid_t keeper, pid_t pids[4])
{
    char path[64], line[256] = "";
    uint32_t count = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)keeper, (int)keeper);
    FILE *file = fopen(path, "re");
    if (!file)
        cr_skip_test("no list of children in /proc");
    if (!fgets(line, sizeof line, file))
        line[0] = 0;
    fclose(file);
    for (char *at = line, *end; count < 4; at = end) {
        pids[count] = (pid_t)strtol(at, &end, 10);
        if (end == at)
            break;
        count++;
    }
    return count;
}

static inline uint64_t memfds_of(pid_t pid)
{
    char command[128], line[32] = "";
    snprintf(command, sizeof command, "ls -l /proc/%d/fd | grep -c memfd:sidekv", (int)pid);
    FILE *pipe = popen(command, "re");
    bool read = pipe && fgets(line, sizeof line, pipe);
    if (pipe)
        pclose(pipe);
    return read ? strtoull(line, NULL, 10) : UINT64_MAX;
}

/* Kills the daemon, and holds it up. Follow with let_die(). Returns the next daemon, which waits.
 */
static inline pid_t kill_slowly(pid_t keeper, pid_t daemon)
{
    pid_t pids[4] = {0};
    int status = 0;
    if (ptrace(PTRACE_SEIZE, daemon, NULL, PTRACE_O_TRACEEXIT))
        cr_skip_test("no ptrace() here");
    kill(daemon, SIGKILL);
    cr_assert_eq(waitpid(daemon, &status, __WALL), daemon);
    if (status >> 8 != (SIGTRAP | PTRACE_EVENT_EXIT << 8))
        cr_skip_test("a kernel that does not stop who is killed");
    for (int i = 0; i < 60000 && children(keeper, pids) < 2; i++)
        poll(NULL, 0, 1);
    cr_assert_eq(children(keeper, pids), 2, "no next daemon is started");
    pid_t next = pids[pids[0] == daemon];
    /* Before its exec it has the keeper's. */
    for (int i = 0; i < 6000 && memfds_of(next); i++)
        poll(NULL, 0, 10);
    poll(NULL, 0, 200); /* it comes as far as it will */
    cr_expect_eq(memfds_of(next), 0, "it has the tables of a daemon that is not gone");
    cr_expect_eq(children(keeper, pids), 2, "it did not wait");
    return next;
}

static inline void let_die(pid_t daemon)
{
    cr_assert_eq(ptrace(PTRACE_DETACH, daemon, NULL, 0), 0);
}

#endif
