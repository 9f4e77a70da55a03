/* Looking and managing: one command each, answers in the completion or in the scratch area. Workers
 * and admins alike. */
#include "skv_session.h"

#include <string.h>

static int call_user(struct skv *skv, enum wire_opcode opcode, struct skv_id model,
                     struct skv_id user, uint64_t argument, struct wire_cqe *cqe)
{
    /* The daemon would take these for a broken session, and end it. */
    if (argument > SKV_MAX_TOKENS ||
        (!skv->options.admin && !skv_id_is_zero(model) && !skv_id_equal(model, skv->options.model)))
        return SKV_EINVAL;
    struct wire_sqe sqe = {
        .opcode = (uint8_t)opcode, .model = model, .user = user, .argument = argument};
    return skv_call_again(skv, &sqe, skv_deadline(skv), cqe);
}

int skv_ping(struct skv *skv, uint64_t *round_trip_ns)
{
    struct wire_sqe sqe = {.opcode = WIRE_NOP};
    struct wire_cqe cqe;
    uint64_t start = skv_now_ns();
    int status = skv_call_again(skv, &sqe, skv_deadline(skv), &cqe);
    if (!status && round_trip_ns)
        *round_trip_ns = skv_now_ns() - start;
    return status;
}

int skv_lookup(struct skv *skv, struct skv_id model, struct skv_id user, struct skv_user_info *info)
{
    struct wire_cqe cqe;
    int status = call_user(skv, WIRE_LOOKUP, model, user, 0, &cqe);
    if (status || !info)
        return status;
    *info = (struct skv_user_info){.model = {.lo = cqe.value[4], .hi = cqe.value[5]},
                                   .user = user,
                                   .generation = cqe.value[0],
                                   .last_use_s = cqe.value[3],
                                   .committed = (uint32_t)cqe.value[1],
                                   .resident = (uint32_t)(cqe.value[1] >> 32),
                                   .stored = (uint32_t)cqe.value[2],
                                   .leases = (uint32_t)(cqe.value[2] >> 32)};
    return SKV_OK;
}

int skv_evict(struct skv *skv, struct skv_id model, struct skv_id user)
{
    struct wire_cqe cqe;
    return call_user(skv, WIRE_EVICT, model, user, 0, &cqe);
}

int skv_forget(struct skv *skv, struct skv_id model, struct skv_id user)
{
    struct wire_cqe cqe;
    return call_user(skv, WIRE_FORGET, model, user, 0, &cqe);
}

int skv_truncate(struct skv *skv, struct skv_id model, struct skv_id user, uint32_t tokens)
{
    struct wire_cqe cqe;
    return call_user(skv, WIRE_TRUNCATE, model, user, tokens, &cqe);
}

int skv_flush(struct skv *skv)
{
    struct wire_sqe sqe = {.opcode = WIRE_FLUSH};
    struct wire_cqe cqe;
    return skv_call_again(skv, &sqe, SKV_NO_DEADLINE, &cqe);
}

int skv_list(struct skv *skv, uint64_t *cursor, struct skv_user_info *infos, uint32_t capacity)
{
    if (!cursor || !infos || capacity == 0)
        return SKV_EINVAL;
    if (capacity > WIRE_LIST_USERS)
        capacity = WIRE_LIST_USERS;
    struct wire_sqe sqe = {.opcode = WIRE_LIST, .count = capacity, .argument = *cursor};
    struct wire_cqe cqe;
    int status = skv_call_again(skv, &sqe, skv_deadline(skv), &cqe);
    if (status)
        return status;
    if (cqe.count > capacity)
        return skv_violation(skv, "LIST's count");
    memcpy(infos, skv_scratch(skv), cqe.count * sizeof *infos);
    *cursor = cqe.value[0];
    return (int)cqe.count;
}

int skv_stats(struct skv *skv, struct skv_stats *stats)
{
    struct wire_sqe sqe = {.opcode = WIRE_STATS};
    struct wire_cqe cqe;
    int status = skv_call_again(skv, &sqe, skv_deadline(skv), &cqe);
    if (status || !stats)
        return status;
    if (cqe.count == 0 || cqe.count > WIRE_SCRATCH_BYTES / sizeof(uint64_t))
        return skv_violation(skv, "STATS's count");
    size_t told = cqe.count * sizeof(uint64_t);
    *stats = (struct skv_stats){0};
    memcpy(stats, skv_scratch(skv), told < sizeof *stats ? told : sizeof *stats);
    return SKV_OK;
}

int skv_restart(struct skv *skv)
{
    struct wire_sqe sqe = {.opcode = WIRE_RESTART};
    struct wire_cqe cqe;
    if (!skv->options.admin)
        return SKV_EINVAL;
    return skv_call(skv, &sqe, skv_deadline(skv), &cqe);
}
