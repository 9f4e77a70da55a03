#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdlib.h>

#include "cuda_reference.h"

namespace
{

__device__ float from_bits(uint16_t bits)
{
    return __uint_as_float((uint32_t)bits << 16);
}

__device__ float rounded_if(bool rounded, float x)
{
    return rounded ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

__device__ float silu(float x)
{
    return x / (1.0f + expf(-x));
}

/* One sequence on the device. */
struct span {
    uint32_t first, rows, history, cached;
    const uint32_t *pages;
};

__global__ void embed(span s, const uint32_t *token_row, uint32_t buckets, const uint16_t *table,
                      const uint16_t *position, uint32_t columns, float *x)
{
    uint32_t row = blockIdx.y, e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= columns)
        return;
    uint32_t high = min(s.history, buckets - 1), at = min(row + s.cached, high);
    /* Not fused: the C reference's bits. */
    float value = __fadd_rn(
        __fmul_rn(from_bits(table[(uint64_t)token_row[row] * columns + e]), sqrtf((float)columns)),
        from_bits(position[(uint64_t)at * columns + e]));
    x[(uint64_t)(s.first + row) * columns + e] = rounded_if(true, value);
}

/* Mean and inverse deviation of a row, one thread a row, two passes. */
__global__ void row_statistics(const float *x, uint32_t rows, uint32_t columns, float eps,
                               float2 *out)
{
    uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows)
        return;
    const float *r = x + (uint64_t)row * columns;
    double sum = 0, square = 0;
    for (uint32_t i = 0; i < columns; i++)
        sum += r[i];
    double mean = sum / columns;
    for (uint32_t i = 0; i < columns; i++)
        square += (r[i] - mean) * (r[i] - mean);
    out[row] = make_float2((float)mean, (float)(1.0 / sqrt(square / columns + eps)));
}

/* LN, times u (row stride `u_stride`) where it is given. */
__global__ void normalise(const float *x, const float2 *statistics, uint32_t columns,
                          const uint16_t *weight, const uint16_t *bias, const float *u,
                          uint32_t u_stride, bool rounded, float *out)
{
    uint32_t row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= columns)
        return;
    float2 s = statistics[row];
    uint64_t at = (uint64_t)row * columns + i;
    float value = (x[at] - s.x) * s.y * from_bits(weight[i]) + from_bits(bias[i]);
    if (u)
        value *= u[(uint64_t)row * u_stride + i];
    out[at] = rounded_if(rounded, value);
}

/* out = SiLU(a b + bias), or with `residual` out = a b + residual. */
__global__ void multiply(const float *a, const uint16_t *b, const uint16_t *bias,
                         const float *residual, uint32_t rows, uint32_t n, uint32_t k, bool rounded,
                         float *out)
{
    uint32_t column = blockIdx.x * blockDim.x + threadIdx.x, row0 = blockIdx.y * 4;
    if (column >= n)
        return;
    float sum[4] = {};
    for (uint32_t i = 0; i < k; i++) {
        float w = from_bits(b[(uint64_t)i * n + column]);
        for (int r = 0; r < 4; r++)
            if (row0 + r < rows)
                sum[r] += a[(uint64_t)(row0 + r) * k + i] * w;
    }
    for (int r = 0; r < 4 && row0 + r < rows; r++) {
        uint64_t at = (uint64_t)(row0 + r) * n + column;
        if (residual)
            out[at] = rounded_if(rounded, sum[r] + residual[at]);
        else
            out[at] =
                rounded_if(rounded, silu(rounded_if(rounded, sum[r] + from_bits(bias[column]))));
    }
}

struct keys {
    skv_geometry geometry;
    uint32_t layer, head, group;
    span s;
    const float *m; /* of the sequence's first row */
    const uint16_t *pool;
};

/* K (kv 0) or V (kv 1), element d, of absolute token t. */
__device__ float key_value(const keys &k, uint32_t kv, uint32_t t, uint32_t d)
{
    const uint32_t D = k.geometry.head_dim, S = k.geometry.page_tokens, HD = k.geometry.heads * D;
    if (t >= k.s.cached)
        return k.m[(uint64_t)(t - k.s.cached) * 4 * HD + (kv ? 1 : 3) * HD + k.head * D + d];
    uint64_t at =
        ((((uint64_t)k.s.pages[t / S] * k.geometry.layers + k.layer) * 2 + kv) * k.geometry.heads +
         k.head) *
            S +
        t % S;
    return from_bits(k.pool[at * D + d]);
}

