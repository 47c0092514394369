"""Attention within packed documents: output and gradients are the definition's, at every level of instructions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slingshot.kernels.attention import attention_reference, causal_mask
from slingshot.kernels.calls import native_for
from slingshot.kernels.native import native_levels
from slingshot.kernels.packed_attention import attend_packed, ends_of_documents

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# rows, time, query heads, key heads, width, width of values
SHAPES = [(2, 40, 4, 4, 48, 32), (3, 128, 4, 2, 32, 32), (2, 77, 3, 1, 10, 7), (1, 1, 1, 1, 4, 4)]


def drawn(shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """q, k, v, what pulls at the output, and documents of some 15 tokens; the first row is one document."""
    rows, time, heads, groups, width, values = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, width), (groups, width), (groups, values), (heads, values)
    begins = torch.rand(rows, time, generator=generator) < 0.06
    begins[0] = False
    return [torch.randn(rows, time, *size, generator=generator) for size in sizes], begins.cumsum(1)


@pytest.mark.parametrize("level", native_levels())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_output_and_gradients_are_the_definitions(
    level: str, shape: tuple[int, ...], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLINGSHOT_NATIVE", level)
    (*given, pull), segments_BT = drawn(shape)
    ours = [t.to(dtype).requires_grad_() for t in given]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    native, before = native_for(ours[0]), torch.get_num_threads()
    assert native is not None
    torch.set_num_threads(threads)
    found = attend_packed(native, *ours, ends_of_documents(segments_BT), 0.3)
    (found.double() * pull).sum().backward()
    torch.set_num_threads(before)
    expected = attention_reference(*theirs, causal_mask(segments_BT), 0.3)
    (expected * pull).sum().backward()
    for value, reference in [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        assert value is not None and reference is not None
        assert (value - reference).abs().max() / reference.abs().max().clamp(min=0.05) < TOLERANCE[dtype]


def test_ends_of_documents_by_hand() -> None:
    first, last = ends_of_documents(torch.tensor([[1, 1, 2, 0, 0], [3, 3, 3, 3, 3]]))
    assert first.tolist() == [[0, 0, 2, 3, 3], [0] * 5]
    assert last.tolist() == [[1, 1, 2, 4, 4], [4] * 5]


@pytest.mark.skipif(not native_levels(), reason="no native library is built here")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    (*given, _), segments_BT = drawn((3, 50, 2, 2, 16, 16))
    native = native_for(given[0])
    assert native is not None
    together = attend_packed(native, *given, ends_of_documents(segments_BT), 0.3)
    alone = attend_packed(native, *(t[1:2].contiguous() for t in given), ends_of_documents(segments_BT[1:2]), 0.3)
    assert torch.equal(together[1:2], alone)
