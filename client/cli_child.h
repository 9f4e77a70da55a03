/* The processes that replay starts: workers and the private daemon. They end with replay, however
 * it ends, and a Ctrl-C on the terminal reaches replay alone, which then ends them in order. */
#ifndef SKV_CLI_CHILD_H
#define SKV_CLI_CHILD_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* fork(): in the child (0) signals are as at start, `death` comes when the parent dies. Follow with
 * exec. -1: logged. */
pid_t replay_fork(int death);

/* Waits up to timeout_ms (0: as long as it takes) for the child to end. Returns true and its wait
 * status, or false: still running. */
bool replay_wait(pid_t pid, uint32_t timeout_ms, int *status);

/* "exit 1", "signal 9", for messages; static. */
const char *replay_end_text(int status);

/* From now on SIGINT, SIGTERM and SIGHUP only make replay_interrupted() true, and interrupt waits.
 */
void replay_catch_signals(void);
bool replay_interrupted(void);

#endif
