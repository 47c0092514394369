// The whole forward pass of a flat batch, in one call: threads run it together and meet between its stages.
//
// Numbers are rounded to T where torch's path has a tensor of it, so that both give the same within T's rounding.
#include "forward.h"

#include "attention.h"
#include "epilogue.h"
#include "expand.h"
#include "rope.h"
#include "scratch.h"
#include "tiles.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int LONE = 2;  // tokens up to which every thread makes the norms for itself: sooner done than waited for

int round_up(int x, int to) { return (x + to - 1) / to * to; }

template <class T> class Forward {
    Model<T>& model;
    const ModelShape& shape;
    const Step& step;
    const Places places;
    AttentionPlanner planner;
    AttentionPlan plan;
    const LatentShape latent;
    LatentPlanner expansion;
    T *made_keys, *made_values, *made_queries;  // of the sequences that attend in the expanded form
    T *x, *normed, *input, *low, *full, *queries, *nope, *attended, *heads_out, *inner;
    void* moe_memory;
    size_t normed_each;  // numbers from one thread's own norms to the next one's
    int width_stride, input_stride, low_stride, full_stride, nope_stride, heads_stride, inner_stride;

  public:
    Forward(Model<T>& model, const Step& step)
        : model(model), shape(model.shape), step(step),
          places{step.tokens, step.cos, step.sin, step.positions, step.slots},
          latent{shape.heads, shape.latent, shape.rope, shape.nope, shape.value, shape.scale,
                 shape.cache_form} {
        const ModelShape& s = shape;
        const Sequences sequences{step.starts, step.lengths, step.block_tables, step.sequences, step.pages};
        if (s.latent_family)
            expansion.plan(latent, sequences, sizeof(T), step.threads);
        else
            plan = planner.plan({s.heads, s.groups, s.head_width, s.head_width, s.scale, s.cache_form}, sequences,
                                step.threads);
        width_stride = round_up(s.width, 32);
        input_stride = round_up(s.input_width(), 32);
        low_stride = round_up(s.q_rank, 32);
        full_stride = round_up(s.query_width(), 32);
        nope_stride = round_up(s.nope, 32);
        heads_stride = s.latent_family ? round_up(s.attended_width(), 32) : s.attended_width();  // as attention writes it
        inner_stride = padded_inner(s.inner);
        carve(model.working.reserve(carve(nullptr)));
    }

    void run(const Team& team) {
        const TileRegisters tiles;
        const int first = step.mtp_hidden ? shape.layers : 0;
        const int last = step.mtp_hidden ? shape.layers + 1 : shape.layers;
        step.mtp_hidden ? begin_module(team) : embed(team);
        if (step.mtp_hidden && !step.wanted && !step.hidden) return write_entries(first, team);
        int16_t* routed = step.routed;
        for (int i = first; i < last; i++) {
            block(i, shape.has_experts(i) ? routed : nullptr, team);
            if (routed && shape.has_experts(i)) routed += shape.per_token;
        }
        finish(step.mtp_hidden ? model.layers[first].output_norm : model.norm, team);
    }

  private:
    // Cuts up the working memory; gives its length. Tiles read whole: rows go on to a multiple of 16.
    size_t carve(char* base) {
        const ModelShape& s = shape;
        Carver carver{base};
        const size_t rows = round_up(step.tokens, 16) + 16, wanted = round_up(step.wanted, 16) + 16;
        x = carver.take<T>(rows * s.width);
        const bool both = step.mtp_hidden != nullptr;
        normed_each = (step.tokens > LONE ? (rows > wanted ? rows : wanted) : wanted + 16) * width_stride * (both ? 2 : 1);
        normed = carver.take<T>(normed_each * (step.tokens > LONE ? 1 : step.threads));
        input = carver.take<T>(rows * input_stride);
        low = carver.take<T>(rows * low_stride);
        full = carver.take<T>(s.q_rank ? rows * full_stride : 0);
        queries = carver.take<T>(rows * s.heads * (s.latent_family ? s.latent + s.rope : s.head_width));
        nope = carver.take<T>(rows * s.heads * nope_stride);
        attended = carver.take<T>(s.latent_family ? rows * s.heads * s.latent : 0);
        heads_out = carver.take<T>(rows * heads_stride);
        inner = carver.take<T>(rows * inner_stride);
        made_keys = carver.take<T>(expansion.rows * s.heads * (s.nope + s.rope));
        made_values = carver.take<T>(expansion.rows * s.heads * s.value);
        made_queries = carver.take<T>(expansion.any_expanded ? rows * s.heads * (s.nope + s.rope) : 0);
        size_t most = 0;
        for (const LayerWeights<T>& layer : model.layers) {
            const size_t bytes = layer.moe.width ? moe_bytes<T>(layer.moe, step.tokens, step.threads) : 0;
            most = bytes > most ? bytes : most;
        }
        moe_memory = carver.take<char>(most);
        return carver.used;
    }

    void embed(const Team& team) {
        for (int t = team.first(step.tokens); t < team.last(step.tokens); t++)
            model.embedding_row(step.token_ids[t], x + static_cast<size_t>(t) * shape.width);
        team.barrier();
    }

    // The MTP module's input: the norms of embedding and hidden state, side by side, brought to the model's width.
    void begin_module(const Team& team) {
        const LayerWeights<T>& layer = model.layers[shape.layers];
        const int stride = 2 * width_stride;
        T* own = normed;  // rows of all tokens, whoever makes them
        for (int t = team.first(step.tokens); t < team.last(step.tokens); t++) {
            T* to = own + static_cast<size_t>(t) * stride;
            T* embedding = input + static_cast<size_t>(t) * input_stride;
            model.embedding_row(step.token_ids[t], embedding);
            rms_norm(embedding, layer.embedding_norm, shape.width, shape.eps, to);
            const T* hidden = static_cast<const T*>(step.mtp_hidden) + static_cast<size_t>(t) * shape.width;
            rms_norm(hidden, layer.hidden_norm, shape.width, shape.eps, to + shape.width);
        }
        team.barrier();
        product(layer.joint, own, stride, Stored<T>{x, static_cast<size_t>(shape.width), nullptr}, team);
        team.barrier();
    }

    // This thread's blocks of the product, two by two, for all tokens.
    template <class Each> void product(const Packed& w, const T* from, int stride, const Each& each, const Team& team) {
        const int pairs = (w.blocks() + 1) / 2, end = 2 * team.last(pairs);
        matmul_each(w, 2 * team.first(pairs), end < w.blocks() ? end : w.blocks(), from, stride, step.tokens, each);
    }

    // Norms of the residual's rows: all of them are there when it returns.
    const T* norms(const T* weight, int stride, const Team& team) {
        const bool lone = step.tokens <= LONE;
        T* to = lone ? normed + team.thread * normed_each : normed;
        for (int t = lone ? 0 : team.first(step.tokens); t < (lone ? step.tokens : team.last(step.tokens)); t++)
            rms_norm(x + static_cast<size_t>(t) * shape.width, weight, shape.width, shape.eps,
                     to + static_cast<size_t>(t) * stride);
        if (!lone) team.barrier();
        return to;
    }

    void project(const LayerWeights<T>& layer, const Team& team) {
        product(layer.input, norms(layer.input_norm, width_stride, team), width_stride,
                Stored<T>{input, static_cast<size_t>(input_stride), layer.bias}, team);
        team.barrier();
    }

    // What MLA keeps of the tokens, for no queries.
    void write_entries(int i, const Team& team) {
        project(model.layers[i], team);
        const LatentHeads<T> none{0,           shape.nope,       shape.rope,       shape.latent,
                                  nope_stride, shape.cache_form, shape.latent_eps, model.layers[i].k_norm};
        write_latent(none, places, input, input_stride, input + shape.first_part(), input_stride, nope, queries,
                     step.keys[i], team.thread, team.threads);
    }

    void block(int i, int16_t* routed, const Team& team) {
        const LayerWeights<T>& layer = model.layers[i];
        project(layer, team);
        shape.latent_family ? latent_attention(layer, i, team) : grouped_attention(layer, i, team);
        const Added<T> added{x, static_cast<size_t>(shape.width)};
        product(layer.output, heads_out, heads_stride, added, team);
        team.barrier();
        const bool experts = layer.moe.width > 0;
        const T* from = norms(layer.post_norm, experts ? shape.width : width_stride, team);
        if (experts) {
            moe(layer.moe, from, step.tokens, x, routed, step.routed_layers * shape.per_token, moe_memory, team);
        } else {
            product(layer.gate_up, from, width_stride, Gated<T>{inner, static_cast<size_t>(inner_stride)}, team);
            team.barrier();
            product(layer.down, inner, inner_stride, added, team);
        }
        team.barrier();
    }

    void attend_and_merge(const AttentionPlan& plan, const T* q, const void* keys, const void* values, T* y, int stride,
                          const Team& team) {
        attend(plan, q, keys, values, y, stride, team.thread);
        team.barrier();
        if (plan.n_merges) {
            merge_attention(plan, y, stride, team.thread, team.threads);
            team.barrier();
        }
    }

    void grouped_attention(const LayerWeights<T>& layer, int i, const Team& team) {
        const GroupedHeads<T> heads{shape.heads,      shape.groups, shape.head_width,
                                    shape.cache_form, shape.eps,    layer.q_norm, layer.k_norm};
        void *keys = step.keys[i], *values = step.values[i];
        write_grouped(heads, places, input, input_stride, queries, keys, values, team.thread, team.threads);
        team.barrier();
        attend_and_merge(plan, queries, keys, values, heads_out, heads_stride, team);
    }

    void latent_attention(const LayerWeights<T>& layer, int i, const Team& team) {
        const ModelShape& s = shape;
        const T* q = input;
        int q_stride = input_stride;
        if (s.q_rank) {
            for (int t = team.first(step.tokens); t < team.last(step.tokens); t++)
                rms_norm(input + static_cast<size_t>(t) * input_stride, layer.q_norm, s.q_rank, s.latent_eps,
                         low + static_cast<size_t>(t) * low_stride);
            team.barrier();
            product(layer.q_b, low, low_stride, Stored<T>{full, static_cast<size_t>(full_stride), nullptr}, team);
            team.barrier();
            q = full, q_stride = full_stride;
        }
        const LatentHeads<T> heads{s.heads,     s.nope,       s.rope,       s.latent,
                                   nope_stride, s.cache_form, s.latent_eps, layer.k_norm};
        void* entries = step.keys[i];
        write_latent(heads, places, q, q_stride, input + s.first_part(), input_stride, nope, queries, entries,
                     team.thread, team.threads);
        team.barrier();
        const int entry = s.latent + s.rope;
        if (expansion.any_absorbed) by_head(layer.absorb, nope, nope_stride, queries, entry, s.heads * entry, team);
        if (expansion.any_expanded) {
            expand_entries(expansion, latent, layer.to_keys, layer.to_values, entries, made_keys, made_values, team);
            expand_queries(expansion, latent, nope, nope_stride, queries, made_queries, team);
        }
        team.barrier();
        if (expansion.any_absorbed) {
            attend_and_merge(expansion.absorbed, queries, entries, nullptr, attended, s.heads * s.latent, team);
            by_head(layer.to_values, attended, s.latent, heads_out, s.value, heads_stride, team);
            team.barrier();
        }
        // After the others: the product just above wrote rows of all tokens, these ones' without meaning.
        if (expansion.any_expanded)
            attend_and_merge(expansion.expanded, made_queries, made_keys, made_values, heads_out, heads_stride, team);
    }

    // Every head's rows of x, `from_each` numbers apart from head to head, times its own matrix.
    void by_head(const Stack& w, const T* from, int from_each, T* to, int to_each, int to_stride, const Team& team) {
        const int blocks = w.first.blocks(), pairs = (blocks + 1) / 2;
        for (int item = team.first(shape.heads * pairs), last = team.last(shape.heads * pairs); item < last;) {
            const int head = item / pairs, begin = item % pairs;
            const int end = last - head * pairs < pairs ? last - head * pairs : pairs;
            matmul_each(w[head], 2 * begin, 2 * end < blocks ? 2 * end : blocks, from + head * from_each,
                        static_cast<size_t>(shape.heads) * from_each, step.tokens,
                        Stored<T>{to + head * to_each, static_cast<size_t>(to_stride), nullptr});
            item = head * pairs + end;
        }
    }

    // Final norm of what is wanted, and the head.
    void finish(const T* weight, const Team& team) {
        const int width = shape.width;
        T* hidden = static_cast<T*>(step.hidden);
        for (int t = team.first(step.tokens); hidden && t < team.last(step.tokens); t++)
            rms_norm(x + static_cast<size_t>(t) * width, weight, width, shape.eps, hidden + static_cast<size_t>(t) * width);
        for (int i = team.first(step.wanted); i < team.last(step.wanted); i++)
            rms_norm(x + step.wanted_tokens[i] * width, weight, width, shape.eps,
                     normed + static_cast<size_t>(i) * width_stride);
        team.barrier();
        const int pairs = (model.head.blocks() + 1) / 2, end = 2 * team.last(pairs);
        matmul_each(model.head, 2 * team.first(pairs), end < model.head.blocks() ? end : model.head.blocks(), normed,
                    width_stride, step.wanted,
                    Stored<float>{step.logits, static_cast<size_t>(shape.vocabulary), nullptr});
    }
};

}  // namespace

template <class T> void forward(Model<T>& model, const Step& step) {
    Forward<T> forward(model, step);
    auto job = [&](const Team& team) { forward.run(team); };
    run_together(step.threads, job);
}

template void forward(Model<float>&, const Step&);
template void forward(Model<bf16>&, const Step&);

}  // namespace LEVEL
}  // namespace slingshot
