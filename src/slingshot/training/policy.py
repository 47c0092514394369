"""One step of policy training over packed trajectories: reference and policy forward, GRPO and MTP losses, backward.

Shape suffixes: B rows, T time, N chosen tokens, P those and padding, D model width, V vocabulary, L MoE layers,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slingshot.base.config import Strict
from slingshot.kernels.logprobs import token_logprobs
from slingshot.model.transformer import Transformer
from slingshot.training.language_model import add_loads, in_whole_blocks, target_loss
from slingshot.training.objectives import grpo, targets_ahead
from slingshot.training.parallel import Parallel

LOGGED_PER_TOKEN = ("loss", "kl", "clip_fraction", "entropy", "logprob_gap")


class GRPOConfig(Strict):
    """The table `loss` of rl; `mtp` weighs the MTP module's loss, trained on detached hidden states.

    The policy becomes the KL term's reference every `reference_steps`. `normalize_std` divides advantages by the std.
    """

    clip_low: float = Field(default=0.2, ge=0, le=1)
    clip_high: float = Field(default=0.28, ge=0)  # arXiv 2503.14476, 3.1
    kl: float = Field(default=1e-3, ge=0)  # arXiv 2501.12948
    mtp: float = Field(default=0.1, ge=0)
    normalize_std: bool = True
    reference_steps: int = Field(default=400, ge=1)


@dataclass
class PolicyRows:
    """Packed trajectories: segments numbered from 1, 0 padding; mask 1 on sampled tokens, which carry the other two."""

    tokens_BT: Tensor
    segments_BT: Tensor
    mask_BT: Tensor
    advantages_BT: Tensor
    sampler_BT: Tensor  # the sampler's logprobs

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def __getitem__(self, part: slice) -> PolicyRows:
        return self._each(lambda field_BT: field_BT[part])

    def to(self, device: torch.device) -> PolicyRows:
        return self._each(lambda field_BT: field_BT.to(device))

    def or_empty(self) -> PolicyRows:
        """At least one row: a rank that has none left still takes part in the collective operations."""
        return self if len(self) else self._each(lambda field_BT: field_BT.new_zeros(1, field_BT.shape[1]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> PolicyRows:
        return PolicyRows(*(change(getattr(self, field.name)) for field in fields(self)))


def policy_step(
    model: Transformer,
    reference: Transformer | None,
    batch: PolicyRows,
    n_rows: int,
    config: GRPOConfig,
    temperature: float,
    micro_batch_size: int,
    parallel: Parallel,
) -> tuple[dict[str, float], list[Tensor]]:
    """Forward and backward over this rank's rows; gradients are of the mean over the global batch's sampled tokens.

    `n_rows`: the largest rank's number of rows; every rank takes as many micro-batches. `temperature`: the sampler's.
    Returns sums over this rank's tokens, and the load of each MoE layer.
    """
    with_mtp = model.config.num_nextn_predict_layers > 0 and config.mtp > 0
    far_BT = targets_ahead(batch.tokens_BT, batch.segments_BT, batch.mask_BT, ahead=2)[1]
    values = {"tokens": float(batch.mask_BT.sum()), "far": float(far_BT.sum())}
    counts = parallel.sums(values)
    values |= dict.fromkeys((*LOGGED_PER_TOKEN, "mtp_loss"), 0.0)
    load_LE: list[Tensor] = []
    for start in range(0, n_rows, micro_batch_size):
        micro = batch[start : start + micro_batch_size].or_empty()
        rows = micro.tokens_BT, micro.segments_BT, micro.mask_BT
        targets_BT, weights_BT = targets_ahead(*rows)
        chosen_N = weights_BT.flatten().nonzero().squeeze(1)
        targets_N = targets_BT.flatten()[chosen_N]
        advantages_N, sampler_N = (
            each_BT.roll(-1, dims=1).flatten()[chosen_N] for each_BT in (micro.advantages_BT, micro.sampler_BT)
        )
        reference_N = None
        if reference is not None:
            with torch.no_grad():
                hidden_BTD = reference(micro.tokens_BT, segments_BT=micro.segments_BT, logits=False).hidden_BTD
                reference_N, _ = _chosen_logprobs(reference, hidden_BTD, chosen_N, targets_N, temperature)
        output = model(micro.tokens_BT, segments_BT=micro.segments_BT, logits=False, mtp=with_mtp, detach_mtp=True)
        logprobs_N, entropy_N = _chosen_logprobs(model, output.hidden_BTD, chosen_N, targets_N, temperature)
        weights_N, clips = torch.ones_like(logprobs_N), (config.clip_low, config.clip_high, config.kl)
        terms = grpo(logprobs_N, sampler_N, advantages_N, weights_N, reference_N, *clips)
        loss = terms.loss / max(counts["tokens"], 1.0)
        if output.mtp_hidden_BTD is not None:
            mtp_loss = target_loss(model, output.mtp_hidden_BTD, *targets_ahead(*rows, ahead=2), detach_head=True)
            loss = loss + config.mtp * mtp_loss / max(counts["far"], 1.0)
            values["mtp_loss"] += float(mtp_loss.detach())
        (loss * parallel.dp_size).backward()  # FSDP averages over the ranks; the loss is a share of the global mean
        load_LE = add_loads(load_LE, output.load_LE)
        gap = (logprobs_N.detach() - sampler_N).abs().sum()
        sums = terms.loss.detach(), terms.kl, terms.clipped, entropy_N.sum(), gap
        for name, value in zip(LOGGED_PER_TOKEN, sums, strict=True):
            values[name] += float(value)
    return values, load_LE


def _chosen_logprobs(
    model: Transformer, hidden_BTD: Tensor, chosen_N: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    rows_P = in_whole_blocks(chosen_N)
    logits_PV = model.head(hidden_BTD.flatten(0, 1).index_select(0, rows_P))
    targets_P = F.pad(targets_N, (0, len(rows_P) - len(chosen_N)))
    logprobs_P, entropy_P = token_logprobs(logits_PV, targets_P, temperature)
    return logprobs_P[: len(chosen_N)], entropy_P[: len(chosen_N)]
