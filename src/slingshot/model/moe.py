"""DeepSeekMoE: a router that balances without an auxiliary loss, routed experts, one shared expert (arXiv 2412.19437, 2.1.2).

`MoE.forward` returns its output and what the training loop needs to know of the routing; it changes no state. Router biases move
once per optimizer step in `training/optimizer.py`, from the load of the whole global batch.

Shape suffixes: N tokens, D model width, F expert width, E routed experts, k experts per token, A = N k assignments, P padded slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slingshot.model.config import ModelConfig
from slingshot.model.linear import GroupedLinear, Linear


@dataclass
class Routing:
    """What one MoE layer chose: experts_Nk, gates_Nk (float32) and scores_NE (float32, before choice)."""

    experts_Nk: Tensor
    gates_Nk: Tensor
    scores_NE: Tensor


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, intermediate)
        self.up_proj = Linear(width, intermediate)
        self.down_proj = Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router: sigmoid scores, group-limited top-k by score plus bias, gate values from the scores alone.

    Groups are scored by the sum of their two best; experts outside the best `topk_group` groups are masked with -inf, as in
    DeepSeek's inference code (older transformers used 0). With norm_topk_prob a single expert's gate value is
    normalised too, as there and in transformers (modeling_deepseek.py normalises from two experts on).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.e_score_correction_bias: Tensor

    def forward(self, x_ND: Tensor) -> Routing:
        config = self.config
        scores_NE = F.linear(x_ND.float(), self.weight.float()).sigmoid()
        choice_NE = scores_NE.detach() + self.e_score_correction_bias
        if config.n_group > 1:
            grouped = choice_NE.unflatten(-1, (config.n_group, -1))
            best_groups = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=x_ND.device).scatter_(1, best_groups, True)
            choice_NE = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        experts_Nk = choice_NE.topk(config.num_experts_per_tok, dim=-1).indices
        gates_Nk = scores_NE.gather(1, experts_Nk)
        if config.norm_topk_prob:
            gates_Nk = gates_Nk / (gates_Nk.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts_Nk, gates_Nk * config.routed_scaling_factor, scores_NE)


def _sum_of_k(rows_A: Tensor, k: int) -> Tensor:
    """Sum each k consecutive rows: slice by slice, several times faster on CPU than a reduction over the middle dimension."""
    parts = rows_A.unflatten(0, (-1, k)).unbind(1)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _Dispatch(torch.autograd.Function):
    """y_P = x[source_P], where assignment a of x's row a // k went to slot_A[a]; the gradient is gathered back through the slots.

    A gather both ways: on CPU far faster than index_add. Slots that hold no assignment must get no gradient that matters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source_P: Tensor, slot_A: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(slot_A)
        ctx.k = k
        return x.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slot_A,) = ctx.saved_tensors
        return _sum_of_k(grads[0].index_select(0, slot_A), ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """y_A = x[slot_A]; the gradient of empty slots is that of whatever assignment `owner_P` names, and must be multiplied by zero later."""

    @staticmethod
    def forward(ctx: Any, x_P: Tensor, slot_A: Tensor, owner_P: Tensor) -> Tensor:
        ctx.save_for_backward(owner_P)
        return x_P.index_select(0, slot_A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (owner_P,) = ctx.saved_tensors
        return grads[0].index_select(0, owner_P), None, None


class Experts(nn.Module):
    """The routed experts as stacked matrices; tokens are sorted by expert and each expert multiplies its rows once.

    Every expert's rows are padded to a multiple of a block: matrix libraries compile code for each shape they meet, and row counts that
    change with every batch would spend more time there than in the products. Padding repeats some row with gate value zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = GroupedLinear(config.n_routed_experts, config.hidden_size, 2, config.moe_intermediate_size)
        self.down_proj = GroupedLinear(config.n_routed_experts, config.moe_intermediate_size, config.hidden_size)

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        k = routing.experts_Nk.shape[1]
        expert_A = routing.experts_Nk.flatten()
        counts_E = expert_A.bincount(minlength=self.down_proj.weight.shape[0])
        block = 128 if expert_A.numel() >= 4096 else 16
        padded_E = (counts_E + block - 1) // block * block
        counts = padded_E.tolist()
        order_A = expert_A.argsort(stable=True)
        shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
        sorted_slot_A = torch.arange(len(order_A), device=x_ND.device) + shift_E[expert_A[order_A]]
        owner_P = order_A.new_zeros(sum(counts)).index_copy_(0, sorted_slot_A, order_A)
        slot_A = torch.empty_like(order_A).index_copy_(0, order_A, sorted_slot_A)
        filled_P = torch.zeros_like(owner_P, dtype=torch.bool).index_fill_(0, sorted_slot_A, True)

        gate, up = self.gate_up_proj(_Dispatch.apply(x_ND, owner_P // k, slot_A, k), counts).chunk(2, dim=-1)
        gates_P = _Dispatch.apply(routing.gates_Nk.flatten(), owner_P, slot_A, 1).to(x_ND.dtype) * filled_P
        # the gate value scales the narrow inner activation: the down projection is linear, so the sum over experts stays exact
        y_PD = self.down_proj(F.silu(gate) * up * gates_P[:, None], counts)
        return _sum_of_k(_Combine.apply(y_PD, slot_A, owner_P), k)


class MoE(nn.Module):
    """Shared experts on every token plus the routed experts each token chose."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        y_ND = self.experts(x_ND, routing)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x_BTD), routing


def expert_load(experts_Nk: Tensor, valid_N: Tensor | None, n_experts: int) -> Tensor:
    """How many tokens chose each expert, float32 [E]; padding does not count."""
    flat = experts_Nk if valid_N is None else experts_Nk[valid_N]
    return flat.flatten().bincount(minlength=n_experts).float()


def balance_loss(scores_BTE: Tensor, experts_BTk: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss, to be multiplied by its weight (arXiv 2412.19437, equations 17 to 20).

    Per sequence sum_e f_e P_e, with f_e = E/(k T) times the tokens that chose e and P_e the mean of the normalised scores; mean over
    sequences. 1 when perfectly even. Padding (valid_BT False) does not count.
    """
    n_experts, k = scores_BTE.shape[-1], experts_BTk.shape[-1]
    shares_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
    chosen_BTE = torch.zeros_like(scores_BTE).scatter_(-1, experts_BTk, 1.0)
    if valid_BT is None:
        return (chosen_BTE.mean(1) * (n_experts / k) * shares_BTE.mean(1)).sum(-1).mean()
    weight_BT1 = valid_BT[..., None].to(scores_BTE.dtype)
    length_B1 = weight_BT1.sum(1).clamp(min=1)
    frequency_BE = (chosen_BTE * weight_BT1).sum(1) / length_B1 * (n_experts / k)
    sequences = valid_BT.any(1).sum().clamp(min=1)
    return (frequency_BE * (shares_BTE * weight_BT1).sum(1) / length_B1).sum() / sequences
