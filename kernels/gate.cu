/* The gate before the projection, y = u * LN(sum of slices / N): struct hstu_gate_args of
 * cuda_kernels.h. Teams of threads take row after row; statistics are fp32, two passes over
 * registers.
 *
 * Bound by memory: reads 2 bytes of u and 4 a slice of each value (2 where sums are rounded),
 * writes 2. */
#include "rows.cuh"

#include "sm90_ptx.cuh"

namespace
{

/* u is older than the kernel before, and is read before that one has ended: past the L1, which
 * nothing has emptied for certain. It leaves the L2 first, as nobody reads it again (by __ldcg(),
 * as slices are read, the pass takes 0.3 to 0.6 % longer). */
__device__ __forceinline__ uint4 load_u(const uint4 *from)
{
    uint4 v;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.relaxed.gpu.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from), "l"(sm90::L2_FIRST_OUT)
                 : "memory");
#else /* no kernel starts early */
    v = __ldcs(from);
#endif
    return v;
}

/* A team: THREADS threads, each with CHUNKS chunks of eight columns of a row, THREADS chunks apart.
 * SLICES of a row are on their way at once. MANY: a team has more rows than one, and the next one's
 * first slices and u are on their way while one is computed. */
template <int THREADS, int CHUNKS, int SLICES, bool MANY> struct gate_team {
    /* Where a thread has one chunk there is room for the norm's weights too. */
    static constexpr bool NORM_AHEAD = CHUNKS == 1;
    static constexpr int PARTS = THREADS / 32;

    const hstu_gate_args &a;
    const uint32_t chunks; /* of a row */
    float *shared;         /* [2][PARTS] */
    uint32_t turn;         /* which half of it is next */
    uint4 gate[CHUNKS], sums[SLICES][CHUNKS][2], weight[CHUNKS], bias[CHUNKS];

    __device__ __forceinline__ gate_team(const hstu_gate_args &a_, float *shared_)
        : a(a_), chunks(a_.columns / 8), shared(shared_), turn(0)
    {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            if (NORM_AHEAD && in(i))
                ask_norm(i);
    }

    __device__ __forceinline__ uint32_t at(int i) const
    {
        return i * THREADS + threadIdx.x;
    }
    __device__ __forceinline__ bool in(int i) const
    {
        return at(i) < chunks;
    }
    __device__ __forceinline__ uint32_t slices_of(uint32_t row) const
    {
        return row < a.rows ? __ldcg(a.slices + row) : 0;
    }
    /* Sums of one slice may come as bf16, in the first half of their place. */
    __device__ __forceinline__ bool is_rounded(uint32_t slices) const
    {
        return a.rounded && slices == 1;
    }

    __device__ __forceinline__ void ask_norm(int i)
    {
        weight[i] = __ldg(static_cast<const uint4 *>(a.weight) + at(i));
        bias[i] = __ldg(static_cast<const uint4 *>(a.bias) + at(i));
    }
    __device__ __forceinline__ void ask_gate(uint32_t row, uint32_t slices)
    {
        const uint4 *u = static_cast<const uint4 *>(a.m) + (uint64_t)row * chunks * 4;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            gate[i] = slices > 0 && in(i) ? load_u(u + at(i)) : uint4{};
    }
    /* Slices [from, from + SLICES) of the row, as far as it has them. */
    __device__ __forceinline__ void ask_sums(uint32_t row, uint32_t from, uint32_t slices)
    {
        const bool rounded = is_rounded(slices);
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
            const uint4 *o = reinterpret_cast<const uint4 *>(a.partial) +
                             ((uint64_t)(from + s) * a.rows + row) * chunks * 2;
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const bool any = from + s < slices && in(i);
                sums[s][i][0] = any ? __ldcs(o + (rounded ? at(i) : at(i) * 2)) : uint4{};
                sums[s][i][1] = any && !rounded ? __ldcs(o + at(i) * 2 + 1) : uint4{};
            }
        }
    }
    /* What ask_sums() asked for; in the order of slices, always: the same bits whoever computed
     * them. */
    __device__ __forceinline__ void add_sums(eight (&e)[CHUNKS], uint32_t from, uint32_t slices)
    {
#pragma unroll
        for (int s = 0; s < SLICES; s++)
#pragma unroll
            for (int i = 0; i < CHUNKS; i++)
                if (from + s < slices) {
                    const uint4 &low = sums[s][i][0], &high = sums[s][i][1];
                    const uint32_t word[8] = {low.x,  low.y,  low.z,  low.w,
                                              high.x, high.y, high.z, high.w};
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        e[i].v[k] += __uint_as_float(word[k]);
                }
    }

    /* The sum over the team's threads; each gets it. */
    __device__ __forceinline__ float sum(float x)
    {
        x = warp_sum(x);
        if (PARTS == 1)
            return x;
        float *part = shared + turn * PARTS;
        turn ^= 1; /* who writes there again knows that all have read it */
        if (threadIdx.x % 32 == 0)
            part[threadIdx.x / 32] = x;
        asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y), "n"(THREADS) : "memory");
        x = 0.0f;
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            x += part[i];
        return x;
    }

    /* e: the sums of all slices; u: the row's. */
    __device__ __forceinline__ void finish(uint32_t row, eight (&e)[CHUNKS],
                                           const uint4 (&u)[CHUNKS])
    {
        float total = 0.0f, square = 0.0f;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
#pragma unroll
            for (int k = 0; k < 8; k++) {
                e[i].v[k] *= a.inverse_n;
                total += in(i) ? e[i].v[k] : 0.0f;
            }
        const float mean = sum(total) / a.columns;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float d = e[i].v[k] - mean;
                square += in(i) ? d * d : 0.0f;
            }
        const float scale = rsqrtf(sum(square) / a.columns + a.eps);
        uint4 *y = static_cast<uint4 *>(a.y) + (uint64_t)row * chunks;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (!in(i))
                break;
            if (!NORM_AHEAD)
                ask_norm(i);
            const eight w = widen(weight[i]), b = widen(bias[i]), g = widen(u[i]);
