// Quantized weights as Python calls them.
#include "doors.h"
#include "matmul.h"
#include "pool.h"
#include "tiles.h"

using namespace slingshot;

namespace {

template <class T> void matmul_all(const Packed& w, const void* x, int rows, float* y, int threads) {
    auto job = [&](const Team& team) {
        const LEVEL::TileRegisters tiles;
        const int begin = team.first(w.blocks()) * 16, end = team.last(w.blocks()) * 16;
        if (begin < end)
            LEVEL::matmul_block(w, begin, end < w.n ? end : w.n, static_cast<const T*>(x), w.k, rows, y + begin, w.n);
    };
    run_together(threads, job);
}

}  // namespace

// Bytes that a matrix [n, k] takes; bits 8 or 4, k a multiple of the group, the group of 32; group 0: see quantized.h.
extern "C" size_t DOOR(quantized_bytes)(int bits, int group, int n, int k) { return quantized_bytes(bits, group, n, k); }

// numbers [n, k] (-127 to 127, or -8 to 7) and scales [n, k / group] to `to`, 64-byte aligned zeros.
extern "C" void DOOR(pack_quantized)(int bits, int group, const int8_t* numbers, const float* scales, int n, int k,
                                     void* to) {
    const Packed w = quantized(bits, group, n, k, to);
    for (int row = 0; row < n; row++) {
        uint32_t* block = const_cast<uint32_t*>(w.block<uint32_t>(row / 16));
        float* its_scales = reinterpret_cast<float*>(block) + static_cast<size_t>(w.depth) * 16;
        for (int i = 0; i < k; i++)
            LEVEL::put_number(w, reinterpret_cast<uint8_t*>(block), row % 16, i,
                              numbers[static_cast<size_t>(row) * k + i]);
        for (int g = 0; g < k / w.group; g++)
            its_scales[g * 16 + row % 16] = scales[static_cast<size_t>(row) * (k / w.group) + g];
    }
}

// y [rows, n] = x [rows, k] times the packed weights, as `matmul`.
extern "C" void DOOR(matmul_quantized)(int is_bf16, int bits, int group, int n, int k, const void* w, const void* x,
                                       int rows, float* y, int threads) {
    const Packed packed = quantized(bits, group, n, k, w);
    is_bf16 ? matmul_all<bf16>(packed, x, rows, y, threads) : matmul_all<float>(packed, x, rows, y, threads);
}
