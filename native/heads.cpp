// Queries or keys of a training step from their two parts: numbers that stay as they are, then pairs turned by their
// position's angle, which all heads may share. Forward and backward in one pass over memory.
#include <vector>

#include "doors.h"
#include "share.h"
#include "simd.h"

namespace slingshot {
namespace LEVEL {
namespace {

// `pairs` of a head; interleaved ones stand side by side, others `pairs` numbers apart. What comes out is half-split.
struct Parts {
    long tokens;
    int heads, plain, pairs, shared, interleaved;
    int first(int i) const { return interleaved ? 2 * i : i; }
    int second(int i) const { return interleaved ? 2 * i + 1 : i + pairs; }
    int width() const { return plain + 2 * pairs; }
};

template <class T>
void heads_forward(const Parts& p, const T* plain, long plain_token, long plain_head, const T* turned,
        long turned_token,
                   long turned_head, const float* cosines, const float* sines, T* y, int threads) {
    share_rows(threads, p.tokens, 64, [&](long begin, long end) {
        for (long t = begin; t < end; t++) {
            const float *c = cosines + t * p.pairs, *s = sines + t * p.pairs;
            for (int h = 0; h < p.heads; h++) {
                T* to = y + (t * p.heads + h) * p.width();
                if (p.plain) std::memcpy(to, plain + t * plain_token + h * plain_head, p.plain * sizeof(T));
                const T* x = turned + t * turned_token + (p.shared ? 0 : h) * turned_head;
                for (int i = 0; i < p.pairs; i++) {
                    const float a = to_float(x[p.first(i)]), b = to_float(x[p.second(i)]);
                    put(to + p.plain + i, a * c[i] - b * s[i]);
                    put(to + p.plain + p.pairs + i, b * c[i] + a * s[i]);
                }
            }
        }
    });
}

template <class T>
void heads_backward(const Parts& p, const T* grad, const float* cosines, const float* sines, T* dplain, T* dturned,
                    int threads) {
    share_rows(threads, p.tokens, 64, [&](long begin, long end) {
        std::vector<float> sum(2 * p.pairs);
        for (long t = begin; t < end; t++) {
            const float *c = cosines + t * p.pairs, *s = sines + t * p.pairs;
            for (int h = 0; h < p.heads; h++) {
                const T* g = grad + (t * p.heads + h) * p.width();
                if (p.plain) std::memcpy(dplain + (t * p.heads + h) * p.plain, g, p.plain * sizeof(T));
                const bool fresh = !p.shared || h == 0, done = !p.shared || h == p.heads - 1;
                T* to = dturned + (p.shared ? t : t * p.heads + h) * 2 * p.pairs;
                for (int i = 0; i < p.pairs; i++) {
                    const float first = to_float(g[p.plain + i]), second = to_float(g[p.plain + p.pairs + i]);
                    const float a = first * c[i] + second * s[i], b = second * c[i] - first * s[i];
                    sum[p.first(i)] = fresh ? a : sum[p.first(i)] + a;
                    sum[p.second(i)] = fresh ? b : sum[p.second(i)] + b;
                }
                if (done)
                    for (int i = 0; i < 2 * p.pairs; i++) put(to + i, sum[i]);
            }
        }
    });
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

#define PARTS_OF {tokens, (int)heads, (int)plain, (int)pairs, (int)shared, (int)interleaved}

extern "C" void DOOR(heads_forward)(int is_bf16, long tokens, long heads, long plain, long pairs, long shared,
                                    long interleaved, const void* still, long still_token, long still_head,
                                    const void* turned, long turned_token, long turned_head, const float* cosines,
                                    const float* sines, void* y, int threads) {
    if (is_bf16)
        LEVEL::heads_forward<bf16>(PARTS_OF, static_cast<const bf16*>(still), still_token, still_head,
                                   static_cast<const bf16*>(turned), turned_token, turned_head, cosines, sines,
                                   static_cast<bf16*>(y), threads);
    else
        LEVEL::heads_forward<float>(PARTS_OF, static_cast<const float*>(still), still_token, still_head,
                                    static_cast<const float*>(turned), turned_token, turned_head, cosines, sines,
                                    static_cast<float*>(y), threads);
}

extern "C" void DOOR(heads_backward)(int is_bf16, long tokens, long heads, long plain, long pairs, long shared,
                                     long interleaved, const void* grad, const float* cosines, const float* sines,
                                     void* dplain, void* dturned, int threads) {
    if (is_bf16)
        LEVEL::heads_backward<bf16>(PARTS_OF, static_cast<const bf16*>(grad), cosines, sines,
                                    static_cast<bf16*>(dplain), static_cast<bf16*>(dturned), threads);
    else
        LEVEL::heads_backward<float>(PARTS_OF, static_cast<const float*>(grad), cosines, sines,
                                     static_cast<float*>(dplain), static_cast<float*>(dturned), threads);
}
