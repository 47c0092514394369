"""The only place where a weight meets an activation.

`Linear` is one matrix, `Embedding` a matrix whose rows are looked up, `GroupedLinear` a stack of expert matrices over
rows sorted by expert, `RMSNorm` a vector of gains. Every product takes its weight from `matrix`. In the place of a
parameter a `weight` may be a frozen matrix in another form (int8, int4, fp8: model/stored.py), or whole numbers whose
scales are trained (model/rescaled.py); a low-rank change beside it (LoRA) is a subclass. With `fp8` a float32 matrix is
trained by products whose factors are rounded (quantization/fp8_product.py).

Shape suffixes: N rows, X any leading dimensions, D input width, F output width, E experts, H heads, V vocabulary,
R rank of a low-rank change, G the matrices that an expert has side by side (gate and up).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slingshot.kernels.grouped import grouped_matmul
from slingshot.kernels.norm import residual_norm, rms_norm
from slingshot.kernels.wide_product import wide_product
from slingshot.model.recompute import remade
from slingshot.model.rescaled import RescaledMatrix
from slingshot.model.stored import StoredMatrix
from slingshot.quantization.fp8_product import FP8Scaling, fp8_grouped_matmul, fp8_matmul


def _numbers(weight: Tensor | StoredMatrix | RescaledMatrix, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.matrix(dtype)


def _own_dtype(weight: Any, dtype: torch.dtype) -> torch.dtype:
    """A parameter's own, so that no copy of it is kept for the backward pass; this one for what is no parameter."""
    return weight.dtype if isinstance(weight, nn.Parameter) else dtype


def _stored(module: Linear | GroupedLinear) -> StoredMatrix | None:
    weight: Any = module.weight
    return weight if isinstance(weight, StoredMatrix) else None


class Linear(nn.Module):
    """y_XF = x_XD W_FD^T (+ b_F). Weights keep their dtype (float32 masters in training) and multiply in x's."""

    keeps_float32 = False  # whether the weight stays float32 in a model whose weights are cast to another dtype
    fp8: FP8Scaling | None = None  # of the factors of every product but those of `by_head`

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [F, D] as numbers of this dtype."""
        return _numbers(self.weight, dtype)

    def forward(self, x_XD: Tensor) -> Tensor:
        return self.product(x_XD)

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        """y_XF; `detach` keeps the weight out of the gradient."""
        bias = None if self.bias is None else self.bias.to(x_XD.dtype)
        if _stored(self) is not None:
            y_XF = frozen_product(x_XD, self)
            return y_XF if bias is None else y_XF + bias
        weight = self.matrix(torch.float32 if self.fp8 is not None else _own_dtype(self.weight, x_XD.dtype))
        weight = weight.detach() if detach else weight
        if self.fp8 is None:
            return plain_product(x_XD, bias, weight)
        y_XF = fp8_matmul(x_XD.flatten(0, -2), weight, self.fp8).unflatten(0, x_XD.shape[:-1])
        return y_XF if bias is None else y_XF + bias

    def wide_product(self, x_ND: Tensor) -> Tensor:
        """y_NF in float32; of a plain matrix in x's dtype, whose products are not rounded before they are summed."""
        if type(self) in (Linear, Embedding) and isinstance(self.weight, nn.Parameter) and self.fp8 is None:
            y_NF = wide_product(x_ND, self.weight)
            return y_NF if self.bias is None else y_NF + self.bias
        return self.product(x_ND.float())

    def by_head(self, x_XHD: Tensor, part: slice, transposed: bool = False) -> Tensor:
        """Each head's x times `part` of the rows that the weight has for that head, W^T or, transposed, W: y_XHF."""
        return _by_head(x_XHD, self.matrix(x_XHD.dtype), part, transposed)


def _by_head(x_XHD: Tensor, weight_FD: Tensor, part: slice, transposed: bool) -> Tensor:
    weight_HFD = weight_FD.view(x_XHD.shape[-2], -1, weight_FD.shape[1])[:, part]
    y_HNF = torch.bmm(x_XHD.flatten(0, -3).transpose(0, 1), weight_HFD if transposed else weight_HFD.mT)
    return y_HNF.transpose(0, 1).view(*x_XHD.shape[:-1], -1)


