// Packing and products as Python's tests call them.
#include "doors.h"
#include "matmul.h"
#include "pool.h"
#include "tiles.h"

namespace slingshot {
namespace LEVEL {
namespace {

template <class T> Packed packed_of(int n, int k, const void* data) { return {n, k, packed_depth<T>(k), data}; }

template <class T> void matmul_all(int n, int k, const void* data, const void* x, int rows, float* y, int threads) {
    const Packed w = packed_of<T>(n, k, data);
    auto job = [&](const Team& team) {
        const TileRegisters tiles;
        const int begin = team.first(w.blocks()) * 16, end = team.last(w.blocks()) * 16;
        if (begin < end)
            matmul_block(w, begin, end < n ? end : n, static_cast<const T*>(x), k, rows, y + begin, n);
    };
    run_together(threads, job);
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// Bytes that a matrix takes when packed; those of bf16 may be read 64 bytes further.
extern "C" size_t DOOR(packed_bytes)(int is_bf16, int n, int k) {
    return is_bf16 ? packed_bytes<bf16>(n, k) : packed_bytes<float>(n, k);
}

// w [n, k] to `to` (64-byte aligned); from_bf16 and to_bf16 say what the numbers are.
extern "C" void DOOR(pack)(int from_bf16, int to_bf16, const void* w, int n, int k, void* to) {
    const int blocks = (n + 15) / 16;
    const float* floats = static_cast<const float*>(w);
    const bf16* halves = static_cast<const bf16*>(w);
    if (from_bf16 && to_bf16) LEVEL::pack<bf16, bf16>(halves, k, 1, n, k, 0, blocks, 1, to);
    if (from_bf16 && !to_bf16) LEVEL::pack<bf16, float>(halves, k, 1, n, k, 0, blocks, 1, to);
    if (!from_bf16 && to_bf16) LEVEL::pack<float, bf16>(floats, k, 1, n, k, 0, blocks, 1, to);
    if (!from_bf16 && !to_bf16) LEVEL::pack<float, float>(floats, k, 1, n, k, 0, blocks, 1, to);
}

// y [rows, n] = x [rows, k] times the packed w. What x needs past its end: see matmul_each.
extern "C" void DOOR(matmul)(int is_bf16, int n, int k, const void* w, const void* x, int rows, float* y, int threads) {
    if (is_bf16)
        LEVEL::matmul_all<bf16>(n, k, w, x, rows, y, threads);
    else
        LEVEL::matmul_all<float>(n, k, w, x, rows, y, threads);
}
