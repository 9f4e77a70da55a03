/* Models: the named ones, their check, seeded random weights, the fingerprint. Called once at a
 * worker's start.
 *
 * Random weights come from a counter-based generator (a mixed counter, four 16-bit values a word),
 * one exactly rounded multiplication and at most one addition a value, no libm beyond sqrtf: the
 * same bits on any machine, at memory speed. */
#include "layers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"
#include "log.h"
#include "table_rows.h"

/* ---- named models ---- */

static const struct named {
    const char *name;
    uint32_t history; /* most tokens */
    struct hstu_model model;
} named_models[] = {
    {"tiny",
     8192,
     {.geometry = {.layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32},
      .embed = 128,
      .scaling_length = 8192,
      .group = 1,
      .position_buckets = 8192,
      .embedding_rows = 65536,
      .head_hidden = 128,
      .head_out = 1,
      .eps = 1e-5f}},
    {"kuairand",
     8192,
     {.geometry = {.layers = 3, .heads = 4, .head_dim = 128, .page_tokens = 32},
      .embed = 512,
      .scaling_length = 8398,
      .group = 1,
      .position_buckets = 8192,
      .embedding_rows = 65536,
      .head_hidden = 512,
      .head_out = 8,
      .eps = 1e-5f}},
    {"bench",
     4096,
     {.geometry = {.layers = 8, .heads = 4, .head_dim = 256, .page_tokens = 32},
      .embed = 1024,
      .scaling_length = 4352,
      .group = 1,
      .position_buckets = 8192,
      .embedding_rows = 65536,
      .head_hidden = 1024,
      .head_out = 1,
      .eps = 1e-5f}},
};

static const struct named *named_find(const char *name)
{
    for (size_t i = 0; i < sizeof named_models / sizeof *named_models; i++)
        if (strcmp(named_models[i].name, name) == 0)
            return &named_models[i];
    return NULL;
}

int hstu_model_named(const char *name, struct hstu_model *out)
{
    const struct named *named = named_find(name);
    if (!named)
        return SKV_ENOENT;
    *out = named->model;
    return 0;
}

uint32_t hstu_model_history(const char *name)
{
    const struct named *named = named_find(name);
    return named ? named->history : 0;
}

int hstu_model_check(const struct hstu_model *m)
{
    if (skv_geometry_check(&m->geometry) != 0)
        return SKV_EINVAL;
    if (m->embed == 0 || m->embed % 64 != 0 || m->embed > 2048)
        return SKV_EINVAL;
    if (m->scaling_length == 0 || m->group == 0 || m->position_buckets == 0)
        return SKV_EINVAL;
    if (m->embedding_rows == 0 || (m->embedding_rows & (m->embedding_rows - 1)) != 0)
        return SKV_EINVAL;
    if (m->head_hidden == 0 || m->head_hidden > 8192 || m->head_out == 0 || m->head_out > 8192)
        return SKV_EINVAL;
    if (!(m->eps > 0) || !isfinite(m->eps))
        return SKV_EINVAL;
    return 0;
}

/* ---- tokens and random bits ---- */

uint32_t hstu_token_row(const struct hstu_model *model, uint64_t token)
{
    return hstu_mix_row(token, model->embedding_rows);
}

/* values[i] = bf16(mean + uniform(-spread, spread)) */
static void fill(uint16_t *values, uint64_t count, uint64_t seed, float mean, float spread)
{
    const float step = spread / 65535.0f;
    for (uint64_t i = 0; i < count; i += 4) {
        uint64_t bits = hstu_mix(seed + (i / 4) * UINT64_C(0x9e3779b97f4a7c15));
        uint64_t end = count - i < 4 ? count - i : 4;
        for (uint64_t j = 0; j < end; j++, bits >>= 16) {
            /* An odd number in (-65536, 65536): symmetric, and exact in fp32. */
            int32_t odd = 2 * (int32_t)(bits & 0xffff) - 65535;
            values[i + j] = bf16_from_float(mean + (float)odd * step);
        }
    }
}

/* ---- weights ---- */

struct tensor {
    uint16_t **at;
    uint64_t count;
    float mean, spread; /* of the random initialisation */
};

enum { TENSORS_A_LAYER = 7, TENSORS_AROUND = 6 };
#define MAX_TENSORS (TENSORS_A_LAYER * SKV_MAX_LAYERS + TENSORS_AROUND)

/* A uniform variable on (-spread, spread) has standard deviation spread / sqrt(3). */
static float spread_of(float deviation)
{
    return deviation * sqrtf(3.0f);
}

/* Every tensor in the order of the one allocation, with its initialisation. The deviations:
 *
 * x = emb * sqrt(E) + pos has variance near one. UVQK of a normed row has deviation 2, so that SiLU
 * leaves positive means: q.k / sqrt(D) is then a few units with much spread, SiLU(score) follows
 * it, and o = sum / N, small as 1/N makes it, still has a variance of eps's order after a handful
 * of tokens; LN over o scales it to order one. That keeps the user's history in every score: one
 * cached token of h moves o by about 1/sqrt(h). The projection adds variance of order one a layer,
 * which the next LN takes out again. The head sees a unit vector, so its first matrix has
 * deviation one; logits come out with deviation near 1.4. */
