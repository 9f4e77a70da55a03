/* Inside the host backend: shared by device_host.c and device_host_stream.c. */
#ifndef SKV_DEVICE_HOST_H
#define SKV_DEVICE_HOST_H

#include "device_backend.h"

struct skv_host_device {
    struct skv_device device;
    _Atomic uint64_t delay_ns; /* skv_device_delay: added to everything queued from now on */
    const char *hold; /* for tests, or NULL: a path; no copy or write while there is such a file */
};

int skv_host_stream_open(struct skv_device *device, struct skv_stream **out);
void skv_host_stream_close(struct skv_stream *stream);
int skv_host_stream_copy(struct skv_stream *stream, enum skv_direction direction,
                         const struct skv_copy *copies, uint32_t count);
int skv_host_stream_write32(struct skv_stream *stream, uint32_t *word, uintptr_t on_device,
                            uint32_t value);
int skv_host_stream_mark(struct skv_stream *stream, uint64_t *mark);
int skv_host_stream_query(struct skv_stream *stream, uint64_t mark);
int skv_host_stream_wait(struct skv_stream *stream, uint64_t mark, uint64_t deadline_ns);

#endif
