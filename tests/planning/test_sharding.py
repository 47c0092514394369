"""cost/layout.py: layouts use exactly all devices, what does not divide is refused with the nearest way that does, traffic by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import device
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS, sizes
from slingshot.planning.sharding import (
    LINK_EFFICIENCY,
    RECOMPUTE,
    Layout,
    layouts,
    network_seconds,
    parts_met,
    transfers,
)

V3 = ModelConfig.preset("deepseek-v3")
LLAMA = ModelConfig.preset("llama-3.1-8b")


@given(st.sampled_from([V3, LLAMA]), st.integers(1, 4096))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_layouts_use_exactly_all_devices(config: ModelConfig, count: int) -> None:
    found = list(layouts(config, count))
    assert len(found) == len(set(map(str, found)))
    assert max(layout.tp for layout in found) == math.gcd(8, count, config.num_attention_heads)  # up to a whole node
    for layout in found:
        assert layout.dp * layout.tp * layout.pp == layout.devices == count
        assert config.num_attention_heads % layout.tp == 0 and layout.tp <= 8 and layout.pp <= config.num_hidden_layers
        assert layout.expert_dp * layout.ep == layout.dp * layout.tp
        assert layout.ep == 1 or config.n_routed_experts % layout.ep == 0
        assert Layout.over(count, config, layout.tp, layout.pp, layout.ep, layout.zero, layout.recompute) == layout


@pytest.mark.parametrize(
    "ways", [{"tp": 16}, {"zero": 0}, {"tp": 8, "zero": 0}, {"ep": 64, "recompute": "full"}, {"pp": 2048 // 128}]
)
def test_what_is_given_is_kept_and_all_else_stays_open(ways: dict[str, Any]) -> None:
    found = list(layouts(V3, 2048, **ways))
    assert all(getattr(layout, name) == value for layout in found for name, value in ways.items())
    free = {
        name for name in ("tp", "pp", "ep", "zero", "recompute") if len({getattr(layout, name) for layout in found}) > 1
    }
    assert free == {"tp", "pp", "ep", "zero", "recompute"} - ways.keys()


def test_a_given_stage_of_zero_is_kept_on_one_device() -> None:
    assert {layout.zero for layout in layouts(LLAMA, 1, zero=1)} == {1} and {
        layout.zero for layout in layouts(LLAMA, 1)
    } == {0}


def test_given_ways_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SlingshotError, match="tp 3 does not divide"):
        list(layouts(V3, 2048, tp=3))


@pytest.mark.parametrize(
    ("ways", "says"),
    [
        ({"tp": 3}, "tp 3 does not divide 2048 devices and 128 attention heads; the nearest valid value is 2"),
        (
            {"pp": 15},
            "pp 15 does not divide 2048 devices, with at most a stage for each of the blocks; the nearest valid value is 16",
        ),
        ({"pp": 2048}, "the nearest valid value is 32"),
        (
            {"tp": 8, "ep": 100},
            "ep 100 does not divide 2048 devices a pipeline stage and 256 experts; the nearest valid value is 128",
        ),
        ({"zero": 5}, "the nearest valid value is 3"),
        ({"recompute": "all"}, "there are none, selective, full"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest(ways: dict[str, object], says: str) -> None:
    with pytest.raises(SlingshotError) as caught:
        Layout.over(2048, V3, **ways)  # type: ignore[arg-type]
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_dense_model_has_no_expert_parallelism() -> None:
    with pytest.raises(SlingshotError, match="no experts; the nearest valid value is 1"):
        Layout.over(8, LLAMA, ep=2)


def sent(
    config: ModelConfig, layout: Layout, tokens: float, context: int, dtype: str = "bfloat16", on: str = "h800"
) -> dict[str, tuple[float, str]]:
    found = transfers(sizes(config, PRECISIONS[dtype]), layout, device(on), tokens, context)
    return {transfer.purpose: (transfer.n_bytes, transfer.link) for transfer in found}


def test_data_parallel_traffic_by_hand() -> None:
    """Ring all-reduce of gradients as reduce-scatter and all-gather of weights: 7/8 of 2 + 2 bytes a parameter, within the node."""
    total = 8_030_261_248
    layout = Layout.over(8, LLAMA)
    assert sent(LLAMA, layout, 8 * 4096, 4096) == {"gradients and weights": (7 / 8 * 4 * total, "node")}
    # Stage 3 gathers weights twice and scatters gradients for each of 4 microbatches.
    third = Layout.over(8, LLAMA, zero=3)
    assert sent(LLAMA, third, 32 * 4096, 4096) == {"gradients and weights": (7 / 8 * total * (2 * 4 + 2 * 8), "node")}
    # Stage 2 scatters gradients for each microbatch and gathers weights once.
    assert sent(LLAMA, third.model_copy(update={"zero": 2}), 32 * 4096, 4096)["gradients and weights"][
        0
    ] == 7 / 8 * total * (2 * 4 + 2)


def test_a_ring_over_several_nodes_leaves_each_once_over_all_its_members_cards() -> None:
    """16 devices are two nodes: of the ring's bytes an eighth goes over each one's own card, the rest to neighbours in the node."""
    volume = 15 / 16 * 4 * 8_030_261_248
    assert sent(LLAMA, Layout.over(16, LLAMA), 16 * 4096, 4096) == {
        "gradients and weights, between nodes": (volume / 8, "network"),
        "gradients and weights, within a node": (volume * 7 / 8, "node"),
    }
    # Of a tensor parallel group of 4 each of its 16 copies has two members on a node; of 8, one, whose whole ring goes over its card.
    quarter, eighth = (sent(LLAMA, Layout.over(64, LLAMA, tp=tp), 64 * 4096, 4096) for tp in (4, 8))
    own = sizes(LLAMA, PRECISIONS["bfloat16"]).stage_weights(Layout.over(64, LLAMA, tp=4))[1]
    assert quarter["gradients and weights, between nodes"] == (15 / 16 * 4 * own / 2, "network")
    assert eighth["gradients and weights, between nodes"][0] > 0.9 * quarter["gradients and weights, between nodes"][0]
    assert "gradients and weights, within a node" in quarter and "gradients and weights, within a node" not in eighth
    # Tensor parallelism over two nodes is such a ring, too.
    assert sent(LLAMA, Layout.over(16, LLAMA, tp=16), 4096, 4096)["tensor parallel, between nodes"][1] == "network"


def test_all_reduce_over_nodes_is_about_as_fast_as_measured() -> None:
    """Bus bandwidth of 248 nodes of 8 H200, 8 x 400 Gb/s each: about 350 GB/s (github.com/NVIDIA/nccl-tests, issue 283)."""
    found = transfers(
        sizes(LLAMA, PRECISIONS["bfloat16"]), Layout.over(1984, LLAMA, zero=0), device("h200"), 1984 * 4096, 4096
    )
    assert sum(transfer.n_bytes for transfer in found) / network_seconds(found) == pytest.approx(350e9, rel=0.1)


def test_gradients_are_all_reduced_in_their_own_precision_without_zero() -> None:
    """In FP8 float32 gradients: 4 bytes scattered and 4 gathered; with ZeRO 4 scattered and a byte of weight gathered."""
    zero, one = (
        sent(LLAMA, Layout.over(8, LLAMA, zero=stage), 8 * 4096, 4096, "fp8")["gradients and weights"][0]
        for stage in (0, 1)
    )
    total = 8_030_261_248
    assert zero == 7 / 8 * total * 8 and one == 7 / 8 * total * (4 + PRECISIONS["fp8"].weight)


def test_tensor_parallel_traffic_by_hand() -> None:
    """Two all-reduces of a block's activations forward, two backward: 4 x 2 x 3/4 of 4096 tokens x width x 2 bytes, for each of 32 blocks."""
    layout = Layout.over(4, LLAMA, tp=4, zero=0)
    assert sent(LLAMA, layout, 4096, 4096) == {"tensor parallel": (4 * 32 * 2 * 3 / 4 * 4096 * 4096 * 2, "node")}


