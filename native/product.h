// Products of a few rows with a matrix in columns of 16: c = a b, or c + a b, sums in float32.
//
// A word of b is what one lane holds: a float, or a pair of bf16 neighbours in depth. From AVX512-BF16 on pairs of a and
// b are multiplied in one instruction; below, a is float and pairs of b become floats on the way. b is [depth words][16
// columns] with `ldb` words from row to row, and `block` words from 16 columns to the next 16: so lie packed keys, values
// and weights alike.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slingshot {

struct Pair {
    uint32_t bits;
};

namespace LEVEL {

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// The words that activations of type T are multiplied as, and how many numbers of T one holds.
template <class T> struct WordOf { using type = float; };
#if defined(__AVX512BF16__)
template <> struct WordOf<bf16> { using type = Pair; };
#endif
template <class T> constexpr int PER_WORD = sizeof(T) == 2 && PAIRS ? 2 : 1;

inline Floats load_words(const float* b) { return load(b); }
inline Floats multiply_add(Floats sum, const float* a, Floats b) { return fma(all(*a), b, sum); }
#if defined(__AVX512BF16__)
inline __m512bh load_words(const Pair* b) { return (__m512bh)_mm512_loadu_si512(b); }
inline Floats multiply_add(Floats sum, const Pair* a, __m512bh b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a->bits)), b);
}
#else
struct Halves {
    Floats even, odd;
};
inline Halves load_words(const Pair* b) {
#if defined(__AVX512F__)
    const __m512i words = _mm512_loadu_si512(b);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
#else
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)))};
#endif
}
inline Floats multiply_add(Floats sum, const float* a, Halves b) { return fma(all(a[1]), b.odd, fma(all(*a), b.even, sum)); }
#endif

// Numbers of a that meet one word of b.
template <class A, class B> constexpr int STEP = 1;
template <> constexpr int STEP<float, Pair> = 2;

template <int R, int C, class A, class B>
inline void product_block(const A* a, int lda, const B* b, int ldb, size_t block, int depth, float* c, int ldc,
                          bool add_to) {
    Floats sums[R][C];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) sums[r][j] = add_to ? load(c + static_cast<size_t>(r) * ldc + j * LANES) : zeros();
    const B* columns[C];
    for (int j = 0; j < C; j++) columns[j] = b + j * LANES / 16 * block + j * LANES % 16;
    for (int k = 0; k < depth; k++) {
        decltype(load_words(b)) words[C];
        for (int j = 0; j < C; j++) words[j] = load_words(columns[j] + static_cast<size_t>(k) * ldb);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < C; j++)
                sums[r][j] = multiply_add(sums[r][j], a + static_cast<size_t>(r) * lda + k * STEP<A, B>, words[j]);
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) store(c + static_cast<size_t>(r) * ldc + j * LANES, sums[r][j]);
}

template <int R, class A, class B>
inline void product_rows(const A* a, int lda, const B* b, int ldb, size_t block, int depth, int cols, float* c,
                         int ldc, bool add_to) {
    constexpr int WIDE = LANES == 16 ? 4 : 2;  // vectors of columns at a time: as many sums as registers hold
    int n = 0;
    for (; n + WIDE * LANES <= cols; n += WIDE * LANES)
        product_block<R, WIDE>(a, lda, b + n / 16 * block, ldb, block, depth, c + n, ldc, add_to);
    for (; n < cols; n += 16) product_block<R, 16 / LANES>(a, lda, b + n / 16 * block, ldb, block, depth, c + n, ldc, add_to);
}

template <class A, class B>
inline void product_by_rows(const A* a, int lda, const B* b, int ldb, size_t block, int depth, int rows, int cols,
                            float* c, int ldc, bool add_to) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        product_rows<4>(a + static_cast<size_t>(r) * lda, lda, b, ldb, block, depth, cols,
                        c + static_cast<size_t>(r) * ldc, ldc, add_to);
    a += static_cast<size_t>(r) * lda, c += static_cast<size_t>(r) * ldc;
    if (rows - r == 3) product_rows<3>(a, lda, b, ldb, block, depth, cols, c, ldc, add_to);
    if (rows - r == 2) product_rows<2>(a, lda, b, ldb, block, depth, cols, c, ldc, add_to);
    if (rows - r == 1) product_rows<1>(a, lda, b, ldb, block, depth, cols, c, ldc, add_to);
}