class PlainProduct(torch.autograd.Function):
    """Kept for the backward pass are x and the matrices as they are, not their copy that is multiplied with."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, bias_F: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, *weights)
        return F.linear(x_ND, _side_by_side(weights, x_ND.dtype), bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *weights = ctx.saved_tensors
        wants_x, wants_bias, *wants = ctx.needs_input_grad
        dx_ND = grad_NF @ _side_by_side(weights, x_ND.dtype) if wants_x else None
        changes = [None] * len(weights)
        if any(wants):
            both = zip((grad_NF.T @ x_ND).split([len(each) for each in weights]), weights, strict=True)
            changes = [change.to(weight.dtype) for change, weight in both]
        return dx_ND, grad_NF.sum(0) if wants_bias else None, *changes


def _side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([weight.to(dtype) for weight in weights]) if len(weights) > 1 else weights[0].to(dtype)


def plain_product(x_XD: Tensor, bias_F: Tensor | None, *weights: Tensor) -> Tensor:
    """What matrices of any dtype make of the same x, side by side, in x's dtype."""
    if not torch.is_grad_enabled() or (len(weights) == 1 and weights[0].dtype == x_XD.dtype):
        return F.linear(x_XD, _side_by_side(weights, x_XD.dtype), bias_F)
    y_NF: Tensor = PlainProduct.apply(x_XD.reshape(-1, x_XD.shape[-1]), bias_F, *weights)
    return y_NF.view(*x_XD.shape[:-1], y_NF.shape[-1])


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
        return (_numbers(self.weight, self.lora_A.dtype) + self.scale * (self.lora_B @ self.lora_A)).to(dtype)

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        if detach:
            return super().product(x_XD, detach)
        y_XF = frozen_product(x_XD, self)
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


class FrozenProduct(torch.autograd.Function):
    """What frozen matrices, some with a low-rank change beside them, make of the same rows, side by side.

    Kept for the backward pass are x and x A^T alone. Weights get no gradient; they are converted to x's dtype anew,
    from what is stored, rather than kept in it.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, linears: Sequence[Linear], *changes: Tensor | None) -> Tensor:
        """`changes`: of each matrix A_RD and B_FR in x's dtype, or None and None."""
        sizes = [linear.weight.shape[0] for linear in linears]
        y_NF = x_ND.new_empty(len(x_ND), sum(sizes))
        low: list[Tensor | None] = []
        for y_Nf, linear, a_RD, b_FR in _each(y_NF.split(sizes, 1), linears, changes):
            torch.mm(x_ND, _numbers(linear.weight, x_ND.dtype).T, out=y_Nf)
            low_NR = None if a_RD is None else x_ND @ a_RD.T
            if low_NR is not None and b_FR is not None:
                y_Nf.addmm_(low_NR, b_FR.T, alpha=linear.scale)
            low.append(low_NR)
        ctx.save_for_backward(x_ND, *changes, *low)
        ctx.linears, ctx.sizes = linears, sizes
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *kept = ctx.saved_tensors
        count = 2 * len(ctx.linears)
        grads: list[Tensor | None] = []
        grad_ND = torch.zeros_like(x_ND)
        each = zip(_each(grad_NF.split(ctx.sizes, 1), ctx.linears, kept[:count]), kept[count:], strict=True)
        for (grad_Nf, linear, a_RD, b_FR), low_NR in each:
            grad_ND.addmm_(grad_Nf, _numbers(linear.weight, x_ND.dtype))
            if a_RD is None or b_FR is None:
                grads += [None, None]
                continue
            grad_NR = linear.scale * (grad_Nf @ b_FR)
            grad_ND.addmm_(grad_NR, a_RD)
            grads += [grad_NR.T @ x_ND, linear.scale * (grad_Nf.T @ low_NR)]
        return grad_ND, None, *grads


def _each(
    columns: Sequence[Tensor], linears: Sequence[Linear], changes: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, Any, Tensor | None, Tensor | None]]:
    return zip(columns, linears, changes[::2], changes[1::2], strict=True)


def frozen_product(x_XD: Tensor, *linears: Linear) -> Tensor:
    """`FrozenProduct` of any leading dimensions; biases are not added."""
    changes: list[Tensor | None] = []
    for its in linears:
        pair = (its.lora_A, its.lora_B) if isinstance(its, LoRALinear) else (None, None)
        changes += [None if part is None else part.to(x_XD.dtype) for part in pair]
    y_NF: Tensor = FrozenProduct.apply(x_XD.flatten(0, -2), linears, *changes)
    return y_NF.unflatten(0, x_XD.shape[:-1])


