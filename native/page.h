// Cache pages brought into the order of product.h: keys as columns, values as rows, both in words.
#pragma once

#include "attention.h"
#include "product.h"

namespace slingshot {
namespace LEVEL {

#if defined(__AVX512F__)

// 16 rows of `words` 32-bit words (a multiple of 4), `stride` words apart, to columns `to_stride` words apart.
inline void transpose_words(const void* from, size_t stride, int words, void* to, size_t to_stride) {
    const uint32_t* rows = static_cast<const uint32_t*>(from);
    uint32_t* columns = static_cast<uint32_t*>(to);
    for (int w = 0; w < words; w += 4) {
        __m512i x[4];  // four words of rows i, i + 4, i + 8, i + 12: put together while they are loaded
        for (int i = 0; i < 4; i++) {
            const uint32_t* row = rows + i * stride + w;
            auto four = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + r * stride)); };
            x[i] = _mm512_inserti32x4(_mm512_castsi128_si512(four(0)), four(4), 1);
            x[i] = _mm512_inserti32x4(_mm512_inserti32x4(x[i], four(8), 2), four(12), 3);
        }
        const __m512i low01 = _mm512_unpacklo_epi32(x[0], x[1]), high01 = _mm512_unpackhi_epi32(x[0], x[1]);
        const __m512i low23 = _mm512_unpacklo_epi32(x[2], x[3]), high23 = _mm512_unpackhi_epi32(x[2], x[3]);
        _mm512_storeu_si512(columns + w * to_stride, _mm512_unpacklo_epi64(low01, low23));
        _mm512_storeu_si512(columns + (w + 1) * to_stride, _mm512_unpackhi_epi64(low01, low23));
        _mm512_storeu_si512(columns + (w + 2) * to_stride, _mm512_unpacklo_epi64(high01, high23));
        _mm512_storeu_si512(columns + (w + 3) * to_stride, _mm512_unpackhi_epi64(high01, high23));
    }
}

#endif

// The keys of a page, rows `stride` numbers apart, to [words][16 tokens].
#if defined(__AVX512F__)
inline void pack_keys(const float* keys, size_t stride, int width, float* to) {
    transpose_words(keys, stride, width, to, 16);
}
#else
inline void pack_keys(const float* keys, size_t stride, int width, float* to) {
    for (int half = 0; half < 16; half += 8)
        for (int w = 0; w < width; w += 8)
            transpose_8(reinterpret_cast<const uint32_t*>(keys + half * stride + w), stride,
                        reinterpret_cast<uint32_t*>(to + w * 16 + half));
}
#endif

// Without pairs bf16 becomes float on the way.
inline void pack_keys(const bf16* keys, size_t stride, int width, float* to) {
    alignas(64) float part[16 * 16];
    for (int w = 0; w < width; w += 16) {
        const int here = width - w < 16 ? 8 : 16;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < here; j += 8) {
                const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + i * stride + w + j));
                const __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16);
                _mm256_store_si256(reinterpret_cast<__m256i*>(part + i * 16 + j), words);
            }
        pack_keys(part, 16, here, to + w * 16);
    }
}

#if defined(__AVX512BF16__)
// Pairs go on with zeros to a whole tile.
inline void pack_keys(const bf16* keys, size_t stride, int width, Pair* to) {
    transpose_words(keys, stride / 2, width / 2, to, 16);
    const int words = (width + 31) / 32 * 16;
    std::memset(to + width / 2 * 16, 0, static_cast<size_t>(words - width / 2) * 16 * sizeof(Pair));
}
#endif

// The first `count` values of a page to [16 tokens][columns], columns a multiple of 16; the rest are zeros, because a
// cache may hold anything where no token was, and zero times that need not be zero.
template <class T> inline void pack_values(const T* values, size_t stride, int count, int width, int columns, float* to) {
    for (int t = 0; t < 16; t++, to += columns) {
        for (int c = 0; c < columns; c += 8) {
            __m256 numbers = _mm256_setzero_ps();
            if (t < count && c < width) {
                if constexpr (sizeof(T) == 4) {
                    numbers = _mm256_loadu_ps(reinterpret_cast<const float*>(values + t * stride + c));
                } else {
                    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + t * stride + c));
                    numbers = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
                }
            }
            _mm256_storeu_ps(to + c, numbers);
        }
    }
}

#if defined(__AVX512BF16__)
// Two tokens' numbers side by side: [8 pairs of tokens][columns].
inline void pack_values(const bf16* values, size_t stride, int count, int width, int columns, Pair* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int t = 0; t < 16; t += 2, to += columns)
        for (int c = 0; c < columns; c += 32) {
            const int here = width - c < 32 ? width - c : 32;
            const __mmask32 present = here <= 0 ? 0 : static_cast<__mmask32>((1ull << here) - 1);
            const __m512i even = _mm512_maskz_loadu_epi16(t < count ? present : 0, values + t * stride + c);
            const __m512i odd = _mm512_maskz_loadu_epi16(t + 1 < count ? present : 0, values + (t + 1) * stride + c);
            _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(even, low, odd));
            if (c + 16 < columns) _mm512_storeu_si512(to + c + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
}
#endif

}  // namespace LEVEL
}  // namespace slingshot
