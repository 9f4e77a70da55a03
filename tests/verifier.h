/* A good worker that notices: it writes bytes of its own into every token that it appends, and
 * compares those of every token that it is granted. Several may share their users: all write the
 * same bytes for a token. */
#ifndef SKV_VERIFIER_H
#define SKV_VERIFIER_H

#include <stdarg.h>

#include "daemon_rig.h"
#include "page_bytes.h"

#define VERIFIER_USERS  64u
#define VERIFIER_TOKENS 160u /* the longest history */

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};

struct verifier {
    struct skv *skv;
    struct page_bytes bytes;
    uint32_t users; /* at most VERIFIER_USERS */
    uint32_t seed;
    bool alone; /* nobody else uses them: what is committed is granted, and nothing goes stale */
    uint32_t committed[VERIFIER_USERS];
    uint64_t requests, tokens, gated, failures;
};

/* Says what is wrong, the first few times. Returns false. */
__attribute__((format(printf, 2, 3))) static inline bool verifier_fail(struct verifier *v,
                                                                       const char *format, ...)
{
    va_list arguments;
    if (v->failures++ >= 5)
        return false;
    va_start(arguments, format);
    fprintf(stderr, "worker %d: ", (int)getpid());
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return false;
}

static inline uint64_t verifier_token(uint32_t user, uint32_t i)
{
    return (user * UINT64_C(1000) + i + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

/* A token's rows, [layer][K|V][head] of 128 bytes: written, or compared. */
static inline bool verifier_rows(struct verifier *v, const uint32_t *pages, uint32_t user,
                                 uint32_t token, bool write)
{
    uint64_t word = verifier_token(user, token) ^ (user + 1) * UINT64_C(0xd6e8feb86659fd93);
    for (uint32_t row = 0; row < 8; row++) {
        uint64_t *at = page_bytes_row(&v->bytes, pages, token, row, write);
        for (uint32_t i = 0; i < 16; i++) {
            if (write)
                at[i] = word + row;
            else if (at[i] != word + row)
                return verifier_fail(v, "user %u, token %u: another's bytes", user, token);
        }
    }
    v->tokens += !write;
    return true;
}

/* One request: waits for the gates, compares what is cached, appends the rest, commits. */
static inline bool verifier_serve(struct verifier *v, uint32_t user, uint32_t history,
                                  uint32_t flags)
{
    uint64_t tokens[VERIFIER_TOKENS];
    struct skv_batch batch;
    struct skv_committed result;
    for (uint32_t i = 0; i < history; i++)
        tokens[i] = verifier_token(user, i);
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = history,
                                  .max_cached = UINT32_MAX,
                                  .flags = flags};
    int status = skv_acquire(v->skv, 0, &request, 1, &batch);
    const struct skv_grant *grant = &batch.grants[0];
    if (status || grant->status)
        return verifier_fail(v, "ACQUIRE: %s", skv_strerror(status ? status : grant->status));
    v->requests++;
    v->gated += batch.gated;
    for (uint32_t layer = 0; batch.gated && layer < tiny.layers; layer++)
        if ((status = skv_gate_wait(skv_gate_row(v->skv, 0) + layer, 20000)))
            return verifier_fail(v, "a gate that does not open: %s", skv_strerror(status));
    if ((status = skv_batch_status(v->skv, &batch)) && v->alone)
        return verifier_fail(v, "the batch: %s", skv_strerror(status));
    uint32_t least = v->committed[user] < history ? v->committed[user] : history;
    if (v->alone && grant->cached < least - least % tiny.page_tokens) /* whole pages of it */
        verifier_fail(v, "user %u: %u cached of %u committed", user, grant->cached, least);
    bool loaded = !status;
    if (loaded && (status = page_bytes_fetch(&v->bytes, grant->pages, grant->cached)))
        return verifier_fail(v, "copying pages: %s", skv_strerror(status));
    for (uint32_t i = 0; loaded && i < grant->cached; i++)
        if (!verifier_rows(v, grant->pages, user, i, false))
            break;
    bool appends = loaded && grant->flags & SKV_GRANT_APPEND;
    for (uint32_t i = grant->cached; appends && i < history; i++)
        verifier_rows(v, grant->pages, user, i, true);
    if (appends && (status = page_bytes_store(&v->bytes, grant->pages, grant->cached, history)))
        return verifier_fail(v, "copying pages: %s", skv_strerror(status));
    if (!appends || rand_r(&v->seed) % 8 == 0) {
        status = skv_release(v->skv, &batch);
        return !status || verifier_fail(v, "RELEASE: %s", skv_strerror(status));
    }
    status = skv_commit(v->skv, &batch, &result);
    if (status || (result.status && v->alone))
        return verifier_fail(v, "COMMIT: %s", skv_strerror(status ? status : result.status));
    v->committed[user] = result.committed;
    return true;
}

/* One of everything that a worker does. */
static inline void verifier_step(struct verifier *v)
{
    uint32_t dice = (uint32_t)rand_r(&v->seed) % 100, user = (uint32_t)rand_r(&v->seed) % v->users;
    uint32_t history = 1 + (uint32_t)rand_r(&v->seed) % VERIFIER_TOKENS;
    const struct skv_id own = {0}, id = skv_user_integer(user);
    struct skv_user_info info;
    struct skv_stats stats;
    int status = 0;
    if (dice < 60)
        verifier_serve(v, user, history, 0);
    else if (dice < 85)
        verifier_serve(v, user, history, SKV_REQUEST_READ);
    else if (dice < 90)
        status = skv_evict(v->skv, own, id);
    else if (dice < 92)
        status = skv_flush(v->skv);
    else if (dice < 94)
        status = skv_lookup(v->skv, own, id, &info);
    else if (dice < 96)
        status = skv_stats(v->skv, &stats);
    else if (dice < 98)
        status = skv_truncate(v->skv, own, id, history);
    else
        status = skv_forget(v->skv, own, id);
    if (dice >= 96)
        v->committed[user] = 0; /* at least */
    if (status && status != SKV_ENOENT && (status != SKV_EBUSY || v->alone))
        verifier_fail(v, "command %u: %s", dice, skv_strerror(status));
}

static inline bool verifier_open(struct verifier *v, const struct rig *rig, struct skv_id model)
{
    int status = rig_connect(
        rig, (struct skv_options){.geometry = tiny, .model = model, .rows = 1, .timeout_ms = 60000},
        &v->skv);
    if (!status)
        status = page_bytes_open(&v->bytes, v->skv, VERIFIER_TOKENS / tiny.page_tokens);
    return !status || verifier_fail(v, "no session: %s", skv_strerror(status));
}

static inline void verifier_close(struct verifier *v)
{
    page_bytes_close(&v->bytes);
    skv_close(v->skv);
}

#endif
