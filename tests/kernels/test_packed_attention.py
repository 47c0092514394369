"""Attention within packed documents: output and gradients are the definition's, at every level of instructions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slingshot.kernels.attention import attention_reference, causal_mask
from slingshot.kernels.calls import NativeCall, native_for
from slingshot.kernels.native import native_levels
from slingshot.kernels.packed_attention import attend_packed, ends_of_documents

from .agreement import agree

# rows, time, query heads, key heads, width, width of values
SHAPES = [(2, 40, 4, 4, 48, 32), (3, 128, 4, 2, 32, 32), (2, 77, 3, 1, 10, 7), (1, 1, 1, 1, 4, 4)]


def drawn(shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """q, k, v, and documents of some 15 tokens; the first row is one document."""
    rows, time, heads, groups, width, values = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, width), (groups, width), (groups, values)
    begins = torch.rand(rows, time, generator=generator) < 0.06
    begins[0] = False
    return [torch.randn(rows, time, *size, generator=generator) for size in sizes], begins.cumsum(1)


def sharing(rows: int, time: int) -> tuple[Tensor, Tensor]:
    """Segments and the prefixes they go on from: documents alone, and up to six behind up to 100 tokens; padding."""
    generator = torch.Generator().manual_seed(2)

    def below(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    pairs = []
    for _ in range(rows):
        places: list[tuple[int, int]] = []
        number = 0
        while len(places) < time - 9:
            number += 1
            prefix, followers = number, below(7)
            places += [(prefix, 0)] * (1 + below(100))
            for _ in range(followers):
                number += 1
                places += [(number, prefix)] * (1 + below(50))
        pairs.append((places[: time - 3] + [(0, 0)] * time)[:time])
    segments_BT, prefixes_BT = torch.tensor(pairs).unbind(-1)
    return segments_BT, prefixes_BT


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(2, 150, 4, 2, 32, 32), (2, 140, 3, 3, 48, 10), (2, 50, 2, 1, 10, 7)], ids=str)
def test_prefixes_are_seen_by_the_documents_that_go_on_from_them(
    native: Callable[[torch.dtype], NativeCall], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given, (segments_BT, prefixes_BT) = drawn(shape)[0], sharing(*shape[:2])
    ends, mask = ends_of_documents(segments_BT, prefixes_BT), causal_mask(segments_BT, prefixes_BT)
    agree(
        lambda *qkv: (attend_packed(native(dtype), *qkv, ends, 0.3),),
        lambda *qkv: (attention_reference(*qkv, mask, 0.3),),
        *(t.to(dtype) for t in given),
    )


def test_ends_say_what_the_mask_says() -> None:
    """Of a loop over queries and keys: the same segment or the prefix's, and not later."""
    segments_BT, prefixes_BT = sharing(3, 120)
    first, last, prefix_first, prefix_end = (t.tolist() for t in ends_of_documents(segments_BT, prefixes_BT))
    mask = causal_mask(segments_BT, prefixes_BT)
    for row, (segments, prefixes) in enumerate(zip(segments_BT.tolist(), prefixes_BT.tolist(), strict=True)):
        seen = [
            [s <= t and (segments[s] == segments[t] or segments[s] == prefixes[t] > 0) for s in range(120)]
            for t in range(120)
        ]
        assert mask[row].tolist() == seen
        for t in range(120):
            own, before = range(first[row][t], t + 1), range(prefix_first[row][t], prefix_end[row][t])
            assert [s for s in range(120) if seen[t][s]] == [*before, *own]
            assert last[row][t] == max(q for q in range(120) if seen[q][t])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_the_definitions(
    native: Callable[[torch.dtype], NativeCall], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given, segments_BT = drawn(shape)
    ends, mask = ends_of_documents(segments_BT), causal_mask(segments_BT)
    agree(
        lambda *qkv: (attend_packed(native(dtype), *qkv, ends, 0.3),),
        lambda *qkv: (attention_reference(*qkv, mask, 0.3),),
        *(t.to(dtype) for t in given),
    )


def test_ends_of_documents_by_hand() -> None:
    first, last, *none = ends_of_documents(torch.tensor([[1, 1, 2, 0, 0], [3, 3, 3, 3, 3]]))
    assert first.tolist() == [[0, 0, 2, 3, 3], [0] * 5]
    assert last.tolist() == [[1, 1, 2, 4, 4], [4] * 5] and none == [None, None]


@pytest.mark.skipif(not native_levels(), reason="no native library is built here")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    given, segments_BT = drawn((3, 50, 2, 2, 16, 16))
    native = native_for(given[0])
    assert native is not None
    together = attend_packed(native, *given, ends_of_documents(segments_BT), 0.3)
    alone = attend_packed(native, *(t[1:2].contiguous() for t in given), ends_of_documents(segments_BT[1:2]), 0.3)
    assert torch.equal(together[1:2], alone)
