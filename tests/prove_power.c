/* Promise 5: what a store is after the power went away at any moment.
 *
 * A few lives of a store are recorded, write by write and sync by sync (shim_power.c), each in a
 * process of its own: transactions of users that come, grow, shrink, change and go, under both
 * durabilities, closed in good order or not, on one boot of the machine or the next. A crash state
 * is then what a disk may hold at some point of that: of every file all that was synced, and of
 * what was written since any part, sector by sector, in any order, its size and its name included.
 * Each is opened as after a reboot, in a process of its own:
 *
 *   power     it is the store as of the last commit that returned, or one later, to the byte;
 *   process   it is empty, unless it was closed in good order; then it is that to the byte;
 *
 * and it takes a transaction and is closed. */
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "hash.h"
#include "log.h"
#include "power.h"
#include "prove.h"
#include "store.h"

#define GEOMETRY   ((struct skv_geometry){.layers = 1, .heads = 1, .head_dim = 64, .page_tokens = 16})
#define PAGE_BYTES 4096u
#define MODEL      ((struct skv_id){.lo = 0x90e4, .hi = 5})
#define MAP_BYTES  (UINT64_C(64) << 20)
#define KEPT_BYTES (UINT64_C(8) << 20) /* of a file: more is never written, only zero */
#define USERS      12u
#define MAX_TOKENS 400u
#define COMMITS    400u
#define GENERATION 1000u /* of the high-water mark: this and the commit's number */
#define INODES     24u
#define PENDING    8192u

static uint64_t draw(uint64_t *state, uint64_t below)
{
    *state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t x = (*state ^ *state >> 31) * UINT64_C(0xbf58476d1ce4e5b9);
    return (x ^ x >> 29) % below;
}

/* ---- the history: what commit k makes of the users of k - 1 ---- */

struct subject {
    uint32_t tokens, version;
};

struct world {
    struct subject users[USERS];
};

static struct world worlds[COMMITS + 1];
static uint64_t seed;

/* Commit k changes user `*which`. */
static struct subject change_of(uint32_t k, const struct world *before, uint32_t *which)
{
    uint64_t random = seed * 1000003 + k;
    *which = (uint32_t)draw(&random, USERS);
    struct subject u = before->users[*which];
    uint64_t kind = draw(&random, 10);
    if (kind == 0)
        u.tokens = 0;
    else if (kind == 1 && u.tokens > 32)
        u.tokens = (uint32_t)draw(&random, u.tokens / 16) * 16 + 16;
    else if (kind == 2 || u.tokens + 60 > MAX_TOKENS || u.tokens == 0)
        u = (struct subject){.tokens = 1 + (uint32_t)draw(&random, 90), .version = k};
    else
        u.tokens += 1 + (uint32_t)draw(&random, 60);
    return u;
}

static void make_world(uint32_t k, bool cold)
{
    static const struct world none;
    const struct world *before = cold ? &none : &worlds[k - 1];
    uint32_t which;
    worlds[k] = *before;
    struct subject u = change_of(k, before, &which);
    worlds[k].users[which] = u;
}

static uint32_t hashes_of(uint32_t user, struct subject u, uint64_t *hashes)
{
    uint64_t tokens[MAX_TOKENS];
    for (uint32_t i = 0; i < u.tokens; i++)
        tokens[i] = (uint64_t)u.version << 32 | i;
    return skv_chain_hashes(MODEL, skv_user_integer(user), GEOMETRY.page_tokens, tokens, u.tokens,
                            0, hashes);
}

static uint32_t valid_of(struct subject u, uint32_t index)
{
    uint32_t left = u.tokens - index * GEOMETRY.page_tokens;
    return left < GEOMETRY.page_tokens ? left : GEOMETRY.page_tokens;
}

/* Tokens are 128 bytes, all K before all V; those past `valid` are zero. */
static void fill_page(uint32_t user, struct subject u, uint32_t index, uint8_t *page)
{
    for (uint32_t at = 0; at < PAGE_BYTES; at += 8) {
        uint64_t word = ((uint64_t)user << 48 | (uint64_t)u.version << 24 | index << 12 | at) *
                        UINT64_C(0xbf58476d1ce4e5b9);
        if (at % (PAGE_BYTES / 2) / 128 >= valid_of(u, index))
            word = 0;
        memcpy(page + at, &word, 8);
    }
}

