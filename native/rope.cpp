#include "rope.h"

#include "entries.h"
#include "scratch.h"
#include "simd.h"

namespace slingshot {
namespace LEVEL {
namespace {

template <class T> inline void take_row(const T* from, int width, float* to) {
    for (int i = 0; i < width; i++) to[i] = to_float(from[i]);
}

template <class T> inline void put_row(const float* from, int width, T* to) {
    for (int i = 0; i < width; i++) put(to + i, from[i]);
}

// x / rms(x) rounded, times weight rounded, in place (model/linear.py's RMSNorm).
template <class T> inline void norm_row(float* x, const T* weight, int width, float eps) {
    Floats sums = zeros();
    int i = 0;
    for (; i + LANES <= width; i += LANES) sums = fma(load(x + i), load(x + i), sums);
    float squares = sum(sums);
    for (; i < width; i++) squares += x[i] * x[i];
    const float inverse = 1 / std::sqrt(squares / width + eps);
    for (i = 0; i < width; i++) x[i] = rounded<T>(rounded<T>(x[i] * inverse) * to_float(weight[i]));
}

// Pairs (first[i * APART], second[i * APART]) turned by their angles, to the two halves of `to`.
template <int APART, class T>
inline void turn(const float* first, const float* second, const float* cos, const float* sin, int half, T* to) {
    for (int i = 0; i < half; i++) {
        const float a = first[i * APART], b = second[i * APART];
        put(to + i, a * cos[i] - b * sin[i]);
        put(to + half + i, b * cos[i] + a * sin[i]);
    }
}

}  // namespace

template <class T>
void write_grouped(const GroupedHeads<T>& shape, const Places& places, const T* qkv, int qkv_stride, T* q, void* keys,
                   void* values, int thread, int threads) {
    const int width = shape.width, half = width / 2, all = shape.heads + 2 * shape.groups;
    const Entry entry{shape.form, width, 0};
    float* row = static_cast<float*>(thread_scratch(2 * width * sizeof(float)));
    T* turned = reinterpret_cast<T*>(row + width);
    const long items = static_cast<long>(places.tokens) * all;
    for (long item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
        const long token = item / all;
        const int head = static_cast<int>(item % all), group = (head - shape.heads) % shape.groups;
        const T* from = qkv + token * qkv_stride + head * width;
        const size_t place = (places.slots[token] * shape.groups + group) * entry.bytes(sizeof(T));
        if (head >= shape.heads + shape.groups) {
            put_entry(entry, from, static_cast<char*>(values) + place);
            continue;
        }
        const bool is_query = head < shape.heads;
        const T* norm = is_query ? shape.q_norm : shape.k_norm;
        take_row(from, width, row);
        if (norm) norm_row(row, norm, width, shape.eps);
        T* to = is_query ? q + (token * shape.heads + head) * width : turned;
        const long angles = places.positions[token] * half;
        turn<1>(row, row + half, places.cos + angles, places.sin + angles, half, to);
        if (!is_query) put_entry(entry, to, static_cast<char*>(keys) + place);
    }
}

template <class T>
void write_latent(const LatentHeads<T>& shape, const Places& places, const T* q, int q_stride, const T* kv,
                  int kv_stride, T* q_nope, T* q_absorbed, void* entries, int thread, int threads) {
    const int latent = shape.latent, rope = shape.rope, half = rope / 2, width = latent + rope;
    const Entry entry{shape.form, latent, rope};
    float* row = static_cast<float*>(thread_scratch(2 * width * sizeof(float)));
    T* made = reinterpret_cast<T*>(row + width);
    const long items = static_cast<long>(places.tokens) * (shape.heads + 1);  // heads, then the entry
    for (long item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
        const long token = item / (shape.heads + 1);
        const int head = static_cast<int>(item % (shape.heads + 1));
        const float* cos = places.cos + places.positions[token] * half;
        const float* sin = places.sin + places.positions[token] * half;
        if (head == shape.heads) {
            take_row(kv + token * kv_stride, width, row);
            norm_row(row, shape.norm, latent, shape.eps);
            put_row(row, latent, made);
            turn<2>(row + latent, row + latent + 1, cos, sin, half, made + latent);
            put_entry(entry, made, static_cast<char*>(entries) + places.slots[token] * entry.bytes(sizeof(T)));
        } else {
            const long place = token * shape.heads + head;
            const T* from = q + token * q_stride + head * (shape.nope + rope);
            T* to = q_nope + place * shape.nope_stride;
            std::memcpy(to, from, shape.nope * sizeof(T));
            std::memset(to + shape.nope, 0, (shape.nope_stride - shape.nope) * sizeof(T));
            take_row(from + shape.nope, rope, row);
            turn<2>(row, row + 1, cos, sin, half, q_absorbed + place * width + latent);
        }
    }
}

#define INSTANCES(T)                                                                                                   \
    template void write_grouped(const GroupedHeads<T>&, const Places&, const T*, int, T*, void*, void*, int, int);     \
    template void write_latent(const LatentHeads<T>&, const Places&, const T*, int, const T*, int, T*, T*, void*, int, int);
INSTANCES(float)
INSTANCES(bf16)

}  // namespace LEVEL
}  // namespace slingshot