__device__ bool allowed(uint32_t query, uint32_t key, uint32_t history, uint32_t group)
{
    if (query < history)
        return key <= query;
    return key < history || (key <= query && (key - history) / group == (query - history) / group);
}

/* s [rows][key_count]; -inf where not allowed. */
__global__ void scores(keys k, uint32_t key_count, float *s)
{
    uint32_t key = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    const uint32_t D = k.geometry.head_dim, HD = k.geometry.heads * D;
    if (key >= key_count)
        return;
    float sum = 0.0f;
    bool is = allowed(k.s.cached + row, key, k.s.history, k.group);
    for (uint32_t d = 0; is && d < D; d++)
        sum += k.m[(uint64_t)row * 4 * HD + 2 * HD + k.head * D + d] * key_value(k, 0, key, d);
    s[(uint64_t)row * key_count + key] = is ? sum * (1.0f / sqrtf((float)D)) : -INFINITY;
}

__global__ void values(keys k, uint32_t key_count, const float *s, uint32_t scaling_length,
                       bool rounded, float *o, float *magnitude)
{
    uint32_t d = threadIdx.x, row = blockIdx.x;
    const uint32_t D = k.geometry.head_dim;
    float sum = 0.0f, size = 0.0f;
    for (uint32_t key = 0; key < key_count; key++) {
        float x = s[(uint64_t)row * key_count + key];
        if (x == -INFINITY)
            continue;
        float v = key_value(k, 1, key, d);
        sum += rounded_if(rounded, silu(x)) * v;
        size += fabsf(x * v);
    }
    o[(uint64_t)row * k.geometry.heads * D + k.head * D + d] =
        rounded_if(rounded, sum / scaling_length);
    if (magnitude) /* never negative: as integers they compare alike */
        atomicMax(reinterpret_cast<int *>(magnitude), __float_as_int(size));
}

__global__ void widen(const uint16_t *from, uint64_t count, float *to)
{
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        to[i] = from_bits(from[i]);
}

__global__ void fill_random(uint16_t *to, uint64_t count, uint64_t seed, float low, float high)
{
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t x = (i + seed * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 31)) * 0x94d049bb133111ebull;
        float unit = (float)((x ^ (x >> 29)) >> 40 & 0xffffff) * (1.0f / 16777216.0f);
        to[i] = __bfloat16_as_ushort(__float2bfloat16_rn(low + (high - low) * unit));
    }
}

__global__ void flush(const uint4 *from, uint64_t count, uint32_t *sink)
{
    uint32_t seen = 0;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (uint64_t)gridDim.x * blockDim.x)
        seen ^= from[i].x ^ from[i].w;
    if (seen == 0x12345678u && sink)
        *sink = seen;
}

uint32_t rows_of(const hstu_sequence &s)
{
    return s.history - s.cached + s.targets;
}

int status_of(cudaError_t e)
{
    return e == cudaSuccess ? SKV_OK : (e == cudaErrorMemoryAllocation ? SKV_ENOMEM : SKV_EDEVICE);
}

/* The sequences as spans, their pages and token rows in one device array of words. */
struct batch {
    span spans[SKV_MAX_BATCH];
    const uint32_t *token_rows[SKV_MAX_BATCH];
    uint32_t rows;
    uint64_t scores; /* most score elements of a sequence and head */
    uint32_t *words;
};

