/* Reads the logs that replay understands: CSV with a header, in two formats told apart by the
 * header's columns, in any order. A line is taken whole or skipped whole: nothing of a broken line
 * enters the log. Numbers are plain digits; quotes around a field are allowed. */
#include "cli_log.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define FEEDBACKS 8u

/* The columns that matter, by what they mean. */
enum role { ROLE_NONE, ROLE_USER, ROLE_ITEM, ROLE_RATING, ROLE_SECONDS, ROLE_MS, ROLE_FEEDBACK };

static const char *const feedback_names[FEEDBACKS] = {
    "is_click",   "is_like", "is_follow", "is_comment",
    "is_forward", "is_hate", "long_view", "is_profile_enter",
};

struct reader {
    FILE *in, *complaints;
    const char *name;
    uint64_t line; /* number of the current one */
    char text[REPLAY_LINE_BYTES + 1];
    char *fields[REPLAY_COLUMNS];
    uint32_t columns;                 /* of the header */
    uint8_t roles[REPLAY_COLUMNS];    /* enum role */
    uint8_t feedback[REPLAY_COLUMNS]; /* ROLE_FEEDBACK: its bit */
    uint64_t capacity;                /* of log->events */
    struct replay_log *log;
};

/* ---- lines and fields ---- */

enum line { LINE_GOOD, LINE_BLANK, LINE_OVERLONG, LINE_BINARY, LINE_END };

/* The next line into reader->text, without its end (LF or CRLF). */
static enum line next_line(struct reader *r)
{
    size_t used = 0;
    bool overlong = false, binary = false, any = false;
    for (int c; (c = getc_unlocked(r->in)) != EOF;) {
        any = true;
        if (c == '\n')
            break;
        if (c == 0)
            binary = true;
        if (used < REPLAY_LINE_BYTES)
            r->text[used++] = (char)c;
        else
            overlong = true;
    }
    if (!any)
        return LINE_END;
    r->line++;
    if (overlong)
        return LINE_OVERLONG;
    if (binary)
        return LINE_BINARY;
    if (used > 0 && r->text[used - 1] == '\r')
        used--;
    r->text[used] = 0;
    return used == 0 ? LINE_BLANK : LINE_GOOD;
}

/* Splits reader->text in place. Returns how many fields, at most REPLAY_COLUMNS + 1 (then the last
 * is not there), or 0 for quotes that do not close. */
static uint32_t split(struct reader *r)
{
    uint32_t count = 0;
    char *from = r->text;
    for (;;) {
        char *to = from, *field = from;
        if (*from == '"') {
            for (from++; *from != 0 && (*from != '"' || from[1] == '"'); from++) {
                if (*from == '"')
                    from++;
                *to++ = *from;
            }
            if (*from++ != '"' || (*from != ',' && *from != 0))
                return 0;
        } else {
            from += strcspn(from, ",");
            to = from;
        }
        bool last = *from == 0;
        *to = 0;
        if (count == REPLAY_COLUMNS)
            return REPLAY_COLUMNS + 1;
        r->fields[count++] = field;
        if (last)
            return count;
        from++;
    }
}

/* Digits only, up to `limit`. NULL, or what is wrong. */
static const char *number(const char *text, uint64_t limit, uint64_t *out)
{
    if (*text == '-')
        return "is negative";
    if (*text == 0 || text[strspn(text, "0123456789")] != 0)
        return "is not a number";
    uint64_t value = 0;
    for (; *text != 0; text++) {
        uint64_t digit = (uint64_t)(*text - '0');
        if (digit > limit || value > (limit - digit) / 10)
            return "is too large";
        value = value * 10 + digit;
    }
    *out = value;
    return NULL;
}

static const char *rating(const char *text, uint32_t *half_stars)
{
    if (*text == '-')
        return "is negative";
    if (*text == 0 || text[strspn(text, "0123456789.")] != 0)
        return "is not a number";
    char *end;
    double value = strtod(text, &end);
    if (*end != 0)
        return "is not a number";
    if (!(value <= REPLAY_RATING_MAX))
        return "is too large";
    *half_stars = (uint32_t)(2 * value + 0.5);
    return NULL;
}

/* ---- the header ---- */

