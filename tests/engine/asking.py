"""What the engine's tests ask, and what they compare with: full forward passes without a cache."""

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import strategies as st

from slingshot.engine.batch import PAGE, FlatBatch
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.sampling import SamplingParams
from slingshot.kernels.native import native_levels

# tests/kernels/ has every kernel at every level; a whole runner at the first is another look at the same.
LEVELS = [*(pytest.param(each, marks=pytest.mark.slow) for each in native_levels()[:-1][:1]), *native_levels()[-1:]]
PAGES = 40
PROMPT, CHAT = [10, 11, 12], {"role": "user", "content": "3+4"}


def prompts_of(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(7, 290) for _ in range(length)] for length in lengths]


def ask(engine, prompt, **params):
    """The completions of one prompt."""
    return engine.generate([prompt], SamplingParams(**params))[0].outputs


def read(stream):
    """All deltas of a stream, and its return value."""
    deltas = []
    while True:
        try:
            deltas.append(next(stream))
        except StopIteration as stop:
            return deltas, stop.value


def token_ids(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@torch.no_grad()
def full_logprobs(model, prompt, sampled, temperature):
    """Log probabilities of all ids at a sample's positions, greedy ones at temperature 1."""
    logits_TV = model(torch.tensor([prompt + sampled])).logits_BTV[0, len(prompt) - 1 : -1]
    return (logits_TV / (temperature or 1.0)).log_softmax(-1)


def used_cache(model, dtype):
    """A cache of PAGES pages that holds whatever earlier sequences left."""
    cache = KVCache(model.config, PAGES, dtype, mtp=model.config.num_nextn_predict_layers > 0)
    for layer in cache.layers:
        layer.fill_(1e3)
    return cache


@torch.inference_mode()
def logits_in_pieces(runner, model, data):
    """Pairs of logits, the runner's and the model's own: chunks and single tokens of several sequences in one flat
    batch, pages in any order."""
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(sum(lengths))
    vocabulary = model.config.vocab_size
    sequences = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    pages = torch.randperm(PAGES - 1, generator=generator).add(1).tolist()
    ends = list(accumulate(-(-length // PAGE) for length in lengths))
    tables = [pages[first:end] for first, end in zip([0, *ends], ends, strict=False)]
    expected, done, pairs = [model(torch.tensor([ids])).logits_BTV[0] for ids in sequences], [0] * len(lengths), []
    while rows := [row for row, length in enumerate(lengths) if done[row] < length]:
        sizes = {row: data.draw(st.sampled_from([1, 1, 7, 40])) for row in rows}
        parts = [(sequences[row][done[row] : done[row] + sizes[row]], done[row], tables[row]) for row in rows]
        output = runner.forward(FlatBatch.of(parts))
        for row, logits_V, (ids, _, _) in zip(rows, output.logits_RV, parts, strict=True):
            done[row] += len(ids)
            pairs.append((logits_V.clone(), expected[row][done[row] - 1]))
    return pairs
