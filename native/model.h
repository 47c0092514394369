// A model's weights in the kernels' order, and the step that runs over them. T is what activations are: float or bf16.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "moe.h"

namespace slingshot {

// As ModelConfig has them (model/config.py); what a family lacks is 0. kernels/native_model.py has the same structures.
struct ModelShape {
    int latent_family;  // deepseek_v3: MLA and experts; else grouped queries
    int vocabulary, width, layers, mtp_layers, heads, inner;
    int groups, head_width;                          // grouped queries
    int q_rank, latent, nope, rope, value;           // MLA; q_rank 0: a plain q_proj
    int experts, expert_inner, shared_inner, per_token, expert_groups, kept_groups, first_expert_layer, normalized;
    int weight_group;  // of matrices of few bits, every k a multiple of it; 0: a row, and activations are rounded too
    int head_bits;     // as LayerBits has them
    int cache_form;    // a CacheForm (attention.h)
    float eps, latent_eps, scale, routed_scaling;

    int query_width() const { return latent_family ? heads * (nope + rope) : heads * head_width; }
    int attended_width() const { return heads * (latent_family ? value : head_width); }
    // What the layer's input is multiplied to: q, k and v; or q (its latent, if it has one) and the new cache entry.
    int first_part() const { return latent_family && q_rank ? q_rank : query_width(); }
    int input_width() const { return first_part() + (latent_family ? latent + rope : 2 * groups * head_width); }
    bool has_experts(int layer) const { return latent_family && experts > 0 && layer >= first_expert_layer; }
};

// In how many bits a layer's matrices are kept: 8, 4, or 0: as T. Of those that stand side by side the most that one has.
struct LayerBits {
    int input, q_b, output, gate_up, down, expert_gate_up, expert_down, joint;
};

// One layer's tensors as torch holds them, row-major; null where the model has none. All are of one dtype but the
// router's two, which are float32.
struct LayerTensors {
    const void *input_norm, *post_norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm;
    const void *q_a, *q_a_norm, *q_b, *kv_a, *kv_a_norm, *kv_b, *o;
    const void *gate, *up, *down, *router, *router_bias, *expert_gate_up, *expert_down;
    const void *embedding_norm, *hidden_norm, *joint, *output_norm;  // the MTP module's own
};

struct ModelTensors {
    int are_bf16;
    int embedding_goes;  // it does not outlive the call: its rows are read from the packed head, which it is too
    const void *embedding, *norm, *head;
    const LayerTensors* layers;  // the MTP module's last
    const LayerTensors* scales;  // null, or of every matrix kept in few bits the float scales [n, k / group] that its
                                 // weights are whole numbers of
};

// One step: engine/batch.py's FlatBatch, the cache, and where the results go. Null: not asked for.
struct Step {
    int tokens, sequences, pages, wanted, threads, routed_layers;
    const int64_t *token_ids, *positions, *slots, *wanted_tokens;
    const int *starts, *lengths, *block_tables;
    const float *cos, *sin;
    void* const* keys;    // of every layer: keys, or entries
    void* const* values;  // null: entries
    const void* mtp_hidden;  // [tokens, width]: the MTP module runs over them instead of the main model; nothing wanted
                             // and no hidden: only to write its cache entries
    float* logits;           // [wanted, vocabulary]
    void* hidden;            // [tokens, width]
    int16_t* routed;         // [tokens, routed_layers, per_token]
};

constexpr int CHAIN = 8;  // tokens of a chain at most

// A step of one sequence: its last token and guesses of what follows are run, tokens drawn, guesses compared and made.
// engine/lone.py has the same structure.
struct Chain {
    int tokens, position, pages, threads;  // run now; of the first; in the table
    int most;                              // guesses that the module is to make; 0: it stays out of it
    int mtp_from, mtp_page;                // the position at which it goes on, the page at which it began
    int greedy;
    float divisor, top_p, min_p;
    int64_t top_k;
    uint64_t stream;  // of the noise
    const int* table;
    const float *cos, *sin;
    void* const* keys;
    void* const* values;
    int64_t ids[CHAIN];  // run now
    int64_t drawn[CHAIN];  // after each of them
    float logprobs[CHAIN];
    int taken;  // of these: as many as were guessed right, and one
    int guessed;
    int64_t guesses[CHAIN];
};

namespace LEVEL {

template <class T> struct LayerWeights {
    T *input_norm, *post_norm;
    T *q_norm, *k_norm;  // of heads (may be null); MLA: of the two latents
    float* bias;         // of `input`; may be null
    Packed input, q_b, output;
    Stack absorb;              // each head's part of kv_b: queries to the latent,
    Stack to_keys, to_values;  // the latent to keys, to values
    Packed gate_up, down;   // without experts
    MoeWeights moe;         // with
    T *embedding_norm, *hidden_norm, *output_norm;
    Packed joint;
};

template <class T> class Model {
  public:
    Model(const ModelShape& shape, const LayerBits* bits);

    // Takes over the weights of these parts as they are now: layers, and as the last part what is no layer's.
    void refresh(const ModelTensors& tensors, int first_part, int last_part, int threads);

    // A token's row of the embedding, which is read where it lies.
    void embedding_row(int64_t id, T* to) const;

    const ModelShape shape;
    std::vector<LayerWeights<T>> layers;
    T* norm;
    Packed head;
    const void* embedding;  // null: the head's rows
    bool embedding_is_bf16;
    Memory working;  // of the step
    Memory chained;  // of what happens between the passes of a chain

  private:
    void lay_out(char* base, const LayerBits* bits);

    Memory weights_;
    size_t bytes_ = 0;
};

}  // namespace LEVEL
}  // namespace slingshot
