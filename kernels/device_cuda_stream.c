/* Streams of the CUDA backend: non-blocking CUDA streams, so that a framework's default stream
 * never waits for them, nor they for it.
 *
 * Copies go to the driver in batches, which costs half a microsecond a copy instead of several.
 * Marks are events from a ring; one is recorded anew only when MARKS later ones have been made, and
 * a mark that old is answered by the oldest event still its own: late, never early. */
#include "device_cuda.h"

#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "log.h"

#define BATCH    1024u /* copies a driver call; arrays of 24 KiB */
#define MARKS    256u  /* 64 layers of 4 batches in flight */

#define SPIN_NS  UINT64_C(50000) /* a copy of some MiB; then sleep */
#define SLEEP_NS 20000L

struct cuda_stream {
    struct skv_stream stream;
    CUstream queue;
    CUevent events[MARKS]; /* mark m: events[m % MARKS] */
    uint64_t marked;       /* marks made; the first is 1 */
    uint64_t reached;      /* highest mark known to be reached */
    CUdeviceptr dst[BATCH], src[BATCH];
    size_t bytes[BATCH];
};

static struct cuda_stream *cuda_of(struct skv_stream *stream)
{
    return (struct cuda_stream *)stream;
}

static void destroy(struct cuda_stream *cuda)
{
    for (unsigned i = 0; i < MARKS && cuda->events[i]; i++)
        SKV_CUDA(cuEventDestroy, cuda->events[i]);
    if (cuda->queue)
        SKV_CUDA(cuStreamDestroy, cuda->queue);
    free(cuda);
}

int skv_cuda_stream_open(struct skv_device *device, struct skv_stream **out)
{
    struct cuda_stream *cuda = calloc(1, sizeof *cuda);
    if (!cuda)
        return SKV_ENOMEM;
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuStreamCreate, &cuda->queue, CU_STREAM_NON_BLOCKING);
    for (unsigned i = 0; status == 0 && i < MARKS; i++)
        status = SKV_CUDA(cuEventCreate, &cuda->events[i], CU_EVENT_DISABLE_TIMING);
    if (status)
        destroy(cuda);
    else
        *out = &cuda->stream;
    return status;
}

void skv_cuda_stream_close(struct skv_stream *stream)
{
    struct cuda_stream *cuda = cuda_of(stream);
    skv_cuda_enter(stream->device);
    SKV_CUDA(cuStreamSynchronize, cuda->queue);
    destroy(cuda);
}

static int copy_batch(struct cuda_stream *cuda, const struct skv_copy *copies, uint32_t count)
{
    CUmemcpyAttributes in_stream_order = {.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM};
    size_t from_the_first = 0;
    for (uint32_t i = 0; i < count; i++) {
        cuda->dst[i] = (CUdeviceptr)copies[i].dst;
        cuda->src[i] = (CUdeviceptr)copies[i].src;
        cuda->bytes[i] = copies[i].bytes;
    }
    CUresult result = skv_cuda.batch(cuda->dst, cuda->src, cuda->bytes, count, &in_stream_order,
                                     &from_the_first, 1, cuda->queue);
    return skv_cuda_status(result, "cuMemcpyBatchAsync");
}

int skv_cuda_stream_copy(struct skv_stream *stream, enum skv_direction direction,
                         const struct skv_copy *copies, uint32_t count)
{
    (void)direction; /* unified addresses say it */
    struct cuda_stream *cuda = cuda_of(stream);
    int status = skv_cuda_enter(stream->device);
    if (count > 1 && skv_cuda.batch) {
        for (uint32_t i = 0; status == 0 && i < count; i += BATCH)
            status = copy_batch(cuda, copies + i, count - i < BATCH ? count - i : BATCH);
        return status;
    }
    for (uint32_t i = 0; status == 0 && i < count; i++)
        status = SKV_CUDA(cuMemcpyAsync, (CUdeviceptr)copies[i].dst, (CUdeviceptr)copies[i].src,
                          copies[i].bytes, cuda->queue);
    return status;
}

int skv_cuda_stream_write32(struct skv_stream *stream, uint32_t *word, uintptr_t on_device,
                            uint32_t value)
{
    (void)word;
    int status = skv_cuda_enter(stream->device);
    /* The default flag fences: what was copied before is visible to whoever sees the value. */
    return status ? status
                  : SKV_CUDA(cuStreamWriteValue32, cuda_of(stream)->queue, (CUdeviceptr)on_device,
                             value, CU_STREAM_WRITE_VALUE_DEFAULT);
}

int skv_cuda_stream_mark(struct skv_stream *stream, uint64_t *mark)
{
    struct cuda_stream *cuda = cuda_of(stream);
    int status = skv_cuda_enter(stream->device);
    if (status == 0)
        status = SKV_CUDA(cuEventRecord, cuda->events[(cuda->marked + 1) % MARKS], cuda->queue);
    if (status == 0)
        *mark = ++cuda->marked;
    return status;
}

int skv_cuda_stream_query(struct skv_stream *stream, uint64_t mark)
{
    struct cuda_stream *cuda = cuda_of(stream);
    if (mark > cuda->marked)
        return SKV_EINVAL;
    if (mark <= cuda->reached)
        return 0;
    uint64_t oldest = cuda->marked < MARKS ? 1 : cuda->marked - MARKS + 1;
    uint64_t asked = mark > oldest ? mark : oldest;
    int status = skv_cuda_enter(stream->device);
    if (status)
        return status;
    CUresult result = skv_cuda.cuEventQuery(cuda->events[asked % MARKS]);
    if (result == CUDA_ERROR_NOT_READY)
        return SKV_EAGAIN;
    if (result != CUDA_SUCCESS) {
        skv_cuda_failed(result, "cuEventQuery");
        return SKV_EDEVICE;
    }
    cuda->reached = asked;
    return 0;
}

int skv_cuda_stream_wait(struct skv_stream *stream, uint64_t mark, uint64_t deadline_ns)
{
    const struct timespec nap = {.tv_nsec = SLEEP_NS};
    uint64_t spin_until_ns = skv_now_ns() + SPIN_NS;
    for (;;) {
        int status = skv_cuda_stream_query(stream, mark);
        if (status != SKV_EAGAIN)
            return status;
        uint64_t now_ns = skv_now_ns();
        if (now_ns >= deadline_ns)
            return SKV_ETIMEDOUT;
        if (now_ns < spin_until_ns)
            skv_relax();
        else
            nanosleep(&nap, NULL);
    }
}
