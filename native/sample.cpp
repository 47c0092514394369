// The next token of every row from its logits: engine/draw.py's `sample`. Nothing is stored of a vocabulary but a few
// numbers for each chunk of it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "doors.h"
#include "pool.h"
#include "sample.h"
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

// One row on its way to a token.
struct Row {
    const float* logits;
    int vocabulary;
    float inverse;  // of the temperature
    float* sums;    // of each chunk
    float* peaks;   // its largest logit
    float largest = -INFINITY;

    int chunks() const { return (vocabulary + CHUNK - 1) / CHUNK; }
    int size(int chunk) const { return chunk + 1 < chunks() ? CHUNK : vocabulary - chunk * CHUNK; }
    float weigh(int chunk, float* weights) const {
        return LEVEL::weigh(logits + chunk * CHUNK, size(chunk), largest, inverse, weights);
    }
    // Whether a weight of `least` and more may be in the chunk.
    bool reaches(int chunk, float least) const {
        return !(least > 0) || (peaks[chunk] - largest) * inverse >= std::log(least) - 1e-3f;
    }

    bool find_largest() {
        Floats checked = zeros();
        for (int chunk = 0; chunk < chunks(); chunk++) {
            peaks[chunk] = largest_of(logits + chunk * CHUNK, size(chunk), &checked);
            largest = std::max(largest, peaks[chunk]);
        }
        return !std::isnan(sum(checked)) && !std::isinf(largest);
    }

    int64_t first_largest() const {
        int64_t at = (std::find(peaks, peaks + chunks(), largest) - peaks) * CHUNK;
        while (logits[at] != largest) at++;
        return at;
    }

    // The weight below which tokens are dropped: see _smallest_kept in engine/draw.py.
    float cut(double total, float top_p, int64_t top_k, std::vector<float>& found) const {
        const size_t most = top_k > 0 ? std::min<int64_t>(top_k, vocabulary) : vocabulary;
        for (float floor : {1e-3f, 1e-5f, 0.0f}) {
            found.clear();
            for (int chunk = 0; chunk < chunks(); chunk++) {
                if (!reaches(chunk, floor)) continue;
                float weights[CHUNK];
                weigh(chunk, weights);
                for (int at = 0; at < size(chunk); at++)
                    if (weights[at] > floor) found.push_back(weights[at]);
            }
            if (found.size() > most) {
                std::nth_element(found.begin(), found.begin() + most - 1, found.end(), std::greater<float>());
                found.resize(most);
            }
            double mass = 0, before = 0;
            for (float weight : found) mass += weight;
            const double goal = top_p * (top_k > 0 ? mass : total);
            if (floor > 0 && (top_k > 0 ? found.size() < most : !(mass > goal))) continue;
            std::sort(found.begin(), found.end(), std::greater<float>());
            float kept = found[0];
            for (float weight : found) {
                if (before >= goal) break;
                kept = weight;
                before += weight;
            }
            return kept;
        }
        return 0;
    }

    // The id at which the cumulative weights of at least `least` pass uniform of their sum.
    int64_t draw(double total, float uniform, float least) const {
        float weights[CHUNK];
        if (least > 0) {
            total = 0;
            for (int chunk = 0; chunk < chunks(); chunk++) {
                sums[chunk] = 0;
                if (!reaches(chunk, least)) continue;
                weigh(chunk, weights);
                for (int at = 0; at < size(chunk); at++) sums[chunk] += weights[at] >= least ? weights[at] : 0;
                total += sums[chunk];
            }
        }
        double before = 0, unused;
        const double target = uniform * total;
        const int chosen = passing(sums, chunks(), target, &before);
        weigh(chosen, weights);
        for (int at = 0; at < size(chosen); at++) weights[at] = weights[at] >= least ? weights[at] : 0;
        return static_cast<int64_t>(chosen) * CHUNK + passing(weights, size(chosen), target - before, &unused);
    }
};

void sample_row(Row row, const Asked& asked, int at, std::vector<float>& found, int64_t* id, float* logprob) {
    *id = 0;
    *logprob = NOTHING;
    if (!row.find_largest()) return;
    double total = 0;
    for (int chunk = 0; chunk < row.chunks(); chunk++) total += row.sums[chunk] = row.weigh(chunk, nullptr);
    if (asked.greedy[at]) {
        *id = row.first_largest();
    } else {
        const bool truncates = asked.top_p[at] < 1 || asked.top_k[at] > 0;
        const float least = truncates ? row.cut(total, asked.top_p[at], asked.top_k[at], found) : 0;
        *id = row.draw(total, asked.uniform[at], std::max(least, asked.min_p[at]));
    }
    *logprob = (row.logits[*id] - row.largest) * row.inverse - static_cast<float>(std::log(total));
}

}  // namespace

void sample_rows(int rows, int vocabulary, const float* logits, const Asked& asked, float* scratch, int64_t* ids,
                 float* logprobs, int threads) {
    const int chunks = (vocabulary + CHUNK - 1) / CHUNK;
    auto job = [&](const Team& team) {
        std::vector<float> found;
        for (int at = team.first(rows); at < team.last(rows); at++) {
            float* sums = scratch + static_cast<int64_t>(at) * 2 * chunks;
            Row row{logits + static_cast<int64_t>(at) * vocabulary, vocabulary, 1 / asked.divisors[at], sums,
                    sums + chunks};
            sample_row(row, asked, at, found, ids + at, logprobs + at);
        }
    };
    run_together(threads < rows ? threads : rows, job);
}

}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// logits [rows, vocabulary]; the others [rows]; scratch [rows, 2, chunks of 256 ids]. Rows with a logit that is no number,
// or infinite, get a logprob that is none.
extern "C" void DOOR(sample)(int rows, int vocabulary, const float* logits, const float* divisors, const float* uniform,
                             const float* top_p, const float* min_p, const int64_t* top_k, const uint8_t* greedy,
                             float* scratch, int64_t* ids, float* logprobs, int threads) {
    const LEVEL::Asked asked{divisors, uniform, top_p, min_p, top_k, greedy};
    LEVEL::sample_rows(rows, vocabulary, logits, asked, scratch, ids, logprobs, threads);
}
