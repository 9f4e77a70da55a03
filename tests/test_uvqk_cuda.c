/* UVQK in one kernel (gemm_sm90.cu), both shapes of tiles, against the plain product and the
 * activation pass: m to single flips of bf16's last bit, pages exactly as m, nothing else written.
 */
#include "cuda_bed.h"

static void check_uvqk(uint32_t rows, uint32_t k, struct skv_geometry g, enum hstu_uvqk_shape shape)
{
    const uint32_t n = 4 * g.heads * g.head_dim, pages = rows / g.page_tokens + 2;
    const uint64_t elements = (uint64_t)rows * n, pool_bytes = pages * skv_page_bytes(&g);
    uint32_t *slot = malloc(rows * 4), *sequence = calloc(rows, 4);
    for (uint32_t r = 0; r < rows; r++) /* every third row has none; backwards through the pool */
        slot[r] = r % 3 == 2 ? UINT32_MAX : (pages * g.page_tokens - 1 - r);
    void *a = on_device(NULL, (uint64_t)rows * k * 2), *b = on_device(NULL, (uint64_t)k * n * 2);
    void *bias = on_device(NULL, n * 2), *on_slot = on_device(slot, rows * 4);
    void *on_sequence = on_device(sequence, rows * 4);
    void *m[2], *pool[2];
    uint16_t *host[2], *page[2];
    cuda_fill_random(a, (uint64_t)rows * k, rows, -1.7f, 1.7f);
    cuda_fill_random(b, (uint64_t)k * n, 2, -2.0f / sqrtf((float)k), 2.0f / sqrtf((float)k));
    cuda_fill_random(bias, n, 3, -1, 1);
    for (int i = 0; i < 2; i++) {
        m[i] = on_device(NULL, elements * 2);
        pool[i] = on_device(NULL, pool_bytes);
        host[i] = malloc(elements * 2);
        page[i] = malloc(pool_bytes);
        CUDA(cudaMemset(m[i], 0xff, elements * 2));
        CUDA(cudaMemset(pool[i], 0xff, pool_bytes));
    }
    struct hstu_product_args product = {
        .a = a, .b = b, .extra = bias, .out = m[0], .rows = rows, .n = n, .k = k};
    struct hstu_activate_args activate = {.row_sequence = on_sequence,
                                          .slot = on_slot,
                                          .m = m[0],
                                          .pool = pool[0],
                                          .geometry = g,
                                          .rows = rows,
                                          .layer = g.layers - 1};
    struct hstu_uvqk_args fused = {.a = a,
                                   .b = b,
                                   .bias = bias,
                                   .m = m[1],
                                   .pool = pool[1],
                                   .slot = on_slot,
                                   .geometry = g,
                                   .layer = g.layers - 1,
                                   .rows = rows,
                                   .n = n,
                                   .k = k,
                                   .sm_count = 132,
                                   .shape = shape};
    cr_assert_eq(hstu_launch_product(HSTU_PRODUCT_BIAS, &product, NULL), SKV_OK);
    cr_assert_eq(hstu_launch_activate(&activate, NULL), SKV_OK);
    cr_assert_eq(hstu_launch_uvqk_sm90(&fused, NULL), SKV_OK);
    CUDA(cudaDeviceSynchronize());
    for (int i = 0; i < 2; i++) {
        CUDA(cudaMemcpy(host[i], m[i], elements * 2, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(page[i], pool[i], pool_bytes, cudaMemcpyDeviceToHost));
    }
    uint64_t flips = 0;
    for (uint64_t i = 0; i < elements; i++) {
        float x = bf16_to_float(host[0][i]), y = bf16_to_float(host[1][i]);
        cr_assert(fabsf(x - y) <= 0.0157f * fmaxf(fabsf(x), 0.05f),
                  "shape %d, %u rows, k %u: row %lu column %lu: %f, not %f", shape, rows, k,
                  (unsigned long)(i / n), (unsigned long)(i % n), y, x);
        flips += host[0][i] != host[1][i];
    }
    cr_expect(flips < elements / 50, "%lu of %lu differ", (unsigned long)flips,
              (unsigned long)elements);
    /* The pages hold m's own bits, and nothing else changed. */
    uint64_t written = 0;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; slot[r] != UINT32_MAX && i < 2 * n / 4; i++) {
            uint32_t kv = i / (n / 4), at = i % (n / 4);
            uint64_t to =
                slot[r] / g.page_tokens * (skv_page_bytes(&g) / 2) +
                hstu_page_offset(&g, g.layers - 1, kv, at / g.head_dim, slot[r] % g.page_tokens) +
                at % g.head_dim;
            cr_assert_eq(page[1][to], host[1][(uint64_t)r * n + (kv ? 1 : 3) * (n / 4) + at]);
            written++;
        }
    for (uint64_t i = 0; i < pool_bytes / 2; i++)
        written -= page[1][i] != 0xffff;
    cr_expect_eq(written, 0, "only what has a slot is written");
    for (int i = 0; i < 2; i++) {
        cudaFree(m[i]), cudaFree(pool[i]);
        free(host[i]), free(page[i]);
    }
    cudaFree(a), cudaFree(b), cudaFree(bias), cudaFree(on_slot), cudaFree(on_sequence);
    free(slot), free(sequence);
}

Test(uvqk_cuda, one_kernel_equals_product_and_activation)
{
    NEED_GPU();
    int major = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    if (major != 9)
        cr_skip_test("not a Hopper GPU");
    for (enum hstu_uvqk_shape shape = HSTU_UVQK_LARGE; shape <= HSTU_UVQK_SMALL; shape++) {
        check_uvqk(64, 64, (struct skv_geometry){1, 1, 64, 16}, shape);
        check_uvqk(320, 192, (struct skv_geometry){2, 2, 128, 32}, shape);
        check_uvqk(384, 1024, (struct skv_geometry){1, 4, 256, 32}, shape);
        check_uvqk(2304, 1024, (struct skv_geometry){1, 4, 256, 128}, shape);
        check_uvqk(5120, 512, (struct skv_geometry){2, 4, 128, 64}, shape);
    }
}
