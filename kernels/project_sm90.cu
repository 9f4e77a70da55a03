/* The projection on Hopper: x += y P, and with each row of x the moments of its values, which is
 * all that the next layer's norm needs (uvqk_sm90.cu): nothing else reads x between the layers.
 *
 * A tile starts from x: the sums' first value is the residual, which the ring brings like any other
 * stage. It and P are asked for before the kernel ahead has ended.
 *
 * Making y here, from attention's sums and u, was tried and is slower: a tile then takes 64 KiB for
 * 64 columns of k, and a multiprocessor does not get that much in the time of the products.
 *
 * Moves: y once per column block (from L2), P once per row block or cluster, x twice; in the last
 * layer row tiles with candidates alone. */
#include "gemm_sm90.cuh"

namespace
{

/* A stage takes X_COLUMNS columns of x. */
template <int Groups, int Columns, int Stages, int Cluster>
struct projection : shape<Groups, Columns, Stages, Cluster> {
    using base = shape<Groups, Columns, Stages, Cluster>;
    static constexpr int X_COLUMNS =
        base::STAGE_BYTES >= base::ROWS * Columns * 2 ? Columns : Columns / 2;
    static constexpr int X_STEPS = Columns / X_COLUMNS;
    static constexpr int X_BYTES = base::ROWS * X_COLUMNS * 2;
    static_assert(X_BYTES <= base::STAGE_BYTES && X_STEPS < Stages);
};
struct by_256 : projection<2, 256, 4, 2> {
    static constexpr double START = 0.8, ROUND = 12;
};
template <int Groups, int Stages> struct by_128 : projection<Groups, 128, Stages, 1> {
    static constexpr double START = Groups == 3 ? 0.1 : 2.3;
    static constexpr double ROUND = Groups == 3 ? 10 : 5.95;
};
struct by_64 : projection<1, 64, 12, 1> {
    static constexpr double START = 2.5, ROUND = 2.9;
};

/* Calls f with the shape of these tiles. */
template <typename F> auto with_shape(enum hstu_tiles tiles, F f)
{
    switch (tiles) {
    case HSTU_TILES_128X256:
        return f(by_256());
    case HSTU_TILES_192X128:
        return f(by_128<3, 5>());
    case HSTU_TILES_128X128:
        return f(by_128<2, 6>());
    default:
        return f(by_64());
    }
}

struct parameters {
    CUtensorMap y, b, x, out; /* out is x too, in boxes of a warp's staging */
    hstu_moments *moments;
    uint32_t rows, n, k;
    tile_order order;
    uint64_t b_policy;
};

/* ---- producer ---- */

/* x is of the layer before: older than the kernel before. */
template <typename S>
__device__ __forceinline__ void load_x(const parameters &p, const stage_ring<S> &ring,
                                       uint32_t row0, uint32_t column)
{
    for (uint32_t g = 0; g < S::GROUPS; g++)
        sm90::load_box(ring.at() + g * 64 * S::X_COLUMNS * 2, &p.x, row0 + g * 64, column / 64,
                       ring.full(ring.stage), sm90::L2_USUAL);
}

/* ---- consumers ---- */

/* A warpgroup's own barrier. */
__device__ __forceinline__ void sync_group(uint32_t group)
{
    sm90::named_sync(1 + group, 128);
}

template <typename S> struct consumer {
    const parameters &p;
    stage_ring<S> ring;
    uint32_t group, warp, lane; /* warp: in the group */

    __device__ __forceinline__ consumer(const parameters &p_, const stage_ring<S> &ring_,
                                        uint32_t group_)
        : p(p_), ring(ring_), group(group_), warp(threadIdx.x % 128 / 32), lane(threadIdx.x % 32)
    {
    }

    /* d = x, in wgmma's layout. */
    __device__ __forceinline__ void start(float *d)
    {
#pragma unroll
        for (int step = 0; step < S::X_STEPS; step++) {
            sm90::barrier_wait(ring.full(ring.stage), ring.phase);
            const uint32_t x = ring.at() + group * 64 * S::X_COLUMNS * 2 + warp * 16 * 128;
#pragma unroll
            for (int i = 0; i < S::X_COLUMNS / 16; i++) {
                uint32_t word[4];
                mma::load4(word, x + i / 4 * 64 * 128 +
                                     mma::tile_offset<8>(lane % 16, i % 4 * 2 + lane / 16));
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 v = mma::unpack(word[j]);
                    d[(step * S::X_COLUMNS / 16 + i) * 8 + j * 2] = v.x;
                    d[(step * S::X_COLUMNS / 16 + i) * 8 + j * 2 + 1] = v.y;
                }
            }
            /* The loads above have been issued, not done: TMA could be faster than they are. */
            sm90::async_proxy_fence();
            sync_group(group); /* all four warps have read it */
            ring.release(ring.stage);
            ring.advance();
        }
        /* Done before the products: ptxas waits for every one if it finds this among them. */
        sm90::pin<S::COLUMNS / 2>(d);
    }

