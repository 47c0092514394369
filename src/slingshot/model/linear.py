"""The only place where a weight meets an activation.

`Linear` is one matrix, `Embedding` a matrix whose rows are looked up, `GroupedLinear` a stack of expert matrices over
rows sorted by expert, `RMSNorm` a vector of gains. Every product takes its weight from `matrix`: a weight that is
stored in another form (int8, int4, fp8) or has a low-rank change beside it (LoRA) is a subclass that says so there, or
multiplies by a kernel of its own in `product` and `by_head`.

Shape suffixes: N rows, X any leading dimensions, D input width, F output width, E experts, H heads, V vocabulary,
R rank of a low-rank change, G the matrices that an expert has side by side (gate and up).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        return _by_head(x_XHD, self.matrix(x_XHD.dtype), part, transposed)


def _by_head(x_XHD: Tensor, weight_FD: Tensor, part: slice, transposed: bool) -> Tensor:
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
        y_XF = adapted(x_XD, self)
        return y_XF if self.bias is None else y_XF + self.bias.to(x_XD.dtype)


@dataclass
class AdapterRows:
    """Which rows [M] of a step's tokens have which adapter, by number; those of none have none."""

    groups: list[tuple[int, Tensor]] = field(default_factory=list)


class AdaptedLinear(Linear):
    """A matrix beside which rows of x [N, D] have low-rank changes of their own (arXiv 2311.03285): without gradients.

    It takes over the parameters of `base`. changes: by number of an adapter A_RD and B_FR, the latter scaled.
    """

    def __init__(self, base: Linear, rows: AdapterRows) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self._rows = base.weight, base.bias, rows
        self.changes: dict[int, tuple[Tensor, Tensor]] = {}

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        y_XF = super().product(x_XD, detach)
        for number, at_M in self._rows.groups:
            if number in self.changes:
                a_RD, b_FR = self.changes[number]
                y_XF.index_add_(0, at_M, F.linear(F.linear(x_XD[at_M], a_RD), b_FR))
        return y_XF

    def by_head(self, x_XHD: Tensor, part: slice, transposed: bool = False) -> Tensor:
        y_XHF = super().by_head(x_XHD, part, transposed)
        for number, at_M in self._rows.groups:
            if number in self.changes:
                a_RD, b_FR = self.changes[number]
                y_XHF.index_add_(0, at_M, _by_head(x_XHD[at_M], b_FR @ a_RD, part, transposed))
        return y_XHF


class LoRAProduct(torch.autograd.Function):
    """What adapted matrices make of the same rows, side by side. Kept for the backward pass are x and x A^T alone.

    Weights get no gradient, and are converted to x's dtype anew rather than kept in it.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, scales: list[float], *parts: Tensor) -> Tensor:
        """`parts`: of each matrix W_FD, A_RD and B_FR, the latter two in x's dtype."""
        sizes = [len(weight_FD) for weight_FD in parts[::3]]
        y_NF, low = x_ND.new_empty(len(x_ND), sum(sizes)), []
        for y_Nf, scale, weight_FD, a_RD, b_FR in _each(y_NF.split(sizes, 1), scales, parts):
            low.append(x_ND @ a_RD.T)
            torch.mm(x_ND, weight_FD.to(x_ND.dtype).T, out=y_Nf)
            y_Nf.addmm_(low[-1], b_FR.T, alpha=scale)
        ctx.save_for_backward(x_ND, *parts, *low)
        ctx.scales, ctx.sizes = scales, sizes
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *kept = ctx.saved_tensors
        count = len(ctx.scales)
        grads: list[Tensor | None] = []
        grad_ND = torch.zeros_like(x_ND)
        each = zip(_each(grad_NF.split(ctx.sizes, 1), ctx.scales, kept[: 3 * count]), kept[3 * count :], strict=True)
        for (grad_Nf, scale, weight_FD, a_RD, b_FR), low_NR in each:
            grad_NR = scale * (grad_Nf @ b_FR)
            grad_ND.addmm_(grad_Nf, weight_FD.to(x_ND.dtype)).addmm_(grad_NR, a_RD)
            grads += [None, grad_NR.T @ x_ND, scale * (grad_Nf.T @ low_NR)]
        return grad_ND, None, *grads


def _each(
    columns: Sequence[Tensor], scales: list[float], parts: Sequence[Tensor]
) -> Iterator[tuple[Tensor, float, Tensor, Tensor, Tensor]]:
    return zip(columns, scales, parts[::3], parts[1::3], parts[2::3], strict=True)


def adapted(x_XD: Tensor, *linears: LoRALinear) -> Tensor:
    """`LoRAProduct` of any leading dimensions; biases are not added."""
    dtype = x_XD.dtype
    parts = [part for its in linears for part in (its.weight, its.lora_A.to(dtype), its.lora_B.to(dtype))]
    y_NF: Tensor = LoRAProduct.apply(x_XD.flatten(0, -2), [its.scale for its in linears], *parts)
    return y_NF.unflatten(0, x_XD.shape[:-1])


def joined(x_XD: Tensor, *linears: Linear) -> Tensor:
    """What several matrices make of the same x, side by side, in one product where all of them are plain.

    Not on a GPU: few rows are multiplied faster than the matrices are put together.
    """
    if not x_XD.is_cuda and all(linear.bias is None for linear in linears):
        if all(type(linear) is Linear for linear in linears):
            return F.linear(x_XD, torch.cat([linear.matrix(x_XD.dtype) for linear in linears]))
        if all(isinstance(linear, LoRALinear) for linear in linears):
            return adapted(x_XD, *cast("tuple[LoRALinear, ...]", linears))
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

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weights [E, *out, D] as numbers of this dtype."""
        return self.weight.to(dtype)

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
