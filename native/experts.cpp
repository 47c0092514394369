// The routed experts of a training step, forward and backward, without a copy of their rows in memory: a block of an
// expert's rows is gathered, multiplied, activated and multiplied again within the second cache. The backward pass
// makes the hidden numbers again rather than keeping them.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "doors.h"
#include "matmul.h"
#include "share.h"
#include "tiles.h"
#include "turn.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int ROWS = 256;  // of a block

struct Shape {
    int tokens, k, experts, width, hidden;  // width D of the model, hidden F of an expert
    int D() const { return up_to(width, 32); }
    int F() const { return up_to(hidden, 32); }
};

// Memory at a cache line, zero at first, with room behind it for what tiles read past the end.
template <class T> struct Room {
    explicit Room(size_t count) : bytes(count * sizeof(T) + 4096 + 64, 0) {
        at = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
    }
    std::vector<uint8_t> bytes;
    T* at;
};

template <class T> size_t room_words(int n, int k) { return packed_bytes<T>(n, k) / 4; }

// What one thread computes in; kept from call to call, made anew for other widths. Where a width is filled up to one
// that the kernels like, the filling stays zero.
template <class T> struct Workspace {
    int width, hidden_width;
    Room<uint32_t> packed_up, packed_down, packed_back, columns_of, columns_too;
    Room<T> in, out, turned, gate_of, up_of, hidden, change;

    explicit Workspace(const Shape& s)
        : width(s.width), hidden_width(s.hidden), packed_up(room_words<T>(2 * s.F(), s.D())),
          packed_down(room_words<T>(up_to(std::max(s.D(), s.F()), 32), std::max(s.D(), s.F()))),
          packed_back(room_words<T>(s.D(), 2 * s.F())), columns_of(ROWS * most(s)), columns_too(ROWS * most(s)),
          in(ROWS * s.D()), out(ROWS * s.D()), turned(ROWS * most(s)), gate_of(ROWS * s.F()), up_of(ROWS * s.F()),
          hidden(ROWS * s.F()), change(ROWS * 2 * s.F()) {}

    static size_t most(const Shape& s) { return std::max(s.D(), 2 * s.F()) + 32; }
    static Workspace& of(const Shape& s) {
        static thread_local std::unique_ptr<Workspace> kept;
        if (!kept || kept->width != s.width || kept->hidden_width != s.hidden) kept = std::make_unique<Workspace>(s);
        return *kept;
    }
};

// Gate and up of one expert side by side, 16 outputs of each in turn; the rows of weight are [2, F, D].
template <class W, class T> void pack_gate_up(const W* weight, const Shape& s, uint32_t* to) {
    const size_t block = static_cast<size_t>(packed_depth<T>(s.width)) * 16;
    for (int half = 0; half < 2; half++)
        for (int n = 0; n < s.F(); n += 16) {
            uint32_t* out = to + (n / 16 * 2 + half) * block;
            const int rows = std::min(16, s.hidden - n);
            if (rows > 0)
                pack_rows<W, T>(weight + (static_cast<size_t>(half) * s.hidden + n) * s.width, s.width, rows,
                        s.width, out);
            else
                std::memset(out, 0, block * 4);
        }
}

// Experts are whole shares: each is summed by one thread, whatever the number of threads.
template <class F> void share_experts(int threads, const int* starts, int experts, F&& work) {
    std::vector<int> order(experts), owner(experts);
    std::iota(order.begin(), order.end(), 0);
    auto rows = [&](int e) { return starts[e + 1] - starts[e]; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return rows(a) > rows(b); });
    std::vector<long> load(threads, 0);
    for (int e : order) {
        owner[e] = static_cast<int>(std::min_element(load.begin(), load.end()) - load.begin());
        load[owner[e]] += rows(e) + 64;
    }
    share_rows(threads, threads, 1, [&](long first, long last) {
        for (int e : order)
            if (owner[e] >= first && owner[e] < last && rows(e)) work(e);
    });
}

template <class T>
void gather(const T* x, const int* order, int count, const Shape& s, T* to) {
    for (int r = 0; r < count; r++)
        std::memcpy(to + static_cast<size_t>(r) * s.D(), x + static_cast<size_t>(order[r] / s.k) * s.width,
                s.width * sizeof(T));
}

