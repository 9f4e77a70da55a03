/* The logs that replay reads: any bytes for a file. What is read must be a log: sorted, counted,
 * with no number out of range; and written as CSV and read again it is the same log. */
#include "cli_log.h"
#include "fuzz_input.h"

static void check(const struct replay_log *log)
{
    uint64_t events = 0;
    FUZZ_MUST(log->count > 0 && log->user_count > 0 && log->item_count > 0);
    for (uint64_t u = 0; u < log->user_count; u++) {
        const struct replay_user *user = &log->users[u];
        FUZZ_MUST(user->count > 0 && user->first == events);
        FUZZ_MUST(u == 0 || log->users[u - 1].id < user->id);
        for (uint64_t i = 0; i < user->count; i++) {
            const struct replay_event *event = &log->events[events + i];
            FUZZ_MUST(event->user == user->id && event->item < REPLAY_ITEM_LIMIT &&
                      event->time_ms >= 0);
            FUZZ_MUST(i == 0 || event[-1].time_ms < event->time_ms ||
                      (event[-1].time_ms == event->time_ms && event[-1].order < event->order));
        }
        events += user->count;
    }
    FUZZ_MUST(events == log->count);
    for (uint64_t i = 1; i < log->item_count; i++)
        FUZZ_MUST(log->items[i - 1] < log->items[i]);
}

/* The same events in the plainest form, in the order of the file that they came from. */
static char *write_log(const struct replay_log *log, size_t *bytes)
{
    char *text = NULL;
    FILE *out = open_memstream(&text, bytes);
    bool kuairand = strcmp(log->format, "KuaiRand") == 0;
    const struct replay_event **in_order = calloc(log->count, sizeof *in_order);
    FUZZ_MUST(out && in_order);
    for (uint64_t i = 0; i < log->count; i++) {
        FUZZ_MUST(log->events[i].order < log->count && !in_order[log->events[i].order]);
        in_order[log->events[i].order] = &log->events[i];
    }
    fputs(kuairand ? "user_id,video_id,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
                     "is_hate,long_view,is_profile_enter\n"
                   : "userId,movieId,rating,timestamp\n",
          out);
    for (uint64_t i = 0; i < log->count; i++) {
        const struct replay_event *e = in_order[i];
        fprintf(out, "%llu,%llu,", (unsigned long long)e->user, (unsigned long long)e->item);
        if (kuairand) {
            fprintf(out, "%lld", (long long)e->time_ms);
            for (uint32_t bit = 0; bit < 8; bit++)
                fprintf(out, ",%u", e->action >> bit & 1);
        } else {
            fprintf(out, "%u.%u,%lld", e->action / 2, e->action % 2 * 5,
                    (long long)e->time_ms / 1000);
        }
        fputc('\n', out);
    }
    fclose(out);
    free(in_order);
    return text;
}

static int read_log(const void *data, size_t size, struct replay_log *log)
{
    static FILE *nowhere;
    if (!nowhere)
        nowhere = fopen("/dev/null", "w");
    FILE *in = fmemopen((void *)(uintptr_t)data, size, "r");
    FUZZ_MUST(in && nowhere);
    int status = replay_log_read(in, "input", nowhere, log);
    fclose(in);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct replay_log log, again;
    size_t bytes;
    if (size == 0 || read_log(data, size, &log))
        return 0;
    check(&log);
    char *text = write_log(&log, &bytes);
    FUZZ_MUST(read_log(text, bytes, &again) == 0);
    FUZZ_MUST(again.count == log.count && again.lines_skipped == 0 &&
              again.item_count == log.item_count);
    FUZZ_MUST(memcmp(again.events, log.events, log.count * sizeof *log.events) == 0);
    replay_log_close(&again);
    replay_log_close(&log);
    free(text);
    return 0;
}
