/* The fast host version: what does not depend on the instruction set. Packs a model's weights,
 * takes a thread's scratch, chooses the table entry. */
#include "host_math.h"

#include <stdlib.h>
#include <string.h>

#include "log.h"

static const struct host_math *const table[] = {&host_math_avx512bf16, &host_math_avx512,
                                                &host_math_avx2, &host_math_portable};

const struct host_math *host_math_choose(void)
{
    const char *forced = getenv("HSTU_HOST_MATH");
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (forced && *forced && strcmp(forced, table[i]->name) != 0)
            continue;
        if (table[i]->supported())
            return table[i];
    }
    skv_error("HSTU_HOST_MATH=%s: unknown, or not of this CPU", forced);
    return NULL;
}

/* ---- memory: a first walk counts, a second one hands out ---- */

struct carver {
    char *memory; /* NULL: counting */
    uint64_t used;
};

static float *carve(struct carver *c, uint64_t floats)
{
    float *at = c->memory ? (float *)(c->memory + c->used) : NULL;
    c->used += (floats * sizeof(float) + 63) / 64 * 64;
    return at;
}

static uint64_t whole_panels(uint64_t columns)
{
    return (columns + HOST_COLUMNS - 1) / HOST_COLUMNS * HOST_COLUMNS;
}

/* ---- weights ---- */

static void pack_vector(struct carver *c, const uint16_t *from, uint64_t count, float **to)
{
    *to = carve(c, whole_panels(count));
    if (!c->memory)
        return;
    for (uint64_t i = 0; i < count; i++)
        (*to)[i] = bf16_to_float(from[i]);
}

static void pack_matrix(struct carver *c, const uint16_t *from, uint32_t depth, uint32_t columns,
                        uint32_t pair, struct host_matrix *to)
{
    const uint32_t words = depth / pair;
    *to = (struct host_matrix){
        .panels = carve(c, whole_panels(columns) * words), .words = words, .columns = columns};
    if (!c->memory)
        return;
    for (uint32_t k = 0; k < depth; k++)
        for (uint32_t j = 0; j < columns; j++) {
            const uint64_t panel = j / HOST_COLUMNS;
            const uint16_t value = from[(uint64_t)k * columns + j];
            float *word = &to->panels[(panel * words + k / pair) * HOST_COLUMNS + j % HOST_COLUMNS];
            if (pair == 1)
                *word = bf16_to_float(value);
            else
                memcpy((char *)word + k % 2 * sizeof value, &value, sizeof value);
        }
}

static void pack(const struct hstu_weights *w, uint32_t pair, struct host_model *m,
                 struct carver *c)
{
    const uint32_t E = w->model.embed, HD = m->width;
    for (uint32_t l = 0; l < w->model.geometry.layers; l++) {
        const struct hstu_layer_weights *from = &w->layer[l];
        struct host_layer *to = &m->layer[l];
        pack_vector(c, from->ln1_weight, E, &to->ln1_weight);
        pack_vector(c, from->ln1_bias, E, &to->ln1_bias);
        pack_matrix(c, from->uvqk, E, 4 * HD, pair, &to->uvqk);
        pack_vector(c, from->uvqk_bias, 4 * HD, &to->uvqk_bias);
        pack_vector(c, from->ln2_weight, HD, &to->ln2_weight);
        pack_vector(c, from->ln2_bias, HD, &to->ln2_bias);
        pack_matrix(c, from->projection, HD, E, pair, &to->projection);
    }
    pack_matrix(c, w->head1, E, w->model.head_hidden, 1, &m->head1);
    pack_vector(c, w->head1_bias, w->model.head_hidden, &m->head1_bias);

    pack_matrix(c, w->head2, w->model.head_hidden, w->model.head_out, 1, &m->head2);
    pack_vector(c, w->head2_bias, w->model.head_out, &m->head2_bias);
}

int host_model_open(const struct hstu_weights *weights, uint32_t pair, struct host_model **out)
{
    struct host_model *m = calloc(1, sizeof *m);
    if (!m)
        return SKV_ENOMEM;
    m->model = weights->model;
    m->width = m->model.geometry.heads * m->model.geometry.head_dim;
    m->page_values = skv_page_bytes(&m->model.geometry) / 2;
    struct carver c = {0};
    pack(weights, pair, m, &c);
    m->memory = aligned_alloc(64, c.used);
    if (!m->memory) {
        free(m);
        return SKV_ENOMEM;
    }
    m->bytes = c.used;
    memset(m->memory, 0, c.used);
    c = (struct carver){.memory = m->memory};
    pack(weights, pair, m, &c);
    *out = m;
    return 0;
}

void host_model_close(struct host_model *model)
{
    if (!model)
        return;
    free(model->memory);
    free(model);
}

/* ---- scratch ---- */

static void lay_out(const struct hstu_model *model, struct host_scratch *s, struct carver *c)
{
    const uint32_t D = model->geometry.head_dim, HD = model->geometry.heads * D;
    s->row = carve(c, model->embed > HD ? model->embed : HD);
    s->a = carve(c, (uint64_t)HOST_BLOCK_ROWS * (model->embed > HD ? model->embed : HD));
    s->hidden = carve(c, HOST_TILE_ROWS * whole_panels(model->head_hidden));
    s->tile = carve(c, HOST_TILE_ROWS * HOST_COLUMNS);
    s->p = carve(c, HOST_TILE_ROWS * HOST_COLUMNS);
    s->query = carve(c, (uint64_t)HOST_QUERY_ROWS * D);
    s->sum = carve(c, (uint64_t)HOST_QUERY_ROWS * D);
    s->key = carve(c, (uint64_t)HOST_COLUMNS * D);
    s->value = carve(c, (uint64_t)HOST_COLUMNS * D);
}

int host_scratch_open(const struct hstu_model *model, struct host_scratch *out)
{
    struct host_scratch s = {0};
    struct carver c = {0};
    lay_out(model, &s, &c);
    s.memory = aligned_alloc(64, c.used);
    if (!s.memory)
        return SKV_ENOMEM;
    s.bytes = c.used;
    memset(s.memory, 0, c.used);
    c = (struct carver){.memory = s.memory};
    lay_out(model, &s, &c);
    *out = s;
    return 0;
}

void host_scratch_close(struct host_scratch *scratch)
{
    free(scratch->memory);
    *scratch = (struct host_scratch){0};
}
