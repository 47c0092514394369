// Blocks of activations as operands of products over their rows: packed, and turned.
#pragma once

#include "packed.h"

namespace slingshot {
namespace LEVEL {

// x as numbers of T hold it, in all lanes.
template <class T> inline Floats as(Floats x) {
    alignas(64) T at[LANES];
    store(at, x);
    return load(at);
}
template <> inline Floats as<float>(Floats x) { return x; }

inline int up_to(int n, int step) { return (n + step - 1) / step * step; }

// 8 rows of 8 words, `stride` words apart, to columns `to_stride` words apart.
inline void transpose_words(const uint32_t* from, size_t stride, uint32_t* to, size_t to_stride) {
    alignas(64) uint32_t block[8 * 16];
    transpose_8(from, stride, block);
    for (int i = 0; i < 8; i++) std::memcpy(to + i * to_stride, block + i * 16, 32);
}

// M [k, n] (rows `ld` apart) as the right operand of x M: Packed{n, k}. `to` has room for n up to a multiple of 16
// and k up to one of 32; what is past the ends becomes zero, up to `fill` columns where that is more.
template <class Source, class T> void pack_columns(const Source* m, size_t ld, int k, int n, void* to, int fill = 0) {
    constexpr int PER_WORD = 4 / sizeof(T);
    const int depth = packed_depth<T>(k), last = fill > n ? fill : n;
    for (int b = 0; b * 16 < last; b++) {
        uint32_t* out = static_cast<uint32_t*>(to) + static_cast<size_t>(b) * depth * 16;
        const int columns = n - b * 16 < 16 ? n - b * 16 : 16;
        for (int word = 0; word < depth; word++, out += 16) {
            alignas(64) T lines[PER_WORD][16];
            for (int i = 0; i < PER_WORD; i++) {
                const int row = word * PER_WORD + i;
                const Source* from = m + static_cast<size_t>(row) * ld + b * 16;
                if (row < k && columns == 16) {
                    for (int c = 0; c < 16; c += LANES) store(lines[i] + c, load(from + c));
                    continue;
                }
                std::memset(lines[i], 0, sizeof lines[i]);
                if (row < k)
                    for (int c = 0; c < columns; c++) put(&lines[i][c], to_float(from[c]));
            }
            if constexpr (PER_WORD == 1) {
                std::memcpy(out, lines, 64);
            } else {
                const uint16_t *even = &lines[0][0].bits, *odd = &lines[1][0].bits;
                for (int c = 0; c < 16; c++) out[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
            }
        }
    }
}

// M [n, k] (rows `ld` apart) as the right operand of x M^T: Packed{n, k}.
template <class Source, class T> void pack_rows(const Source* m, size_t ld, int n, int k, void* to) {
    constexpr int PER_WORD = 4 / sizeof(T);
    const int depth = packed_depth<T>(k);
    for (int b = 0; b * 16 < n; b++) {
        uint32_t* out = static_cast<uint32_t*>(to) + static_cast<size_t>(b) * depth * 16;
        const int rows = n - b * 16 < 16 ? n - b * 16 : 16;
        const Source* first = m + static_cast<size_t>(b) * 16 * ld;
        for (int word = 0; word < depth; word += 8, out += 8 * 16) {
            constexpr int WIDE = 8 * PER_WORD;
            const int columns = k - word * PER_WORD < WIDE ? k - word * PER_WORD : WIDE;
            alignas(64) T part[16][WIDE];
            if (rows < 16 || columns < WIDE) std::memset(part, 0, sizeof part);
            for (int r = 0; r < rows; r++) {
                const Source* from = first + static_cast<size_t>(r) * ld + word * PER_WORD;
                if (columns == WIDE && WIDE % LANES == 0)
                    for (int c = 0; c < WIDE; c += LANES) store(part[r] + c, load(from + c));
                else
                    for (int c = 0; c < columns; c++) put(&part[r][c], to_float(from[c]));
            }
            alignas(64) uint32_t turned[8][16];
            const uint32_t* words = reinterpret_cast<const uint32_t*>(part);
            transpose_8(words, 8, turned[0]);
            transpose_8(words + 64, 8, turned[0] + 8);
            std::memcpy(out, turned, (depth - word < 8 ? depth - word : 8) * 64);
        }
    }
}

// What pack_columns made of M [k, n], as rows of M^T: n up to a multiple of 16 rows of packed_depth words.
template <class T> void turn(const void* packed, int k, int n, T* to) {
    const int depth = packed_depth<T>(k);
    uint32_t* out = reinterpret_cast<uint32_t*>(to);
    for (int b = 0; b * 16 < n; b++, out += static_cast<size_t>(depth) * 16) {
        const uint32_t* from = static_cast<const uint32_t*>(packed) + static_cast<size_t>(b) * depth * 16;
        int word = 0;
        for (; word + 8 <= depth; word += 8)
            for (int half = 0; half < 16; half += 8)
                transpose_words(from + word * 16 + half, 16, out + static_cast<size_t>(half) * depth + word, depth);
        for (; word < depth; word++)
            for (int c = 0; c < 16; c++) out[static_cast<size_t>(c) * depth + word] = from[word * 16 + c];
    }
}

}  // namespace LEVEL
}  // namespace slingshot
