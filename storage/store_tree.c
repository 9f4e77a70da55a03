/* Is data.mdb whole? Walks LMDB's file as it lies on disk, before LMDB believes any of it: LMDB has
 * no checksums, trusts every number it reads, and later writes would act on them.
 *
 * The happy path: the meta page that LMDB will choose, then every branch and leaf page of the free
 * list, the directory of databases and our three databases. A page must carry its own number and
 * exactly its kind; its nodes must fill it without gap or overlap; keys ascend and lie between
 * those of the branch above; all leaves are equally deep; lengths are those of the database; the
 * counts in the directory are those found; no page of the file is used twice, as node page,
 * overflow page or free page, and none lies past the last one. A tree that passes is one that LMDB
 * could have written.
 *
 * Pages of users are not touched, so that a start does not read the whole store: their bytes are
 * verified before they are served, and the header before them before LMDB is told to free them
 * (store.c: mend_header()). A record that does not match its checksum harms only its user, so it is
 * counted, not complained about.
 *
 * Runs in the child process of store_check.c: allocates by mmap only, and may crash. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "store_private.h"

/* LMDB's format, version 1 (mdb.c of 0.9): little-endian, 64 bits. */
#define META_BYTES      152u /* header and struct MDB_meta */
#define DATABASE_BYTES  48u  /* struct MDB_db */
#define NODE_HEADER     8u
#define MAX_DEPTH       32u
#define NO_PAGE         UINT64_MAX
#define IMPLAUSIBLE     (UINT64_C(1) << 62) /* no transaction or generation comes this far */

#define PAGE_BRANCH     0x01u
#define PAGE_LEAF       0x02u
#define PAGE_META       0x08u
#define NODE_BIG        0x01u /* the value lies in overflow pages */
#define NODE_DATABASE   0x02u /* the value is a struct MDB_db */
#define DB_INTEGER_KEYS 0x08u

