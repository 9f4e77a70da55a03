#include "state.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hash.h"
#include "log.h"

#define STATE_NAME    "sidekv.store"
#define STATE_MAGIC   "sidekv store "
#define STATE_VERSION 1u
#define SLOT_BYTES    512u

int skv_errno_status(int error)
{
    switch (error) {
    case 0:
        return SKV_OK;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return SKV_ENOSPC;
    case ENOMEM:
        return SKV_ENOMEM;
    case EACCES:
    case EPERM:
    case EROFS:
        return SKV_EPERM;
    case ENOENT:
        return SKV_ENOENT;
    case EWOULDBLOCK:
        return SKV_EBUSY;
    default:
        return SKV_EIO;
    }
}

void skv_boot_id(char boot[40])
{
    snprintf(boot, 40, "unknown");
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    char text[40] = "";
    if (fd >= 0 && read(fd, text, 36) == 36)
        memcpy(boot, text, 37);
    if (fd >= 0)
        close(fd);
}

int skv_sync_directory(const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 || fsync(fd) < 0 ? skv_errno_status(errno) : 0;
    if (rc)
        skv_error("store %s: cannot sync it: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return rc;
}

/* ---- is it ours? ---- */

static int not_a_store(const char *path, const char *why, const char *name)
{
    skv_error("%s is not a sidekv store: %s%s%s; nothing was touched: name another directory with "
              "--store, or empty this one",
              path, why, name ? " " : "", name ? name : "");
    return SKV_ECORRUPT;
}

static int failed(const char *path, const char *what)
{
    int error = errno;
    skv_error("store %s: %s: %s", path, what, strerror(error));
    return skv_errno_status(error);
}

/* A directory without our file must be empty: we never write among someone else's. */
static int check_empty(const char *path)
{
    DIR *directory = opendir(path);
    if (!directory)
        return failed(path, "cannot list it");
    int rc = 0;
    for (struct dirent *entry; rc == 0 && (entry = readdir(directory));) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") && strcmp(name, "..") && strcmp(name, "lost+found") &&
            strcmp(name, STATE_NAME))
            rc = not_a_store(path, "it has no " STATE_NAME " but holds", name);
    }
    closedir(directory);
    return rc;
}

static int check_path(const char *path)
{
    struct stat st;
    if (mkdir(path, 0700) == 0)
        return 0;
    if (errno == ENOENT) {
        skv_error("store %s: its parent directory is missing; create it first", path);
        return SKV_ENOENT;
    }
    if (errno != EEXIST && errno != EROFS)
        return failed(path, "cannot make it");
    if (stat(path, &st) < 0)
        return failed(path, "cannot look at it");
    return S_ISDIR(st.st_mode) ? 0 : not_a_store(path, "it is not a directory", NULL);
}

/* ---- slots ---- */

static void print_slot(const struct skv_state *s, char slot[SLOT_BYTES])
{
    memset(slot, ' ', SLOT_BYTES);
    int used = snprintf(
        slot, SLOT_BYTES,
        STATE_MAGIC "%u sequence %" PRIu64 " geometry %u %u %u %u durability %s boot %s clean %d "
                    "damaged %d cold %" PRIu64 " check ",
        STATE_VERSION, s->sequence, s->geometry.layers, s->geometry.heads, s->geometry.head_dim,
        s->geometry.page_tokens, s->durability == SKV_POWER ? "power" : "process", s->boot,
        s->clean, s->damaged, s->cold_starts);
    uint64_t check = skv_checksum(slot, (size_t)used);
    used += snprintf(slot + used, SLOT_BYTES - (size_t)used, "%016" PRIx64, check);
    slot[used] = ' ';
    slot[SLOT_BYTES - 1] = '\n';
}

/* Every version of a slot begins with the magic and its number and carries, behind the word
 * "check", the checksum of all before that. Its version, and in *body where the checksum begins; 0:
 * it is not whole. */
static unsigned slot_version(const char text[SLOT_BYTES + 1], size_t *body)
{
    static const char word[] = " check ";
    unsigned version;
    uint64_t check;
    const char *at = strstr(text, word);
    if (!at || sscanf(text, STATE_MAGIC "%u ", &version) != 1)
        return 0;
    *body = (size_t)(at - text) + strlen(word);
    if (sscanf(text + *body, "%" SCNx64, &check) != 1 || check != skv_checksum(text, *body))
        return 0;
    return version;
}

