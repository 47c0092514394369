// The router of a mixture of experts, as model/moe.py's Gate: sigmoid scores, a choice by score plus bias within the best
// groups, gate values from the scores alone.
#pragma once

#include <cstdint>

#include "packed.h"

namespace slingshot {

// groups: experts are scored in so many groups of neighbours, of which `kept_groups` remain; 1: no groups.
struct Router {
    int experts, per_token, groups, kept_groups;
    float scaling;
    bool normalized;
    Packed weights;     // float32, as the router stays whatever the model's dtype is
    const float* bias;  // [experts]
};

namespace LEVEL {

// Of tokens begin to end of x [tokens, width]: experts and gate values [tokens, per_token], best first. Among equals the
// one with the lowest number is chosen. Gate values are rounded to T, as the products they weigh are.
template <class T>
void route(const Router& router, const T* x, int width, int begin, int end, int* experts, float* gates);

}  // namespace LEVEL
}  // namespace slingshot