def test_pipeline_traffic_by_hand() -> None:
    """Activations forward, their gradients backward, between neighbouring stages."""
    layout = Layout.over(4, LLAMA, pp=4, zero=0)
    assert sent(LLAMA, layout, 8 * 4096, 4096) == {"pipeline": (2 * 8 * 4096 * 4096 * 2, "node")}


def test_stages_of_a_pipeline_are_apart_where_each_fills_a_node() -> None:
    """Eight stages of eight devices: neighbours in the pipeline sit on different nodes, those in data parallelism on the same."""
    found = sent(LLAMA, Layout.over(64, LLAMA, pp=8), 64 * 4096, 4096)
    assert found["pipeline"][1] == "network" and found["gradients and weights"][1] == "node"


def test_expert_traffic_of_deepseek_v3_by_hand() -> None:
    """EP64 over 8 nodes: a token goes to 4 nodes, 7/8 of them others, in FP8 (with a scale per 128) and back in bfloat16, twice.

    There it is sent once to each device of its experts, of which it has one in each of 4 groups of 32 and 4 more among the 124 others.
    """
    layout = Layout.over(2048, V3, pp=16, ep=64)
    tokens = 15360 * 4096 / 128
    found = sent(V3, layout, 15360 * 4096, 4096, "fp8")
    there_and_back = 1 + 4 / 128 + 2
    assert found["experts, between nodes"] == (
        pytest.approx(2 * 4 * tokens * 7168 * there_and_back * 4 * 7 / 8),
        "network",
    )
    missed = 7 / 8 * (120 * 119 * 118 * 117) / (124 * 123 * 122 * 121)
    assert found["experts, within a node"] == (
        pytest.approx(2 * 4 * tokens * 7168 * there_and_back * 32 * (1 - missed) * 7 / 8),
        "node",
    )


