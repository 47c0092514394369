// The door through which attention is tested at this level: the threads' parts one after the other.
#include "attention.h"
#include "doors.h"
#include "product.h"

namespace slingshot {
namespace LEVEL {
namespace {

template <class T>
void attend_all(const AttentionPlan& plan, const void* q, const void* keys, const void* values, void* y, int threads) {
    configure_tiles();
    for (int t = 0; t < threads; t++)
        attend(plan, static_cast<const T*>(q), static_cast<const T*>(keys), static_cast<const T*>(values),
               static_cast<T*>(y), t);
    for (int t = 0; t < threads && plan.n_merges; t++) merge_attention(plan, static_cast<T*>(y), t, threads);
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

extern "C" void DOOR(attend)(int is_bf16, int heads, int groups, int width, int value_width, float scale,
                             const int* starts, const int* lengths, const int* block_tables, int sequences, int pages,
                             const void* q, const void* keys, const void* values, void* y, int threads) {
    using namespace slingshot;
    AttentionPlanner planner;
    const AttentionPlan plan = planner.plan({heads, groups, width, value_width, scale},
                                            {starts, lengths, block_tables, sequences, pages}, threads);
    if (is_bf16)
        LEVEL::attend_all<bf16>(plan, q, keys, values, y, threads);
    else
        LEVEL::attend_all<float>(plan, q, keys, values, y, threads);
}