static uint64_t get64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint32_t get32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint16_t get16(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* struct MDB_db: what the directory, or a meta page, says of one tree. */
struct database {
    uint64_t branches, leaves, overflows, entries, root;
    uint32_t pad;
    uint16_t flags, depth;
};

static struct database get_database(const uint8_t *at)
{
    return (struct database){.pad = get32(at),
                             .flags = get16(at + 4),
                             .depth = get16(at + 6),
                             .branches = get64(at + 8),
                             .leaves = get64(at + 16),
                             .overflows = get64(at + 24),
                             .entries = get64(at + 32),
                             .root = get64(at + 40)};
}

enum kind { TREE_FREE, TREE_DIRECTORY, TREE_META, TREE_PAGES, TREE_USERS };

struct walk {
    const uint8_t *map;
    uint64_t count;                /* pages of the file that are in use: all ids are below it */
    uint64_t txn;                  /* of the snapshot */
    uint64_t *seen;                /* a bit a page */
    const struct skv_store *store; /* its geometry and value_bytes */
    struct skv_tree_report *report;
    struct database ours[TREE_USERS + 1]; /* as the directory says; [TREE_META] and later */
};

struct tree {
    struct walk *walk;
    enum kind kind;
    const char *name;
    struct database says, has;
};

/* One key; its bytes lie in the file. count 0: open end. */
struct key {
    const uint8_t *bytes;
    uint32_t count;
};

struct node {
    struct key key;
    uint64_t child;       /* of a branch */
    uint32_t value_bytes; /* of a leaf */
    uint16_t flags;
    const uint8_t *data; /* of a leaf: the value, or the number of its first overflow page */
};

__attribute__((format(printf, 2, 3))) static int complain(struct walk *w, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(w->report->why, sizeof w->report->why, format, arguments);
    va_end(arguments);
    return SKV_ECORRUPT;
}

static int complain_page(const struct tree *t, uint64_t page, const char *what)
{
    return complain(t->walk, "page %llu of %s: %s", (unsigned long long)page, t->name, what);
}

/* Takes pages [first, first + count) for one use; false: one of them is out of the file or taken.
 */
static bool take(struct walk *w, uint64_t first, uint64_t count)
{
    if (first < 2 || first >= w->count || count == 0 || count > w->count - first)
        return false;
    for (uint64_t page = first; page < first + count; page++) {
        uint64_t bit = UINT64_C(1) << page % 64;
        if (w->seen[page / 64] & bit)
            return false;
        w->seen[page / 64] |= bit;
    }
    return true;
}

/* ---- nodes ---- */

static struct node get_node(const uint8_t *at, bool leaf)
{
    struct node node = {.key = {at + NODE_HEADER, get16(at + 6)}, .flags = get16(at + 4)};
    uint32_t low = get32(at);
    if (leaf)
        node.value_bytes = low;
    else
        node.child = low | (uint64_t)node.flags << 32;
    node.data = node.key.bytes + node.key.count;
    return node;
}

static struct node node_at(const uint8_t *page, uint32_t index, bool leaf)
{
    return get_node(page + get16(page + LMDB_PAGE_HEADER + index * 2), leaf);
}

static uint64_t node_bytes(const struct node *node, bool leaf)
{
    uint64_t bytes = NODE_HEADER + node->key.count;
    if (leaf)
        bytes += node->flags & NODE_BIG ? sizeof(uint64_t) : node->value_bytes;
    return (bytes + 1) & ~UINT64_C(1);
}

/* Do the page's nodes fill it from `upper` to its end, one behind the other? Only then are they
 * within it, and only then does removing one keep the others whole. */
static bool is_packed(const uint8_t *page, bool leaf, uint32_t *count)
{
    uint16_t size[LMDB_PAGE_BYTES / 2] = {0}; /* of the node that begins there */
    uint32_t lower = get16(page + 12), upper = get16(page + 14);
    if (lower < LMDB_PAGE_HEADER || lower % 2 || upper % 2 || lower > upper ||
        upper > LMDB_PAGE_BYTES)
        return false;
    *count = (lower - LMDB_PAGE_HEADER) / 2;
    for (uint32_t i = 0; i < *count; i++) {
        uint32_t at = get16(page + LMDB_PAGE_HEADER + i * 2);
        if (at < upper || at % 2 || at > LMDB_PAGE_BYTES - NODE_HEADER || size[at / 2])
            return false;
        struct node node = get_node(page + at, leaf);
        uint64_t bytes = node_bytes(&node, leaf);
        if (bytes > LMDB_PAGE_BYTES - at)
            return false;
        size[at / 2] = (uint16_t)bytes;
    }
    uint32_t found = 0, at = upper;
    for (; at < LMDB_PAGE_BYTES && size[at / 2]; found++)
        at += size[at / 2];
    return at == LMDB_PAGE_BYTES && found == *count;
}

static int compare(const struct tree *t, struct key a, struct key b)
{
    if (t->kind == TREE_FREE) {
        uint64_t left = get64(a.bytes), right = get64(b.bytes);
        return left < right ? -1 : left > right;
    }
    uint32_t shorter = a.count < b.count ? a.count : b.count;
    int order = memcmp(a.bytes, b.bytes, shorter);
    return order ? order : (a.count > b.count) - (a.count < b.count);
}

/* ---- values ---- */

/* Where a value lies, its overflow pages taken; NULL: not there. Not for users' pages, whose
 * headers are not looked at. */
static const uint8_t *value_of(struct tree *t, const struct node *node)
{
    if (!(node->flags & NODE_BIG))
        return node->data;
    uint64_t first = get64(node->data);
    if (first < 2 || first >= t->walk->count)
        return NULL;
    const uint8_t *page = t->walk->map + first * LMDB_PAGE_BYTES;
    uint64_t pages = get32(page + 12); /* a value that became shorter may keep more than it needs */
    if (get64(page) != first || get16(page + 10) != LMDB_OVERFLOW ||
        pages * LMDB_PAGE_BYTES < (uint64_t)LMDB_PAGE_HEADER + node->value_bytes ||
        !take(t->walk, first, pages))
        return NULL;
    t->has.overflows += pages;
    return page + LMDB_PAGE_HEADER;
}

/* {transaction} -> {how many, page ids in descending order} that it freed. */
static int check_free(struct tree *t, const struct node *node)
{
    const uint8_t *value = value_of(t, node);
    if (node->flags & ~NODE_BIG || get64(node->key.bytes) > t->walk->txn || !value ||
        node->value_bytes < sizeof(uint64_t) || node->value_bytes % sizeof(uint64_t) ||
        get64(value) > node->value_bytes / sizeof(uint64_t) - 1)
        return complain(t->walk, "an entry of the free list is none");
    uint64_t count = get64(value), before = NO_PAGE;
    for (uint64_t i = 1; i <= count; i++) {
        uint64_t page = get64(value + i * sizeof page);
        if (page >= before || !take(t->walk, page, 1))
            return complain(t->walk, "page %llu is free and in use", (unsigned long long)page);
        before = page;
    }
    return 0;
}

static int check_directory(struct tree *t, const struct node *node)
{
    static const char *const names[] = {
        [TREE_META] = "meta", [TREE_PAGES] = "pages", [TREE_USERS] = "users"};
    for (int kind = TREE_META; kind <= TREE_USERS; kind++)
        if (node->key.count == strlen(names[kind]) &&
            memcmp(node->key.bytes, names[kind], node->key.count) == 0 &&
            node->flags == NODE_DATABASE && node->value_bytes == DATABASE_BYTES) {
            t->walk->ours[kind] = get_database(node->data);
            return 0;
        }
    return complain(t->walk, "a database that is not ours");
}

static int check_meta(struct tree *t, const struct node *node)
{
    if (node->key.count != strlen(SKV_GENERATION_KEY) ||
        memcmp(node->key.bytes, SKV_GENERATION_KEY, node->key.count) != 0 || node->flags ||
        node->value_bytes != sizeof(uint64_t))
        return complain(t->walk, "the high-water mark of generations is none");
    uint64_t mark = get64(node->data);
    if (mark > IMPLAUSIBLE)
        return complain(t->walk, "the high-water mark of generations is none");
    if (mark > t->walk->report->generation)
        t->walk->report->generation = mark;
    return 0;
}

static int check_page(struct tree *t, const struct node *node)
{
    const struct skv_store *store = t->walk->store;
    uint64_t pages = store->extent_bytes / LMDB_PAGE_BYTES;
    if (node->flags != NODE_BIG || node->value_bytes != store->value_bytes ||
        !take(t->walk, get64(node->data), pages))
        return complain(t->walk, "a user's page lies where none can");
    t->has.overflows += pages;
    return 0;
}

static int check_user(struct tree *t, const struct node *node)
{
    struct walk *w = t->walk;
    struct skv_record record;
    const uint8_t *value = value_of(t, node), *hashes;
    if (node->flags & ~NODE_BIG || !value)
        return complain(w, "a user's record lies where none can");
    MDB_val key = {node->key.count, (void *)(uintptr_t)node->key.bytes};
    MDB_val whole = {node->value_bytes, (void *)(uintptr_t)value};
    if (skv_record_parse(w->store, &key, &whole, &record, &hashes))
        w->report->damaged_records++;
    else if (record.generation > w->report->generation)
        w->report->generation = record.generation;
    return 0;
}

static int (*const check_entry[])(struct tree *t, const struct node *node) = {
    [TREE_FREE] = check_free,  [TREE_DIRECTORY] = check_directory, [TREE_META] = check_meta,
    [TREE_PAGES] = check_page, [TREE_USERS] = check_user,
};

static const struct {
    uint32_t least, most;
} key_bytes[] = {
    [TREE_FREE] = {sizeof(uint64_t), sizeof(uint64_t)},
    [TREE_DIRECTORY] = {1, 16},
    [TREE_META] = {1, 16},
    [TREE_PAGES] = {PAGE_KEY_BYTES, PAGE_KEY_BYTES},
    [TREE_USERS] = {USER_KEY_BYTES, USER_KEY_BYTES},
};

/* ---- trees ---- */

/* The children of the last branch level are read ahead, so that a cold disk sees many reads. */
static void read_ahead(const struct tree *t, const uint8_t *page, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t child = node_at(page, i, false).child;
        if (child < t->walk->count)
            madvise((void *)(uintptr_t)(t->walk->map + child * LMDB_PAGE_BYTES), LMDB_PAGE_BYTES,
                    MADV_WILLNEED);
    }
}

