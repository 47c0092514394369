"""Sampling against values worked out by hand, reference generators and the distribution it claims to draw from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams, noise_stream, sample, uniform_noise
from slingshot.engine.sampling import draw as draw_ids


def draw(probabilities, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """Sample one row per uniform number from the same distribution."""
    rows = len(uniform)
    truncation = torch.full((rows,), top_p), torch.full((rows,), top_k)
    logits_BV, uniform_B = torch.tensor(probabilities).log().expand(rows, -1), torch.tensor(uniform).float()
    return sample(logits_BV, torch.full((rows,), temperature), *truncation, uniform_B)


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


def test_truncation_renormalises_the_draw_but_not_the_logprob():
    ids, logprobs = draw([0.1, 0.3, 0.2, 0.4], [0.42, 0.44], top_k=2)  # 3/7 = 0.4286 of what is left lies at token 1
    assert ids.tolist() == [1, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.3, 0.4]))


def test_greedy_takes_the_first_largest_logit_and_its_logprob_at_temperature_one():
    ids, logprobs = draw([0.2, 0.4, 0.4], [0.0, 0.99], temperature=0.0)
    assert ids.tolist() == [1, 1]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.4, 0.4]))


def test_rows_keep_their_own_parameters():
    logits_BV = torch.tensor([0.1, 0.3, 0.2, 0.4]).log().repeat(4, 1)
    temperature_B, top_p_B = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.5, 1.0])
    ids, _ = sample(logits_BV, temperature_B, top_p_B, torch.tensor([0, 0, 0, 1]), torch.full((4,), 0.05))
    assert ids.tolist() == [0, 3, 1, 3]  # whole vocabulary; greedy; {1, 3} in id order; the heaviest alone


def test_extreme_logits_and_temperatures_stay_finite():
    logits_BV = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]])
    rest = torch.ones(2), torch.zeros(2, dtype=torch.long), torch.tensor([0.999, 0.5])
    ids, logprobs = sample(logits_BV, torch.tensor([1e-4, 100.0]), *rest)
    assert ids.tolist() == [0, 1] and logprobs.tolist() == [0.0, 0.0]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000), temperature=st.floats(0.1, 3.0), top_p=st.floats(0.05, 1.0), top_k=st.integers(0, 40)
)
def test_against_a_plain_reading_of_the_definitions(seed, temperature, top_p, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(64, 33, generator=generator) * 3
    uniform_B = torch.rand(64, generator=generator)
    ids_B, logprobs_B = sample(
        logits_BV, torch.full((64,), temperature), torch.full((64,), top_p), torch.full((64,), top_k), uniform_B
    )
    expected_BV = (logits_BV / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs_B, expected_BV.gather(-1, ids_B[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    for row in range(64):
        probabilities = expected_BV[row].double().exp()
        order = probabilities.argsort(descending=True)[: top_k or 33]
        share = probabilities[order] / probabilities[order].sum()
        allowed = order[(share.cumsum(0) - share) < top_p + 1e-6]
        assert ids_B[row] in allowed


def test_frequencies_follow_the_distribution():
    positions_B = torch.arange(40_000)
    uniform_B = uniform_noise(torch.full((40_000,), noise_stream(0, "key", 0)), positions_B)
    probabilities = torch.tensor([0.05, 0.6, 0.25, 0.1])
    ids, _ = draw(probabilities.tolist(), uniform_B.tolist())
    frequencies = torch.bincount(ids, minlength=4) / 40_000
    assert (frequencies - probabilities).abs().max() < 0.01  # four standard deviations of the largest


def test_noise_is_splitmix64():
    # The first outputs for seed 1234567, as in the generator's widely used reference vectors.
    expected = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    uniform = uniform_noise(torch.full((5,), 1234567), torch.arange(1, 6))
    assert uniform.tolist() == [(value >> 40) / (1 << 24) for value in expected]


def test_noise_depends_on_stream_and_position_only():
    streams = torch.tensor([noise_stream(*name) for name in ((0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0))])
    assert len(set(streams.tolist())) == 4
    positions = torch.tensor([5, 6, 7, 8])
    together = uniform_noise(streams, positions)
    alone = torch.cat([uniform_noise(streams[i : i + 1], positions[i : i + 1]) for i in (3, 1, 0, 2)])
    assert torch.equal(together[[3, 1, 0, 2]], alone)
    assert (together >= 0).all() and (together < 1).all()


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
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused_by_name(values, named):
    with pytest.raises(SlingshotError, match=named):
        SamplingParams(**values)


def test_none_is_off_and_numbers_of_numpy_are_numbers():
    off = SamplingParams(top_k=None, top_p=None, stop=None, stop_token_ids=None)
    assert off == SamplingParams() and off.top_k == 0
    given = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), top_p=1, stop=["a"], stop_token_ids=[3])
    assert given == SamplingParams(max_tokens=5, temperature=0.5, stop=("a",), stop_token_ids=(3,))
    assert {type(given.max_tokens), type(given.temperature), type(given.top_p)} == {int, float}
