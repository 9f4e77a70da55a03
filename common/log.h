/* One line to stderr, for every part of the project. Errors are logged once, where they are
 * translated, with the original text; the caller up the stack then only passes the status on.
 * A line begins with the time, UTC; where stderr is the journal's (JOURNAL_STREAM), with its
 * priority instead.
 * SIDEKV_LOG=error|warn|info|debug chooses (default info in the daemon, warn elsewhere). */
#ifndef SKV_LOG_H
#define SKV_LOG_H

enum skv_log_level { SKV_LOG_ERROR, SKV_LOG_WARN, SKV_LOG_INFO, SKV_LOG_DEBUG };

/* Who writes ("sidekvd", "sidekv", ...) and the level when SIDEKV_LOG is not set. Call once at
 * start; optional. */
void skv_log_init(const char *who, enum skv_log_level level);

__attribute__((format(printf, 2, 3))) void skv_log(enum skv_log_level level, const char *format,
                                                   ...);

#define skv_error(...) skv_log(SKV_LOG_ERROR, __VA_ARGS__)
#define skv_warn(...)  skv_log(SKV_LOG_WARN, __VA_ARGS__)
#define skv_info(...)  skv_log(SKV_LOG_INFO, __VA_ARGS__)
#define skv_debug(...) skv_log(SKV_LOG_DEBUG, __VA_ARGS__)

#endif
