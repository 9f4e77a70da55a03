#include "cuda_gemm.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_gemm_table.h"
#include "log.h"

/* Every function of the library that is used. */
#define CUBLASLT_MAP(X)                                                                            \
    X(cublasLtCreate)                                                                              \
    X(cublasLtDestroy)                                                                             \
    X(cublasLtGetVersion)                                                                          \
    X(cublasLtGetStatusString)                                                                     \
    X(cublasLtMatmulDescCreate)                                                                    \
    X(cublasLtMatmulDescDestroy)                                                                   \
    X(cublasLtMatmulDescSetAttribute)                                                              \
    X(cublasLtMatrixLayoutCreate)                                                                  \
    X(cublasLtMatrixLayoutDestroy)                                                                 \
    X(cublasLtMatmulPreferenceCreate)                                                              \
    X(cublasLtMatmulPreferenceDestroy)                                                             \
    X(cublasLtMatmulPreferenceSetAttribute)                                                        \
    X(cublasLtMatmulAlgoGetHeuristic)                                                              \
    X(cublasLtMatmul)

struct hstu_gemm {
#define X(name) __typeof__(&name) name;
    CUBLASLT_MAP(X)
#undef X
    void *library; /* NULL: mma.sync */
    cublasLtHandle_t handle;
    void *workspace;
    uint64_t workspace_bytes;
    char name[32];
};

struct hstu_gemm_plan {
    const struct hstu_gemm *gemm;
    enum hstu_product product;
    uint32_t rows, n, k;
    cublasLtMatmulDesc_t desc; /* NULL: mma.sync */
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};

/* ---- the library ---- */

static const char *const library_places[] = {
    "libcublasLt.so.13",
    "/usr/local/cuda/lib64/libcublasLt.so.13",
    "/opt/torch/.venv/lib/python3*/site-packages/nvidia/cu13/lib/libcublasLt.so.13",
    "/opt/torch/.venv/lib/python3*/site-packages/nvidia/cublas/lib/libcublasLt.so.13",
};

static void *open_at(const char *place)
{
    if (!strchr(place, '*'))
        return dlopen(place, RTLD_NOW | RTLD_LOCAL);
    glob_t found;
    void *library = NULL;
    if (glob(place, 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc && !library; i++)
            library = dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_LOCAL);
    globfree(&found);
    return library;
}

static void *library_open(void)
{
    const char *wanted = getenv("HSTU_CUBLASLT");
    if (wanted && strcmp(wanted, "none") == 0)
        return NULL;
    if (wanted) {
        void *library = dlopen(wanted, RTLD_NOW | RTLD_LOCAL);
        if (!library)
            skv_error("HSTU_CUBLASLT: %s", dlerror());
        return library;
    }
    for (size_t i = 0; i < sizeof library_places / sizeof *library_places; i++) {
        void *library = open_at(library_places[i]);
        if (library)
            return library;
    }
    skv_warn("no libcublasLt.so.13 (set HSTU_CUBLASLT): matrix products will be slower");
    return NULL;
}

