/* Reading the store: snapshots for the copy thread, the scan at start, and the check of a page.
 *
 * LMDB has no checksums of its own, so everything read is told, not promised: lengths, alignment
 * and bounds are checked before a location is handed out, records carry a checksum, pages theirs.
 */
#include <stdlib.h>
#include <string.h>

#include "hash.h"
#include "log.h"
#include "store_private.h"

struct skv_reader {
    struct skv_store *store;
    MDB_txn *txn; /* reset and renewed; NULL: none yet */
    bool active;
};

int skv_reader_open(struct skv_store *store, struct skv_reader **out)
{
    struct skv_reader *reader = calloc(1, sizeof *reader);
    if (!reader)
        return SKV_ENOMEM;
    reader->store = store;
    int rc = skv_reader_begin(reader);
    if (rc) {
        free(reader);
        return rc;
    }
    skv_reader_end(reader);
    *out = reader;
    return 0;
}

int skv_reader_begin(struct skv_reader *reader)
{
    struct skv_store *store = reader->store;
    skv_reader_end(reader);
    if (!store->env)
        return SKV_EIO;
    int rc = reader->txn ? mdb_txn_renew(reader->txn)
                         : mdb_txn_begin(store->env, NULL, MDB_RDONLY, &reader->txn);
    rc = skv_begin_status(store, "beginning to read", rc);
    reader->active = rc == 0;
    return rc;
}

void skv_reader_end(struct skv_reader *reader)
{
    if (reader->active)
        mdb_txn_reset(reader->txn);
    reader->active = false;
}

void skv_reader_release(struct skv_reader *reader)
{
    if (reader->txn)
        mdb_txn_abort(reader->txn);
    reader->txn = NULL;
    reader->active = false;
}

void skv_reader_close(struct skv_reader *reader)
{
    if (reader)
        skv_reader_release(reader);
    free(reader);
}

int skv_record_parse(const struct skv_store *store, const MDB_val *key, const MDB_val *value,
                     struct skv_record *record, const uint8_t **hashes)
{
    uint8_t bytes[MAX_RECORD_BYTES];
    struct skv_record head;
    struct skv_key space;
    if (value->mv_size < sizeof head || value->mv_size > sizeof bytes ||
        key->mv_size != USER_KEY_BYTES)
        return SKV_ECORRUPT;
    memcpy(bytes, value->mv_data, value->mv_size);
    memcpy(&head, bytes, sizeof head);
    uint32_t sum = head.reserved;
    head.reserved = 0;
    memcpy(bytes, &head, sizeof head);
    skv_user_key(&space, head.model, head.user);
    if (head.tokens == 0 || head.tokens > SKV_MAX_TOKENS ||
        value->mv_size != sizeof head + skv_store_pages(store, head.tokens) * sizeof(uint64_t) ||
        sum != (uint32_t)skv_checksum(bytes, value->mv_size) ||
        memcmp(space.bytes, key->mv_data, USER_KEY_BYTES) != 0)
        return SKV_ECORRUPT;
    *record = head;
    *hashes = (const uint8_t *)value->mv_data + sizeof head;
    return 0;
}

int skv_store_scan(struct skv_store *store,
                   int (*each)(void *context, const struct skv_record *record, const void *hashes),
                   void *context)
{
    MDB_txn *txn;
    MDB_cursor *cursor;
    uint64_t damaged = 0;
    int rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn);
    if (rc)
        return skv_lmdb_status("scanning users", rc);
    rc = mdb_cursor_open(txn, store->users, &cursor);
    if (rc == 0) {
        MDB_val key, value;
        while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
            struct skv_record record;
            const uint8_t *hashes;
            if (skv_record_parse(store, &key, &value, &record, &hashes))
                damaged++;
            else if (each(context, &record, hashes))
                break;
        }
        mdb_cursor_close(cursor);
    }
    mdb_txn_abort(txn);
    if (damaged)
        skv_warn("store: %llu damaged user records are ignored", (unsigned long long)damaged);
    return rc == MDB_NOTFOUND ? 0 : skv_lmdb_status("scanning users", rc);
}

int skv_reader_record(struct skv_reader *reader, struct skv_id model, struct skv_id user,
                      struct skv_record *record, uint64_t *hashes, uint32_t capacity,
                      uint32_t *count)
{
    if (!reader->active)
        return SKV_EINVAL;
    struct skv_key space;
    MDB_val key = skv_user_key(&space, model, user), value;
    const uint8_t *stored;
    int rc = skv_lmdb_status("reading a record",
                             mdb_get(reader->txn, reader->store->users, &key, &value));
    if (rc)
        return rc;
    rc = skv_record_parse(reader->store, &key, &value, record, &stored);
    if (rc) {
        skv_warn("store: the record of user %016llx%016llx is damaged", (unsigned long long)user.hi,
                 (unsigned long long)user.lo);
        return rc;
    }
    *count = skv_store_pages(reader->store, record->tokens);
    memcpy(hashes, stored, (*count < capacity ? *count : capacity) * sizeof *hashes);
    return 0;
}

int skv_reader_locate(struct skv_reader *reader, struct skv_id model, struct skv_id user,
                      uint32_t index, struct skv_location *location)
{
    if (!reader->active)
        return SKV_EINVAL;
    const struct skv_store *store = reader->store;
    struct skv_key space;
    MDB_val key = skv_page_key(&space, model, user, index), value;
    int rc = skv_lmdb_status("locating a page", mdb_get(reader->txn, store->pages, &key, &value));
    if (rc)
        return rc;
    uint64_t offset =
        (uintptr_t)value.mv_data - (uintptr_t)store->map - LMDB_PAGE_HEADER; /* of the extent */
    if (value.mv_size != store->value_bytes || offset % LMDB_PAGE_BYTES != 0 ||
        offset > store->map_bytes - store->extent_bytes) {
        skv_error("store: page %u of user %016llx%016llx lies where none can", index,
                  (unsigned long long)user.hi, (unsigned long long)user.lo);
        return SKV_ECORRUPT;
    }
    *location = (struct skv_location){
        .value = value.mv_data,
        .extent_offset = offset,
        .extent_bytes = (uint32_t)store->extent_bytes,
        .value_offset = LMDB_PAGE_HEADER,
    };
    return 0;
}

int skv_page_verify(const void *value, uint64_t page_bytes, struct skv_id model, struct skv_id user,
                    uint32_t index, uint32_t valid, uint64_t hash, uint64_t generation)
{
    struct skv_trailer t;
    memcpy(&t, (const uint8_t *)value + page_bytes, sizeof t);
    if (!skv_id_equal(t.model, model) || !skv_id_equal(t.user, user) || t.index != index ||
        t.valid != valid || t.hash != hash || t.generation > generation)
        return SKV_ECORRUPT;
    uint64_t summed = page_bytes + sizeof t - sizeof t.checksum;
    return t.checksum == skv_checksum(value, summed) ? 0 : SKV_ECORRUPT;
}
