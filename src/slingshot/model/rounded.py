"""A matrix that is trained while every product rounds it: what distillation of a quantised model moves.

    hold(linear, RoundedMatrix(latents_FD, scales_FG, grid.nearest))
    linear.weight.matrix(torch.bfloat16)         # nearest number times scale: what a checkpoint will store

Shape suffixes: S the dimensions of a stack of expert matrices, F output width, D input width, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slingshot.quantization.integers import from_numbers

Nearest = Callable[[Tensor], Tensor]  # numbers to the nearest that a grid has


class RoundedMatrix(nn.Module):
    """Stands where a Linear or GroupedLinear has its `weight` [*S, F, D].

    latents         [*S, F, D]: the weights over their scales before they are rounded, float32; trained
    scales          [*S, F, G]: as they are stored, and so they stay
    """

    requires_grad, dtype = True, torch.float32

    def __init__(self, latents: Tensor, scales: Tensor, nearest: Nearest) -> None:
        super().__init__()
        self.latents, self.nearest, self.shape = nn.Parameter(latents), nearest, latents.shape
        self.register_buffer("scales", scales)
        self.scales: Tensor

    def numbers(self) -> Tensor:
        """What will be stored, [*S, F, D]."""
        return self.nearest(self.latents.detach())

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What the numbers stand for, rounded once to `dtype`, [*S, F, D]."""
        weight: Tensor = StraightThrough.apply(self.latents, self.scales, self.nearest, dtype)
        return weight


class StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of no rounding at all (arXiv 1308.3432, 2.3): dL/dlatent = scale dL/dweight."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, scales: Tensor, nearest: Nearest, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scales)
        return from_numbers(nearest(latents), scales).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (scales,) = ctx.saved_tensors
        return from_numbers(grad, scales), None, None, None
