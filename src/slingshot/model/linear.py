"""The only place where a weight meets an activation.

`Linear` is one matrix, `Embedding` a matrix whose rows are looked up, `GroupedLinear` a stack of expert matrices over
rows sorted by expert, `RMSNorm` a vector of gains. Every product takes its weight from `matrix`: a weight that is
stored in another form (int8, int4, fp8) or has a low-rank change beside it (LoRA) is a subclass that says so there, or
multiplies by a kernel of its own in `product` and `by_head`.

Shape suffixes: N rows, X any leading dimensions, D input width, F output width, E experts, H heads, V vocabulary,
R rank of a low-rank change, G the matrices that an expert has side by side (gate and up).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slingshot.kernels.grouped import grouped_matmul
from slingshot.kernels.norm import residual_norm, rms_norm


class Linear(nn.Module):
    """y_XF = x_XD W_FD^T (+ b_F). Weights keep their dtype (float32 masters in training) and multiply in x's."""

    keeps_float32 = False  # whether the weight stays float32 in a model whose weights are cast to another dtype

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [F, D] as numbers of this dtype."""
        return self.weight.to(dtype)

    def forward(self, x_XD: Tensor) -> Tensor:
        return self.product(x_XD)

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        """y_XF; `detach` keeps the weight out of the gradient."""
        weight = self.matrix(x_XD.dtype)
        bias = None if self.bias is None else self.bias.to(x_XD.dtype)
        return F.linear(x_XD, weight.detach() if detach else weight, bias)

    def by_head(self, x_XHD: Tensor, part: slice, transposed: bool = False) -> Tensor:
        """Each head's x times `part` of the rows that the weight has for that head, W^T or, transposed, W: y_XHF."""
        weight_FD = self.matrix(x_XHD.dtype)
        weight_HFD = weight_FD.view(x_XHD.shape[-2], -1, weight_FD.shape[1])[:, part]
        y_HNF = torch.bmm(x_XHD.flatten(0, -3).transpose(0, 1), weight_HFD if transposed else weight_HFD.mT)
        return y_HNF.transpose(0, 1).view(*x_XHD.shape[:-1], -1)


class LoRALinear(Linear):
    """A frozen matrix with a low-rank change beside it: y = x W^T + scale (x A^T) B^T (arXiv 2106.09685, 4.1).

    It takes over the parameters of `base`. B_FR begins as zero: at first nothing is changed.
    """

    def __init__(self, base: Linear, lora_A: Tensor, scale: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_A.new_zeros(self.weight.shape[0], len(lora_A)))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W + scale B A."""
        return (self.weight + self.scale * (self.lora_B @ self.lora_A)).to(dtype)

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        if detach:
            return super().product(x_XD, detach)
        bias = None if self.bias is None else self.bias.to(x_XD.dtype)
        y_XF = F.linear(x_XD, self.weight.to(x_XD.dtype), bias)
        change_XF = F.linear(F.linear(x_XD, self.lora_A.to(x_XD.dtype)), self.lora_B.to(x_XD.dtype))
        return y_XF + self.scale * change_XF


def joined(x_XD: Tensor, *linears: Linear) -> Tensor:
    """What several matrices make of the same x, side by side, in one product where all of them are plain.

    Not on a GPU: few rows are multiplied faster than the matrices are put together.
    """
    if not x_XD.is_cuda and all(type(linear) is Linear and linear.bias is None for linear in linears):
        return F.linear(x_XD, torch.cat([linear.matrix(x_XD.dtype) for linear in linears]))
    return torch.cat([linear(x_XD) for linear in linears], dim=-1)


class Embedding(Linear):
    """Rows of W_VD by id; `product` is the output head that shares them."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(width, vocab_size)

    def forward(self, ids_X: Tensor) -> Tensor:
        return F.embedding(ids_X, self.matrix(self.weight.dtype))


class GroupedLinear(nn.Module):
    """A stack of expert matrices [E, *out, D]; extra output dimensions (gate and up) are flattened in the product."""

    def __init__(self, n_experts: int, in_features: int, *out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, *out_features, in_features))

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        """x_ND sorted by expert, counts[e] rows each -> y_NF."""
        weight_EFD = self.weight.to(x_ND.dtype)
        return grouped_matmul(x_ND, weight_EFD.flatten(1, -2) if weight_EFD.dim() > 3 else weight_EFD, counts)


class LoRAGroupedLinear(GroupedLinear):
    """Frozen expert matrices [E, *G, F, D], each with an A [E, *G, R, D] and a B [E, *G, F, R] of its own beside it."""

    def __init__(self, base: GroupedLinear, lora_A: Tensor, scale: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale = base.weight, scale
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_A.new_zeros(*self.weight.shape[:-1], lora_A.shape[-2]))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W + scale B A of every expert."""
        return (self.weight + self.scale * (self.lora_B @ self.lora_A)).to(dtype)

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        n_experts, dtype = len(self.weight), x_ND.dtype
        a_GERD, b_GEFR = (
            each.to(dtype).reshape(n_experts, -1, *each.shape[-2:]).unbind(1) for each in (self.lora_A, self.lora_B)
        )
        changes = [
            grouped_matmul(grouped_matmul(x_ND, a_ERD, counts), b_EFR, counts)
            for a_ERD, b_EFR in zip(a_GERD, b_GEFR, strict=True)
        ]
        return super().forward(x_ND, counts) + self.scale * torch.cat(changes, dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream x + more, and its norm."""
        return residual_norm(x, more, self.weight, self.eps)
