"""One transformer block, and the multi-token prediction module, which is a block with more around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slingshot.model.attention import GQA, MLA
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context
from slingshot.model.dispatch import Routing
from slingshot.model.linear import Linear, RMSNorm
from slingshot.model.moe import MLP, MoE


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is an MoE from layer `first_k_dense_replace` on."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer) if config.family == "deepseek_v3" else GQA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_moe = config.n_routed_experts > 0 and layer >= config.first_k_dense_replace
        self.mlp = MoE(config) if is_moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        y_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(y_BTD)
            return x_BTD + y_BTD, routing
        return x_BTD + self.mlp(y_BTD), None


class MTP(Block):
    """The multi-token prediction module (arXiv 2412.19437, 2.2), stored as layer `num_hidden_layers` of the checkpoint.

    From the main model's hidden state at t (after the final norm) and the embedding of token t+1 it predicts token t+2
    through one more block and the shared head. The concatenation is [embedding; hidden], as in the released weights
    (the paper prints the reverse).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict(
            {"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)}
        )  # before the shared head

    def forward(
        self, hidden_BTD: Tensor, context: Context, embedding_BTD: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """hidden at t and embedding of t+1 -> normalised hidden from which the head predicts t+2, [B, T, D]."""
        assert embedding_BTD is not None
        x_BTD = self.eh_proj(torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1))
        y_BTD, routing = super().forward(x_BTD, context)
        return self.shared_head["norm"](y_BTD), routing
