/* Streams, seen from outside: arguments are checked here, work is the backend's. */
#include "device.h"

#include <unistd.h>

#include "clock.h"
#include "device_backend.h"
#include "log.h"

int skv_stream_open(struct skv_device *device, struct skv_stream **out)
{
    if (!device || !out)
        return SKV_EINVAL;
    struct skv_stream *stream;
    int status = device->backend->stream_open(device, &stream);
    if (status)
        return status;
    stream->device = device;
    stream->pid = getpid();
    atomic_fetch_add(&device->children, 1);
    *out = stream;
    return 0;
}

void skv_stream_close(struct skv_stream *stream)
{
    if (!stream || stream->pid != getpid())
        return; /* a forked child's copy: see device_backend.h */
    struct skv_device *device = stream->device;
    device->backend->stream_close(stream);
    atomic_fetch_sub(&device->children, 1);
}

int skv_stream_copy(struct skv_stream *stream, enum skv_direction direction,
                    const struct skv_copy *copies, uint32_t count)
{
    if (!stream || (!copies && count) || (direction != SKV_TO_DEVICE && direction != SKV_TO_HOST))
        return SKV_EINVAL;
    if (count == 0)
        return 0;
    int status = skv_copies_check(stream->device, direction, copies, count);
    if (status)
        return status;
    return stream->device->backend->stream_copy(stream, direction, copies, count);
}

int skv_stream_write32(struct skv_stream *stream, uint32_t *word, uint32_t value)
{
    uintptr_t on_device;
    if (!stream || !word || (uintptr_t)word % sizeof *word)
        return SKV_EINVAL;
    int status = skv_region_address(stream->device, word, sizeof *word, true, &on_device);
    if (status) {
        skv_error("a write to %p is refused: not in memory registered for writing", (void *)word);
        return status;
    }
    return stream->device->backend->stream_write32(stream, word, on_device, value);
}

int skv_stream_mark(struct skv_stream *stream, uint64_t *mark)
{
    if (!stream || !mark)
        return SKV_EINVAL;
    return stream->device->backend->stream_mark(stream, mark);
}

int skv_stream_query(struct skv_stream *stream, uint64_t mark)
{
    if (!stream)
        return SKV_EINVAL;
    return stream->device->backend->stream_query(stream, mark);
}

int skv_stream_wait(struct skv_stream *stream, uint64_t mark, uint32_t timeout_ms)
{
    if (!stream)
        return SKV_EINVAL;
    uint64_t deadline_ns = skv_now_ns() + timeout_ms * UINT64_C(1000000);
    return stream->device->backend->stream_wait(stream, mark, deadline_ns);
}
