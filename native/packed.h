// A weight matrix [n outputs, k inputs] in the order in which all kernels read it, and how it gets there.
//
// Words of 4 bytes: a float, or two bf16 neighbours in k. 16 outputs stand side by side: [n / 16][words of k][16]. One
// register so holds 16 outputs at one word of k, and 16 words of k are a tile of AMX. n and, for bf16, k are filled up
// with zeros: to multiples of 16 and 32.
//
// Quantized weights (quantized.h) have 4 or 8 neighbours in k in a word, and after each block's words its scales:
// [k / group][16] floats.
#pragma once

#include <cstddef>

#include "simd.h"

namespace slingshot {

struct Packed {
    int n = 0, k = 0;
    int depth = 0;  // words of k in memory
    const void* data = nullptr;
    int bits = 0, group = 0;  // of quantized weights
    bool by_bytes = false;    // their x is brought to 8 bits always, a row by its largest number

    int blocks() const { return (n + 15) / 16; }
    size_t block_words() const { return static_cast<size_t>(depth + (bits ? k / group : 0)) * 16; }
    template <class Word> const Word* block(int b) const { return static_cast<const Word*>(data) + b * block_words(); }
};

// Matrices of one shape, one after the other.
struct Stack {
    Packed first;
    size_t bytes;  // from one to the next

    Packed operator[](int i) const {
        Packed packed = first;
        packed.data = static_cast<const char*>(first.data) + i * bytes;
        return packed;
    }
};

template <class T> constexpr int packed_depth(int k) { return sizeof(T) == 4 ? k : (k + 31) / 32 * 16; }
template <class T> constexpr size_t packed_bytes(int n, int k) {
    return static_cast<size_t>((n + 15) / 16) * 64 * packed_depth<T>(k);
}

namespace LEVEL {

// Packs blocks begin to end of w, whose number (row, column) is at w[row * row_stride + column * column_stride]. Block b
// goes to the place of block b * step of `to`: with step 2, two matrices' blocks alternate.
template <class Source, class T>
void pack(const Source* w, size_t row_stride, size_t column_stride, int n, int k, int begin, int end, int step, void* to) {
    const int depth = packed_depth<T>(k);
    constexpr int PER_WORD = 4 / sizeof(T);
    for (int b = begin; b < end; b++) {
        uint32_t* out = static_cast<uint32_t*>(to) + static_cast<size_t>(b) * step * depth * 16;
        const int rows = n - b * 16 < 16 ? n - b * 16 : 16;
        const Source* first = w + b * 16 * row_stride;
        for (int word = 0; word < depth; word += 8, out += 8 * 16) {
            const int columns = k - word * PER_WORD < 8 * PER_WORD ? k - word * PER_WORD : 8 * PER_WORD;
            if (sizeof(Source) == sizeof(T) && column_stride == 1 && rows == 16 && columns == 8 * PER_WORD &&
                row_stride % PER_WORD == 0) {
                const uint32_t* from = reinterpret_cast<const uint32_t*>(first + word * PER_WORD);
                transpose_8(from, row_stride / PER_WORD, out);
                transpose_8(from + 8 * (row_stride / PER_WORD), row_stride / PER_WORD, out + 8);
                continue;
            }
            T part[16][8 * PER_WORD];
            std::memset(part, 0, sizeof part);
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < columns; c++)
                    put(&part[r][c], to_float(first[r * row_stride + (word * PER_WORD + c) * column_stride]));
            alignas(64) uint32_t turned[8][16];
            transpose_8(reinterpret_cast<const uint32_t*>(part), 8, turned[0]);
            transpose_8(reinterpret_cast<const uint32_t*>(part) + 64, 8, turned[0] + 8);
            const int words = depth - word < 8 ? depth - word : 8;
            std::memcpy(out, turned, words * 64);
        }
    }
}

// The numbers of one output, in order.
template <class T> inline void unpack_row(const Packed& packed, int row, T* to) {
    const uint32_t* word = packed.block<uint32_t>(row / 16) + row % 16;
    constexpr int PER_WORD = 4 / sizeof(T);
    for (int i = 0; i < packed.k; i += PER_WORD, word += 16)
        std::memcpy(to + i, word, (packed.k - i < PER_WORD ? packed.k - i : PER_WORD) * sizeof(T));
}

}  // namespace LEVEL
}  // namespace slingshot
