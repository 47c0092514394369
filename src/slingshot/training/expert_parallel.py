"""Experts in parallel: each rank of a group keeps some of every layer's experts, and tokens travel to those they chose.

    share_experts(layer, mesh["ep"])      # an MoE layer keeps this rank's experts and sends tokens to the others'

Every rank has tokens of its own; the ranks of a group hold neighbouring experts, as many each. A token is sent once to
each rank that has one of its experts (DeepSeek-V3, arXiv 2412.19437, 3.2.2), with what its router chose there; that
rank sends back the sum of what its experts make of it. The all-to-all has as many rows as there are: none is dropped,
none padded. An expert's gradient is thereby that of all the group's tokens; it is made their mean over the ranks, as
FSDP makes it over its own, by dividing what comes back to the experts and multiplying what leaves them.

Shape suffixes: N tokens, D model width, E routed experts, k experts per token, R ranks of the group, L = E / R experts
of a rank, S rows sent, P rows received, A assignments of received rows to experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slingshot.base.errors import SlingshotError
from slingshot.model.dispatch import Experts, LocalDispatcher, Routing
from slingshot.model.moe import MoE
from slingshot.model.recompute import remade

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class AllToAllDispatcher:
    """Sends every token to the ranks that have its experts, and what came of it there back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._local = group, LocalDispatcher()

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        n_experts, ranks = routing.scores_NE.shape[1], self._group.size()
        own = n_experts // ranks
        rank_Nk = routing.experts_Nk // own
        meets_NR = torch.zeros(len(x_ND), ranks, dtype=torch.bool, device=x_ND.device).scatter_(1, rank_Nk, True)
        rank_S, token_S = meets_NR.T.nonzero(as_tuple=True)
        sent_R = meets_NR.sum(0)
        dist.all_to_all_single(received_R := torch.empty_like(sent_R), sent_R, group=self._group)
        sizes = sent_R.tolist(), received_R.tolist()
        chosen_Sk = routing.experts_Nk[token_S] - own * rank_S[:, None]  # of the rank's own, if 0 to L - 1
        chosen_Pk = _sent(chosen_Sk.int(), *sizes, self._group)
        gates_Pk = _exchange(routing.gates_Nk[token_S], *sizes, self._group, ranks)
        rows_PD = _exchange(x_ND[token_S], *sizes, self._group, ranks)
        row_A, slot_A = ((chosen_Pk >= 0) & (chosen_Pk < own)).nonzero(as_tuple=True)
        expert_A1, gate_A1 = chosen_Pk[row_A, slot_A].long()[:, None], gates_Pk[row_A, slot_A][:, None]
        given = Routing(expert_A1, gate_A1, rows_PD.new_empty(len(row_A), own))
        rows_AD = remade(rows_PD[row_A], Tensor.index_select, rows_PD, 0, row_A)
        y_PD = torch.zeros_like(rows_PD).index_add(0, row_A, self._local(rows_AD, given, experts))
        y_SD = _exchange(y_PD, *sizes[::-1], self._group, 1 / ranks)
        return torch.zeros_like(x_ND).index_add(0, token_S, y_SD)


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
