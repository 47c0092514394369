"""Objectives against values computed by hand."""

import math

import pytest
import torch

from slingshot.kernels.logprobs import token_logprobs
from slingshot.training.objectives import (
    POLICY_LOSSES,
    cispo,
    group_advantages,
    grpo,
    gspo,
    importance_weights,
    k3,
    off_policy,
    targets_ahead,
    token_shares,
)


def row(*values):
    return torch.tensor(values)


def test_cross_entropy_is_in_nats():
    """Logits (ln 3, 0) give probabilities (3/4, 1/4); the gradient is probability - target."""
    logits = row(math.log(3), 0.0).expand(2, 2)
    losses = -token_logprobs(logits, torch.tensor([0, 1]))[0]
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(4)])
    logits = row(math.log(3), 0.0)[None].requires_grad_()
    (-2 * token_logprobs(logits, torch.tensor([1]))[0]).sum().backward()
    assert logits.grad is not None and logits.grad[0].tolist() == pytest.approx([1.5, -1.5])


TOKENS = torch.tensor([[11, 12, 13, 21, 22, 0], [31, 32, 33, 34, 35, 36]])
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
WEIGHTS = torch.tensor([[1.0, 1.0, 2.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0, 3.0]])


def kept(targets, weights):
    """(position, target, weight) of every position of each row that has a weight."""
    return [
        [(t, int(target), float(weight)) for t, (target, weight) in enumerate(zip(*pair, strict=True)) if weight]
        for pair in zip(targets, weights, strict=True)
    ]


def test_targets_ahead_stay_within_documents():
    """13 predicts not 21, 22 no padding, the last position nothing; a weight is that of the token predicted."""
    assert kept(*targets_ahead(TOKENS, SEGMENTS, WEIGHTS)) == [
        [(0, 12, 1.0), (1, 13, 2.0), (3, 22, 0.5)],
        [(1, 33, 1.0), (2, 34, 1.0), (3, 35, 1.0), (4, 36, 3.0)],
    ]
    assert kept(*targets_ahead(TOKENS, SEGMENTS, WEIGHTS, ahead=2)) == [
        [(0, 13, 2.0)],
        [(0, 33, 1.0), (1, 34, 1.0), (2, 35, 1.0), (3, 36, 3.0)],
    ]


def test_token_logprobs_and_entropy_at_a_temperature():
    """At temperature 2 logits (2 ln 3, 0) give (3/4, 1/4): entropy 3/4 ln(4/3) + 1/4 ln 4."""
    logits = row(2 * math.log(3), 0.0).expand(2, 2).clone().requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1]), temperature=2.0)
    assert logprobs.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)])
    assert entropy.tolist() == pytest.approx([0.75 * math.log(4 / 3) + 0.25 * math.log(4)] * 2)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_group_advantages_by_hand():
    """Rewards 1, 0, 0, 0: mean 1/4, population std sqrt(3)/4."""
    assert group_advantages(row(1.0, 0.0, 0.0, 0.0)).tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    plain = group_advantages(row(1.0, 0.0, 0.0, 0.0), normalize_std=False)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(row(1.2, 1.2, 1.2)).tolist() == [0.0, 0.0, 0.0]


RATIOS, ADVANTAGES = row(1.5, 0.5, 1.5, 0.5), row(1.0, 1.0, -1.0, -1.0)
ALONE = torch.arange(4)  # every token a sequence of its own


def gradient_of(loss, ratios, *given):
    """Of the sum of a loss by log p, where old p is 1; and what the loss gives."""
    logprobs = ratios.log().requires_grad_()
    terms = loss(logprobs, torch.zeros(len(ratios)), *given)
    (gradient,) = torch.autograd.grad(terms.loss_N.sum(), logprobs)
    return gradient.tolist(), terms


def test_grpo_clips_each_sign_of_advantage_on_its_own_side():
    """A = 1, -1, clips 0.2, 0.3: -min(1.5, 1.3), -min(0.5, 0.8), -min(-1.5, -1.3), -min(-0.5, -0.8)."""
    gradient, terms = gradient_of(grpo, RATIOS, ADVANTAGES, ALONE, 0.2, 0.3)
    assert terms.loss_N.tolist() == pytest.approx([-1.3, -0.5, 1.5, 0.8])
    assert terms.clipped_N.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert gradient == pytest.approx([0.0, -0.5, 1.5, 0.0])  # of what is not clipped -A ratio


def test_gspo_has_one_ratio_for_a_response():
    """Ratios 2 and 8 in one response, of mean log ln 4; 1/4 alone: clips .5 and 1 hold 4 of A = 1, not 1/4.

    Unclipped, each of n tokens has gradient -A s / n, summed over the n losses of the response -A s.
    """
    sequences, advantages = torch.tensor([0, 0, 1]), row(1.0, 1.0, 1.0)
    gradient, terms = gradient_of(gspo, row(2.0, 8.0, 0.25), advantages, sequences, 0.5, 1.0)
    assert terms.loss_N.tolist() == pytest.approx([-2.0, -2.0, -0.25])
    assert gradient == pytest.approx([0.0, 0.0, -0.25])
    gradient, terms = gradient_of(gspo, row(2.0, 8.0, 0.25), -advantages, sequences, 0.5, 1.0)
    assert terms.loss_N.tolist() == pytest.approx([4.0, 4.0, 0.5])
    assert gradient == pytest.approx([4.0, 4.0, 0.0]) and terms.clipped_N.tolist() == [0.0, 0.0, 1.0]
    assert gspo(row(), row(), row(), torch.zeros(0, dtype=torch.long), 0.5, 1.0).loss_N.tolist() == []


