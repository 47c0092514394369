"""Which rows a training step takes from several sources: by arithmetic, so that no step needs those before it.

    mix = RowMix(sizes=[4_000_000, 1000], weights=[0.9, 0.1], seed=0)
    sources_N, rows_N = mix.rows(start=step * 32, count=32)

Sources take turns in a pattern that repeats and has their shares as evenly spread as can be; every epoch of a source
has a seeded order of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
PERIOD = 1 << 16  # turns in the pattern; a share is right to one part in as many


class RowMix:
    """Endless rows of sources with `sizes` rows. Memory does not grow with them."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes, self.weights, self.seed = sizes, weights, seed
        period = PERIOD if len(sizes) > 1 else 1
        ends = np.cumsum(np.array(weights, dtype=np.float64)) / sum(weights)
        turns = np.maximum(1, np.diff(np.round(ends * period).astype(np.int64), prepend=0))  # of each in a period
        when = np.concatenate([(np.arange(count) + 0.5) / count for count in turns])
        order = np.argsort(when, kind="stable")
        self._turns, self._source = turns, np.repeat(np.arange(len(sizes)), turns)[order]
        self._before = np.concatenate([np.arange(count) for count in turns])[order]  # turns of the same, in the period

    def rows(self, start: int, count: int) -> tuple[Int64, Int64]:
        """(source, row of it) of the rows from number `start` on."""
        period, place = np.divmod(np.arange(start, start + count), len(self._source))
        sources = self._source[place]
        given = period * self._turns[sources] + self._before[place]
        rows = np.empty(count, dtype=np.int64)
        for source in np.unique(sources).tolist():
            epochs, positions = np.divmod(given, self.sizes[source])
            for epoch in np.unique(epochs[sources == source]).tolist():
                now = (sources == source) & (epochs == epoch)
                rows[now] = permuted(positions[now], self.sizes[source], [self.seed, source, epoch])
        return sources, rows

    def epochs(self, count: int) -> list[float]:
        """How many times `count` rows go through each source, to within a turn."""
        shares = self._turns / len(self._source)
        return [count * float(share) / size for share, size in zip(shares, self.sizes, strict=True)]


@functools.lru_cache(maxsize=1)
def epoch_order(size: int, seed: int, epoch: int) -> Int64:
    """The seeded order of one epoch of rows that are all in memory; kept for the steps that take it part by part."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def permuted(positions: Int64, size: int, seed: Sequence[int]) -> Int64:
    """Where a seeded permutation of range(size) takes these positions, in memory for these alone.

    A Feistel network over the next power of four, walked until it is back inside (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002); its round function is the end of SplitMix64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(0, 1 << 64, 6, dtype=np.uint64)
    found, outside = positions.astype(np.uint64), np.ones(len(positions), dtype=np.bool_)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[outside] = left << half | right
        outside = found >= size
    return found.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