cudaError_t batch_open(const skv_geometry &g, const hstu_model *model, const hstu_sequence *seqs,
                       uint32_t count, batch *out)
{
    uint64_t words = 0, at = 0;
    for (uint32_t b = 0; b < count; b++)
        words += (seqs[b].cached + g.page_tokens - 1) / g.page_tokens + rows_of(seqs[b]);
    uint32_t *host = (uint32_t *)malloc((words + 1) * 4);
    cudaError_t e = cudaMalloc((void **)&out->words, (words + 1) * 4);
    out->rows = 0;
    out->scores = 1;
    for (uint32_t b = 0; b < count; b++) {
        const hstu_sequence &s = seqs[b];
        out->spans[b] = {out->rows, rows_of(s), s.history, s.cached, out->words + at};
        for (uint32_t i = 0; i < (s.cached + g.page_tokens - 1) / g.page_tokens; i++)
            host[at++] = s.pages[i];
        out->token_rows[b] = out->words + at;
        for (uint32_t i = 0; model && i < rows_of(s); i++)
            host[at++] = hstu_token_row(model, s.tokens[i]);
        out->rows += rows_of(s);
        uint64_t scores = (uint64_t)rows_of(s) * (s.history + s.targets);
        out->scores = scores > out->scores ? scores : out->scores;
    }
    if (e == cudaSuccess)
        e = cudaMemcpy(out->words, host, at * 4, cudaMemcpyHostToDevice);
    free(host);
    return e;
}

void attend(const skv_geometry &g, uint32_t layer, uint32_t group, uint32_t scaling_length,
            const hstu_sequence *seqs, uint32_t count, const batch &b, const float *m,
            const void *pool, bool rounded, float *s, float *o, float *magnitude)
{
    const uint32_t HD = g.heads * g.head_dim;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t key_count = seqs[i].history + seqs[i].targets, rows = b.spans[i].rows;
        for (uint32_t head = 0; rows && head < g.heads; head++) {
            keys k = {g,
                      layer,
                      head,
                      group,
                      b.spans[i],
                      m + (uint64_t)b.spans[i].first * 4 * HD,
                      (const uint16_t *)pool};
            scores<<<dim3((key_count + 127) / 128, rows), 128>>>(k, key_count, s);
            values<<<rows, g.head_dim>>>(k, key_count, s, scaling_length, rounded,
                                         o + (uint64_t)b.spans[i].first * HD, magnitude);
        }
    }
}

} // namespace

int cuda_fill_random(void *memory, uint64_t count, uint64_t seed, float low, float high)
{
    fill_random<<<1024, 256>>>((uint16_t *)memory, count, seed, low, high);
    return status_of(cudaGetLastError());
}

int cuda_flush(const void *memory, uint64_t bytes, void *stream)
{
    flush<<<1024, 256, 0, (cudaStream_t)stream>>>((const uint4 *)memory, bytes / 16, nullptr);
    return status_of(cudaGetLastError());
}

int cuda_reference_attention(const struct skv_geometry *g, uint32_t layer, uint32_t group,
                             uint32_t scaling_length, const struct hstu_sequence *sequences,
                             uint32_t count, const void *m, const void *pool, bool rounded,
                             float *o, float *magnitude)
{
    batch b = {};
    float *wide = nullptr, *s = nullptr;
    uint64_t elements = 0;
    cudaError_t e = batch_open(*g, nullptr, sequences, count, &b);
    elements = (uint64_t)b.rows * 4 * g->heads * g->head_dim;
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&wide, elements * 4 + 4);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&s, b.scores * 4);
    if (e == cudaSuccess) {
        if (elements)
            widen<<<(elements + 255) / 256, 256>>>((const uint16_t *)m, elements, wide);
        attend(*g, layer, group, scaling_length, sequences, count, b, wide, pool, rounded, s, o,
               magnitude);
        e = cudaDeviceSynchronize();
    }
    cudaFree(s);
    cudaFree(wide);
    cudaFree(b.words);
    return status_of(e);
}

/* A layer's weights as they are: the runner's own may have the first norm folded in. */
struct layer_weights {
    uint16_t *ln1_weight, *ln1_bias, *uvqk, *uvqk_bias;
};

static cudaError_t upload(const hstu_model &model, const hstu_layer_weights &from, uint16_t *memory,
                          layer_weights *out)
{
    const uint64_t E = model.embed, N = 4 * model.geometry.heads * model.geometry.head_dim;
    *out = {memory, memory + E, memory + 2 * E, memory + 2 * E + E * N};
    const struct {
        uint16_t *to, *from;
        uint64_t count;
    } parts[] = {{out->ln1_weight, from.ln1_weight, E},
                 {out->ln1_bias, from.ln1_bias, E},
                 {out->uvqk, from.uvqk, E * N},
                 {out->uvqk_bias, from.uvqk_bias, N}};
    cudaError_t e = cudaSuccess;
    for (auto &part : parts)
        if (e == cudaSuccess)
            e = cudaMemcpy(part.to, part.from, part.count * 2, cudaMemcpyHostToDevice);
    return e;
}

