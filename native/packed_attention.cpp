// Attention of a training step within packed rows, forward and backward: query t sees keys first[t] to t of its row,
// which is one document, and those of the prefix that this document goes on from. Only those blocks of scores are made,
// in the nearest cache, and none of them is kept: the backward pass makes them again from the logarithms of their sums.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "doors.h"
#include "share.h"
#include "tiles.h"
#include "turn.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int BLOCK = 32;  // rows of scores at a time

// Where a tensor's numbers are: `token` and `head` numbers apart.
template <class T> struct Heads {
    T* at;
    long token, head;
    T* of(long tokens, int h) const { return at + tokens * token + h * head; }
};

struct PackedRows {
    int rows, time, heads, groups, width, value_width;
    float scale;
    // [rows, time]: of a query its document's first key, of a key the last query that sees it: all between see it, too.
    const int *first, *last;
    const int *prefix_first, *prefix_end;  // [rows, time] or null: of a query where the keys of its prefix begin and end
};

// The keys that a block of queries sees, 32 by 32, as columns of its scores: prefix to prefix_end, then from to to.
struct Columns {
    int prefix, prefix_end, from, to;

    Columns(const PackedRows& a, long tokens, int row) {
        from = prefix = a.first[tokens + row] / 32 * 32;
        to = row + BLOCK;
        prefix_end = 0;
        for (int t = row; a.prefix_first && t < std::min(to, a.time); t++) {
            const int begin = a.prefix_first[tokens + t], end = a.prefix_end[tokens + t];
            if (begin == end || begin >= from) continue;
            prefix = std::min(prefix, begin / 32 * 32);
            prefix_end = std::max(prefix_end, up_to(end, 32));
        }
        prefix_end = prefix < from ? std::min(prefix_end, from) : from;
    }
    int before() const { return prefix_end - prefix; }
    int wide() const { return before() + to - from; }
    int of(int key) const { return key <= prefix_end ? key - prefix : key - from + before(); }
};

template <class T> struct Memory {
    void need(size_t count) {
        if (bytes.size() < count * sizeof(T) + 8192) bytes.assign(count * sizeof(T) + 8192, 0);
        at = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
    }
    std::vector<uint8_t> bytes;
    T* at = nullptr;
};

// One head's matrix [time, width] in the forms that products want.
template <class T> struct Operand {
    using Word = std::conditional_t<sizeof(T) == 2, Pair, float>;                 // of the right side
    using Act = std::conditional_t<sizeof(T) == 2 && PAIRS, bf16, float>;         // numbers of the left side
    static constexpr int PER_WORD = sizeof(T) == 2 ? 2 : 1;                       // of the right side
    using Left = std::conditional_t<sizeof(T) == 2 && PAIRS, Pair, float>;
    static constexpr int PER_LEFT = sizeof(Left) / sizeof(Act);

    int wide;  // numbers of a row, up to a multiple of 32
    Memory<Act> left;
    Memory<uint32_t> by_row, by_column;

    void take(const T* from, long token, int time, int width, bool rows, bool columns) {
        wide = up_to(width, 32);
        const int tall = up_to(time, 32);
        left.need(static_cast<size_t>(tall) * wide);
        for (int t = 0; t < tall; t++) {
            Act* to = left.at + static_cast<size_t>(t) * wide;
            int i = 0;
            if (t < time) {
                for (; i + LANES <= width; i += LANES) store(to + i, load(from + t * token + i));
                for (; i < width; i++) put(to + i, to_float(from[t * token + i]));
            }
            std::memset(to + i, 0, (wide - i) * sizeof(Act));
        }
        if (rows) {
            by_row.need(packed_bytes<T>(tall, wide) / 4);
            pack_rows<Act, T>(left.at, wide, tall, wide, by_row.at);
        }
        if (columns) {
            by_column.need(packed_bytes<T>(wide, tall) / 4);
            pack_columns<Act, T>(left.at, wide, tall, wide, by_column.at);
        }
    }
};

// c [BLOCK, to - from] = rows of a times the rows from..to of b.
template <class T>
void scores(const Operand<T>& a, int row, const Operand<T>& b, int from, int to, float* c, int ldc) {
    using O = Operand<T>;
    const size_t depth = a.wide / O::PER_WORD, block = depth * 16;
    product(reinterpret_cast<const typename O::Left*>(a.left.at + static_cast<size_t>(row) * a.wide),
            a.wide / O::PER_LEFT,
            reinterpret_cast<const typename O::Word*>(b.by_row.at) + from / 16 * block, 16, block,
                    static_cast<int>(depth),
            BLOCK, to - from, c, ldc, false);
}

