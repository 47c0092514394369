"""Objectives: pure functions of tensors, each with its source. No module, no config.

Every loss is a weighted SUM over tokens; the loop divides by counts taken over the whole global batch, so that losses
do not depend on how a batch is split into micro-batches or over ranks.

Shape suffixes: N tokens, V vocabulary, G samples of one group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slingshot.kernels.logprobs import token_logprobs


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Sum of -log p(target), in nats, each token times its weight."""
    losses_N = -token_logprobs(logits_NV, targets_N)[0]
    return losses_N.sum() if weights_N is None else (losses_N * weights_N).sum()


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


class GRPOTerms(NamedTuple):
    """Sums over tokens: the loss, and what is logged of it (no gradient)."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def grpo(
    logprobs_N: Tensor,
    sampler_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    reference_logprobs_N: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
) -> GRPOTerms:
    """The clipped policy objective with k3 KL penalty (arXiv 2402.03300, equations 3 and 4), as a sum to be minimised.

    Per token -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_weight (exp(d) - d - 1), d = ref - log p.
    Unequal clips are DAPO's clip-higher (2503.14476). weights_N carries the mask and the length normalisation.
    """
    ratio_N = (logprobs_N - sampler_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    free_N, held_N = ratio_N * advantages_N, clipped_N * advantages_N
    kl_N = torch.zeros_like(logprobs_N)
    if reference_logprobs_N is not None:
        difference_N = reference_logprobs_N - logprobs_N
        kl_N = difference_N.exp() - difference_N - 1
    loss = ((kl_weight * kl_N - torch.minimum(free_N, held_N)) * weights_N).sum()
    return GRPOTerms(loss, (kl_N.detach() * weights_N).sum(), ((held_N < free_N) * weights_N).sum())
