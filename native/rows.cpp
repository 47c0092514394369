// What a training step does row by row, forward and backward: RMSNorm, SwiGLU, log-probabilities. Each reads and writes
// every number once, in its own type (float or bf16), and computes in float.
#include "doors.h"
#include "share.h"
#include "turn.h"

#include <vector>

namespace slingshot {
namespace LEVEL {
namespace {

template <class T> struct Line {
    // A row with zeros behind it, where its width is no multiple of LANES.
    const T* of(const T* row, int width) {
        if (width % LANES == 0) return row;
        copy.assign((width + LANES - 1) / LANES * LANES, T{});
        std::memcpy(copy.data(), row, width * sizeof(T));
        return copy.data();
    }
    T* to(T* row, int width) {
        if (width % LANES == 0) return row;
        copy.resize((width + LANES - 1) / LANES * LANES);
        return copy.data();
    }
    void done(T* row, int width) {
        if (width % LANES) std::memcpy(row, copy.data(), width * sizeof(T));
    }
    std::vector<T> copy;
};

// The gains as the activations' type holds them, zeros behind.
template <class T> std::vector<float> gains(const float* weight, int width) {
    std::vector<float> w((width + LANES - 1) / LANES * LANES, 0.0f);
    for (int i = 0; i < width; i++) w[i] = rounded<T>(weight[i]);
    return w;
}

constexpr int GRAIN = 64;  // rows whose share of a sum over all rows is made at once, whatever the number of threads

template <class T>
void norm_forward(const T* x, long x_ld, const T* more, const float* weight, float eps, long rows, int width,
        T* sum, T* y,
                  float* inverse, int threads) {
    const std::vector<float> w = gains<T>(weight, width);
    share_rows(threads, rows, GRAIN, [&](long begin, long end) {
        Line<T> in, plus, out, total;
        for (long r = begin; r < end; r++) {
            const T* from = in.of(x + r * x_ld, width);
            if (more) {
                const T* other = plus.of(more + r * width, width);
                T* to = total.to(sum + r * width, width);
                for (int i = 0; i < width; i += LANES) store(to + i, add(load(from + i), load(other + i)));
                total.done(sum + r * width, width);
                from = to;
            }
            Floats squares = zeros();
            for (int i = 0; i < width; i += LANES) {
                const Floats v = load(from + i);
                squares = fma(v, v, squares);
            }
            const float scale = 1.0f / std::sqrt(LEVEL::sum(squares) / width + eps);
            inverse[r] = scale;
            T* to = out.to(y + r * width, width);
            const Floats s = all(scale);
            for (int i = 0; i < width; i += LANES) store(to + i, mul(as<T>(mul(load(from + i), s)), load(&w[i])));
            out.done(y + r * width, width);
        }
    });
}

// dx = inverse (g w - n mean(g w n)) + kept, n = x inverse; dweight = sum over rows of g n.
template <class T>
void norm_backward(const T* grad, const T* kept, const T* x, long x_ld, const float* weight, const float* inverse,
                   long rows, int width, T* dx, float* dweight, int threads) {
    const std::vector<float> w = gains<T>(weight, width);
    const int padded = static_cast<int>(w.size());
    const long grains = (rows + GRAIN - 1) / GRAIN;
    std::vector<float> parts(grains * padded, 0.0f);
    share_rows(threads, grains, 1, [&](long first, long last) {
        Line<T> gradient, in, passed, out;
        for (long part = first; part < last; part++) {
            float* dw = parts.data() + part * padded;
            for (long r = part * GRAIN; r < rows && r < (part + 1) * GRAIN; r++) {
                const T *g = gradient.of(grad + r * width, width), *from = in.of(x + r * x_ld, width);
                const Floats scale = all(inverse[r]);
                Floats dot = zeros();
                for (int i = 0; i < width; i += LANES) {
                    const Floats n = as<T>(mul(load(from + i), scale)), gi = load(g + i), gn = mul(gi, n);
                    store(dw + i, add(load(dw + i), gn));
                    dot = fma(gn, load(&w[i]), dot);
                }
                const Floats mean = all(-LEVEL::sum(dot) / width);
                const T* plus = kept ? passed.of(kept + r * width, width) : nullptr;
                T* to = out.to(dx + r * width, width);
                for (int i = 0; i < width; i += LANES) {
                    const Floats n = as<T>(mul(load(from + i), scale));
                    const Floats d = fma(n, mean, mul(load(g + i), load(&w[i])));
                    store(to + i, plus ? fma(d, scale, load(plus + i)) : mul(d, scale));
                }
                out.done(dx + r * width, width);
            }
        }
    });
    for (int i = 0; i < width; i++) dweight[i] = 0.0f;
    for (long part = 0; part < grains; part++)
        for (int i = 0; i < width; i++) dweight[i] += parts[part * padded + i];
}

// y = silu(gate) up; rows of gate and up lie `ld` numbers apart.
template <class T>
void swiglu_forward(const T* gate, const T* up, long ld, long rows, int width, T* y, int threads) {
    share_rows(threads, rows, GRAIN, [&](long begin, long end) {
        Line<T> first, second, out;
        for (long r = begin; r < end; r++) {
            const T *g = first.of(gate + r * ld, width), *u = second.of(up + r * ld, width);
            T* to = out.to(y + r * width, width);
            for (int i = 0; i < width; i += LANES) store(to + i, mul(as<T>(silu(load(g + i))), load(u + i)));
            out.done(y + r * width, width);
        }
    });
}

template <class T>
void swiglu_backward(const T* grad, const T* gate, const T* up, long ld, long rows, int width, T* dgate, T* dup,
                     int threads) {
    share_rows(threads, rows, GRAIN, [&](long begin, long end) {
        Line<T> gradient, first, second, out_gate, out_up;
        const Floats one = all(1.0f);
        for (long r = begin; r < end; r++) {
            const T* d = gradient.of(grad + r * width, width);
            const T *g = first.of(gate + r * ld, width), *u = second.of(up + r * ld, width);
            T *to_gate = out_gate.to(dgate + r * ld, width), *to_up = out_up.to(dup + r * ld, width);
            for (int i = 0; i < width; i += LANES) {
                const Floats x = load(g + i), dy = load(d + i);
                const Floats s = div(one, add(one, exp(mul(x, all(-1.0f))))), y = mul(x, s);
                // silu' = s (1 + x (1 - s)) = s + y - y s
                store(to_gate + i, mul(mul(dy, load(u + i)), fma(mul(y, all(-1.0f)), s, add(s, y))));
                store(to_up + i, mul(dy, y));
            }
            out_gate.done(dgate + r * ld, width);
            out_up.done(dup + r * ld, width);
        }
    });
}

inline float at(const float* x, long i) { return x[i]; }
inline float at(const bf16* x, long i) { return to_float(x[i]); }

// log p(target) of logits / temperature, the logarithm of the sum of exponentials, and (asked for) the entropy.
template <class T>
void logprobs_forward(const T* logits, const int64_t* targets, float sharpness, long rows, int vocabulary,
                      float* logprob, float* lse, float* entropy, int threads) {
    share_rows(threads, rows, 16, [&](long begin, long end) {
        const Floats by = all(sharpness);
        const int whole = vocabulary / LANES * LANES;
        for (long r = begin; r < end; r++) {
            const T* x = logits + r * vocabulary;
            Floats highest = all(-INFINITY);
            for (int i = 0; i < whole; i += LANES) highest = LEVEL::max(highest, mul(load(x + i), by));
            float top = LEVEL::highest(highest);
            for (int i = whole; i < vocabulary; i++) top = std::fmax(top, at(x, i) * sharpness);
            Floats total = zeros(), weighted = zeros();
            const Floats low = all(-top);
            for (int i = 0; i < whole; i += LANES) {
                const Floats below = fma(load(x + i), by, low), e = exp(below);
                total = add(total, e);
                weighted = fma(e, below, weighted);
            }
            float z = LEVEL::sum(total), mean = LEVEL::sum(weighted);
            for (int i = whole; i < vocabulary; i++) {
                const float below = at(x, i) * sharpness - top, e = std::exp(below);
                z += e;
                mean += e > 0 ? e * below : 0.0f;
            }
            lse[r] = top + std::log(z);
            logprob[r] = (at(x, targets[r]) * sharpness - top) - std::log(z);
            if (entropy) entropy[r] = std::log(z) - mean / z;
        }
    });
}

// d logits = grad sharpness (1 at the target - softmax)
template <class T>
void logprobs_backward(const T* logits, const int64_t* targets, float sharpness, const float* lse, const float* grad,
                       long rows, int vocabulary, T* dlogits, int threads) {
    share_rows(threads, rows, 16, [&](long begin, long end) {
        const Floats by = all(sharpness);
        const int whole = vocabulary / LANES * LANES;
        for (long r = begin; r < end; r++) {
            const T* x = logits + r * vocabulary;
            T* to = dlogits + r * vocabulary;
            const float scale = grad[r] * sharpness;
            const Floats low = all(-lse[r]), down = all(-scale);
            const float p = std::exp(at(x, targets[r]) * sharpness - lse[r]);
            for (int i = 0; i < whole; i += LANES) store(to + i, mul(exp(fma(load(x + i), by, low)), down));
            for (int i = whole; i < vocabulary; i++) put(to + i, -scale * std::exp(at(x, i) * sharpness - lse[r]));
            put(to + targets[r], scale * (1.0f - p));
        }
    });
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// Pointers are to numbers of one type: bf16 or float; weights of norms, inverses, gradients of them are float.
#define OF(T, p) static_cast<T*>(p)

#define EITHER(function, ...)                       \
    do {                                            \
        if (is_bf16) {                              \
            using T = bf16;                         \
            LEVEL::function<T>(__VA_ARGS__);        \
        } else {                                    \
            using T = float;                        \
            LEVEL::function<T>(__VA_ARGS__);        \
        }                                           \
    } while (0)

extern "C" void DOOR(norm_forward)(int is_bf16, const void* x, long x_ld, const void* more, const float* weight,
                                   float eps, long rows, int width, void* sum, void* y, float* inverse, int threads) {
    EITHER(norm_forward, OF(const T, x), x_ld, OF(const T, more), weight, eps, rows, width, OF(T, sum), OF(T, y),
            inverse,
           threads);
}

extern "C" void DOOR(norm_backward)(int is_bf16, const void* grad, const void* kept, const void* x, long x_ld,
                                    const float* weight, const float* inverse, long rows, int width, void* dx,
                                    float* dweight, int threads) {
    EITHER(norm_backward, OF(const T, grad), OF(const T, kept), OF(const T, x), x_ld, weight, inverse, rows, width,
           OF(T, dx), dweight, threads);
}

extern "C" void DOOR(swiglu_forward)(int is_bf16, const void* gate, const void* up, long ld, long rows, int width,
                                     void* y, int threads) {
    EITHER(swiglu_forward, OF(const T, gate), OF(const T, up), ld, rows, width, OF(T, y), threads);
}

extern "C" void DOOR(swiglu_backward)(int is_bf16, const void* grad, const void* gate, const void* up, long ld,
                                      long rows, int width, void* dgate, void* dup, int threads) {
    EITHER(swiglu_backward, OF(const T, grad), OF(const T, gate), OF(const T, up), ld, rows, width, OF(T, dgate),
           OF(T, dup), threads);
}

extern "C" void DOOR(logprobs_forward)(int is_bf16, const void* logits, const int64_t* targets, float sharpness,
                                       long rows, int vocabulary, float* logprob, float* lse, float* entropy,
                                       int threads) {
    EITHER(logprobs_forward, OF(const T, logits), targets, sharpness, rows, vocabulary, logprob, lse, entropy, threads);
}

extern "C" void DOOR(logprobs_backward)(int is_bf16, const void* logits, const int64_t* targets, float sharpness,
                                        const float* lse, const float* grad, long rows, int vocabulary, void* dlogits,
                                        int threads) {
    EITHER(logprobs_backward, OF(const T, logits), targets, sharpness, lse, grad, rows, vocabulary, OF(T, dlogits),
           threads);
}
