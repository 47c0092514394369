// Registers of floats as wide as the level this file is compiled for: 16 lanes with AVX-512, 8 with AVX2.
//
// Every source that computes is compiled once per level (LEVEL is avx2, avx512, avx512bf16 or amx) with the compiler's
// flags of that level, everything inside namespace slingshot::LEVEL, so that one program holds all of them side by side.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace slingshot {

struct bf16 {
    uint16_t bits;
};

namespace LEVEL {

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
    uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &word, 4);
    return y;
}

inline void put(float* to, float x) { *to = x; }

// Round to nearest, ties to even, as torch does; what is not a number stays one.
inline void put(bf16* to, float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// x as a T holds it: where torch's path has a tensor of the model's dtype, its numbers are rounded.
template <class T> inline float rounded(float x) {
    T y;
    put(&y, x);
    return to_float(y);
}

// 8 rows of 8 words, `stride` words apart, to columns; `to` has 16 words from row to row.
inline void transpose_8(const uint32_t* from, size_t stride, uint32_t* to) {
    __m256 x[8], y[8];
    for (int i = 0; i < 8; i++) x[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * stride));
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to + i * 16), _mm256_permute2f128_ps(x[i], x[4 + i], 0x20));
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * 16), _mm256_permute2f128_ps(x[i], x[4 + i], 0x31));
    }
}

#if defined(__AVX512F__)

constexpr int LANES = 16;
using Floats = __m512;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline Floats floats(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Floats load(const bf16* x) { return floats(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline __m256i halves(Floats x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    __m512i word = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(word, odd), _mm512_set1_epi32(0x7fff)), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline void store(bf16* to, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves(x)); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float highest(Floats x) { return _mm512_reduce_max_ps(x); }

// 2^n x for whole n; zero where `of` is so low that exp(of) is no normal number.
inline Floats scaled(Floats x, Floats n, Floats of) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(of, _mm512_set1_ps(-87.3f), _CMP_GE_OQ), x, n);
}
inline Floats raised(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 8); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }

#else

constexpr int LANES = 8;
using Floats = __m256;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline Floats floats(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Floats load(const bf16* x) { return floats(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline __m128i halves(Floats x) {
    __m256i word = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(word, odd), _mm256_set1_epi32(0x7fff)), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}
inline void store(bf16* to, Floats x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves(x)); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline float sum(Floats x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float highest(Floats x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
// For n of at least -127, which gives 0.
inline Floats raised(Floats x, Floats n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats scaled(Floats x, Floats n, Floats of) {
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    Floats kept = _mm256_cmp_ps(of, _mm256_set1_ps(-87.3f), _CMP_GE_OQ);
    return _mm256_and_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(power)), kept);
}
inline Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#endif

// A register of numbers as a T holds them.
template <class T> inline Floats rounded(Floats x) {
    if constexpr (sizeof(T) == 2)
        return floats(halves(x));
    else
        return x;
}

// e^x to within two units in the last place of a float; 0 below -87.3, the largest power below infinity above 88.
inline Floats exp(Floats x) {
    Floats limited = min(max(x, all(-87.3f)), all(88.0f));
    Floats n = nearest(mul(limited, all(1.44269504f)));
    // ln 2 in two parts, the first short enough that n times it is exact
    Floats r = fma(n, all(-1.42860677e-6f), fma(n, all(-0.693145752f), limited));
    Floats y = all(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, all(c));
    return scaled(y, n, x);
}

// 2^x for x of at most 0, for weights that become a T: a bf16 needs fewer terms. Exactly 0 where it is no normal number.
template <class T> inline Floats power_of_two(Floats x) {
    constexpr float LOWEST = LANES == 16 ? -160 : -127;  // from here on `raised` gives 0
    x = max(x, all(LOWEST));
    const Floats n = nearest(x), r = sub(x, n);
    if constexpr (sizeof(T) == 2)  // within 1e-4 of itself, a twentieth of a bf16's rounding
        return raised(fma(fma(fma(all(0.055171669f), r, all(0.24261113f)), r, all(0.69326099f)), r, all(0.99992808f)), n);
    Floats y = all(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f}) y = fma(y, r, all(c));
    return raised(y, n);
}

// silu(x) = x / (1 + e^-x)
inline Floats silu(Floats x) { return div(x, add(all(1.0f), exp(mul(x, all(-1.0f))))); }

}  // namespace LEVEL
}  // namespace slingshot
