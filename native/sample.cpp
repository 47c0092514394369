// The next token of every row from its logits: engine/draw.py's `sample` without truncation, nothing stored but a sum
// for each chunk of the vocabulary.
#include <cmath>
#include <limits>

#include "doors.h"
#include "pool.h"
#include "simd.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int CHUNK = 256;
constexpr float NOTHING = std::numeric_limits<float>::quiet_NaN();

// The sum of e^((x - largest) / divisor); with `weights` these too.
inline float weigh(const float* x, int count, float largest, float inverse, float* weights) {
    Floats total = zeros();
    int at = 0;
    for (; at + LANES <= count; at += LANES) {
        const Floats weight = exp(mul(add(load(x + at), all(-largest)), all(inverse)));
        if (weights) store(weights + at, weight);
        total = add(total, weight);
    }
    float rest[LANES] = {};
    if (at < count) {
        float last[LANES];
        for (int lane = 0; lane < LANES; lane++) last[lane] = at + lane < count ? x[at + lane] : -INFINITY;
        store(rest, exp(mul(add(load(last), all(-largest)), all(inverse))));
        if (weights) std::memcpy(weights + at, rest, sizeof(float) * (count - at));
        total = add(total, load(rest));
    }
    return sum(total);
}

inline float largest_of(const float* x, int count, Floats* checked) {
    Floats largest = all(-INFINITY);
    int at = 0;
    for (; at + LANES <= count; at += LANES) {
        largest = max(load(x + at), largest);
        *checked = add(*checked, load(x + at));  // what is not a number stays one
    }
    float highest_of_all = highest(largest), odd = 0;
    for (; at < count; at++) {
        highest_of_all = x[at] > highest_of_all ? x[at] : highest_of_all;
        odd += x[at];
    }
    *checked = add(*checked, all(odd));
    return highest_of_all;
}

// The place at which cumulative weights pass `target`: never one of weight zero.
template <class W> int passing(const W* weights, int count, double target, double* before) {
    double sum = 0;
    int last = 0;
    for (int at = 0; at < count; at++) {
        if (!(weights[at] > 0)) continue;
        last = at;
        *before = sum;
        sum += weights[at];
        if (sum > target) return at;
    }
    return last;
}

void sample_row(const float* logits, int vocabulary, float divisor, float uniform, bool greedy, float* sums,
                int64_t* id, float* logprob) {
    const int chunks = (vocabulary + CHUNK - 1) / CHUNK;
    const auto size = [&](int chunk) { return chunk + 1 < chunks ? CHUNK : vocabulary - chunk * CHUNK; };
    Floats checked = zeros();
    float largest = -INFINITY;
    for (int chunk = 0; chunk < chunks; chunk++) {
        sums[chunk] = largest_of(logits + chunk * CHUNK, size(chunk), &checked);
        largest = sums[chunk] > largest ? sums[chunk] : largest;
    }
    *id = 0;
    *logprob = NOTHING;
    if (std::isnan(sum(checked)) || std::isinf(largest)) return;
    int chosen = 0;
    if (greedy) {
        while (sums[chosen] != largest) chosen++;
        const float* x = logits + chosen * CHUNK;
        while (x[*id] != largest) ++*id;
        *id += chosen * CHUNK;
    }
    double total = 0, before = 0;
    const float inverse = 1 / divisor;
    for (int chunk = 0; chunk < chunks; chunk++)
        total += sums[chunk] = weigh(logits + chunk * CHUNK, size(chunk), largest, inverse, nullptr);
    if (!greedy) {
        const double target = uniform * total;
        chosen = passing(sums, chunks, target, &before);
        float weights[CHUNK];
        weigh(logits + chosen * CHUNK, size(chosen), largest, inverse, weights);
        *id = chosen * CHUNK + passing(weights, size(chosen), target - before, &before);
    }
    *logprob = (logits[*id] - largest) * inverse - static_cast<float>(std::log(total));
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// logits [rows, vocabulary]; divisors, uniform, greedy, ids, logprobs [rows]; sums [rows, chunks of 256 ids] is scratch.
// Rows with a logit that is no number, or infinite, get a logprob that is none.
extern "C" void DOOR(sample)(int rows, int vocabulary, const float* logits, const float* divisors, const float* uniform,
                             const uint8_t* greedy, float* sums, int64_t* ids, float* logprobs, int threads) {
    const int chunks = (vocabulary + LEVEL::CHUNK - 1) / LEVEL::CHUNK;
    auto job = [&](const Team& team) {
        for (int row = team.first(rows); row < team.last(rows); row++)
            LEVEL::sample_row(logits + static_cast<int64_t>(row) * vocabulary, vocabulary, divisors[row], uniform[row],
                              greedy[row], sums + static_cast<int64_t>(row) * chunks, ids + row, logprobs + row);
    };
    run_together(threads < rows ? threads : rows, job);
}