/* What one slot says. 0, SKV_ENOTSUP (a later format), SKV_EAGAIN (it is not whole). */
static int parse_slot(const char slot[SLOT_BYTES], struct skv_state *s, unsigned *version)
{
    char text[SLOT_BYTES + 1], durability[8];
    unsigned clean, damaged;
    size_t body;
    int at = 0;
    memcpy(text, slot, SLOT_BYTES);
    text[SLOT_BYTES] = 0;
    *version = slot_version(text, &body);
    if (*version > STATE_VERSION)
        return SKV_ENOTSUP;
    if (*version != STATE_VERSION ||
        sscanf(text,
               STATE_MAGIC "%*u sequence %" SCNu64 " geometry %u %u %u %u durability %7s boot %39s "
                           "clean %u damaged %u %n",
               &s->sequence, &s->geometry.layers, &s->geometry.heads, &s->geometry.head_dim,
               &s->geometry.page_tokens, durability, s->boot, &clean, &damaged, &at) != 9)
        return SKV_EAGAIN;
    if (sscanf(text + at, "cold %" SCNu64, &s->cold_starts) != 1)
        s->cold_starts = 0; /* before it was counted */
    s->durability = strcmp(durability, "power") == 0 ? SKV_POWER : SKV_PROCESS;
    s->clean = clean;
    s->damaged = damaged;
    return 0;
}

/* Could it be a sidekv.store that was damaged? Someone else's file is neither of its size, nor
 * blank, nor begins like one. */
static bool looks_ours(const char slots[2 * SLOT_BYTES], size_t bytes)
{
    size_t magic = strlen(STATE_MAGIC), blank = 0;
    if (bytes == 2 * SLOT_BYTES || memcmp(slots, STATE_MAGIC, bytes < magic ? bytes : magic) == 0)
        return true;
    while (blank < bytes && slots[blank] == 0)
        blank++;
    return blank == bytes;
}

/* Fills `state` from the newest whole slot. 0, SKV_EAGAIN (ours, but no slot is whole),
 * SKV_ENOTSUP (a later format), SKV_ECORRUPT (not ours). */
static int read_slots(int fd, const char *path, struct skv_state *state)
{
    char slots[2 * SLOT_BYTES] = {0};
    ssize_t got = pread(fd, slots, sizeof slots, 0);
    if (got < 0)
        return failed(path, "cannot read " STATE_NAME);
    unsigned whole = 0; /* and in their places */
    for (unsigned i = 0; i < 2; i++) {
        struct skv_state one = {.fd = -1};
        unsigned version;
        int rc = parse_slot(slots + i * SLOT_BYTES, &one, &version);
        if (rc == SKV_ENOTSUP) {
            skv_error("store %s: format %u; this sidekvd knows %u: nothing was touched", path,
                      version, STATE_VERSION);
            return rc;
        }
        if (rc == 0 && one.sequence % 2 == i && (whole++ == 0 || one.sequence > state->sequence)) {
            one.fd = state->fd;
            *state = one;
        }
    }
    if (whole == 0)
        return looks_ours(slots, (size_t)got)
                   ? SKV_EAGAIN
                   : not_a_store(path, "its " STATE_NAME " is someone else's", NULL);
    /* The slot that is not whole may have been the newer one (the first write leaves one blank):
     * then nothing better is known than the worst. */
    if (whole == 1 && state->sequence > 1) {
        skv_warn("store %s: half of " STATE_NAME " is damaged", path);
        state->clean = false;
        state->durability = SKV_PROCESS;
    }
    return 0;
}

int skv_state_open(const char *path, struct skv_state *state, bool *fresh)
{
    char file[PATH_MAX];
    struct stat st;
    *state = (struct skv_state){.fd = -1};
    int rc = check_path(path);
    if (rc)
        return rc;
    if (snprintf(file, sizeof file, "%s/" STATE_NAME, path) >= (int)sizeof file)
        return errno = ENAMETOOLONG, failed(path, "cannot use it");
    if (stat(file, &st) < 0) {
        rc = check_empty(path);
        if (rc)
            return rc;
    } else if (!S_ISREG(st.st_mode)) {
        return not_a_store(path, "its " STATE_NAME " is not a file", NULL);
    }
    int fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return failed(path, "cannot open " STATE_NAME);
    if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
        rc = errno == EWOULDBLOCK ? SKV_EBUSY : failed(path, "cannot lock " STATE_NAME);
        close(fd);
        return rc;
    }
    state->fd = fd;
    rc = read_slots(fd, path, state);
    *fresh = rc == SKV_EAGAIN;
    if (*fresh) /* its name is on disk before anything else's: data.mdb alone would be someone's */
        rc = skv_sync_directory(path);
    if (rc == 0)
        return 0;
    skv_state_close(state);
    return rc;
}

int skv_state_write(struct skv_state *state)
{
    char slot[SLOT_BYTES];
    state->sequence++;
    print_slot(state, slot);
    off_t at = state->sequence % 2 ? SLOT_BYTES : 0;
    ssize_t wrote = pwrite(state->fd, slot, sizeof slot, at);
    if (wrote >= 0 && wrote < (ssize_t)sizeof slot)
        errno = ENOSPC;
    if (wrote == (ssize_t)sizeof slot && fsync(state->fd) == 0)
        return 0;
    int error = errno;
    skv_error("store: cannot write " STATE_NAME ": %s", strerror(error));
    return skv_errno_status(error);
}

void skv_state_close(struct skv_state *state)
{
    if (state->fd >= 0)
        close(state->fd);
    state->fd = -1;
}
