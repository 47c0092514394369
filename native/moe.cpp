#include "moe.h"

#include "matmul.h"
#include "scratch.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int GATHERED = 256;  // rows brought together at a time: they stay in the second cache

// One thread's part of one call. Rows are the tokens' assignments sorted by expert, then, for the shared experts, every
// token once.
template <class T> class Mixture {
    const MoeWeights& weights;
    const Router& router;
    const T* x;
    const int tokens;
    const Team& team;
    const int rows;              // assignments
    int *experts, *starts, *token_of, *row_of;
    float* gates;
    T *hidden, *shared_hidden, *made, *shared_made;

  public:
    Mixture(const MoeWeights& weights, const T* x, int tokens, const Team& team)
        : weights(weights), router(weights.router), x(x), tokens(tokens), team(team),
          rows(weights.inner ? tokens * weights.router.per_token : 0) {}

    // Cuts up the memory; gives its length.
    size_t carve(void* memory) {
        Carver carver{static_cast<char*>(memory)};
        experts = carver.take<int>(rows);
        gates = carver.take<float>(rows);
        // tiles read whole: 16 rows more than there are
        hidden = carver.take<T>(static_cast<size_t>(rows + 16) * padded_inner(weights.inner));
        shared_hidden = carver.take<T>(static_cast<size_t>(tokens + 16) * padded_inner(weights.shared_inner));
        made = carver.take<T>(static_cast<size_t>(rows) * weights.width);
        shared_made = carver.take<T>(weights.shared_inner ? static_cast<size_t>(tokens) * weights.width : 0);
        for (int i = 0; i < team.threads; i++) {
            int* own_starts = carver.take<int>(router.experts + 1);
            int* own_tokens = carver.take<int>(rows);
            int* own_rows = carver.take<int>(rows);
            if (i == team.thread) starts = own_starts, token_of = own_tokens, row_of = own_rows;
        }
        return carver.used;
    }

    void choose(int16_t* routed, int routed_stride) {
        const int begin = team.first(tokens), end = team.last(tokens);
        route(router, x, weights.width, begin, end, experts, gates);
        for (int token = begin; routed && token < end; token++)
            for (int i = 0; i < router.per_token; i++)
                routed[static_cast<size_t>(token) * routed_stride + i] =
                    static_cast<int16_t>(experts[token * router.per_token + i]);
    }

    // Sorts the assignments by expert. Every thread does it for itself: that is sooner done than waited for.
    void sort() {
        std::memset(starts, 0, (router.experts + 1) * sizeof(int));
        for (int i = 0; i < rows; i++) starts[experts[i] + 1]++;
        for (int e = 0; e < router.experts; e++) starts[e + 1] += starts[e];
        for (int i = 0; i < rows; i++) {
            const int row = starts[experts[i]]++;
            row_of[i] = row, token_of[row] = i / router.per_token;
        }
        for (int e = router.experts; e > 0; e--) starts[e] = starts[e - 1];
        starts[0] = 0;
    }

    // hidden = silu(gate(x)) up(x)
    void up() {
        share(padded_inner(weights.inner) / 16, padded_inner(weights.shared_inner) / 16, weights.width, weights.width,
              [&](int e, int begin, int end) {
                  const bool shared = e == router.experts;
                  const int first = shared ? 0 : starts[e], last = shared ? tokens : starts[e + 1];
                  const Packed w = shared ? weights.shared_gate_up : weights.gate_up[e];
                  const int inner = padded_inner(shared ? weights.shared_inner : weights.inner);
                  T* to = shared ? shared_hidden : hidden;
                  for (int row = first; row < last; row += GATHERED) {
                      const int count = last - row < GATHERED ? last - row : GATHERED;
                      const int stride = (weights.width + 31) / 32 * 32;
                      const T* own = gather(shared ? nullptr : token_of + row, row, count, stride);
                      matmul_each(w, 2 * begin, 2 * end, own, stride, count,
                                  [&](const float* piece, int ld, int r, int piece_rows, int n, int columns) {
                                      for (int i = 0; i < piece_rows; i++)
                                          swiglu(piece + i * ld, columns, to + static_cast<size_t>(row + r + i) * inner + n / 2);
                                  });
                  }
              });
    }

    // made = down(hidden)
    void down() {
        const int blocks = (weights.width + 31) / 32;
        share(blocks, weights.shared_inner ? blocks : 0, weights.inner, weights.shared_inner,
              [&](int e, int begin, int end) {
                  const bool shared = e == router.experts;
                  const int first = shared ? 0 : starts[e], last = shared ? tokens : starts[e + 1];
                  const Packed w = shared ? weights.shared_down : weights.down[e];
                  const int inner = padded_inner(shared ? weights.shared_inner : weights.inner);
                  const T* from = (shared ? shared_hidden : hidden) + static_cast<size_t>(first) * inner;
                  T* to = (shared ? shared_made : made) + static_cast<size_t>(first) * weights.width;
                  matmul_each(w, 2 * begin, 2 * end < w.blocks() ? 2 * end : w.blocks(), from, inner, last - first,
                              [&](const float* piece, int ld, int r, int piece_rows, int n, int columns) {
                                  for (int i = 0; i < piece_rows; i++)
                                      put_row(piece + i * ld, columns, to + static_cast<size_t>(r + i) * weights.width + n);
                              });
              });
    }

    // residual += the weighted sum of what the experts made, rounded where torch's path rounds: after each expert, after
    // the shared ones, and with the residual.
    void combine(T* residual) {
        const int width = weights.width;
        float* total = static_cast<float*>(thread_scratch(width * sizeof(float)));
        for (int token = team.first(tokens); token < team.last(tokens); token++) {
            for (int c = 0; c < width; c++) total[c] = 0;
            for (int i = token * router.per_token; i < (token + 1) * router.per_token && rows; i++) {
                const T* from = made + static_cast<size_t>(row_of[i]) * width;
                for (int c = 0; c < width; c++) total[c] = rounded<T>(total[c] + to_float(from[c]) * gates[i]);
            }
            if (weights.shared_inner) {
                const T* from = shared_made + static_cast<size_t>(token) * width;
                for (int c = 0; c < width; c++) total[c] = rounded<T>(total[c] + to_float(from[c]));
            }
            T* to = residual + static_cast<size_t>(token) * width;
            for (int c = 0; c < width; c++) put(to + c, to_float(to[c]) + total[c]);
        }
    }

  private:
    // This thread's share of the work: blocks of outputs of consecutive experts. Bringing an expert's weights costs as
    // much as some rows' products do. work(e, begin, end) gets the blocks; expert `router.experts` is the shared ones.
    template <class Work> void share(int blocks, int shared_blocks, int depth, int shared_depth, Work&& work) {
        constexpr double WEIGHTS = 6;
        auto cost = [&](int e) {
            const bool shared = e == router.experts;
            const int count = shared ? tokens : rows ? starts[e + 1] - starts[e] : 0;
            return count ? (WEIGHTS + count) * (shared ? shared_depth : depth) : 0;
        };
        auto blocks_of = [&](int e) { return e == router.experts ? shared_blocks : blocks; };
        double total = 0, before = 0;
        for (int e = 0; e <= router.experts; e++) total += cost(e) * blocks_of(e);
        const double from = total * team.thread / team.threads, to = total * (team.thread + 1) / team.threads;
        for (int e = 0; e <= router.experts; e++) {
            const double block = cost(e);
            if (block == 0) continue;
            auto place = [&](double at) {  // the same for the end of one thread's share and the next one's beginning
                const double place = (at - before) / block + 0.5;
                return place < 0 ? 0 : place > blocks_of(e) ? blocks_of(e) : static_cast<int>(place);
            };
            const int begin = place(from), end = team.thread + 1 == team.threads ? blocks_of(e) : place(to);
            if (begin < end) work(e, begin, end);
            before += block * blocks_of(e);
        }
    }

    // Rows of x side by side; tokens null: from `first` on.
    const T* gather(const int* tokens_of, int first, int count, int stride) {
        T* to = static_cast<T*>(thread_scratch((GATHERED + 16) * stride * sizeof(T)));
        for (int i = 0; i < count; i++) {
            const T* from = x + static_cast<size_t>(tokens_of ? tokens_of[i] : first + i) * weights.width;
            std::memcpy(to + i * stride, from, weights.width * sizeof(T));
            std::memset(to + i * stride + weights.width, 0, (stride - weights.width) * sizeof(T));
        }
        return to;
    }

    // 16 of gate, 16 of up, and so on.
    static void swiglu(const float* gate_up, int columns, T* to) {
        for (int c = 0; c < columns; c += 32, to += 16)
            for (int i = 0; i < 16; i += LANES) {
                const Floats gate = rounded<T>(load(gate_up + c + i)), up = rounded<T>(load(gate_up + c + 16 + i));
                store(to + i, mul(rounded<T>(silu(gate)), up));
            }
    }

    static void put_row(const float* from, int width, T* to) {
        int i = 0;
        for (; i + LANES <= width; i += LANES) store(to + i, load(from + i));
        for (; i < width; i++) put(to + i, from[i]);
    }
};

}  // namespace

template <class T> size_t moe_bytes(const MoeWeights& weights, int tokens, int threads) {
    return Mixture<T>(weights, nullptr, tokens, {0, threads, nullptr}).carve(nullptr);
}

template <class T>
void moe(const MoeWeights& weights, const T* x, int tokens, T* residual, int16_t* routed, int routed_stride, void* memory,
         const Team& team) {
    Mixture<T> mixture(weights, x, tokens, team);
    mixture.carve(memory);
    if (weights.inner) {
        mixture.choose(routed, routed_stride);
        team.barrier();
        mixture.sort();
    }
    mixture.up();
    team.barrier();
    mixture.down();
    team.barrier();
    mixture.combine(residual);
}

#define INSTANCES(T)                                                  \
    template size_t moe_bytes<T>(const MoeWeights&, int, int);        \
    template void moe(const MoeWeights&, const T*, int, T*, int16_t*, int, void*, const Team&);
INSTANCES(float)
INSTANCES(bf16)

}  // namespace LEVEL
}  // namespace slingshot