// c [BLOCK, wide] (+)= p [BLOCK, to - from] times the rows from..to of b.
template <class T>
void mix(const typename Operand<T>::Act* p, int ldp, const Operand<T>& b, int tall, int from, int to, float* c,
        bool more) {
    using O = Operand<T>;
    const size_t block = static_cast<size_t>(tall) / O::PER_WORD * 16;
    product(reinterpret_cast<const typename O::Left*>(p), ldp / O::PER_LEFT,
            reinterpret_cast<const typename O::Word*>(b.by_column.at) 
                    + static_cast<size_t>(from / O::PER_WORD) * 16, 16, block,
            (to - from) / O::PER_WORD, BLOCK, b.wide, c, b.wide, more);
}

// The same of columns of b: c [BLOCK, columns.wide()], and of the columns of p the sum in c [BLOCK, wide].
template <class T>
void scores(const Operand<T>& a, int row, const Operand<T>& b, const Columns& columns, float* c) {
    const int before = columns.before(), wide = columns.wide();
    if (before) scores<T>(a, row, b, columns.prefix, columns.prefix_end, c, wide);
    scores<T>(a, row, b, columns.from, columns.to, c + before, wide);
}

template <class T>
void mix(const typename Operand<T>::Act* p, const Operand<T>& b, int tall, const Columns& columns, float* c) {
    const int before = columns.before(), wide = columns.wide();
    if (before) mix<T>(p, wide, b, tall, columns.prefix, columns.prefix_end, c, false);
    mix<T>(p + before, wide, b, tall, columns.from, columns.to, c, before > 0);
}

template <class T> void put_row(const float* from, int width, float factor, T* to) {
    int i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, mul(load(from + i), all(factor)));
    for (; i < width; i++) put(to + i, from[i] * factor);
}

template <class T> struct Desk {
    Operand<T> q, k, v, dy;
    Memory<float> s, dp, result, dk, dv, lse, dots;
    Memory<typename Operand<T>::Act> p, ds;
    void need(int tall) {
        for (Memory<float>* each : {&s, &dp}) each->need(static_cast<size_t>(BLOCK) * tall);
        p.need(static_cast<size_t>(BLOCK) * tall);
        ds.need(static_cast<size_t>(BLOCK) * tall);
        lse.need(tall);
        dots.need(tall);
    }
    static Desk& mine() {
        static thread_local std::unique_ptr<Desk> kept = std::make_unique<Desk>();
        return *kept;
    }
};

// What is outside from..to of a row of scores is not seen.
inline void hide(float* s, int width, int from, int to) {
    for (int i = 0; i < from; i++) s[i] = -INFINITY;
    for (int i = to; i < width; i++) s[i] = -INFINITY;
}

// Of the columns of query t all but those of its prefix, and of its document up to itself, are not seen.
inline void hide(float* s, const PackedRows& a, long tokens, int t, const Columns& columns) {
    int begin = 0, end = 0;
    if (a.prefix_first && a.prefix_first[tokens + t] < a.prefix_end[tokens + t]) {
        begin = columns.of(a.prefix_first[tokens + t]);
        end = columns.of(a.prefix_end[tokens + t]);
    }
    for (int i = 0; i < begin; i++) s[i] = -INFINITY;
    hide(s + end, columns.wide() - end, columns.of(a.first[tokens + t]) - end, columns.of(t) + 1 - end);
}

