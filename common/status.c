#include "sidekv.h"

const char *skv_strerror(int status)
{
    switch (status) {
#define X(name, value, text)                                                                       \
    case name:                                                                                     \
        return text;
        SKV_STATUS_MAP(X)
#undef X
    }
    return "unknown status";
}

int skv_geometry_check(const struct skv_geometry *g)
{
    bool dim = g->head_dim == 64 || g->head_dim == 128 || g->head_dim == 256;
    bool tokens = g->page_tokens == 16 || g->page_tokens == 32 || g->page_tokens == 64 ||
                  g->page_tokens == 128;
    bool counts = g->layers >= 1 && g->layers <= SKV_MAX_LAYERS && g->heads >= 1 && g->heads <= 64;
    return dim && tokens && counts ? SKV_OK : SKV_EINVAL;
}
