// Attention of a flat batch over cache pages: grouped queries (keys and values apart), or MLA in its absorbed form (one
// entry a token for all heads, values its first numbers), for decoding rows and chunks of prompts alike.
//
// A step makes one plan for all its layers. Its units are pieces of work that threads take: some rows of one sequence
// that share a key head, over some of its tokens. A row is one query head of one new token. How a sequence is cut into
// units depends on the sequence alone, so its numbers are the same whatever the threads and its neighbours are.
#pragma once

#include <vector>

namespace slingshot {

constexpr int PAGE = 16;    // tokens of a page
constexpr int ROWS = 128;   // rows of a unit, at most
constexpr int CHUNK = 256;  // tokens of a unit, about, where a sequence has no more rows than one unit holds

enum CacheForm { AS_COMPUTED, INT8, FP8 };  // how the cache holds entries: entries.h

struct AttentionShape {
    int heads, groups, width, value_width;
    float scale;
    int form;  // of the entries: a CacheForm
};

// The sequences of a step, as FlatBatch has them: tokens starts[s] to starts[s + 1] are the new ones of sequence s,
// lengths[s] are its tokens after the step, block_tables[s * pages ...] its pages.
struct Sequences {
    const int *starts, *lengths, *block_tables;
    int count, pages;
};

struct AttentionUnit {
    int sequence, group, first_row, rows, begin, end;
    long partial;  // first row of its partial results; -1: the unit sees all tokens and writes its rows out
};

// Chunks of the same rows, whose partial results become one.
struct AttentionMerge {
    int sequence, group, rows, chunks;
    long partial;
};

struct AttentionPlan {
    AttentionShape shape;
    Sequences sequences;
    const AttentionUnit* units;
    const int* bounds;  // thread t takes the units from bounds[t] to bounds[t + 1]
    const AttentionMerge* merges;
    int n_merges;
    float* partials;  // a row: value_width numbers, the sum of the weights, their largest score
};

class AttentionPlanner {
  public:
    // left_out, unless null, says which sequences attend in another way.
    AttentionPlan plan(const AttentionShape& shape, const Sequences& sequences, int threads,
                       const char* left_out = nullptr);

  private:
    std::vector<AttentionUnit> units_;
    std::vector<AttentionMerge> merges_;
    std::vector<int> bounds_;
    std::vector<float> partials_;
};

namespace LEVEL {

// y = softmax(scale q k^T) v by rows of q [tokens, heads, width]; y [tokens, heads, value_width], `y_stride` numbers from
// token to token; entries keys [pages, PAGE, groups, width], values [pages, PAGE, groups, value_width], or null for the
// first numbers of the keys. Every thread calls it; where the plan has merges, all threads meet and then call
// merge_attention.
template <class T>
void attend(const AttentionPlan& plan, const T* q, const void* keys, const void* values, T* y, int y_stride, int thread);
template <class T> void merge_attention(const AttentionPlan& plan, T* y, int y_stride, int thread, int threads);

}  // namespace LEVEL
}  // namespace slingshot
