// One sequence's step in one call. engine/speculation.py does the same with a call for every pass, for any number of
// sequences, and says why guesses change nothing but the number of steps.
#include <algorithm>

#include "forward.h"
#include "sample.h"
#include "scratch.h"

namespace slingshot {
namespace LEVEL {
namespace {

constexpr int PAGE = 16;

// engine/draw.py's uniform_noise.
float noise(uint64_t stream, int64_t position) {
    uint64_t x = stream + static_cast<uint64_t>(position) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return static_cast<float>((x ^ (x >> 31)) >> 40) * 0x1p-24f;
}

template <class T> class ChainRun {
    Model<T>& model;
    Chain& chain;
    float *logits, *scratch;
    T *hidden, *own_hidden;  // of the main model, of the module
    int64_t positions[CHAIN], slots[CHAIN], wanted[CHAIN];

  public:
    ChainRun(Model<T>& model, Chain& chain) : model(model), chain(chain) {
        carve(model.chained.reserve(carve(nullptr)));
    }

    void run() {
        for (int i = 0; i < chain.tokens; i++) wanted[i] = i;
        pass(chain.ids, chain.tokens, chain.position, 0, chain.tokens, nullptr, chain.most ? hidden : nullptr);
        draw(chain.tokens, chain.position + 1, chain.drawn, chain.logprobs);
        int taken = 1;
        while (taken < chain.tokens && chain.ids[taken] == chain.drawn[taken - 1]) taken++;
        chain.taken = taken;
        chain.guessed = 0;
        const int next = chain.position + taken, begin = std::max(chain.mtp_from, chain.position);
        if (chain.most && begin < next) guess(begin, next);
    }

  private:
    size_t carve(char* base) {
        Carver carver{base};
        const int width = model.shape.width, vocabulary = model.shape.vocabulary;
        logits = carver.take<float>(static_cast<size_t>(CHAIN) * vocabulary);
        scratch = carver.take<float>(sample_scratch(CHAIN, vocabulary));
        hidden = carver.take<T>(CHAIN * width);
        own_hidden = carver.take<T>(CHAIN * width);
        return carver.used;
    }

    // The module follows over the tokens that count, and goes on from its own guesses, as far as the pages reach. Of all
    // but the last of the tokens it needs no more than their entries in its cache: it has but one layer.
    void guess(int begin, int next) {
        const int width = model.shape.width, first = begin - chain.position, earlier = next - 1 - begin;
        float logprob;
        wanted[0] = 0;
        if (earlier) pass(chain.drawn + first, earlier, begin, chain.mtp_page, 0, hidden + first * width, nullptr);
        T *last = own_hidden, *other = hidden;
        pass(chain.drawn + chain.taken - 1, 1, next - 1, chain.mtp_page, 1, hidden + (chain.taken - 1) * width, last);
        for (int& made = chain.guessed;;) {
            draw(1, next + 1 + made, chain.guesses + made, &logprob);
            made++;
            const int position = next + made - 1;
            if (made >= chain.most || position >= chain.pages * PAGE) return;
            pass(chain.guesses + made - 1, 1, position, chain.mtp_page, 1, last, other);
            std::swap(last, other);
        }
    }

    // Tokens from `position` on, in a cache that begins at `page`.
    void pass(const int64_t* ids, int tokens, int position, int page, int n_wanted, const T* mtp_hidden, T* to) {
        for (int i = 0; i < tokens; i++) {
            slots[i] = static_cast<int64_t>(chain.table[(position + i) / PAGE]) * PAGE + (position + i) % PAGE;
            positions[i] = position + i - page * PAGE;
        }
        const int starts[2] = {0, tokens}, length = position + tokens - page * PAGE;
        Step step{};
        step.tokens = tokens, step.sequences = 1, step.pages = chain.pages - page, step.wanted = n_wanted;
        step.threads = chain.threads;
        step.token_ids = ids, step.positions = positions, step.slots = slots, step.wanted_tokens = wanted;
        step.starts = starts, step.lengths = &length, step.block_tables = chain.table + page;
        step.cos = chain.cos, step.sin = chain.sin, step.keys = chain.keys, step.values = chain.values;
        step.mtp_hidden = mtp_hidden, step.logits = logits, step.hidden = to;
        forward(model, step);
    }

    // A token from each of so many rows of logits, the first with the noise of this position.
    void draw(int rows, int position, int64_t* ids, float* logprobs) {
        float divisors[CHAIN], uniform[CHAIN], top_p[CHAIN], min_p[CHAIN];
        int64_t top_k[CHAIN];
        uint8_t greedy[CHAIN];
        for (int i = 0; i < rows; i++) {
            divisors[i] = chain.divisor, top_p[i] = chain.top_p, min_p[i] = chain.min_p, top_k[i] = chain.top_k;
            greedy[i] = chain.greedy != 0;
            uniform[i] = noise(chain.stream, position + i);
        }
        sample_rows(rows, model.shape.vocabulary, logits, {divisors, uniform, top_p, min_p, top_k, greedy}, scratch, ids,
                    logprobs, chain.threads);
    }
};

}  // namespace

template <class T> void run_chain(Model<T>& model, Chain& chain) { ChainRun<T>(model, chain).run(); }

template void run_chain(Model<float>&, Chain&);
template void run_chain(Model<bf16>&, Chain&);

}  // namespace LEVEL
}  // namespace slingshot
