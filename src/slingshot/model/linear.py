"""The only place where a weight meets an activation.

`Linear` is one matrix, `GroupedLinear` a stack of expert matrices over rows sorted by expert. Weights are kept in the parameter's
dtype (float32 masters in training) and multiply in the activation's dtype.

Shape suffixes: N rows, D input width, F output width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y_NF = x_ND W_FD^T (+ b_F), computed in x's dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class _GroupedMatmul(torch.autograd.Function):
    """Rows [start_e, start_e+1) of x times expert e's matrix; one product per expert that has rows."""

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


class GroupedLinear(nn.Module):
    """A stack of expert matrices [E, *out, D]; extra output dimensions (gate and up projection) are flattened in the product."""

    def __init__(self, n_experts: int, in_features: int, *out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, *out_features, in_features))

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        """x_ND sorted by expert, counts[e] rows each -> y_NF."""
        weight_EFD = self.weight.to(x_ND.dtype)
        if weight_EFD.dim() > 3:
            weight_EFD = weight_EFD.flatten(1, -2)
        y: Tensor = _GroupedMatmul.apply(x_ND, weight_EFD, counts)
        return y