// depth in words of b, lda in words of a, cols a multiple of 16.
template <class B>
inline void product(const float* a, int lda, const B* b, int ldb, size_t block, int depth, int rows, int cols, float* c,
                    int ldc, bool add_to) {
    product_by_rows(a, lda, b, ldb, block, depth, rows, cols, c, ldc, add_to);
}

#if defined(__AMX_BF16__)

// The compiler does not know what memory tiles are loaded from: what was written to it must be there before.
inline void memory_is_written(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// All tiles 16 rows of 64 bytes. Another library may leave a thread's tiles configured otherwise. Linux gives a process
// tiles only when asked to: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline void configure_tiles() {
    static const long permitted = syscall(SYS_arch_prctl, 0x1023, 18);
    if (permitted != 0) return;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, zero[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    memory_is_written(&config);
    _tile_loadconfig(&config);
}

// Two by two tiles: every tile loaded is used twice. Where only one is left, it stands for both.
inline void product_tiles(const Pair* a, int lda, const Pair* b, int ldb, size_t block, int depth, int rows, int cols,
                          float* c, int ldc, bool add_to) {
    memory_is_written(a);
    for (int r = 0; r < rows; r += 32)
        for (int n = 0; n < cols; n += 32) {
            const bool more_rows = r + 16 < rows, more_cols = n + 16 < cols;
            float* c0 = c + static_cast<size_t>(r) * ldc + n;
            float* c1 = c0 + static_cast<size_t>(16) * ldc;
            const Pair* a0 = a + static_cast<size_t>(r) * lda;
            const Pair* b0 = b + n / 16 * block;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            if (add_to) {
                _tile_loadd(0, c0, ldc * 4);
                if (more_cols) _tile_loadd(1, c0 + 16, ldc * 4);
                if (more_rows) _tile_loadd(2, c1, ldc * 4);
                if (more_rows && more_cols) _tile_loadd(3, c1 + 16, ldc * 4);
            }
            for (int k = 0; k < depth; k += 16) {
                _tile_loadd(4, a0 + k, lda * 4);
                _tile_loadd(6, b0 + static_cast<size_t>(k) * ldb, ldb * 4);
                _tile_dpbf16ps(0, 4, 6);
                if (more_cols) {
                    _tile_loadd(7, b0 + block + static_cast<size_t>(k) * ldb, ldb * 4);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (more_rows) {
                    _tile_loadd(5, a0 + static_cast<size_t>(16) * lda + k, lda * 4);
                    _tile_dpbf16ps(2, 5, 6);
                    if (more_cols) _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, c0, ldc * 4);
            if (more_cols) _tile_stored(1, c0 + 16, ldc * 4);
            if (more_rows) _tile_stored(2, c1, ldc * 4);
            if (more_rows && more_cols) _tile_stored(3, c1 + 16, ldc * 4);
        }
}

#else
inline void configure_tiles() {}
#endif

#if defined(__AVX512BF16__)
// At the amx level depth is a multiple of 16 words, and rows of a and c go on to a multiple of 16: what the additional
// ones hold is not looked at. A tile takes as long as two rows one by one.
inline void product(const Pair* a, int lda, const Pair* b, int ldb, size_t block, int depth, int rows, int cols,
                    float* c, int ldc, bool add_to) {
#if defined(__AMX_BF16__)
    if (rows > 1) return product_tiles(a, lda, b, ldb, block, depth, rows, cols, c, ldc, add_to);
#endif
    product_by_rows(a, lda, b, ldb, block, depth, rows, cols, c, ldc, add_to);
}
#endif

}  // namespace LEVEL
}  // namespace slingshot
