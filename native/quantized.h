// Products with weights of 8 or 4 bits, each group of neighbours in k with a scale: w = scale (number - OFFSET),
// numbers unsigned; a scale may be negative.
//
// Up to 16 rows of x are brought to 8 bits too, group by group, and whole numbers are multiplied: 64 a register with
// VNNI. For more the weights become numbers of T, a few blocks at a time, and meet x as other weights do.
//
// Of group 0 a whole row shares a scale, and all x is brought to 8 bits, rounded as model/dynamic.py's whole_product.
//
// 8 bits: [k / 4][16][4 bytes]. 4 bits: [k / 8][16][4 bytes], low halves for the first 4 of 8 neighbours, high ones for
// the others. FLOAT4: 4 bits that name one of 16 whole numbers, twice what OCP's e2m1 stands for.
#pragma once

#include <type_traits>

#include "packed.h"
#include "scratch.h"

namespace slingshot {

constexpr int FLOAT4 = 16 + 4;
constexpr int width_of(int bits) { return bits % 16; }
constexpr int quantized_depth(int bits, int k) { return k * width_of(bits) / 32; }
constexpr size_t quantized_bytes(int bits, int group, int n, int k) {
    return static_cast<size_t>((n + 15) / 16) * 64 * (quantized_depth(bits, k) + (group ? k / group : 1));
}
inline Packed quantized(int bits, int group, int n, int k, const void* data) {
    return {n, k, quantized_depth(bits, k), data, bits, group ? group : k, group == 0};
}

namespace LEVEL {

template <int BITS> constexpr int OFFSET = BITS == 8 ? 128 : BITS == FLOAT4 ? 12 : 8;

#if defined(__AVX512F__)
using Ints = __m512i;
inline Ints all_ints(int x) { return _mm512_set1_epi32(x); }
inline Ints load_ints(const void* x) { return _mm512_loadu_si512(x); }
inline Floats floats_of(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints low_halves(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Ints high_halves(Ints x) { return low_halves(_mm512_srli_epi16(x, 4)); }
inline Ints looked_up(__m128i table, Ints at) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), at); }
inline Floats byte_of(Ints x, int i) {
    return floats_of(_mm512_and_si512(_mm512_srli_epi32(x, 8 * i), _mm512_set1_epi32(255)));
}
inline void store_bytes(int8_t* to, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
#if !defined(__AVX512VNNI__)
inline Ints pairs_of(Ints w, Ints x) { return _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)); }
inline Ints sum_of(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints masked(Ints a, int byte) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(byte))); }
#endif
#else
using Ints = __m256i;
inline Ints all_ints(int x) { return _mm256_set1_epi32(x); }
inline Ints load_ints(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
inline Floats floats_of(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints low_halves(Ints x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Ints high_halves(Ints x) { return low_halves(_mm256_srli_epi16(x, 4)); }
inline Ints looked_up(__m128i table, Ints at) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), at); }
inline Floats byte_of(Ints x, int i) {
    return floats_of(_mm256_and_si256(_mm256_srli_epi32(x, 8 * i), _mm256_set1_epi32(255)));
}
inline void store_bytes(int8_t* to, Floats x) {
    const __m256i words = _mm256_cvtps_epi32(x);
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(shorts, shorts));
}
inline Floats absolute(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Ints pairs_of(Ints w, Ints x) { return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)); }
inline Ints sum_of(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints masked(Ints a, int byte) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(byte))); }
#endif

// By e2m1's code twice its value + OFFSET, and back.
alignas(16) constexpr uint8_t E2M1_NUMBERS[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr uint8_t E2M1_CODES[25] = {15, 0, 0, 0, 14, 0, 13, 0, 12, 11, 10, 9, 0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7};

// The unsigned numbers in the low or high halves of bytes.
template <int BITS> inline Ints numbers_of(Ints packed, bool high) {
    const Ints halves = high ? high_halves(packed) : low_halves(packed);
    return BITS == FLOAT4 ? looked_up(_mm_load_si128(reinterpret_cast<const __m128i*>(E2M1_NUMBERS)), halves) : halves;
}

// sum + w x, four unsigned bytes of w times four signed ones of x a lane.
template <int BITS> inline Ints multiply_add_bytes(Ints sum, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, w, x);
#else
    if (BITS != 8) return sum_of(sum, pairs_of(w, x));
    // Two products of 255 times 127 are too much for 16 bits: the highest bit goes apart.
    return sum_of(sum, sum_of(pairs_of(masked(w, 127), x), pairs_of(masked(w, 128), x)));
#endif
}

