// The expanded form of MLA as Python's tests call it.
#include "doors.h"
#include "expand.h"
#include "matmul.h"
#include "tiles.h"

namespace slingshot {
namespace LEVEL {
namespace {

// Every head's part of kv_b [heads, nope + value, latent]: `rows` from `first` on.
template <class T> Stack part_of(const T* kv_b, const LatentShape& s, int first, int rows, std::vector<char>& memory) {
    const size_t bytes = packed_bytes<T>(rows, s.latent);
    memory.assign(s.heads * bytes + 4096 + 64, 0);
    char* data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    for (int h = 0; h < s.heads; h++)
        pack<T, T>(kv_b + (static_cast<size_t>(h) * (s.nope + s.value) + first) * s.latent, s.latent, 1, rows, s.latent, 0,
                   (rows + 15) / 16, 1, data + h * bytes);
    return {{rows, s.latent, packed_depth<T>(s.latent), data}, bytes};
}

template <class T>
int attend_expanded(const LatentShape& shape, const Sequences& sequences, const void* kv_b, const void* q_nope,
                    int nope_stride, const void* q_absorbed, const void* entries, void* y, int threads) {
    LatentPlanner plan;
    plan.plan(shape, sequences, sizeof(T), threads);
    std::vector<char> key_memory, value_memory;
    const Stack to_keys = part_of(static_cast<const T*>(kv_b), shape, 0, shape.nope, key_memory);
    const Stack to_values = part_of(static_cast<const T*>(kv_b), shape, shape.nope, shape.value, value_memory);
    const int key = shape.nope + shape.rope;
    std::vector<T> q(static_cast<size_t>(sequences.starts[sequences.count]) * shape.heads * key);
    std::vector<T> keys(plan.rows * shape.heads * key), values(plan.rows * shape.heads * shape.value);
    auto job = [&](const Team& team) {
        const TileRegisters tiles;
        expand_entries(plan, shape, to_keys, to_values, entries, keys.data(), values.data(), team);
        expand_queries(plan, shape, static_cast<const T*>(q_nope), nope_stride, static_cast<const T*>(q_absorbed),
                       q.data(), team);
        team.barrier();
        attend(plan.expanded, q.data(), keys.data(), values.data(), static_cast<T*>(y), shape.heads * shape.value,
               team.thread);
        team.barrier();
        if (plan.expanded.n_merges)
            merge_attention(plan.expanded, static_cast<T*>(y), shape.heads * shape.value, team.thread, team.threads);
    };
    run_together(threads, job);
    return static_cast<int>(plan.tokens.size());
}

}  // namespace
}  // namespace LEVEL
}  // namespace slingshot

using namespace slingshot;

// Gives the number of tokens whose sequences attend in this form; the rows of y of the others stay as they are.
extern "C" int DOOR(attend_expanded)(int is_bf16, int form, int heads, int latent, int rope, int nope, int value, float scale,
                                     const int* starts, const int* lengths, const int* block_tables, int sequences,
                                     int pages, const void* kv_b, const void* q_nope, int nope_stride,
                                     const void* q_absorbed, const void* entries, void* y, int threads) {
    return (is_bf16 ? LEVEL::attend_expanded<bf16> : LEVEL::attend_expanded<float>)(
        {heads, latent, rope, nope, value, scale, form}, {starts, lengths, block_tables, sequences, pages}, kv_b, q_nope,
        nope_stride, q_absorbed, entries, y, threads);
}
