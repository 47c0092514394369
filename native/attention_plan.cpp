// How a step's attention is cut into pieces of work.
#include "attention.h"

namespace slingshot {

AttentionPlan AttentionPlanner::plan(const AttentionShape& shape, const Sequences& sequences, int threads,
                                     const char* left_out) {
    units_.clear();
    merges_.clear();
    long partial_rows = 0;
    const int per_token = shape.heads / shape.groups;
    for (int s = 0; s < sequences.count; s++) {
        if (left_out && left_out[s]) continue;
        const int length = sequences.lengths[s], tokens = sequences.starts[s + 1] - sequences.starts[s];
        const int rows = tokens * per_token, seen = length - tokens;
        const int chunks = rows <= ROWS ? (length + CHUNK - 1) / CHUNK : 1;
        if (rows <= 0) continue;
        if (chunks == 1) {
            for (int group = 0; group < shape.groups; group++)
                for (int row = 0; row < rows; row += ROWS) {
                    const int here = rows - row < ROWS ? rows - row : ROWS;
                    units_.push_back({s, group, row, here, 0, seen + (row + here - 1) / per_token + 1, -1});
                }
            continue;
        }
        const int chunk = ((length + chunks - 1) / chunks + 31) / 32 * 32;  // 32 tokens fill a tile's depth
        const int count = (length + chunk - 1) / chunk;
        for (int group = 0; group < shape.groups; group++)
            merges_.push_back({s, group, rows, count, partial_rows + static_cast<long>(group) * count * rows});
        // Groups within a chunk: in 8 bits their entries share cache lines.
        for (int i = 0; i < count; i++)
            for (int group = 0; group < shape.groups; group++) {
                const int begin = i * chunk, end = begin + chunk < length ? begin + chunk : length;
                units_.push_back({s, group, 0, rows, begin, end, merges_.end()[group - shape.groups].partial + i * rows});
            }
        partial_rows += static_cast<long>(shape.groups) * count * rows;
    }
    partials_.resize(partial_rows * (shape.value_width + 2));
    // What a unit costs: bringing its tokens into order, and every row's work with each of them.
    double total = 0, before = 0;
    for (const AttentionUnit& unit : units_) total += (unit.end - unit.begin) * (24.0 + unit.rows);
    bounds_.assign(1, 0);
    for (int i = 0; i < static_cast<int>(units_.size()); i++) {
        const double cost = (units_[i].end - units_[i].begin) * (24.0 + units_[i].rows);
        while (before + cost / 2 > total * bounds_.size() / threads) bounds_.push_back(i);
        before += cost;
    }
    while (static_cast<int>(bounds_.size()) <= threads) bounds_.push_back(static_cast<int>(units_.size()));
    return {shape,          sequences,
            units_.data(),  bounds_.data(),
            merges_.data(), static_cast<int>(merges_.size()),
            partials_.data()};
}

}  // namespace slingshot
