"""Policy losses and their gradients against TRL's GRPOTrainer, on responses of several lengths to several prompts.

TRL's loss is computed by its own method on an object that answers what it asks for; logprobs are given, no model runs.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slingshot.training.objectives import POLICY_LOSSES, Aggregation, importance_weights, k3, token_shares

SIZES, PROMPTS, ROOM = [3, 7, 5, 1], ["a", "a", "b", "b"], 9  # tokens of each response, its prompt, and at most
MASK_BT = (torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]).float()
ADVANTAGES_B = torch.tensor([1.0, -1.0, 0.5, -0.5])
# ours -> theirs, where both have the same formula: their cispo is a mean over tokens, their gspo a level of grpo
SAME: dict[str, tuple[Aggregation, dict[str, Any]]] = {
    "grpo": ("response", {"loss_type": "grpo"}),
    "dr_grpo": ("constant", {"loss_type": "dr_grpo"}),
    "dapo": ("token", {"loss_type": "dapo"}),
    "gspo": ("response", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "cispo": ("token", {"loss_type": "cispo"}),
}


def logprobs_BT(seed: int) -> Tensor:
    return -torch.rand(MASK_BT.shape, generator=torch.Generator().manual_seed(seed)) * 1.5 * MASK_BT


NOW, OLD, SAMPLER, REFERENCE = (logprobs_BT(seed) for seed in range(4))


def theirs(name: str, low: float, high: float, beta: float, unbiased: bool, importance: bool) -> tuple[Tensor, Tensor]:
    from trl import GRPOTrainer  # here, because it takes seconds

    logprobs = NOW.clone().requires_grad_()
    alone = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=alone, beta=beta, epsilon_low=low, epsilon_high=high,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=importance,
        vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False, max_completion_length=ROOM,
        current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=unbiased, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        **{"importance_sampling_level": "token", **SAME[name][1]},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.ones(4, 1, dtype=torch.long), "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": MASK_BT.long(), "completion_mask": MASK_BT.long(), "advantages": ADVANTAGES_B,
        "old_per_token_logps": OLD, "ref_per_token_logps": REFERENCE, "num_items_in_batch": MASK_BT.sum(),
        "importance_sampling_ratio": (OLD - SAMPLER).exp().clamp(max=2.0),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def ours(name: str, low: float, high: float, beta: float, unbiased: bool, importance: bool) -> tuple[Tensor, Tensor]:
    logprobs = NOW.clone().requires_grad_()
    chosen = MASK_BT.bool()
    now_N, old_N, sampler_N, reference_N = (each[chosen] for each in (logprobs, OLD, SAMPLER, REFERENCE))
    sequences_N = torch.arange(4)[:, None].expand(MASK_BT.shape)[chosen]
    kind = POLICY_LOSSES[name]  # type: ignore[index]
    losses_N, _ = kind.losses(now_N, old_N, ADVANTAGES_B[sequences_N], sequences_N, low, high)
    if importance:
        losses_N = losses_N * importance_weights(old_N, sampler_N, 2.0, masked=False)
    if beta:
        kl_N = k3(now_N, reference_N)
        losses_N = losses_N + beta * (kl_N * (now_N - old_N).exp() if unbiased else kl_N)
    shares_N = torch.tensor(token_shares(SIZES, PROMPTS, SAME[name][0]))[sequences_N]
    weights_N = torch.full_like(shares_N, 1 / ROOM) if SAME[name][0] == "constant" else shares_N
    loss = (losses_N * weights_N).sum() / shares_N.sum()
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


# TRL multiplies KL by a response's ratio under gspo; DeepSeek-V3.2, and we, by a token's.
CASES = [
    (name, *penalty, importance)
    for name in SAME
    for penalty in ((0.0, False), (0.3, False), (0.3, True))
    for importance in (False, True)
    if (name, penalty[1]) != ("gspo", True)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "beta", "unbiased", "importance"), CASES)
def test_loss_and_gradient_are_trls(name: str, beta: float, unbiased: bool, importance: bool) -> None:
    """Clips hold some tokens of either sign; TRL's bound of CISPO is the whole weight, 1 + ours."""
    low, high = (1.0, 0.5) if name == "cispo" else (0.2, 0.28)
    expected = theirs(name, low, 1 + high if name == "cispo" else high, beta, unbiased, importance)
    for mine, its in zip(ours(name, low, high, beta, unbiased, importance), expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5)
