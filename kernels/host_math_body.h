/* The mathematics of the fast host version, included by each host_math_*.c after its vector
 * primitives (see host_vector.h), v_mac and supported. Not a header to include elsewhere: it
 * defines one `struct host_math`.
 *
 * Operands of the large products are bf16 in value, and travel as 32-bit words in arrays of float:
 * a word is one fp32 (PAIR 1) or two bf16 that follow one another along the sum (PAIR 2), and
 * v_mac(a, b, c) adds the products of PAIR values to c. Nothing but v_mac looks into a word. */

/* ---- vectors ---- */

static inline void v_store_bf16(uint16_t *at, vf v)
{
    vh half = v_narrow(v);
    memcpy(at, &half, sizeof half);
}

/* Values i.. of a row of operands := v, rounded. */
static inline void v_store_operand(float *row, uint32_t i, vf v)
{
    if (PAIR == 1)
        v_store(row + i, v_round(v));
    else
        v_store_bf16((uint16_t *)row + i, v);
}

/* LANES words of a row of bf16. */
static inline vf v_load_words(const uint16_t *at)
{
    vf words;
    if (PAIR == 1)
        return v_load_bf16(at);
    memcpy(&words, at, sizeof words);
    return words;
}

/* LANES words across PAIR rows of bf16. */
static inline vf v_load_across(const uint16_t *const rows[PAIR], uint32_t i)
{
    vh even;
    if (PAIR == 1)
        return v_load_bf16(rows[0] + i);
    memcpy(&even, rows[0] + i, sizeof even);
    return (vf)(__builtin_convertvector(even, vi) | (vi)v_load_bf16(rows[PAIR - 1] + i));
}

/* x / (1 + exp(-x)): 2^y by its nearest integer and a polynomial of degree 5 (2.0e-07 relative). */
static inline vf v_silu(vf x)
{
    vf n, f = v_split(x * -1.44269504f, &n);
    vf p = v_splat(0.00133813025f);
    p = v_fma(p, f, v_splat(0.00966636852f));
    p = v_fma(p, f, v_splat(0.0555038101f));
    p = v_fma(p, f, v_splat(0.24022349f));
    p = v_fma(p, f, v_splat(0.693147181f));
    p = v_fma(p, f, v_splat(1.0f));
    return x * v_reciprocal(1.0f + v_scale(p, n));
}

/* ---- the one matrix product, on words or (`exact`) on fp32 ---- */

#define UNROLL _Pragma("GCC unroll 8")

/* c[rows][vectors * LANES] (+)= a[rows][depth] b[depth][..]; `rows`, `vectors` and `exact` are
 * constants where this is inlined, so that `sum` lives in registers. */
