"""Rotary embeddings: hand-computed angles, and what they are for: scores depend on distances only."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from slingshot.model.config import ModelConfig
from slingshot.model.rope import frequencies, rotary, rotate, rotation_scale, softmax_scale, yarn_mscale

Config = Callable[..., ModelConfig]

V3 = {
    "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100}


def test_plain_frequencies_and_angles_by_hand(dense: Config, deepseek: Config) -> None:
    config = dense(head_dim=4, rope_theta=100.0)
    assert frequencies(config).tolist() == pytest.approx([1.0, 0.1])  # 100^0, 100^(-2/4)
    cos, sin = rotary(config, torch.tensor([[0, 3]]))
    assert cos[0].tolist() == [[1.0, 1.0], pytest.approx([math.cos(3), math.cos(0.3)])]
    assert sin[0, 1].tolist() == pytest.approx([math.sin(3), math.sin(0.3)])
    assert frequencies(deepseek(qk_rope_head_dim=6)).shape == (3,)  # of the rope part only


def test_a_quarter_turn_by_hand() -> None:
    """(x, y) -> (-y, x); pairs are neighbours for DeepSeek, halves apart for Llama; both come out as halves."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert rotate(x, cos, sin, interleaved=True).flatten().tolist() == [-2.0, -4.0, 1.0, 3.0]
    assert rotate(x, cos, sin, interleaved=False).flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_only(dense: Config, interleaved: bool) -> None:
    config = dense(head_dim=8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(query_at: int, key_at: int) -> float:
        at = ((q, query_at), (k, key_at))
        one, other = (rotate(x, *rotary(config, torch.tensor([[place]])), interleaved) for x, place in at)
        return float((one * other).sum())

    assert score(7, 4) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(7, 4) != pytest.approx(score(7, 5), abs=1e-3)


def test_llama3_keeps_fast_pairs_and_slows_slow_ones(dense: Config) -> None:
    """Wavelengths under original / high_freq stay, over original / low_freq are slowed, smooth in between (3.1)."""
    llama3 = {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = frequencies(dense(head_dim=6, rope_theta=1000.0, rope_scaling=llama3))
    # wavelengths 6.28, 62.8 and 628; smooth of the middle one: (100 / 62.83 - 1) / (4 - 1) = 0.19718
    assert scaled.tolist() == pytest.approx([1.0, (0.80282 / 8 + 0.19718) * 0.1, 0.01 / 8], rel=1e-4)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(deepseek: Config) -> None:
    """Those that turn over 32 times within the original length stay, those under once are divided by the factor."""
    config = deepseek(qk_rope_head_dim=64, rope_scaling=V3)
    ratio = frequencies(config) / frequencies(deepseek(qk_rope_head_dim=64))
    # 64 ln(4096 / (2 pi r)) / (2 ln 10000) is 10.47 for r = 32, 22.51 for r = 1 (arXiv 2309.00071, 3.2): kept up to 10
    assert ratio[:11].tolist() == pytest.approx([1.0] * 11)
    assert ratio[23:].tolist() == pytest.approx([1 / 40] * 9)
    assert ratio[12] == pytest.approx(1 - 2 / 13 * (1 - 1 / 40))


def test_yarn_temperature_as_deepseek_v3_sets_it(deepseek: Config) -> None:
    """0.1 ln 40 + 1 = 1.368888, squared in the softmax scale, cancelled in the rotation: as in DeepSeek's programs."""
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.368888, abs=1e-6) and yarn_mscale(1.0, 1.0) == 1.0
    config = deepseek(rope_scaling=V3)
    assert softmax_scale(config) == pytest.approx(14**-0.5 * 1.368888**2, rel=1e-6)
    assert rotation_scale(config) == 1.0 and rotary(config, torch.zeros(1, 1))[0].max() == 1.0
    # the queries' and keys' widths of V3 itself: 192^-0.5 * 1.873854
    v3 = deepseek(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=V3)
    assert softmax_scale(v3) == pytest.approx(0.1352338, rel=1e-6)


@pytest.mark.parametrize(
    ("mscales", "softmax", "rotation"),
    [
        # modeling_deepseek.py: softmax scale a(mscale_all_dim)^2, rotation a(mscale) / a(mscale_all_dim), where
        # a(m) = 0.1 m ln 40 + 1; 0.1 ln 40 is 0.3688879
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.2608038**2, 1.0),  # V2
        ({"mscale": 0.5, "mscale_all_dim": 1.0}, 1.3688879**2, 1.1844440 / 1.3688879),
        ({"mscale": 0.5, "mscale_all_dim": 0.0}, 1.0, 1.1844440),  # transformers: 1.3688879
        ({"mscale": 0.0, "mscale_all_dim": 1.0}, 1.3688879**2, 1 / 1.3688879),  # transformers: 1.3688879
        ({}, 1.0, 1.3688879),
    ],
)
def test_yarn_temperatures_follow_deepseek_where_transformers_departs(
    deepseek: Config, mscales: dict[str, float], softmax: float, rotation: float
) -> None:
    silent = {key: value for key, value in V3.items() if not key.startswith("mscale")}
    config = deepseek(rope_scaling=silent | mscales)
    assert softmax_scale(config) == pytest.approx(14**-0.5 * softmax, rel=1e-6)
    assert rotation_scale(config) == pytest.approx(rotation, rel=1e-6)
    cos, sin = rotary(config, torch.tensor([[0, 5]]))
    assert cos[0, 0].tolist() == pytest.approx([rotation] * 3, rel=1e-6)
    assert (cos.square() + sin.square()).flatten().tolist() == pytest.approx([rotation**2] * 6, rel=1e-5)


@pytest.mark.parametrize(
    ("mscales", "rotation"),
    [({}, 1.1386294), ({"mscale": 0.5}, 1.1386294), ({"mscale": 0.5, "mscale_all_dim": 1.0}, 1.0693147 / 1.1386294)],
)
def test_yarn_of_the_dense_family_scales_the_rotation_only(
    dense: Config, mscales: dict[str, float], rotation: float
) -> None:
    """Qwen2.5's long context, factor 4: 0.1 ln 4 + 1 on cos and sin, unless both mscales are given (transformers)."""
    qwen = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = dense(head_dim=16, rope_scaling=qwen | mscales)
    assert softmax_scale(config) == 16**-0.5
    assert rotation_scale(config) == pytest.approx(rotation, rel=1e-6)


def test_without_yarn_nothing_is_scaled(dense: Config) -> None:
    assert rotation_scale(dense()) == rotation_scale(dense(rope_scaling=LLAMA3)) == 1.0
    assert softmax_scale(dense(head_dim=16, rope_scaling=LLAMA3)) == 16**-0.5