static bool library_resolve(struct hstu_gemm *g)
{
#define X(symbol)                                                                                  \
    g->symbol = (__typeof__(&symbol))dlsym(g->library, #symbol);                                   \
    if (!g->symbol) {                                                                              \
        skv_error("libcublasLt has no " #symbol);                                                  \
        return false;                                                                              \
    }
    CUBLASLT_MAP(X)
#undef X
    return true;
}

int hstu_gemm_open(void *workspace, uint64_t workspace_bytes, struct hstu_gemm **out)
{
    struct hstu_gemm *g = calloc(1, sizeof *g);
    if (!g)
        return SKV_ENOMEM;
    g->workspace = workspace;
    g->workspace_bytes = workspace_bytes;
    snprintf(g->name, sizeof g->name, "mma.sync");
    g->library = library_open();
    if (g->library) {
        cublasStatus_t status = CUBLAS_STATUS_NOT_INITIALIZED;
        if (!library_resolve(g) || (status = g->cublasLtCreate(&g->handle)) != 0) {
            skv_warn("cuBLASLt does not start (status %d): matrix products will be slower", status);
            dlclose(g->library);
            g->library = NULL;
        } else {
            size_t version = g->cublasLtGetVersion();
            snprintf(g->name, sizeof g->name, "cuBLASLt %zu.%zu.%zu", version / 10000,
                     version / 100 % 100, version % 100);
        }
    }
    *out = g;
    return SKV_OK;
}

void hstu_gemm_close(struct hstu_gemm *g)
{
    if (!g)
        return;
    if (g->library) {
        g->cublasLtDestroy(g->handle);
        dlclose(g->library);
    }
    free(g);
}

const char *hstu_gemm_name(const struct hstu_gemm *gemm)
{
    return gemm->name;
}

size_t hstu_gemm_version(const struct hstu_gemm *gemm)
{
    return gemm->library ? gemm->cublasLtGetVersion() : 0;
}

/* ---- plans ---- */

static int failed(const struct hstu_gemm *g, const char *what, cublasStatus_t status)
{
    skv_error("cuBLASLt, %s: %s", what, g->cublasLtGetStatusString(status));
    return SKV_EDEVICE;
}

void hstu_gemm_plan_close(struct hstu_gemm_plan *p)
{
    if (!p)
        return;
    const struct hstu_gemm *g = p->gemm;
    if (p->a)
        g->cublasLtMatrixLayoutDestroy(p->a);
    if (p->b)
        g->cublasLtMatrixLayoutDestroy(p->b);
    if (p->c)
        g->cublasLtMatrixLayoutDestroy(p->c);
    if (p->desc)
        g->cublasLtMatmulDescDestroy(p->desc);
    free(p);
}

/* cuBLASLt thinks in columns: a row-major [rows][n] is its n x rows with leading dimension n, so
 * the product is asked for transposed, out' = b' a', and the bias runs along its first dimension.
 */
static cublasStatus_t describe(const struct hstu_gemm *g, struct hstu_gemm_plan *p)
{
    const cudaDataType_t bf16 = CUDA_R_16BF;
    const cublasLtEpilogue_t bias = CUBLASLT_EPILOGUE_BIAS;
    cublasStatus_t status;
    if ((status = g->cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F)) != 0)
        return status;
    if (p->product == HSTU_PRODUCT_BIAS) {
        status = g->cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &bias,
                                                   sizeof bias);
        if (status == 0)
            status = g->cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                                                       &bf16, sizeof bf16);
        if (status != 0)
            return status;
    }
    if ((status = g->cublasLtMatrixLayoutCreate(&p->a, bf16, p->n, p->k, p->n)) != 0 ||
        (status = g->cublasLtMatrixLayoutCreate(&p->b, bf16, p->k, p->rows, p->k)) != 0)
        return status;
    return g->cublasLtMatrixLayoutCreate(&p->c, bf16, p->n, p->rows, p->n);
}

/* The first `limit` algorithms of the heuristic. No split of k: its reductions cost a kernel or a
 * memset, and the latter cannot be captured cleanly. */
static cublasStatus_t heuristic(const struct hstu_gemm *g, const struct hstu_gemm_plan *p,
                                cublasLtMatmulHeuristicResult_t *results, int limit, int *count)
{
    cublasLtMatmulPreference_t preference;
    cublasStatus_t status = g->cublasLtMatmulPreferenceCreate(&preference);
    if (status != 0)
        return status;
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE;
    const size_t bytes = g->workspace_bytes;
    status = g->cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions);
    if (status == 0)
        status = g->cublasLtMatmulPreferenceSetAttribute(
            preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    if (status == 0)
        status = g->cublasLtMatmulAlgoGetHeuristic(g->handle, p->desc, p->a, p->b, p->c, p->c,
                                                   preference, limit, results, count);
    g->cublasLtMatmulPreferenceDestroy(preference);
    return status;
}

enum { MAX_CHOICES = 32 };