template <class T>
void attention_forward(const PackedRows& a, Heads<const T> q, Heads<const T> k, Heads<const T> v, T* y, float* lse,
        int threads) {
    const int tall = up_to(a.time, 32), per = a.heads / a.groups;
    share_rows(threads, static_cast<long>(a.rows) * a.groups, 1, [&](long begin, long end) {
        const TileRegisters tiles;
        Desk<T>& desk = Desk<T>::mine();
        desk.need(tall);
        for (long unit = begin; unit < end; unit++) {
            const long tokens = unit / a.groups * a.time;
            const int g = static_cast<int>(unit % a.groups);
            desk.k.take(k.of(tokens, g), k.token, a.time, a.width, true, false);
            desk.v.take(v.of(tokens, g), v.token, a.time, a.value_width, false, true);
            desk.result.need(static_cast<size_t>(BLOCK) * desk.v.wide);
            for (int h = g * per; h < (g + 1) * per; h++) {
                desk.q.take(q.of(tokens, h), q.token, a.time, a.width, false, false);
                for (int row = 0; row < a.time; row += BLOCK) {
                    const int bottom = std::min(row + BLOCK, a.time);
                    const Columns columns(a, tokens, row);
                    const int wide = columns.wide();
                    scores<T>(desk.q, row, desk.k, columns, desk.s.at);
                    for (int t = row; t < bottom; t++) {
                        float* s = desk.s.at + (t - row) * wide;
                        hide(s, a, tokens, t, columns);
                        Floats top = all(-INFINITY), total = zeros();
                        for (int i = 0; i < wide; i += LANES) top = LEVEL::max(top, load(s + i));
                        const float highest = LEVEL::highest(top) * a.scale;
                        for (int i = 0; i < wide; i += LANES) {
                            const Floats e = exp(fma(load(s + i), all(a.scale), all(-highest)));
                            store(s + i, e);
                            total = add(total, e);
                        }
                        const float sum = LEVEL::sum(total);
                        lse[(tokens + t) * a.heads + h] = highest + std::log(sum);
                        auto* p = desk.p.at + static_cast<size_t>(t - row) * wide;
                        for (int i = 0; i < wide; i += LANES) store(p + i, mul(load(s + i), all(1.0f / sum)));
                    }
                    for (int t = bottom; t < columns.to; t++)
                        std::memset(desk.p.at + static_cast<size_t>(t - row) * wide, 0, wide * sizeof *desk.p.at);
                    mix<T>(desk.p.at, desk.v, tall, columns, desk.result.at);
                    for (int t = row; t < bottom; t++)
                        put_row(desk.result.at + static_cast<size_t>(t - row) * desk.v.wide, a.value_width, 1.0f,
                                y + ((tokens + t) * a.heads + h) * a.value_width);
                }
            }
        }
    });
}

// p and ds of a block: rows of scores s and of the gradient dp; at(i) is where a row's lse and dots are, or columns'
// are.
template <class T, bool BY_COLUMN>
void weights_and_change(float* s, const float* dp, int wide, float scale, const float* lse, const float* dots,
                        typename Operand<T>::Act* p, typename Operand<T>::Act* ds) {
    for (int i = 0; i < wide; i += LANES) {
        const Floats log_sum = BY_COLUMN ? load(lse + i) : all(*lse), dot = BY_COLUMN ? load(dots + i) : all(*dots);
        const Floats weight = exp(fma(load(s + i), all(scale), mul(log_sum, all(-1.0f))));
        if (p) store(p + i, weight);
        store(ds + i, mul(mul(weight, all(scale)), fma(dot, all(-1.0f), load(dp + i))));
    }
}

