"""DeepSeekMoE: a router that balances without an auxiliary loss, routed and shared experts (arXiv 2412.19437, 2.1.2).

`MoE.forward` returns its output and what the training loop needs to know of the routing; it changes no state. Router
biases move once per optimizer step in `training/optimizer.py`, from the load of the whole global batch.

Shape suffixes: N tokens, X leading dimensions, D model width, F expert width, E routed experts, k experts per token,
P rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slingshot.kernels.experts import experts_kernel
from slingshot.kernels.swiglu import swiglu
from slingshot.model.config import ModelConfig
from slingshot.model.dispatch import Dispatcher, LocalDispatcher, Routing
from slingshot.model.linear import GroupedLinear, Linear, joined
from slingshot.model.recompute import remade
from slingshot.model.stored import StoredMatrix


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, intermediate)
        self.up_proj = Linear(width, intermediate)
        self.down_proj = Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = joined(x, self.gate_proj, self.up_proj)
        return self.down_proj(remade(swiglu(gate_up), swiglu, gate_up))


class Gate(Linear):
    """The router: sigmoid scores, group-limited top-k by score plus bias, gate values from the scores alone.

    float32 wherever it runs, so that sampler and trainer choose alike. Groups are scored by the sum of their two best;
    experts outside the best `topk_group` groups are masked with -inf, as in DeepSeek's inference code (older
    transformers used 0). With norm_topk_prob a single expert's gate value is normalised too, as there and in
    transformers (modeling_deepseek.py normalises from two experts on).
    """

    keeps_float32 = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.n_routed_experts)
        self.config = config
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.e_score_correction_bias: Tensor

    def forward(self, x_ND: Tensor, replayed_Nk: Tensor | None = None) -> Routing:  # type: ignore[override]  # a choice
        """`replayed_Nk`: experts chosen before, numbered from 1; 0 is for the router to choose. Gates are its own."""
        config = self.config
        scores_NE = self.product(remade(x_ND.float(), Tensor.float, x_ND)).sigmoid()
        choice_NE = scores_NE.detach() + self.e_score_correction_bias
        if config.n_group > 1:
            grouped = choice_NE.unflatten(-1, (config.n_group, -1))
            best_groups = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=x_ND.device).scatter_(1, best_groups, True)
            choice_NE = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        experts_Nk = choice_NE.topk(config.num_experts_per_tok, dim=-1).indices
        if replayed_Nk is not None:  # arXiv 2510.11370
            experts_Nk = torch.where(replayed_Nk > 0, replayed_Nk.long() - 1, experts_Nk)
        gates_Nk = scores_NE.gather(1, experts_Nk)
        if config.norm_topk_prob:
            gates_Nk = gates_Nk / (gates_Nk.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts_Nk, gates_Nk * config.routed_scaling_factor, scores_NE)


class Experts(nn.Module):
    """The routed experts as stacked matrices: rows sorted by expert in, rows out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = GroupedLinear(config.n_routed_experts, config.hidden_size, 2, config.moe_intermediate_size)
        self.down_proj = GroupedLinear(config.n_routed_experts, config.moe_intermediate_size, config.hidden_size)

    def forward(self, x_PD: Tensor, counts: list[int], gates_P: Tensor | None = None) -> Tensor:
        """Gate values scale what the down projection reads: so its outputs, which are wider, need not be kept."""
        gate_up = self.gate_up_proj(x_PD, counts)
        hidden_PF = remade(swiglu(gate_up), swiglu, gate_up)
        if gates_P is not None:
            hidden_PF = _times(hidden_PF, gates_P)
        return self.down_proj(hidden_PF, counts)

    @property
    def plain(self) -> bool:
        """Whether both are nothing but their weights, as numbers, and multiply by them as they are."""
        both: tuple[Any, ...] = self.gate_up_proj, self.down_proj
        kinds = all(type(each) is GroupedLinear and not isinstance(each.weight, StoredMatrix) for each in both)
        return kinds and all(each.fp8 is None for each in both)


def _times(hidden_PF: Tensor, gates_P: Tensor) -> Tensor:
    gates_P1 = gates_P.unsqueeze(1)
    return remade(hidden_PF * gates_P1, torch.mul, hidden_PF, gates_P1)


class MoE(nn.Module):
    """Shared experts on every token plus the routed experts each token chose."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher()
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x_XD: Tensor, replayed_Xk: Tensor | None = None) -> tuple[Tensor, Routing]:
        x_ND = x_XD.flatten(0, -2)
        routing = self.gate(x_ND, None if replayed_Xk is None else replayed_Xk.flatten(0, -2))
        both = self.experts.gate_up_proj, self.experts.down_proj
        frozen = x_ND.requires_grad and not both[0].weight.requires_grad  # kernels have a gradient for every weight
        local = isinstance(self.dispatcher, LocalDispatcher) and self.experts.plain and not frozen
        if local and (kernel := experts_kernel(x_ND, both[1].weight.shape[-1])) is not None:
            weights = [each.matrix(each.weight.dtype) for each in both]
            y_ND = kernel(x_ND, routing.experts_Nk, routing.gates_Nk, *weights)
        else:
            y_ND = self.dispatcher(x_ND, routing, self.experts)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x_XD), routing


def expert_load(experts_Nk: Tensor, documents_X: Tensor | None, n_experts: int) -> Tensor:
    """How many tokens chose each expert, float32 [E]: each as often as there are documents that it is of."""
    if documents_X is None:
        return experts_Nk.flatten().bincount(minlength=n_experts).float()
    weights_Nk = documents_X.flatten()[:, None].expand_as(experts_Nk)
    return experts_Nk.flatten().bincount(weights_Nk.flatten().double(), minlength=n_experts).float()


def balance_loss(scores_BTE: Tensor, experts_BTk: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss, to be multiplied by its weight (arXiv 2412.19437, equations 17 to 20).

    Per sequence sum_e f_e P_e, with f_e = E/(k T) times the tokens that chose e and P_e the mean of the normalised
    scores; mean over sequences. 1 when perfectly even. Padding (valid_BT False) does not count.
    """
    n_experts, k = scores_BTE.shape[-1], experts_BTk.shape[-1]
    shares_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
    chosen_BTE = torch.zeros_like(scores_BTE).scatter_(-1, experts_BTk, 1.0)
    valid_BT = torch.ones_like(experts_BTk[..., 0]) if valid_BT is None else valid_BT
    weight_BT1 = valid_BT[..., None].to(scores_BTE.dtype)
    length_B1 = weight_BT1.sum(1).clamp(min=1)
    frequency_BE = (chosen_BTE * weight_BT1).sum(1) / length_B1 * (n_experts / k)
    sequences = valid_BT.any(1).sum().clamp(min=1)
    return (frequency_BE * (shares_BTE * weight_BT1).sum(1) / length_B1).sum() / sequences
