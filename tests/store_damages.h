/* Stores to damage, for prove_store.c: small ones with a history (long records, a free list, trees
 * of two levels) whose every byte follows from user, version and token; kept in memory, so that
 * each damage begins with a fresh one. And the damages: kinds by number, all of them random. */
#ifndef SKV_STORE_DAMAGES_H
#define SKV_STORE_DAMAGES_H

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "hash.h"
#include "store.h"

#define USERS      60u
#define S          16u
#define MOST       4400u /* tokens of user 0, whose record needs overflow pages; others: OTHERS */
#define OTHERS     150u
#define PAGE_BYTES 4096u /* one layer, one head, 64 wide: also the bytes of an LMDB page */
#define MAP_BYTES  (UINT64_C(64) << 20)
#define MODEL      ((struct skv_id){.lo = 5})

static const struct skv_geometry geometry = {
    .layers = 1, .heads = 1, .head_dim = 64, .page_tokens = S};

/* ---- random numbers ---- */

static inline uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static inline uint64_t draw(uint64_t *state, uint64_t below)
{
    return mix(*state += UINT64_C(0x9e3779b97f4a7c15)) % below;
}

/* ---- users ---- */

struct user {
    uint32_t version, tokens; /* tokens 0: it is not there */
};

static inline void user_tokens(uint32_t user, uint32_t version, uint64_t tokens[MOST])
{
    for (uint32_t i = 0; i < MOST; i++)
        tokens[i] = user * 1000003 + version * 7919 + i + 1;
}

/* The rows of one token: K and V, 64 values each, all of them this word. */
static inline uint64_t token_word(uint64_t token, int kv)
{
    return mix(token * 2 + (uint64_t)kv);
}

static inline uint8_t *token_row(void *page, uint32_t token, int kv)
{
    return (uint8_t *)page + ((uint32_t)kv * S + token % S) * 128;
}

static inline void write_token(void *page, const uint64_t *tokens, uint32_t token)
{
    for (int kv = 0; kv < 2; kv++) {
        uint64_t word = token_word(tokens[token], kv);
        for (int i = 0; i < 16; i++)
            memcpy(token_row(page, token, kv) + i * 8, &word, 8);
    }
}

static inline bool is_token(const void *page, const uint64_t *tokens, uint32_t token)
{
    for (int kv = 0; kv < 2; kv++) {
        uint64_t word = token_word(tokens[token], kv);
        for (int i = 0; i < 16; i++)
            if (memcmp(token_row((void *)(uintptr_t)page, token, kv) + i * 8, &word, 8) != 0)
                return false;
    }
    return true;
}

/* Stores a user, its pages from the one that holds token `from` on; tokens 0 removes it. */
static inline int put_user(struct skv_store *store, uint32_t user, struct user u, uint32_t from,
                           uint64_t generation)
{
    static uint64_t tokens[MOST], hashes[MOST / S + 1], page[(PAGE_BYTES + SKV_TRAILER_BYTES) / 8];
    struct skv_id id = skv_user_integer(user);
    user_tokens(user, u.version, tokens);
    uint32_t pages = skv_chain_hashes(MODEL, id, S, tokens, u.tokens, 0, hashes);
    struct skv_record record = {.model = MODEL,
                                .user = id,
                                .generation = generation,
                                .hash_full = u.tokens >= S ? hashes[u.tokens / S - 1]
                                                           : skv_chain_start(MODEL, id),
                                .last_use_s = 1700000000 + user,
                                .tokens = u.tokens};
    record.hash_tail = u.tokens % S ? hashes[pages - 1] : record.hash_full;
    int rc = skv_store_begin(store);
    for (uint32_t index = from / S; rc == 0 && index < pages; index++) {
        uint32_t valid = u.tokens - index * S < S ? u.tokens - index * S : S;
        for (uint32_t i = 0; i < valid; i++)
            write_token(page, tokens, index * S + i);
        rc = skv_store_put_page(store, &record, index, valid, generation, hashes[index], page);
    }
    rc = rc ? rc : skv_store_put_record(store, &record, hashes);
    rc = rc ? rc : skv_store_put_generation(store, generation + 1000);
    return rc ? rc : skv_store_commit(store);
}

/* ---- the store's two files, in memory ---- */

