"""Experts in parallel: each rank of a group keeps some of every layer's experts, and tokens travel to those they chose.

    share_experts(layer, mesh["ep"])      # an MoE layer keeps this rank's experts and sends the rest of its rows away

Every rank has tokens of its own; the ranks of a group hold neighbouring experts, as many each. A layer's rows are
sorted by expert, sent (an all-to-all with as many rows as there are, none dropped and none padded), computed where the
expert is, and sent back. An expert's gradient is thereby that of all the group's tokens; it is made their mean over the
ranks, as FSDP makes it over its own, by dividing what comes back to the experts and multiplying what leaves them.

Shape suffixes: N tokens, D model width, E routed experts, k experts per token, A = N k assignments, R ranks of the
group, L = E / R experts of a rank, P rows received.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slingshot.base.errors import SlingshotError
from slingshot.model.dispatch import Experts, LocalDispatcher, Routing
from slingshot.model.moe import MoE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class AllToAllDispatcher:
    """Sends every row to the rank that has its expert, and what came of it back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._local = group, LocalDispatcher()

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        (count, k), n_experts, ranks = routing.experts_Nk.shape, routing.scores_NE.shape[1], self._group.size()
        expert_A = routing.experts_Nk.flatten()
        order_A = expert_A.argsort(stable=True)
        sent_RL = expert_A.bincount(minlength=n_experts).view(ranks, -1)
        received_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(received_RL, sent_RL, group=self._group)
        sizes = sent_RL.sum(1).tolist(), received_RL.sum(1).tolist()
        rows_PD = _exchange(x_ND[order_A // k], *sizes, self._group, ranks)
        own = n_experts // ranks
        expert_P = torch.arange(own, device=x_ND.device).repeat(ranks).repeat_interleave(received_RL.flatten())
        once = rows_PD.new_ones(len(rows_PD), 1), rows_PD.new_empty(len(rows_PD), own)  # each row goes to one expert
        y_PD = self._local(rows_PD, Routing(expert_P[:, None], *once), experts)
        y_AD = _exchange(y_PD, *sizes[::-1], self._group, 1 / ranks)
        place_A = torch.empty_like(order_A).index_copy_(0, order_A, torch.arange(len(order_A), device=x_ND.device))
        return (y_AD[place_A].view(count, k, -1) * routing.gates_Nk.to(x_ND.dtype)[..., None]).sum(1)


def share_experts(layer: MoE, mesh: DeviceMesh) -> None:
    """Leave this rank its share of the layer's experts; SlingshotError where they cannot be shared out evenly."""
    from torch.distributed.tensor import DTensor, Shard

    for name, whole in [*layer.experts.named_parameters()]:  # of an adapter A and B are stacks of experts, too
        if len(whole) % mesh.size():
            way_out = f"make expert_parallel a divisor of {len(whole)}"
            raise SlingshotError(f"{len(whole)} routed experts cannot be shared by {mesh.size()} ranks; {way_out}")
        count = len(whole) // mesh.size()
        part = whole.data[mesh.get_local_rank() * count :][:count].clone()
        own = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        stack, _, own_name = name.rpartition(".")
        setattr(layer.experts.get_submodule(stack), own_name, nn.Parameter(own, whole.requires_grad))
    layer.dispatcher = AllToAllDispatcher(mesh.get_group())


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, factor: float) -> Tensor:
    """The rows that ranks send each other, so many to each and from each; the gradient travels back, times `factor`."""
    exchanged: Tensor = _Exchange.apply(rows, sent, received, group, factor)
    return exchanged


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, factor: float
    ) -> Tensor:
        ctx.back = received, sent, group
        ctx.factor = factor
        return _sent(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sent(grads[0], *ctx.back) * ctx.factor, None, None, None, None


def _sent(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    got = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(got, rows.contiguous(), received, sent, group=group)
    return got
