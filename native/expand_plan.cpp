#include "expand_plan.h"

#include <cstddef>

namespace slingshot {
namespace {

constexpr int PIECE_TOKENS = 128;
constexpr long MOST_BYTES = 64l << 20;  // of keys and values of one sequence

// Expanding costs latent (nope + value) products for each token of the context; a new token then saves
// 2 latent - nope - value of them. Attention takes widths that are multiples of 8.
bool pays(const LatentShape& s, int tokens, int length, int number_bytes) {
    if ((s.nope + s.rope) % 8 != 0 || s.value % 8 != 0) return false;
    const long saved = static_cast<long>(tokens) * (2 * s.latent - s.nope - s.value);
    const long bytes = static_cast<long>(length) * s.heads * (s.nope + s.rope + s.value) * number_bytes;
    return saved > static_cast<long>(s.latent) * (s.nope + s.value) && bytes <= MOST_BYTES;
}

}  // namespace

void LatentPlanner::plan(const LatentShape& shape, const Sequences& sequences, int number_bytes, int threads) {
    const int count = sequences.count;
    is_expanded_.assign(count, 0), is_absorbed_.assign(count, 1);
    pieces.clear(), tokens.clear();
    rows = 0;
    int pages = 1;
    for (int s = 0; s < count; s++) {
        const int first = sequences.starts[s], last = sequences.starts[s + 1], length = sequences.lengths[s];
        if (!pays(shape, last - first, length, number_bytes)) continue;
        is_expanded_[s] = 1, is_absorbed_[s] = 0;
        for (int begin = 0; begin < length; begin += PIECE_TOKENS) {
            const int end = begin + PIECE_TOKENS < length ? begin + PIECE_TOKENS : length;
            pieces.push_back({s, begin, end, rows + begin});
        }
        for (int token = first; token < last; token++) tokens.push_back(token);
        rows += (length + PAGE - 1) / PAGE * PAGE;
        pages = (length + PAGE - 1) / PAGE > pages ? (length + PAGE - 1) / PAGE : pages;
    }
    // Their keys and values stand one after the other: pages of their own.
    tables_.assign(static_cast<size_t>(count) * pages, 0);
    for (const ExpandedPiece& piece : pieces)
        for (int page = piece.begin / PAGE; page * PAGE < piece.end; page++)
            tables_[static_cast<size_t>(piece.sequence) * pages + page] =
                static_cast<int>((piece.row - piece.begin) / PAGE) + page;
    any_expanded = !pieces.empty();
    any_absorbed = false;
    for (int s = 0; s < count; s++) any_absorbed = any_absorbed || is_absorbed_[s];
    absorbed = absorbed_.plan({shape.heads, 1, shape.latent + shape.rope, shape.latent, shape.scale, shape.form}, sequences,
                              threads, is_expanded_.data());
    const Sequences own{sequences.starts, sequences.lengths, tables_.data(), count, pages};
    expanded = expanded_.plan({shape.heads, shape.heads, shape.nope + shape.rope, shape.value, shape.scale, AS_COMPUTED}, own,
                              threads, is_absorbed_.data());
}

}  // namespace slingshot
