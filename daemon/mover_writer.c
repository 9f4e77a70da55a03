/* The writer thread: everything that changes the store, in the order in which it was handed in.
 *
 * Offloads are gathered into transactions of the store's batch size; a longer one is spread over
 * several, its record moving forward with each, so that every commit leaves a valid, shorter
 * prefix. Changes of records go in transactions of their own. When a transaction fails it is
 * aborted, and every offload in it gets the status; changes are tried again one by one, since a
 * removal that shares its fate with a neighbour could keep a full store full. Those that fail alone
 * are owed: made before anything that comes later, which fails with them until then. */
#include "mover_internal.h"

#include <assert.h>

#include "failpoint.h"
#include "log.h"

#define BATCH_JOBS    256u
#define BATCH_CHANGES 16u /* a removal of 2,048 large pages frees half a million of LMDB's */

static void answer(struct skv_mover *mover, enum skv_mover_event_kind kind, void *job, int status)
{
    struct skv_message message = {.kind = kind, .status = status, .job = job};
    skv_queue_push(&mover->write_events, &message);
    skv_bell_ring(&mover->loop_bell);
}

static void count_failure(struct skv_mover *mover)
{
    mover->store_errors++;
}

/* ---- changes ---- */

static int change_one(struct skv_store *store, const struct skv_change *change)
{
    switch (change->kind) {
    case SKV_CHANGE_RECORD:
        return skv_store_put_record(store, &change->record, change->hashes);
    case SKV_CHANGE_GENERATION:
        return skv_store_put_generation(store, change->record.generation);
    case SKV_CHANGE_SYNC:
        return 0; /* what came before has been answered: that is all */
    }
    return SKV_EINVAL;
}

static int change_all(struct skv_mover *mover, struct skv_change **changes, uint32_t count)
{
    struct skv_store *store = mover->options.store;
    int status = skv_store_begin(store);
    if (status)
        return status;
    for (uint32_t i = 0; i < count && status == 0; i++)
        status = change_one(store, changes[i]);
    skv_failpoint(FAIL_change_uncommitted);
    if (status)
        skv_store_abort(store);
    else
        status = skv_store_commit(store);
    return status;
}

/* Keeps a change that failed for later. */
static void owe(struct skv_mover *mover, struct skv_change *change)
{
    struct writer *writer = &mover->writer;
    count_failure(mover);
    change->owed = NULL;
    *(writer->owed ? &writer->owed_last->owed : &writer->owed) = change;
    writer->owed_last = change;
}

/* Makes the changes that are owed, in order; the status of the first that fails. */
static int pay(struct skv_mover *mover)
{
    struct writer *writer = &mover->writer;
    int status = 0;
    for (struct skv_change *change; status == 0 && (change = writer->owed);) {
        if ((status = change_all(mover, &change, 1)) != 0)
            break;
        writer->owed = change->owed;
        answer(mover, SKV_MOVER_CHANGED, change, 0);
    }
    return status;
}

/* What a transaction came to, in the words that stop offload. */
static int told(int status)
{
    return status == 0 || status == SKV_ENOSPC || status == SKV_ENOMEM ? status : SKV_EIO;
}

static void write_changes(struct skv_mover *mover)
{
    struct skv_change *changes[BATCH_CHANGES];
    struct skv_message message;
    uint32_t count = 0;
    while (count < BATCH_CHANGES && skv_queue_peek(&mover->writes, &message) &&
           message.kind == COMMAND_CHANGE) {
        changes[count++] = message.job;
        skv_queue_pop(&mover->writes, &message);
    }
    int status = pay(mover);
    if (status == 0)
        status = change_all(mover, changes, count);
    skv_failpoint(FAIL_change_committed);
    bool together = status == 0;
    for (uint32_t i = 0; i < count; i++) {
        if (!together && !mover->writer.owed)
            status = change_all(mover, &changes[i], 1);
        if (status && changes[i]->kind != SKV_CHANGE_SYNC)
            owe(mover, changes[i]);
        answer(mover, SKV_MOVER_CHANGED, changes[i], told(status));
    }
}

/* ---- offloads ---- */

struct part { /* an offload in a transaction */
    struct skv_offload *job;
    uint32_t from, to; /* moves put in it */
    int32_t status;    /* 0, or SKV_ESTALE: dropped, nothing put */
};

struct batch { /* a transaction */
    struct part parts[BATCH_JOBS];
    uint32_t count;
    uint64_t bytes;
};

static bool dropped(const struct skv_offload *job)
{
    /* The loop stores it, before it hands in the change that made the pages old. Should this look
     * miss it, that change comes later in the queue, and takes the pages away again. */
    return __atomic_load_n(&job->drop, __ATOMIC_ACQUIRE) != 0;
}

/* May the record end here for a while? Yes if all that the final record still lacks comes with
 * this job: then what is in the store is a prefix. */
static bool may_split(const struct skv_mover *mover, const struct skv_offload *job, uint32_t put)
{
    uint32_t tokens = mover->options.geometry.page_tokens;
    const struct skv_move *last = &job->moves[put - 1];
    return put < job->move_count && last->valid == tokens &&
           (job->record.tokens - 1) / tokens - last->index == job->move_count - put;
}

static int put_record(struct skv_mover *mover, const struct skv_offload *job, uint32_t put)
{
    struct skv_record record = job->record;
    if (put < job->move_count) {
        uint32_t index = job->moves[put - 1].index;
        record.tokens = (index + 1) * mover->options.geometry.page_tokens;
        record.hash_full = record.hash_tail = job->hashes[index];
    }
    return skv_store_put_record(mover->options.store, &record, job->hashes);
}

