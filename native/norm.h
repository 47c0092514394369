// RMSNorm of whole rows: x / rms(x) rounded to T, times the weight rounded to T, as model/linear.py has it.
#pragma once

#include "simd.h"

namespace slingshot {
namespace LEVEL {

template <class T> inline void rms_norm(const T* x, const T* weight, int width, float eps, T* y) {
    Floats sums = zeros();
    int i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Floats part = load(x + i);
        sums = fma(part, part, sums);
    }
    float squares = sum(sums);
    for (; i < width; i++) squares += to_float(x[i]) * to_float(x[i]);
    const float inverse = 1 / std::sqrt(squares / width + eps);
    for (i = 0; i + LANES <= width; i += LANES)
        store(y + i, mul(rounded<T>(mul(load(x + i), all(inverse))), load(weight + i)));
    for (; i < width; i++) put(y + i, rounded<T>(to_float(x[i]) * inverse) * to_float(weight[i]));
}

}  // namespace LEVEL
}  // namespace slingshot
