// The feed-forward part of a block: a mixture of experts (model/moe.py's MoE), or a plain SwiGLU, which is a mixture that
// has shared experts only. Only weights of chosen experts are touched; rows of one expert meet its weights together.
#pragma once

#include <cstdint>

#include "pool.h"
#include "router.h"

namespace slingshot {

// Gate and up are packed as one matrix in which their blocks of 16 outputs alternate; outputs beyond the inner width are
// zeros up to a multiple of 32. A part that the model lacks has inner width 0.
struct MoeWeights {
    int width, inner, shared_inner;
    Router router;
    Stack gate_up, down;
    Packed shared_gate_up, shared_down;
};

constexpr int padded_inner(int inner) { return (inner + 31) / 32 * 32; }

namespace LEVEL {

// The working memory of a call, which all threads share.
template <class T> size_t moe_bytes(const MoeWeights& weights, int tokens, int threads);

// residual [tokens, width] += what the experts make of x [tokens, width]. routed, unless null, gets the experts chosen,
// rows `routed_stride` apart. All threads call it; they have met before and meet again before residual is read.
template <class T>
void moe(const MoeWeights& weights, const T* x, int tokens, T* residual, int16_t* routed, int routed_stride, void* memory,
         const Team& team);

}  // namespace LEVEL
}  // namespace slingshot
