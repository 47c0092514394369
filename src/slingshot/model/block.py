"""One transformer block: attention and feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from slingshot.model.attention import GQA, MLA
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context
from slingshot.model.dispatch import Routing
from slingshot.model.moe import MLP, MoE
from slingshot.model.norm import RMSNorm


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
