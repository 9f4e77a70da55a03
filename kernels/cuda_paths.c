#include "cuda_paths.h"

#include <stdlib.h>
#include <string.h>

#include "log.h"

/* Fastest first. sm_90a code runs on 9.0 alone. */
static const struct {
    const struct hstu_attention_path *path;
    int capability_least, capability_most; /* 10 * major + minor */
} paths[] = {
    {&hstu_attention_sm90, 90, 90},
    {&hstu_attention_portable, 80, 999},
};

const struct hstu_attention_path *hstu_attention_choose(int major, int minor)
{
    const char *wanted = getenv("HSTU_KERNELS");
    const int capability = 10 * major + minor;
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        if (wanted && *wanted && strcmp(wanted, paths[i].path->name) != 0)
            continue;
        if (capability >= paths[i].capability_least && capability <= paths[i].capability_most)
            return paths[i].path;
    }
    skv_error("no attention kernel%s%s for compute capability %d.%d", wanted ? " called " : "",
              wanted ? wanted : "", major, minor);
    return NULL;
}

bool hstu_products_fused(const struct hstu_attention_path *path)
{
    const char *products = getenv("HSTU_PRODUCTS");
    return path == &hstu_attention_sm90 && !(products && strcmp(products, "cublaslt") == 0);
}