template <class T>
void attention_backward(const PackedRows& a, Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* y,
                        const float* lse, const T* dy, T* dq, T* dk, T* dv, int threads) {
    const int tall = up_to(a.time, 32), per = a.heads / a.groups;
    share_rows(threads, static_cast<long>(a.rows) * a.groups, 1, [&](long begin, long end) {
        const TileRegisters tiles;
        Desk<T>& desk = Desk<T>::mine();
        desk.need(tall);
        for (long unit = begin; unit < end; unit++) {
            const long tokens = unit / a.groups * a.time;
            const int g = static_cast<int>(unit % a.groups);
            const int* last = a.last + tokens;
            desk.k.take(k.of(tokens, g), k.token, a.time, a.width, true, true);
            desk.v.take(v.of(tokens, g), v.token, a.time, a.value_width, true, false);
            const int key_wide = desk.k.wide, value_wide = desk.v.wide;
            desk.result.need(static_cast<size_t>(BLOCK) * std::max(key_wide, value_wide));
            desk.dk.need(static_cast<size_t>(tall) * key_wide);
            desk.dv.need(static_cast<size_t>(tall) * value_wide);
            for (int h = g * per; h < (g + 1) * per; h++) {
                const bool more = h > g * per;
                const T* pull = dy + (tokens * a.heads + h) * a.value_width;
                const long step = static_cast<long>(a.heads) * a.value_width;
                desk.q.take(q.of(tokens, h), q.token, a.time, a.width, true, true);
                desk.dy.take(pull, step, a.time, a.value_width, true, true);
                for (int t = 0; t < tall; t++) {
                    float dot = 0;
                    if (t < a.time) {
                        const T *out = y + ((tokens + t) * a.heads + h) * a.value_width, *by = pull + t * step;
                        Floats sums = zeros();
                        int i = 0;
                        for (; i + LANES <= a.value_width; i += LANES) sums = fma(load(out + i), load(by + i), sums);
                        dot = sum(sums);
                        for (; i < a.value_width; i++) dot += to_float(out[i]) * to_float(by[i]);
                    }
                    desk.dots.at[t] = dot;
                    desk.lse.at[t] = t < a.time ? lse[(tokens + t) * a.heads + h] : 0.0f;
                }
                for (int row = 0; row < a.time; row += BLOCK) {
                    const int bottom = std::min(row + BLOCK, a.time), to = row + BLOCK;
                    // queries: what they see
                    const Columns columns(a, tokens, row);
                    int wide = columns.wide();
                    scores<T>(desk.q, row, desk.k, columns, desk.s.at);
                    scores<T>(desk.dy, row, desk.v, columns, desk.dp.at);
                    for (int t = row; t < to; t++) {
                        const size_t at = static_cast<size_t>(t - row) * wide;
                        if (t < bottom) hide(desk.s.at + at, a, tokens, t, columns);
                        else hide(desk.s.at + at, wide, wide, wide);
                        weights_and_change<T, false>(desk.s.at + at, desk.dp.at + at, wide, a.scale, desk.lse.at + t,
                                                     desk.dots.at + t, nullptr, desk.ds.at + at);
                    }
                    mix<T>(desk.ds.at, desk.k, tall, columns, desk.result.at);
                    for (int t = row; t < bottom; t++)
                        put_row(desk.result.at + static_cast<size_t>(t - row) * key_wide, a.width, 1.0f,
                                dq + ((tokens + t) * a.heads + h) * a.width);
                    // keys: who sees them
                    const int end_of = up_to(*std::max_element(last + row, last + bottom) + 1, 32);
                    wide = end_of - row;
                    scores<T>(desk.k, row, desk.q, row, end_of, desk.s.at, wide);
                    scores<T>(desk.v, row, desk.dy, row, end_of, desk.dp.at, wide);
                    for (int t = row; t < to; t++) {
                        const size_t at = static_cast<size_t>(t - row) * wide;
                        if (t < bottom) hide(desk.s.at + at, wide, t - row, last[t] + 1 - row);
                        else hide(desk.s.at + at, wide, wide, wide);
                        weights_and_change<T, true>(desk.s.at + at, desk.dp.at + at, wide, a.scale, desk.lse.at + row,
                                                    desk.dots.at + row, desk.p.at + at, desk.ds.at + at);
                    }
                    mix<T>(desk.ds.at, wide, desk.q, tall, row, end_of, desk.dk.at 
                            + static_cast<size_t>(row) * key_wide, more);
                    mix<T>(desk.p.at, wide, desk.dy, tall, row, end_of, desk.dv.at 
                            + static_cast<size_t>(row) * value_wide, more);
                }
            }
            for (int t = 0; t < a.time; t++) {
                put_row(desk.dk.at + static_cast<size_t>(t) * key_wide, a.width, 1.0f,
                        dk + ((tokens + t) * a.groups + g) * a.width);
                put_row(desk.dv.at + static_cast<size_t>(t) * value_wide, a.value_width, 1.0f,
                        dv + ((tokens + t) * a.groups + g) * a.value_width);
            }
        }
    });
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

#define WITH_TYPE(call)                                 \
    do {                                                \
        if (is_bf16) { using T = bf16; call; }          \
        else { using T = float; call; }                 \
    } while (0)
#define OF(T, p) static_cast<T*>(p)
#define SIZES long rows, long time, long heads, long groups, long width, long value_width, float scale, \
        const int *first, \
    const int *last, const int *prefix_first, const int *prefix_end, const void *q, long q_token, long q_head, \
    const void *k, long k_token, long k_head, \
            const void *v, \
    long v_token, long v_head
#define ROWS_OF {(int)rows, (int)time, (int)heads, (int)groups, (int)width, (int)value_width, scale, first, last, \
        prefix_first, prefix_end}
#define HEADS_OF {OF(const T, q), q_token, q_head}, {OF(const T, k), k_token, k_head}, {OF(const T, v), v_token, v_head}

extern "C" void DOOR(packed_attention_forward)(int is_bf16, SIZES, void* y, float* lse, int threads) {
    WITH_TYPE((LEVEL::attention_forward<T>(ROWS_OF, HEADS_OF, OF(T, y), lse, threads)));
}

extern "C" void DOOR(packed_attention_backward)(int is_bf16, SIZES, const void* y, const float* lse, const void* dy,
                                                void* dq, void* dk, void* dv, int threads) {
    WITH_TYPE((LEVEL::attention_backward<T>(ROWS_OF, HEADS_OF, OF(const T, y), lse, OF(const T, dy), OF(T, dq),
            OF(T, dk),
                                            OF(T, dv), threads)));
}