static struct skv_record record_of(uint32_t user, struct subject u, const uint64_t *hashes,
                                   uint32_t count)
{
    uint32_t full = u.tokens / GEOMETRY.page_tokens;
    return (struct skv_record){
        .model = MODEL,
        .user = skv_user_integer(user),
        .generation = 1 + u.version,
        .hash_full = full ? hashes[full - 1] : skv_chain_start(MODEL, skv_user_integer(user)),
        .hash_tail = count ? hashes[count - 1] : 0,
        .tokens = u.tokens,
    };
}

static int commit(struct skv_store *store, uint32_t k, const struct world *before)
{
    uint64_t hashes[MAX_TOKENS];
    uint32_t user;
    struct subject u = change_of(k, before, &user), old = before->users[user];
    uint32_t count = hashes_of(user, u, hashes);
    bool grows = u.version == old.version && u.tokens > old.tokens;
    struct skv_record record = record_of(user, u, hashes, count);
    int rc = skv_store_begin(store);
    for (uint32_t index = grows ? old.tokens / GEOMETRY.page_tokens : 0;
         rc == 0 && index < count && (grows || u.version != old.version || index == count - 1);
         index++) {
        uint8_t page[PAGE_BYTES + SKV_TRAILER_BYTES];
        fill_page(user, u, index, page);
        rc = skv_store_put_page(store, &record, index, valid_of(u, index), record.generation,
                                hashes[index], page);
    }
    if (rc == 0)
        rc = skv_store_put_record(store, &record, hashes);
    if (rc == 0)
        rc = skv_store_put_generation(store, GENERATION + k);
    return rc ? rc : skv_store_commit(store);
}

/* ---- the lives, recorded ---- */

struct life {
    enum skv_durability durability;
    uint32_t boot;    /* of the machine */
    uint32_t commits; /* that it makes */
    bool cold;        /* it finds nothing that it may trust */
    bool closes;
};

static const struct life lives[] = {
    {SKV_POWER, 1, 40, true, false},   {SKV_POWER, 2, 30, false, true},
    {SKV_PROCESS, 2, 25, false, true}, {SKV_PROCESS, 2, 25, false, false},
    {SKV_PROCESS, 2, 20, false, true}, {SKV_PROCESS, 3, 25, false, false},
    {SKV_POWER, 3, 25, false, false},  {SKV_PROCESS, 4, 20, false, false},
    {SKV_POWER, 5, 30, true, true},    {SKV_PROCESS, 5, 20, false, false},
    {SKV_PROCESS, 6, 25, true, true},  {SKV_POWER, 7, 20, false, true},
};
#define LIVES (sizeof lives / sizeof *lives)

static uint32_t first_commit(uint32_t life) /* the number of the one before its first */
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < life; i++)
        sum += lives[i].commits;
    return sum;
}

static int open_store(const char *path, enum skv_durability durability, struct skv_store **store)
{
    struct skv_store_options options = {
        .path = path, .geometry = GEOMETRY, .map_bytes = MAP_BYTES, .durability = durability};
    return skv_store_open(&options, store);
}

/* MARK says: all before this is as durable as it gets. The first of a life: it is open. */
static int live(const char *path, uint32_t number)
{
    const struct life *life = &lives[number];
    uint32_t k = first_commit(number);
    void (*mark)(uint64_t) = (void (*)(uint64_t))dlsym(RTLD_DEFAULT, "power_mark");
    struct skv_store *store;
    static const struct world none;
    if (!mark || open_store(path, life->durability, &store))
        return 1;
    if (skv_store_generation(store) != (life->cold ? 0 : GENERATION + k))
        return 2;
    mark(k);
    for (uint32_t i = 0; i < life->commits; i++, mark(k)) {
        bool cold = life->cold && i == 0;
        make_world(++k, cold);
        if (commit(store, k, cold ? &none : &worlds[k - 1]))
            return 3;
    }
    if (life->closes)
        skv_store_close(store);
    mark(k);
    return 0;
}

static char here[512];