/* Do the page's keys ascend, at least `low` and below `high`, with the lengths that they have in
 * this tree? */
static bool is_ordered(const struct tree *t, const uint8_t *page, bool leaf, uint32_t count,
                       struct key low, struct key high)
{
    for (uint32_t i = leaf ? 0 : 1; i < count; i++) { /* a branch's first key says nothing */
        struct key key = node_at(page, i, leaf).key;
        if (key.count < key_bytes[t->kind].least || key.count > key_bytes[t->kind].most)
            return false;
        int order = low.count ? compare(t, low, key) : -1;
        if (order > 0 || (order == 0 && !(leaf && i == 0)) ||
            (high.count && compare(t, key, high) >= 0))
            return false;
        low = key;
    }
    return true;
}

/* A subtree whose keys are at least `low` and below `high`; `depth` levels of it are left. */
static int walk_page(struct tree *t, uint64_t number, uint32_t depth, struct key low,
                     struct key high)
{
    struct walk *w = t->walk;
    if (!take(w, number, 1))
        return complain_page(t, number, "used twice, or past the end");
    atomic_fetch_add_explicit(&w->report->progress, 1, memory_order_relaxed);
    const uint8_t *page = w->map + number * LMDB_PAGE_BYTES;
    bool leaf = depth == 1;
    uint32_t count;
    if (get64(page) != number || get16(page + 10) != (leaf ? PAGE_LEAF : PAGE_BRANCH))
        return complain_page(t, number, "it is another page");
    if (!is_packed(page, leaf, &count))
        return complain_page(t, number, "its nodes do not fill it");
    /* LMDB itself leaves a free list's branch with one child. */
    if (count < (leaf || t->kind == TREE_FREE ? 1u : 2u))
        return complain_page(t, number, "it is empty");
    if (depth == 2)
        read_ahead(t, page, count);
    if (!is_ordered(t, page, leaf, count, low, high))
        return complain_page(t, number, "its keys are not in order");
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < count; i++) {
        struct node node = node_at(page, i, leaf);
        if (leaf)
            rc = check_entry[t->kind](t, &node);
        else
            rc = walk_page(t, node.child, depth - 1, i ? node.key : low,
                           i + 1 < count ? node_at(page, i + 1, false).key : high);
    }
    if (rc)
        return rc;
    if (leaf)
        t->has.entries += count;
    if (leaf)
        t->has.leaves++;
    else
        t->has.branches++;
    return 0;
}

