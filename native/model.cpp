// Where the weights lie, and how they get there.
#include "model.h"

#include <deque>

#include "quantized.h"
#include "scratch.h"

namespace slingshot {
namespace LEVEL {
namespace {

// A matrix, or every other block of one, that is to be packed.
struct Job {
    const void* from;
    size_t row_stride, column_stride;
    int n, k, step;
    void* to;
    bool from_bf16, to_bf16;
    int bits, group;
    const float* scales;  // of the weights' groups, if they are known

    int blocks() const { return (n + 15) / 16; }

    void run(int begin, int end) const {
        const float* floats = static_cast<const float*>(from);
        const bf16* halves = static_cast<const bf16*>(from);
        if (bits) return from_bf16 ? quantize(halves, begin, end) : quantize(floats, begin, end);
        if (from_bf16 && to_bf16) pack<bf16, bf16>(halves, row_stride, column_stride, n, k, begin, end, step, to);
        if (from_bf16 && !to_bf16) pack<bf16, float>(halves, row_stride, column_stride, n, k, begin, end, step, to);
        if (!from_bf16 && to_bf16) pack<float, bf16>(floats, row_stride, column_stride, n, k, begin, end, step, to);
        if (!from_bf16 && !to_bf16) pack<float, float>(floats, row_stride, column_stride, n, k, begin, end, step, to);
    }