static bool record_all(const char *path, const char *log)
{
    char self[600], preload[600], number[16], boot[64];
    snprintf(self, sizeof self, "%s/prove_power", here);
    snprintf(preload, sizeof preload, "%s/shim_power.so", here);
    for (uint32_t i = 0; i < LIVES; i++) {
        pid_t child = fork();
        if (child == 0) {
            snprintf(number, sizeof number, "%u", i);
            snprintf(boot, sizeof boot, "%08u-aaaa-bbbb-cccc-dddddddddddd", lives[i].boot);
            setenv("LD_PRELOAD", preload, 1);
            setenv(POWER_DIRECTORY, path, 1);
            setenv(POWER_LOG, log, 1);
            setenv(POWER_BOOT, boot, 1);
            execl(self, self, "live", path, number, NULL);
            _exit(127);
        }
        int status;
        waitpid(child, &status, 0);
        if (status) {
            printf("life %u ended with wait status %#x\n", i, status);
            return false;
        }
    }
    return true;
}

/* ---- a disk: what is on it for sure, and what may be ---- */

struct inode {
    uint8_t *bytes; /* [KEPT_BYTES], synced */
    uint64_t size;
    uint32_t pending[PENDING], pending_count; /* entries of the log, not synced */
};

static struct disk {
    struct inode inodes[INODES];
    uint32_t inode_count;
    int now[POWER_FILES], synced[POWER_FILES]; /* the names' inodes, or -1 */
    uint32_t pending[64], pending_count;       /* of the directory: log entries */
    int made[64];                              /* the inodes of pending creations */
} disk;

static struct power_entry *entries[1u << 17]; /* WRITE's bytes follow it */
static uint32_t entry_count;

static void read_log(const char *path)
{
    struct stat about;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &about))
        abort();
    uint8_t *at = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    uint8_t *end = at + about.st_size;
    while (at < end && entry_count < sizeof entries / sizeof *entries) {
        struct power_entry *entry = entries[entry_count++] = (struct power_entry *)(void *)at;
        at += sizeof *entry + (entry->kind == POWER_WRITE ? entry->length : 0);
    }
    close(fd);
}

static void write_bytes(struct inode *inode, uint64_t at, const uint8_t *bytes, uint64_t length)
{
    if (at + length > KEPT_BYTES)
        abort();
    memcpy(inode->bytes + at, bytes, length);
    if (at + length > inode->size)
        inode->size = at + length;
}

static void truncate_to(struct inode *inode, uint64_t size)
{
    if (size < KEPT_BYTES && size < inode->size)
        memset(inode->bytes + size, 0, KEPT_BYTES - size);
    inode->size = size;
}

static void settle(struct inode *inode)
{
    for (uint32_t i = 0; i < inode->pending_count; i++) {
        const struct power_entry *entry = entries[inode->pending[i]];
        if (entry->kind == POWER_WRITE)
            write_bytes(inode, entry->at, (const uint8_t *)(entry + 1), entry->length);
        else
            truncate_to(inode, entry->length);
    }
    inode->pending_count = 0;
}

