/* What the producers and the consumers of an attention block share (attention_sm90.cu): what lies
 * in shared memory behind the slots, and where in the ring of slots somebody is. */
#ifndef HSTU_ATTENTION_SM90_RING_CUH
#define HSTU_ATTENTION_SM90_RING_CUH

#include "attention_sm90_item.cuh"

namespace sm90
{

/* In shared memory, behind Q and the ring. */
template <int D> struct control {
    uint64_t full[config<D>::SLOTS];  /* producers' TMA -> consumers of this block */
    uint64_t empty[config<D>::SLOTS]; /* consumer warps of both blocks -> next use's producer */
    uint64_t q_full[WARPGROUPS];      /* TMA -> that warpgroup */
    uint64_t q_empty[WARPGROUPS];     /* its warps -> first producer of V */
    uint64_t item_full[2];            /* first producer -> consumer warps, other producers */
    uint64_t item_empty[2];           /* they -> first producer */
    struct item item[2];
};

template <int D> constexpr uint32_t shared_bytes()
{
    /* The base is aligned by hand: nobody promises dynamic shared memory 1 KiB. */
    return 1024 + WARPGROUPS * config<D>::Q_BYTES + config<D>::SLOTS * config<D>::SLOT_BYTES +
           sizeof(struct control<D>);
}
static_assert(shared_bytes<256>() <= SHARED_MAX && shared_bytes<128>() <= SHARED_MAX &&
              shared_bytes<64>() <= SHARED_MAX);

/* Where in the ring: slot, and the parity of its use. */
template <int D> struct cursor {
    uint32_t slot, parity;
    __device__ __forceinline__ void advance(uint32_t count)
    {
        slot += count;
        if (slot >= config<D>::SLOTS) {
            slot -= config<D>::SLOTS;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ cursor at(uint32_t count) const
    {
        cursor r = *this;
        r.advance(count);
        return r;
    }
};

/* Shared addresses. */
template <int D> struct layout {
    uint32_t q, slots;
    struct control<D> *control;

    /* Part `part` of what begins with the slot at the cursor. */
    __device__ __forceinline__ uint32_t part(const struct cursor<D> &from, uint32_t part) const
    {
        constexpr int PARTS = config<D>::PARTS;
        return slots + from.at(part / PARTS).slot * config<D>::SLOT_BYTES +
               part % PARTS * PART_BYTES;
    }
    __device__ __forceinline__ uint32_t full(uint32_t i) const
    {
        return shared_address(&control->full[i]);
    }
    __device__ __forceinline__ uint32_t empty(uint32_t i) const
    {
        return shared_address(&control->empty[i]);
    }
};

} // namespace sm90

#endif