  private:
    // To the nearest number, halves to the even one.
    template <class Source> void quantize(const Source* w, int begin, int end) const {
        const Packed packed = quantized(bits, group, n, k, to);
        for (int row = begin * 16; row < end * 16 && row < n; row++) {
            uint32_t* block = const_cast<uint32_t*>(packed.block<uint32_t>(row / 16 * step));
            float* scales = reinterpret_cast<float*>(block) + static_cast<size_t>(packed.depth) * 16;
            for (int g = 0; g < k / group; g++) {
                const Source* first = w + row * row_stride + static_cast<size_t>(g) * group * column_stride;
                const float scale = this->scales ? this->scales[static_cast<size_t>(row) * (k / group) + g]
                                                 : scale_of(first, column_stride, group, bits);
                for (int i = 0; i < group; i++) {
                    const float number = std::fabs(scale) > SMALLEST ? to_float(first[i * column_stride]) / scale : 0;
                    put_number(packed, reinterpret_cast<uint8_t*>(block), row % 16, g * group + i,
                               static_cast<int>(std::lrint(number)));
                }
                scales[g * 16 + row % 16] = scale;
            }
        }
    }
};

// What is to be packed, shared out over threads.
template <class T> class Packing {
  public:
    explicit Packing(bool from_bf16) : from_bf16_(from_bf16) {}

    void matrix(const void* from, const Packed& to, const void* scales = nullptr) {
        add(from, to.k, 1, to.n, 1, to, 0, scales);
    }

    // Gate's and up's blocks alternate.
    void pair(const void* gate, const void* up, int inner, const Packed& to, const void* gate_scales,
              const void* up_scales) {
        add(gate, to.k, 1, inner, 2, to, 0, gate_scales);
        add(up, to.k, 1, inner, 2, to, 1, up_scales);
    }

    void strided(const void* from, size_t offset, size_t row_stride, size_t column_stride, const Packed& to) {
        add(offset_of(from, offset), row_stride, column_stride, to.n, 1, to, 0);
    }

    void floats(const void* from, const Packed& to) {
        jobs_.push_back({from, static_cast<size_t>(to.k), 1, to.n, to.k, 1, at(to, 0), false, false, 0, 0, nullptr});
    }

    // Matrices whose outputs follow each other. Where one does not end with a block they are brought together first.
    struct Part {
        const void* from;
        int rows;
        const void* scales;
    };
    void stacked(std::vector<Part> parts, const Packed& to) {
        bool whole = true;
        for (const Part& part : parts) whole = whole && part.rows % 16 == 0;
        if (!whole) {
            const bool scaled = to.bits && parts[0].scales;
            std::vector<char>&numbers = joined_.emplace_back(), &scales = joined_.emplace_back();
            for (const Part& part : parts) {
                append(numbers, part.from, part.rows * to.k * (from_bf16_ ? 2 : 4));
                if (scaled) append(scales, part.scales, part.rows * (to.k / to.group) * sizeof(float));
            }
            parts = {{numbers.data(), to.n, scaled ? scales.data() : nullptr}};
        }
        int done = 0;
        for (const Part& part : parts) {
            add(part.from, to.k, 1, part.rows, 1, to, done / 16, part.scales);
            done += part.rows;
        }
    }

    void vector(const void* from, int count, T* to) const {
        for (int i = 0; i < count && from; i++) put(to + i, number(from, i));
    }

    float number(const void* from, size_t i) const {
        return from_bf16_ ? to_float(static_cast<const bf16*>(from)[i]) : static_cast<const float*>(from)[i];
    }

    const void* offset_of(const void* from, size_t numbers) const {
        return static_cast<const char*>(from) + numbers * (from_bf16_ ? 2 : 4);
    }

    void run(int threads) {
        double total = 0;
        for (const Job& job : jobs_) total += cost(job);
        auto work = [&](const Team& team) {
            const double from = total * team.thread / team.threads, to = total * (team.thread + 1) / team.threads;
            double before = 0;
            for (const Job& job : jobs_) {
                const double block = cost(job) / job.blocks();
                const int begin = place((from - before) / block, job.blocks());
                const int end = team.thread + 1 == team.threads ? job.blocks() : place((to - before) / block, job.blocks());
                if (begin < end) job.run(begin, end);
                before += cost(job);
            }
        };
        run_together(threads, work);
    }

  private:
    static double cost(const Job& job) { return static_cast<double>(job.blocks()) * job.k; }
    static int place(double at, int blocks) { return at <= 0 ? 0 : at >= blocks ? blocks : static_cast<int>(at + 0.5); }
    static void* at(const Packed& to, int block) { return const_cast<uint32_t*>(to.block<uint32_t>(block)); }

    static void append(std::vector<char>& to, const void* from, size_t bytes) {
        to.insert(to.end(), static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    }

    void add(const void* from, size_t row_stride, size_t column_stride, int n, int step, const Packed& to, int block,
             const void* scales = nullptr) {
        jobs_.push_back({from, row_stride, column_stride, n, to.k, step, at(to, block), from_bf16_, sizeof(T) == 2,
                         to.bits, to.group, static_cast<const float*>(scales)});
    }

    bool from_bf16_;
    std::vector<Job> jobs_;
    std::deque<std::vector<char>> joined_;  // whose places stay
};

// Cuts weights out of memory, or only counts them.
template <class T> struct Place {
    Carver carver;
    int group = 0;

    Packed plain(int n, int k) { return {n, k, packed_depth<T>(k), carver.take<char>(packed_bytes<T>(n, k))}; }
    Packed matrix(int n, int k, int bits) {
        return bits ? quantized(bits, group, n, k, carver.take<char>(quantized_bytes(bits, group, n, k))) : plain(n, k);
    }
    Packed pair(int inner, int k, int bits) { return matrix(2 * padded_inner(inner), k, bits); }
    Stack stack(int count, int n, int k, int bits) {
        const Packed first = matrix(n, k, bits);
        const Stack stack{first, first.blocks() * first.block_words() * 4};
        carver.take<char>((count - 1) * stack.bytes);
        return stack;
    }
};

}  // namespace

template <class T>
Model<T>::Model(const ModelShape& shape, const LayerBits* bits)
    : shape(shape), layers(shape.layers + shape.mtp_layers) {
    lay_out(nullptr, bits);
    lay_out(weights_.reserve(bytes_), bits);
}

template <class T> void Model<T>::lay_out(char* base, const LayerBits* bits) {
    const ModelShape& s = shape;
    Place<T> place{{base}, s.weight_group};
    for (int i = 0; i < static_cast<int>(layers.size()); i++) {
        LayerWeights<T>& layer = layers[i];
        const LayerBits& its = bits[i];
        layer = {};
        layer.input_norm = place.carver.template take<T>(s.width);
        layer.post_norm = place.carver.template take<T>(s.width);
        layer.q_norm = place.carver.template take<T>(s.latent_family ? s.q_rank : s.head_width);
        layer.k_norm = place.carver.template take<T>(s.latent_family ? s.latent : s.head_width);
        layer.bias = s.latent_family ? nullptr : place.carver.template take<float>(s.input_width());
        layer.input = place.matrix(s.input_width(), s.width, its.input);
        if (s.latent_family) {
            if (s.q_rank) layer.q_b = place.matrix(s.query_width(), s.q_rank, its.q_b);
            layer.absorb = place.stack(s.heads, s.latent, s.nope, 0);
            layer.to_keys = place.stack(s.heads, s.nope, s.latent, 0);
            layer.to_values = place.stack(s.heads, s.value, s.latent, 0);
        }
        layer.output = place.matrix(s.width, s.attended_width(), its.output);
        if (s.has_experts(i)) {
            layer.moe.width = s.width, layer.moe.inner = s.expert_inner, layer.moe.shared_inner = s.shared_inner;
            Place<float> floats{place.carver};
            layer.moe.router = {s.experts,       s.per_token,  s.expert_groups, s.kept_groups,
                                s.routed_scaling, s.normalized != 0, floats.plain(s.experts, s.width),
                                floats.carver.take<float>(s.experts)};
            place.carver = floats.carver;
            layer.moe.gate_up = place.stack(s.experts, 2 * padded_inner(s.expert_inner), s.width, its.expert_gate_up);
            layer.moe.down = place.stack(s.experts, s.width, s.expert_inner, its.expert_down);
            if (s.shared_inner) {
                layer.moe.shared_gate_up = place.pair(s.shared_inner, s.width, its.gate_up);
                layer.moe.shared_down = place.matrix(s.width, s.shared_inner, its.down);
            }
        } else {
            layer.gate_up = place.pair(s.inner, s.width, its.gate_up);
            layer.down = place.matrix(s.width, s.inner, its.down);
        }
        if (i >= s.layers) {
            for (T** norm : {&layer.embedding_norm, &layer.hidden_norm, &layer.output_norm})
                *norm = place.carver.template take<T>(s.width);
            layer.joint = place.matrix(s.width, 2 * s.width, its.joint);
        }
    }
    norm = place.carver.template take<T>(s.width);
    head = place.matrix(s.vocabulary, s.width, s.head_bits);
    bytes_ = place.carver.used;
}

template <class T> void Model<T>::refresh(const ModelTensors& tensors, int first_part, int last_part, int threads) {
    const ModelShape& s = shape;
    Packing<T> packing(tensors.are_bf16);
    const int n_layers = static_cast<int>(layers.size());
    const LayerTensors none{};
    for (int i = first_part; i < last_part && i < n_layers; i++) {
        LayerWeights<T>& layer = layers[i];
        const LayerTensors &from = tensors.layers[i], &scales = tensors.scales ? tensors.scales[i] : none;
        packing.vector(from.input_norm, s.width, layer.input_norm);
        packing.vector(from.post_norm, s.width, layer.post_norm);
        if (s.latent_family) {
            const int entry = s.latent + s.rope, part = s.nope + s.value;
            packing.stacked({{s.q_rank ? from.q_a : from.q, s.first_part(), s.q_rank ? scales.q_a : scales.q},
                             {from.kv_a, entry, scales.kv_a}}, layer.input);
            packing.vector(from.q_a_norm, s.q_rank, layer.q_norm);
            packing.vector(from.kv_a_norm, s.latent, layer.k_norm);
            if (s.q_rank) packing.matrix(from.q_b, layer.q_b, scales.q_b);
            for (int head = 0; head < s.heads; head++) {
                const size_t first = static_cast<size_t>(head) * part * s.latent;
                packing.strided(from.kv_b, first, 1, s.latent, layer.absorb[head]);
                packing.strided(from.kv_b, first, s.latent, 1, layer.to_keys[head]);
                packing.strided(from.kv_b, first + static_cast<size_t>(s.nope) * s.latent, s.latent, 1,
                                layer.to_values[head]);
            }
        } else {
            const int queries = s.query_width(), keys = s.groups * s.head_width;
            packing.stacked({{from.q, queries, scales.q}, {from.k, keys, scales.k}, {from.v, keys, scales.v}},
                            layer.input);
            if (from.q_bias) {
                for (int n = 0; n < queries; n++) layer.bias[n] = rounded<T>(packing.number(from.q_bias, n));
                for (int n = 0; n < keys; n++) {
                    layer.bias[queries + n] = rounded<T>(packing.number(from.k_bias, n));
                    layer.bias[queries + keys + n] = rounded<T>(packing.number(from.v_bias, n));
                }
            } else {
                layer.bias = nullptr;
            }
            packing.vector(from.q_norm, s.head_width, layer.q_norm);
            packing.vector(from.k_norm, s.head_width, layer.k_norm);
            if (!from.q_norm) layer.q_norm = layer.k_norm = nullptr;
        }
        packing.matrix(from.o, layer.output, scales.o);
        if (s.has_experts(i)) {
            MoeWeights& moe = layer.moe;
            packing.floats(from.router, moe.router.weights);
            std::memcpy(const_cast<float*>(moe.router.bias), from.router_bias, s.experts * sizeof(float));
            const size_t matrix = static_cast<size_t>(s.expert_inner) * s.width;
            // An expert's scales, those of gate and of up.
            auto of = [&](const void* scales, const Packed& first, size_t i) {
                return scales && first.bits ? static_cast<const float*>(scales) + i * (matrix / first.group) : nullptr;
            };
            for (int e = 0; e < s.experts; e++) {
                packing.pair(packing.offset_of(from.expert_gate_up, 2 * e * matrix),
                             packing.offset_of(from.expert_gate_up, (2 * e + 1) * matrix), s.expert_inner, moe.gate_up[e],
                             of(scales.expert_gate_up, moe.gate_up.first, 2 * e),
                             of(scales.expert_gate_up, moe.gate_up.first, 2 * e + 1));
                packing.matrix(packing.offset_of(from.expert_down, e * matrix), moe.down[e],
                               of(scales.expert_down, moe.down.first, e));
            }
            if (s.shared_inner) {
                packing.pair(from.gate, from.up, s.shared_inner, moe.shared_gate_up, scales.gate, scales.up);
                packing.matrix(from.down, moe.shared_down, scales.down);
            }
        } else {
            packing.pair(from.gate, from.up, s.inner, layer.gate_up, scales.gate, scales.up);
            packing.matrix(from.down, layer.down, scales.down);
        }
        if (i >= s.layers) {
            packing.vector(from.embedding_norm, s.width, layer.embedding_norm);
            packing.vector(from.hidden_norm, s.width, layer.hidden_norm);
            packing.vector(from.output_norm, s.width, layer.output_norm);
            packing.matrix(from.joint, layer.joint);
        }
    }
    if (last_part > n_layers) {
        packing.vector(tensors.norm, s.width, norm);
        packing.matrix(tensors.head ? tensors.head : tensors.embedding, head);
        embedding = tensors.embedding_goes ? nullptr : tensors.embedding, embedding_is_bf16 = tensors.are_bf16;
    }
    packing.run(threads);
}

template <class T> void Model<T>::embedding_row(int64_t id, T* to) const {
    if (!embedding) {
        unpack_row(head, static_cast<int>(id), to);
        return;
    }
    const size_t first = static_cast<size_t>(id) * shape.width;
    for (int i = 0; i < shape.width; i++)
        put(to + i, embedding_is_bf16 ? to_float(static_cast<const bf16*>(embedding)[first + i])
                                      : static_cast<const float*>(embedding)[first + i]);
}

template class Model<float>;
template class Model<bf16>;

}  // namespace LEVEL
}  // namespace slingshot
