"""cost/layout.py: layouts use exactly all devices, what does not divide is refused with the nearest way that does, traffic by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.config import ModelConfig
from slingshot.cost.devices import device
from slingshot.cost.layout import LINK_EFFICIENCY, Layout, layouts, network_seconds, transfers
from slingshot.cost.memory import PRECISIONS, sizes
from slingshot.files import SlingshotError

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
    ("ways", "says"),
    [
        ({"tp": 3}, "tp 3 does not divide 2048 devices and 128 attention heads; the nearest valid value is 2"),
        ({"pp": 15}, "pp 15 does not divide 2048 devices, with at most a stage for each of the blocks; the nearest valid value is 16"),
        ({"pp": 2048}, "the nearest valid value is 32"),
        ({"tp": 8, "ep": 100}, "ep 100 does not divide 2048 devices a pipeline stage and 256 experts; the nearest valid value is 128"),
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


def sent(config: ModelConfig, layout: Layout, tokens: float, context: int, dtype: str = "bfloat16", on: str = "h800") -> dict[str, tuple[float, str]]:
    found = transfers(sizes(config, PRECISIONS[dtype]), layout, device(on), tokens, context)
    return {transfer.purpose: (transfer.n_bytes, transfer.link) for transfer in found}


def test_data_parallel_traffic_by_hand() -> None:
    """Ring all-reduce of gradients as reduce-scatter and all-gather of weights: 7/8 of 2 + 2 bytes a parameter, within the node."""
    total = 8_030_261_248
    layout = Layout.over(8, LLAMA)
    assert sent(LLAMA, layout, 8 * 4096, 4096) == {"gradients and weights": (7 / 8 * 4 * total, "node")}
    # Twice the devices do not fit on a node; stage 3 gathers weights twice and scatters gradients for each of 4 microbatches.
    wide = Layout.over(16, LLAMA, zero=3)
    assert sent(LLAMA, wide, 64 * 4096, 4096) == {"gradients and weights": (15 / 16 * total * (2 * 4 + 2 * 8), "network")}
    # Stage 2 scatters gradients for each microbatch and gathers weights once.
    assert sent(LLAMA, wide.model_copy(update={"zero": 2}), 64 * 4096, 4096)["gradients and weights"][0] == 15 / 16 * total * (2 * 4 + 2)


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
    """EP64 over 8 nodes: a token goes to at most 4 nodes, 7/8 of them others, in FP8 (with a scale per 128) and back in bfloat16, twice."""
    layout = Layout.over(2048, V3, pp=16, ep=64)
    tokens = 15360 * 4096 / 128
    found = sent(V3, layout, 15360 * 4096, 4096, "fp8")
    there_and_back = 1 + 4 / 128 + 2
    assert found["experts, between nodes"] == (pytest.approx(2 * 4 * tokens * 7168 * there_and_back * 4 * 7 / 8), "network")
    assert found["experts, within a node"] == (pytest.approx(2 * 4 * tokens * 7168 * there_and_back * 8 * 7 / 8), "node")


def test_without_groups_a_token_s_experts_spread_over_more_nodes() -> None:
    free = V3.model_copy(update={"n_group": 1, "topk_group": 1})
    layout = Layout.over(2048, V3, pp=16, ep=64)
    grouped, spread = (sent(config, layout, 15360 * 4096, 4096)["experts, between nodes"][0] for config in (V3, free))
    assert spread / grouped == pytest.approx(8 * (1 - (7 / 8) ** 8) / 4)


def test_links_work_at_the_same_time_at_their_efficiency() -> None:
    layout = Layout.over(2048, V3, pp=16, ep=64)
    found = transfers(sizes(V3, PRECISIONS["fp8"]), layout, device("h800"), 15360 * 4096, 4096)
    by_link = {link: sum(transfer.n_bytes for transfer in found if transfer.link == link) for link in ("node", "network")}
    assert network_seconds(found) == pytest.approx(max(by_link["node"] / 200e9, by_link["network"] / 50e9) / LINK_EFFICIENCY)