static uint32_t tensors_of(struct hstu_weights *w, struct tensor out[MAX_TENSORS])
{
    const struct hstu_model *m = &w->model;
    const uint64_t E = m->embed, HD = (uint64_t)m->geometry.heads * m->geometry.head_dim;
    uint32_t n = 0;
    for (uint32_t l = 0; l < m->geometry.layers; l++) {
        struct hstu_layer_weights *k = &w->layer[l];
        out[n++] = (struct tensor){&k->ln1_weight, E, 1.0f, 0.1f};
        out[n++] = (struct tensor){&k->ln1_bias, E, 0.0f, 0.1f};
        out[n++] = (struct tensor){&k->uvqk, E * 4 * HD, 0.0f, spread_of(2.0f / sqrtf((float)E))};
        out[n++] = (struct tensor){&k->uvqk_bias, 4 * HD, 0.0f, 0.2f};
        out[n++] = (struct tensor){&k->ln2_weight, HD, 1.0f, 0.1f};
        out[n++] = (struct tensor){&k->ln2_bias, HD, 0.0f, 0.1f};
        out[n++] =
            (struct tensor){&k->projection, HD * E, 0.0f, spread_of(1.0f / sqrtf((float)HD))};
    }
    out[n++] = (struct tensor){&w->embedding, m->embedding_rows * E, 0.0f,
                               spread_of(1.0f / sqrtf((float)E))};
    out[n++] = (struct tensor){&w->position, m->position_buckets * E, 0.0f, spread_of(0.25f)};
    out[n++] = (struct tensor){&w->head1, E * m->head_hidden, 0.0f, spread_of(1.0f)};
    out[n++] = (struct tensor){&w->head1_bias, m->head_hidden, 0.0f, 0.1f};
    out[n++] = (struct tensor){&w->head2, (uint64_t)m->head_hidden * m->head_out, 0.0f,
                               spread_of(2.0f / sqrtf((float)m->head_hidden))};
    out[n++] = (struct tensor){&w->head2_bias, m->head_out, 0.0f, 0.1f};
    return n;
}

/* Tensors start on cache lines; the gaps are zero, because the fingerprint covers them. */
static uint64_t tensor_room(const struct tensor *tensor)
{
    return (tensor->count * sizeof(uint16_t) + 63) / 64 * 64;
}

int hstu_weights_random(const struct hstu_model *model, uint64_t seed, struct hstu_weights **out)
{
    if (hstu_model_check(model) != 0)
        return SKV_EINVAL;
    struct hstu_weights *w = calloc(1, sizeof *w);
    if (!w)
        return SKV_ENOMEM;
    w->model = *model;

    struct tensor tensors[MAX_TENSORS];
    uint32_t count = tensors_of(w, tensors);
    for (uint32_t i = 0; i < count; i++)
        w->bytes += tensor_room(&tensors[i]);
    w->memory = aligned_alloc(64, w->bytes);
    if (!w->memory) {
        skv_error("no memory for %llu bytes of weights", (unsigned long long)w->bytes);
        free(w);
        return SKV_ENOMEM;
    }
    char *at = w->memory;
    for (uint32_t i = 0; i < count; i++) {
        const struct tensor *t = &tensors[i];
        *t->at = (uint16_t *)at;
        fill(*t->at, t->count, hstu_mix(hstu_mix(seed) + i), t->mean, t->spread);
        memset(at + t->count * sizeof(uint16_t), 0, tensor_room(t) - t->count * sizeof(uint16_t));
        at += tensor_room(t);
    }
    *out = w;
    return 0;
}

void hstu_weights_close(struct hstu_weights *weights)
{
    if (!weights)
        return;
    free(weights->memory);
    free(weights);
}

/* ---- fingerprint ---- */

/* Raised whenever what a cached K or V means changes without a field saying so: mask, rounding
 * points, page layout, the embedding row of a token. */
#define FINGERPRINT_VERSION 1u

struct fingerprint {
    uint32_t version;
    uint32_t mask; /* 0: causal over history, candidates see history and their own group */
    uint32_t layers, heads, head_dim, page_tokens;
    uint32_t embed, scaling_length, group, position_buckets, embedding_rows;
    uint32_t head_hidden, head_out;
    uint32_t eps_bits;
    struct skv_id weights;
};
_Static_assert(sizeof(struct fingerprint) == 14 * 4 + 16, "no padding: it is hashed");

struct skv_id hstu_fingerprint(const struct hstu_weights *w)
{
    const struct hstu_model *m = &w->model;
    struct fingerprint f = {
        .version = FINGERPRINT_VERSION,
        .layers = m->geometry.layers,
        .heads = m->geometry.heads,
        .head_dim = m->geometry.head_dim,
        .page_tokens = m->geometry.page_tokens,
        .embed = m->embed,
        .scaling_length = m->scaling_length,
        .group = m->group,
        .position_buckets = m->position_buckets,
        .embedding_rows = m->embedding_rows,
        .head_hidden = m->head_hidden,
        .head_out = m->head_out,
        .weights = skv_digest(w->memory, w->bytes),
    };
    memcpy(&f.eps_bits, &m->eps, sizeof f.eps_bits);
    return skv_digest(&f, sizeof f);
}
