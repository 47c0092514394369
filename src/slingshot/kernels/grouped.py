"""Products of rows sorted by expert with each expert's own matrix.

Suffixes: N rows, D input width, F output width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_matmul_reference(x_ND: Tensor, weight_EFD: Tensor, counts: list[int]) -> Tensor:
    """The first counts[0] rows of x times the first matrix, the next counts[1] times the second, and so on: y_NF."""
    return torch.cat([x @ weight.T for x, weight in zip(x_ND.split(counts), weight_EFD, strict=True)])


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, counts: list[int]) -> Tensor:
    """`grouped_matmul_reference` without a copy of its parts: every product writes where its rows belong. In x's dtype,
    the weights' may be another."""
    y: Tensor = _GroupedMatmul.apply(x_ND, weight_EFD, counts)
    return y


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EFD)
        ctx.counts = counts
        weight_EFD = weight_EFD.to(x_ND.dtype)  # the copy is not kept
        if len(set(counts)) == 1:
            return torch.bmm(x_ND.view(len(counts), -1, x_ND.shape[1]), weight_EFD.mT).flatten(0, 1)
        y_NF = x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])
        for x, weight_DF, y in zip(x_ND.split(counts), weight_EFD.mT.unbind(), y_NF.split(counts), strict=True):
            if len(x):
                torch.mm(x, weight_DF, out=y)
        return y_NF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Frozen matrices have no gradient, neither in memory nor in time."""
        x_ND, weight_EFD = ctx.saved_tensors
        grad_NF, dtype = grads[0].contiguous(), weight_EFD.dtype
        weight_EFD = weight_EFD.to(x_ND.dtype)
        dx_ND, dw_EFD = torch.empty_like(x_ND), torch.empty_like(weight_EFD) if ctx.needs_input_grad[1] else None
        dw = [None] * len(weight_EFD) if dw_EFD is None else dw_EFD.unbind()
        grads_dx_x = (t.split(ctx.counts) for t in (grad_NF, dx_ND, x_ND))
        for grad, dx, x, weight_FD, dw_FD in zip(*grads_dx_x, weight_EFD.unbind(), dw, strict=True):
            if len(x):
                torch.mm(grad, weight_FD, out=dx)
            if dw_FD is not None:
                torch.mm(grad.t(), x, out=dw_FD)
        return dx_ND, None if dw_EFD is None else dw_EFD.to(dtype), None