template <class T, class W>
void forward(const Shape& s, const T* x, const int* order, const int* starts, const W* gate_up, const W* down,
             const float* gates, const T* base, T* rows_of, T* y, int threads) {
    const int D = s.D(), F = s.F();
    share_experts(threads, starts, s.experts, [&](int e) {
        const TileRegisters tiles;
        auto& [of_width, of_hidden, packed_up, packed_down, packed_back, columns_of, columns_too, in, out, turned,
                gate_of,
               up_of, hidden, change] = Workspace<T>::of(s);
        pack_gate_up<W, T>(gate_up + static_cast<size_t>(e) * 2 * s.hidden * s.width, s, packed_up.at);
        pack_rows<W, T>(down + static_cast<size_t>(e) * s.width * s.hidden, s.hidden, s.width, s.hidden,
                packed_down.at);
        const Packed first{2 * F, s.width, packed_depth<T>(s.width), packed_up.at};
        const Packed second{s.width, s.hidden, packed_depth<T>(s.hidden), packed_down.at};
        for (int at = starts[e]; at < starts[e + 1]; at += ROWS) {
            const int count = std::min(ROWS, starts[e + 1] - at);
            gather(x, order + at, count, s, in.at);
            matmul_each(first, 0, first.blocks(), in.at, D, count,
                        [&](const float* piece, int ld, int row, int rows, int n, int columns) {
                            for (int r = 0; r < rows; r++)
                                for (int c = 0; c < columns; c += 32)
                                    for (int i = 0; i < 16; i += LANES) {
                                        const float* p = piece + r * ld + c + i;
                                        const Floats g = as<T>(load(p)), u = as<T>(load(p + 16));
                                        store(hidden.at + static_cast<size_t>(row + r) * F + (n + c) / 2 + i,
                                                mul(silu(g), u));
                                    }
                        });
            matmul_each(second, 0, second.blocks(), hidden.at, F, count,
                        [&](const float* piece, int ld, int row, int rows, int n, int columns) {
                            for (int r = 0; r < rows; r++) {
                                T* to = rows_of + static_cast<size_t>(order[at + row + r]) * s.width + n;
                                int c = 0;
                                for (; c + LANES <= columns; c += LANES) store(to + c, load(piece + r * ld + c));
                                for (; c < columns; c++) put(to + c, piece[r * ld + c]);
                            }
                        });
        }
    });
    share_rows(threads, s.tokens, 64, [&](long begin, long end) {
        for (long t = begin; t < end; t++) {
            const T* from = rows_of + static_cast<size_t>(t) * s.k * s.width;
            const T* plus = base ? base + static_cast<size_t>(t) * s.width : nullptr;
            T* to = y + static_cast<size_t>(t) * s.width;
            int c = 0;
            for (; c + LANES <= s.width; c += LANES) {
                Floats sum = plus ? load(plus + c) : zeros();
                for (int j = 0; j < s.k; j++) sum = fma(load(from + j * s.width + c), all(gates[t * s.k + j]), sum);
                store(to + c, sum);
            }
            for (; c < s.width; c++) {
                float sum = plus ? to_float(plus[c]) : 0.0f;
                for (int j = 0; j < s.k; j++) sum += to_float(from[j * s.width + c]) * gates[t * s.k + j];
                put(to + c, sum);
            }
        }
    });
}

// dw [n, k_out] += A B over a block's rows: a is turned [n][depth], b packed.
template <class T>
void add_product(const Packed& b, const T* a, size_t lda, int rows, int columns, float* to, size_t ld_to) {
    matmul_each(b, 0, b.blocks(), a, lda, rows, [&](const float* piece, int ld, int row, int count, int n, int width) {
        const int here = std::min(width, columns - n);
        for (int r = 0; r < count; r++) {
            float* out = to + static_cast<size_t>(row + r) * ld_to + n;
            int c = 0;
            for (; c + LANES <= here; c += LANES) store(out + c, add(load(out + c), load(piece + r * ld + c)));
            for (; c < here; c++) out[c] += piece[r * ld + c];
        }
    });
}

