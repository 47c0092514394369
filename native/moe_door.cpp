// Router and experts as Python's tests call them.
#include <cstdlib>

#include "doors.h"
#include "matmul.h"
#include "moe.h"
#include "tiles.h"

namespace slingshot {
namespace LEVEL {
namespace {

// A matrix [n, k] as memory that the caller frees; with step 2 it leaves every other block to `second`.
template <class T> Packed packed(const T* w, const T* second, int n, int k, int padded, int count, size_t* bytes) {
    const int matrices = second ? 2 : 1;
    const size_t block = static_cast<size_t>(packed_depth<T>(k)) * 64;
    *bytes = static_cast<size_t>(padded) / 16 * matrices * block;
    char* data = static_cast<char*>(std::aligned_alloc(64, *bytes * count + 4096));
    std::memset(data, 0, *bytes * count + 4096);
    for (int e = 0; e < count; e++) {
        const size_t offset = static_cast<size_t>(e) * matrices * n * k;
        pack<T, T>(w + offset, k, 1, n, k, 0, (n + 15) / 16, matrices, data + e * *bytes);
        if (second) pack<T, T>(second + offset, k, 1, n, k, 0, (n + 15) / 16, 2, data + e * *bytes + block);
    }
    return {second ? 2 * padded : n, k, packed_depth<T>(k), data};
}

template <class T>
void run(const MoeWeights& shape, const float* router, const T* gate_up, const T* down, const T* shared_gate_up,
         const T* shared_down, const T* x, int tokens, T* residual, int16_t* routed, int threads) {
    MoeWeights w = shape;
    size_t bytes;
    const int width = w.width, inner = w.inner, shared = w.shared_inner, experts = inner ? w.router.experts : 0;
    if (inner) {
        w.router.weights = packed<float>(router, nullptr, experts, width, (experts + 15) / 16 * 16, 1, &bytes);
        w.gate_up.first = packed<T>(gate_up, gate_up + static_cast<size_t>(inner) * width, inner, width,
                                    padded_inner(inner), experts, &w.gate_up.bytes);
        w.down.first = packed<T>(down, nullptr, width, inner, (width + 15) / 16 * 16, experts, &w.down.bytes);
    }
    if (shared) {
        w.shared_gate_up = packed<T>(shared_gate_up, shared_gate_up + static_cast<size_t>(shared) * width, shared, width,
                                     padded_inner(shared), 1, &bytes);
        w.shared_down = packed<T>(shared_down, nullptr, width, shared, (width + 15) / 16 * 16, 1, &bytes);
    }
    void* memory = std::calloc(1, moe_bytes<T>(w, tokens, threads) + 64);
    void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    auto job = [&](const Team& team) {
        const TileRegisters tiles;
        moe<T>(w, x, tokens, residual, routed, w.router.per_token, aligned, team);
    };
    run_together(threads, job);
    std::free(memory);
    for (const Packed* p : {&w.router.weights, &w.gate_up.first, &w.down.first, &w.shared_gate_up, &w.shared_down})
        std::free(const_cast<void*>(p->data));
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// Weights as torch has them: router [experts, width], gate_up [experts, 2, inner, width], down [experts, width, inner],
// the shared ones alike. inner or shared_inner may be 0.
extern "C" void DOOR(moe)(int is_bf16, int width, int inner, int shared_inner, int experts, int per_token, int groups,
                          int kept_groups, float scaling, int normalized, const float* router, const float* bias,
                          const void* gate_up, const void* down, const void* shared_gate_up, const void* shared_down,
                          const void* x, int tokens, void* residual, int16_t* routed, int threads) {
    MoeWeights shape{};
    shape.width = width, shape.inner = inner, shape.shared_inner = shared_inner;
    shape.router = {inner ? experts : 0, inner ? per_token : 0, groups, kept_groups, scaling, normalized != 0, {}, bias};
    auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        LEVEL::run<T>(shape, router, static_cast<const T*>(gate_up), static_cast<const T*>(down),
                      static_cast<const T*>(shared_gate_up), static_cast<const T*>(shared_down),
                      static_cast<const T*>(x), tokens, static_cast<T*>(residual), routed, threads);
    };
    if (is_bf16)
        run(static_cast<bf16*>(nullptr));
    else
        run(static_cast<float*>(nullptr));
}