struct image {
    uint8_t *data; /* the part of data.mdb that was ever used */
    uint64_t bytes;
    uint8_t state[1024];
    uint32_t tree[512]; /* the branch and leaf pages of its newest snapshot */
    uint32_t tree_count;
};

struct golden {
    struct image now, earlier; /* the store, and what it was some transactions before */
    struct user users[USERS];
};

static inline void store_path(char *path, size_t bytes, const char *directory, const char *name)
{
    snprintf(path, bytes, "%s/%s", directory, name);
}

static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

static inline uint64_t get(const uint8_t *at, int bytes)
{
    uint64_t value = 0;
    memcpy(&value, at, (size_t)bytes);
    return value;
}

/* Lists the pages of a tree and of those that it holds. The image is whole. */
static inline void find_tree(struct image *image, uint64_t root)
{
    const uint8_t *page = image->data + root * 4096;
    if (root == UINT64_MAX || image->tree_count == 512)
        return;
    image->tree[image->tree_count++] = (uint32_t)root;
    for (uint64_t at = 16; at < get(page + 12, 2); at += 2) {
        const uint8_t *node = page + get(page + at, 2);
        uint64_t flags = get(node + 4, 2);
        if (page[10] == 1)
            find_tree(image, get(node, 4) | flags << 32);
        else if (flags == 2)
            find_tree(image, get(node + 8 + get(node + 6, 2) + 40, 8));
    }
}

/* Shared: a child is forked for each damage, and need not copy it. */
static inline uint8_t *image_memory(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        die("no memory");
    return memory;
}

static inline struct image read_image(const char *directory)
{
    struct image image = {0};
    char path[160];
    store_path(path, sizeof path, directory, "data.mdb");
    int fd = open(path, O_RDONLY);
    off_t bytes = lseek(fd, 0, SEEK_END);
    if (fd < 0 || bytes < 0)
        die(path);
    /* Rounded to whole pages: the used part ends at the last byte that is not zero. */
    uint8_t *map = mmap(NULL, (size_t)bytes, PROT_READ, MAP_SHARED, fd, 0);
    off_t used = bytes;
    while (used > 8 && *(uint64_t *)(void *)(map + used - 8) == 0)
        used -= 8;
    image.bytes = ((uint64_t)used + 4095) & ~UINT64_C(4095);
    image.data = image_memory(image.bytes);
    memcpy(image.data, map, image.bytes);
    munmap(map, (size_t)bytes);
    close(fd);
    const uint8_t *meta =
        image.data + (get(image.data + 4096 + 144, 8) > get(image.data + 144, 8) ? 4096 : 0);
    find_tree(&image, get(meta + 80, 8));  /* the free list */
    find_tree(&image, get(meta + 128, 8)); /* the directory, and what it names */
    store_path(path, sizeof path, directory, "sidekv.store");
    fd = open(path, O_RDONLY);
    if (fd < 0 || read(fd, image.state, sizeof image.state) < 512)
        die(path);
    close(fd);
    return image;
}

static inline void write_file(const char *directory, const char *name, const void *bytes,
                              uint64_t count, uint64_t size)
{
    char path[160];
    store_path(path, sizeof path, directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, bytes, count) != (ssize_t)count || ftruncate(fd, (off_t)size))
        die(path);
    close(fd);
}

static inline void clear(const char *directory)
{
    static const char *const names[] = {"data.mdb", "lock.mdb", "sidekv.store"};
    for (int i = 0; i < 3; i++) {
        char path[160];
        store_path(path, sizeof path, directory, names[i]);
        unlink(path);
    }
    mkdir(directory, 0700);
}

static inline int open_in(const char *directory, struct skv_store **store)
{
    return skv_store_open(&(struct skv_store_options){.path = directory,
                                                      .geometry = geometry,
                                                      .map_bytes = MAP_BYTES},
                          store);
}