static uint32_t header_role(struct reader *r, uint32_t column, bool kuairand)
{
    const char *name = r->fields[column];
    static const struct {
        const char *name;
        enum role role;
        bool kuairand;
    } known[] = {
        {"userId", ROLE_USER, false},   {"movieId", ROLE_ITEM, false},
        {"rating", ROLE_RATING, false}, {"timestamp", ROLE_SECONDS, false},
        {"user_id", ROLE_USER, true},   {"video_id", ROLE_ITEM, true},
        {"time_ms", ROLE_MS, true},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].kuairand == kuairand && strcmp(name, known[i].name) == 0)
            return known[i].role;
    for (uint8_t i = 0; kuairand && i < FEEDBACKS; i++)
        if (strcmp(name, feedback_names[i]) == 0) {
            r->feedback[column] = i;
            return ROLE_FEEDBACK;
        }
    return ROLE_NONE;
}

static bool header_has(const struct reader *r, const char *name)
{
    for (uint32_t i = 0; i < r->columns; i++)
        if (strcmp(r->fields[i], name) == 0)
            return true;
    return false;
}

static int read_header(struct reader *r)
{
    enum line line;
    do
        line = next_line(r);
    while (line == LINE_BLANK);
    if (line == LINE_END) {
        fprintf(r->complaints, "%s: is empty\n", r->name);
        return ferror(r->in) ? SKV_EIO : SKV_EINVAL;
    }
    if (line == LINE_GOOD && strncmp(r->text, "\xef\xbb\xbf", 3) == 0) /* a byte order mark */
        memmove(r->text, r->text + 3, strlen(r->text + 3) + 1);
    r->columns = line == LINE_GOOD ? split(r) : 0;
    if (r->columns == 0 || r->columns > REPLAY_COLUMNS) {
        fprintf(r->complaints, "%s:%" PRIu64 ": not a CSV header\n", r->name, r->line);
        return SKV_EINVAL;
    }

    bool kuairand = header_has(r, "user_id") || header_has(r, "video_id");
    if (!kuairand && !header_has(r, "userId") && !header_has(r, "movieId")) {
        fprintf(r->complaints,
                "%s:%" PRIu64 ": neither MovieLens (userId,movieId,rating,timestamp) nor KuaiRand "
                "(user_id,video_id,time_ms,is_click,...): the header has no user or item column\n",
                r->name, r->line);
        return SKV_EINVAL;
    }
    r->log->format = kuairand ? "KuaiRand" : "MovieLens";
    uint32_t seen[ROLE_FEEDBACK + 1] = {0};
    for (uint32_t i = 0; i < r->columns; i++) {
        r->roles[i] = (uint8_t)header_role(r, i, kuairand);
        seen[r->roles[i]]++;
    }
    static const struct {
        enum role role;
        const char *names[2]; /* MovieLens, KuaiRand */
    } needed[] = {
        {ROLE_USER, {"userId", "user_id"}}, {ROLE_ITEM, {"movieId", "video_id"}},
        {ROLE_RATING, {"rating", NULL}},    {ROLE_SECONDS, {"timestamp", NULL}},
        {ROLE_MS, {NULL, "time_ms"}},       {ROLE_FEEDBACK, {NULL, "is_click or another feedback"}},
    };
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        const char *name = needed[i].names[kuairand];
        uint32_t count = seen[needed[i].role];
        if (!name || count == 1 || (count > 1 && needed[i].role == ROLE_FEEDBACK))
            continue;
        fprintf(r->complaints, "%s:%" PRIu64 ": %s header with %s %s column\n", r->name, r->line,
                r->log->format, count ? "more than one" : "no", name);
        return SKV_EINVAL;
    }
    return 0;
}

/* ---- events ---- */

/* One event out of the fields. NULL, or what is wrong with `*column`. */
static const char *parse_event(const struct reader *r, struct replay_event *event, uint32_t *column)
{
    *event = (struct replay_event){.order = (uint32_t)r->log->count};
    for (uint32_t i = 0; i < r->columns; i++) {
        const char *text = r->fields[i], *wrong = NULL;
        uint64_t value = 0;
        switch ((enum role)r->roles[i]) {
        case ROLE_NONE:
            break;
        case ROLE_USER:
            wrong = number(text, UINT64_MAX, &event->user);
            break;
        case ROLE_ITEM:
            wrong = number(text, REPLAY_ITEM_LIMIT - 1, &event->item);
            break;
        case ROLE_RATING:
            wrong = rating(text, &event->action);
            break;
        case ROLE_SECONDS:
            wrong = number(text, INT64_MAX / 1000, &value);
            event->time_ms = (int64_t)value * 1000;
            break;
        case ROLE_MS:
            wrong = number(text, INT64_MAX, &value);
            event->time_ms = (int64_t)value;
            break;
        case ROLE_FEEDBACK:
            wrong = number(text, 1, &value);
            event->action |= (uint32_t)value << r->feedback[i];
            break;
        }
        *column = i;
        if (wrong)
            return wrong;
    }
    return NULL;
}

