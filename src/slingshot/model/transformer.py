"""The one model: DeepSeek-V3 (MLA, DeepSeekMoE, MTP) and the dense family (GQA), for training and for the engine.

    model = Transformer.empty(config, device); model.init_weights(torch.Generator().manual_seed(0))
    output = model(tokens_BT)                                            # output.logits_BTV
    output = model(tokens_BT, segments_BT=segments_BT, logits=False)     # packed documents; 0 is padding
    output = model(tokens_BT, context=context)                           # over a cache: engine/runner.py

Module names are Hugging Face's tensor names; only the experts are stacked (checkpoint/load_save.py splits them).
Shape suffixes: B batch, T time, D model width, E experts, k experts of a token, L MoE layers,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from slingshot.model.attention import GQA, MLA
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context, PackedContext
from slingshot.model.dispatch import Routing
from slingshot.model.linear import Embedding, Linear, RMSNorm
from slingshot.model.moe import MLP, MoE, balance_loss, expert_load
from slingshot.model.recompute import recomputed, recomputed_cheaply

Routed = tuple[Tensor, Routing | None]  # what a block gives: x_BTD, and the routing of its MoE


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is an MoE from layer `first_k_dense_replace` on."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer) if config.family == "deepseek_v3" else GQA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.has_experts(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, context: Context, replayed_BTk: Tensor | None = None) -> Routed:
        x_BTD, y_BTD = self.input_layernorm.after(x_BTD)
        x_BTD, y_BTD = self.post_attention_layernorm.after(x_BTD, self.self_attn(y_BTD, context))
        y_BTD, routing = self.mlp(y_BTD, replayed_BTk) if isinstance(self.mlp, MoE) else (self.mlp(y_BTD), None)
        return x_BTD + y_BTD, routing


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
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(self, hidden_BTD: Tensor, context: Context, embedding_BTD: Tensor | None = None) -> Routed:
        """hidden at t and embedding of t+1 -> normalised hidden from which the head predicts t+2, [B, T, D]."""
        assert embedding_BTD is not None
        x_BTD = self.eh_proj(torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1))
        y_BTD, routing = super().forward(x_BTD, context)
        return self.shared_head["norm"](y_BTD), routing


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
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        blocks: list[Block] = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        blocks += [MTP(config, config.num_hidden_layers + depth) for depth in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Decoder-only language model of either family. Activations run in `compute_dtype` (default: the parameters').

    With `recompute` "full" the backward pass has of each block its input alone, and computes the rest again; with
    "selective" it makes again what costs little, norms, SwiGLU and MLA's keys, values and queries. With `logits_chunk`
    so do the logits of as many tokens at a time, where a loss is of them (training/language_model.py).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.recompute: Literal["none", "selective", "full"] = "none"
        self.logits_chunk = 0
        self.model = _Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shard: Callable[[Self], None] | None = None,
    ) -> Self:
        """A model whose weights may hold anything: made without memory, split over ranks, only then given memory."""
        with torch.device("meta"):
            model = cls(config)
        model.cast(dtype)
        if shard is not None:
            shard(model)
        if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
            return model.to_empty(device=device)
        # The same without torch's reading of meta tensors' strides, which imports sympy: half a second.
        blank = ((name, torch.empty(t.shape, dtype=t.dtype, device=device)) for name, t in model.state_dict().items())
        model.load_state_dict(dict(blank), assign=True)
        return model

    def cast(self, dtype: torch.dtype) -> None:
        """Give every weight this dtype but those that stay float32 wherever they are: the routers'."""
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                keeps = getattr(module, "keeps_float32", False)
                if parameter.is_floating_point():  # whole numbers stay
                    parameter.data = parameter.data.to(torch.float32 if keeps else dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal of std `initializer_range` for every matrix, ones for norms, zeros for biases.

        Drawn on the CPU, one whole matrix at a time, of which a rank keeps its part: the same on any device and ranks.
        """
        for name, parameter in self.named_parameters():
            local, first = local_part(parameter)
            if parameter.dim() > 1:
                numbers = torch.empty(parameter.shape).normal_(0.0, self.config.initializer_range, generator=generator)
                local.copy_(numbers[first : first + len(local)])
            else:
                local.fill_(0.0 if name.endswith("bias") else 1.0)
        for buffer in self.buffers():
            buffer.zero_()

    @property
    def head(self) -> Linear:
        """The matrix that makes logits [..., V] of normalised hidden states."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """The head's logits in float32."""
        return self.head.product(hidden).float()

    def moe_layers(self) -> list[MoE]:
        """The MoE blocks in order, the MTP module's last: the order of `ModelOutput.load_LE`."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer, Block) and isinstance(layer.mlp, MoE)]

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        context: Context | None = None,
        prefixes_BT: Tensor | None = None,
        logits: bool = True,
        mtp: bool = False,
        detach_mtp: bool = False,
        replayed_BTLk: Tensor | None = None,
    ) -> ModelOutput:
        """tokens_BT -> ModelOutput. Attention stays within a segment (packed documents numbered from 1; 0 is padding),
        and what it goes on from (`prefixes_BT`, as `PackedContext` takes it).

        With a context of the engine's, attention is what it makes of it, tokens may be flat, and nothing is told of the
        routing. `mtp` runs the MTP module along; `detach_mtp` cuts its gradient off from the main model.
        `replayed_BTLk`: for every MoE layer but MTP's the experts that tokens go to, as `Gate` takes them.
        """
        config = self.config
        packed = PackedContext(config, tokens_BT, segments_BT, prefixes_BT) if context is None else None
        context = context or packed
        assert context is not None
        embedding_BTD = self.model.embed_tokens(tokens_BT)
        if self.compute_dtype is not None:
            embedding_BTD = embedding_BTD.to(self.compute_dtype)
        x_BTD = embedding_BTD
        routings = []
        for number, layer in enumerate(self.model.layers[: config.num_hidden_layers]):
            at = number - config.first_k_dense_replace  # among the MoE layers
            replayed_BTk = None if replayed_BTLk is None or at < 0 else replayed_BTLk[:, :, at]
            x_BTD, routing = self._through(layer, x_BTD, context, replayed_BTk)
            routings.append(routing)
        output = ModelOutput(hidden_BTD=self.model.norm(x_BTD))
        if mtp:
            hidden_BTD, following_BTD = output.hidden_BTD, embedding_BTD.roll(-1, dims=1)
            if detach_mtp:
                hidden_BTD, following_BTD = hidden_BTD.detach(), following_BTD.detach()
            module = self.model.layers[config.num_hidden_layers]
            output.mtp_hidden_BTD, routing = self._through(module, hidden_BTD, context, following_BTD)
            routings.append(routing)
        if packed and (chosen := [routing for routing in routings if routing is not None]):
            shape, valid_BT = tokens_BT.shape, None if segments_BT is None else segments_BT > 0
            documents_BT = None if segments_BT is None else packed.documents_BT
            output.load_LE = [expert_load(r.experts_Nk, documents_BT, config.n_routed_experts) for r in chosen]
            grids = ((r.scores_NE.unflatten(0, shape), r.experts_Nk.unflatten(0, shape)) for r in chosen)
            output.balance_loss = torch.stack([balance_loss(*grid, valid_BT) for grid in grids]).sum()
        if logits:
            output.logits_BTV = self.lm_logits(output.hidden_BTD)
        return output

    def _through(self, layer: nn.Module, *given: Any) -> Routed:
        ways = {"full": recomputed, "selective": recomputed_cheaply}
        way = ways.get(self.recompute) if torch.is_grad_enabled() else None
        found: Routed = way(layer, *given) if way else layer(*given)
        return found


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a tensor that may be sharded (a DTensor), and the row of the whole at which they begin."""
    if not hasattr(tensor, "to_local"):
        return tensor, 0
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0]
