// What attention keeps of a token, as the cache holds it (engine/kv_cache.py): numbers as they are computed, or of 8
// bits, then what they are multiplied by, a bf16, then the numbers that are not rounded. Writing and reading give torch's
// bytes and numbers.
#pragma once

#include "attention.h"
#include "simd.h"

namespace slingshot {

// Of one key head, keys or values; MLA's is of all heads, and its rope part is not rounded.
struct Entry {
    int form, rounded, rest;

    int width() const { return rounded + rest; }
    size_t bytes(size_t of_number) const {
        return form == AS_COMPUTED ? width() * of_number : rounded + sizeof(bf16) + rest * of_number;
    }
};

namespace LEVEL {

constexpr float LARGEST_E4M3 = 448;

inline uint32_t bits_of(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    return word;
}

// The nearest e4m3, halves to the even one; x is 448 at most.
inline uint8_t e4m3_of(float x) {
    const uint32_t word = bits_of(x), size = word & 0x7fffffff;
    const uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
    const uint32_t small = bits_of(std::fabs(x) + 16384.0f) - bits_of(16384.0f);  // below 2^-6 steps are 2^-9
    return static_cast<uint8_t>((word >> 24 & 128) | (size < (121u << 23) ? small : normal));
}

template <class T> inline void put_entry(const Entry& entry, const T* from, void* to) {
    if (entry.form == AS_COMPUTED) {
        std::memcpy(to, from, entry.width() * sizeof(T));
        return;
    }
    uint8_t* bytes = static_cast<uint8_t*>(to);
    uint32_t largest = 0;  // as bits, of which those of what is no number are the largest
    for (int i = 0; i < entry.rounded; i++) {
        const uint32_t size = bits_of(to_float(from[i])) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    float scale;
    std::memcpy(&scale, &largest, 4);
    const float most = entry.form == INT8 ? 127 : LARGEST_E4M3;
    scale = rounded<bf16>(scale / most);
    if (scale == 0) scale = 1;
    auto limited = [&](float x) {
        const float y = x / scale;
        return y > most ? most : y < -most ? -most : y;
    };
    if (entry.form == INT8)
        for (int i = 0; i < entry.rounded; i++)
            bytes[i] = static_cast<uint8_t>(static_cast<int>(std::rint(limited(to_float(from[i])))));
    else
        for (int i = 0; i < entry.rounded; i++) bytes[i] = e4m3_of(limited(to_float(from[i])));
    const uint16_t upper = static_cast<uint16_t>(bits_of(scale) >> 16);
    std::memcpy(bytes + entry.rounded, &upper, 2);
    std::memcpy(bytes + entry.rounded + 2, from + entry.rounded, entry.rest * sizeof(T));
}

// LANES numbers of 8 bits; e4m3's are a 256th of what they stand for.
#if defined(__AVX512F__)
template <int FORM> inline Floats eight_bits(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (FORM == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    const __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(halves, _mm256_set1_epi16(static_cast<short>(0xbfff))));
}
#else
template <int FORM> inline Floats eight_bits(const uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    if (FORM == INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    const __m128i halves = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
    return _mm256_cvtph_ps(_mm_and_si128(halves, _mm_set1_epi16(static_cast<short>(0xbfff))));
}
#endif

template <int FORM, class T> inline void take_numbers(const uint8_t* from, int count, T* to) {
    bf16 scale;
    std::memcpy(&scale, from + count, 2);
    const Floats factor = all(to_float(scale) * (FORM == FP8 ? 256 : 1));
    int i = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
        for (; i + 32 <= count; i += 32) {
            const Floats low = mul(eight_bits<FORM>(from + i), factor);
            const Floats high = mul(eight_bits<FORM>(from + i + 16), factor);
            _mm512_storeu_si512(to + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
#endif
    for (; i < count; i += LANES) store(to + i, mul(eight_bits<FORM>(from + i), factor));
}

// Up to LANES numbers more are read and written than there are.
template <class T> inline void take_entry(const Entry& entry, const void* from, T* to) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    if (entry.form == AS_COMPUTED) {
        std::memcpy(to, from, entry.width() * sizeof(T));
        return;
    }
    entry.form == INT8 ? take_numbers<INT8>(bytes, entry.rounded, to) : take_numbers<FP8>(bytes, entry.rounded, to);
    std::memcpy(to + entry.rounded, bytes + entry.rounded + 2, entry.rest * sizeof(T));
}

}  // namespace LEVEL
}  // namespace slingshot