template <class T, class W>
void backward(const Shape& s, const T* grad, const T* x, const int* order, const int* starts, const W* gate_up,
              const W* down, const float* gates, T* rows_of, T* dx, float* dgates, float* dgate_up, float* ddown,
              int threads) {
    const int D = s.D(), F = s.F();
    share_experts(threads, starts, s.experts, [&](int e) {
        const TileRegisters tiles;
        auto& [of_width, of_hidden, packed_up, packed_down, packed_back, columns_of, columns_too, in, out, turned,
                gate_of,
               up_of, hidden, change] = Workspace<T>::of(s);
        const W* mine_up = gate_up + static_cast<size_t>(e) * 2 * s.hidden * s.width;
        const W* mine_down = down + static_cast<size_t>(e) * s.width * s.hidden;
        pack_gate_up<W, T>(mine_up, s, packed_up.at);
        pack_columns<W, T>(mine_down, s.hidden, s.width, s.hidden, packed_down.at, F);
        // [dgate, dup] times the rows of gate and up: in the padded order of `change`
        std::vector<W> both(static_cast<size_t>(2) * F * s.width, W{});
        for (int half = 0; half < 2; half++)
            std::memcpy(both.data() + static_cast<size_t>(half) * F * s.width,
                        mine_up + static_cast<size_t>(half) * s.hidden * s.width, sizeof(W) * s.hidden * s.width);
        pack_columns<W, T>(both.data(), s.width, 2 * F, s.width, packed_back.at);
        const Packed first{2 * F, s.width, packed_depth<T>(s.width), packed_up.at};
        const Packed back_down{F, s.width, packed_depth<T>(s.width), packed_down.at};
        const Packed back_up{s.width, 2 * F, packed_depth<T>(2 * F), packed_back.at};
        float* own_up = dgate_up + static_cast<size_t>(e) * 2 * s.hidden * s.width;
        float* own_down = ddown + static_cast<size_t>(e) * s.width * s.hidden;
        for (int at = starts[e]; at < starts[e + 1]; at += ROWS) {
            const int count = std::min(ROWS, starts[e + 1] - at);
            gather(x, order + at, count, s, in.at);
            gather(grad, order + at, count, s, out.at);
            matmul_each(first, 0, first.blocks(), in.at, D, count,
                        [&](const float* piece, int ld, int row, int rows, int n, int columns) {
                            for (int r = 0; r < rows; r++)
                                for (int c = 0; c < columns; c += 32)
                                    for (int i = 0; i < 16; i += LANES) {
                                        const float* p = piece + r * ld + c + i;
                                        const size_t to = static_cast<size_t>(row + r) * F + (n + c) / 2 + i;
                                        store(gate_of.at + to, load(p));
                                        store(up_of.at + to, load(p + 16));
                                    }
                        });
            float dots[ROWS] = {};
            matmul_each(back_down, 0, back_down.blocks(), out.at, D, count,
                        [&](const float* piece, int ld, int row, int rows, int n, int columns) {
                            for (int r = 0; r < rows; r++) {
                                const int slot = order[at + row + r];
                                const Floats gate = all(gates[slot]);
                                const size_t start = static_cast<size_t>(row + r) * F + n;
                                T* change_of = change.at + static_cast<size_t>(row + r) * 2 * F + n;
                                Floats dot = zeros();
                                for (int c = 0; c < columns; c += LANES) {
                                    const Floats d = load(piece + r * ld + c), g = load(gate_of.at + start + c);
                                    const Floats u = load(up_of.at + start + c), dh = mul(d, gate);
                                    const Floats sig = div(all(1.0f), add(all(1.0f), exp(mul(g, all(-1.0f)))));
                                    const Floats y = mul(g, sig), h = mul(y, u);
                                    dot = fma(d, h, dot);
                                    store(hidden.at + start + c, mul(h, gate));
                                    const Floats slope = fma(mul(y, all(-1.0f)), sig, add(sig, y));
                                    store(change_of + c, mul(mul(dh, u), slope));
                                    store(change_of + F + c, mul(dh, y));
                                }
                                dots[row + r] += sum(dot);
                            }
                        });
            for (int r = 0; r < count; r++) dgates[order[at + r]] = dots[r];
            matmul_each(back_up, 0, back_up.blocks(), change.at, 2 * F, count,
                        [&](const float* piece, int ld, int row, int rows, int n, int columns) {
                            for (int r = 0; r < rows; r++) {
                                T* to = rows_of + static_cast<size_t>(order[at + row + r]) * s.width + n;
                                int c = 0;
                                for (; c + LANES <= columns; c += LANES) store(to + c, load(piece + r * ld + c));
                                for (; c < columns; c++) put(to + c, piece[r * ld + c]);
                            }
                        });
            // sums over the block's rows
            const int depth = packed_depth<T>(count), ld = depth * (4 / static_cast<int>(sizeof(T)));
            pack_columns<T, T>(hidden.at, F, count, s.hidden, columns_of.at);
            pack_columns<T, T>(out.at, D, count, s.width, columns_too.at);
            turn<T>(columns_too.at, count, s.width, turned.at);
            add_product<T>({s.hidden, count, depth, columns_of.at}, turned.at, ld, s.width, s.hidden, own_down,
                    s.hidden);
            pack_columns<T, T>(in.at, D, count, s.width, columns_of.at);
            for (int half = 0; half < 2; half++) {
                pack_columns<T, T>(change.at + half * F, 2 * F, count, s.hidden, columns_too.at);
                turn<T>(columns_too.at, count, s.hidden, turned.at);
                add_product<T>({s.width, count, depth, columns_of.at}, turned.at, ld, s.hidden, s.width,
                               own_up + static_cast<size_t>(half) * s.hidden * s.width, s.width);
            }
        }
    });
    share_rows(threads, s.tokens, 64, [&](long begin, long end) {
        for (long t = begin; t < end; t++) {
            const T* from = rows_of + static_cast<size_t>(t) * s.k * s.width;
            T* to = dx + static_cast<size_t>(t) * s.width;
            int c = 0;
            for (; c + LANES <= s.width; c += LANES) {
                Floats sum = zeros();
                for (int j = 0; j < s.k; j++) sum = add(sum, load(from + j * s.width + c));
                store(to + c, sum);
            }
            for (; c < s.width; c++) {
                float sum = 0;
                for (int j = 0; j < s.k; j++) sum += to_float(from[j * s.width + c]);
                put(to + c, sum);
            }
        }
    });
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// order [A]: assignments (token * k + choice) by expert, in order within each; starts [experts + 1]: where each begins.
extern "C" void DOOR(experts_order)(int, const int64_t* experts, long assignments, long count, int* order,
        int* starts, int) {
    std::vector<int> next(count + 1, 0);
    for (long a = 0; a < assignments; a++) next[experts[a] + 1]++;
    for (long e = 0; e < count; e++) next[e + 1] += next[e];
    for (long e = 0; e <= count; e++) starts[e] = next[e];
    for (long a = 0; a < assignments; a++) order[next[experts[a]]++] = static_cast<int>(a);
}

#define WITH_TYPES(call)                                                          \
    do {                                                                          \
        if (is_bf16 && weights_bf16) { using T = bf16; using W = bf16; call; }    \
        if (is_bf16 && !weights_bf16) { using T = bf16; using W = float; call; }  \
        if (!is_bf16) { using T = float; using W = float; call; }                 \
    } while (0)
#define OF(T, p) static_cast<T*>(p)

extern "C" void DOOR(experts_forward)(int is_bf16, int weights_bf16, long tokens, long k, long experts, long width,
                                      long hidden, const void* x, const int* order, const int* starts,
                                      const void* gate_up, const void* down, const float* gates, const void* base,
                                      void* rows_of, void* y, int threads) {
    const LEVEL::Shape s{(int)tokens, (int)k, (int)experts, (int)width, (int)hidden};
    WITH_TYPES((LEVEL::forward<T, W>(s, OF(const T, x), order, starts, OF(const W, gate_up), OF(const W, down), gates,
                                     OF(const T, base), OF(T, rows_of), OF(T, y), threads)));
}

extern "C" void DOOR(experts_backward)(int is_bf16, int weights_bf16, long tokens, long k, long experts, long width,
                                       long hidden, const void* grad, const void* x, const int* order,
                                       const int* starts, const void* gate_up, const void* down, const float* gates,
                                       void* rows_of, void* dx, float* dgates, float* dgate_up, float* ddown,
                                       int threads) {
    const LEVEL::Shape s{(int)tokens, (int)k, (int)experts, (int)width, (int)hidden};
    WITH_TYPES((LEVEL::backward<T, W>(s, OF(const T, grad), OF(const T, x), order, starts, OF(const W, gate_up),
                                      OF(const W, down), gates, OF(T, rows_of), OF(T, dx), dgates, dgate_up, ddown,
                                      threads)));
}
