"""Layouts use exactly all devices; what does not divide names the nearest that does; traffic is as worked out by
hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import device
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Layout, layouts
from slingshot.planning.memory import PRECISIONS, Blocks
from slingshot.planning.network import network_seconds, parts_met, transfers

V3 = ModelConfig.preset("deepseek-v3")
LLAMA = ModelConfig.preset("llama-3.1-8b")
TOTAL = 8_030_261_248  # parameters of LLAMA
STEP = 15360 * 4096  # tokens of V3's


@given(st.sampled_from([V3, LLAMA]), st.integers(1, 4096))
def test_layouts_use_exactly_all_devices(config: ModelConfig, count: int) -> None:
    found = layouts(config, count)
    assert len(found) == len(set(map(str, found)))
    assert max(layout.tp for layout in found) == math.gcd(8, count, config.num_attention_heads)  # up to a whole node
    for layout in found:
        assert layout.dp * layout.tp * layout.pp == layout.devices == count
        assert config.num_attention_heads % layout.tp == 0 and layout.pp <= config.num_hidden_layers
        assert layout.expert_dp * layout.ep == layout.dp * layout.tp
        assert layout.ep == 1 or config.n_routed_experts % layout.ep == 0


@pytest.mark.parametrize(
    ("config", "ways", "says"),
    [
        (V3, {"tp": 3}, "tp 3 does not divide 2048 devices and the model's attention heads; the nearest .* 2"),
        (V3, {"pp": 15}, "pp 15 does not divide .* is 16"), (V3, {"pp": 2048}, "the nearest valid value is 32"),
        (V3, {"tp": 8, "ep": 100}, "ep 100 does not divide .* is 128"), (LLAMA, {"ep": 2}, "the model's experts; .* 1"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_with_the_nearest(config: ModelConfig, ways: dict[str, Any], says: str) -> None:
    with pytest.raises(SlingshotError, match=says):
        layouts(config, 2048, **ways)


def sent(config: ModelConfig, layout: Layout, tokens: float, dtype: str = "bfloat16") -> dict[str, tuple[float, str]]:
    found = transfers(Blocks(config, PRECISIONS[dtype]), layout, device("h800"), tokens, 4096)
    return {transfer.purpose: (transfer.n_bytes, transfer.link) for transfer in found}


@pytest.mark.parametrize(("zero", "tokens", "moved"), [(1, 8, 2 + 2), (3, 32, 2 * 4 + 2 * 8), (2, 32, 2 * 4 + 2)])
def test_data_parallel_traffic_by_hand(zero: Any, tokens: int, moved: int) -> None:
    """Gradients scattered and weights gathered, 7/8 of them within the node; for each of 4 microbatches from stages 2,
    3."""
    found = sent(LLAMA, Layout(dp=8, zero=zero), tokens * 4096)
    assert found == {"gradients and weights": (7 / 8 * TOTAL * moved, "node")}


def test_all_reduce_over_nodes_is_about_as_fast_as_measured() -> None:
    """Bus bandwidth of 248 nodes of 8 H200, 8 x 400 Gb/s each: about 350 GB/s (github.com/NVIDIA/nccl-tests, issue
    283)."""
    blocks = Blocks(LLAMA, PRECISIONS["bfloat16"])
    found = transfers(blocks, Layout(dp=1984, zero=0), device("h200"), 1984 * 4096, 4096)
    assert sum(transfer.n_bytes for transfer in found) / network_seconds(found) == pytest.approx(350e9, rel=0.1)


def test_expert_traffic_of_deepseek_v3_by_hand() -> None:
    """EP64 over 8 nodes: a token goes to 4 nodes, 7/8 of them others, in FP8 (with a scale per 128) and back in
    bfloat16, twice. There it is sent once to each device of its experts: one in each of 4 groups of 32 and 4 more among
    124 others."""
    found = sent(V3, Layout(dp=128, pp=16, ep=64), STEP, "fp8")
    missed = 7 / 8 * (120 * 119 * 118 * 117) / (124 * 123 * 122 * 121)
    crossing = 2 * 4 * STEP / 128 * 7168 * (1 + 4 / 128 + 2)
    assert found["experts, between nodes"] == (pytest.approx(crossing * 4 * 7 / 8), "network")
    assert found["experts, within a node"] == (pytest.approx(crossing * 32 * (1 - missed) * 7 / 8), "node")


@pytest.mark.parametrize(("groups", "chosen", "experts", "per_token"), [(8, 4, 256, 8), (1, 1, 256, 8), (8, 6, 64, 4)])
def test_parts_met_agree_with_a_simulation_of_the_gate(groups: int, chosen: int, experts: int, per_token: int) -> None:
    """Groups by the sum of their two best scores, then the best experts of those chosen (DeepSeek-V3's gate)."""
    scores = np.random.default_rng(0).normal(size=(4000, groups, experts // groups))
    best_two = np.sort(scores, axis=-1)[..., -2:].sum(axis=-1)
    scores[np.arange(4000)[:, None], np.argsort(-best_two, axis=-1)[:, chosen:]] = -np.inf
    picked = np.argsort(-scores.reshape(4000, experts), axis=-1)[:, :per_token]
    gate = {"n_group": groups, "topk_group": chosen, "n_routed_experts": experts, "num_experts_per_tok": per_token}
    for parts in (1, 2, 4, 8, 16, 32):
        met = np.mean([len(set(token)) for token in picked // (experts // parts)])
        assert parts_met(V3.model_copy(update=gate), parts) == pytest.approx(met, rel=0.015)
