"""Objectives: pure functions of tensors, each with its source. No module, no config.

Losses are of single tokens, or weighted SUMS over tokens; the loop divides by counts taken over the whole global batch,
so that gradients do not depend on how a batch is split into micro-batches or over ranks.

    loss_N, clipped_N = gspo(logprobs_N, old_N, advantages_N, sequences_N, 3e-4, 4e-4)
    POLICY_LOSSES["gspo"].clip_low                     # 3e-4: what its paper takes

Shape suffixes: N tokens, V vocabulary, G samples of one group, S sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_LOG_RATIO = 20.0  # nats; beyond it ratios are not told apart


def targets_ahead(tokens_BT: Tensor, segments_BT: Tensor, weights_BT: Tensor, ahead: int = 1) -> tuple[Tensor, Tensor]:
    """Targets and weights where position t predicts token t + `ahead` of the same segment: 1 the next, 2 for MTP.

    weights_BT[:, t] is the weight of token t as a target. MTP's module at t sees the embedding of t+1, which is of the
    segment too (arXiv 2412.19437, 2.2).
    """
    targets_BT, later_BT, weights = (each.roll(-ahead, dims=1) for each in (tokens_BT, segments_BT, weights_BT))
    same = (segments_BT == later_BT) & (segments_BT > 0)
    same[:, -ahead:] = False
    return targets_BT, weights * same


def group_advantages(rewards_G: Tensor, normalize_std: bool = True) -> Tensor:
    """GRPO's advantage (r - mean) / std within a group (arXiv 2402.03300, 4.1.2); Dr. GRPO (2503.20783) has no std.

    The std is the population's; a group of equal rewards carries no signal and gets zeros.
    """
    centred = rewards_G - rewards_G.mean()
    if not normalize_std:
        return centred
    std = rewards_G.std(correction=0)
    return torch.zeros_like(centred) if std < 1e-6 else centred / std


class TokenLosses(NamedTuple):
    """Of each token: its loss, and whether the clip holds it (its gradient; under CISPO its weight), as 0 or 1."""

    loss_N: Tensor
    clipped_N: Tensor


def grpo(
    logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, sequences_N: Tensor, low: float, high: float
) -> TokenLosses:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = p / old p of the token (arXiv 2402.03300, equation 3).

    Dr. GRPO (2503.20783, 3.2) and DAPO (2503.14476, equation 8) differ from it in clips and aggregation alone.
    """
    return _clipped(ratios(logprobs_N, old_N), advantages_N, low, high)


def gspo(
    logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, sequences_N: Tensor, low: float, high: float
) -> TokenLosses:
    """`grpo` with one ratio for all tokens of a response: exp(mean of log p - log old p) (arXiv 2507.18071, 4.1).

    `sequences_N` numbers the response that each token is of; all tokens of a response are here.
    """
    mean_S = _means(logprobs_N - old_N, sequences_N)
    return _clipped(ratios(mean_S, torch.zeros_like(mean_S))[sequences_N], advantages_N, low, high)


def _means(values_N: Tensor, sequences_N: Tensor) -> Tensor:
    """Of each sequence the mean over its tokens [S]."""
    size = int(sequences_N.max()) + 1 if len(sequences_N) else 0
    sums_S = values_N.new_zeros(size).index_add(0, sequences_N, values_N)
    return sums_S / sequences_N.bincount(minlength=size).clamp(min=1)


def cispo(
    logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, sequences_N: Tensor, low: float, high: float
) -> TokenLosses:
    """-clip(ratio, 1 - low, 1 + high) A log p: the weight is clipped and carries no gradient (arXiv 2506.13585, 3.1).

    So no token's gradient is lost. `low` 1 is no lower bound.
    """
    ratio_N = ratios(logprobs_N.detach(), old_N)
    weight_N = ratio_N.clamp(1 - low, 1 + high)
    return TokenLosses(-weight_N * advantages_N * logprobs_N, (weight_N != ratio_N).float())


