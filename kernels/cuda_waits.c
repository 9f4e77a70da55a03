/* A graph's waits for gates: nodes that read a word of the gate row until it is 1 or more, each
 * behind the one before, so that they run ahead on a branch of their own while the layers compute.
 *
 * They are added when all kernels are there: captured before those, they take the first branch of
 * the graph, and every wait of the kernels, on another one then, costs a little more
 * (docs/benchmarks.md). */
#include "cuda_state.h"

#include <cuda.h>

#include "log.h"

typedef CUresult context_fn(CUcontext *context);
typedef CUresult add_node_fn(CUgraphNode *node, CUgraph graph, const CUgraphNode *dependencies,
                             size_t count, const CUDA_BATCH_MEM_OP_NODE_PARAMS *params);

/* A driver's function, without linking libcuda. */
static void *driver_find(const char *name)
{
    void *found = NULL;
    enum cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSuccess;
    cudaError_t e =
        cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
    if (hstu_cuda_check(e, name) != SKV_OK)
        return NULL;
    if (result != cudaDriverEntryPointSuccess)
        skv_error("the driver has no %s (%d)", name, (int)result);
    return result == cudaDriverEntryPointSuccess ? found : NULL;
}

int hstu_cuda_stands_behind(struct hstu_cuda *c, uint32_t layer, cudaGraphNode_t *behind)
{
    enum cudaStreamCaptureStatus capturing;
    const cudaGraphNode_t *newest = NULL;
    size_t count = 0;
    if (!behind)
        return SKV_OK;
    cudaError_t e =
        cudaStreamGetCaptureInfo(c->stream, &capturing, NULL, NULL, &newest, NULL, &count);
    if (e == cudaSuccess && count != 1)
        e = cudaErrorUnknown;
    if (e == cudaSuccess)
        behind[layer] = newest[0];
    return hstu_cuda_check(e, "asking for the node behind a gate");
}

int hstu_cuda_add_waits(struct hstu_cuda *c, cudaGraph_t graph, const cudaGraphNode_t *behind)
{
    context_fn *context = driver_find("cuCtxGetCurrent");
    add_node_fn *add_node = driver_find("cuGraphAddBatchMemOpNode");
    if (!context || !add_node)
        return SKV_EDEVICE;
    CUstreamBatchMemOpParams open = {
        .waitValue = {.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32,
                      .value = 1,
                      .flags = CU_STREAM_WAIT_VALUE_GEQ},
    };
    CUDA_BATCH_MEM_OP_NODE_PARAMS params = {.count = 1, .paramArray = &open};
    CUresult result = context(&params.ctx);
    cudaGraphNode_t wait = NULL;
    for (uint32_t l = 0; l < c->model.geometry.layers && result == CUDA_SUCCESS; l++) {
        const cudaGraphNode_t before = wait;
        open.waitValue.address = c->gate_address + l * 4;
        result = add_node(&wait, graph, &before, l > 0, &params);
        cudaError_t e = result == CUDA_SUCCESS
                            ? cudaGraphAddDependencies(graph, &wait, &behind[l], NULL, 1)
                            : cudaSuccess;
        if (e != cudaSuccess)
            return hstu_cuda_check(e, "putting a kernel behind a gate");
    }
    if (result == CUDA_SUCCESS)
        return SKV_OK;
    skv_error("adding a gate to a graph: error %d", (int)result);
    return SKV_EDEVICE;
}
