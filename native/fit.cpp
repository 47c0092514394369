// Weights rounded to whole numbers under a scale for each group of a row, as quantization/gptq.py has it: which of some
// scales is best, and GPTQ within a block of columns. No row of weights sees another, so threads share rows.
#include "doors.h"
#include "share.h"
#include "simd.h"

namespace slingshot {
namespace LEVEL {
namespace {

// What the square of an error counts: the same, as its weight's magnitude, as `importance` says.
enum Weighing { EQUAL, MAGNITUDE, GIVEN };

inline Floats whole_number(Floats x, float end) { return min(max(nearest(x), all(-end)), all(end - 1)); }

inline float magnitude(float x) { return std::fabs(x); }
inline Floats magnitude(Floats x) { return max(x, sub(zeros(), x)); }

template <Weighing weighing>
float error(const float* weight, const float* importance, int group, float inverse, float end) {
    Floats sums = zeros();
    int i = 0;
    for (; i + LANES <= group; i += LANES) {
        const Floats w = load(weight + i), scaled = mul(w, all(inverse)), off = sub(whole_number(scaled, end), scaled);
        Floats square = mul(off, off);
        if (weighing == MAGNITUDE) square = mul(square, magnitude(w));
        if (weighing == GIVEN) square = mul(square, load(importance + i));
        sums = add(sums, square);
    }
    float found = sum(sums);
    for (; i < group; i++) {
        const float scaled = weight[i] * inverse, nearest = std::nearbyint(scaled);
        const float off = (nearest < -end ? -end : nearest > end - 1 ? end - 1 : nearest) - scaled;
        found += off * off * (weighing == EQUAL ? 1 : weighing == MAGNITUDE ? magnitude(weight[i]) : importance[i]);
    }
    return found;
}

template <Weighing weighing>
float best_scale(const float* weight, const float* importance, int group, int bits, const float* shares, int count) {
    float least = weight[0], most = weight[0];
    for (int i = 1; i < group; i++) {
        least = weight[i] < least ? weight[i] : least;
        most = weight[i] > most ? weight[i] : most;
    }
    const float furthest = most > -least ? most : least;
    const float whole = bits == 4 ? furthest / -8 : magnitude(furthest) / 127;
    const float end = static_cast<float>(1 << (bits - 1));
    float best = 0, lowest = INFINITY;
    for (int c = 0; c < count; c++) {
        float scale = rounded<bf16>(shares[c] * whole);
        scale = scale == 0 ? 1 : scale;
        const float found = error<weighing>(weight, importance, group, 1 / scale, end) * (scale * scale);
        if (found < lowest || c == 0) best = scale, lowest = found;
    }
    return best;
}

constexpr int STRIPE = 4 * LANES;  // columns of a block's rows at a time

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// Of `count` scales of each group, shares of the one that its furthest weight asks for, the first of least squared
// error: weight [n, k], importance [k], null where the weights' magnitude counts (weighed) or nothing does;
// scales [n, k / group].
extern "C" void DOOR(best_scales)(int, const float* weight, const float* importance, long weighed, long n, long k,
                                  long group, long bits, const float* shares, long count, float* scales, int threads) {
    const auto best = importance ? LEVEL::best_scale<LEVEL::GIVEN>
                      : weighed  ? LEVEL::best_scale<LEVEL::MAGNITUDE>
                                 : LEVEL::best_scale<LEVEL::EQUAL>;
    const long groups = k / group;
    share_rows(threads, n, 1, [&](long begin, long end) {
        for (long row = begin; row < end; row++)
            for (long g = 0; g < groups; g++)
                scales[row * groups + g] = best(
                    weight + row * k + g * group, importance ? importance + g * group : nullptr,
                    static_cast<int>(group), static_cast<int>(bits), shares, static_cast<int>(count));
    });
}

// From the last of `rows` columns to the first: what a weight should be, `wanted` [rows, n] and what those behind it
// have lost by the factor `root` [rows, rows], rounded under the scales [groups, n] of where its column stood,
// columns[row]; numbers [all columns, n], and errors [rows, n] of weight [rows, n].
extern "C" void DOOR(fit_block)(int, const float* wanted, const float* weight, const float* root, long down,
                                long across, const int64_t* columns, const float* scales, long rows, long n,
                                long group, long bits, float* numbers, float* errors, int threads) {
    using namespace LEVEL;
    const float end = static_cast<float>(1 << (bits - 1));
    share_rows(threads, n, STRIPE, [&](long first, long last) {
        for (long at = first; at < last; at += STRIPE) {
            const int width = last - at < STRIPE ? static_cast<int>(last - at) : STRIPE;
            for (long row = rows - 1; row >= 0; row--) {
                const float* under = scales + columns[row] / group * n + at;
                const float *from = wanted + row * n + at, *own = weight + row * n + at;
                float *to = numbers + columns[row] * n + at, *lost = errors + row * n + at;
                if (width == STRIPE) {
                    Floats sums[STRIPE / LANES];
                    for (int i = 0; i < STRIPE / LANES; i++) sums[i] = load(from + i * LANES);
                    for (long behind = row + 1; behind < rows; behind++) {
                        const Floats factor = all(root[behind * down + row * across]);
                        const float* its = errors + behind * n + at;
                        for (int i = 0; i < STRIPE / LANES; i++)
                            sums[i] = fma(factor, load(its + i * LANES), sums[i]);
                    }
                    for (int i = 0; i < STRIPE / LANES; i++) {
                        const Floats scale = load(under + i * LANES), number = whole_number(div(sums[i], scale), end);
                        store(to + i * LANES, number);
                        store(lost + i * LANES, sub(load(own + i * LANES), mul(number, scale)));
                    }
                    continue;
                }
                for (int i = 0; i < width; i++) {
                    float sum = from[i];
                    for (long behind = row + 1; behind < rows; behind++)
                        sum += root[behind * down + row * across] * errors[behind * n + at + i];
                    const float nearest = std::nearbyint(sum / under[i]);
                    to[i] = nearest < -end ? -end : nearest > end - 1 ? end - 1 : nearest;
                    lost[i] = own[i] - to[i] * under[i];
                }
            }
        }
    });
}
