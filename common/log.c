#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static const char *log_who = "sidekv";
static enum skv_log_level log_level = SKV_LOG_WARN;

static void from_environment(void)
{
    const char *wanted = getenv("SIDEKV_LOG");
    for (int i = 0; wanted && i < 4; i++)
        if (strcmp(wanted, level_names[i]) == 0)
            log_level = (enum skv_log_level)i;
}

__attribute__((constructor)) static void log_default(void)
{
    from_environment();
}

void skv_log_init(const char *who, enum skv_log_level level)
{
    log_who = who;
    log_level = level;
    from_environment();
}

void skv_log(enum skv_log_level level, const char *format, ...)
{
    if (level > log_level)
        return;
    char line[1024];
    int used =
        snprintf(line, sizeof line, "%s[%d] %s: ", log_who, (int)getpid(), level_names[level]);
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