static inline __attribute__((always_inline)) void
register_tile(const float *a, size_t a_stride, const float *b, size_t b_stride, uint32_t depth,
              float *c, size_t c_stride, bool add, const int rows, const int vectors,
              const bool exact)
{
    vf sum[HOST_TILE_ROWS][TILE_VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
    {
        UNROLL for (int j = 0; j < vectors; j++)
        {
            sum[i][j] = add ? v_load(c + i * c_stride + j * LANES) : (vf){0};
        }
    }
    for (uint32_t k = 0; k < depth; k++) {
        vf right[TILE_VECTORS];
        UNROLL for (int j = 0; j < vectors; j++)
        {
            right[j] = v_load(b + k * b_stride + j * LANES);
        }
        UNROLL for (int i = 0; i < rows; i++)
        {
            vf left = v_splat_word(a + i * a_stride + k);
            UNROLL for (int j = 0; j < vectors; j++)
            {
                sum[i][j] =
                    exact ? v_fma(left, right[j], sum[i][j]) : v_mac(left, right[j], sum[i][j]);
            }
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
    {
        UNROLL for (int j = 0; j < vectors; j++)
        {
            v_store(c + i * c_stride + j * LANES, sum[i][j]);
        }
    }
}

/* The same of 1 to 6 rows and `columns`, a multiple of vectors * LANES. */
static inline __attribute__((always_inline)) void
multiply_as(const float *a, size_t a_stride, uint32_t rows, const float *b, size_t b_stride,
            uint32_t depth, float *c, size_t c_stride, bool add, uint32_t columns,
            const int vectors, const bool exact)
{
#define TILE(n)                                                                                    \
    register_tile(a, a_stride, b + j, b_stride, depth, c + j, c_stride, add, n, vectors, exact)
    for (uint32_t j = 0; j < columns; j += (uint32_t)vectors * LANES) {
        switch (rows) {
        case 1:
            TILE(1);
            break;
        case 2:
            TILE(2);
            break;
        case 3:
            TILE(3);
            break;
        case 4:
            TILE(4);
            break;
        case 5:
            TILE(5);
            break;
        default:
            TILE(6);
        }
    }
#undef TILE
}

/* c[rows][64] (+)= a[rows][depth] b[depth][64], 1 to 6 rows, depth and strides in words. Each
 * element is one chain of v_mac over depth, ascending, from zero or from c. */
static __attribute__((noinline)) void multiply(const float *a, size_t a_stride, uint32_t rows,
                                               const float *b, size_t b_stride, uint32_t depth,
                                               float *c, size_t c_stride, bool add)
{
    multiply_as(a, a_stride, rows, b, b_stride, depth, c, c_stride, add, HOST_COLUMNS, TILE_VECTORS,
                false);
}

/* A product's panel p of up to six rows, into the scratch tile. */
static void multiply_panel(const float *a, size_t a_stride, uint32_t rows,
                           const struct host_matrix *matrix, uint32_t panel, float *tile)
{
    const float *b = matrix->panels + (size_t)panel * matrix->words * HOST_COLUMNS;
    multiply(a, a_stride, rows, b, HOST_COLUMNS, matrix->words, tile, HOST_COLUMNS, false);
}

/* The same of fp32 operands and weights: the head's. Its last product may have one column only. */
static void multiply_panel_exact(const float *a, size_t a_stride, uint32_t rows,
                                 const struct host_matrix *matrix, uint32_t panel, float *tile)
{
    const float *b = matrix->panels + (size_t)panel * matrix->words * HOST_COLUMNS;
    if (matrix->columns <= LANES)
        multiply_as(a, a_stride, rows, b, HOST_COLUMNS, matrix->words, tile, HOST_COLUMNS, false,
                    LANES, 1, true);
    else
        multiply_as(a, a_stride, rows, b, HOST_COLUMNS, matrix->words, tile, HOST_COLUMNS, false,
                    HOST_COLUMNS, TILE_VECTORS, true);
}

static uint32_t panels_of(const struct host_matrix *matrix)
{
    return (matrix->columns + HOST_COLUMNS - 1) / HOST_COLUMNS;
}

static uint32_t tile_rows(uint32_t rows, uint32_t first)
{
    return rows - first < HOST_TILE_ROWS ? rows - first : HOST_TILE_ROWS;
}

static bool any_wanted(const bool *wanted, uint32_t first, uint32_t rows)
{
    if (!wanted)
        return true;
    for (uint32_t i = first; i < first + rows; i++)
        if (wanted[i])
            return true;
    return false;
}

/* ---- rows ---- */

/* Mean and 1 / sqrt(variance + eps) of a row held as fp32. */
static void moments(const float *x, uint32_t count, float eps, float *mean, float *scale)
{
    vf sum = {0}, square = {0};
    for (uint32_t i = 0; i < count; i += LANES)
        sum += v_load(x + i);
    *mean = v_sum(sum) / (float)count;
    for (uint32_t i = 0; i < count; i += LANES) {
        vf d = v_load(x + i) - *mean;
        square = v_fma(d, d, square);
    }
    *scale = 1.0f / sqrtf(v_sum(square) / (float)count + eps);
}

static inline vf v_normed(const float *x, const float *weight, const float *bias, uint32_t i,
                          float mean, float scale)
{
    return v_fma((v_load(x + i) - mean) * scale, v_load(weight + i), v_load(bias + i));
}

static const uint16_t *embedding_of(const struct hstu_weights *w, uint64_t token)
{
    return w->embedding + (uint64_t)hstu_token_row(&w->model, token) * w->model.embed;
}

/* The tables' rows lie anywhere in them: all are on their way before the first is used. */
static void body_embed(const struct hstu_weights *w, const uint64_t *tokens,
                       const uint32_t *positions, uint32_t rows, uint16_t *x)
{
    enum { LINE = 32 /* values */ };
    const uint32_t E = w->model.embed;
    const float scale = sqrtf((float)E);
    for (uint32_t r = 0; r < rows; r++) {
        const uint16_t *e = embedding_of(w, tokens[r]);
        for (uint32_t i = 0; i < E; i += LINE)
            __builtin_prefetch(e + i);
    }
    for (uint32_t r = 0; r < rows; r++) {
        const uint16_t *e = embedding_of(w, tokens[r]);
        const uint16_t *p = w->position + (uint64_t)positions[r] * E;
        for (uint32_t i = 0; i < E; i += LANES)
            v_store_bf16(x + (size_t)r * E + i, v_load_bf16(e + i) * scale + v_load_bf16(p + i));
    }
}

static void body_project(const struct host_model *model, uint32_t layer, const uint16_t *x,
                         uint16_t *m, uint32_t rows, const bool *wanted, struct host_scratch *s)
{
    const struct host_layer *k = &model->layer[layer];
    const uint32_t E = model->model.embed, HD = model->width;
    const uint32_t words = E / PAIR;
    for (uint32_t r = 0; r < rows; r++) {
        float *a = s->a + (size_t)r * words, mean, scale;
        for (uint32_t i = 0; i < E; i += LANES)
            v_store(s->row + i, v_load_bf16(x + (size_t)r * E + i));
        moments(s->row, E, model->model.eps, &mean, &scale);
        for (uint32_t i = 0; i < E; i += LANES)
            v_store_operand(a, i, v_normed(s->row, k->ln1_weight, k->ln1_bias, i, mean, scale));
    }
    for (uint32_t panel = 0; panel < panels_of(&k->uvqk); panel++) {
        const uint32_t column = panel * HOST_COLUMNS, part = column / HD; /* 0 u, 1 v, 2 q, 3 k */
        for (uint32_t r = 0; r < rows; r += HOST_TILE_ROWS) {
            const uint32_t count = tile_rows(rows, r);
            if (part % 2 == 0 && !any_wanted(wanted, r, count))
                continue;
            multiply_panel(s->a + (size_t)r * words, words, count, &k->uvqk, panel, s->tile);
            for (uint32_t i = 0; i < count; i++)
                for (uint32_t j = 0; j < HOST_COLUMNS; j += LANES) {
                    vf z = v_load(s->tile + i * HOST_COLUMNS + j);
                    z = v_round(z + v_load(k->uvqk_bias + column + j));
                    v_store_bf16(m + (size_t)(r + i) * 4 * HD + column + j, v_silu(z));
                }
        }
    }
}

static void body_output(const struct host_model *model, uint32_t layer, const uint16_t *m,
                        const float *o, uint16_t *x, uint32_t rows, const bool *wanted,
                        struct host_scratch *s)
{
    const struct host_layer *k = &model->layer[layer];
    const uint32_t E = model->model.embed, HD = model->width, words = HD / PAIR;
    for (uint32_t r = 0; r < rows; r++) {
        const float *row = o + (size_t)r * HD;
        const uint16_t *u = m + (size_t)r * 4 * HD;
        float *a = s->a + (size_t)r * words, mean, scale;
        if (!any_wanted(wanted, r, 1)) {
            memset(a, 0, words * sizeof *a);
            continue;
        }
        moments(row, HD, model->model.eps, &mean, &scale);
        for (uint32_t i = 0; i < HD; i += LANES) {
            vf y = v_normed(row, k->ln2_weight, k->ln2_bias, i, mean, scale);
            v_store_operand(a, i, y * v_load_bf16(u + i));
        }
    }
    for (uint32_t panel = 0; panel < panels_of(&k->projection); panel++) {
        const uint32_t column = panel * HOST_COLUMNS;
        for (uint32_t r = 0; r < rows; r += HOST_TILE_ROWS) {
            const uint32_t count = tile_rows(rows, r);
            if (!any_wanted(wanted, r, count))
                continue;
            multiply_panel(s->a + (size_t)r * words, words, count, &k->projection, panel, s->tile);
            for (uint32_t i = 0; i < count; i++)
                for (uint32_t j = 0; j < HOST_COLUMNS; j += LANES) {
                    uint16_t *at = x + (size_t)(r + i) * E + column + j;
                    v_store_bf16(at, v_load(s->tile + i * HOST_COLUMNS + j) + v_load_bf16(at));
                }
        }
    }
}

static void body_head(const struct host_model *model, const uint16_t *x, uint32_t rows,
                      float *logits, struct host_scratch *s)
{
    const uint32_t E = model->model.embed, out = model->model.head_out;
    const uint32_t hidden = panels_of(&model->head1) * HOST_COLUMNS;
    for (uint32_t r = 0; r < rows; r += HOST_TILE_ROWS) {
        const uint32_t count = tile_rows(rows, r);
        for (uint32_t i = 0; i < count; i++) {
            float *a = s->a + (size_t)i * E;
            vf square = {0};
            for (uint32_t j = 0; j < E; j += LANES) {
                vf v = v_load_bf16(x + (size_t)(r + i) * E + j);
                square = v_fma(v, v, square);
                v_store(a + j, v);
            }
            float norm = sqrtf(v_sum(square));
            norm = norm < 1e-6f ? 1e-6f : norm;
            for (uint32_t j = 0; j < E; j += LANES)
                v_store(a + j, v_load(a + j) / norm);
        }
        for (uint32_t panel = 0; panel < panels_of(&model->head1); panel++) {
            multiply_panel_exact(s->a, E, count, &model->head1, panel, s->tile);
            for (uint32_t i = 0; i < count; i++)
                for (uint32_t j = 0; j < HOST_COLUMNS; j += LANES) {
                    const uint32_t column = panel * HOST_COLUMNS + j;
                    vf h =
                        v_load(s->tile + i * HOST_COLUMNS + j) + v_load(model->head1_bias + column);
                    v_store(s->hidden + (size_t)i * hidden + column, (vf)((vi)h & ~(h < 0.0f)));
                }
        }
        for (uint32_t panel = 0; panel < panels_of(&model->head2); panel++) {
            const uint32_t column = panel * HOST_COLUMNS;
            multiply_panel_exact(s->hidden, hidden, count, &model->head2, panel, s->tile);
            for (uint32_t i = 0; i < count; i++)
                for (uint32_t j = 0; j < HOST_COLUMNS && column + j < out; j++)
                    logits[(size_t)(r + i) * out + column + j] =
                        s->tile[i * HOST_COLUMNS + j] + model->head2_bias[column + j];
        }
    }
}

/* ---- attention ---- */

/* Transposes LANES rows of LANES values in registers: log2(LANES) rounds of exchanging the odd
 * blocks of one row with the even blocks of its partner. */
static inline void v_transpose(vf row[LANES])
{
    vi lane = {0};
    for (int i = 1; i < LANES; i++)
        lane[i] = i;
    UNROLL for (int step = 1; step < LANES; step *= 2)
    {
        const vi odd = (lane & step) != 0;
        const vi low = (odd & (lane - step + LANES)) | (~odd & lane);
        const vi high = (odd & (lane + LANES)) | (~odd & (lane + step));
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
        {
            if (i & step)
                continue;
            vf a = row[i], b = row[i + step];
            row[i] = __builtin_shuffle(a, b, low);
            row[i + step] = __builtin_shuffle(a, b, high);
        }
    }
}

/* Where K and V of a history token lie, one head: in a page or among this call's rows. */
static inline void find_key(const struct host_model *model, const struct host_attend *t,
                            uint32_t token, const uint16_t **k, const uint16_t **v)
{
    const struct skv_geometry *g = &model->model.geometry;
    const uint32_t HD = model->width, shift = (uint32_t)__builtin_ctz(g->page_tokens);
    if (token < t->sequence->cached) {
        const uint16_t *page = t->pool + t->sequence->pages[token >> shift] * model->page_values;
        const uint32_t slot = token & (g->page_tokens - 1);
        *k = page + hstu_page_offset(g, t->layer, 0, t->head, slot);
        *v = page + hstu_page_offset(g, t->layer, 1, t->head, slot);
    } else {
        const uint16_t *m = t->m + (size_t)(token - t->sequence->cached) * 4 * HD;
        *k = m + 3 * HD + t->head * g->head_dim;
        *v = m + HD + t->head * g->head_dim;
    }
}

/* Unpacks keys [key0, key0 + keys) of one head: K transposed to key[D / PAIR][64] words, V to
 * value[64 / PAIR][D]. Keys that do not exist are zero; nothing else is read of a page. */
static void load_keys(const struct host_model *model, const struct host_attend *t, uint32_t key0,
                      uint32_t keys, float *key, float *value)
{
    static const uint16_t nothing[256];
    const uint32_t D = model->model.geometry.head_dim;
    const uint16_t *k_at[HOST_COLUMNS], *v_at[HOST_COLUMNS];
    for (uint32_t i = 0; i < HOST_COLUMNS; i++) {
        k_at[i] = v_at[i] = nothing;
        if (i < keys)
            find_key(model, t, key0 + i, &k_at[i], &v_at[i]);
    }
    for (uint32_t i = 0; i < HOST_COLUMNS; i += PAIR)
        for (uint32_t d = 0; d < D; d += LANES)
            v_store(value + (size_t)(i / PAIR) * D + d, v_load_across(v_at + i, d));
    for (uint32_t i = 0; i < HOST_COLUMNS; i += LANES)
        for (uint32_t d = 0; d < D / PAIR; d += LANES) {
            vf square[LANES];
            _Pragma("GCC unroll 16") for (int j = 0; j < LANES; j++)
            {
                square[j] = v_load_words(k_at[i + j] + d * PAIR);
            }
            v_transpose(square);
            _Pragma("GCC unroll 16") for (int j = 0; j < LANES; j++)
            {
                v_store(key + (size_t)(d + j) * HOST_COLUMNS + i, square[j]);
            }
        }
}

/* Keys [key0, key0 + keys) will be unpacked soon. This call's rows lie a row of m apart, which the
 * CPU does not guess. */
static void prefetch_keys(const struct host_model *model, const struct host_attend *t,
                          uint32_t key0, uint32_t keys)
{
    const uint32_t D = model->model.geometry.head_dim;
    for (uint32_t i = 0; i < keys; i++) {
        const uint16_t *k, *v;
        find_key(model, t, key0 + i, &k, &v);
        for (uint32_t d = 0; d < D; d += 32) { /* a cache line */
            __builtin_prefetch(k + d, 0, 2);
            __builtin_prefetch(v + d, 0, 2);
        }
    }
}

/* How many history tokens a row sees. */
static uint32_t row_limit(const struct hstu_sequence *q, uint32_t row)
{
    return row + q->cached < q->history ? row + q->cached + 1 : q->history;
}

/* The part of `limit` that lies in the key block at key0: 0 to 64. */
static uint32_t in_block(uint32_t limit, uint32_t key0)
{
    if (limit <= key0)
        return 0;
    return limit - key0 < HOST_COLUMNS ? limit - key0 : HOST_COLUMNS;
}

/* sum[rows][D] += p V over words [from, to) of the block's keys. */
static void add_values(const float *p, uint32_t rows, const float *value, uint32_t from,
                       uint32_t to, uint32_t D, float *sum)
{
    for (uint32_t d = 0; from < to && d < D; d += HOST_COLUMNS)
        multiply(p + from, HOST_COLUMNS / PAIR, rows, value + (size_t)from * D + d, D, to - from,
                 sum + d, D, true);
}

/* The same of one row and the first half of a word: its other half is masked, in p and in V. */
static void add_half_word(const float *p, const float *value, uint32_t D, float *sum)
{
    const vf left = (vf)((vi)v_splat_word(p) & 0xffff);
    for (uint32_t d = 0; d < D; d += LANES) {
        vf right = (vf)((vi)v_load(value + d) & 0xffff);
        v_store(sum + d, v_mac(left, right, v_load(sum + d)));
    }
}

/* One key block for up to six query rows from `row` on. Rows see ever more keys: what all of them
 * see is added for all at once, the rest row by row. */
static void attend_block(const struct host_model *model, const struct hstu_sequence *q,
                         uint32_t row, uint32_t rows, uint32_t key0, const float *query, float *sum,
                         struct host_scratch *s)
{
    const uint32_t D = model->model.geometry.head_dim, stride = HOST_COLUMNS / PAIR;
    const float alpha = 1.0f / sqrtf((float)D);
    multiply(query, D / PAIR, rows, s->key, HOST_COLUMNS, D / PAIR, s->tile, HOST_COLUMNS, false);
    for (uint32_t i = 0; i < rows * HOST_COLUMNS; i += LANES)
        v_store_operand(s->p, i, v_silu(v_load(s->tile + i) * alpha));

    const uint32_t common = in_block(row_limit(q, row), key0) / PAIR;
    add_values(s->p, rows, s->value, 0, common, D, sum);
    for (uint32_t i = 0; i < rows; i++) {
        const uint32_t seen = in_block(row_limit(q, row + i), key0), whole = seen / PAIR;
        const float *p = s->p + i * stride;
        add_values(p, 1, s->value, common, whole, D, sum + (size_t)i * D);
        if (seen % PAIR)
            add_half_word(p + whole, s->value + (size_t)whole * D, D, sum + (size_t)i * D);
    }
}

/* A candidate's own group, itself included: few keys, straight from this call's rows. */
static void attend_group(const struct host_model *model, const struct host_attend *t, uint32_t row,
                         float *sum)
{
    const uint32_t D = model->model.geometry.head_dim, HD = model->width;
    const uint32_t n = t->sequence->history - t->sequence->cached;
    const float alpha = 1.0f / sqrtf((float)D);
    const uint16_t *query = t->m + (size_t)row * 4 * HD + 2 * HD + t->head * D;
    for (uint32_t j = row - (row - n) % model->model.group; j <= row; j++) {
        const uint16_t *m = t->m + (size_t)j * 4 * HD + t->head * D;
        vf dot = {0};
        for (uint32_t d = 0; d < D; d += LANES)
            dot = v_fma(v_load_bf16(query + d), v_load_bf16(m + 3 * HD + d), dot);
        vf p = v_round(v_silu(v_splat(v_sum(dot) * alpha)));
        for (uint32_t d = 0; d < D; d += LANES)
            v_store(sum + d, v_fma(p, v_load_bf16(m + HD + d), v_load(sum + d)));
    }
}

static void body_attend(const struct host_model *model, const struct host_attend *t,
                        struct host_scratch *s)
{
    const struct hstu_sequence *q = t->sequence;
    const uint32_t D = model->model.geometry.head_dim, HD = model->width;
    const uint32_t n = q->history - q->cached, words = D / PAIR;
    const uint32_t limit = row_limit(q, t->row0 + t->rows - 1);
    const uint16_t *m = t->m + (size_t)t->row0 * 4 * HD + 2 * HD + t->head * D;

    for (uint32_t r = 0; r < t->rows; r++)
        for (uint32_t d = 0; d < words; d += LANES)
            v_store(s->query + (size_t)r * words + d,
                    v_load_words(m + (size_t)r * 4 * HD + d * PAIR));
    memset(s->sum, 0, (size_t)t->rows * D * sizeof *s->sum);

    for (uint32_t key0 = 0; key0 < limit; key0 += HOST_COLUMNS) {
        load_keys(model, t, key0, in_block(limit, key0), s->key, s->value);
        prefetch_keys(model, t, key0 + HOST_COLUMNS, in_block(limit, key0 + HOST_COLUMNS));
        for (uint32_t r = 0; r < t->rows; r += HOST_TILE_ROWS) {
            const uint32_t count = tile_rows(t->rows, r);
            if (row_limit(q, t->row0 + r + count - 1) > key0)
                attend_block(model, q, t->row0 + r, count, key0, s->query + (size_t)r * words,
                             s->sum + (size_t)r * D, s);
        }
    }

    for (uint32_t r = 0; r < t->rows; r++) {
        float *sum = s->sum + (size_t)r * D;
        float *o = t->o + (size_t)(t->row0 + r) * HD + t->head * D;
        if (t->row0 + r >= n)
            attend_group(model, t, t->row0 + r, sum);
        for (uint32_t d = 0; d < D; d += LANES)
            v_store(o + d, v_load(sum + d) / (float)model->model.scaling_length);
    }
}

/* ---- the bench's yardstick ---- */

static uint64_t body_peak(uint64_t rounds)
{
    volatile float half = 0.5f; /* so that nothing is known at compile time */
    vf sum[12], a = v_splat(half), b = v_splat(half);
    for (int i = 0; i < 12; i++)
        sum[i] = v_splat((float)i);
    for (uint64_t k = 0; k < rounds; k++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++)
        {
            sum[i] = v_mac(a, b, sum[i]);
        }
    }
    volatile float sink = 0;
    for (int i = 0; i < 12; i++)
        sink += v_sum(sum[i]);
    return rounds * 12 * LANES * 2 * PAIR;
}

const struct host_math MATH = {
    .name = MATH_NAME,
    .pair = PAIR,
    .supported = supported,
    .embed = body_embed,
    .project = body_project,
    .attend = body_attend,
    .output = body_output,
    .head = body_head,
    .peak = body_peak,
};
