"""Objectives against values computed by hand."""

import math

import pytest
import torch

from slingshot.training.objectives import cross_entropy, group_advantages, grpo, targets_ahead, token_logprobs


def row(*values):
    return torch.tensor(values)


def test_cross_entropy_is_a_weighted_sum_in_nats():
    """Logits (ln 3, 0) give probabilities (3/4, 1/4)."""
    logits = row(math.log(3), 0.0).expand(2, 2)
    targets = torch.tensor([0, 1])
    assert float(cross_entropy(logits, targets)) == pytest.approx(math.log(4 / 3) + math.log(4))
    weighted = 2 * math.log(4 / 3) + 0.5 * math.log(4)
    assert float(cross_entropy(logits, targets, row(2.0, 0.5))) == pytest.approx(weighted)
    # its gradient: weight (probability - target)
    logits = row(math.log(3), 0.0)[None].requires_grad_()
    cross_entropy(logits, torch.tensor([1]), row(2.0)).backward()
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


def test_grpo_clips_each_sign_of_advantage_on_its_own_side():
    """A = 1, -1, clips 0.2, 0.3: -min(1.5, 1.3), -min(0.5, 0.8), -min(-1.5, -1.3), -min(-0.5, -0.8)."""
    logprobs = row(1.5, 0.5, 1.5, 0.5).log().requires_grad_()
    advantages = row(1.0, 1.0, -1.0, -1.0)
    terms = grpo(logprobs, torch.zeros(4), advantages, torch.ones(4), clip_low=0.2, clip_high=0.3)
    assert terms.loss.item() == pytest.approx(-1.3 - 0.5 + 1.5 + 0.8)
    assert float(terms.clipped) == 2.0
    terms.loss.backward()
    # clipped tokens give no gradient; the others -A ratio
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0])


def test_grpo_of_the_sampling_policy_is_the_plain_policy_gradient():
    """Ratio 1: the loss is -A, its gradient -A weight; with no advantage and no reference nothing moves."""
    logprobs = row(-1.0, -2.0, -3.0).requires_grad_()
    terms = grpo(logprobs, logprobs.detach(), row(2.0, -1.0, 0.0), row(1.0, 0.5, 1.0))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(-2.0 + 0.5) and float(terms.clipped) == 0.0 and float(terms.kl) == 0.0
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-2.0, 0.5, 0.0])


def test_k3_penalty_by_hand():
    """ln 2 above, below the reference: exp(-ln 2) + ln 2 - 1, exp(ln 2) - ln 2 - 1; d/dlogp = 1 - exp(ref - log p)."""
    logprobs = row(math.log(2), -math.log(2), 0.0).requires_grad_()
    weights = row(1.0, 3.0, 1.0)
    terms = grpo(logprobs, logprobs.detach(), torch.zeros(3), weights, torch.zeros(3), kl_weight=0.1)
    kl = (0.5 + math.log(2) - 1) + 3 * (2 - math.log(2) - 1)
    assert float(terms.kl) == pytest.approx(kl) and not terms.kl.requires_grad
    assert terms.loss.item() == pytest.approx(0.1 * kl)
    terms.loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.05, -0.3, 0.0])


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Its mean over samples of p is KL(p || reference)."""
    p, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    terms = grpo(p.log(), p.log(), torch.zeros(3), p, reference_logprobs_N=reference.log())
    assert float(terms.kl) == pytest.approx(float((p * (p / reference).log()).sum()))
