// What becomes of the pieces of a product (matmul.h): rounded to T as torch's Linear gives them, and stored, added to
// the residual, or made one of gate and up.
#pragma once

#include "matmul.h"
#include "norm.h"

namespace slingshot {
namespace LEVEL {

// y[row][n] = x W^T + bias; bias may be null.
template <class T> struct Stored {
    T* y;
    size_t stride;
    const float* bias;

    void operator()(const float* piece, int ld, int row, int rows, int n, int columns) const {
        for (int r = 0; r < rows; r++) {
            const float* from = piece + r * ld;
            T* to = y + (row + r) * stride + n;
            int c = 0;
            for (; c + LANES <= columns; c += LANES)
                store(to + c, bias ? add(load(from + c), load(bias + n + c)) : load(from + c));
            for (; c < columns; c++) put(to + c, bias ? from[c] + bias[n + c] : from[c]);
        }
    }
};

// residual += x W^T, both numbers and their sum rounded.
template <class T> struct Added {
    T* residual;
    size_t stride;

    void operator()(const float* piece, int ld, int row, int rows, int n, int columns) const {
        for (int r = 0; r < rows; r++) {
            const float* from = piece + r * ld;
            T* to = residual + (row + r) * stride + n;
            int c = 0;
            for (; c + LANES <= columns; c += LANES) store(to + c, add(load(to + c), rounded<T>(load(from + c))));
            for (; c < columns; c++) put(to + c, to_float(to[c]) + rounded<T>(from[c]));
        }
    }
};

// y[row][n / 2] = silu(gate) up, where blocks of 16 of gate and up alternate.
template <class T> struct Gated {
    T* y;
    size_t stride;

    void operator()(const float* piece, int ld, int row, int rows, int n, int columns) const {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c += 32)
                for (int i = 0; i < 16; i += LANES) {
                    const float* from = piece + r * ld + c + i;
                    const Floats gate = rounded<T>(silu(rounded<T>(load(from))));
                    store(y + (row + r) * stride + (n + c) / 2 + i, mul(gate, rounded<T>(load(from + 16))));
                }
    }
};

}  // namespace LEVEL
}  // namespace slingshot