/* Puts pages of the job until it or the transaction is complete, and its record. */
static int put_part(struct skv_mover *mover, struct batch *batch, struct part *part)
{
    struct skv_offload *job = part->job;
    uint64_t limit = mover->options.durability == SKV_POWER ? SKV_STORE_BATCH_BYTES_POWER
                                                            : SKV_STORE_BATCH_BYTES;
    int status = 0;
    do {
        const struct skv_move *move = &job->moves[part->to];
        status = skv_store_put_page(mover->options.store, &job->record, move->index, move->valid,
                                    move->generation, move->hash, out_slot(mover, job, part->to));
        part->to++;
        batch->bytes += mover->page_bytes;
        skv_failpoint(FAIL_store_page);
    } while (status == 0 && part->to < job->move_count &&
             !(batch->bytes >= limit && may_split(mover, job, part->to)));
    return status ? status : put_record(mover, job, part->to);
}

/* The next offload for this transaction: one that began earlier, or one from the queue. */
static bool take_part(struct skv_mover *mover, struct batch *batch)
{
    struct writer *writer = &mover->writer;
    struct skv_message message;
    if (!writer->offload) {
        if (batch->count == BATCH_JOBS || !skv_queue_peek(&mover->writes, &message) ||
            message.kind != COMMAND_OFFLOAD)
            return false;
        skv_queue_pop(&mover->writes, &message);
        writer->offload = message.job;
        writer->committed = 0;
    }
    batch->parts[batch->count++] = (struct part){
        .job = writer->offload,
        .from = writer->committed,
        .to = writer->committed,
        .status = dropped(writer->offload) ? SKV_ESTALE : 0,
    };
    return true;
}

/* Fills the open transaction. An offload that does not fit stays in writer->offload. */
static int fill(struct skv_mover *mover, struct batch *batch)
{
    uint64_t limit = mover->options.durability == SKV_POWER ? SKV_STORE_BATCH_BYTES_POWER
                                                            : SKV_STORE_BATCH_BYTES;
    struct writer *writer = &mover->writer;
    while (batch->bytes < limit && take_part(mover, batch)) {
        struct part *part = &batch->parts[batch->count - 1];
        int status = part->status ? 0 : put_part(mover, batch, part);
        if (status)
            return status;
        if (part->status || part->to == part->job->move_count)
            writer->offload = NULL;
    }
    return 0;
}

/* Pages put in a registered window need no verifying: their bytes were just checksummed. */
static void mark_verified(struct skv_mover *mover, const struct batch *batch)
{
    struct skv_pinner *pinner = mover->options.pinner;
    struct skv_reader *reader = mover->writer.reader;
    struct skv_location location;
    if (!pinner || skv_reader_begin(reader) != 0)
        return;
    for (uint32_t i = 0; i < batch->count; i++) {
        const struct part *part = &batch->parts[i];
        for (uint32_t move = part->from; move < part->to; move++)
            if (skv_reader_locate(reader, part->job->record.model, part->job->record.user,
                                  part->job->moves[move].index, &location) == 0 &&
                skv_pinner_covers(pinner, location.value, mover->page_bytes + SKV_TRAILER_BYTES))
                skv_pinner_mark(pinner, location.value);
    }
    skv_reader_end(reader);
}

/* After the commit or the abort: gives staging back, then answers every job that is finished. */
static void settle(struct skv_mover *mover, const struct batch *batch, int status)
{
    struct writer *writer = &mover->writer;
    uint64_t freed = 0, put = 0;
    if (status) {
        count_failure(mover);
        writer->offload = NULL; /* whatever was left of it */
    }
    for (uint32_t i = 0; i < batch->count; i++) {
        const struct part *part = &batch->parts[i];
        bool unfinished = part->job == writer->offload;
        freed += (unfinished ? part->to : part->job->move_count) - part->from;
        put += part->to - part->from;
        if (unfinished)
            writer->committed = part->to;
    }
    if (status == 0)
        mover->offload_pages += put;
    /* Release: the slots' bytes have been read. Pairs with skv_mover_offload_pages(). */
    atomic_fetch_add_explicit(&mover->out_freed, freed, memory_order_release);
    for (uint32_t i = 0; i < batch->count; i++) {
        const struct part *part = &batch->parts[i];
        if (part->job != writer->offload) {
            part->job->stored_moves = part->from;
            answer(mover, SKV_MOVER_STORED, part->job, part->status ? part->status : status);
        }
    }
}

static void write_offloads(struct skv_mover *mover)
{
    struct batch batch = {0};
    struct skv_store *store = mover->options.store;
    int status = pay(mover);
    if (status == 0)
        status = skv_store_begin(store);
    if (status)
        take_part(mover, &batch); /* one that fails with it */
    else {
        status = fill(mover, &batch);
        skv_failpoint(FAIL_store_uncommitted);
        if (status)
            skv_store_abort(store);
        else
            status = skv_store_commit(store);
    }
    skv_failpoint(FAIL_store_committed);
    if (status == 0)
        mark_verified(mover, &batch);
    settle(mover, &batch, told(status));
}

void *writer_run(void *argument)
{
    struct skv_mover *mover = argument;
    struct skv_message message;
    for (;;) {
        if (mover->writer.offload)
            write_offloads(mover);
        else if (!skv_queue_peek(&mover->writes, &message)) {
            skv_bell_arm(&mover->write_bell);
            if (!skv_queue_ready(&mover->writes))
                skv_bell_wait(&mover->write_bell, UINT64_MAX);
        } else if (message.kind == COMMAND_OFFLOAD)
            write_offloads(mover);
        else if (message.kind == COMMAND_CHANGE)
            write_changes(mover);
        else
            break; /* COMMAND_STOP: everything before it is done */
    }
    skv_queue_pop(&mover->writes, &message);
    pay(mover);
    return NULL;
}
