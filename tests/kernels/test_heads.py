"""Heads from a plain and a turned part in one pass: what rotate and cat make, with their gradients, at every level."""

from __future__ import annotations

import pytest
import torch

from slingshot.kernels.calls import native_for
from slingshot.kernels.heads import turned_heads
from slingshot.kernels.native import native_levels
from slingshot.model.rope import rotate


@pytest.mark.parametrize("level", native_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_heads_are_those_of_rotate_and_cat(
    level: str, dtype: torch.dtype, interleaved: bool, shared: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLINGSHOT_NATIVE", level)
    generator = torch.Generator().manual_seed(0)
    whole, turned = torch.randn(2, 70, 3, 11, generator=generator), torch.randn(2, 70, 1, 6, generator=generator)
    angles, pull = torch.randn(2, 70, 3, generator=generator), torch.randn(2, 70, 3, 11, generator=generator)
    ours, theirs = ([t.to(dtype).requires_grad_() for t in (whole, turned)] for _ in range(2))
    native, before = native_for(ours[0]), torch.get_num_threads()
    assert native is not None
    torch.set_num_threads(threads)
    pairs, plain = (tensors[1] if shared else tensors[0][..., 5:] for tensors in (ours, theirs)), theirs[0][..., :5]
    found = turned_heads(native, ours[0][..., :5], next(pairs), angles.cos(), angles.sin(), interleaved)
    expected = torch.cat(
        (plain, rotate(next(pairs), angles.cos(), angles.sin(), interleaved).expand(-1, -1, 3, -1)), -1
    )
    for y in (found, expected):
        (y.float() * pull).sum().backward()
    torch.set_num_threads(before)
    allowed = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, expected, atol=allowed, rtol=allowed)
    for one, other in zip(ours, theirs, strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=allowed, rtol=allowed)