def ratios(logprobs: Tensor, others: Tensor) -> Tensor:
    """p / other p, as far as float32 holds it: what overflows makes NaN of a gradient that a clip holds at 0."""
    return (logprobs - others).clamp(-_LOG_RATIO, _LOG_RATIO).exp()


def _clipped(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> TokenLosses:
    free_N, held_N = ratio_N * advantages_N, ratio_N.clamp(1 - low, 1 + high) * advantages_N
    return TokenLosses(-torch.minimum(free_N, held_N), (held_N < free_N).float())


def k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """exp(d) - d - 1, d = log reference - log p: the divergence from the reference (arXiv 2402.03300, equation 4)."""
    return ratios(reference_N, logprobs_N) - (reference_N - logprobs_N) - 1


def importance_weights(trainer_N: Tensor, sampler_N: Tensor, cap: float, masked: bool) -> Tensor:
    """What a token drawn from the sampler weighs for the trainer: min(p / sampler's p, cap), no gradient (TIS).

    `masked`: the ratio itself where it is within [1 / cap, cap], else 0. Source: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"; masks: arXiv 2510.18855 (IcePop).
    """
    ratio_N = ratios(trainer_N, sampler_N).detach()
    if masked:
        return torch.where((ratio_N >= 1 / cap) & (ratio_N <= cap), ratio_N, 0.0)
    return ratio_N.clamp(max=cap)


def off_policy(
    logprobs_N: Tensor, sampler_N: Tensor, advantages_N: Tensor, sequences_N: Tensor, delta: float
) -> Tensor:
    """1 on the tokens of responses to leave out of the loss, else 0: their advantage is negative, and the mean of
    log sampler's p - log p over their tokens is above `delta` (arXiv 2512.02556, 3.1, off-policy sequence masking).

    All tokens of a response are here. What the policy would hardly say any more teaches it nothing by being wrong.
    """
    strayed_S = _means(sampler_N - logprobs_N.detach(), sequences_N) > delta
    return (strayed_S[sequences_N] & (advantages_N < 0)).float()


AdvantageStd = Literal["group", "batch", "none"]  # by which advantages are divided
# What a batch's loss is the mean of: its tokens; its responses, each the mean of its tokens; its prompts, each the mean
# of its responses' tokens; its responses, each the sum of its tokens over a constant.
Aggregation = Literal["token", "response", "prompt", "constant"]


def token_shares(sizes: Sequence[int], prompts: Sequence[str], aggregation: Aggregation) -> list[float]:
    """For responses of so many tokens to these prompts, the share that each token has of what is averaged.

    Over a batch the shares add up to the number of tokens, prompts or responses (also under "constant").
    """
    if aggregation == "token":
        return [1.0] * len(sizes)
    totals = Counter[str]()
    for size, prompt in zip(sizes, prompts, strict=True):
        totals[prompt] += size
    return [1 / max(1, totals[prompts[i]] if aggregation == "prompt" else size) for i, size in enumerate(sizes)]


class PolicyLossKind(NamedTuple):
    """A loss as its paper has it."""

    losses: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], TokenLosses]
    clip_low: float
    clip_high: float
    aggregation: Aggregation
    advantage_std: AdvantageStd


PolicyLossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
POLICY_LOSSES: dict[PolicyLossName, PolicyLossKind] = {
    "grpo": PolicyLossKind(grpo, 0.2, 0.2, "response", "group"),  # arXiv 2402.03300, equation 3
    "dr_grpo": PolicyLossKind(grpo, 0.2, 0.2, "constant", "none"),  # arXiv 2503.20783, 3.2
    "dapo": PolicyLossKind(grpo, 0.2, 0.28, "token", "group"),  # arXiv 2503.14476, 3.1 and 3.3
    "gspo": PolicyLossKind(gspo, 3e-4, 4e-4, "response", "group"),  # arXiv 2507.18071, 5.1
    "cispo": PolicyLossKind(cispo, 1.0, 4.0, "prompt", "batch"),  # arXiv 2506.13585, 3.1, as 2510.13786 takes it
}