def test_a_token_a_response_makes_gspo_grpo():
    given = RATIOS, ADVANTAGES, ALONE, 0.2, 0.3
    assert gradient_of(gspo, *given)[0] == pytest.approx(gradient_of(grpo, *given)[0])


def test_cispo_clips_the_weight_and_keeps_every_gradient():
    """Weights min(6, 5), .5, min(1.5, 5) and min(9, 5), times -A: no lower bound, whatever the sign of A."""
    gradient, terms = gradient_of(cispo, row(6.0, 0.5, 1.5, 9.0), ADVANTAGES, ALONE, 1.0, 4.0)
    assert gradient == pytest.approx([-5.0, -0.5, 1.5, 5.0])
    assert terms.clipped_N.tolist() == [1.0, 0.0, 0.0, 1.0]
    logs = [-5.0 * math.log(6), -0.5 * math.log(0.5), 1.5 * math.log(1.5), 5.0 * math.log(9)]
    assert terms.loss_N.tolist() == pytest.approx(logs, rel=1e-5)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_of_the_sampling_policy_is_the_plain_policy_gradient(name):
    """Where nothing has moved the gradient is -A, clips or not (a loss of 0 then says nothing about learning)."""
    kind = POLICY_LOSSES[name]
    clips = kind.clip_low, kind.clip_high
    gradient, terms = gradient_of(kind.losses, torch.ones(4), row(2.0, -1.0, 0.0, 1.0), ALONE, *clips)
    assert gradient == pytest.approx([-2.0, 1.0, 0.0, -1.0]) and not terms.clipped_N.any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("far", [-200.0, 200.0])
def test_ratios_beyond_floats_leave_finite_gradients(name, far):
    """A token that is e^200 times as likely as before, or as unlikely: beside others, with an advantage or none."""
    kind = POLICY_LOSSES[name]
    logprobs = row(far, -1.0, far, far).requires_grad_()
    old = row(0.0, -1.0, 0.0, 0.0)
    loss, _ = kind.losses(logprobs, old, row(1.0, 1.0, -1.0, 0.0), ALONE, kind.clip_low, kind.clip_high)
    weighted = loss * importance_weights(old, old + far, 2.0, masked=True) + k3(logprobs, old)
    for each in (loss.sum(), weighted.sum()):
        (gradient,) = torch.autograd.grad(each, logprobs, retain_graph=True)
        assert each.isfinite() and gradient.isfinite().all()


def test_a_little_at_every_token_does_not_grow_with_the_length():
    """0.012 nats at each of 100 tokens are a ratio of 3.3 of the whole response: no weight, and no clip, takes that."""
    trainer, sampler = torch.full((100,), -1.0), torch.full((100,), -1.012)
    assert importance_weights(trainer, sampler, 2.0, masked=True).tolist() == pytest.approx([math.exp(0.012)] * 100)
    response = torch.zeros(100, dtype=torch.long)
    losses, clipped = gspo(trainer, sampler, torch.ones(100), response, 0.2, 0.2)
    assert losses.tolist() == pytest.approx([-math.exp(0.012)] * 100, rel=1e-5) and not clipped.any()


def test_k3_penalty_by_hand():
    """ln 2 above, below the reference: exp(-ln 2) + ln 2 - 1, exp(ln 2) - ln 2 - 1; d/dlogp = 1 - exp(ref - log p)."""
    logprobs = row(math.log(2), -math.log(2), 0.0).requires_grad_()
    kl = k3(logprobs, torch.zeros(3))
    assert kl.tolist() == pytest.approx([0.5 + math.log(2) - 1, 2 - math.log(2) - 1, 0.0])
    kl.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.5, -1.0, 0.0])


def test_importance_weights_are_truncated_or_masked():
    """Ratios 3, 2, 1, .5, .4 at a cap of 2; no gradient goes through them."""
    trainer = row(3.0, 1.99, 1.0, 0.51, 0.4).log().requires_grad_()
    truncated, masked = (importance_weights(trainer, torch.zeros(5), 2.0, masked) for masked in (False, True))
    assert truncated.tolist() == pytest.approx([2.0, 1.99, 1.0, 0.51, 0.4]) and not truncated.requires_grad
    assert masked.tolist() == pytest.approx([0.0, 1.99, 1.0, 0.51, 0.0])


def test_wrong_responses_that_the_policy_left_behind_are_masked_whole():
    """Sampler's logs over the policy's, by token: 0.2 and 1.0 (mean 0.6), the same of a right response, 0.3, -2."""
    gaps, advantages = row(0.2, 1.0, 0.2, 1.0, 0.3, -2.0), row(-1.0, -1.0, 1.0, 1.0, -1.0, -1.0)
    policy, sequences = torch.full((6,), -1.5), torch.tensor([0, 0, 1, 1, 2, 3])
    given = policy, policy + gaps, advantages, sequences
    assert off_policy(*given, 0.5).tolist() == [1, 1, 0, 0, 0, 0]
    assert off_policy(*given, 0.7).tolist() == [0, 0, 0, 0, 0, 0]
    assert off_policy(*given, 0.2).tolist() == [1, 1, 0, 0, 1, 0]
    assert off_policy(row(), row(), row(), torch.zeros(0, dtype=torch.long), 0.5).tolist() == []


def test_shares_by_hand():
    """Responses of 2 and 6 tokens to one prompt, of 4 to another."""
    sizes, prompts = [2, 6, 4], ["a", "a", "b"]
    assert token_shares(sizes, prompts, "token") == [1.0, 1.0, 1.0]
    assert token_shares(sizes, prompts, "response") == token_shares(sizes, prompts, "constant") == [1 / 2, 1 / 6, 1 / 4]
    assert token_shares(sizes, prompts, "prompt") == [1 / 8, 1 / 8, 1 / 4]
