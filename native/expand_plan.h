// Which sequences of a step attend in MLA's expanded form, and where their keys and values stand meanwhile.
#pragma once

#include <vector>

#include "attention.h"

namespace slingshot {

struct LatentShape {
    int heads, latent, rope, nope, value;
    float scale;
    int form;  // of the cache's entries: a CacheForm (attention.h)
};

// Some tokens of an expanded sequence, and where the first one's keys and values stand.
struct ExpandedPiece {
    int sequence, begin, end;
    long row;
};

class LatentPlanner {
  public:
    AttentionPlan absorbed, expanded;
    bool any_absorbed = false, any_expanded = false;
    std::vector<ExpandedPiece> pieces;
    std::vector<int> tokens;  // the expanded sequences' new ones, by their number in the step
    long rows = 0;            // of keys and values

    // number_bytes: of a key's numbers.
    void plan(const LatentShape& shape, const Sequences& sequences, int number_bytes, int threads);

  private:
    AttentionPlanner absorbed_, expanded_;
    std::vector<char> is_expanded_, is_absorbed_;
    std::vector<int> tables_;
};

}  // namespace slingshot
