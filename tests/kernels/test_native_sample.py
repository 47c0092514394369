"""Tokens drawn by native code beside torch's, over drawn shapes, at every level this processor has."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slingshot.engine.draw import DrawParams, native_sample, sample
from slingshot.engine.sampling import SamplingParams
from slingshot.kernels.native import native_kernels, native_levels

pytestmark = pytest.mark.skipif(not native_levels(), reason="no native library is built here")


def plainly_kept(own_V, params):
    """The ids that may be drawn, as the definitions read; equals stand or fall together."""
    if params.temperature == 0:
        return (own_V == own_V.max()).nonzero()[:1, 0]
    weights = own_V.exp()
    order = weights.argsort(descending=True)[: params.top_k or len(own_V)]
    share = weights[order] / weights[order].sum()
    order = order[(share.cumsum(0) - share) < params.top_p]
    least = torch.maximum(weights[order[-1]] * (1 - 1e-6), weights.max() * params.min_p * (1 - 1e-6))
    return (weights >= least).nonzero()[:, 0]


@given(
    seed=st.integers(0, 1000), size=st.integers(1, 1500), rows=st.integers(1, 12), spread=st.sampled_from([0.5, 3, 30]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]), top_k=st.sampled_from([0, 0, 1, 20, 2000]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
)  # fmt: skip
def test_tokens_and_logprobs_are_those_of_the_definition(seed, size, rows, spread, top_p, top_k, min_p):
    """The id is the one in whose share of what is kept the number falls; rows of all kinds run together."""
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(rows, size, generator=generator) * spread
    logits_BV[0, size // 2 :] = logits_BV[0, size // 2]  # equals
    uniform_B = torch.rand(rows, generator=generator)
    params = [
        SamplingParams(temperature=(0.0, 0.3, 1.0, 2.0)[row % 4], **([{}, kind][row % 3 > 0]))
        for row, kind in enumerate([{"top_p": top_p, "top_k": top_k, "min_p": min_p}] * rows)
    ]
    for level in native_levels():
        ids_B, logprobs_B = sample(logits_BV, DrawParams.of(params), uniform_B, native_kernels(level))
        for row, its in enumerate(params):
            own_V = (logits_BV[row].double() / (its.temperature or 1.0)).log_softmax(-1)
            assert abs(own_V[ids_B[row]] - logprobs_B[row]) < 1e-4 * max(1, spread)
            kept = plainly_kept(own_V, its)
            ends = own_V[kept].exp().cumsum(-1) / own_V[kept].exp().sum()
            at = (kept == ids_B[row]).nonzero()
            if len(at):
                before = ends[at[0, 0] - 1] if at[0, 0] else 0.0
                assert before - 1e-4 <= uniform_B[row] <= ends[at[0, 0]] + 1e-4
            else:  # its weight is that of the smallest kept, but for the last digits
                assert its.temperature and abs(own_V[ids_B[row]] - own_V[kept].min()) < 1e-3


def test_a_row_is_drawn_alike_alone_and_in_any_batch(kernels):
    generator = torch.Generator().manual_seed(0)
    logits_BV, uniform_B = torch.randn(20, 700, generator=generator) * 3, torch.rand(20, generator=generator)
    params = [SamplingParams(temperature=(0.0, 0.7)[row % 2], top_p=(1.0, 0.8)[row % 3 > 1]) for row in range(20)]
    ids_B, logprobs_B = native_sample(kernels, logits_BV, DrawParams.of(params), uniform_B)
    for rows in ([3], [17, 2], list(range(19, -1, -1))):
        part = DrawParams.of([params[row] for row in rows])
        ids, logprobs = native_sample(kernels, logits_BV[rows], part, uniform_B[rows])
        assert torch.equal(ids, ids_B[rows]) and torch.equal(logprobs, logprobs_B[rows])


def test_the_ends_of_numbers(kernels):
    """Tokens that are taken out are never drawn, whatever the number; what is no number gives no logprob."""
    params = DrawParams.of([SamplingParams()] * 4)
    logits_BV = torch.full((4, 600), -torch.inf)
    logits_BV[:, 300] = torch.tensor([0.0, 3e38, -3e38, 1.0])
    for uniform in (0.0, 0.5, 1 - 2.0**-24):
        ids_B, logprobs_B = native_sample(kernels, logits_BV, params, torch.full((4,), uniform))
        assert ids_B.tolist() == [300] * 4 and logprobs_B.tolist() == [0.0] * 4
    for wrong in (math.nan, math.inf):
        for place in (0, 299, 599):
            broken_BV = logits_BV.clone()
            broken_BV[2, place] = wrong
            _, logprobs_B = native_sample(kernels, broken_BV, params, torch.full((4,), 0.5))
            assert torch.isfinite(logprobs_B).tolist() == [True, True, False, True]
    gone = native_sample(kernels, torch.full((4, 600), -torch.inf), params, torch.full((4,), 0.5))
    assert not torch.isfinite(gone[1]).any()
