"""How near a smaller model is to the one it was made of: what each says next, token by token, on the same texts.

    full, small = (reading_by_layer(folder, batches) for folder in ("runs/tiny/rl_final", "runs/tiny-int4"))
    told = fidelity(full, small, batches)          # {"kl": 0.012, "kl_p99": 0.21, "same_top": 0.97, ...}

KL is of the full model to the small one, sum p (log p - log q), in nats, over the whole vocabulary, as llama.cpp's
--kl-divergence has it. All of it is computed in float32, of the numbers that checkpoints hold.

Shape suffixes: B batch, T time, N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.checkpoint.load_save import load_grid, load_part, open_weights
from slingshot.model.context import PackedContext
from slingshot.model.dynamic import multiply_whole_numbers
from slingshot.model.transformer import Transformer
from slingshot.quantization.integers import WeightGrid
from slingshot.training.calibration import EMBEDDING, TextRows

_BLOCK = 2**25  # numbers of logits at a time: 128 MiB, of which there are two
_CACHED = 2**20  # of these at a time, what is made of them
_PIECE = 2**23  # of the head, where it is not in float32


class Reading(NamedTuple):
    """What a model makes of texts: of each batch the hidden states [N, D] of tokens that one which counts follows, and
    the head [V, D] that reads them, in the type in which it is stored."""

    hidden: list[Tensor]
    head_VD: Tensor


@torch.no_grad()
def reading(model: Transformer, batches: Sequence[TextRows]) -> Reading:
    """Of a model in memory."""
    return Reading([hidden(model, batch) for batch in batches], model.head.weight)


@torch.no_grad()
def reading_by_layer(path: Path | str, batches: Sequence[TextRows]) -> Reading:
    """Of a checkpoint, one layer of which is in memory at a time; an int8-dynamic one multiplies whole numbers."""
    weights = open_weights(path)
    config = weights.config.stored_as(None)
    whole = load_grid(path) if weights.config.quantization == "int8-dynamic" else None
    with torch.device("meta"):
        body = Transformer(config).model
    embedding_VD = weights.read(EMBEDDING)
    states = [F.embedding(tokens_BT, embedding_VD).float() for tokens_BT, *_ in batches]
    contexts = [PackedContext(config, *batch[:2]) for batch in batches]
    for number in range(config.num_hidden_layers):
        layer, prefix = body.layers[number], f"model.layers.{number}."
        load_part(layer, weights, prefix)
        if whole is not None:
            own = {name: scales for name, scales in whole.scales.items() if name.startswith(prefix)}
            multiply_whole_numbers(layer, WeightGrid({}, 0, {k.removeprefix(prefix): own[k] for k in own}))
        for at, context in enumerate(contexts):
            states[at] = layer(states[at], context)[0]
        layer.to_empty(device="meta")
    load_part(body.norm, weights, "model.norm.")
    for at, batch in enumerate(batches):
        states[at] = body.norm(states[at][:, :-1][followed(batch)])
    return Reading(states, embedding_VD if config.tie_word_embeddings else weights.read("lm_head.weight"))


@torch.no_grad()
def fidelity(full: Reading, small: Reading, batches: Sequence[TextRows]) -> dict[str, float]:
    """Mean of KL with its standard error, 99th percentile, share of tokens with the same most likely next token, ratio
    of perplexities."""
    kl, agreements, scores = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch, full_ND, small_ND in zip(batches, full.hidden, small.hidden, strict=True):
        target_N = batch.tokens_BT[:, 1:][followed(batch)]
        for target_n, p_NV, q_NV in _logprobs(full_ND, full.head_VD, small_ND, small.head_VD, target_N):
            kl.append(_kl(p_NV, q_NV))
            agreements.append((p_NV.argmax(-1) == q_NV.argmax(-1)).float())
            scores.append(torch.stack([each.gather(1, target_n[:, None])[:, 0] for each in (p_NV, q_NV)]))
    kl_N, (of_full, of_small) = torch.cat(kl), torch.cat(scores, dim=1).mean(1).tolist()
    return {
        "kl": kl_N.mean().item(), "kl_error": kl_N.std().item() / len(kl_N) ** 0.5,
        "kl_p99": kl_N.quantile(0.99).item(), "same_top": torch.cat(agreements).mean().item(),
        "perplexity": math.exp(-of_full), "perplexity_ratio": math.exp(of_full - of_small), "tokens": float(len(kl_N)),
    }  # fmt: skip


def token_kl(full_ND: Tensor, small_ND: Tensor, head_VD: Tensor) -> Tensor:
    """KL of the full model to the small one at every token, from their hidden states under one head: [N]."""
    blocks = _logprobs(full_ND, head_VD, small_ND, head_VD, torch.zeros(len(full_ND)))
    return torch.cat([_kl(p_NV, q_NV) for _, p_NV, q_NV in blocks])


def hidden(model: Transformer, batch: TextRows) -> Tensor:
    """Hidden states [N, D] of the tokens that one which counts follows."""
    device = model.model.embed_tokens.weight.device
    tokens_BT, segments_BT = (each.to(device) for each in batch[:2])
    return model(tokens_BT, segments_BT=segments_BT, logits=False).hidden_BTD[:, :-1][followed(batch)]


def followed(batch: TextRows) -> Tensor:
    """Which tokens [B, T - 1] another of their text follows that counts."""
    return (batch.segments_BT[:, 1:] == batch.segments_BT[:, :-1]) & batch.written_BT[:, 1:].bool()


def _logprobs(
    full_ND: Tensor, full_VD: Tensor, small_ND: Tensor, small_VD: Tensor, targets_N: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Targets and both models' logprobs over the vocabulary, some tokens at a time."""
    rows, few = (max(1, numbers // len(full_VD)) for numbers in (_BLOCK, _CACHED))
    for target_N, p_ND, q_ND in zip(*(each.split(rows) for each in (targets_N, full_ND, small_ND)), strict=True):
        logits = _logits(p_ND, full_VD), _logits(q_ND, small_VD)
        for target_n, p_NV, q_NV in zip(*(each.split(few) for each in (target_N, *logits)), strict=True):
            yield target_n, p_NV.log_softmax(-1), q_NV.log_softmax(-1)


def _logits(x_ND: Tensor, head_VD: Tensor) -> Tensor:
    """x W^T in float32, of which W is made a piece at a time."""
    if head_VD.dtype == torch.float32:
        return x_ND.float() @ head_VD.T
    y_NV = torch.empty(len(x_ND), len(head_VD), device=x_ND.device)
    rows = max(1, _PIECE // head_VD.shape[1])
    for y_NU, head_UD in zip(y_NV.split(rows, 1), head_VD.split(rows), strict=True):
        torch.mm(x_ND.float(), head_UD.float().T, out=y_NU)
    return y_NV


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    return (p_NV - q_NV).mul_(p_NV.exp()).sum(-1).clamp_(min=0)
