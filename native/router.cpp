#include "router.h"

#include "matmul.h"
#include "scratch.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int TOGETHER = 16;  // tokens whose scores are made at a time

// The place of the largest of `count` numbers that is not taken; the first of equals. There is always one: every
// comparison with what is not a number fails, and something untaken is kept.
inline int best_of(const float* numbers, const bool* taken, int count) {
    int best = -1;
    for (int i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || numbers[i] > numbers[best])) best = i;
    return best;
}

inline float sum_of_two_best(const float* numbers, int count) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < count; i++) {
        if (numbers[i] > first)
            second = first, first = numbers[i];
        else if (numbers[i] > second)
            second = numbers[i];
    }
    return first + second;
}

// choice [experts] in the groups that are not kept becomes -inf.
inline void mask_groups(const Router& router, float* choice, float* sums, bool* kept) {
    const int members = router.experts / router.groups;
    for (int g = 0; g < router.groups; g++) {
        sums[g] = sum_of_two_best(choice + g * members, members);
        kept[g] = false;
    }
    for (int i = 0; i < router.kept_groups; i++) kept[best_of(sums, kept, router.groups)] = true;
    for (int g = 0; g < router.groups; g++)
        for (int i = 0; i < members && !kept[g]; i++) choice[g * members + i] = -INFINITY;
}

}  // namespace

template <class T>
void route(const Router& router, const T* x, int width, int begin, int end, int* experts, float* gates) {
    const int padded = (router.experts + 15) / 16 * 16;
    Carver carver{nullptr};
    float *rows, *scores, *choice, *sums;
    bool *taken, *kept;
    auto carve = [&] {
        rows = carver.take<float>(TOGETHER * width), scores = carver.take<float>(TOGETHER * padded);
        choice = carver.take<float>(padded), sums = carver.take<float>(padded);
        taken = carver.take<bool>(padded), kept = carver.take<bool>(padded);
    };
    carve();
    carver = {static_cast<char*>(thread_scratch(carver.used))};
    carve();
    for (int from = begin; from < end; from += TOGETHER) {
        const int count = end - from < TOGETHER ? end - from : TOGETHER;
        for (int i = 0; i < count * width; i++) rows[i] = to_float(x[static_cast<size_t>(from) * width + i]);
        matmul_block<float>(router.weights, 0, router.experts, rows, width, count, scores, padded);
        for (int r = 0; r < count; r++) {
            float* score = scores + r * padded;
            for (int i = 0; i < padded; i += LANES)
                store(score + i, div(all(1.0f), add(all(1.0f), exp(mul(load(score + i), all(-1.0f))))));
            for (int i = 0; i < router.experts; i++) choice[i] = score[i] + router.bias[i], taken[i] = false;
            if (router.groups > 1) mask_groups(router, choice, sums, kept);
            int* chosen = experts + static_cast<size_t>(from + r) * router.per_token;
            float* values = gates + static_cast<size_t>(from + r) * router.per_token;
            float total = 0;
            for (int i = 0; i < router.per_token; i++) {
                chosen[i] = best_of(choice, taken, router.experts);
                taken[chosen[i]] = true;
                values[i] = score[chosen[i]];
                total += values[i];
            }
            for (int i = 0; i < router.per_token; i++) {
                const float value = router.normalized ? values[i] / (total + 1e-20f) : values[i];
                values[i] = rounded<T>(value * router.scaling);
            }
        }
    }
}

template void route(const Router&, const float*, int, int, int, int*, float*);
template void route(const Router&, const bf16*, int, int, int, int*, float*);

}  // namespace LEVEL
}  // namespace slingshot