static void skip(struct reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void skip(struct reader *r, const char *format, ...)
{
    if (r->log->lines_skipped++ >= REPLAY_COMPLAINTS)
        return;
    fprintf(r->complaints, "%s:%" PRIu64 ": ", r->name, r->line);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(r->complaints, format, arguments);
    va_end(arguments);
    fputs("; skipped\n", r->complaints);
}

static int append(struct reader *r, const struct replay_event *event)
{
    struct replay_log *log = r->log;
    if (log->count == r->capacity) {
        r->capacity = r->capacity ? 2 * r->capacity : 4096;
        struct replay_event *more = reallocarray(log->events, r->capacity, sizeof *more);
        if (!more)
            return SKV_ENOMEM;
        log->events = more;
    }
    if (log->count > UINT32_MAX)
        return SKV_EINVAL;
    log->events[log->count++] = *event;
    return 0;
}

static int read_events(struct reader *r)
{
    for (enum line line; (line = next_line(r)) != LINE_END;) {
        if (line == LINE_BLANK)
            continue;
        if (line == LINE_OVERLONG) {
            skip(r, "longer than %u bytes", REPLAY_LINE_BYTES);
            continue;
        }
        if (line == LINE_BINARY) {
            skip(r, "contains a NUL byte");
            continue;
        }
        uint32_t columns = split(r), column = 0;
        if (columns == 0) {
            skip(r, "quotes that do not close");
            continue;
        }
        if (columns != r->columns) {
            skip(r, "%u columns, the header has %u", columns, r->columns);
            continue;
        }
        struct replay_event event;
        const char *wrong = parse_event(r, &event, &column);
        if (wrong) {
            skip(r, "column %u %s: \"%.40s\"", column + 1, wrong, r->fields[column]);
            continue;
        }
        int rc = append(r, &event);
        if (rc)
            return rc;
    }
    if (ferror(r->in)) {
        fprintf(r->complaints, "%s: cannot be read to its end\n", r->name);
        return SKV_EIO;
    }
    if (r->log->lines_skipped > REPLAY_COMPLAINTS)
        fprintf(r->complaints, "%s: %" PRIu64 " more broken lines skipped\n", r->name,
                r->log->lines_skipped - REPLAY_COMPLAINTS);
    if (r->log->count == 0) {
        fprintf(r->complaints, "%s: no event in it\n", r->name);
        return SKV_EINVAL;
    }
    return 0;
}

int replay_log_read(FILE *in, const char *name, FILE *complaints, struct replay_log *out)
{
    struct replay_log log = {0};
    struct reader *r = calloc(1, sizeof *r);
    if (!r)
        return SKV_ENOMEM;
    *r = (struct reader){.in = in, .complaints = complaints, .name = name, .log = &log};
    int rc = read_header(r);
    if (!rc)
        rc = read_events(r);
    if (!rc)
        rc = replay_log_finish(&log);
    free(r);
    if (rc)
        replay_log_close(&log);
    else
        *out = log;
    return rc;
}

/* ---- any log ---- */

static int by_user_time_order(const void *left, const void *right)
{
    const struct replay_event *a = left, *b = right;
    if (a->user != b->user)
        return a->user < b->user ? -1 : 1;
    if (a->time_ms != b->time_ms)
        return a->time_ms < b->time_ms ? -1 : 1;
    return a->order < b->order ? -1 : a->order > b->order;
}

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

int replay_log_finish(struct replay_log *log)
{
    qsort(log->events, log->count, sizeof *log->events, by_user_time_order);
    log->items = malloc(log->count * sizeof *log->items);
    for (uint64_t i = 0; i < log->count; i++)
        log->user_count += i == 0 || log->events[i].user != log->events[i - 1].user;
    log->users = calloc(log->user_count, sizeof *log->users);
    if (!log->items || !log->users)
        return SKV_ENOMEM;

    struct replay_user *user = log->users;
    for (uint64_t i = 0; i < log->count; i++) {
        if (i > 0 && log->events[i].user != user->id)
            user++;
        if (user->count++ == 0)
            *user = (struct replay_user){.id = log->events[i].user, .first = i, .count = 1};
        log->items[i] = log->events[i].item;
    }
    qsort(log->items, log->count, sizeof *log->items, by_value);
    for (uint64_t i = 0; i < log->count; i++)
        if (i == 0 || log->items[i] != log->items[log->item_count - 1])
            log->items[log->item_count++] = log->items[i];
    return 0;
}

void replay_log_close(struct replay_log *log)
{
    free(log->events);
    free(log->users);
    free(log->items);
    *log = (struct replay_log){0};
}
