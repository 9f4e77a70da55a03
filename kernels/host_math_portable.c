/* The fast host version for any CPU: the compiler's generic vectors of four, no fused
 * multiply-add. Still one order a sum, so the same promise; other bits than the other two. */
#include "host_math.h"

#define MATH         host_math_portable
#define MATH_NAME    "portable"
#define LANES        4
#define PAIR         1
#define TILE_VECTORS 2

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));

#include "host_vector.h"

static bool supported(void)
{
    return true;
}

static inline vf v_fma(vf a, vf b, vf c)
{
    return a * b + c;
}

static inline vf v_mac(vf a, vf b, vf c)
{
    return v_fma(a, b, c);
}

static inline vh v_narrow(vf v)
{
    return v_narrow_by_adding(v);
}

static inline vf v_split(vf y, vf *n)
{
    const vi low = y<-125.0f, high = y> 125.0f;
    y = (vf)((low & (vi)v_splat(-125.0f)) | (high & (vi)v_splat(125.0f)) | (~(low | high) & (vi)y));
    return v_split_by_adding(y, n);
}

static inline vf v_scale(vf p, vf n)
{
    return v_scale_by_adding(p, n);
}

static inline vf v_reciprocal(vf a)
{
    return 1.0f / a;
}

#include "host_math_body.h"
