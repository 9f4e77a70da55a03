/* An MPS control daemon of the prover's own, and processes that may hang in the driver, since under
 * MPS a fault of one is everyone's: nothing here waits for them without end. */
#ifndef SKV_KILLS_MPS_H
#define SKV_KILLS_MPS_H

#include "kills_rig.h"

#define MPS_KILLS  20u
#define MPS_RIG_MS 120000u /* a rig that takes longer hangs */
#define MPS_ALL_MS 300000u /* no new rig after that */
#define MPS_END_MS 10000u  /* for a killed process to be gone */

static char mps_directory[64];

/* Everybody who is started from now on is its client. Before we are a subreaper: mps_end_all() is
 * to spare it. 0, or it is not to be had. Follow with mps_stop(). */
static int mps_start(void)
{
    char command[160];
    snprintf(mps_directory, sizeof mps_directory, "/tmp/sidekv-mps.XXXXXX");
    if (!mkdtemp(mps_directory))
        return -1;
    setenv("CUDA_MPS_PIPE_DIRECTORY", mps_directory, 1);
    setenv("CUDA_MPS_LOG_DIRECTORY", mps_directory, 1);
    snprintf(command, sizeof command, "timeout 20 nvidia-cuda-mps-control -d >%s/out 2>&1",
             mps_directory);
    return system(command);
}

static void mps_remove(const char *directory)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    if (*directory && system(command))
        fprintf(stderr, "%s is left\n", directory);
}

/* It is asked to quit; what is left of it and its servers is killed. */
static void mps_stop(void)
{
    static const char script[] =
        "servers=$(echo get_server_list | timeout 5 nvidia-cuda-mps-control 2>/dev/null)\n"
        "echo quit -t 5 | timeout -k 1 20 nvidia-cuda-mps-control >/dev/null 2>&1\n"
        "for pid in $servers $(cat \"$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid\"); do\n"
        "    grep -q '^nvidia-cuda-mps' /proc/$pid/comm && kill -9 $pid\n"
        "done 2>/dev/null\n"
        "true\n";
    if (system(script))
        printf("kills: MPS: its control daemon may be left\n");
    mps_remove(mps_directory);
}

/* Has it ended within the time? */
static bool mps_await(pid_t pid, uint32_t ms, int *status)
{
    uint64_t until = skv_now_ns() + ms * UINT64_C(1000000);
    while (waitpid(pid, status, WNOHANG) == 0) {
        if (skv_now_ns() > until)
            return false;
        usleep(10000);
    }
    return true;
}

/* Ends a rig and what it left to us. */
static void mps_end_all(void)
{
    uint64_t until = skv_now_ns() + MPS_END_MS * UINT64_C(1000000);
    char text[512];
    while (children(getpid(), text, sizeof text) && skv_now_ns() < until) {
        for (char *at = text; *at; at += strspn(at, " \n"))
            kill((pid_t)strtol(at, &at, 10), SIGKILL);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        usleep(10000);
    }
}

#endif