constexpr float SMALLEST = 1e-30f;  // a group whose largest number is smaller is zeros

// Rows of x in 8 bits: x = scale * byte by groups; sums of the bytes.
struct Bytes {
    int8_t* bytes;  // [rows, k]
    float* scales;  // [rows, k / group]
    int* sums;
};

// exact: each number is divided by the scale, which takes longer.
template <class T>
inline void to_bytes(const T* x, int k, int group, bool exact, int8_t* bytes, float* scales, int* sums) {
    for (int g = 0; g < k / group; g++, x += group, bytes += group) {
        Floats most = zeros();
        for (int i = 0; i < group; i += LANES) most = max(most, absolute(load(x + i)));
        const float largest = highest(most), inverse = largest > SMALLEST ? 127 / largest : 0;
        const float scale = exact && largest > 0 ? largest / 127 : 1;
        Floats total = zeros();
        for (int i = 0; i < group; i += LANES) {
            const Floats rounded = nearest(exact ? div(load(x + i), all(scale)) : mul(load(x + i), all(inverse)));
            total = add(total, rounded);
            store_bytes(bytes + i, rounded);
        }
        const float bytes_sum = sum(total);
        const bool finite = bytes_sum - bytes_sum == 0;  // what is no number makes the outputs none
        scales[g] = finite ? largest / 127 : NAN;
        sums[g] = finite ? static_cast<int>(bytes_sum) : 0;
    }
}

