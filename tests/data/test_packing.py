"""Packing: nothing lost, nothing split that must not be, segments right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.data.packing import pack, pack_examples, shared_ids, strided, whole_groups


def test_documents_by_hand() -> None:
    tokens_NT, segments_NT = pack([[1, 2, 3], [], [4, 5], [6, 7, 8, 9]], length=4)
    assert tokens_NT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert segments_NT.tolist() == [[1, 1, 1, 2], [1, 2, 2, 2], [1, 0, 0, 0]]
    assert tokens_NT.dtype == segments_NT.dtype == np.int32
    assert [part.shape for part in pack(iter([[], []]), length=4)] == [(0, 4), (0, 4)]


@given(sizes=st.lists(st.integers(0, 9), max_size=12), length=st.integers(1, 7))
def test_documents_come_back_in_order(sizes: list[int], length: int) -> None:
    documents = [[100 * index + at for at in range(size)] for index, size in enumerate(sizes, start=1)]
    tokens_NT, segments_NT = pack(documents, length)
    stream = [token for document in documents for token in document]
    assert tokens_NT.ravel().tolist() == stream + [0] * (tokens_NT.size - len(stream))
    assert tokens_NT.size - len(stream) < length
    for tokens, segments in zip(tokens_NT, segments_NT, strict=True):
        owners = [token // 100 for token in tokens if token]
        order = list(dict.fromkeys(owners))
        assert segments.tolist() == [order.index(owner) + 1 for owner in owners] + [0] * (length - len(owners))


def test_examples_by_hand() -> None:
    examples = [([1, 2, 3], [0, 1, 1]), ([4, 5, 6, 7], [0, 0, 0, 1]), ([8], [1]), ([9, 10], [0, 1])]
    packed = pack_examples(examples, length=5)
    assert packed.placement == [(0, 0), (1, 0), (1, 4), (0, 3)]  # the fullest row with room comes first
    assert packed.tokens_NT.tolist() == [[1, 2, 3, 9, 10], [4, 5, 6, 7, 8]]
    assert packed.segments_NT.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 2]]
    assert packed.mask_NT.tolist() == [[False, True, True, False, True], [False, False, False, True, True]]


@given(sizes=st.lists(st.integers(0, 8), max_size=30), seed=st.integers(0, 9))
def test_examples_stay_whole(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(1, 999, size).tolist(), rng.integers(0, 2, size).tolist()) for size in sizes]
    tokens_NT, segments_NT, mask_NT, placement, *_ = pack_examples(examples, length=8)
    taken = np.zeros_like(tokens_NT)
    for (ids, mask), (row, start) in zip(examples, placement, strict=True):
        span = slice(start, start + len(ids))
        assert tokens_NT[row, span].tolist() == ids
        assert mask_NT[row, span].tolist() == [bool(entry) for entry in mask]
        assert len(set(segments_NT[row, span])) <= 1
        assert len(ids) == 0 or (segments_NT[row] == segments_NT[row, start]).sum() == len(ids)
        taken[row, span] += 1
    assert np.array_equal(taken, (segments_NT > 0).astype(np.int32))  # each place taken once, padding by none
    assert not tokens_NT[taken == 0].any() and not mask_NT[taken == 0].any()
    if len(tokens_NT) > 1:
        used = np.sort(taken.sum(axis=1))
        assert used[0] + used[1] > 8  # no two rows would have fitted one


@given(
    groups=st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 6), min_size=1, max_size=6)), max_size=6),
    own=st.integers(1, 2),
    length=st.integers(15, 40),
)
def test_what_a_group_begins_with_stands_once_and_is_followed_on_from(
    groups: list[tuple[int, list[int]]], own: int, length: int
) -> None:
    """Every sampled token stands once, and what it follows are the ids before it: at their places, all and no other."""
    examples, names = [], []
    for name, (prompt, sizes) in enumerate(groups):
        for index, size in enumerate(sizes):
            sampled = [1000 * name + 100 * (index + 1) + at for at in range(size)]
            examples.append((list(range(prompt)) + sampled, [0] * prompt + [1] * size))
            names.append(name)
    packed = pack_examples(examples, length, groups=names, own=own)
    assert packed.mask_NT.sum() == sum(sum(mask) for _, mask in examples)
    taken = np.zeros_like(packed.tokens_NT)
    for (ids, mask), (row, start), shared in zip(examples, packed.placement, packed.shared, strict=True):
        rest = slice(start, start + len(ids) - shared)
        segments, prefixes = packed.segments_NT[row], packed.prefixes_NT[row]
        assert packed.tokens_NT[row, rest].tolist() == ids[shared:]
        assert packed.mask_NT[row, rest].tolist() == [bool(entry) for entry in mask[shared:]]
        taken[row, rest] += 1
        if len(ids) > shared:
            assert (segments == segments[start]).sum() == len(ids) - shared
            before = (segments == prefixes[start]) & (prefixes[start] > 0)
            assert packed.tokens_NT[row, before].tolist() == ids[:shared] and not packed.mask_NT[row, before].any()
            assert not before[start:].any() and not prefixes[before].any()
            assert (np.diff(before.nonzero()[0]) == 1).all()
            taken[row] = np.maximum(taken[row], before)
        first = mask.index(1) if any(mask) else None
        assert not shared or first is None or shared <= first - own  # those that predict the first keep to its segment
    assert np.array_equal(taken, (packed.segments_NT > 0).astype(np.int32))


def test_a_group_that_does_not_fit_is_split_and_repeats_what_it_shares() -> None:
    """And one left over on its own is whole."""
    examples = [([1, 2, 3, 10 * index], [0, 0, 0, 1]) for index in range(1, 4)]
    packed = pack_examples(examples, 7, groups="aaa")
    assert packed.tokens_NT.tolist() == [[1, 2, 3, 10, 3, 20, 0], [1, 2, 3, 30, 0, 0, 0]]
    assert packed.segments_NT.tolist() == [[1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert packed.prefixes_NT.tolist() == [[0, 0, 1, 1, 1, 1, 0], [0] * 7]
    assert whole_groups(examples, "aaa") == (8, 8) and whole_groups(examples, "abc") == (0, 12)
    alone = pack_examples(examples, 7)
    assert np.array_equal(alone.tokens_NT, pack_examples(examples, 7, groups="abc").tokens_NT)


def test_what_is_sampled_is_not_shared() -> None:
    examples = [([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3, 5], [0, 0, 1, 1])]
    assert shared_ids(examples) == 1 and shared_ids(examples, own=2) == 0
    assert shared_ids([([1, 2, 3], [0, 0, 1]), ([1, 9, 3], [0, 0, 1])]) == 0 and shared_ids(examples[:1]) == 0


def test_impossible_examples_are_refused() -> None:
    for example in ([1, 2, 3], [1, 1, 1]), ([1, 2], [1]):
        with pytest.raises(ValueError, match="example 1 has"):
            pack_examples([([1], [1]), example], length=2)


def test_windows_that_overlap_score_every_token_once() -> None:
    """Ten tokens seen six at a time, a new window every three: targets are what the window before does not hold."""
    windows = list(strided([list(range(10)), [50, 51], [60]], 6))
    assert [ids for ids, _ in windows] == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [6, 7, 8, 9], [50, 51], [60]]
    assert [[token for token, is_target in zip(*window, strict=True) if is_target] for window in windows] == [
        [1, 2, 3, 4, 5], [6, 7, 8], [9], [51], [],
    ]  # fmt: skip


@given(st.integers(1, 60), st.integers(2, 20))
def test_every_token_but_the_first_is_a_target_once(size: int, length: int) -> None:
    windows = list(strided([range(size)], length))
    found = [token for ids, mask in windows for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert found == list(range(1, size)) and all(len(ids) <= length for ids, _ in windows)
