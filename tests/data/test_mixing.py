"""Rows of several sources: every epoch takes each once, shares hold at any moment, any step is found by itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.data.mixing import PERIOD, RowMix, permuted


@settings(derandomize=True, deadline=None)
@given(size=st.integers(1, 3000), seed=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3))
def test_a_permutation_takes_every_position_to_another(size: int, seed: list[int]) -> None:
    assert sorted(permuted(np.arange(size), size, seed).tolist()) == list(range(size))


def test_a_permutation_is_mixed_differs_by_seed_and_is_computed_one_position_at_a_time() -> None:
    size = 4_000_000_000_000
    some = np.arange(20_000) * 7
    first, other = permuted(some, size, [0]), permuted(some, size, [1])
    assert len({*first.tolist()}) == len(some) and first.min() >= 0 and first.max() < size
    assert abs(first.mean() / size - 0.5) < 0.02 and abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03
    assert not np.intersect1d(first, other).size
    assert permuted(some[5:6], size, [0]) == first[5]


@settings(derandomize=True, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4), seed=st.integers(0, 2**63 - 1),
    start=st.integers(0, 10**12), count=st.integers(1, 200), cut=st.integers(0, 200), data=st.data(),
)  # fmt: skip
def test_a_step_needs_no_step_before_it(
    sizes: list[int], seed: int, start: int, count: int, cut: int, data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.01, 100)) for _ in sizes]
    mix, cut = RowMix(sizes, weights, seed), min(cut, count)
    parts = [mix.rows(start, cut), mix.rows(start + cut, count - cut)]
    for whole, *split in zip(mix.rows(start, count), *parts, strict=True):
        assert whole.tolist() == [value for part in split for value in part.tolist()]


@pytest.mark.parametrize(
    "weights", [[3.0, 1.0, 1.0], *(pytest.param(w, marks=pytest.mark.slow) for w in ([0.7, 0.3], [0.98, 0.01, 0.01]))]
)
def test_sources_have_their_shares_at_every_moment_and_every_row_once_an_epoch(weights: list[float]) -> None:
    sizes = [900, 70, 33][: len(weights)]
    sources, rows = RowMix(sizes, weights, seed=3).rows(0, 3 * PERIOD)
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        given = np.cumsum(sources == source)
        assert np.abs(given - np.arange(1, len(given) + 1) * weight / sum(weights)).max() < len(weights) + 3 * 0.5
        own = rows[sources == source]
        epochs = [own[i : i + size].tolist() for i in range(0, len(own) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert max(Counter(map(tuple, epochs)).values()) == 1