// R rows times block b.
template <int R, int BITS>
inline void quantized_rows(const Packed& w, int b, const Bytes& x, float* y, int ldy) {
    constexpr int REGISTERS = 16 / LANES;
    const int groups = w.k / w.group, rows_of_group = w.group * width_of(BITS) / 32;
    const char* words = reinterpret_cast<const char*>(w.block<uint32_t>(b));
    const float* scales = reinterpret_cast<const float*>(words) + static_cast<size_t>(w.depth) * 16;
    Floats sums[R][REGISTERS];
    for (auto& row : sums)
        for (Floats& sum : row) sum = zeros();
    for (int g = 0; g < groups; g++) {
        Ints dots[R][REGISTERS];
        for (int r = 0; r < R; r++)
            for (Ints& dot : dots[r]) dot = all_ints(-OFFSET<BITS> * x.sums[r * groups + g]);
        const int8_t* bytes = x.bytes + g * w.group;
        for (int i = 0; i < rows_of_group; i++, words += 64, bytes += 32 / width_of(BITS)) {
            _mm_prefetch(words + 2048, _MM_HINT_T0);
            for (int part = 0; part < REGISTERS; part++) {
                const Ints packed = load_ints(words + part * 64 / REGISTERS);
                for (int r = 0; r < R; r++) {
                    int first, second;
                    std::memcpy(&first, bytes + r * w.k, 4);
                    Ints& dot = dots[r][part];
                    if (BITS == 8) {
                        dot = multiply_add_bytes<8>(dot, packed, all_ints(first));
                    } else {
                        std::memcpy(&second, bytes + r * w.k + 4, 4);
                        dot = multiply_add_bytes<4>(dot, numbers_of<BITS>(packed, false), all_ints(first));
                        dot = multiply_add_bytes<4>(dot, numbers_of<BITS>(packed, true), all_ints(second));
                    }
                }
            }
        }
        for (int part = 0; part < REGISTERS; part++) {
            const Floats scale = load(scales + g * 16 + part * LANES);
            for (int r = 0; r < R; r++)
                sums[r][part] = fma(mul(floats_of(dots[r][part]), all(x.scales[r * groups + g])), scale, sums[r][part]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int part = 0; part < REGISTERS; part++) store(y + r * ldy + part * LANES, sums[r][part]);
}

template <int BITS> inline void quantized_piece(const Packed& w, int b, const Bytes& x, int rows, float* y, int ldy) {
    if (rows == 1) quantized_rows<1, BITS>(w, b, x, y, ldy);
    if (rows == 2) quantized_rows<2, BITS>(w, b, x, y, ldy);
    if (rows == 3) quantized_rows<3, BITS>(w, b, x, y, ldy);
    if (rows == 4) quantized_rows<4, BITS>(w, b, x, y, ldy);
}

// Four neighbours in k of 16 outputs, a register of LANES of them, to words of T.
inline void put_words(const Floats* four, float* to) {
    for (int i = 0; i < 4; i++) store(to + i * 16, four[i]);
}
inline void put_words(const Floats* four, bf16* to) {
    for (int i = 0; i < 4; i += 2) {
#if defined(__AVX512BF16__)
        const Ints both = (Ints)_mm512_cvtne2ps_pbh(four[i + 1], four[i]);
        const Ints lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const Ints turns = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, all_ints(16)), 16));
        _mm512_storeu_si512(to + i * 16, _mm512_permutexvar_epi16(turns, both));
#elif defined(__AVX512F__)
        const Ints low = _mm512_cvtepu16_epi32(halves(four[i])), high = _mm512_cvtepu16_epi32(halves(four[i + 1]));
        _mm512_storeu_si512(to + i * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
        const Ints low = _mm256_cvtepu16_epi32(halves(four[i])), high = _mm256_cvtepu16_epi32(halves(four[i + 1]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * 16), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
#endif
    }
}

// Block b as numbers of T in the order of packed.h.
template <int BITS, class T> inline void to_numbers(const Packed& w, int b, T* to) {
    constexpr int REGISTERS = 16 / LANES, PART = sizeof(T) == 4 ? LANES : 2 * LANES;
    constexpr int STEP = 32 / width_of(BITS);  // neighbours in a word
    const char* words = reinterpret_cast<const char*>(w.block<uint32_t>(b));
    const float* scales = reinterpret_cast<const float*>(words) + static_cast<size_t>(w.depth) * 16;
    for (int g = 0; g < w.k / w.group; g++)
        for (int part = 0; part < REGISTERS; part++) {
            const Floats scale = load(scales + g * 16 + part * LANES), shift = mul(scale, all(-OFFSET<BITS>));
            for (int i = g * w.group / STEP; i < (g + 1) * w.group / STEP; i++) {
                _mm_prefetch(words + i * 64 + 2048, _MM_HINT_T0);
                const Ints packed = load_ints(words + i * 64 + part * 64 / REGISTERS);
                for (int half = 0; half < STEP / 4; half++) {
                    const Ints bytes = BITS == 8 ? packed : numbers_of<BITS>(packed, half);
                    Floats four[4];
                    // offset times scale is exact (FLOAT4's scales are powers of two): rounded as the product alone would be
                    for (int j = 0; j < 4; j++) four[j] = fma(byte_of(bytes, j), scale, shift);
                    put_words(four, to + i * STEP * 16 + half * 64 + part * PART);
                }
            }
        }
}

// The scale of a group, so that its largest number is the largest there is; no number where one of the group is none.
template <class Source>
inline float scale_of(const Source* row, size_t column_stride, int group, int bits) {
    float most = 0, differences = 0;
    for (int i = 0; i < group; i++) {
        const float number = to_float(row[i * column_stride]);
        most = std::fmax(most, std::fabs(number));
        differences += number - number;
    }
    return differences == 0 ? most / (bits == 8 ? 127 : 7) : NAN;
}

// One number of block `block`: output `n` of 16, input k.
inline void put_number(const Packed& w, uint8_t* block, int n, int k, int number) {
    if (w.bits == 8) {
        block[k / 4 * 64 + n * 4 + k % 4] = static_cast<uint8_t>(number + 128);
    } else {
        uint8_t* byte = block + k / 8 * 64 + n * 4 + k % 4;
        const int shift = k / 4 % 2 * 4, code = w.bits == FLOAT4 ? E2M1_CODES[number + 12] : number + 8;
        *byte = static_cast<uint8_t>((*byte & (0xf0 >> shift)) | (code << shift));
    }
}

// use(bits), of which the bits are known when it is compiled.
template <class Use> inline void with_bits(int bits, const Use& use) {
    if (bits == 8) use(std::integral_constant<int, 8>());
    if (bits == 4) use(std::integral_constant<int, 4>());
    if (bits == FLOAT4) use(std::integral_constant<int, FLOAT4>());
}

}  // namespace LEVEL
}  // namespace slingshot
