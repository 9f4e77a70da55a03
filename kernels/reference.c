/* The reference: an HSTU pass in plain loops, the contract that the host and CUDA kernels are held
 * to. Called by tests and benches only. Sums are accumulated in fp64 and stored as fp32 (or rounded
 * where layers.h says), so that the order of a sum never shows. Slow on purpose: nothing here is
 * blocked, fused or threaded.
 *
 * Conventions of hstu_reference_attention: head `head` of in-flight row i lies at
 * q + i * stride + head * D (k and v alike), its output at out + i * out_stride + head * D.
 * `magnitude` is raised to the head's value where that is larger, so that a caller which zeroes it
 * and runs every head gets the maximum over heads. */
#include "layers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static float to_bf16(float value)
{
    return bf16_to_float(bf16_from_float(value));
}

static float round_if(bool rounded, float value)
{
    return rounded ? to_bf16(value) : value;
}

static float silu(float x)
{
    return (float)(x / (1.0 + exp(-(double)x)));
}

/* ---- attention ---- */

/* K (kv 0) or V (kv 1) of absolute token t as D floats: from its page, or from this call's rows. */
static void token_row(const struct hstu_attention_case *c, uint32_t kv, uint32_t head, uint32_t t,
                      float *row)
{
    const uint32_t D = c->geometry.head_dim, S = c->geometry.page_tokens;
    if (t >= c->cached) {
        const float *in_flight = kv ? c->v : c->k;
        memcpy(row, in_flight + (t - c->cached) * c->stride + (uint64_t)head * D, D * sizeof *row);
        return;
    }
    const uint16_t *page = c->pool + c->pages[t / S] * (skv_page_bytes(&c->geometry) / 2);
    const uint16_t *at = page + hstu_page_offset(&c->geometry, c->layer, kv, head, t % S);
    for (uint32_t d = 0; d < D; d++)
        row[d] = bf16_to_float(at[d]);
}

void hstu_reference_attention(const struct hstu_attention_case *c, uint32_t head)
{
    const uint32_t D = c->geometry.head_dim;
    const uint32_t rows = c->history - c->cached + c->targets;
    const uint32_t keys = c->history + c->targets;
    const double alpha = 1.0 / sqrt((double)D);
    float key[256], value[256];
    double *sum = malloc(2 * D * sizeof *sum), *size = sum + D;

    for (uint32_t i = 0; i < rows; i++) {
        const float *query = c->q + i * c->stride + (uint64_t)head * D;
        for (uint32_t d = 0; d < D; d++)
            sum[d] = size[d] = 0;
        for (uint32_t j = 0; j < keys; j++) {
            if (!hstu_allowed(c->cached + i, j, c->history, c->group))
                continue;
            token_row(c, 0, head, j, key);
            token_row(c, 1, head, j, value);
            double dot = 0;
            for (uint32_t d = 0; d < D; d++)
                dot += (double)query[d] * key[d];
            float s = (float)(dot * alpha);
            float p = round_if(c->rounded, silu(s));
            for (uint32_t d = 0; d < D; d++) {
                sum[d] += (double)p * value[d];
                size[d] += fabs((double)s * value[d]);
            }
        }
        double most = 0;
        for (uint32_t d = 0; d < D; d++) {
            float o = (float)(sum[d] / c->scaling_length);
            c->out[i * c->out_stride + (uint64_t)head * D + d] = round_if(c->rounded, o);
            most = fmax(most, size[d]);
        }
        if (c->magnitude && most > c->magnitude[i])
            c->magnitude[i] = (float)most;
    }
    free(sum);
}

/* ---- the rest of a layer, a row at a time ---- */

/* out = (x - mean) / sqrt(var + eps) * weight + bias, biased variance. `out` may be `x`. */
static void layer_norm(const float *x, uint32_t count, const uint16_t *weight, const uint16_t *bias,
                       float eps, float *out)
{
    double mean = 0, variance = 0;
    for (uint32_t i = 0; i < count; i++)
        mean += x[i];
    mean /= count;
    for (uint32_t i = 0; i < count; i++)
        variance += (x[i] - mean) * (x[i] - mean);
    double scale = 1.0 / sqrt(variance / count + eps);
    for (uint32_t i = 0; i < count; i++)
        out[i] = (float)((x[i] - mean) * scale * bf16_to_float(weight[i]) + bf16_to_float(bias[i]));
}

/* out[columns] = x[depth] W[depth][columns] (+ bias), accumulated in `sums` [columns]. */
static void multiply(const float *x, uint32_t depth, const uint16_t *w, const uint16_t *bias,
                     uint32_t columns, double *sums, float *out)
{
    for (uint32_t j = 0; j < columns; j++)
        sums[j] = bias ? bf16_to_float(bias[j]) : 0;
    for (uint32_t k = 0; k < depth; k++)
        for (uint32_t j = 0; j < columns; j++)
            sums[j] += (double)x[k] * bf16_to_float(w[(uint64_t)k * columns + j]);
    for (uint32_t j = 0; j < columns; j++)
        out[j] = (float)sums[j];
}

