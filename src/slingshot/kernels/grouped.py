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
    """`grouped_matmul_reference` without a copy of its parts: every product writes where its rows belong."""
    y: Tensor = _GroupedMatmul.apply(x_ND, weight_EFD, counts)
    return y


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EFD)
        ctx.counts = counts
        y_NF = x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])
        start = 0
        for weight_FD, count in zip(weight_EFD, counts, strict=True):
            if count:
                torch.mm(x_ND[start : start + count], weight_FD.t(), out=y_NF[start : start + count])
            start += count
        return y_NF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_EFD = ctx.saved_tensors
        grad_NF = grads[0].contiguous()
        dx_ND, dw_EFD = torch.empty_like(x_ND), torch.empty_like(weight_EFD)
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            if count:
                torch.mm(grad_NF[rows], weight_EFD[expert], out=dx_ND[rows])
                torch.mm(grad_NF[rows].t(), x_ND[rows], out=dw_EFD[expert])
            else:
                dw_EFD[expert].zero_()
            start += count
        return dx_ND, dw_EFD, None
