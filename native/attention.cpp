// Attention over pages in one pass over the tokens (arXiv 2205.14135): blocks of keys and values are brought into words
// once and used for all rows of a unit; every row keeps its largest score and the sum of its weights up to there.
#include "attention.h"

#include "page.h"
#include "scratch.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int BLOCK = 128;  // tokens of a block

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// A unit's working memory.
template <class T> struct Unit {
    using Word = typename WordOf<T>::type;
    int depth, words, columns;  // words that a query takes, words that are multiplied, columns of its result
    Word *queries, *keys, *values;
    float *scores, *sums, *largest, *totals;

    Unit(const AttentionShape& shape) {
        depth = round_up(shape.width / PER_WORD<T>, 16);
        words = PER_WORD<T> == 2 ? depth : shape.width;  // pairs go on with zeros, to whole tiles
        columns = round_up(shape.value_width, 16);
    }

    size_t carve(void* memory) {
        Carver carver{static_cast<char*>(memory)};
        queries = carver.take<Word>(ROWS * depth);
        keys = carver.take<Word>(BLOCK * depth);
        values = carver.take<Word>(BLOCK / PER_WORD<T> * columns);
        scores = carver.take<float>(ROWS * BLOCK);
        sums = carver.take<float>((ROWS + 16) * columns);  // whole tiles, wherever the first row is
        largest = carver.take<float>(ROWS);
        totals = carver.take<float>(ROWS);
        return carver.used;
    }
};

inline void copy_row(const float* from, int width, int words, float* to) {
    std::memcpy(to, from, width * 4);
    for (int i = width; i < words; i++) to[i] = 0;
}

inline void copy_row(const bf16* from, int width, int words, float* to) {
    for (int i = 0; i < words; i++) to[i] = i < width ? to_float(from[i]) : 0;
}

inline void copy_row(const bf16* from, int width, int words, Pair* to) {
    std::memset(to, 0, words * 4);
    std::memcpy(to, from, width * 2);
}

// A row's scores of a block become weights, e^(scale (score - largest)) with its largest score so far, in place, as the
// numbers that words hold; those past `count` become 0. `total` is the sum of the weights so far. Gives the factor by
// which what was summed before is now to be multiplied.
template <class T>
inline float weigh(float* scores, int count, int padded, float scale, float* largest, float* total) {
    for (int i = count; i < padded; i++) scores[i] = -INFINITY;
    Floats most = all(*largest);
    for (int i = 0; i < count; i += LANES) most = max(most, load(scores + i));
    const float now = highest(most);
    const float factor = now == *largest ? 1 : std::exp((*largest - now) * scale);
    Floats sums = zeros();
    for (int i = 0; i < padded; i += LANES) {
        const Floats weights = exp(fma(load(scores + i), all(scale), all(-now * scale)));
        sums = add(sums, weights);
        if constexpr (PER_WORD<T> == 2)
            store(reinterpret_cast<bf16*>(scores) + i, weights);  // never ahead of what is still to be read
        else
            store(scores + i, weights);
    }
    *total = *total * factor + sum(sums);
    *largest = now;
    return factor;
}