    /* Sums to bf16 and to memory, and then their rows' moments. */
    __device__ __forceinline__ void end(const float *d, uint32_t row0, uint32_t column0)
    {
        uint32_t word[S::COLUMNS / 4]; /* [i][row] */
        const uint32_t staging = ring.shared + S::STAGING + (group * 4 + warp) * STAGING_BYTES;
#pragma unroll
        for (int i = 0; i < S::COLUMNS / 4; i++)
            word[i] = mma::pack(d[i * 2], d[i * 2 + 1]);
#pragma unroll
        for (int piece = 0; piece < S::PIECES; piece++) {
            stage_piece(staging, piece, word + piece * 4);
            if (piece % 4 == 3)
                store_staged(&p.out, staging, row0 + (group * 4 + warp) * 16,
                             column0 / 64 + piece / 4);
        }
        float mean[2] = {}, square[2] = {};
#pragma unroll
        for (int i = 0; i < S::COLUMNS / 4; i++) {
            const float2 v = mma::unpack(word[i]);
            mean[i % 2] += v.x + v.y;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mean[i] += __shfl_xor_sync(~0u, mean[i], 1);
            mean[i] += __shfl_xor_sync(~0u, mean[i], 2);
            mean[i] /= S::COLUMNS;
        }
#pragma unroll
        for (int i = 0; i < S::COLUMNS / 4; i++) {
            const float2 v = mma::unpack(word[i]);
            const float x = v.x - mean[i % 2], y = v.y - mean[i % 2];
            square[i % 2] = fmaf(x, x, fmaf(y, y, square[i % 2]));
        }
        const uint32_t row = row0 + (group * 4 + warp) * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            square[i] += __shfl_xor_sync(~0u, square[i], 1);
            square[i] += __shfl_xor_sync(~0u, square[i], 2);
            if (lane % 4 == 0 && row + i * 8 < p.rows)
                p.moments[(uint64_t)(column0 / S::COLUMNS) * p.rows + row + i * 8] = {mean[i],
                                                                                      square[i]};
        }
    }

    __device__ __forceinline__ void run()
    {
        schedule<S> tiles(p.rows, p.order);
        const uint32_t steps = p.k / S::DEPTH;
        uint32_t row0, column0;
        float d[S::COLUMNS / 2];
        mma::dependency_wait(); /* nothing of ours is written before */
        while (tiles.take(&row0, &column0)) {
            start(d);
#pragma unroll 1
            for (uint32_t step = 0; step < steps; step++) {
                multiply_stage<S>(d, ring, group, true);
                release_before<S>(ring, step > 0);
            }
            sm90::wgmma_wait();
            sm90::pin<S::COLUMNS / 2>(d);
            ring.release(ring.before());
            end(d, row0, column0);
        }
    }
};

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1)
    project_kernel(const __grid_constant__ parameters p)
{
    extern __shared__ char memory[];
    run_block<S>(
        shared_base(memory),
        [&](stage_ring<S> ring) {
            if (threadIdx.x == 0)
                produce<S, S::X_STEPS>(
                    p, &p.y, ring,
                    [&](stage_ring<S> &ring, uint32_t row0, uint32_t column0, uint32_t i) {
                        ring.announce(S::X_BYTES);
                        load_x<S>(p, ring, row0, column0 + i * S::X_COLUMNS);
                    });
        },
        [&](stage_ring<S> ring, uint32_t group) {
            consumer<S> consumer(p, ring, group);
            consumer.run();
        });
}

/* ---- host ---- */

template <typename S> int launch(const struct hstu_project_args *args, cudaStream_t stream)
{
    const uint32_t k = args->k, n = args->n, rows = args->rows;
    parameters p = {};
    int status = encode(&p.y, args->y, rows, k, S::ROWS, 1);
    if (status == SKV_OK)
        status = encode(&p.b, args->b, k, n, S::DEPTH, S::CHUNKS / S::CLUSTER);
    if (status == SKV_OK)
        status = encode(&p.x, args->x, rows, n, 64, S::X_COLUMNS / 64);
    if (status == SKV_OK)
        status = encode(&p.out, args->x, rows, n, 16, 1);
    if (status != SKV_OK)
        return status;
    p.moments = args->moments;
    p.rows = rows;
    p.n = n;
    p.k = k;
    p.b_policy = args->spares_l2 ? sm90::L2_FIRST_OUT : sm90::L2_USUAL;
    p.order.columns = n;
    p.order.wanted = args->wanted;
    p.order.part = UINT32_MAX; /* all columns are alike */
    return launch_tiles<S>(project_kernel<S>, p, args->sm_count, S::SHARED, args->early, stream);
}

template <typename S> double cost(const struct hstu_project_args *args, bool listed)
{
    const uint32_t rows = listed ? wanted_rows<S>(args->rows) : args->rows;
    return estimate<S>(tiles_of<S>(rows, args->n), args->n, args->k, args->sm_count);
}

struct choice choose(const struct hstu_project_args *args)
{
    return choose_tiles(args->tiles, HSTU_TILES_128X256, HSTU_TILES_64X64, args->wanted,
                        [&](enum hstu_tiles tiles, bool listed) {
                            return with_shape(tiles, [&](auto shape) {
                                return cost<decltype(shape)>(args, listed);
                            });
                        });
}

} // namespace

uint32_t hstu_project_sm90_parts(const struct hstu_project_args *args)
{
    return with_shape(choose(args).tiles, [&](auto shape) { return args->n / shape.COLUMNS; });
}

uint32_t hstu_project_sm90_listed_rows(const struct hstu_project_args *args)
{
    const struct choice choice = choose(args);
    return choice.listed ? with_shape(choice.tiles, [](auto shape) { return shape.ROWS; }) : 0;
}

int hstu_launch_project_sm90(const struct hstu_project_args *args, void *stream)
{
    const struct choice choice = choose(args);
    return with_shape(choice.tiles, [&](auto shape) {
        using S = decltype(shape);
        return choice.listed ? launch<listed<S>>(args, (cudaStream_t)stream)
                             : launch<S>(args, (cudaStream_t)stream);
    });
}
