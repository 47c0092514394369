// Attention over pages in one pass over the tokens (arXiv 2205.14135): blocks of keys and values are brought into words
// once and used for all rows of a unit; every row keeps its largest score and the sum of its weights up to there.
#include "attention.h"

#include "entries.h"
#include "page.h"
#include "score_tiles.h"
#include "scratch.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int BLOCK = 128;              // tokens of a block
constexpr float LOG2_E = 1.44269504f;  // 1 / ln 2

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// A unit's working memory.
template <class T> struct Unit {
    using Word = typename WordOf<T>::type;
    int depth, words, columns;  // words that a query takes, words that are multiplied, columns of its result
    Word *queries, *query_columns, *keys, *values;
    float *scores, *sums, *largest, *totals, *factors;
    int row;  // numbers of a token's row
    T* rows;  // a block's keys, then its values, where the cache holds them otherwise
    bool takes_rows;

    Unit(const AttentionShape& shape) {
        depth = round_up(shape.width / PER_WORD<T>, 16);
        words = PER_WORD<T> == 2 ? depth : shape.width;  // pairs go on with zeros, to whole tiles
        columns = round_up(shape.value_width, 16);
        row = round_up(shape.width > shape.value_width ? shape.width : shape.value_width, 32);
        takes_rows = shape.form != AS_COMPUTED;
    }

    size_t carve(void* memory) {
        Carver carver{static_cast<char*>(memory)};
        queries = carver.take<Word>((ROWS + 16) * depth);  // whole tiles, wherever the first row is
        query_columns = carver.take<Word>(16 * depth);
        keys = carver.take<Word>(BLOCK * depth);
        values = carver.take<Word>(BLOCK / PER_WORD<T> * columns);
        scores = carver.take<float>((ROWS + 16) * BLOCK);
        sums = carver.take<float>((ROWS + 16) * columns);
        largest = carver.take<float>(ROWS + 16);
        totals = carver.take<float>(ROWS + 16);
        factors = carver.take<float>(16);
        rows = carver.take<T>(takes_rows ? BLOCK * row + 32 : 0);
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

// For LANES rows of LANES numbers each row's sum, or its largest number.
template <class Op> inline Floats of_each_row(const float* rows, Op op) {
    alignas(64) float columns[LANES * LANES];
#if defined(__AVX512F__)
    transpose_words(rows, LANES, LANES, columns, LANES);
#else
    for (int r = 0; r < LANES; r++)
        for (int i = 0; i < LANES; i++) columns[i * LANES + r] = rows[r * LANES + i];
#endif
    Floats y = load(columns);
    for (int i = 1; i < LANES; i++) y = op(y, load(columns + i * LANES));
    return y;
}

// How far up to LANES rows have come: for each its largest score, the sum of its weights, and the factor by which what
// was summed before this block is now to be multiplied.
struct Rows {
    float *largest, *totals, *factors;
};

// Scores of a block, rows BLOCK apart, become weights in place, as the numbers that words hold: 2^(scale (score -
// largest)), of the first counts[row] tokens; others weigh 0. Powers of two save a product; `scale` has 1 / ln 2 in it.
template <class T> inline void weigh(float* scores, const int* counts, int rows, int padded, float scale, Rows so_far) {
    alignas(64) float part[LANES * LANES] = {};
    for (int r = 0; r < rows; r++) {
        float* row = scores + r * BLOCK;
        for (int i = counts[r]; i % LANES != 0; i++) row[i] = -INFINITY;
        Floats most = load(row);
        for (int i = LANES; i < counts[r]; i += LANES) most = max(most, load(row + i));
        store(part + r * LANES, most);
    }
    const Floats before = load(so_far.largest);
    const Floats now = max(before, of_each_row(part, [](Floats a, Floats b) { return max(a, b); }));
    const Floats factors = power_of_two<float>(mul(sub(before, now), all(scale)));
    store(so_far.largest, now);
    store(so_far.factors, factors);
    for (int r = 0; r < rows; r++) {
        float* row = scores + r * BLOCK;
        T* weights = reinterpret_cast<T*>(row);  // narrower numbers are never ahead of what is still to be read
        const Floats shift = all(-so_far.largest[r] * scale);
        Floats sums = zeros();
        for (int i = 0; i < padded; i += LANES) {
            Floats y = zeros();
            if (i < counts[r]) y = power_of_two<T>(fma(load(row + i), all(scale), shift));
            sums = add(sums, y);
            if constexpr (PER_WORD<T> == 2)
                store(weights + i, y);
            else
                store(row + i, y);
        }
        store(part + r * LANES, sums);
    }
    const Floats sums = of_each_row(part, [](Floats a, Floats b) { return add(a, b); });
    store(so_far.totals, fma(load(so_far.totals), factors, sums));
}

template <class T> class Attention {
    using Word = typename Unit<T>::Word;

    const AttentionPlan& plan;
    const AttentionShape& shape;
    const void *keys, *values;  // null: the first numbers of the keys
    const Entry key, value;
    int per_token;  // rows of a token
    Unit<T> own;

  public:
    Attention(const AttentionPlan& plan, const void* keys, const void* values)
        : plan(plan), shape(plan.shape), keys(keys), values(values),
          key{shape.form, values ? shape.width : shape.value_width, values ? 0 : shape.width - shape.value_width},
          value{shape.form, shape.value_width, 0}, own(plan.shape) {
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
        tiled = PER_WORD<T> == 2 && fits_tiles(shape.width, unit.rows);
#if defined(__AMX_BF16__)
        if constexpr (PER_WORD<T> == 2)
            if (tiled) turn_queries(own.queries, own.depth, own.query_columns);
#endif
        std::memset(own.sums, 0, static_cast<size_t>(unit.rows) * own.columns * 4);
        for (int begin = unit.begin; begin < unit.end; begin += BLOCK) block(unit, begin);
        for (int r = 0; r < unit.rows; r++)
            finish(unit, r, unit.partial < 0 ? y + place(unit, r, y_stride, shape.value_width) : nullptr);
    }

  private:
    bool tiled;  // the present unit's scores are made by tiles over rows of keys as they lie

    struct Page {
        const T* rows;
        size_t stride;
    };

    // `count` entries of the unit's group as numbers of T, where they lie or in rows of the unit's own from `token` on.
    Page page(const Entry& entry, const void* held, const AttentionUnit& unit, int number, int token, int count) {
        const size_t bytes = entry.bytes(sizeof(T)), stride = shape.groups * bytes;
        const char* from = static_cast<const char*>(held) + number * (PAGE * stride) + unit.group * bytes;
        if (!own.takes_rows) return {reinterpret_cast<const T*>(from), stride / sizeof(T)};
        T* to = own.rows + token * own.row;
        for (int t = 0; t < count; t++) take_entry(entry, from + t * stride, to + t * own.row);
        return {to, static_cast<size_t>(own.row)};
    }

    // The rows' sums over up to BLOCK tokens from `begin` on.
    void block(const AttentionUnit& unit, int begin) {
        const int tokens = unit.end - begin < BLOCK ? unit.end - begin : BLOCK;
        const int padded = round_up(tokens, 16 * PER_WORD<T>);
        const Sequences& sequences = plan.sequences;
        // Rows of earlier tokens may see none of this block: they are the first ones.
        const int seen = sequences.lengths[unit.sequence] -
                         (sequences.starts[unit.sequence + 1] - sequences.starts[unit.sequence]);
        const int blind = (begin - seen) * per_token - unit.first_row;
        const int first = blind > 0 ? blind : 0, rows = unit.rows - first;
        const int* pages = sequences.block_tables + static_cast<size_t>(unit.sequence) * sequences.pages + begin / PAGE;
        float* scores = own.scores + first * BLOCK;
        score(unit, pages, tokens, first, scores);
        for (int r = 0; r < rows; r += LANES) {
            int counts[LANES];
            const int here = rows - r < LANES ? rows - r : LANES, row = unit.first_row + first + r;
            for (int i = 0; i < here; i++) {
                const int limit = seen + (row + i) / per_token + 1 - begin;
                counts[i] = limit < tokens ? limit : tokens;
            }
            const Rows so_far{own.largest + first + r, own.totals + first + r, own.factors};
            weigh<T>(scores + r * BLOCK, counts, here, padded, shape.scale * LOG2_E, so_far);
            for (int i = 0; i < here; i++) {
                float* sums = own.sums + (first + r + i) * own.columns;
                for (int c = 0; c < own.columns && own.factors[i] != 1; c += LANES)
                    store(sums + c, mul(load(sums + c), all(own.factors[i])));
            }
        }
        for (int t = 0; t < padded; t += PAGE) {
            const int count = tokens - t < PAGE ? tokens - t : PAGE;
            if (count > 0 && !values && !tiled) continue;  // packed beside the keys
            Page from{own.rows + t * own.row, static_cast<size_t>(own.row)};  // MLA's keys, taken already
            if (count > 0 && (values || !own.takes_rows))
                from = page(values ? value : key, values ? values : keys, unit, pages[t / PAGE], 0, count);
            pack_page(from, count, t);
        }
        product(reinterpret_cast<const Word*>(scores), BLOCK, own.values, own.columns, 16, padded / PER_WORD<T>, rows,
                own.columns, own.sums + first * own.columns, own.columns, true);
    }

    // The values of `count` tokens, as the block's from `token` on.
    void pack_page(const Page& from, int count, int token) {
        pack_values(from.rows, from.stride, count, shape.value_width, own.columns,
                    own.values + token / PER_WORD<T> * own.columns);
    }

    // scores [rows, BLOCK] of the rows from `first` on with some tokens; MLA's values are packed beside the keys.
    void score(const AttentionUnit& unit, const int* pages, int tokens, int first, float* scores) {
        const int count = (tokens + PAGE - 1) / PAGE;
        [[maybe_unused]] const T* at[BLOCK / PAGE];  // tiles'
        size_t stride = 0;
        for (int i = 0; i < count; i++) {
            const int here = tokens - i * PAGE < PAGE ? tokens - i * PAGE : PAGE;
            const Page from = page(key, keys, unit, pages[i], tiled ? i * PAGE : 0, here);
            at[i] = from.rows, stride = from.stride;
            if (tiled) continue;
            pack_keys(from.rows, stride, shape.width, own.keys + static_cast<size_t>(i) * PAGE * own.depth);
            if (!values) pack_page(from, here, i * PAGE);
        }
#if defined(__AMX_BF16__)
        if constexpr (PER_WORD<T> == 2)
            if (tiled) {
                for (int i = 0; i < count; i += 4)
                    score_pages(at + i, count - i < 4 ? count - i : 4, stride, own.query_columns, own.depth, unit.rows,
                                own.scores + i * PAGE, BLOCK);
                return;
            }
#endif
        product(own.queries + static_cast<size_t>(first) * own.depth, own.depth, own.keys, 16,
                static_cast<size_t>(PAGE) * own.depth, own.words, unit.rows - first, count * PAGE, scores, BLOCK, false);
    }

    // A row's result to `to`, or, of a part of its tokens, to the partial results.
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
void attend(const AttentionPlan& plan, const T* q, const void* keys, const void* values, T* y, int y_stride, int thread) {
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
                const float factor = std::exp2((chunk[c * step + width + 1] - largest) * (shape.scale * LOG2_E));
                total += factor * chunk[c * step + width];
                for (int w = 0; w < width; w++) sums[w] += factor * chunk[c * step + w];
            }
            const size_t token = plan.sequences.starts[merge.sequence] + r / per_token;
            T* to = y + token * y_stride + (merge.group * per_token + r % per_token) * width;
            for (int w = 0; w < width; w++) put(to + w, sums[w] / total);
        }
    }
}

template void attend(const AttentionPlan&, const float*, const void*, const void*, float*, int, int);
template void attend(const AttentionPlan&, const bf16*, const void*, const void*, bf16*, int, int);
template void merge_attention(const AttentionPlan&, float*, int, int, int);
template void merge_attention(const AttentionPlan&, bf16*, int, int, int);

}  // namespace LEVEL
}  // namespace slingshot
