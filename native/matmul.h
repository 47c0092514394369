// y = x W^T for packed weights: rows of x [rows, k] in the weights' type, sums in float32.
//
// The result comes in pieces that are still in the nearest cache, and whoever calls says what becomes of them: stored,
// added to the residual, gate and up made one. A few rows multiply one by one with each word of weights, more of them
// take AMX tiles where there are, on the same packed weights.
#pragma once

#include "packed.h"
#include "product.h"
#include "quantized.h"

namespace slingshot {
namespace LEVEL {

constexpr int FEW = 4;             // rows up to which a tile is mostly empty
constexpr int BYTE_ROWS = 16;      // rows up to which quantized weights are multiplied as they are
constexpr int PIECE = 64;          // columns of a piece at most
constexpr int X_BYTES = 768 << 10;  // of x at a time: it stays in the second cache while all weights pass by

// What 16 outputs at one word of k are multiplied as: one or two registers of floats, or of pairs.
template <class T> struct Weights;

template <> struct Weights<float> {
    static constexpr int REGISTERS = 16 / LANES;
    Floats w[REGISTERS];
    explicit Weights(const uint32_t* words) {
        for (int i = 0; i < REGISTERS; i++) w[i] = load(reinterpret_cast<const float*>(words) + i * LANES);
    }
    void multiply_add(const float* x, Floats* sums) const {
        for (int i = 0; i < REGISTERS; i++) sums[i] = fma(all(*x), w[i], sums[i]);
    }
};

template <> struct Weights<bf16> {
    static constexpr int REGISTERS = 16 / LANES;
#if defined(__AVX512BF16__)
    __m512bh w;
    explicit Weights(const uint32_t* words) : w((__m512bh)_mm512_loadu_si512(words)) {}
    void multiply_add(const bf16* x, Floats* sums) const {
        int pair;
        std::memcpy(&pair, x, 4);
        sums[0] = _mm512_dpbf16_ps(sums[0], w, (__m512bh)_mm512_set1_epi32(pair));
    }
#else
    Floats even[REGISTERS], odd[REGISTERS];
    explicit Weights(const uint32_t* words) {
        for (int i = 0; i < REGISTERS; i++) {
#if defined(__AVX512F__)
            const __m512i pairs = _mm512_loadu_si512(words);
            even[i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            odd[i] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
#else
            const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i * 8));
            even[i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            odd[i] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
#endif
        }
    }
    void multiply_add(const float* x, Floats* sums) const {
        for (int i = 0; i < REGISTERS; i++) sums[i] = fma(all(x[1]), odd[i], fma(all(*x), even[i], sums[i]));
    }
#endif
};

// R rows times C blocks of 16 outputs. X: T, or float where pairs are not multiplied at once.
template <int R, int C, class T, class X>
inline void matmul_rows(const uint32_t* w, size_t block_words, int words, const X* x, size_t ldx, float* y, int ldy) {
    constexpr int REGISTERS = Weights<T>::REGISTERS, PER_WORD = 4 / sizeof(T), AHEAD = 2048 / 4;
    Floats sums[R][C * REGISTERS];
    for (auto& row : sums)
        for (Floats& sum : row) sum = zeros();
    for (int i = 0; i < words; i++) {
        for (int c = 0; c < C; c++) {
            const uint32_t* at = w + c * block_words + i * 16;
            _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD), _MM_HINT_T0);
            const Weights<T> weights(at);
            for (int r = 0; r < R; r++) weights.multiply_add(x + r * ldx + i * PER_WORD, sums[r] + c * REGISTERS);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C * REGISTERS; c++) store(y + r * ldy + c * LANES, sums[r][c]);
}

// R rows times blocks begin to end, which stand side by side in a piece.
template <int R, class T, class X>
inline void matmul_piece(const Packed& w, int begin, int end, const X* x, size_t ldx, float* y) {
    const int words = sizeof(T) == 4 ? w.k : (w.k + 1) / 2;
    constexpr int C = LANES == 16 ? (R > 2 ? 2 : 4) : 1;  // as many sums as registers hold
    int b = begin;
    for (; b + C <= end; b += C)
        matmul_rows<R, C, T>(w.block<uint32_t>(b), w.block_words(), words, x, ldx, y + (b - begin) * 16, PIECE);
    for (; b < end; b++)
        matmul_rows<R, 1, T>(w.block<uint32_t>(b), w.block_words(), words, x, ldx, y + (b - begin) * 16, PIECE);
}

#if defined(__AMX_BF16__)
// Up to 32 rows times two blocks, the whole of k: every tile that is loaded is used twice. `fetch` brings the next blocks
// nearer meanwhile.
template <bool TWO_ROWS, bool TWO_BLOCKS>
inline void matmul_tiles(const bf16* x, size_t ldx, const uint32_t* w, size_t block_words, int depth, bool fetch,
                         float* y) {
    const bf16* low = x + 16 * ldx;
    const uint32_t* next = w + block_words;
    const char* ahead = reinterpret_cast<const char*>(w + (TWO_BLOCKS ? 2 : 1) * block_words);
    memory_is_written(x);
    _tile_zero(0);
    if (TWO_BLOCKS) _tile_zero(1);
    if (TWO_ROWS) _tile_zero(2);
    if (TWO_ROWS && TWO_BLOCKS) _tile_zero(3);
    for (int i = 0; i < depth; i += 16) {
        _tile_loadd(6, w + static_cast<size_t>(i) * 16, 64);
        _tile_loadd(4, x + i * 2, ldx * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO_BLOCKS) {
            _tile_loadd(7, next + static_cast<size_t>(i) * 16, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (TWO_ROWS) {
            _tile_loadd(5, low + i * 2, ldx * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (TWO_BLOCKS) _tile_dpbf16ps(3, 5, 7);
        }
        for (int line = 0; fetch && line < (TWO_BLOCKS ? 32 : 16); line++, ahead += 64)
            _mm_prefetch(ahead, _MM_HINT_T1);
    }
    _tile_stored(0, y, PIECE * 4);
    if (TWO_BLOCKS) _tile_stored(1, y + 16, PIECE * 4);
    if (TWO_ROWS) _tile_stored(2, y + 16 * PIECE, PIECE * 4);
    if (TWO_ROWS && TWO_BLOCKS) _tile_stored(3, y + 16 * PIECE + 16, PIECE * 4);
}

template <class Each>
inline void matmul_each_by_tiles(const Packed& w, int begin, int end, const bf16* x, size_t ldx, int rows, Each& each) {
    alignas(64) float piece[32 * PIECE];
    const int most = X_BYTES / (2 * w.k) / 32 * 32, step = most < 64 ? 64 : most;
    for (int top = 0; top < rows; top += step) {
        const int bottom = rows - top < step ? rows : top + step;
        for (int b = begin; b < end; b += 2) {
            const uint32_t* block = w.block<uint32_t>(b);
            const int columns = w.n - b * 16 < 32 ? w.n - b * 16 : 32;
            const int limit = end - b < 2 && columns > 16 ? 16 : columns;
            for (int r = top; r < bottom; r += 32) {
                const bf16* at = x + r * ldx;
                const int here = bottom - r < 32 ? bottom - r : 32;
                if (here > 16 && limit > 16)
                    matmul_tiles<true, true>(at, ldx, block, w.block_words(), w.depth, r == top, piece);
                else if (here > 16)
                    matmul_tiles<true, false>(at, ldx, block, w.block_words(), w.depth, r == top, piece);
                else if (limit > 16)
                    matmul_tiles<false, true>(at, ldx, block, w.block_words(), w.depth, r == top, piece);
                else
                    matmul_tiles<false, false>(at, ldx, block, w.block_words(), w.depth, r == top, piece);
                each(piece, PIECE, r, here, b * 16, limit);
            }
        }
    }
}
#endif

// Rows of X, for `each` from `top` on.
template <class T, class X, class Each>
inline void matmul_few(const Packed& w, int begin, int end, const X* x, size_t ldx, int rows, int top, Each& each) {
    alignas(64) float piece[FEW * PIECE];
    for (int b = begin; b < end; b += PIECE / 16) {
        const int last = end - b < PIECE / 16 ? end : b + PIECE / 16;
        const int columns = w.n < last * 16 ? w.n - b * 16 : (last - b) * 16;
        for (int r = 0; r < rows; r += FEW) {
            const X* at = x + r * ldx;
            const int here = rows - r < FEW ? rows - r : FEW;
            if (here == 4) matmul_piece<4, T>(w, b, last, at, ldx, piece);
            if (here == 3) matmul_piece<3, T>(w, b, last, at, ldx, piece);
            if (here == 2) matmul_piece<2, T>(w, b, last, at, ldx, piece);
            if (here == 1) matmul_piece<1, T>(w, b, last, at, ldx, piece);
            each(piece, PIECE, top + r, here, b * 16, columns);
        }
    }
}

template <class T, class Each>
inline void matmul_words(const Packed& w, int begin, int end, const T* x, size_t ldx, int rows, Each& each) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == 2)
        if (rows > FEW) return matmul_each_by_tiles(w, begin, end, x, ldx, rows, each);
#endif
    if constexpr (sizeof(T) == 4 || PAIRS) return matmul_few<T>(w, begin, end, x, ldx, rows, 0, each);
    // A lane is filled from memory with a float, but not with half of a word: every number of x becomes one, once.
    const int ld = (w.k + 1) / 2 * 2, most = X_BYTES / (4 * ld) / FEW * FEW, step = most < FEW ? FEW : most;
    for (int top = 0; top < rows; top += step) {
        const int here = rows - top < step ? rows - top : step;
        float* wide = static_cast<float*>(row_scratch(static_cast<size_t>(here) * ld * 4));
        for (int r = 0; r < here; r++) {
            const T* from = x + (top + r) * ldx;
            float* to = wide + static_cast<size_t>(r) * ld;
            int i = 0;
            for (; i + LANES <= w.k; i += LANES) store(to + i, load(from + i));
            for (; i < ld; i++) to[i] = i < w.k ? to_float(from[i]) : 0;
        }
        matmul_few<T>(w, begin, end, wide, ld, here, top, each);
    }
}

// Some rows, for `each` from `top` on: whole numbers, a few at a time.
template <class T, class Each>
inline void matmul_each_by_bytes(const Packed& w, int begin, int end, const T* x, size_t ldx, int rows, Each& each,
                                 int top = 0) {
    alignas(64) float piece[FEW * PIECE];
    const int groups = w.k / w.group, most = X_BYTES / w.k / FEW * FEW, step = most < BYTE_ROWS ? BYTE_ROWS : most;
    for (; rows > step; rows -= step, x += step * ldx, top += step)
        matmul_each_by_bytes(w, begin, end, x, ldx, step, each, top);
    Carver carver{static_cast<char*>(product_scratch(rows * (w.k + 8 * groups) + 3 * 64))};
    const Bytes bytes{carver.take<int8_t>(rows * w.k), carver.take<float>(rows * groups),
                      carver.take<int>(rows * groups)};
    for (int r = 0; r < rows; r++)
        to_bytes(x + r * ldx, w.k, w.group, w.by_bytes, bytes.bytes + r * w.k, bytes.scales + r * groups,
                 bytes.sums + r * groups);
    for (int b = begin; b < end; b += PIECE / 16) {
        const int last = end - b < PIECE / 16 ? end : b + PIECE / 16;
        const int columns = w.n < last * 16 ? w.n - b * 16 : (last - b) * 16;
        for (int r = 0; r < rows; r += FEW) {
            const int here = rows - r < FEW ? rows - r : FEW;
            const Bytes own{bytes.bytes + r * w.k, bytes.scales + r * groups, bytes.sums + r * groups};
            for (int i = b; i < last; i++)
                with_bits(w.bits, [&](auto bits) {
                    quantized_piece<bits>(w, i, own, here, piece + (i - b) * 16, PIECE);
                });
            each(piece, PIECE, top + r, here, b * 16, columns);
        }
    }
}

// Many rows: the weights as numbers of T, some blocks at a time.
template <class T, class Each>
inline void matmul_each_by_numbers(const Packed& w, int begin, int end, const T* x, size_t ldx, int rows, Each& each) {
    Packed part{0, w.k, packed_depth<T>(w.k), nullptr};
    T* numbers = static_cast<T*>(product_scratch(part.block_words() * 4 * (PIECE / 16) + 4096));
    part.data = numbers;
    for (int b = begin; b < end; b += PIECE / 16) {
        const int last = end - b < PIECE / 16 ? end : b + PIECE / 16;
        auto shifted = [&](const float* piece, int ld, int row, int count, int n, int columns) {
            each(piece, ld, row, count, b * 16 + n, columns);
        };
        for (int i = b; i < last; i++) {
            T* to = numbers + (i - b) * part.block_words() * 4 / sizeof(T);
            with_bits(w.bits, [&](auto bits) { to_numbers<bits>(w, i, to); });
        }
        part.n = w.n < last * 16 ? w.n - b * 16 : (last - b) * 16;
        matmul_words(part, 0, last - b, x, ldx, rows, shifted);
    }
}

// Blocks begin to end (of 16 outputs) of x W^T. each(piece, ld, row, rows, n, columns) gets every finished piece: rows
// and columns from (row, n) on. `columns` is a multiple of 32 but at the end; begin is even where two blocks belong
// together. At the amx level rows of x up to a multiple of 16, and in each a multiple of 32 numbers, are read: those past
// the end must be finite.
template <class T, class Each>
inline void matmul_each(const Packed& w, int begin, int end, const T* x, size_t ldx, int rows, Each&& each) {
    if (!w.bits)
        matmul_words(w, begin, end, x, ldx, rows, each);
    else if (rows <= BYTE_ROWS || w.by_bytes)
        matmul_each_by_bytes(w, begin, end, x, ldx, rows, each);
    else
        matmul_each_by_numbers(w, begin, end, x, ldx, rows, each);
}

// Outputs begin (a multiple of 16) to end, y[row * ldy + n - begin].
template <class T>
inline void matmul_block(const Packed& w, int begin, int end, const T* x, size_t ldx, int rows, float* y, size_t ldy) {
    matmul_each(w, begin / 16, (end + 15) / 16, x, ldx, rows,
                [&](const float* piece, int ld, int row, int count, int n, int columns) {
                    for (int r = 0; r < count; r++)
                        std::memcpy(y + (row + r) * ldy + n - begin, piece + r * ld, columns * 4);
                });
}

}  // namespace LEVEL
}  // namespace slingshot
