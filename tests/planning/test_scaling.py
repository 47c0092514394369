"""The dense equivalent against the numbers printed in the paper it implements (arXiv 2502.05172)."""

from __future__ import annotations

import pytest

from slingshot.cost.flops import parameters
from slingshot.model.config import ModelConfig
from slingshot.planning.scaling import dense_equivalent, predicted_loss, terms


@pytest.mark.parametrize(
    ("experts", "m", "mu", "n", "nu"),
    [
        (1, 30.3640, -0.1817, 53.9838, -0.1965), (2, 27.7982, -0.1780, 66.8401, -0.2065),
        (4, 24.8462, -0.1731, 87.7022, -0.2192), (8, 21.8330, -0.1676, 119.9126, -0.2338),
        (16, 19.0159, -0.1617, 167.5073, -0.2494), (32, 16.5424, -0.1557, 234.6726, -0.2652),
    ],
)  # fmt: skip
def test_table_4_reduced_to_one_number_of_experts(experts: float, m: float, mu: float, n: float, nu: float) -> None:
    """L = m N^mu + n D^nu + c; the table is printed with coefficients of more digits than Table 3."""
    found = terms(experts)
    assert found[:2] == (pytest.approx(m, rel=0.003), pytest.approx(mu, abs=2e-4))
    for tokens in (1e9, 1e11):
        assert found[2] * tokens ** found[3] == pytest.approx(n * tokens**nu, rel=0.008)


@pytest.mark.parametrize(
    ("flops", "experts", "active", "tokens"),
    [(1e20, 1, 1.7e9, 9.7e9), (1e20, 32, 669e6, 24.9e9), (1e21, 8, 3.8e9, 44.3e9), (1e22, 1, 18.8e9, 88.6e9)],
)
def test_table_1_compute_optimal_sizes(flops: float, experts: float, active: float, tokens: float) -> None:
    """The size that minimises the predicted loss at 6 N D = flops."""
    grid = [10 ** (8 + step / 500) for step in range(1500)]
    best = min(grid, key=lambda size: predicted_loss(size, flops / 6 / size, experts))
    assert best == pytest.approx(active, rel=0.06) and flops / 6 / best == pytest.approx(tokens, rel=0.06)


def test_the_dense_equivalent_has_the_same_predicted_loss() -> None:
    config = ModelConfig.preset("deepseek-v3")
    dense = dense_equivalent(config, 14.8e12)
    assert dense is not None and 2 < dense.ratio == dense.parameters / parameters(config).active < 3
    assert predicted_loss(dense.parameters, 14.8e12, 1) == pytest.approx(dense.loss, rel=1e-12)
    assert dense.loss == predicted_loss(parameters(config).active, 14.8e12, (256 + 1) / (8 + 1))
    # Both its size and its tokens are beyond what the law was fitted on, and it says so; its sparsity is not.
    assert len(dense.outside) == 2 and "fitted from 7.9e+07 to 2.7e+09" in dense.outside[0]
    assert dense_equivalent(ModelConfig.preset("llama-3.1-8b"), 1e12) is None
