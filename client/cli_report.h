/* What replay says: progress while it runs, a summary for people, an object for programs. */
#ifndef SKV_CLI_REPORT_H
#define SKV_CLI_REPORT_H

#include <jansson.h>

#include "cli_dispatch.h"

/* On stderr: a line that is rewritten on a terminal, a new one now and then elsewhere. Cheap to
 * call often. */
void replay_progress(const struct replay_run *run, const struct replay_result *result);
/* Takes the line away. */
void replay_progress_end(void);

/* On stdout. */
void replay_report(const struct replay_run *run, const struct replay_result *result);
/* Two runs of one plan side by side. */
void replay_report_pair(const struct replay_run *run, const struct replay_result *cached,
                        const struct replay_result *uncached);

/* A new reference. NULL: no memory. */
json_t *replay_report_json(const struct replay_run *run, const struct replay_result *result);

#endif