#pragma unroll
            for (int k = 0; k < 8; k++)
                e[i].v[k] = ((e[i].v[k] - mean) * scale * w.v[k] + b.v[k]) * g.v[k];
            y[at(i)] = narrow(e[i]);
        }
    }

    /* Rows row, row + step, ... ; unless MANY only the first. */
    __device__ __forceinline__ void run(uint32_t row, uint32_t step)
    {
        uint32_t slices = slices_of(row), slices_after = slices_of(row + step);
        ask_gate(row, slices); /* u is older than the kernel before */
        mma::dependency_wait();
        mma::dependency_trigger(); /* the projection fetches weights meanwhile */
        ask_sums(row, 0, slices);
#pragma unroll 1
        for (; row < a.rows; row += step) {
            const uint32_t count = slices; /* 0: nothing to do */
            eight e[CHUNKS];
            uint4 u[CHUNKS];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                e[i] = is_rounded(count) ? widen(sums[0][i][0]) : eight{};
                u[i] = gate[i];
            }
            if (!is_rounded(count))
                add_sums(e, 0, count);
#pragma unroll 1
            for (uint32_t from = SLICES; from < count; from += SLICES) {
                ask_sums(row, from, count);
                add_sums(e, from, count);
            }
            slices = slices_after;
            slices_after = slices_of(row + 2 * step);
            if (MANY) {
                ask_gate(row + step, slices);
                ask_sums(row + step, 0, slices);
            }
            if (count > 0)
                finish(row, e, u);
            if (!MANY)
                return;
        }
    }
};

/* Named barriers are the teams', from 0 on: no __syncthreads() here. */
template <int THREADS, int CHUNKS, int SLICES, int TEAMS, bool MANY>
__global__ void __launch_bounds__(THREADS *TEAMS, 1)
    gate_kernel(const __grid_constant__ hstu_gate_args a)
{
    static_assert(TEAMS <= 16, "there are so many named barriers");
    __shared__ float shared[TEAMS][2 * THREADS / 32];
    gate_team<THREADS, CHUNKS, SLICES, MANY> team(a, shared[threadIdx.y]);
    if (MANY)
        team.run(threadIdx.y * gridDim.x + blockIdx.x, gridDim.x * TEAMS);
    else
        team.run(blockIdx.x * blockDim.y + threadIdx.y, a.rows);
}

/* At most `TEAMS` rows a multiprocessor, a team each: no more blocks than multiprocessors, all
 * alike, so that those that come free first get no more than the others. */
template <int THREADS, int CHUNKS, int SLICES, int TEAMS>
int launch_few(const struct hstu_gate_args *args, uint32_t rows_each, void *stream)
{
    return launch(gate_kernel<THREADS, CHUNKS, SLICES, TEAMS, false>,
                  (args->rows + rows_each - 1) / rows_each, dim3(THREADS, rows_each), *args,
                  args->early, stream);
}

template <int THREADS, int CHUNKS, int TEAMS>
int launch_many(const struct hstu_gate_args *args, void *stream)
{
    return launch(gate_kernel<THREADS, CHUNKS, 1, TEAMS, true>, args->sm_count,
                  dim3(THREADS, TEAMS), *args, args->early, stream);
}

} // namespace

int hstu_launch_gate(const struct hstu_gate_args *args, void *stream)
{
    const uint32_t chunks = args->columns / 8;
    const uint32_t each = (args->rows + args->sm_count - 1) / args->sm_count;
    if (chunks <= 32) /* a warp a row waits for no other */
        return each <= 16 ? launch_few<32, 1, 4, 16>(args, each, stream)
                          : launch_many<32, 1, 16>(args, stream);
    if (chunks <= 128)
        return each <= 5    ? launch_few<128, 1, 8, 5>(args, each, stream)
               : each <= 8  ? launch_few<128, 1, 4, 8>(args, each, stream)
               : each <= 16 ? launch_few<64, 2, 1, 16>(args, each, stream)
                            : launch_many<64, 2, 12>(args, stream);
    if (chunks <= 256)
        return each <= 4 ? launch_few<128, 2, 4, 4>(args, each, stream)
                         : launch_many<128, 2, 6>(args, stream);
    if (chunks <= 512)
        return each <= 2 ? launch_few<256, 2, 4, 2>(args, each, stream)
                         : launch_many<256, 2, 3>(args, stream);
    return launch_many<256, 8, 1>(args, stream);
}