def joined(x_XD: Tensor, *linears: Linear) -> Tensor:
    """What several matrices make of the same x, side by side, in one product where all of them are plain.

    Not on a GPU: few rows are multiplied faster than the matrices are put together.
    """
    if not x_XD.is_cuda and all(linear.bias is None for linear in linears):
        stored = [_stored(linear) is not None for linear in linears]
        plain = all(type(linear) is Linear and linear.fp8 is None for linear in linears)
        if plain and not any(stored):
            weights = (linear.matrix(_own_dtype(linear.weight, x_XD.dtype)) for linear in linears)
            return plain_product(x_XD, None, *weights)
        pairs = zip(linears, stored, strict=True)
        if all(isinstance(its, LoRALinear) or (type(its) is Linear and held) for its, held in pairs):
            return frozen_product(x_XD, *linears)
    return torch.cat([linear(x_XD) for linear in linears], dim=-1)


class Embedding(Linear):
    """Rows of W_VD by id; `product` is the output head that shares them."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(width, vocab_size)

    def forward(self, ids_X: Tensor) -> Tensor:
        return F.embedding(ids_X, self.matrix(self.weight.dtype))


class GroupedLinear(nn.Module):
    """A stack of expert matrices [E, *out, D]; extra output dimensions (gate and up) are flattened in the product."""

    fp8: FP8Scaling | None = None

    def __init__(self, n_experts: int, in_features: int, *out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, *out_features, in_features))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weights [E, *out, D] as numbers of this dtype; of experts on several ranks, those that are here."""
        return _numbers(_local(self.weight), dtype)

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        """x_ND sorted by expert, counts[e] rows each -> y_NF."""
        if (stored := _stored(self)) is not None:
            y_NF: Tensor = FrozenGroups.apply(x_ND, stored, counts)
            return y_NF
        dtype = torch.float32 if self.fp8 is not None else _own_dtype(self.weight, x_ND.dtype)
        weight_EFD = _numbers(_local(self.weight), dtype)  # `matrix` without what adapters add to it
        if self.fp8 is not None:
            return fp8_grouped_matmul(x_ND, weight_EFD, counts, self.fp8)
        return grouped_matmul(x_ND, weight_EFD.flatten(1, -2) if weight_EFD.dim() > 3 else weight_EFD, counts)


def _local(weight: Any) -> Any:
    """Of a stack that several ranks share, the experts that are here."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


class FrozenGroups(torch.autograd.Function):
    """`GroupedLinear.forward` by matrices as they are stored, one expert's at a time; nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, stored: StoredMatrix, counts: list[int]) -> Tensor:
        ctx.stored, ctx.counts = stored, counts
        y_NF = x_ND.new_empty(len(x_ND), stored.shape[1:-1].numel())
        for expert, (x, y) in enumerate(zip(x_ND.split(counts), y_NF.split(counts), strict=True)):
            if len(x):
                torch.mm(x, stored.matrix(x.dtype, expert).flatten(0, -2).T, out=y)
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None, None]:
        grad_NF, stored = grad_NF.contiguous(), ctx.stored
        dx_ND = grad_NF.new_empty(len(grad_NF), stored.shape[-1])
        for expert, (grad, dx) in enumerate(zip(grad_NF.split(ctx.counts), dx_ND.split(ctx.counts), strict=True)):
            if len(grad):
                torch.mm(grad, stored.matrix(grad.dtype, expert).flatten(0, -2), out=dx)
        return dx_ND, None, None


class LoRAGroupedLinear(GroupedLinear):
    """Frozen expert matrices [E, *G, F, D], each with an A [E, *G, R, D] and a B [E, *G, F, R] of its own beside it."""

    def __init__(self, base: GroupedLinear, lora_A: Tensor, scale: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale = base.weight, scale
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_A.new_zeros(*self.weight.shape[:-1], lora_A.shape[-2]))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W + scale B A of every expert."""
        return (_numbers(self.weight, self.lora_A.dtype) + self.scale * (self.lora_B @ self.lora_A)).to(dtype)

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        both = (_local(each).to(x_ND.dtype) for each in (self.lora_A, self.lora_B))
        a_GERD, b_GEFR = (each.reshape(len(each), -1, *each.shape[-2:]).unbind(1) for each in both)
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
        return remade(rms_norm(x, self.weight, self.eps), rms_norm, x, self.weight, self.eps)

    def after(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream x + more, and its norm."""
        total, y = residual_norm(x, more, self.weight, self.eps)
        return total, remade(y, rms_norm, total, self.weight, self.eps)
