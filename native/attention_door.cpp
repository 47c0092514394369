// Attention, and what is written before it, as Python's tests call them.
#include "attention.h"
#include "doors.h"
#include "pool.h"
#include "rope.h"
#include "tiles.h"

namespace slingshot {
namespace LEVEL {
namespace {

template <class T>
void attend_all(const AttentionPlan& plan, const void* q, const void* keys, const void* values, void* y, int threads) {
    const int stride = plan.shape.heads * plan.shape.value_width;
    auto job = [&](const Team& team) {
        const TileRegisters tiles;
        attend(plan, static_cast<const T*>(q), keys, values, static_cast<T*>(y), stride, team.thread);
        if (plan.n_merges) {
            team.barrier();
            merge_attention(plan, static_cast<T*>(y), stride, team.thread, team.threads);
        }
    };
    run_together(threads, job);
}

template <class T>
void write_grouped_all(int form, int heads, int groups, int width, float eps, const void* q_norm, const void* k_norm,
                       const Places& places, const void* qkv, int stride, void* q, void* keys, void* values, int threads) {
    const GroupedHeads<T> shape{heads, groups, width, form, eps, static_cast<const T*>(q_norm), static_cast<const T*>(k_norm)};
    auto job = [&](const Team& team) {
        write_grouped(shape, places, static_cast<const T*>(qkv), stride, static_cast<T*>(q), keys, values, team.thread,
                      team.threads);
    };
    run_together(threads, job);
}

template <class T>
void write_latent_all(int form, int heads, int nope, int rope, int latent, int nope_stride, float eps, const void* norm,
                      const Places& places, const void* q, int q_stride, const void* kv, int kv_stride, void* q_nope,
                      void* q_absorbed, void* entries, int threads) {
    const LatentHeads<T> shape{heads, nope, rope, latent, nope_stride, form, eps, static_cast<const T*>(norm)};
    auto job = [&](const Team& team) {
        write_latent(shape, places, static_cast<const T*>(q), q_stride, static_cast<const T*>(kv), kv_stride,
                     static_cast<T*>(q_nope), static_cast<T*>(q_absorbed), entries, team.thread, team.threads);
    };
    run_together(threads, job);
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

extern "C" void DOOR(attend)(int is_bf16, int form, int heads, int groups, int width, int value_width, float scale,
                             const int* starts, const int* lengths, const int* block_tables, int sequences, int pages,
                             const void* q, const void* keys, const void* values, void* y, int threads) {
    AttentionPlanner planner;
    const AttentionPlan plan = planner.plan({heads, groups, width, value_width, scale, form},
                                            {starts, lengths, block_tables, sequences, pages}, threads);
    (is_bf16 ? LEVEL::attend_all<bf16> : LEVEL::attend_all<float>)(plan, q, keys, values, y, threads);
}

extern "C" void DOOR(write_grouped)(int is_bf16, int form, int heads, int groups, int width, float eps,
                                    const void* q_norm, const void* k_norm, int tokens, const float* cos, const float* sin,
                                    const int64_t* positions, const int64_t* slots, const void* qkv, int stride, void* q,
                                    void* keys, void* values, int threads) {
    (is_bf16 ? LEVEL::write_grouped_all<bf16> : LEVEL::write_grouped_all<float>)(
        form, heads, groups, width, eps, q_norm, k_norm, {tokens, cos, sin, positions, slots}, qkv, stride, q, keys, values,
        threads);
}

extern "C" void DOOR(write_latent)(int is_bf16, int form, int heads, int nope, int rope, int latent, int nope_stride, float eps,
                                   const void* norm, int tokens, const float* cos, const float* sin,
                                   const int64_t* positions, const int64_t* slots, const void* q, int q_stride,
                                   const void* kv, int kv_stride, void* q_nope, void* q_absorbed, void* entries,
                                   int threads) {
    (is_bf16 ? LEVEL::write_latent_all<bf16> : LEVEL::write_latent_all<float>)(
        form, heads, nope, rope, latent, nope_stride, eps, norm, {tokens, cos, sin, positions, slots}, q, q_stride, kv,
        kv_stride, q_nope, q_absorbed, entries, threads);
}
