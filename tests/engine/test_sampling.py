"""Sampling against values worked out by hand, reference generators and the distribution it claims to draw from."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.engine.draw import DrawParams, noise_stream, sample, uniform_noise
from slingshot.engine.draw import draw as draw_ids
from slingshot.engine.sampling import SamplingParams


def rows_of(count, **params):
    return DrawParams.of([SamplingParams(**params)] * count)


def draw(probabilities, uniform, **params):
    """Sample one row per uniform number from the same distribution."""
    logits_BV, uniform_B = torch.tensor(probabilities).log().expand(len(uniform), -1), torch.tensor(uniform).float()
    return sample(logits_BV, rows_of(len(uniform), **params), uniform_B)


def test_inverse_cumulative_distribution_and_temperature_by_hand():
    """The last case: p = (0.8, 0.2) at temperature 0.5 is proportional to its square, so 16/17 and 1/17."""
    ids, logprobs = draw([0.5, 0.2, 0.3], [0.0, 0.49, 0.51, 0.69, 0.71, 0.999])
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.5, 0.2, 0.2, 0.3, 0.3]).log())
    ids, logprobs = draw([0.8, 0.2], [0.94, 0.95], temperature=0.5)
    assert ids.tolist() == [0, 1]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([16 / 17, 1 / 17]))


ASCENDING, EVEN, HALVES = [0.1, 0.3, 0.2, 0.4], [0.25] * 4, [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    ("probabilities", "truncation", "kept"),
    [
        (ASCENDING, {}, {0, 1, 2, 3}), (ASCENDING, {"top_k": 1}, {3}), (ASCENDING, {"top_k": 2}, {1, 3}),
        (ASCENDING, {"top_k": 9}, {0, 1, 2, 3}),
        # Sorted: 0.4 (3), 0.3 (1), 0.2 (2), 0.1 (0). The token that reaches top_p is kept, the next is not.
        (ASCENDING, {"top_p": 0.39}, {3}), (ASCENDING, {"top_p": 0.41}, {1, 3}), (ASCENDING, {"top_p": 0.69}, {1, 3}),
        (ASCENDING, {"top_p": 0.71}, {1, 2, 3}), (ASCENDING, {"top_p": 0.91}, {0, 1, 2, 3}),
        (ASCENDING, {"top_p": 1e-6}, {3}),
        # top_k 2 leaves 4/7 and 3/7: 0.55 of that is reached by the first alone, 0.58 needs both.
        (ASCENDING, {"top_p": 0.55, "top_k": 2}, {3}), (ASCENDING, {"top_p": 0.58, "top_k": 2}, {1, 3}),
        # Equal tokens stand or fall together; a share of exactly top_p is enough.
        (EVEN, {"top_k": 1}, {0, 1, 2, 3}), ([0.1, 0.2, 0.2, 0.5], {"top_p": 0.6}, {1, 2, 3}),
        (HALVES, {"top_p": 0.5}, {0}), (HALVES, {"top_p": 0.75}, {0, 1}),
    ],
)  # fmt: skip
def test_truncation_by_hand(probabilities, truncation, kept):
    """The ids that a fine grid of uniform numbers reaches."""
    assert set(draw(probabilities, [i / 1000 for i in range(1000)], **truncation)[0].tolist()) == kept


def test_greedy_takes_the_first_largest_logit_and_its_logprob_at_temperature_one():
    ids, logprobs = draw([0.2, 0.4, 0.4], [0.0, 0.99], temperature=0.0)
    assert ids.tolist() == [1, 1]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.4, 0.4]))


def test_extreme_logits_and_temperatures_stay_finite():
    logits_BV = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]])
    rows = DrawParams.of([SamplingParams(temperature=1e-4), SamplingParams(temperature=100.0)])
    ids, logprobs = sample(logits_BV, rows, torch.tensor([0.999, 0.5]))
    assert ids.tolist() == [0, 1] and logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [33, 4096])
def test_a_row_without_numbers_ends_in_a_logprob_that_tells(size):
    rows = DrawParams.of([SamplingParams(top_p=0.9), SamplingParams(top_p=0.9, top_k=3)])
    _, logprobs = sample(torch.full((2, size), float("nan")), rows, torch.full((2,), 0.5))
    assert logprobs.isnan().all()


@given(
    seed=st.integers(0, 10_000), temperature=st.floats(0.1, 3.0), top_p=st.floats(0.05, 1.0), top_k=st.integers(0, 40),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5]), size=st.sampled_from([33, 512, 4096, 4100]),
    candidates=st.sampled_from([0, 0, 40, 5000]),
)  # fmt: skip
def test_against_a_plain_reading_of_the_definitions(seed, temperature, top_p, top_k, min_p, size, candidates):
    """Vocabularies too small and large enough for working on parts of them; candidates too few, and enough."""
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(24, size, generator=generator) * 3
    uniform_B = torch.rand(24, generator=generator)
    rows = rows_of(24, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    ids_B, logprobs_B = sample(logits_BV, rows, uniform_B, candidates=candidates)
    expected_BV = (logits_BV / temperature).log_softmax(-1)
    found_B = expected_BV.gather(-1, ids_B[:, None])[:, 0].where(~logprobs_B.isnan(), torch.nan)
    torch.testing.assert_close(logprobs_B, found_B, atol=1e-5, rtol=1e-5, equal_nan=True)
    for row in range(24):
        probabilities = expected_BV[row].double().exp()
        order = probabilities.argsort(descending=True)[: top_k or size]
        share = probabilities[order] / probabilities[order].sum()
        if logprobs_B[row].isnan():
            assert 0 < candidates < len(order) and share[:candidates].sum() < top_p + 1e-4
            continue
        allowed = order[((share.cumsum(0) - share) < top_p + 1e-6) & (share >= share[0] * (min_p - 1e-6))]
        assert ids_B[row] in allowed
        # The kept ids in order of id, each as wide as its share: where the number falls.
        kept, _ = allowed.sort()
        ends = probabilities[kept].cumsum(0) / probabilities[kept].sum()
        at = int((kept == ids_B[row]).nonzero())
        before = ends[at - 1] if at else 0.0
        assert before - 1e-4 <= uniform_B[row] <= ends[at] + 1e-4


@pytest.mark.parametrize("size", [50, 4096, 4100])
def test_a_row_is_drawn_alike_alone_and_in_any_batch(size):
    """To the last bit: what else is in the batch, and what it asks for, enters nowhere."""
    logits_BV = torch.randn(32, size, generator=torch.Generator().manual_seed(1)) * 3
    uniform_B = torch.rand(32, generator=torch.Generator().manual_seed(2))
    drawn = itertools.product((0.0, 0.6, 1.0, 2.5), (1.0, 0.9), (0, 7), (0.0, 0.05))
    params = [SamplingParams(temperature=t, top_p=p, top_k=k, min_p=least) for t, p, k, least in drawn]
    ids_B, logprobs_B = sample(logits_BV, DrawParams.of(params), uniform_B)
    for rows in ([3], [17, 2], list(range(31, -1, -1)), list(range(0, 32, 3))):
        ids, logprobs = sample(logits_BV[rows], DrawParams.of([params[row] for row in rows]), uniform_B[rows])
        assert torch.equal(ids, ids_B[rows]) and torch.equal(logprobs, logprobs_B[rows])


def test_the_first_of_the_largest_logits_is_found_in_a_large_vocabulary():
    logits_BV = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    logits_BV[torch.arange(8), torch.arange(8) * 500] = 9.0
    logits_BV[:, 4000:] = 9.0
    ids, _ = sample(logits_BV, rows_of(8, temperature=0), torch.zeros(8))
    assert ids.tolist() == [500 * row for row in range(8)]


def test_noise_is_splitmix64():
    # The first outputs for seed 1234567, as in the generator's widely used reference vectors.
    expected = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    uniform = uniform_noise(torch.full((5,), 1234567), torch.arange(1, 6))
    assert uniform.tolist() == [(value >> 40) / (1 << 24) for value in expected]


def test_any_key_names_a_stream_halves_of_characters_too():
    assert len({noise_stream(0, key, 0) for key in ("", "a", "\ud800", "\udfff")}) == 4


def test_largest_uniform_never_hits_a_dropped_token():
    last = 1 - 2.0**-24
    for probabilities in ([0.5, 0.5, 1e-30], [0.3, 0.7, 0.0], [1.0, 0.0, 0.0]):
        ids, _ = draw(probabilities, [last])
        assert probabilities[ids.item()] > 1e-9


def test_a_cumulative_sum_that_is_not_monotone_never_draws_a_dropped_token():
    """As parallel sums may be: the search ends beside every token that was kept, whatever the uniform number."""
    weights_BV = torch.tensor([0.5, 0.0, 0.3, 0.0, 0.2, 0.0]).repeat(1000, 1)
    uniform_B = torch.arange(1000) / 1000
    for sums in ([0.5, 0.6, 0.55, 0.9, 0.85, 1.0], [0.4, 0.5, 0.3, 0.8, 0.7, 1.1], [0.5, 0.5, 0.8, 0.8, 1.0, 1.0]):
        ids = draw_ids(weights_BV, torch.tensor(sums).repeat(1000, 1), uniform_B)
        assert set(ids.flatten().tolist()) <= {0, 2, 4}
    assert torch.bincount(ids.flatten()).tolist() == [500, 0, 300, 0, 200]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"), ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"n": True}, "n must be a whole number, got True"), ({"n": "3"}, "n must be a whole number, got '3'"),
        ({"n": 0}, "n must"), ({"seed": 1.0}, "seed must be a whole number"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": -1.0}, "temperature"), ({"temperature": 1e-9}, "temperature"),
        ({"temperature": float("nan")}, "temperature"), ({"temperature": float("inf")}, "temperature"),
        ({"top_p": [0.9]}, "top_p must be a number"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0.5}, "top_k must be a whole number"), ({"top_k": 2**70}, "top_k must"), ({"top_k": -1}, "top_k"),
        ({"stop": 5}, "stop must be a tuple of strings, got 5"), ({"stop": ("a", 1)}, "a tuple of strings"),
        ({"stop": ("",)}, "empty stop"), ({"stop": "end"}, "stop must be a tuple"),
        ({"stop_token_ids": ("x",)}, "stop_token_ids must be a tuple of token ids, got .*'x'"),
        ({"stop_token_ids": 7}, "stop_token_ids must be a tuple of token ids"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"), ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be a table"), ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"logit_bias": [[float("inf"), 1]]}, "must be a table"), ({"max_tokens": 10**20}, "from 1 to 2147483648, got"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias must"), ({"repetition_penalty": 0}, "repetition_penalty must"),
        ({"presence_penalty": float("nan")}, "presence_penalty"), ({"frequency_penalty": "x"}, "must be a number"),
        ({"bad_words": "word"}, "bad_words must be a tuple"), ({"bad_words": ("",)}, "empty bad word"),
        ({"bad_words": ((1, "a"),)}, "bad_words must be a tuple of strings and lists of token ids"),
        ({"top_logprobs": -1}, "top_logprobs must be from 0 to"), ({"prompt_logprobs": 10**6}, "prompt_logprobs must"),
        ({"thinking_budget": -1}, "thinking_budget must be 0 or more"), ({"thinking_budget": 1.5}, "a whole number"),
        ({"regex": 5}, "regex must be a text"), ({"choice": ("a", "")}, "an empty choice"),
        ({"regex": "a", "choice": ("a",)}, "regex and choice contradict each other; give one of them"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos contradicts structured output"),
        ({"stop": ("the end",), "bad_words": ("end",)}, "the stop string 'the end' holds the bad word 'end'"),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused_by_name(values, named):
    with pytest.raises(SlingshotError, match=named):
        SamplingParams(**values)


def test_none_is_off_and_numbers_of_numpy_are_numbers():
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    off = SamplingParams(
        **dict.fromkeys(set(names) - {"max_tokens", "temperature", "n", "seed", "ignore_eos", "routed_experts"})
    )
    assert off == SamplingParams() and off.top_k == 0
    assert SamplingParams(logit_bias={"7": 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1.0))
    assert SamplingParams(json_schema={"type": "object"}).json_schema == '{"type": "object"}'
    assert SamplingParams(bad_words=["a", [1, 2]]).bad_words == ("a", (1, 2))
    given = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), top_p=1, stop=["a"], stop_token_ids=[3])
    assert given == SamplingParams(max_tokens=5, temperature=0.5, stop=("a",), stop_token_ids=(3,))
    assert {type(given.max_tokens), type(given.temperature), type(given.top_p)} == {int, float}
