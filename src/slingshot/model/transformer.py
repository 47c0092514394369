"""The one model: DeepSeek-V3 (MLA, DeepSeekMoE, MTP) and the dense family (GQA), for training and for the engine.

    model = Transformer(config); model.init_weights(torch.Generator().manual_seed(0))
    output = model(tokens_BT)                                            # output.logits_BTV
    output = model(tokens_BT, segments_BT=segments_BT, logits=False)     # packed documents; 0 is padding
    output = model(tokens_BT, positions_BT, cache=cache.view(0, B))      # cached decoding

Module names are Hugging Face's tensor names; only the experts are stacked (model/checkpoint.py splits them).
Shape suffixes: B batch, T time, S attended time, D model width, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slingshot.model.attention import Context, RMSNorm
from slingshot.model.block import Block
from slingshot.model.cache import CacheView
from slingshot.model.config import ModelConfig
from slingshot.model.linear import Linear
from slingshot.model.moe import MoE, Routing, balance_loss, expert_load
from slingshot.model.mtp import MTP
from slingshot.model.rope import rotary


@dataclass
class ModelOutput:
    """What one forward pass gives. `load` and `balance_loss` cover every MoE layer, the MTP module's last."""

    hidden_BTD: Tensor
    logits_BTV: Tensor | None = None
    mtp_hidden_BTD: Tensor | None = None  # position t predicts token t+2; the last position predicts nothing
    load_LE: list[Tensor] = field(default_factory=list)
    balance_loss: Tensor | None = None


class _Body(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks: list[Block] = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        blocks += [MTP(config, config.num_hidden_layers + depth) for depth in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Decoder-only language model of either family. Activations run in `compute_dtype` (default: the parameters' own)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.model = _Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal of std `initializer_range` for every matrix, ones for norms, zeros for biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def lm_logits(self, hidden: Tensor, detach_head: bool = False) -> Tensor:
        """Float32 logits [..., V] of normalised hidden states; `detach_head` keeps the head's weight out of the gradient."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        if detach_head:
            weight = weight.detach()
        return F.linear(hidden, weight.to(hidden.dtype)).float()

    def moe_layers(self) -> list[MoE]:
        """The MoE blocks in order, the MTP module's last: the order of `ModelOutput.load_LE`."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer, Block) and isinstance(layer.mlp, MoE)]

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: CacheView | None = None,
        logits: bool = True,
        mtp: bool = False,
        detach_mtp: bool = False,
    ) -> ModelOutput:
        """tokens_BT -> ModelOutput. Attention stays within a segment (segments_BT numbers packed documents from 1; 0 is padding).

        With a cache, positions_BT says where each token stands in its row. `mtp` runs the MTP module along; `detach_mtp` cuts its
        gradient off from the main model.
        """
        config = self.config
        batch, time = tokens_BT.shape
        if positions_BT is None:
            positions_BT = torch.arange(time, device=tokens_BT.device).expand(batch, time)
        mask = _mask(positions_BT, segments_BT, cache)
        context = Context(*rotary(config, positions_BT), positions_BT, mask, cache)
        embedding_BTD = self.model.embed_tokens(tokens_BT)
        if self.compute_dtype is not None:
            embedding_BTD = embedding_BTD.to(self.compute_dtype)
        x_BTD = embedding_BTD
        routings: list[Routing] = []
        for layer in self.model.layers[: config.num_hidden_layers]:
            x_BTD, routing = layer(x_BTD, context)
            if routing is not None:
                routings.append(routing)
        output = ModelOutput(hidden_BTD=self.model.norm(x_BTD))
        if mtp:
            hidden_BTD, following_BTD = output.hidden_BTD, embedding_BTD.roll(-1, dims=1)
            if detach_mtp:
                hidden_BTD, following_BTD = hidden_BTD.detach(), following_BTD.detach()
            output.mtp_hidden_BTD, routing = self.model.layers[config.num_hidden_layers](
                hidden_BTD, context, following_BTD
            )
            if routing is not None:
                routings.append(routing)
        if routings and cache is None:
            self._routing_statistics(output, routings, segments_BT, batch)
        if logits:
            output.logits_BTV = self.lm_logits(output.hidden_BTD)
        return output

    def _routing_statistics(
        self, output: ModelOutput, routings: list[Routing], segments_BT: Tensor | None, batch: int
    ) -> None:
        valid_BT = None if segments_BT is None else segments_BT > 0
        valid_N = None if valid_BT is None else valid_BT.flatten()
        losses = []
        for routing in routings:
            output.load_LE.append(expert_load(routing.experts_Nk, valid_N, self.config.n_routed_experts))
            losses.append(
                balance_loss(
                    routing.scores_NE.unflatten(0, (batch, -1)), routing.experts_Nk.unflatten(0, (batch, -1)), valid_BT
                )
            )
        output.balance_loss = torch.stack(losses).sum()


def _mask(positions_BT: Tensor, segments_BT: Tensor | None, cache: CacheView | None) -> Tensor | None:
    """Where attention may look: [B, 1, T, S], or None for plain causal attention over the whole row."""
    if cache is not None:
        return (torch.arange(cache.extent, device=positions_BT.device) <= positions_BT[..., None]).unsqueeze(1)
    if segments_BT is None:
        return None
    time = segments_BT.shape[1]
    causal_TT = torch.ones(time, time, dtype=torch.bool, device=segments_BT.device).tril()
    return (causal_TT & (segments_BT[:, :, None] == segments_BT[:, None, :])).unsqueeze(1)
