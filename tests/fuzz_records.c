/* What the store reads back: values of `users` and `pages`, put there behind its back, and the text
 * of sidekv.store. Any bytes; or right ones, changed in places, with a checksum that is right
 * again. What is taken for true must say exactly what was asked for, and be written again as it
 * was. */
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fuzz_input.h"
#include "hash.h"
#include "log.h"
#include "store_private.h"

static const struct skv_geometry geometry = {
    .layers = 1, .heads = 1, .head_dim = 64, .page_tokens = 16};
static const struct skv_id model = {.lo = 77}, user = {.lo = 1, .hi = 2};
static char directory[64], state_directory[80];
static struct skv_store *store;
static struct skv_reader *reader;

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *walk)
{
    (void)st, (void)kind, (void)walk;
    return remove(path);
}

static void remove_all(void)
{
    nftw(directory, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    skv_log_init("fuzz", SKV_LOG_ERROR - 1); /* refusals are what is wanted */
    snprintf(directory, sizeof directory, "/dev/shm/sidekv-fuzz.XXXXXX");
    if (!mkdtemp(directory))
        snprintf(directory, sizeof directory, "/tmp/sidekv-fuzz.XXXXXX");
    FUZZ_MUST(access(directory, F_OK) == 0 || mkdtemp(directory));
    atexit(remove_all);
    snprintf(state_directory, sizeof state_directory, "%s/state", directory);
    char path[80];
    snprintf(path, sizeof path, "%s/store", directory);
    FUZZ_MUST(skv_store_open(&(struct skv_store_options){.path = path,
                                                         .geometry = geometry,
                                                         .map_bytes = UINT64_C(64) << 20},
                             &store) == 0);
    FUZZ_MUST(skv_reader_open(store, &reader) == 0);
    return 0;
}

/* Puts a value, or removes it, in a transaction of its own. */
static void put(MDB_dbi database, MDB_val key, MDB_val *value)
{
    FUZZ_MUST(skv_store_begin(store) == 0);
    int rc = value ? mdb_put(store->txn, database, &key, value, 0)
                   : mdb_del(store->txn, database, &key, NULL);
    FUZZ_MUST(rc == 0 || rc == MDB_BAD_VALSIZE);
    FUZZ_MUST(skv_store_commit(store) == 0);
}

/* ---- users ---- */

static int count_record(void *context, const struct skv_record *record, const void *hashes)
{
    FUZZ_MUST(record->tokens > 0 && record->tokens <= SKV_MAX_TOKENS && !record->reserved);
    (void)hashes;
    ++*(uint32_t *)context;
    return 0;
}

static void fuzz_record(struct fuzz_input *in, uint8_t how)
{
    static uint8_t bytes[MAX_RECORD_BYTES + 64];
    static uint64_t hashes[SKV_MAX_USER_PAGES];
    struct skv_record record = {.model = model, .user = user}, got;
    struct skv_key space, changed;
    MDB_val key = skv_user_key(&space, model, user), odd_key = skv_user_key(&changed, model, user);
    size_t size;
    if (how & 8) { /* any bytes, of any length */
        size = 1 + fuzz_u32(in) % sizeof bytes;
        fuzz_take(in, bytes, size);
    } else {
        record.tokens = fuzz_u32(in) % (SKV_MAX_TOKENS + 2);
        record.generation = fuzz_u32(in);
        size = sizeof record + (record.tokens + 15) / 16 * sizeof(uint64_t);
        if (how & 16)
            size += fuzz_u8(in) % 16 - 8;
        memset(bytes, how, sizeof bytes);
        memcpy(bytes, &record, sizeof record);
        if (how & 32)
            bytes[fuzz_u8(in) % sizeof record] ^= fuzz_u8(in);
    }
    if (how & 64 && size >= sizeof record) { /* the checksum is right */
        uint32_t sum = 0, at = offsetof(struct skv_record, reserved);
        memcpy(bytes + at, &sum, sizeof sum);
        sum = (uint32_t)skv_checksum(bytes, size);
        memcpy(bytes + at, &sum, sizeof sum);
    }
    if (how & 128) { /* another key, perhaps of another length */
        changed.bytes[fuzz_u8(in) % USER_KEY_BYTES] ^= 1;
        odd_key.mv_size -= fuzz_u8(in) % 4;
    }
    MDB_val value = {size, bytes};
    put(store->users, odd_key, &value);
    uint32_t scanned = 0, count;
    FUZZ_MUST(skv_store_scan(store, count_record, &scanned) == 0 && scanned <= 1);
    FUZZ_MUST(skv_reader_begin(reader) == 0);
    int status = skv_reader_record(reader, model, user, &got, hashes, SKV_MAX_USER_PAGES, &count);
    skv_reader_end(reader);
    FUZZ_MUST(status == 0 || status == (how & 128 ? SKV_ENOENT : SKV_ECORRUPT));
    FUZZ_MUST(how & 128 || scanned == (status == 0));
    if (status == 0) {
        MDB_val again;
        FUZZ_MUST(count == (got.tokens + 15) / 16);
        FUZZ_MUST(skv_store_begin(store) == 0);
        FUZZ_MUST(skv_store_put_record(store, &got, hashes) == 0);
        FUZZ_MUST(mdb_get(store->txn, store->users, &key, &again) == 0);
        FUZZ_MUST(again.mv_size == size && memcmp(again.mv_data, bytes, size) == 0);
        FUZZ_MUST(skv_store_commit(store) == 0);
    }
    put(store->users, odd_key, NULL);
}

/* ---- pages ---- */

static void fuzz_page(struct fuzz_input *in, uint8_t how)
{
    static uint8_t bytes[16384];
    const uint64_t page_bytes = store->page_bytes;
    struct skv_trailer t = {.model = model,
                            .user = user,
                            .index = how >> 6,
                            .valid = 1 + fuzz_u8(in) % 16,
                            .generation = fuzz_u8(in),
                            .hash = fuzz_u32(in)};
    const struct skv_trailer wanted = t;
    size_t size = store->value_bytes;
    memset(bytes, how, sizeof bytes);
    t.checksum = 0;
    if (how & 8)
        ((uint8_t *)&t)[fuzz_u8(in) % sizeof t] ^= fuzz_u8(in);
    memcpy(bytes + page_bytes, &t, sizeof t);
    if (how & 16) {
        uint64_t sum = skv_checksum(bytes, size - sizeof sum);
        memcpy(bytes + size - sizeof sum, &sum, sizeof sum);
    }
    if (how & 32)
        size = fuzz_u8(in) & 1 ? size + fuzz_u8(in) - 128 : 1 + fuzz_u8(in);
    struct skv_key space;
    MDB_val key = skv_page_key(&space, model, user, wanted.index), value = {size, bytes};
    put(store->pages, key, &value);
    struct skv_location at;
    FUZZ_MUST(skv_reader_begin(reader) == 0);
    int status = skv_reader_locate(reader, model, user, wanted.index, &at);
    FUZZ_MUST(status == (size == store->value_bytes ? SKV_OK : SKV_ECORRUPT));
    uint64_t limit = wanted.generation + (how & 4 ? 0 : 1);
    if (status == 0 && skv_page_verify(at.value, page_bytes, model, user, wanted.index,
                                       wanted.valid, wanted.hash, limit) == 0) {
        memcpy(&t, (const uint8_t *)at.value + page_bytes, sizeof t);
        FUZZ_MUST(memcmp(&t, &wanted, offsetof(struct skv_trailer, generation)) == 0);
        FUZZ_MUST(t.hash == wanted.hash && t.generation <= limit);
        FUZZ_MUST(t.checksum == skv_checksum(at.value, page_bytes + sizeof t - 8));
    }
    skv_reader_end(reader);
    put(store->pages, key, NULL);
}

/* ---- sidekv.store ---- */

/* A slot as state.c writes it, with numbers of the input's. */
static void print_slot(struct fuzz_input *in, char *slot)
{
    uint8_t how = fuzz_u8(in);
    int used = snprintf(slot, 512,
                        "sidekv store %u sequence %u geometry %u %u 64 16 durability %s boot %s "
                        "clean %u damaged %u check ",
                        how & 1 ? fuzz_u8(in) : 1, fuzz_u8(in), fuzz_u8(in), fuzz_u8(in),
                        how & 2 ? "power" : "process", how & 4 ? "unknown" : "0-0", how >> 3 & 1,
                        how >> 4 & 1);
    uint64_t check = skv_checksum(slot, (size_t)used);
    used += snprintf(slot + used, 512 - (size_t)used, "%016llx", (unsigned long long)check);
    memset(slot + used, ' ', 512 - (size_t)used);
    for (uint32_t changes = how >> 5; changes > 0; changes--) {
        uint8_t where = fuzz_u8(in);
        slot[where] = (char)fuzz_u8(in);
    }
}

static void fuzz_state(struct fuzz_input *in, uint8_t how)
{
    char text[1024] = {0}, path[96];
    size_t size = sizeof text;
    if (how & 8) {
        size = fuzz_u32(in) % sizeof text;
        fuzz_take(in, text, size);
    } else {
        print_slot(in, text);
        print_slot(in, text + 512);
    }
    snprintf(path, sizeof path, "%s/sidekv.store", state_directory);
    mkdir(state_directory, 0700);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    FUZZ_MUST(fd >= 0 && write(fd, text, size) == (ssize_t)size);
    close(fd);
    struct skv_state state, again;
    bool fresh;
    int status = skv_state_open(state_directory, &state, &fresh);
    FUZZ_MUST(status == 0 || status == SKV_ENOTSUP || status == SKV_ECORRUPT);
    if (status)
        return;
    struct skv_state before = state;
    FUZZ_MUST(skv_state_write(&state) == 0);
    uint64_t sequence = state.sequence;
    skv_state_close(&state);
    FUZZ_MUST(skv_state_open(state_directory, &again, &fresh) == 0);
    if (!fresh && sequence) {
        FUZZ_MUST(again.sequence == sequence && again.durability == before.durability);
        FUZZ_MUST(again.clean == before.clean && again.damaged == before.damaged);
        FUZZ_MUST(memcmp(&again.geometry, &before.geometry, sizeof again.geometry) == 0);
        FUZZ_MUST(strcmp(again.boot, before.boot) == 0);
    }
    skv_state_close(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {.at = data, .end = data + size};
    uint8_t how = fuzz_u8(&in);
    switch (how & 3) {
    case 0:
    case 1:
        fuzz_record(&in, how);
        break;
    case 2:
        fuzz_page(&in, how);
        break;
    default:
        fuzz_state(&in, how);
    }
    return 0;
}
