"""Heads from a plain and a turned part in one pass: what rotate and cat make, with their gradients, at every level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slingshot.kernels.calls import NativeCall
from slingshot.kernels.heads import turned_heads
from slingshot.model.rope import rotate

from .agreement import agree


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_heads_are_those_of_rotate_and_cat(
    native: Callable[[torch.dtype], NativeCall], dtype: torch.dtype, interleaved: bool, shared: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, turned = (torch.randn(2, 70, *size, generator=generator).to(dtype) for size in ((3, 11), (1, 6)))
    angles = torch.randn(2, 70, 3, generator=generator)
    turn = angles.cos(), angles.sin(), interleaved

    def parts(whole: Tensor, turned: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return whole[..., :5], whole[..., 5:] if turned is None else turned

    def by_definition(*given: Tensor) -> tuple[Tensor]:
        plain, turned = parts(*given)
        return (torch.cat((plain, rotate(turned, *turn).expand(-1, -1, 3, -1)), -1),)

    given = (whole, turned) if shared else (whole,)
    agree(lambda *given: (turned_heads(native(dtype), *parts(*given), *turn),), by_definition, *given)