/* Two lives of a store, the second of them ended as `killed` says. The same seed gives the same. */
static inline void make_golden(const char *directory, uint64_t seed, bool killed, struct golden *g)
{
    *g = (struct golden){0};
    clear(directory);
    for (int life = 0; life < 2; life++) {
        struct user *shared =
            mmap(NULL, sizeof g->users, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        memcpy(shared, g->users, sizeof g->users);
        pid_t child = fork();
        if (child == 0) {
            struct skv_store *store;
            if (open_in(directory, &store))
                _exit(1);
            uint64_t generation = skv_store_generation(store);
            for (uint32_t step = 0; step < (life ? 60 : 180); step++) {
                uint32_t user = life || step >= USERS ? (uint32_t)draw(&seed, USERS) : step;
                struct user *u = &shared[user];
                uint64_t what = draw(&seed, 8);
                uint32_t from = 0, most = user ? OTHERS : MOST;
                if (what == 0 && user) {
                    u->tokens = 0; /* removed */
                } else if (what < 4 && u->tokens && u->tokens < most) {
                    from = u->tokens;
                    u->tokens += (uint32_t)draw(&seed, most - u->tokens) + 1;
                } else {
                    u->version = (uint32_t)draw(&seed, 1000);
                    u->tokens = user ? (uint32_t)draw(&seed, most) + 1 : MOST;
                }
                if (put_user(store, user, *u, from, ++generation))
                    _exit(1);
            }
            if (life == 0 || !killed)
                skv_store_close(store);
            _exit(0);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child || status)
            die("making a store");
        memcpy(g->users, shared, sizeof g->users);
        munmap(shared, sizeof g->users);
        seed = mix(seed + 1);
        *(life ? &g->now : &g->earlier) = read_image(directory);
    }
}

static inline void drop_golden(struct golden *g)
{
    munmap(g->now.data, g->now.bytes);
    munmap(g->earlier.data, g->earlier.bytes);
}

/* ---- damages ---- */

/* Those of trees aim at branch and leaf pages that are in use: there most harm can be done, and
 * they are few beside the users' pages. */
#define DAMAGES(X)                                                                                 \
    X(FLIP, "bits anywhere")                                                                       \
    X(FLIP_TREE, "bits of tree pages")                                                             \
    X(FLIP_META, "bits of meta pages")                                                             \
    X(FIELD_TREE, "a field of a tree page")                                                        \
    X(FIELD_META, "a field of a meta page")                                                        \
    X(GARBAGE, "a page of garbage")                                                                \
    X(GARBAGE_TREE, "a tree page of garbage")                                                      \
    X(ZERO, "a page of zeroes")                                                                    \
    X(ZERO_TREE, "a tree page of zeroes")                                                          \
    X(COPY, "a page over another")                                                                 \
    X(COPY_TREE, "a tree page over another")                                                       \
    X(SWAP_TREE, "two tree pages swapped")                                                         \
    X(STALE, "a page as it was earlier")                                                           \
    X(STALE_TREE, "a tree page as it was earlier")                                                 \
    X(STALE_ALL, "data.mdb as it was earlier")                                                     \
    X(TRUNCATE, "truncated")                                                                       \
    X(GROW, "grown")                                                                               \
    X(MISSING, "data.mdb missing or empty")                                                        \
    X(OTHER, "data.mdb of another store")                                                          \
    X(LOCK, "lock.mdb of garbage")                                                                 \
    X(STATE_FLIP, "bits of sidekv.store")                                                          \
    X(STATE_GARBAGE, "sidekv.store of garbage, zeroes, cut or grown")                              \
    X(SEVERAL, "several at once")                                                                  \
    X(STATE_MISSING, "sidekv.store missing")                                                       \
    X(STATE_VERSION, "sidekv.store of another version")                                            \
    X(PERMISSION, "a store of another owner")

enum damage {
#define X(name, text) DAMAGE_##name,
    DAMAGES(X)
#undef X
        KINDS
};
/* From here on a daemon may refuse to start, and must then have touched nothing. */
#define MAY_REFUSE(kind) ((kind) >= DAMAGE_STATE_MISSING)

static inline const char *damage_name(int kind)
{
    static const char *const names[] = {
#define X(name, text) text,
        DAMAGES(X)
#undef X
    };
    return names[kind];
}

/* A page of the image, or, if asked, one of its trees. */
static inline uint64_t pick_page(const struct image *image, bool tree, uint64_t *random)
{
    return tree ? image->tree[draw(random, image->tree_count)] : draw(random, image->bytes / 4096);
}

static inline void flip(uint8_t *bytes, uint64_t count, uint64_t *random)
{
    for (uint64_t n = draw(random, 4) + 1; n; n--)
        bytes[draw(random, count)] ^= (uint8_t)(1u << draw(random, 8));
}

/* A number where LMDB keeps one, replaced by another that may well be one. */
static inline void change_field(uint8_t *page, bool meta, uint64_t *random)
{
    static const uint8_t node_fields[] = {0, 2, 4, 6};
    uint64_t at, bytes = 2;
    uint16_t lower;
    memcpy(&lower, page + 12, 2);
    uint64_t nodes = lower > 16 && lower < 4096 ? (lower - 16) / 2 : 0;
    if (meta) {
        at = 16 + draw(random, 17) * 8;
        bytes = draw(random, 2) ? 8 : 4;
    } else if (!nodes || draw(random, 3) == 0) {
        at = draw(random, 8) * 2; /* the header */
    } else {
        at = 16 + draw(random, nodes) * 2;
        if (draw(random, 3)) {
            uint16_t node;
            memcpy(&node, page + at, 2);
            at = node + (draw(random, 2) ? node_fields[draw(random, 4)] : 8 + draw(random, 44));
        }
    }
    uint64_t value;
    at = at < 4088 ? at : 4088;
    memcpy(&value, page + at, 8);
    switch (draw(random, 4)) {
    case 0:
        value += draw(random, 5) - 2;
        break;
    case 1:
        value = draw(random, 600);
        break;
    case 2:
        value = UINT64_MAX - draw(random, 3);
        break;
    default:
        value = mix(*random);
    }
    memcpy(page + at, &value, bytes);
}

/* One damage of a page or more of the image in memory. */
static inline void damage_pages(int kind, struct image *image, const struct golden *g,
                                uint64_t *random)
{
    bool tree = kind == DAMAGE_FLIP_TREE || kind == DAMAGE_FIELD_TREE ||
                kind == DAMAGE_GARBAGE_TREE || kind == DAMAGE_ZERO_TREE ||
                kind == DAMAGE_COPY_TREE || kind == DAMAGE_SWAP_TREE || kind == DAMAGE_STALE_TREE;
    uint64_t page = pick_page(image, tree, random), other = pick_page(image, tree, random);
    uint8_t *at = image->data + page * 4096, *from = image->data + other * 4096, space[4096];
    switch (kind) {
    case DAMAGE_FLIP:
        flip(image->data, image->bytes, random);
        break;
    case DAMAGE_FLIP_TREE:
        flip(at, 4096, random);
        break;
    case DAMAGE_FLIP_META:
        flip(image->data + draw(random, 2) * 4096, 152, random);
        break;
    case DAMAGE_FIELD_TREE:
        change_field(at, false, random);
        break;
    case DAMAGE_FIELD_META:
        change_field(image->data + draw(random, 2) * 4096, true, random);
        break;
    case DAMAGE_GARBAGE:
    case DAMAGE_GARBAGE_TREE:
        for (int i = 0; i < 4096; i++)
            at[i] = (uint8_t)draw(random, 256);
        break;
    case DAMAGE_ZERO:
    case DAMAGE_ZERO_TREE:
        memset(at, 0, 4096);
        break;
    case DAMAGE_COPY:
    case DAMAGE_COPY_TREE:
        memmove(at, from, 4096);
        break;
    case DAMAGE_SWAP_TREE:
        memcpy(space, at, 4096);
        memmove(at, from, 4096);
        memcpy(from, space, 4096);
        break;
    default: /* STALE, STALE_TREE */
        if (page < g->earlier.bytes / 4096)
            memcpy(at, g->earlier.data + page * 4096, 4096);
    }
}

/* sidekv.store, damaged in a way that a later start must see through. */
static inline void damage_state(int kind, const char *directory, const struct image *image,
                                uint64_t *random)
{
    uint8_t state[8192] = {0};
    uint64_t bytes = sizeof image->state;
    char *text = (char *)state;
    memcpy(state, image->state, bytes);
    if (kind == DAMAGE_STATE_FLIP) {
        flip(state, bytes, random);
    } else if (kind == DAMAGE_STATE_VERSION) {
        for (int slot = 0; slot < 2; slot++, text += 512) {
            memset(text, ' ', 512);
            int used = sprintf(text, "sidekv store %u and whatever comes then check ",
                               2 + (unsigned)draw(random, 9));
            sprintf(text + used, "%016llx\n", (unsigned long long)skv_checksum(text, (size_t)used));
        }
    } else {
        switch (draw(random, 4)) {
        case 0:
            memset(state, 0, bytes);
            break;
        case 1:
            bytes = draw(random, bytes);
            break;
        case 2:
            bytes += draw(random, 7000);
            break;
        default:
            for (uint64_t i = 0; i < bytes; i++)
                state[i] = (uint8_t)draw(random, 256);
        }
    }
    write_file(directory, "sidekv.store", state, bytes, bytes);
}

/* Writes the golden store into the directory, damaged. `other`: a store that it is not. */
static inline void make_damaged(int kind, const char *directory, const struct golden *g,
                                const struct golden *other, uint64_t *random)
{
    static uint8_t *scratch;
    char path[160];
    struct image image = g->now;
    uint64_t size = MAP_BYTES;
    clear(directory);
    if (!scratch)
        scratch = image_memory(MAP_BYTES);
    image.data = scratch;
    memcpy(image.data, g->now.data, image.bytes);
    if (kind == DAMAGE_STALE_ALL) {
        image.bytes = g->earlier.bytes;
        memcpy(image.data, g->earlier.data, image.bytes);
    } else if (kind == DAMAGE_OTHER) {
        image.bytes = other->now.bytes;
        memcpy(image.data, other->now.data, image.bytes);
    } else if (kind == DAMAGE_TRUNCATE) {
        size = draw(random, 2) ? draw(random, image.bytes + 4096) : draw(random, MAP_BYTES);
    } else if (kind == DAMAGE_GROW) {
        size += draw(random, 1 << 20);
    } else if (kind == DAMAGE_MISSING) {
        size = image.bytes = 0;
    } else if (kind == DAMAGE_SEVERAL) {
        for (uint64_t n = draw(random, 6) + 2; n; n--)
            damage_pages((int)draw(random, DAMAGE_STALE_TREE + 1), &image, g, random);
    } else if (kind <= DAMAGE_STALE_TREE) {
        damage_pages(kind, &image, g, random);
    }
    write_file(directory, "data.mdb", image.data, image.bytes < size ? image.bytes : size, size);
    write_file(directory, "sidekv.store", image.state, sizeof image.state, sizeof image.state);
    store_path(path, sizeof path, directory, kind == DAMAGE_MISSING ? "data.mdb" : "sidekv.store");
    if ((kind == DAMAGE_MISSING && draw(random, 2)) || kind == DAMAGE_STATE_MISSING)
        unlink(path);
    if (kind == DAMAGE_LOCK)
        write_file(directory, "lock.mdb", path, sizeof path, draw(random, 20000));
    if (kind == DAMAGE_STATE_FLIP || kind == DAMAGE_STATE_GARBAGE || kind == DAMAGE_STATE_VERSION)
        damage_state(kind, directory, &g->now, random);
}

/* Of every byte in the directory, names included, and of where files have holes. */
static inline uint64_t digest(const char *directory)
{
    static const char *const names[] = {"data.mdb", "lock.mdb", "sidekv.store"};
    static uint8_t bytes[1 << 16];
    uint64_t sum = 0;
    for (int i = 0; i < 3; i++) {
        char path[160];
        store_path(path, sizeof path, directory, names[i]);
        int fd = open(path, O_RDONLY);
        sum = mix(sum + (fd < 0 ? 1 : 2 + (uint64_t)lseek(fd, 0, SEEK_END)));
        for (off_t at = 0, end; fd >= 0 && (at = lseek(fd, at, SEEK_DATA)) >= 0; at = end) {
            end = lseek(fd, at, SEEK_HOLE);
            ssize_t got = pread(fd, bytes, sizeof bytes, at);
            if (got <= 0)
                die(path);
            end = at + got < end ? at + got : end;
            sum = mix(sum + (uint64_t)at + skv_checksum(bytes, (size_t)(end - at)));
        }
        if (fd >= 0)
            close(fd);
    }
    return sum;
}

#endif