int cuda_reference_pass(const struct hstu_cuda *c, const struct hstu_sequence *sequences,
                        uint32_t count, bool rounded, float *block_out, float *magnitude)
{
    const hstu_model &model = c->model;
    const uint32_t E = model.embed, HD = model.geometry.heads * model.geometry.head_dim;
    const uint32_t wide = E > HD ? E : HD;
    batch b = {};
    float *x = nullptr, *normed = nullptr, *m = nullptr, *o = nullptr, *s = nullptr, *top = nullptr;
    float2 *statistics = nullptr;
    uint16_t *weights = nullptr;
    cudaError_t e = batch_open(model.geometry, &model, sequences, count, &b);
    const uint32_t rows = b.rows;
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&x, (uint64_t)rows * E * 4);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&normed, (uint64_t)rows * wide * 4);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&m, (uint64_t)rows * 4 * HD * 4);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&o, (uint64_t)rows * HD * 4);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&s, b.scores * 4);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&statistics, rows * sizeof *statistics);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&weights, ((uint64_t)(E + 1) * 4 * HD + 2 * E) * 2);
    if (e == cudaSuccess)
        e = cudaMalloc((void **)&top, 4);
    if (e == cudaSuccess)
        e = cudaMemset(top, 0, 4);
    for (uint32_t i = 0; e == cudaSuccess && i < count; i++)
        if (b.spans[i].rows)
            embed<<<dim3((E + 127) / 128, b.spans[i].rows), 128>>>(
                b.spans[i], b.token_rows[i], model.position_buckets,
                (const uint16_t *)c->on_device.embedding, (const uint16_t *)c->on_device.position,
                E, x);
    for (uint32_t l = 0; e == cudaSuccess && l < model.geometry.layers; l++) {
        const hstu_cuda_layer &w = c->on_device.layer[l];
        layer_weights own;
        e = upload(model, c->weights->layer[l], weights, &own);
        if (e != cudaSuccess)
            break;
        row_statistics<<<(rows + 31) / 32, 32>>>(x, rows, E, model.eps, statistics);
        normalise<<<dim3((E + 127) / 128, rows), 128>>>(
            x, statistics, E, own.ln1_weight, own.ln1_bias, nullptr, 0, rounded, normed);
        multiply<<<dim3((4 * HD + 127) / 128, (rows + 3) / 4), 128>>>(
            normed, own.uvqk, own.uvqk_bias, nullptr, rows, 4 * HD, E, rounded, m);
        attend(model.geometry, l, model.group, model.scaling_length, sequences, count, b, m,
               c->pool, rounded, s, o, top);
        row_statistics<<<(rows + 31) / 32, 32>>>(o, rows, HD, model.eps, statistics);
        normalise<<<dim3((HD + 127) / 128, rows), 128>>>(
            o, statistics, HD, (const uint16_t *)w.ln2_weight, (const uint16_t *)w.ln2_bias, m,
            4 * HD, rounded, normed);
        multiply<<<dim3((E + 127) / 128, (rows + 3) / 4), 128>>>(
            normed, (const uint16_t *)w.projection, nullptr, x, rows, E, HD, rounded, x);
        e = cudaGetLastError();
    }
    if (e == cudaSuccess)
        e = cudaMemcpy(block_out, x, (uint64_t)rows * E * 4, cudaMemcpyDeviceToHost);
    if (e == cudaSuccess && magnitude)
        e = cudaMemcpy(magnitude, top, 4, cudaMemcpyDeviceToHost);
    cudaFree(weights);
    cudaFree(top);
    cudaFree(statistics);
    cudaFree(s);
    cudaFree(o);
    cudaFree(m);
    cudaFree(normed);
    cudaFree(x);
    cudaFree(b.words);
    return status_of(e);
}
