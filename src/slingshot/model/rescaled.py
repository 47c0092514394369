"""A matrix of whole numbers whose scales are trained: what distillation of a quantised model moves.

    hold(linear, RescaledMatrix(numbers_FD, scales_FG, generator))
    linear.weight.matrix(torch.bfloat16)         # number times scale: what a checkpoint will store

Shape suffixes: S the dimensions of a stack of expert matrices, F output width, D input width, G groups of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slingshot.quantization.integers import from_numbers

_HALF_STEP = 0.99 * 2.0**-9  # of bfloat16, nearly: of a power of two its share below, of others that over the mantissa


class RescaledMatrix(nn.Module):
    """Stands where a Linear or GroupedLinear has its `weight` [*S, F, D].

    numbers         [*S, F, D], int8: as they are stored, and so they stay
    scales          [*S, F, G]: as they were
    factors         [*S, F, G]: what those are multiplied by before they are rounded to bfloat16; trained. They begin
                    anywhere that rounds to the same scales (dithered): else no move that is less than half of a step
                    of bfloat16 would change any, and then all would change at once
    """

    requires_grad, dtype = True, torch.float32

    def __init__(self, numbers: Tensor, scales: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        within = _HALF_STEP / scales.frexp().mantissa.abs()
        dither = within * (2 * torch.rand(scales.shape, generator=generator) - 1)
        self.factors, self.shape = nn.Parameter(1 + dither.clamp_(min=-_HALF_STEP)), numbers.shape
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)
        self.numbers: Tensor
        self.scales: Tensor

    def rescaled(self) -> Tensor:
        """The scales that will be stored, [*S, F, G], float32."""
        return _rescaled(self.factors.detach(), self.scales)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What the numbers stand for, rounded once to `dtype`, [*S, F, D]."""
        weight: Tensor = StraightThrough.apply(self.factors, self.scales, self.numbers, dtype)
        return weight


class StraightThrough(torch.autograd.Function):
    """Numbers times their scales; that these are rounded to bfloat16 is nothing to the gradient (arXiv 1308.3432, 2.3):
    dL/dfactor = scale * the sum over its group of number * dL/dweight."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, scales: Tensor, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scales, numbers)
        return from_numbers(numbers, _rescaled(factors, scales)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        scales, numbers = ctx.saved_tensors
        groups = scales.shape[-1], -1
        sums = (grad.float().unflatten(-1, groups) * numbers.unflatten(-1, groups)).sum(-1)
        return sums.mul_(scales), None, None, None


def _rescaled(factors: Tensor, scales: Tensor) -> Tensor:
    return (scales * factors).bfloat16().float()
