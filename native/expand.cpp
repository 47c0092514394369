#include "expand.h"

#include "entries.h"
#include "matmul.h"
#include "scratch.h"

namespace slingshot {
namespace LEVEL {
namespace {

// Where a product's rows go, `stride` numbers apart, as numbers of T.
template <class T> struct Into {
    T* to;
    size_t stride;

    void operator()(const float* piece, int ld, int row, int rows, int n, int columns) const {
        for (int r = 0; r < rows; r++) {
            const float* from = piece + r * ld;
            T* at = to + (row + r) * stride + n;
            int c = 0;
            for (; c + LANES <= columns; c += LANES) store(at + c, load(from + c));
            for (; c < columns; c++) put(at + c, from[c]);
        }
    }
};

}  // namespace

template <class T>
void expand_entries(const LatentPlanner& plan, const LatentShape& shape, const Stack& to_keys, const Stack& to_values,
                    const void* entries, T* keys, T* values, const Team& team) {
    const Sequences& sequences = plan.absorbed.sequences;
    const Entry entry{shape.form, shape.latent, shape.rope};
    const int width = entry.width(), stride = (width + 31) / 32 * 32;
    const size_t bytes = entry.bytes(sizeof(T));
    const size_t key = shape.nope + shape.rope, heads = shape.heads;
    const int count = static_cast<int>(plan.pieces.size());
    for (int i = team.first(count); i < team.last(count); i++) {
        const ExpandedPiece& piece = plan.pieces[i];
        const int tokens = piece.end - piece.begin;
        T* own = static_cast<T*>(thread_scratch(static_cast<size_t>(tokens + 16) * stride * sizeof(T)));
        const int* pages = sequences.block_tables + static_cast<size_t>(piece.sequence) * sequences.pages;
        T* own_keys = keys + piece.row * heads * key;
        for (int t = 0; t < tokens; t++) {
            const int token = piece.begin + t;
            const size_t slot = static_cast<size_t>(pages[token / PAGE]) * PAGE + token % PAGE;
            T* row = own + t * stride;
            take_entry(entry, static_cast<const char*>(entries) + slot * bytes, row);
            std::memset(row + width, 0, (stride - width) * sizeof(T));
            for (size_t h = 0; h < heads; h++)
                std::memcpy(own_keys + (t * heads + h) * key + shape.nope, row + shape.latent, shape.rope * sizeof(T));
        }
        for (int h = 0; h < shape.heads; h++) {
            matmul_each(to_keys[h], 0, to_keys[h].blocks(), own, stride, tokens,
                        Into<T>{own_keys + h * key, heads * key});
            matmul_each(to_values[h], 0, to_values[h].blocks(), own, stride, tokens,
                        Into<T>{values + (piece.row * heads + h) * shape.value, heads * shape.value});
        }
    }
}

template <class T>
void expand_queries(const LatentPlanner& plan, const LatentShape& shape, const T* q_nope, int nope_stride,
                    const T* q_absorbed, T* q, const Team& team) {
    const int count = static_cast<int>(plan.tokens.size()), key = shape.nope + shape.rope;
    for (int i = team.first(count); i < team.last(count); i++)
        for (int h = 0; h < shape.heads; h++) {
            const size_t place = static_cast<size_t>(plan.tokens[i]) * shape.heads + h;
            std::memcpy(q + place * key, q_nope + place * nope_stride, shape.nope * sizeof(T));
            std::memcpy(q + place * key + shape.nope,
                        q_absorbed + place * (shape.latent + shape.rope) + shape.latent, shape.rope * sizeof(T));
        }
}

#define INSTANCES(T)                                                                                             \
    template void expand_entries(const LatentPlanner&, const LatentShape&, const Stack&, const Stack&, const void*, \
                                 T*, T*, const Team&);                                                              \
    template void expand_queries(const LatentPlanner&, const LatentShape&, const T*, int, const T*, T*, const Team&);
INSTANCES(float)
INSTANCES(bf16)

}  // namespace LEVEL
}  // namespace slingshot
