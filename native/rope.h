// Between the projections and attention: norms of heads, rotation, and the new tokens' entries written to their places
// in the cache. T is the model's dtype; numbers are rounded to it where torch's path has a tensor of it.
#pragma once

#include <cstdint>

namespace slingshot {

// Of every token of the step its position, and its place in the cache; cosine and sine of every position's angles are
// [positions, rotated width / 2].
struct Places {
    int tokens;
    const float *cos, *sin;
    const int64_t *positions, *slots;
};

// Grouped queries; the norms (Qwen3) may be null. form: a CacheForm (attention.h).
template <class T> struct GroupedHeads {
    int heads, groups, width, form;
    float eps;
    const T *q_norm, *k_norm;
};

// MLA; queries without their rope part are written `nope_stride` apart, zeros up to there.
template <class T> struct LatentHeads {
    int heads, nope, rope, latent, nope_stride, form;
    float eps;
    const T* norm;
};

namespace LEVEL {

// qkv [tokens, (heads + 2 groups) width], rows `qkv_stride` apart -> q [tokens, heads, width], entries keys and values
// [slots, groups]. Halves of a head rotate against each other.
template <class T>
void write_grouped(const GroupedHeads<T>& shape, const Places& places, const T* qkv, int qkv_stride, T* q, void* keys,
                   void* values, int thread, int threads);

// q [tokens, heads, nope + rope], rows `q_stride` apart, kv [tokens, latent + rope], rows `kv_stride` apart -> q_nope
// [tokens, heads, nope_stride], the last `rope` numbers of each head of q_absorbed [tokens, heads, latent + rope],
// entries [slots]. Neighbours rotate against each other and come out as halves.
template <class T>
void write_latent(const LatentHeads<T>& shape, const Places& places, const T* q, int q_stride, const T* kv,
                  int kv_stride, T* q_nope, T* q_absorbed, void* entries, int thread, int threads);

}  // namespace LEVEL
}  // namespace slingshot
