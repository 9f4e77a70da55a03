#include "log.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "utc.h"

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static const int priorities[] = {3, 4, 6, 7}; /* syslog's */
static const char *log_who = "sidekv";
static enum skv_log_level log_level = SKV_LOG_WARN;
static bool log_journal; /* stderr is the journal's */

static void from_environment(void)
{
    const char *wanted = getenv("SIDEKV_LOG");
    for (int i = 0; wanted && i < 4; i++)
        if (strcmp(wanted, level_names[i]) == 0)
            log_level = (enum skv_log_level)i;
}

/* systemd names the device and inode of the stream that it reads; stderr may be another by now. */
static bool is_journal(void)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long device, inode;
    struct stat about;
    return stream && sscanf(stream, "%llu:%llu", &device, &inode) == 2 &&
           fstat(STDERR_FILENO, &about) == 0 && about.st_dev == device && about.st_ino == inode;
}

__attribute__((constructor)) static void log_default(void)
{
    from_environment();
    log_journal = is_journal();
}

void skv_log_init(const char *who, enum skv_log_level level)
{
    log_who = who;
    log_level = level;
    from_environment();
}

/* What a line begins with: its priority, as sd-daemon(3) has it, for the journal, which knows the
 * time; else the time. */
static int put_prefix(char *line, size_t size, enum skv_log_level level)
{
    struct timespec now;
    char text[SKV_UTC_BYTES];
    if (log_journal)
        return snprintf(line, size, "<%d>", priorities[level]);
    clock_gettime(CLOCK_REALTIME, &now);
    skv_utc_text(text, (uint64_t)now.tv_sec);
    return snprintf(line, size, "%s.%03ldZ ", text, now.tv_nsec / 1000000);
}

void skv_log(enum skv_log_level level, const char *format, ...)
{
    if (level > log_level)
        return;
    char line[1024];
    int used = put_prefix(line, sizeof line, level);
    used += snprintf(line + used, sizeof line - (size_t)used, "%s[%d] %s: ", log_who, (int)getpid(),
                     level_names[level]);
    va_list arguments;
    va_start(arguments, format);
    int more = vsnprintf(line + used, sizeof line - (size_t)used - 1, format, arguments);
    va_end(arguments);
    used += more < 0 ? 0 : more;
    if (used > (int)sizeof line - 2)
        used = (int)sizeof line - 2;
    line[used++] = '\n';
    /* One write: lines of several threads and processes do not mix. A closed stderr loses the line,
     * nothing else. */
    if (write(STDERR_FILENO, line, (size_t)used) < 0)
        return;
}