/* ---- the block ---- */

struct scratch {
    float *m;      /* [rows][4HD], post-SiLU, u|v|q|k */
    float *o;      /* [rows][HD] */
    float *normed; /* [max(E, HD)] one row */
    double *sums;  /* [max(4HD, E, head_hidden, head_out)] */
};

static uint32_t width_of(const struct hstu_model *m)
{
    return m->geometry.heads * m->geometry.head_dim;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void scratch_close(struct scratch *s)
{
    free(s->m);
    free(s->o);
    free(s->normed);
    free(s->sums);
}

static int scratch_open(const struct hstu_model *m, uint64_t rows, struct scratch *s)
{
    const uint64_t E = m->embed, HD = width_of(m);
    s->m = malloc(larger(rows * 4 * HD, 1) * sizeof *s->m);
    s->o = malloc(larger(rows * HD, 1) * sizeof *s->o);
    s->normed = malloc(larger(E, HD) * sizeof *s->normed);
    s->sums =
        malloc(larger(larger(4 * HD, E), larger(m->head_hidden, m->head_out)) * sizeof *s->sums);
    if (s->m && s->o && s->normed && s->sums)
        return 0;
    scratch_close(s);
    return SKV_ENOMEM;
}

static uint32_t rows_of(const struct hstu_sequence *s)
{
    return s->history - s->cached + s->targets;
}

static uint64_t rows_of_all(const struct hstu_sequence *sequences, uint32_t count)
{
    uint64_t rows = 0;
    for (uint32_t b = 0; b < count; b++)
        rows += rows_of(&sequences[b]);
    return rows;
}

/* Steps 1 and 2: m = SiLU(LN(x) W + b). */
static void project_row(const struct hstu_weights *w, uint32_t layer, bool rounded, const float *x,
                        struct scratch *s, float *m)
{
    const struct hstu_layer_weights *k = &w->layer[layer];
    const uint32_t E = w->model.embed, columns = 4 * width_of(&w->model);
    layer_norm(x, E, k->ln1_weight, k->ln1_bias, w->model.eps, s->normed);
    for (uint32_t e = 0; e < E; e++)
        s->normed[e] = round_if(rounded, s->normed[e]);
    multiply(s->normed, E, k->uvqk, k->uvqk_bias, columns, s->sums, m);
    for (uint32_t j = 0; j < columns; j++)
        m[j] = round_if(rounded, silu(round_if(rounded, m[j])));
}

/* Step 4, every head, and the append of new history. m, o: this sequence's first row. */
static void attend(const struct hstu_weights *w, uint32_t layer, bool rounded,
                   const struct hstu_sequence *q, uint16_t *pool, const float *m, float *o)
{
    const struct hstu_model *model = &w->model;
    const struct skv_geometry *g = &model->geometry;
    const uint64_t HD = width_of(model);
    struct hstu_attention_case c = {
        .geometry = *g,
        .scaling_length = model->scaling_length,
        .group = model->group,
        .layer = layer,
        .history = q->history,
        .cached = q->cached,
        .targets = q->targets,
        .pool = pool,
        .pages = q->pages,
        .v = m + HD,
        .q = m + 2 * HD,
        .k = m + 3 * HD,
        .stride = 4 * HD,
        .out = o,
        .out_stride = HD,
        .rounded = rounded,
    };
    for (uint32_t head = 0; head < g->heads; head++)
        hstu_reference_attention(&c, head);

    for (uint32_t t = q->cached; q->append && t < q->history; t++) {
        uint16_t *page = pool + q->pages[t / g->page_tokens] * (skv_page_bytes(g) / 2);
        for (uint32_t kv = 0; kv < 2; kv++)
            for (uint32_t i = 0; i < HD; i++) {
                const float *from = (kv ? c.v : c.k) + (t - q->cached) * c.stride;
                uint64_t at = hstu_page_offset(g, layer, kv, i / g->head_dim, t % g->page_tokens);
                page[at + i % g->head_dim] = bf16_from_float(from[i]);
            }
    }
}

/* Steps 5 and 6: x += (u * LN(o)) P, in place. */
static void output_row(const struct hstu_weights *w, uint32_t layer, bool rounded, const float *u,
                       const float *o, struct scratch *s, float *product, float *x)
{
    const struct hstu_layer_weights *k = &w->layer[layer];
    const uint32_t E = w->model.embed, HD = width_of(&w->model);
    layer_norm(o, HD, k->ln2_weight, k->ln2_bias, w->model.eps, s->normed);
    for (uint32_t i = 0; i < HD; i++)
        s->normed[i] = round_if(rounded, s->normed[i] * u[i]);
    multiply(s->normed, HD, k->projection, NULL, E, s->sums, product);
    for (uint32_t e = 0; e < E; e++)
        x[e] = round_if(rounded, product[e] + x[e]);
}

int hstu_reference_block(const struct hstu_weights *w, const struct hstu_sequence *sequences,
                         uint32_t count, uint16_t *pool, bool rounded, const float *x,
                         float *block_out)
{
    const uint64_t E = w->model.embed, HD = width_of(&w->model);
    const uint64_t rows = rows_of_all(sequences, count);
    struct scratch s;
    float product[2048]; /* E's bound */
    if (scratch_open(&w->model, rows, &s) != 0)
        return SKV_ENOMEM;
    if (block_out != x && rows)
        memcpy(block_out, x, rows * E * sizeof *x);

    for (uint32_t l = 0; l < w->model.geometry.layers; l++) {
        for (uint64_t r = 0; r < rows; r++)
            project_row(w, l, rounded, block_out + r * E, &s, s.m + r * 4 * HD);
        uint64_t first = 0;
        for (uint32_t b = 0; b < count; first += rows_of(&sequences[b++]))
            attend(w, l, rounded, &sequences[b], pool, s.m + first * 4 * HD, s.o + first * HD);
        for (uint64_t r = 0; r < rows; r++)
            output_row(w, l, rounded, s.m + r * 4 * HD, s.o + r * HD, &s, product,
                       block_out + r * E);
    }
    scratch_close(&s);
    return 0;
}

/* ---- around the block ---- */

/* x = bf16(emb * sqrt(E) + pos): the block's input is bf16 whether `rounded` or not. */
static void embed_rows(const struct hstu_weights *w, const struct hstu_sequence *q, float *x)
{
    const struct hstu_model *m = &w->model;
    const float scale = sqrtf((float)m->embed);
    for (uint32_t i = 0; i < rows_of(q); i++) {
        const uint16_t *e = w->embedding + (uint64_t)hstu_token_row(m, q->tokens[i]) * m->embed;
        uint32_t position = hstu_position(i, q->cached, q->history, m->position_buckets);
        const uint16_t *p = w->position + (uint64_t)position * m->embed;
        for (uint32_t j = 0; j < m->embed; j++)
            x[(uint64_t)i * m->embed + j] =
                to_bf16(bf16_to_float(e[j]) * scale + bf16_to_float(p[j]));
    }
}

/* L2-normalise (floor 1e-6), head_hidden with ReLU, head_out: fp32, no rounding points. */
static void head_row(const struct hstu_weights *w, const float *x, double *sums, float *hidden,
                     float *logits)
{
    const struct hstu_model *m = &w->model;
    float unit[2048]; /* E's bound */
    double square = 0;
    for (uint32_t e = 0; e < m->embed; e++)
        square += (double)x[e] * x[e];
    double norm = fmax(sqrt(square), 1e-6);
    for (uint32_t e = 0; e < m->embed; e++)
        unit[e] = (float)(x[e] / norm);
    multiply(unit, m->embed, w->head1, w->head1_bias, m->head_hidden, sums, hidden);
    for (uint32_t i = 0; i < m->head_hidden; i++)
        hidden[i] = hidden[i] > 0 ? hidden[i] : 0;
    multiply(hidden, m->head_hidden, w->head2, w->head2_bias, m->head_out, sums, logits);
}

int hstu_reference_head(const struct hstu_weights *w, const float *x, uint32_t rows, float *logits)
{
    const struct hstu_model *m = &w->model;
    float *hidden = malloc(m->head_hidden * sizeof *hidden);
    double *sums = malloc(larger(m->head_hidden, m->head_out) * sizeof *sums);
    for (uint32_t i = 0; hidden && sums && i < rows; i++)
        head_row(w, x + (uint64_t)i * m->embed, sums, hidden, logits + (uint64_t)i * m->head_out);
    const int status = hidden && sums ? SKV_OK : SKV_ENOMEM;
    free(hidden);
    free(sums);
    return status;
}

int hstu_reference_pass(const struct hstu_weights *w, const struct hstu_sequence *sequences,
                        uint32_t count, uint16_t *pool, bool rounded, float *block_out,
                        float *logits)
{
    const struct hstu_model *m = &w->model;
    const uint64_t E = m->embed, rows = rows_of_all(sequences, count);
    float *x = calloc(larger(rows * E, 1), sizeof *x);
    if (!x)
        return SKV_ENOMEM;
    uint64_t first = 0;
    for (uint32_t b = 0; b < count; first += rows_of(&sequences[b++]))
        embed_rows(w, &sequences[b], x + first * E);
    int status = hstu_reference_block(w, sequences, count, pool, rounded, x, x);
    if (status == SKV_OK && block_out && rows)
        memcpy(block_out, x, rows * E * sizeof *x);
    first = 0;
    for (uint32_t b = 0; logits && status == SKV_OK && b < count;
         first += rows_of(&sequences[b++])) {
        const struct hstu_sequence *q = &sequences[b];
        const uint64_t row = first + q->history - q->cached;
        status = hstu_reference_head(w, x + row * E, q->targets, logits);
        logits += (uint64_t)q->targets * m->head_out;
    }
    free(x);
    return status;
}
