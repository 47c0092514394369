"""The dense model that would reach the same loss as a mixture of experts, by one published rule. No torch.

Joint MoE Scaling Laws (Ludziejewski et al. 2025, arXiv 2502.05172, equation 6 and Table 3): the loss of a model of N
active parameters trained on D tokens with E experts, one of them active, is

    L(N, D, E) = a x^delta N^(alpha + gamma ln x) + b x^omega D^(beta + zeta ln x) + c,
    1/x = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max

E = 1 is a dense model. Experts there are as wide as a dense block's and one is chosen; for finer experts of which
several are chosen, E is all experts over the active ones.
"""

from __future__ import annotations

import math

from slingshot.base.config import Strict
from slingshot.cost.flops import parameters
from slingshot.model.config import ModelConfig

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
E_START, E_MAX, C = 2.0732, 290.4521, 1.3637
# What the fit saw (Appendix E).
RANGES = {"active parameters": (79e6, 2.7e9), "tokens": (0.5e9, 80e9), "experts over active experts": (1.0, 32.0)}


class DenseEquivalent(Strict):
    """A dense model of the same predicted loss after the same tokens."""

    rule: str = "Joint MoE Scaling Laws, Ludziejewski et al. 2025, arXiv 2502.05172, equation 6"
    parameters: float
    ratio: float  # of these over the mixture's active ones, which is also that of the training compute
    loss: float
    outside: list[str]  # what of the mixture lies outside the range the rule was fitted on: an extrapolation then


def terms(experts: float) -> tuple[float, float, float, float]:
    """Scale and exponent of N, scale and exponent of D."""
    x = 1 / (1 / (experts - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)
    return A * x**DELTA, ALPHA + GAMMA * math.log(x), B * x**OMEGA, BETA + ZETA * math.log(x)


def predicted_loss(active: float, tokens: float, experts: float) -> float:
    """Loss in nats per token of the law's own data; only differences and equalities mean anything here."""
    m, mu, n, nu = terms(experts)
    return m * active**mu + n * tokens**nu + C


def dense_equivalent(config: ModelConfig, tokens: float) -> DenseEquivalent | None:
    """The dense model of equal loss after as many tokens; None for a dense model, or where no dense one gets there."""
    if not config.n_moe_layers:
        return None
    shared, active = config.n_shared_experts, parameters(config).active
    experts = (config.n_routed_experts + shared) / (config.num_experts_per_tok + shared)
    loss, (m, mu, n, nu) = predicted_loss(active, tokens, experts), terms(1)
    left = loss - C - n * tokens**nu
    if left <= 0:
        return None
    outside = [
        f"{name} {value:.3g} (fitted from {low:.3g} to {high:.3g})"
        for (name, (low, high)), value in zip(RANGES.items(), (active, tokens, experts), strict=True)
        if not low <= value <= high
    ]
    dense = (left / m) ** (1 / mu)
    return DenseEquivalent(parameters=dense, ratio=dense / active, loss=loss, outside=outside)