static int walk_tree(struct walk *w, enum kind kind, const char *name, struct database says)
{
    struct tree t = {.walk = w, .kind = kind, .name = name, .says = says};
    int rc = 0;
    if (says.depth > MAX_DEPTH || (says.root == NO_PAGE) != (says.depth == 0))
        return complain(w, "the root of %s is none", name);
    if (says.depth)
        rc = walk_page(&t, says.root, says.depth, (struct key){0}, (struct key){0});
    if (rc)
        return rc;
    if (t.has.branches != says.branches || t.has.leaves != says.leaves ||
        t.has.overflows != says.overflows || t.has.entries != says.entries)
        return complain(w, "%s holds other counts than its directory says", name);
    if (kind == TREE_USERS)
        w->report->users = t.has.entries;
    if (kind == TREE_PAGES)
        w->report->pages = t.has.entries;
    return 0;
}

/* The databases, in the order in which the directory has them. */
static int walk_ours(struct walk *w)
{
    int rc = walk_tree(w, TREE_META, "meta", w->ours[TREE_META]);
    if (rc == 0)
        rc = walk_tree(w, TREE_PAGES, "pages", w->ours[TREE_PAGES]);
    if (rc == 0)
        rc = walk_tree(w, TREE_USERS, "users", w->ours[TREE_USERS]);
    for (int kind = TREE_META; rc == 0 && kind <= TREE_USERS; kind++)
        if (w->ours[kind].flags || w->ours[kind].pad)
            rc = complain(w, "a database of another kind");
    return rc;
}

int skv_tree_walk(const struct skv_store *store, const uint8_t *file, uint64_t bytes,
                  struct skv_tree_report *report)
{
    struct walk w = {.map = file, .store = store, .report = report};
    const uint8_t *meta = NULL;
    if (bytes < 2 * LMDB_PAGE_BYTES)
        return complain(&w, "the file ends within its first two pages");
    for (int i = 0; i < 2; i++) {
        const uint8_t *one = file + i * LMDB_PAGE_BYTES;
        if (!(get16(one + 10) & PAGE_META) || get32(one + 16) != SKV_LMDB_MAGIC ||
            get32(one + 20) != 1 || get_database(one + 40).pad != LMDB_PAGE_BYTES)
            return complain(&w, "meta page %d is none, or of another version of LMDB", i);
        /* As LMDB chooses: the later transaction. */
        if (!meta || get64(one + META_BYTES - 8) > get64(meta + META_BYTES - 8))
            meta = one;
    }
    w.txn = get64(meta + META_BYTES - 8);
    uint64_t last = get64(meta + META_BYTES - 16);
    struct database list = get_database(meta + 40), directory = get_database(meta + 88);
    if (w.txn > IMPLAUSIBLE || (w.txn & 1) != (meta != file) || list.flags != DB_INTEGER_KEYS ||
        directory.pad || directory.flags)
        return complain(&w, "the newer meta page is damaged");
    if (last < 1 || last >= bytes / LMDB_PAGE_BYTES)
        return complain(&w, "the file ends before its last page");
    w.count = last + 1;
    uint64_t seen_bytes = (w.count + 63) / 64 * sizeof *w.seen;
    w.seen = mmap(NULL, seen_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w.seen == MAP_FAILED)
        return SKV_ENOMEM;
    int rc = walk_tree(&w, TREE_FREE, "the free list", list);
    if (rc == 0)
        rc = walk_tree(&w, TREE_DIRECTORY, "the directory", directory);
    if (rc == 0 && report->foreign && (w.ours[TREE_USERS].entries || w.ours[TREE_PAGES].entries))
        rc = SKV_EGEOMETRY;
    /* A daemon killed before its first transaction leaves none of the three, else all. */
    if (rc == 0 && directory.entries)
        rc = directory.entries == 3 ? walk_ours(&w) : complain(&w, "a database is missing");
    munmap(w.seen, seen_bytes);
    return rc;
}
