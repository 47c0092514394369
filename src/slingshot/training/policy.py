"""One step of policy training over packed trajectories: reference and policy forward, policy and MTP losses, backward.

Shape suffixes: B rows, T time, N chosen tokens, P those and padding, D model width, V vocabulary, L MoE layers,
E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from slingshot.base.config import Strict
from slingshot.model.transformer import Transformer
from slingshot.training.language_model import add_loads, head_logprobs, in_whole_blocks, target_loss
from slingshot.training.objectives import (
    POLICY_LOSSES,
    AdvantageStd,
    Aggregation,
    PolicyLossName,
    importance_weights,
    k3,
    off_policy,
    ratios,
    targets_ahead,
)
from slingshot.training.parallel import Parallel

LOGGED_PER_TOKEN = ("kl", "clip_fraction", "entropy", "logprob_gap")


class PolicyLoss(Strict):
    """The table `loss` of rl; `mtp` weighs the MTP module's loss, trained on detached hidden states.

    What `POLICY_LOSSES` knows of the loss `name` is taken from there where it is not set.
    """

    name: PolicyLossName = "dapo"
    clip_low: float = Field(default=0.2, ge=0, le=1)
    clip_high: float = Field(default=0.28, ge=0)
    aggregation: Aggregation = "token"
    advantage_std: AdvantageStd = "group"
    kl: float = Field(default=1e-3, ge=0)  # arXiv 2501.12948
    kl_unbiased: bool = False
    reference_steps: int = Field(default=400, ge=1)
    importance: Literal["none", "truncated", "masked"] = "none"
    importance_cap: float = Field(default=2.0, gt=1)
    off_policy_delta: float | None = Field(default=None, gt=0)  # nats a token
    mask_truncated: bool = False
    replay_routing: bool = False
    mtp: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _as_in_its_paper(self) -> Self:
        # not as keys that were set: a table that is given in part takes those from its stage's default
        for key in {"clip_low", "clip_high", "aggregation", "advantage_std"} - self.model_fields_set:
            self.__dict__[key] = getattr(POLICY_LOSSES[self.name], key)
        return self


def trains_mtp(model: Transformer, config: PolicyLoss) -> bool:
    return model.config.num_nextn_predict_layers > 0 and config.mtp > 0


class DocumentSizes(NamedTuple):
    """For counting FLOPs: tokens of each document, and how many of another it sees before its own."""

    lengths: list[int]
    before: list[int]


@dataclass
class PolicyRows:
    """Packed trajectories: segments numbered from 1, 0 padding; the rest stands in the places of sampled tokens.

    Where trajectories begin alike that stands once, and `prefixes_BT` says of each token which segment its own goes on
    from (0: none).

    A token's share is of what the loss is the mean of (`token_shares`); its weight is the share, or a constant's.
    """

    tokens_BT: Tensor
    segments_BT: Tensor
    shares_BT: Tensor
    weights_BT: Tensor
    advantages_BT: Tensor
    sampler_BT: Tensor  # the sampler's logprobs
    replayed_BTLk: Tensor | None = None  # the sampler's experts, numbered from 1; 0 where it told of none
    trainer_BT: Tensor | None = None  # the policy's before its update, where several updates are made of these rows
    prefixes_BT: Tensor | None = None

    @property
    def mask_BT(self) -> Tensor:
        """1 on sampled tokens, else 0."""
        return (self.shares_BT > 0).float()

    def documents(self) -> dict[str, Any]:
        """What a pass of any network takes."""
        given = {"tokens_BT": self.tokens_BT, "segments_BT": self.segments_BT, "prefixes_BT": self.prefixes_BT}
        return {**given, "logits": False}

    def inputs(self) -> dict[str, Any]:
        """What the policy's own passes take."""
        return {**self.documents(), "replayed_BTLk": self.replayed_BTLk}

    def sizes(self) -> DocumentSizes:
        """A prefix and the first segment that goes on from it are one document; the others go on from within that."""
        lengths, before = found = DocumentSizes([], [])
        prefixes_BT = torch.zeros_like(self.segments_BT) if self.prefixes_BT is None else self.prefixes_BT
        for pair_2T in torch.stack((self.segments_BT, prefixes_BT), 1).cpu():
            pair_2S, count_S = pair_2T[:, pair_2T[0] > 0].unique_consecutive(dim=1, return_counts=True)
            whole: dict[int, int] = {}  # of a prefix that no segment has gone on from, where it stands in `lengths`
            sizes = dict(zip(pair_2S[0].tolist(), count_S.tolist(), strict=True))
            for (segment, size), prefix in zip(sizes.items(), pair_2S[1].tolist(), strict=True):
                if prefix in whole:
                    lengths[whole.pop(prefix)] += size
                    continue
                whole[segment] = len(lengths)
                lengths.append(size)
                before.append(sizes[prefix] if prefix else 0)
        return found

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def __getitem__(self, part: slice) -> PolicyRows:
        return self._each(lambda field_BT: field_BT[part])

    def to(self, device: torch.device) -> PolicyRows:
        return self._each(lambda field_BT: field_BT.to(device))

    def or_empty(self) -> PolicyRows:
        """At least one row: a rank that has none left still takes part in the collective operations."""
        return self if len(self) else self._each(lambda field_BT: field_BT.new_zeros(1, *field_BT.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> PolicyRows:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return PolicyRows(**{name: change(each) for name, each in given.items() if each is not None})


def policy_step(
    model: Transformer,
    reference: Transformer | None,
    batch: PolicyRows,
    n_rows: int,
    config: PolicyLoss,
    temperature: float,
    micro_batch_size: int,
    parallel: Parallel,
) -> tuple[dict[str, float], list[Tensor]]:
    """Forward and backward over this rank's rows; gradients are of the mean that `config.aggregation` says,
    over the global batch.

    `n_rows`: the largest rank's number of rows; every rank takes as many micro-batches. `temperature`: the sampler's.
    Returns sums over this rank's tokens, and the load of each MoE layer.
    """
    with_mtp = trains_mtp(model, config)
    far_BT = targets_ahead(batch.tokens_BT, batch.segments_BT, batch.mask_BT, ahead=2)[1]
    values = {"tokens": float(batch.mask_BT.sum()), "units": float(batch.shares_BT.sum()), "far": float(far_BT.sum())}
    counts = parallel.sums(values)
    values |= dict.fromkeys((*LOGGED_PER_TOKEN, "loss", "mtp_loss"), 0.0)
    load_LE: list[Tensor] = []
    for start in range(0, n_rows, micro_batch_size):
        micro = batch[start : start + micro_batch_size].or_empty()
        chosen = _Chosen(micro)
        reference_N = None
        if reference is not None:
            with torch.no_grad():
                hidden_BTD = reference(**micro.documents()).hidden_BTD
                reference_N, _ = chosen.logprobs(reference, hidden_BTD, temperature)
        output = model(**micro.inputs(), mtp=with_mtp, detach_mtp=True)
        logprobs_N, entropy_N = chosen.logprobs(model, output.hidden_BTD, temperature)
        losses_N, kl_N, clipped_N = _policy_losses(chosen, logprobs_N, reference_N, config)
        policy_loss = (losses_N * chosen.of(micro.weights_BT)).sum()
        loss = policy_loss / max(counts["units"], 1e-9)
        if output.mtp_hidden_BTD is not None:
            rows = micro.tokens_BT, micro.segments_BT, micro.mask_BT
            mtp_loss = target_loss(model, output.mtp_hidden_BTD, *targets_ahead(*rows, ahead=2), detach_head=True)
            loss = loss + config.mtp * mtp_loss / max(counts["far"], 1.0)
            values["mtp_loss"] += float(mtp_loss.detach())
        (loss * parallel.dp_size).backward()  # FSDP averages over the ranks; the loss is a share of the global mean
        load_LE = add_loads(load_LE, output.load_LE)
        values["loss"] += float(policy_loss.detach())
        gap_N = (logprobs_N.detach() - chosen.of(micro.sampler_BT)).abs()
        for name, value_N in zip(LOGGED_PER_TOKEN, (kl_N, clipped_N, entropy_N, gap_N), strict=True):
            values[name] += float(value_N.detach().sum())
    return values, load_LE


@torch.no_grad()
def trainer_logprobs(
    model: Transformer, batch: PolicyRows, n_rows: int, temperature: float, micro_batch_size: int
) -> Tensor:
    """The policy's own logprobs of this rank's sampled tokens, each in its token's place [B, T], 0 elsewhere."""
    found = []
    for start in range(0, n_rows, micro_batch_size):
        micro = batch[start : start + micro_batch_size].or_empty()
        chosen = _Chosen(micro)
        logprobs_N, _ = chosen.logprobs(model, model(**micro.inputs()).hidden_BTD, temperature)
        logprobs_BT = logprobs_N.new_zeros(micro.tokens_BT.shape)
        logprobs_BT.view(-1)[chosen.places_N + 1] = logprobs_N
        found.append(logprobs_BT)
    return torch.cat(found)[: len(batch)]


def _policy_losses(
    chosen: _Chosen, logprobs_N: Tensor, reference_N: Tensor | None, config: PolicyLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL, and whether clip or mask holds it, of each token.

    Ratios are to the sampler, or, with importance weights, to the trainer.
    """
    rows = chosen.rows
    sampler_N, advantages_N = chosen.of(rows.sampler_BT), chosen.of(rows.advantages_BT)
    old_N = sampler_N
    if config.importance != "none":
        old_N = logprobs_N.detach() if rows.trainer_BT is None else chosen.of(rows.trainer_BT)
    given_N = logprobs_N, old_N, advantages_N, chosen.sequences_N
    losses_N, clipped_N = POLICY_LOSSES[config.name].losses(*given_N, config.clip_low, config.clip_high)
    if config.importance != "none":
        losses_N = losses_N * importance_weights(old_N, sampler_N, config.importance_cap, config.importance == "masked")
    if config.off_policy_delta is not None:  # of the loss alone: the distance to the reference stays
        held_N = off_policy(logprobs_N, sampler_N, advantages_N, chosen.sequences_N, config.off_policy_delta)
        losses_N, clipped_N = losses_N * (1 - held_N), torch.maximum(clipped_N, held_N)
    if reference_N is None:
        return losses_N, torch.zeros_like(losses_N), clipped_N
    kl_N = k3(logprobs_N, reference_N)
    if config.kl_unbiased:  # arXiv 2512.02556, 3.1
        kl_N = kl_N * ratios(logprobs_N, old_N)
    return losses_N + config.kl * kl_N, kl_N, clipped_N


class _Chosen:
    """The places of rows from which sampled tokens are predicted, and what stands in these tokens' places."""

    def __init__(self, rows: PolicyRows) -> None:
        self.rows = rows
        targets_BT, weights_BT = targets_ahead(rows.tokens_BT, rows.segments_BT, rows.mask_BT)
        self.places_N = weights_BT.flatten().nonzero().squeeze(1)
        self.targets_N = targets_BT.flatten()[self.places_N]

    def of(self, field_BT: Tensor) -> Tensor:
        """A field's numbers of the tokens predicted [N]: none is the first of its row."""
        return field_BT.flatten()[self.places_N + 1]

    @property
    def sequences_N(self) -> Tensor:
        """A number for the trajectory of each token."""
        segments_BT = self.rows.segments_BT
        first_B1 = torch.arange(len(segments_BT), device=segments_BT.device)[:, None] * (segments_BT.max() + 1)
        return self.of(segments_BT + first_B1)

    def logprobs(self, model: Transformer, hidden_BTD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprobs of the tokens and entropies [N], of logits in float32 in any training (arXiv 2510.13786, 3.2)."""
        rows_P = in_whole_blocks(self.places_N)
        hidden_PD = hidden_BTD.flatten(0, 1).index_select(0, rows_P)
        targets_P = F.pad(self.targets_N, (0, len(rows_P) - len(self.places_N)))
        logprobs_P, entropy_P = head_logprobs(model, hidden_PD, targets_P, temperature, wide=True)
        return logprobs_P[: len(self.places_N)], entropy_P[: len(self.places_N)]