template <class T> class Attention {
    using Word = typename Unit<T>::Word;

    const AttentionPlan& plan;
    const AttentionShape& shape;
    const T *keys, *values;
    size_t key_stride, value_stride;  // from a token's to the next token's
    int value_offset, per_token;      // from a group's values to the next group's; rows of a token
    Unit<T> own;

  public:
    Attention(const AttentionPlan& plan, const T* keys, const T* values)
        : plan(plan), shape(plan.shape), keys(keys), values(values ? values : keys), own(plan.shape) {
        key_stride = static_cast<size_t>(shape.groups) * shape.width;
        value_offset = values ? shape.value_width : shape.width;
        value_stride = static_cast<size_t>(shape.groups) * value_offset;
        per_token = shape.heads / shape.groups;
        own.carve(thread_scratch(own.carve(nullptr)));
    }

    // Where a row's numbers are, `stride` from token to token and `width` from head to head.
    size_t place(const AttentionUnit& unit, int r, size_t stride, int width) const {
        const int row = unit.first_row + r;
        return (plan.sequences.starts[unit.sequence] + row / per_token) * stride +
               (unit.group * per_token + row % per_token) * static_cast<size_t>(width);
    }

    void run(const AttentionUnit& unit, const T* q, T* y, int y_stride) {
        const size_t q_stride = static_cast<size_t>(shape.heads) * shape.width;
        for (int r = 0; r < unit.rows; r++) {
            const T* from = q + place(unit, r, q_stride, shape.width);
            copy_row(from, shape.width, own.depth, own.queries + r * own.depth);
            own.largest[r] = -INFINITY, own.totals[r] = 0;
        }
        std::memset(own.sums, 0, static_cast<size_t>(unit.rows) * own.columns * 4);
        for (int begin = unit.begin; begin < unit.end; begin += BLOCK) block(unit, begin);
        for (int r = 0; r < unit.rows; r++) finish(unit, r, y + (unit.partial < 0 ? place(unit, r, y_stride, shape.value_width) : 0));
    }

  private:
    void block(const AttentionUnit& unit, int begin) {
        const int tokens = unit.end - begin < BLOCK ? unit.end - begin : BLOCK;
        const int padded = round_up(tokens, 16 * PER_WORD<T>);
        const Sequences& sequences = plan.sequences;
        const int* pages = sequences.block_tables + static_cast<size_t>(unit.sequence) * sequences.pages + begin / PAGE;
        for (int t = 0; t < padded; t += PAGE) {
            const int count = tokens - t < PAGE ? tokens - t : PAGE;
            const size_t token = count > 0 ? static_cast<size_t>(pages[t / PAGE]) * PAGE : 0;
            if (count > 0)
                pack_keys(keys + token * key_stride + unit.group * shape.width, key_stride, shape.width,
                          own.keys + t * own.depth);
            pack_values(values + token * value_stride + unit.group * value_offset, value_stride, count,
                        shape.value_width, own.columns, own.values + t / PER_WORD<T> * own.columns);
        }
        // Rows of earlier tokens may see none of this block: they are the first ones.
        const int seen = sequences.lengths[unit.sequence] -
                         (sequences.starts[unit.sequence + 1] - sequences.starts[unit.sequence]);
        const int first_token = begin - seen;  // the first of the new tokens that sees the block's first token
        const int blind = first_token * per_token - unit.first_row;
        const int first = blind > 0 ? blind : 0, rows = unit.rows - first;
        Word* q = own.queries + first * own.depth;
        product(q, own.depth, own.keys, 16, static_cast<size_t>(16) * own.depth, own.words, rows, round_up(tokens, 16),
                own.scores, BLOCK, false);
        for (int r = 0; r < rows; r++) {
            const int limit = seen + (unit.first_row + first + r) / per_token + 1 - begin;
            float* sums = own.sums + (first + r) * own.columns;
            const float factor = weigh<T>(own.scores + r * BLOCK, limit < tokens ? limit : tokens,
                                                             padded, shape.scale, &own.largest[first + r],
                                                             &own.totals[first + r]);
            if (factor != 1)
                for (int c = 0; c < own.columns; c += LANES) store(sums + c, mul(load(sums + c), all(factor)));
        }
        product(reinterpret_cast<const Word*>(own.scores), BLOCK, own.values, own.columns, 16,
                padded / PER_WORD<T>, rows, own.columns, own.sums + first * own.columns, own.columns, true);
    }

    void finish(const AttentionUnit& unit, int r, T* to) {
        const float* sums = own.sums + r * own.columns;
        if (unit.partial >= 0) {
            float* to = plan.partials + (unit.partial + r) * (shape.value_width + 2);
            std::memcpy(to, sums, shape.value_width * 4);
            to[shape.value_width] = own.totals[r], to[shape.value_width + 1] = own.largest[r];
        } else {
            const Floats inverse = all(1 / own.totals[r]);
            int c = 0;
            for (; c + LANES <= shape.value_width; c += LANES) store(to + c, mul(load(sums + c), inverse));
            for (; c < shape.value_width; c++) put(to + c, sums[c] / own.totals[r]);
        }
    }
};

}  // namespace

template <class T>
void attend(const AttentionPlan& plan, const T* q, const T* keys, const T* values, T* y, int y_stride,
            int thread) {
    Attention<T> attention(plan, keys, values);
    for (int i = plan.bounds[thread]; i < plan.bounds[thread + 1]; i++) attention.run(plan.units[i], q, y, y_stride);
}

template <class T> void merge_attention(const AttentionPlan& plan, T* y, int y_stride, int thread, int threads) {
    const AttentionShape& shape = plan.shape;
    const int width = shape.value_width, per_token = shape.heads / shape.groups;
    for (int i = thread; i < plan.n_merges; i += threads) {
        const AttentionMerge& merge = plan.merges[i];
        for (int r = 0; r < merge.rows; r++) {
            const float* chunk = plan.partials + (merge.partial + r) * (width + 2);
            const size_t step = static_cast<size_t>(merge.rows) * (width + 2);
            float largest = -INFINITY, total = 0;
            for (int c = 0; c < merge.chunks; c++) largest = std::fmax(largest, chunk[c * step + width + 1]);
            float* sums = static_cast<float*>(thread_scratch(width * 4));
            std::memset(sums, 0, width * 4);
            for (int c = 0; c < merge.chunks; c++) {
                // a chunk that begins after the row's own token has seen nothing: its largest score is -inf
                const float factor = std::exp((chunk[c * step + width + 1] - largest) * shape.scale);
                total += factor * chunk[c * step + width];
                for (int w = 0; w < width; w++) sums[w] += factor * chunk[c * step + w];
            }
            const size_t token = plan.sequences.starts[merge.sequence] + r / per_token;
            T* to = y + token * y_stride + (merge.group * per_token + r % per_token) * width;
            for (int w = 0; w < width; w++) put(to + w, sums[w] / total);
        }
    }
}

template void attend(const AttentionPlan&, const float*, const float*, const float*, float*, int, int);
template void attend(const AttentionPlan&, const bf16*, const bf16*, const bf16*, bf16*, int, int);
template void merge_attention(const AttentionPlan&, float*, int, int, int);
template void merge_attention(const AttentionPlan&, bf16*, int, int, int);

}  // namespace LEVEL
}  // namespace slingshot
