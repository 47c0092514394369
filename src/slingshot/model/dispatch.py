"""Between router and experts: tokens go to the experts they chose, what comes of them comes back as one sum a token.

    y_ND = dispatcher(x_ND, routing, experts)
    # experts(rows_PD, counts, gates_P) -> y_PD: counts[e] rows for each expert, each times its gate where there are any

`LocalDispatcher` serves experts that are all here. Experts on several ranks take another one, which sends the rows
there and back.

Shape suffixes: N tokens, D model width, E routed experts, k experts per token, A = N k assignments, P padded slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slingshot.model.recompute import remade

Experts = Callable[..., Tensor]
FEW = 256  # tokens up to which a GPU is no slower with all experts than with those chosen: it reads their weights


@dataclass
class Routing:
    """What one MoE layer chose: experts_Nk, gates_Nk (float32) and scores_NE (float32, before choice)."""

    experts_Nk: Tensor
    gates_Nk: Tensor
    scores_NE: Tensor


class Dispatcher(Protocol):
    """Sum over each token's experts of gate value times what the expert makes of the token: y_ND, in x's dtype."""

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


class LocalDispatcher:
    """Sorts rows by expert, so that each expert multiplies once.

    Every expert's rows are padded to a multiple of a block: matrix libraries compile code for each shape they meet, and
    row counts that change with every batch would spend more time there than in the products. Padding repeats some row,
    and what comes of it is not read.
    """

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if x_ND.device.type != "cpu" and not torch.is_grad_enabled() and len(x_ND) <= FEW:
            return through_all(x_ND, routing, experts)
        k, n_experts = routing.experts_Nk.shape[1], routing.scores_NE.shape[1]
        expert_A = routing.experts_Nk.flatten()
        counts_E = expert_A.bincount(minlength=n_experts)
        block = 128 if expert_A.numel() >= 4096 else 16
        padded_E = (counts_E + block - 1) // block * block
        counts = padded_E.tolist()
        order_A = expert_A.argsort(stable=True)
        shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
        sorted_slot_A = torch.arange(len(order_A), device=x_ND.device) + shift_E[expert_A[order_A]]
        owner_P = order_A.new_full((sum(counts),), -1).index_copy_(0, sorted_slot_A, order_A)
        slot_A = torch.empty_like(order_A).index_copy_(0, order_A, sorted_slot_A)
        first_P = owner_P.clamp(min=0)
        source_P = first_P // k
        gates_P = routing.gates_Nk.to(x_ND.dtype).flatten().index_select(0, first_P) * (owner_P >= 0)
        x_PD = remade(_Scatter.apply(x_ND, source_P, slot_A, k), Tensor.index_select, x_ND, 0, source_P)
        y_ND: Tensor = _Gather.apply(experts(x_PD, counts, gates_P), source_P, slot_A, k)
        return y_ND


def through_all(x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """What a dispatcher gives, with every token sent to every expert: the host need not wait to know who chose whom."""
    count, n_experts = len(x_ND), routing.scores_NE.shape[1]
    y_PD = experts(x_ND.repeat(n_experts, 1), [count] * n_experts)
    slot_Nk = routing.experts_Nk * count + torch.arange(count, device=x_ND.device)[:, None]
    return (y_PD[slot_Nk] * routing.gates_Nk.to(x_ND.dtype)[..., None]).sum(1)


def _summed(x_PD: Tensor, slot_A: Tensor, k: int) -> Tensor:
    """Of every row of N the sum of those in its k slots.

    Slice by slice: on a CPU far faster than index_add, and several times faster than reducing the middle dimension.
    """
    first, *others = x_PD.index_select(0, slot_A).unflatten(0, (-1, k)).unbind(1)
    total = first.clone()
    for other in others:
        total += other
    return total


class _Scatter(torch.autograd.Function):
    """y_P = x[source_P], where assignment a of x's row a // k went to slot_A[a]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source_P: Tensor, slot_A: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(slot_A)
        ctx.k = k
        return x.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slot_A,) = ctx.saved_tensors
        return _summed(grads[0], slot_A, ctx.k), None, None, None


class _Gather(torch.autograd.Function):
    """y_N = the sum of a token's k slots. What fills a slot without an owner was multiplied by 0 before."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, source_P: Tensor, slot_A: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(source_P)
        return _summed(y_PD, slot_A, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (source_P,) = ctx.saved_tensors
        return grads[0].index_select(0, source_P), None, None, None
