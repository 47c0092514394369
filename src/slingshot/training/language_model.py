"""One step of next-token training over packed rows, shared by pre-training and SFT: forward, losses, backward.

Shape suffixes: B rows, T time, N tokens, P those and padding, D model width, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slingshot.base.config import Strict
from slingshot.kernels.logprobs import token_logprobs
from slingshot.model.recompute import recomputed
from slingshot.model.transformer import Transformer
from slingshot.training.batch import Rows
from slingshot.training.objectives import targets_ahead
from slingshot.training.parallel import Parallel

BLOCK = 128  # rows


class LanguageModelLoss(Strict):
    """The table `loss` of pretrain and sft: weights of the losses beside cross entropy.

    DeepSeek-V3: MTP 0.3, then 0.1; balance 1e-4 (arXiv 2412.19437, 4.2).
    """

    mtp: float = Field(default=0.3, ge=0)
    balance: float = Field(default=1e-4, ge=0)


class MemoryConfig(Strict):
    """The table `memory`: what the backward pass computes again instead of keeping. No loss depends on it.

    `recompute`: all within a block ("full"), what costs little ("selective") or nothing; "auto" is full beside adapters
    alone, where state is small.
    `logits_chunk`: of how many tokens logits are in memory at once; 0 is all of a micro-batch.
    """

    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    logits_chunk: int = Field(default=0, ge=0)

    def apply(self, model: Transformer) -> None:
        """Have the model's training do so."""
        if self.recompute != "auto":
            model.recompute = self.recompute
        model.logits_chunk = self.logits_chunk


@dataclass
class StepLosses:
    """Losses of one global step: nats per token, and the load of each MoE layer summed over the global batch."""

    loss: float
    mtp_loss: float | None
    balance_loss: float | None
    load_LE: list[Tensor]

    def logged(self) -> dict[str, Any]:
        row: dict[str, Any] = {"loss": self.loss}
        if self.mtp_loss is not None:
            row["mtp_loss"] = self.mtp_loss
        if self.load_LE:
            row |= {"balance_loss": self.balance_loss, "expert_load": busiest(self.load_LE)}
        return row


def target_loss(
    model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor, detach_head: bool = False
) -> Tensor:
    """Weighted sum of cross entropy, logits only where a target has weight. `detach_head`: the head does not learn."""
    chosen_N = weights_BT.flatten().nonzero().squeeze(1)
    rows_P = in_whole_blocks(chosen_N)
    hidden_PD = hidden_BTD.flatten(0, 1).index_select(0, rows_P)
    weights_P = F.pad(weights_BT.flatten()[chosen_N], (0, len(rows_P) - len(chosen_N)))
    return -(
        head_logprobs(model, hidden_PD, targets_BT.flatten()[rows_P], detach_head=detach_head)[0] * weights_P
    ).sum()


def head_logprobs(
    model: Transformer,
    hidden_ND: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    detach_head: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the head's logits; of `model.logits_chunk` tokens at a time, computed again for backward.

    Logits have the hidden states' dtype, or with `wide` float32. `detach_head`: the head does not learn.
    """

    def logprobs(hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = model.head.wide_product(hidden_ND) if wide else model.head.product(hidden_ND, detach_head)
        return token_logprobs(logits_NV, targets_N, temperature)

    size = model.logits_chunk
    if not 0 < size < len(targets_N):
        return logprobs(hidden_ND, targets_N)
    chunks = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    logprobs_n, entropies_n = zip(*(recomputed(logprobs, *chunk) for chunk in chunks), strict=True)
    return torch.cat(logprobs_n), torch.cat(entropies_n)


def in_whole_blocks(chosen_N: Tensor) -> Tensor:
    """Indices, and some of the first row to make their number a multiple of `BLOCK`; what comes of these is not used.

    Matrix libraries make code for every number of rows they meet, and packed rows have another one at every step.
    """
    return F.pad(chosen_N, (0, -len(chosen_N) % BLOCK))


def add_loads(total_LE: list[Tensor], more_LE: list[Tensor]) -> list[Tensor]:
    """Layer by layer; an empty total is zero."""
    return [a + b for a, b in zip(total_LE, more_LE, strict=True)] if total_LE else more_LE


def busiest(load_LE: list[Tensor]) -> list[float]:
    """The load of each layer's busiest expert over the mean; 1 when perfectly even."""
    return [float(load.max() / load.mean()) for load in load_LE]


def language_model_step(
    model: Transformer, rows: Rows, weights: LanguageModelLoss, micro_batch_size: int, parallel: Parallel
) -> StepLosses:
    """Forward and backward over this rank's rows; gradients are those of the mean over the global batch's tokens."""
    with_mtp = model.config.num_nextn_predict_layers > 0 and weights.mtp > 0
    next_targets, next_weights = targets_ahead(rows.tokens_BT, rows.segments_BT, rows.weights_BT)
    far_targets, far_weights = targets_ahead(rows.tokens_BT, rows.segments_BT, rows.weights_BT, ahead=2)
    sizes = {"next": next_weights, "far": far_weights, "rows": rows.segments_BT[:, 0] > 0}
    counts = parallel.sums({name: float(weights.sum()) for name, weights in sizes.items()})
    sums = {"next": 0.0, "far": 0.0, "balance": 0.0}
    load_LE: list[Tensor] = []
    for start in range(0, len(rows), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        micro = rows[part]
        output = model(micro.tokens_BT, segments_BT=micro.segments_BT, logits=False, mtp=with_mtp)
        loss_sum = target_loss(model, output.hidden_BTD, next_targets[part], next_weights[part])
        loss = loss_sum / max(counts["next"], 1.0)
        sums["next"] += float(loss_sum.detach())
        if output.mtp_hidden_BTD is not None:
            far_sum = target_loss(model, output.mtp_hidden_BTD, far_targets[part], far_weights[part])
            loss = loss + weights.mtp * far_sum / max(counts["far"], 1.0)
            sums["far"] += float(far_sum.detach())
        if output.balance_loss is not None:
            balance = output.balance_loss * (float((micro.segments_BT[:, 0] > 0).sum()) / counts["rows"])
            loss = loss + weights.balance * balance
            sums["balance"] += float(balance.detach())
        (loss * parallel.dp_size).backward()  # FSDP averages over the ranks; the loss is a share of the global mean
        load_LE = add_loads(load_LE, output.load_LE)
    total = parallel.sums(sums)
    return StepLosses(
        loss=total["next"] / max(counts["next"], 1.0),
        mtp_loss=total["far"] / max(counts["far"], 1.0) if with_mtp else None,
        balance_loss=total["balance"] if load_LE else None,
        load_LE=[parallel.sum(load) for load in load_LE],
    )


@torch.no_grad()
def evaluate_loss(model: Transformer, rows: Rows, micro_batch_size: int, parallel: Parallel) -> float:
    """Sum of next-token cross entropy over the global rows, in nats."""
    total = 0.0
    for start in range(0, len(rows), micro_batch_size):
        micro = rows[start : start + micro_batch_size]
        targets_BT, weights_BT = targets_ahead(micro.tokens_BT, micro.segments_BT, micro.weights_BT)
        hidden_BTD = model(micro.tokens_BT, segments_BT=micro.segments_BT, logits=False).hidden_BTD
        total += float(target_loss(model, hidden_BTD, targets_BT, weights_BT))
    return parallel.sums({"nats": total})["nats"]
