"""The multi-token prediction module (arXiv 2412.19437, 2.2), stored as layer `num_hidden_layers` of the checkpoint.

From the main model's hidden state at t (after the final norm) and the embedding of token t+1 it predicts token t+2 through one more
block and the shared head. The concatenation is [embedding; hidden], as in the released weights (the paper prints the reverse).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slingshot.model.block import Block
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context
from slingshot.model.dispatch import Routing
from slingshot.model.linear import Linear
from slingshot.model.norm import RMSNorm


class SharedHead(nn.Module):
    """The norm before the shared output head; the head itself is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTP(Block):
    """One prediction depth: a block with its own norms and projection in front and a norm behind."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def forward(
        self, hidden_BTD: Tensor, context: Context, embedding_BTD: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """hidden at t and embedding of t+1 -> normalised hidden from which the head predicts t+2, [B, T, D]."""
        assert embedding_BTD is not None
        x_BTD = self.eh_proj(torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1))
        y_BTD, routing = super().forward(x_BTD, context)
        return self.shared_head.norm(y_BTD), routing
