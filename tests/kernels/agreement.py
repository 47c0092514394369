"""Whether outputs and gradients of a kernel are those of its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def agree(fast: Callable[..., tuple[Tensor, ...]], plain: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> None:
    """Outputs and gradients, each relative to its largest number; the plain ones in float64 of the same numbers."""
    ours = [x.detach().clone().requires_grad_() for x in given]
    theirs = [x.detach().double().requires_grad_() for x in given]
    found, expected = fast(*ours), plain(*theirs)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(y.shape, generator=generator) for y in expected]
    for outputs in (found, expected):
        sum((y.double() * pull).sum() for y, pull in zip(outputs, pulls, strict=True)).backward()  # type: ignore[union-attr]
    pairs = [*zip(found, expected, strict=True), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    for value, reference in pairs:
        assert value.dtype in (given[0].dtype, torch.float32)
        scale = reference.detach().abs().max().clamp(min=0.05)
        assert ((value - reference).abs().max() / scale) < TOLERANCE[given[0].dtype]