static int plan_open(struct hstu_gemm *g, enum hstu_product product, uint32_t rows, uint32_t n,
                     uint32_t k, struct hstu_gemm_plan **out)
{
    struct hstu_gemm_plan *p = calloc(1, sizeof *p);
    if (!p)
        return SKV_ENOMEM;
    *p = (struct hstu_gemm_plan){.gemm = g, .product = product, .rows = rows, .n = n, .k = k};
    if (g->library) {
        cublasStatus_t status = describe(g, p);
        if (status != 0) {
            hstu_gemm_plan_close(p);
            return failed(g, "describing a product", status);
        }
    }
    *out = p;
    return SKV_OK;
}

int hstu_gemm_plan_choice(struct hstu_gemm *g, enum hstu_product product, uint32_t rows, uint32_t n,
                          uint32_t k, uint32_t choice, struct hstu_gemm_plan **out)
{
    struct hstu_gemm_plan *p;
    int status = plan_open(g, product, rows, n, k, &p);
    if (status != SKV_OK || !g->library) {
        if (status == SKV_OK)
            *out = p;
        return status;
    }
    cublasLtMatmulHeuristicResult_t results[MAX_CHOICES];
    int count = 0;
    cublasStatus_t found = heuristic(g, p, results, (int)choice + 1, &count);
    if (found != 0 || count <= (int)choice || results[choice].state != 0) {
        hstu_gemm_plan_close(p);
        return found != 0 ? failed(g, "choosing an algorithm", found) : SKV_ENOENT;
    }
    p->algorithm = results[choice].algo;
    *out = p;
    return SKV_OK;
}

int hstu_gemm_plan(struct hstu_gemm *g, enum hstu_product product, uint32_t rows, uint32_t n,
                   uint32_t k, struct hstu_gemm_plan **out)
{
    uint32_t choice = 0;
    const size_t version = hstu_gemm_version(g);
    for (size_t i = 0; i < sizeof gemm_table / sizeof *gemm_table; i++)
        if (version && gemm_table[i].version == version && gemm_table[i].product == (int)product &&
            gemm_table[i].rows == rows && gemm_table[i].n == n && gemm_table[i].k == k)
            choice = gemm_table[i].choice;
    int status = hstu_gemm_plan_choice(g, product, rows, n, k, choice, out);
    return status == SKV_ENOENT ? hstu_gemm_plan_choice(g, product, rows, n, k, 0, out) : status;
}

uint32_t hstu_gemm_choices(struct hstu_gemm *g, enum hstu_product product, uint32_t rows,
                           uint32_t n, uint32_t k, uint32_t limit)
{
    struct hstu_gemm_plan *p;
    cublasLtMatmulHeuristicResult_t results[MAX_CHOICES];
    int count = 1;
    if (plan_open(g, product, rows, n, k, &p) != SKV_OK)
        return 0;
    if (g->library &&
        heuristic(g, p, results, limit < MAX_CHOICES ? (int)limit : MAX_CHOICES, &count) != 0)
        count = 0;
    hstu_gemm_plan_close(p);
    return (uint32_t)count;
}

int hstu_gemm_run(struct hstu_gemm_plan *p, const void *a, const void *b, const void *extra,
                  void *out, void *stream)
{
    const struct hstu_gemm *g = p->gemm;
    if (!p->desc) {
        struct hstu_product_args args = {
            .a = a, .b = b, .extra = extra, .out = out, .rows = p->rows, .n = p->n, .k = p->k};
        return hstu_launch_product(p->product, &args, stream);
    }
    cublasStatus_t status = 0;
    if (p->product == HSTU_PRODUCT_BIAS)
        status = g->cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                   &extra, sizeof extra);
    const float one = 1.0f, beta = p->product == HSTU_PRODUCT_RESIDUAL ? 1.0f : 0.0f;
    if (status == 0)
        status = g->cublasLtMatmul(g->handle, p->desc, &one, b, p->a, a, p->b, &beta, out, p->c,
                                   out, p->c, &p->algorithm, g->workspace, g->workspace_bytes,
                                   (cudaStream_t)stream);
    return status == 0 ? SKV_OK : failed(g, "multiplying", status);
}
