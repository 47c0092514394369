#pragma once

#include <cstddef>
#include <cstdint>

namespace slingshot {
namespace LEVEL {

// What is asked for, an entry for each row.
struct Asked {
    const float *divisors, *uniform, *top_p, *min_p;
    const int64_t* top_k;
    const uint8_t* greedy;
};

// Floats that `sample_rows` needs for its own: two for every chunk of 256 ids.
inline size_t sample_scratch(int rows, int vocabulary) { return static_cast<size_t>(rows) * 2 * ((vocabulary + 255) / 256); }

// An id and its logprob for every row of logits [rows, vocabulary].
void sample_rows(int rows, int vocabulary, const float* logits, const Asked& asked, float* scratch, int64_t* ids,
                 float* logprobs, int threads);

}  // namespace LEVEL
}  // namespace slingshot