@pytest.mark.parametrize(("ep", "copies"), [(2, 0.98), (4, 2.36), (8, 3.5)])
def test_a_neighbour_gets_a_token_once_however_many_of_its_experts_it_has(ep: int, copies: float) -> None:
    """Of V3's 8 experts in 4 of 8 groups: on one other device at most one copy, on three 3/4 of those met, on seven 7/8 of four."""
    layout = Layout.over(2048, V3, pp=16, ep=ep)
    n_bytes, link = sent(V3, layout, 15360 * 4096, 4096, "fp8")["experts, within a node"]
    assert link == "node" and n_bytes / (2 * 4 * 15360 * 4096 / 128 * 7168 * (1 + 4 / 128 + 2)) == pytest.approx(
        copies, rel=0.01
    )


def test_full_recomputation_sends_tokens_to_their_experts_once_more() -> None:
    """Only a block's input is kept, so its forward pass runs again: three passes of two."""
    for name, layout in (
        ("experts, between nodes", Layout.over(2048, V3, pp=16, ep=64)),
        ("tensor parallel", Layout.over(2048, V3, pp=16, tp=8)),
    ):
        none, selective, full = (
            sent(V3, layout.model_copy(update={"recompute": recompute}), 15360 * 4096, 4096)[name][0] for recompute in RECOMPUTE
        )  # fmt: skip
        assert none == selective and full == pytest.approx(1.5 * none)


@pytest.mark.parametrize(
    ("groups", "chosen", "experts", "per_token"), [(8, 4, 256, 8), (1, 1, 256, 8), (8, 3, 160, 6), (8, 8, 256, 8), (8, 6, 64, 4)]
)  # fmt: skip
def test_parts_met_agree_with_a_simulation_of_the_gate(groups: int, chosen: int, experts: int, per_token: int) -> None:
    """Groups by the sum of their two best scores, then the best experts of those chosen (DeepSeek-V3's gate), over 4,000 random tokens."""
    scores = np.random.default_rng(0).normal(size=(4000, groups, experts // groups))
    best_two = np.sort(scores, axis=-1)[..., -2:].sum(axis=-1)
    out = np.argsort(-best_two, axis=-1)[:, chosen:]
    scores[np.arange(4000)[:, None], out] = -np.inf
    picked = np.argsort(-scores.reshape(4000, experts), axis=-1)[:, :per_token]
    config = V3.model_copy(
        update={"n_group": groups, "topk_group": chosen, "n_routed_experts": experts, "num_experts_per_tok": per_token}
    )  # fmt: skip
    for parts in (1, 2, 4, 8, 16, 32):
        met = np.mean([len(set(token)) for token in picked // (experts // parts)])
        assert parts_met(config, parts) == pytest.approx(met, rel=0.015)


def test_links_work_at_the_same_time_at_their_efficiency() -> None:
    layout = Layout.over(2048, V3, pp=16, ep=64)
    found = transfers(sizes(V3, PRECISIONS["fp8"]), layout, device("h800"), 15360 * 4096, 4096)
    by_link = {
        link: sum(transfer.n_bytes for transfer in found if transfer.link == link) for link in ("node", "network")
    }
    assert network_seconds(found) == pytest.approx(
        max(by_link["node"] / 200e9, by_link["network"] / 50e9) / LINK_EFFICIENCY
    )