static void note(uint32_t index, bool whole)
{
    const struct power_entry *entry = entries[index];
    if (entry->kind == POWER_MARK)
        return;
    if (entry->kind == POWER_CREATE || entry->kind == POWER_UNLINK) {
        int inode = -1;
        if (entry->kind == POWER_CREATE) {
            inode = (int)disk.inode_count++;
            if (disk.inode_count > INODES)
                abort();
            disk.inodes[inode].bytes = mmap(NULL, KEPT_BYTES, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        }
        disk.made[disk.pending_count] = inode;
        disk.pending[disk.pending_count++] = index;
        disk.now[entry->file] = inode;
    } else if (entry->file == POWER_THE_DIRECTORY) {
        if (!whole || entry->kind != POWER_SYNC)
            return;
        memcpy(disk.synced, disk.now, sizeof disk.now);
        disk.pending_count = 0;
    } else {
        struct inode *inode = &disk.inodes[disk.now[entry->file]];
        if (entry->kind == POWER_SYNC) {
            if (whole)
                settle(inode);
        } else if (whole && entry->durable && entry->kind == POWER_WRITE) {
            write_bytes(inode, entry->at, (const uint8_t *)(entry + 1), entry->length);
        } else {
            if (inode->pending_count == PENDING)
                abort();
            inode->pending[inode->pending_count++] = index;
        }
    }
}

/* The disk just before entry `at` has returned. */
static void replay(uint32_t at)
{
    for (uint32_t i = 0; i < disk.inode_count; i++)
        munmap(disk.inodes[i].bytes, KEPT_BYTES);
    memset(&disk, 0, sizeof disk);
    for (uint32_t i = 0; i < POWER_FILES; i++)
        disk.now[i] = disk.synced[i] = -1;
    for (uint32_t i = 0; i <= at; i++)
        note(i, i < at);
}

/* How much of what was not synced got there. */
enum fate { FATE_NOTHING, FATE_ALL, FATE_PREFIX, FATE_ANY, FATES };

static void lose_power(struct inode *inode, uint64_t *random)
{
    enum fate fate = (enum fate)draw(random, FATES);
    uint32_t sector = draw(random, 2) ? 512 : 4096, odds = 1 + (uint32_t)draw(random, 9);
    uint32_t until = (uint32_t)draw(random, inode->pending_count + 1);
    for (uint32_t i = 0; i < inode->pending_count && fate != FATE_NOTHING; i++) {
        const struct power_entry *entry = entries[inode->pending[i]];
        const uint8_t *bytes = (const uint8_t *)(entry + 1);
        bool torn = fate == FATE_ANY || (fate == FATE_PREFIX && i == until);
        if (fate == FATE_PREFIX && i > until)
            break;
        if (entry->kind == POWER_TRUNCATE) {
            if (!torn || draw(random, 2))
                truncate_to(inode, entry->length);
            continue;
        }
        for (uint64_t done = 0, piece; done < entry->length; done += piece) {
            piece = sector - (entry->at + done) % sector;
            piece = piece < entry->length - done ? piece : entry->length - done;
            if (!torn || draw(random, 10) < odds)
                write_bytes(inode, entry->at + done, bytes + done, piece);
        }
    }
    inode->pending_count = 0;
}

static void lay_out(const char *path, uint32_t at, uint64_t *random)
{
    static const char *const names[POWER_FILES] = {
        [POWER_STATE] = "sidekv.store", [POWER_DATA] = "data.mdb"};
    int inodes[POWER_FILES];
    memcpy(inodes, disk.synced, sizeof inodes);
    bool all = draw(random, 3) == 0;
    for (uint32_t i = 0; i < disk.pending_count; i++)
        if (all || draw(random, 2))
            inodes[entries[disk.pending[i]]->file] = disk.made[i];
    for (uint32_t file = POWER_STATE; file < POWER_FILES; file++) {
        char name[128];
        snprintf(name, sizeof name, "%s/%s", path, names[file]);
        if (inodes[file] < 0)
            continue;
        struct inode *inode = &disk.inodes[inodes[file]];
        lose_power(inode, random);
        int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        uint64_t kept = inode->size < KEPT_BYTES ? inode->size : KEPT_BYTES;
        while (kept && inode->bytes[kept - 1] == 0)
            kept--;
        if (fd < 0 || pwrite(fd, inode->bytes, kept, 0) != (ssize_t)kept ||
            ftruncate(fd, (off_t)inode->size))
            abort();
        close(fd);
    }
    char name[128];
    uint8_t lock[8192];
    uint64_t kind = draw(random, 3);
    for (uint32_t i = 0; i <= at; i++) /* LMDB makes it just before data.mdb */
        if (i == at || (entries[i]->kind == POWER_CREATE && entries[i]->file == POWER_DATA)) {
            kind = i == at ? 0 : kind;
            break;
        }
    snprintf(name, sizeof name, "%s/lock.mdb", path);
    memset(lock, kind == 1 ? 0 : (int)draw(random, 256), sizeof lock);
    int fd = kind ? open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
    if (fd >= 0 && write(fd, lock, sizeof lock) != sizeof lock)
        abort();
    close(fd);
}

/* ---- what must be there ---- */

struct expectation {
    enum skv_durability durability; /* to open it with */
    uint32_t floor, top;            /* commits: at least, at most; floor 0: or nothing at all */
    uint32_t cold;                  /* the commit after which nothing older is left */
    bool must_be_empty;
};

static struct expectation expect(uint32_t at)
{
    uint32_t life = 0, marks = 0, opened = 0;
    struct expectation e = {.durability = lives[0].durability};
    for (uint32_t i = 0; i < at; i++) {
        if (entries[i]->kind != POWER_MARK)
            continue;
        const struct life *l = &lives[life];
        e.top = (uint32_t)entries[i]->at;
        bool open = marks++ == 0, end = marks == l->commits + 2;
        opened = !end;
        if (l->durability == SKV_POWER || (end && l->closes))
            e.floor = e.top;
        else if (open || !end)
            e.floor = 0;
        if (open && l->cold)
            e.cold = e.top;
        if (!end)
            continue;
        life++;
        marks = 0;
    }
    uint32_t now = life < LIVES ? life : (uint32_t)LIVES - 1;
    bool begun = opened || entries[at]->kind != POWER_MARK || /* that may be on the disk already */
                 (at && entries[at - 1]->kind != POWER_MARK);
    e.durability = lives[now].durability;
    e.must_be_empty = opened && marks < lives[now].commits + 1 && e.durability == SKV_PROCESS;
    if (begun && !opened && (lives[now].cold || e.durability == SKV_PROCESS))
        e.floor = 0; /* it is opening: what it found may be gone, or not be */
    if (life < LIVES)
        e.top += opened && e.top < first_commit(now) + lives[now].commits;
    if (begun && !opened && lives[now].cold)
        e.cold = e.top;
    return e;
}

/* NULL, or what is wrong with the store. */
static const char *check_store(const char *path, const struct expectation *e, bool *empty)
{
    static char text[128];
    struct skv_store *store;
    struct skv_reader *reader;
    if (open_store(path, e->durability, &store))
        return "it does not open";
    uint64_t mark = skv_store_generation(store);
    uint32_t k = mark ? (uint32_t)(mark - GENERATION) : 0;
    *empty = mark == 0;
    static const struct world none;
    const struct world *world = mark ? &worlds[k] : &none;
    snprintf(text, sizeof text, "it is as of commit %u, not of %u to %u (cold %u)", k, e->floor,
             e->top, e->cold);
    if (mark ? e->must_be_empty || k < e->floor || k <= e->cold || k > e->top : e->floor > e->cold)
        return text;
    if (skv_reader_open(store, &reader) || skv_reader_begin(reader))
        return "it cannot be read";
    for (uint32_t user = 0; user < USERS; user++) {
        struct subject u = world->users[user];
        uint64_t hashes[MAX_TOKENS], stored[MAX_TOKENS];
        struct skv_record record, wanted;
        uint32_t count = hashes_of(user, u, hashes), had = 0;
        int rc = skv_reader_record(reader, MODEL, skv_user_integer(user), &record, stored,
                                   MAX_TOKENS, &had);
        wanted = record_of(user, u, hashes, count);
        snprintf(text, sizeof text, "user %u as of commit %u is not as it was stored", user, k);
        if (rc == SKV_ENOENT && !u.tokens)
            continue;
        if (rc || had != count || memcmp(&record, &wanted, sizeof record) != 0 ||
            memcmp(hashes, stored, count * sizeof *hashes) != 0)
            return text;
        for (uint32_t index = 0; index < count; index++) {
            struct skv_location where;
            uint8_t page[PAGE_BYTES];
            fill_page(user, u, index, page);
            if (skv_reader_locate(reader, MODEL, skv_user_integer(user), index, &where) ||
                skv_page_verify(where.value, PAGE_BYTES, MODEL, skv_user_integer(user), index,
                                valid_of(u, index), hashes[index], record.generation) ||
                memcmp(where.value, page, PAGE_BYTES) != 0)
                return text;
        }
    }
    skv_reader_close(reader);
    if (commit(store, k + 1, world))
        return "it takes no transaction";
    skv_store_close(store);
    return NULL;
}

/* ---- crash states ---- */

static struct shared {
    uint64_t states[2], failures[2], empty[2], warm[2];
} * shared;

static void crash(uint32_t at, uint64_t random, const char *path)
{
    struct expectation e = expect(at);
    bool empty = true;
    pid_t child = fork();
    if (child == 0) {
        replay(at);
        lay_out(path, at, &random);
        alarm(60);
        const char *wrong = check_store(path, &e, &empty);
        if (wrong) {
            printf("power lost before entry %u of %u (random %#llx), %s: %s\n", at, entry_count,
                   (unsigned long long)random, e.durability ? "power" : "process", wrong);
            fflush(stdout);
        }
        _exit(wrong ? 1 : empty ? 3 : 0);
    }
    int status;
    char command[160];
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status))
        printf("power lost before entry %u: opening it ended with signal %d\n", at,
               WTERMSIG(status));
    bool power = e.durability == SKV_POWER;
    bool ok = WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 3);
    __atomic_fetch_add(&shared->states[power], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&shared->failures[power], !ok, __ATOMIC_RELAXED);
    if (ok)
        __atomic_fetch_add(WEXITSTATUS(status) ? &shared->empty[power] : &shared->warm[power], 1,
                           __ATOMIC_RELAXED);
    snprintf(command, sizeof command, "%s/sidekv.store", path);
    unlink(command);
    snprintf(command, sizeof command, "%s/data.mdb", path);
    unlink(command);
    snprintf(command, sizeof command, "%s/lock.mdb", path);
    unlink(command);
}

