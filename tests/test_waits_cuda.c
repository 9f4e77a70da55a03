/* Passes that wait for gates, on CUDA: no layer touches pages before its gate is open, whoever
 * opens it, wherever its wait stands in the graph. */
#include "layers_rig.h"

/* Layer by layer: the slices of the prefix arrive, whole, then the gate opens. What a layer appends
 * before that, to the last of those pages, would be lost. */
static void check_gates(const char *kernels, bool by_stream, uint32_t layers, uint32_t targets)
{
    enum { ARRIVING = 4, PAGES = 5 };
    struct hstu_model model = small_model(64, 32);
    model.geometry.layers = layers;
    struct rig *r = rig_open(model, kernels);
    const struct skv_geometry *g = &r->model.geometry;
    const uint64_t slice = skv_slice_bytes(g), page = skv_page_bytes(g);
    struct hstu_sequence s = sequence(r, 0, 150, 100, targets, true);
    const size_t outputs = targets * model.head_out * sizeof(float);
    float *open = malloc(outputs), *late = malloc(outputs);
    char *staged, *open_pages = malloc(PAGES * page), *late_pages = malloc(PAGES * page);
    struct skv_stream *stream;
    cudaStream_t copies;
    prefill(r, &s);
    cr_assert_eq(hstu_backend_cuda.launch(r->runner, &s, 1, false), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, open, 10000), SKV_OK);
    CUDA(cudaMallocHost((void **)&staged, ARRIVING * page));
    CUDA(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
    cr_assert_eq(skv_stream_open(r->device, &stream), SKV_OK);
    for (uint32_t p = 0; p < ARRIVING; p++)
        memcpy(staged + p * page, r->pool + s.pages[p] * r->page_elements, page);
    for (uint32_t p = 0; p < PAGES; p++)
        CUDA(cudaMemcpy(open_pages + p * page, (char *)r->on_pool + s.pages[p] * page, page,
                        cudaMemcpyDeviceToHost));
    CUDA(cudaMemset(r->on_pool, 0xff, POOL_PAGES * page));
    memset(r->gates, 0, 64);
    CUDA(cudaDeviceSynchronize());
    cr_assert_eq(hstu_backend_cuda.launch(r->runner, &s, 1, true), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, NULL, 30), SKV_ETIMEDOUT);
    for (uint32_t l = 0; l < g->layers; l++) {
        for (uint32_t p = 0; p < ARRIVING; p++)
            CUDA(cudaMemcpyAsync((char *)r->on_pool + s.pages[p] * page + l * slice,
                                 staged + p * page + l * slice, slice, cudaMemcpyHostToDevice,
                                 copies));
        CUDA(cudaStreamSynchronize(copies));
        if (by_stream)
            cr_assert_eq(skv_stream_write32(stream, &r->gates[l], 1), SKV_OK);
        else
            skv_gate_store(&r->gates[l], 1);
        if (l + 1 < g->layers)
            cr_assert_eq(hstu_backend_cuda.wait(r->runner, NULL, 20), SKV_ETIMEDOUT);
    }
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, late, 10000), SKV_OK);
    cr_expect_eq(memcmp(open, late, outputs), 0, "gated or not: the same bits");
    for (uint32_t p = 0; p < PAGES; p++)
        CUDA(cudaMemcpy(late_pages + p * page, (char *)r->on_pool + s.pages[p] * page, page,
                        cudaMemcpyDeviceToHost));
    cr_expect_eq(memcmp(open_pages, late_pages, PAGES * page), 0, "appended after the copies");
    /* Gates that stay open: again, at once. */
    cr_assert_eq(hstu_backend_cuda.launch(r->runner, &s, 1, true), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, late, 10000), SKV_OK);
    cr_expect_eq(memcmp(open, late, outputs), 0);
    skv_stream_close(stream);
    CUDA(cudaStreamDestroy(copies));
    CUDA(cudaFreeHost(staged));
    free(open), free(late), free(open_pages), free(late_pages);
    rig_close(r);
}

Test(waits_cuda, a_gated_pass_waits_for_gates_opened_by_a_plain_store)
{
    NEED_GPU();
    for (int k = 0; k < 2; k++)
        check_gates(both[k], false, 3, 10);
}

Test(waits_cuda, a_gated_pass_waits_for_gates_opened_by_a_stream_write)
{
    NEED_GPU();
    for (int k = 0; k < 2; k++)
        check_gates(both[k], true, 3, 10);
}

/* Where the waits stand depends on these. */
Test(waits_cuda, a_gated_pass_waits_with_few_layers_and_many_and_with_many_rows)
{
    NEED_GPU();
    for (uint32_t layers = 1; layers <= 5; layers += 2)
        for (uint32_t targets = 10; targets <= 4400; targets += 4390)
            check_gates(NULL, false, layers, targets);
}

Test(waits_cuda, a_gated_pass_waits_with_products_by_cublaslt)
{
    NEED_GPU();
    setenv("HSTU_PRODUCTS", "cublaslt", 1);
    check_gates(NULL, false, 3, 10);
}

Test(waits_cuda, a_gated_pass_whose_gates_are_open_has_no_graph_of_its_own)
{
    NEED_GPU();
    struct rig *r = rig_open(small_model(64, 32), NULL);
    struct hstu_sequence s = sequence(r, 0, 150, 96, 10, true);
    struct hstu_footprint footprint;
    prefill(r, &s);
    r->gates[0] = r->gates[1] = 1;
    cr_assert_eq(hstu_backend_cuda.launch(r->runner, &s, 1, true), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, NULL, 10000), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.launch(r->runner, &s, 1, false), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, NULL, 10000), SKV_OK);
    hstu_backend_cuda.footprint(r->runner, &footprint);
    cr_expect_eq(footprint.graphs, 1);
    r->gates[1] = 0; /* the last one alone: it waits */
    cr_assert_eq(hstu_backend_cuda.launch(r->runner, &s, 1, true), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, NULL, 30), SKV_ETIMEDOUT);
    skv_gate_store(&r->gates[1], 1);
    cr_assert_eq(hstu_backend_cuda.wait(r->runner, NULL, 10000), SKV_OK);
    hstu_backend_cuda.footprint(r->runner, &footprint);
    cr_expect_eq(footprint.graphs, 2);
    rig_close(r);
}
