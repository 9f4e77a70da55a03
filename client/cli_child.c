#include "cli_child.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"

static volatile sig_atomic_t interrupted;

static const int caught[] = {SIGINT, SIGTERM, SIGHUP};

static void on_signal(int number)
{
    interrupted = number;
}

void replay_catch_signals(void)
{
    for (size_t i = 0; i < sizeof caught / sizeof *caught; i++)
        sigaction(caught[i], &(struct sigaction){.sa_handler = on_signal}, NULL);
}

bool replay_interrupted(void)
{
    return interrupted != 0;
}

pid_t replay_fork(int death)
{
    pid_t parent = getpid();
    fflush(NULL); /* the child must not flush it a second time */
    pid_t pid = fork();
    if (pid < 0)
        skv_error("fork: %s", strerror(errno));
    if (pid != 0)
        return pid;
    for (size_t i = 0; i < sizeof caught / sizeof *caught; i++)
        signal(caught[i], SIG_DFL);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, death);
    if (getppid() != parent)
        _exit(1);
    return 0;
}

bool replay_wait(pid_t pid, uint32_t timeout_ms, int *status)
{
    uint64_t end = skv_now_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        pid_t got = waitpid(pid, status, timeout_ms ? WNOHANG : 0);
        if (got == pid)
            return true;
        if (got < 0 && errno != EINTR) {
            *status = 0;
            return true; /* not ours any more */
        }
        if (skv_now_ns() >= end && timeout_ms)
            return false;
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
}

const char *replay_end_text(int status)
{
    static char text[32];
    if (WIFSIGNALED(status))
        snprintf(text, sizeof text, "signal %d", WTERMSIG(status));
    else
        snprintf(text, sizeof text, "exit %d", WEXITSTATUS(status));
    return text;
}
