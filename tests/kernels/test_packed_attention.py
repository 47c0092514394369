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
    first, last = ends_of_documents(torch.tensor([[1, 1, 2, 0, 0], [3, 3, 3, 3, 3]]))
    assert first.tolist() == [[0, 0, 2, 3, 3], [0] * 5]
    assert last.tolist() == [[1, 1, 2, 4, 4], [4] * 5]


@pytest.mark.skipif(not native_levels(), reason="no native library is built here")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    given, segments_BT = drawn((3, 50, 2, 2, 16, 16))
    native = native_for(given[0])
    assert native is not None
    together = attend_packed(native, *given, ends_of_documents(segments_BT), 0.3)
    alone = attend_packed(native, *(t[1:2].contiguous() for t in given), ends_of_documents(segments_BT[1:2]), 0.3)
    assert torch.equal(together[1:2], alone)