/* Anywhere, or as often where a life ends or begins. */
static uint32_t somewhere(uint64_t *random)
{
    uint32_t at = (uint32_t)draw(random, entry_count);
    if (draw(random, 2))
        return at;
    while (at > 0 && (entries[at]->kind != POWER_MARK || entries[at - 1]->file != POWER_STATE))
        at--; /* a close's last sync, or an open's */
    at += (uint32_t)draw(random, 30);
    return at < 15 ? at : at - 15 < entry_count ? at - 15 : entry_count - 1;
}

int main(int argc, char **argv)
{
    ssize_t length = readlink("/proc/self/exe", here, sizeof here - 1);
    here[length > 0 ? length : 0] = 0;
    if (strrchr(here, '/'))
        *strrchr(here, '/') = 0;
    seed = prove_seed();
    skv_log_init("prove_power", SKV_LOG_ERROR);
    for (uint32_t i = 0; i < LIVES; i++)
        for (uint32_t c = 1; c <= lives[i].commits; c++)
            make_world(first_commit(i) + c, lives[i].cold && c == 1);
    if (argc == 4)
        return live(argv[2], (uint32_t)atoi(argv[3]));

    char base[64], path[96], log[96], command[96];
    snprintf(base, sizeof base, "%s/sidekv-power.XXXXXX",
             access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    if (!mkdtemp(base))
        abort();
    snprintf(path, sizeof path, "%s/store", base);
    snprintf(log, sizeof log, "%s/log", base);
    mkdir(path, 0700);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    bool recorded = record_all(path, log);
    if (recorded)
        read_log(log);
    if (argc == 3) { /* one state: ENTRY RANDOM */
        snprintf(path, sizeof path, "%s/lane0", base);
        mkdir(path, 0700);
        crash((uint32_t)atoi(argv[1]), strtoull(argv[2], NULL, 0), path);
    }
    for (uint32_t lane = 0; lane < 2 && recorded && argc == 1; lane++) {
        fflush(stdout);
        if (fork())
            continue;
        snprintf(path, sizeof path, "%s/lane%u", base, lane);
        mkdir(path, 0700);
        int quiet = open("/dev/null", O_WRONLY);
        dup2(quiet, STDERR_FILENO);
        uint64_t random = seed * 77 + lane;
        for (uint64_t i = lane; i < prove_times(4000); i += 2)
            crash(somewhere(&random), draw(&random, UINT64_MAX), path);
        _exit(0);
    }
    while (wait(NULL) > 0)
        ;
    snprintf(command, sizeof command, "rm -rf %s", base);
    if (system(command))
        printf("%s is left\n", base);
    printf("%u entries; power: %llu warm, %llu empty; process: %llu warm, %llu empty\n",
           entry_count, (unsigned long long)shared->warm[1], (unsigned long long)shared->empty[1],
           (unsigned long long)shared->warm[0], (unsigned long long)shared->empty[0]);
    prove_line(5, "power lost under durability power: all that was stored is there",
               shared->states[1], shared->failures[1]);
    prove_line(5, "power lost under durability process: cold, or as it was closed",
               shared->states[0], shared->failures[0]);
    return prove_end();
}
