"""cost/memory.py: weights against the parameter count, activations against what autograd keeps, splits that sum, DeepSeek-V3's own layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.cost.flops import parameters
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.planning.memory import PRECISIONS, block_activations, serving_weights, sizes, training_memory
from slingshot.planning.sharding import RECOMPUTE, Layout, layouts

MOE = ModelConfig(
    family="deepseek_v3", vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, q_lora_rank=48,
    kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, moe_intermediate_size=96, n_routed_experts=8, n_shared_experts=1,
    num_experts_per_tok=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip
DENSE = ModelConfig(
    family="dense", vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32,
)  # fmt: skip
CONFIGS = [
    MOE,
    MOE.model_copy(
        update={"q_lora_rank": None, "num_nextn_predict_layers": 0, "n_shared_experts": 0, "first_k_dense_replace": 0}
    ),
    MOE.model_copy(update={"first_k_dense_replace": 3, "num_hidden_layers": 7}),
    DENSE,
    DENSE.model_copy(update={"attention_bias": True, "tie_word_embeddings": True}),
    DENSE.model_copy(update={"qk_norm": True}),
]
FP32 = PRECISIONS["float32"]


@pytest.mark.parametrize("config", CONFIGS)
def test_one_device_that_serves_it_holds_all_of_the_main_model(config: ModelConfig) -> None:
    assert sum(serving_weights(config, 1)) == parameters(config).total


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_pipeline_stages_hold_every_block_once(config: ModelConfig, pp: int) -> None:
    weighed = sizes(config, FP32)
    stages = weighed.stages(pp)
    moe = max(0, config.num_hidden_layers - config.first_k_dense_replace) if config.family == "deepseek_v3" else 0
    assert [sum(column) for column in zip(*stages, strict=True)] == [
        config.num_hidden_layers - moe,
        moe,
        config.num_nextn_predict_layers,
    ]
    assert max(map(sum, stages)) - min(map(sum, stages)) <= 1
    held = [weighed.on_device(Layout(dp=1, tp=1, pp=pp, ep=1, zero=0, recompute="none"), stage) for stage in range(pp)]
    counts = parameters(config)
    needed_twice = counts.embedding if pp > 1 and (config.tie_word_embeddings or config.num_nextn_predict_layers) else 0
    assert sum(map(sum, held)) == counts.total + counts.mtp + needed_twice


def kept_by_autograd(config: ModelConfig, tokens: int) -> int:
    """Bytes of every tensor a forward pass of the real network saves for its backward pass, parameters left out."""
    torch.manual_seed(0)
    model = Transformer(config)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other can take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randint(0, config.vocab_size, (1, tokens)))
    return sum(storage.nbytes() for storage in kept.values())


def per_block_and_token(config: ModelConfig, tokens: int = 512) -> float:
    """Of the fused kernel, which attention takes beyond 256 tokens."""
    deeper = config.model_copy(update={"num_hidden_layers": config.num_hidden_layers + 1})
    return (kept_by_autograd(deeper, tokens) - kept_by_autograd(config, tokens)) / tokens


def test_dense_activations_are_autograd_s_but_for_what_fusion_saves() -> None:
    """On CPU autograd also keeps silu's output, K and V repeated to all heads, and one float32 a norm and head; nothing else."""
    counted = block_activations(DENSE, False, FP32, "none")
    silu, repeated, statistics = 4 * 384, 4 * 2 * 2 * 32, 4 * (2 + 4)
    assert per_block_and_token(DENSE) == counted + silu + repeated + statistics


def test_moe_activations_are_autograd_s_but_for_what_fusion_saves() -> None:
    """Also kept on CPU: silu's output and the product before the gate value, V and the output padded to the width of K; indices are small."""
    config = MOE.model_copy(update={"num_nextn_predict_layers": 0, "n_group": 1})
    counted = block_activations(config, True, FP32, "none")
    silu, before_gate, padded_v, padded_output = 4 * 3 * 96, 4 * 2 * 96, 4 * 4 * (48 - 32), 4 * 4 * 48
    assert per_block_and_token(config) == pytest.approx(
        counted + silu + before_gate + padded_v + padded_output, rel=0.005
    )


def test_selective_recomputation_by_hand() -> None:
    """DENSE in float32: the block's input, q, k, v, attention's output, what follows it, gate and up; norms and the product are made again."""
    assert block_activations(DENSE, False, FP32, "selective") == 4 * (128 + 32 * (4 + 2 * 2) + 128 + 128 + 2 * 384)
    assert block_activations(DENSE, False, FP32, "full") == 4 * 128
    assert block_activations(MOE, True, FP32, "selective") == 4 * (
        128 + 48 + 48 + 4 * 32 + 128 + 8 + 2 * 128 + 2 * 3 * 96
    )


def test_one_device_holds_sixteen_bytes_a_parameter() -> None:
    """ZeRO's count for mixed precision (arXiv 1910.02054, 3.1), and ZeRO's stages each take theirs off."""
    config, precision = DENSE, PRECISIONS["bfloat16"]
    weighed, total = sizes(config, precision), parameters(config).total

    def states(dp: int, zero: int) -> float:
        layout = Layout.model_validate({"dp": dp, "tp": 1, "pp": 1, "ep": 1, "zero": zero, "recompute": "full"})
        memory = training_memory(weighed, layout, 16, 1)
        return memory.weights + memory.gradients + memory.optimizer

    assert states(1, 0) == 16 * total
    assert [states(8, zero) for zero in (0, 1, 2, 3)] == [
        16 * total,
        (4 + 12 / 8) * total,
        (2 + 14 / 8) * total,
        16 / 8 * total,
    ]


def test_experts_are_spread_and_the_rest_is_not() -> None:
    weighed = sizes(MOE.model_copy(update={"num_nextn_predict_layers": 0}), FP32)
    one = Layout(dp=4, tp=1, pp=1, ep=1, zero=0, recompute="full")
    spread = one.model_copy(update={"ep": 4})
    experts = 3 * 8 * 3 * 128 * 96
    difference = training_memory(weighed, one, 16, 1).weights - training_memory(weighed, spread, 16, 1).weights
    assert difference == 4 * experts * 3 / 4


def test_tensor_parallelism_halves_everything_but_norms_and_router() -> None:
    whole = Layout(dp=2, tp=1, pp=1, ep=1, zero=0, recompute="full")
    halves = whole.model_copy(update={"dp": 1, "tp": 2})
    for config, kept in (
        (DENSE, 4 * 2 * 128 + 128),
        (MOE.model_copy(update={"num_nextn_predict_layers": 0, "n_routed_experts": 2}), None),
    ):
        total = parameters(config).total
        if kept is None:  # norms, router and experts: those are spread by ep alone
            kept = 4 * (2 * 128 + 48 + 32) + 128 + 3 * 128 * 2 + 3 * 2 * 3 * 128 * 96
        assert training_memory(sizes(config, FP32), whole, 16, 1).weights == 4 * total
        assert training_memory(sizes(config, FP32), halves, 16, 1).weights == 4 * ((total - kept) / 2 + kept)


def test_each_expert_s_optimizer_is_shared_by_the_devices_that_have_it() -> None:
    """Four devices, experts spread over two: each expert has two copies, everything else four; 8 bytes a number in float32."""
    config = MOE.model_copy(update={"num_nextn_predict_layers": 0})
    layout = Layout(dp=4, tp=1, pp=1, ep=2, zero=1, recompute="full")
    experts = 3 * 8 * 3 * 128 * 96
    others = parameters(config).total - experts
    assert training_memory(sizes(config, FP32), layout, 16, 1).optimizer == 8 * (experts / 2 / 2 + others / 4)


def test_activations_of_the_whole_by_hand() -> None:
    """Four blocks, the last norm's input and output, logits and their gradient in float32; two stages hold two microbatches and one."""
    block, end = block_activations(DENSE, False, FP32, "none"), 8 * 64 + 2 * 4 * 128
    one = Layout(dp=1, tp=1, pp=1, ep=1, zero=0, recompute="none")
    assert training_memory(sizes(DENSE, FP32), one, 16, 5).activations == 16 * (4 * block + end)
    two = one.model_copy(update={"pp": 2})
    assert training_memory(sizes(DENSE, FP32), two, 16, 5).activations == 16 * 2 * 2 * block
    assert training_memory(sizes(DENSE, FP32), two.model_copy(update={"tp": 2}), 16, 5).activations == 8 * 2 * 2 * block
    # Recomputed in full, a block is held whole while its turn lasts.
    assert training_memory(
        sizes(DENSE, FP32), one.model_copy(update={"recompute": "full"}), 16, 5
    ).activations == 16 * (4 * 4 * 128 + block + end)


def test_deepseek_v3_fits_its_own_layout_on_80_gb() -> None:
    """2048 H800, PP16, EP64, ZeRO-1, no tensor parallelism, recomputing norms and up-projections (arXiv 2412.19437, 3.1, 3.2.3, 4.2)."""
    config = ModelConfig.preset("deepseek-v3")
    weighed = sizes(config, PRECISIONS["fp8"])
    published = Layout.over(2048, config, pp=16, ep=64, zero=1, recompute="selective")
    assert published.dp == 128
    memory = training_memory(weighed, published, 4096, 15360 / 128)
    assert 40 * 2**30 < memory.total < 72 * 2**30
    # Without recomputation it would not, which is why they recompute.
    assert (
        training_memory(weighed, published.model_copy(update={"recompute": "none"}), 4096, 15360 / 128).total
        > 80 * 2**30
    )


@given(
    st.sampled_from(CONFIGS),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(sorted(PRECISIONS)),
    st.integers(2, 512),
    st.integers(1, 64),
)
@settings(derandomize=True, deadline=None)
def test_splits_sum_and_sharding_never_needs_more(
    config: ModelConfig, count: int, dtype: str, context: int, microbatches: int
) -> None:
    weighed = sizes(config, PRECISIONS[dtype])
    for layout in layouts(config, count):
        memory = training_memory(weighed, layout, context, microbatches)
        assert memory.total == pytest.approx(
            memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.cache
        )
        assert min(memory.weights, memory.activations) > 0
        for recompute in RECOMPUTE[RECOMPUTE.index(layout.recompute) + 1 :][:1]:
            less = training_memory(weighed, layout.model_copy(update={"recompute": recompute}), context, microbatches)
            # The one block that full recomputation holds whole may outweigh what a shallow stage keeps.
            assert less.activations <= memory.activations or recompute == "full"
        if layout.zero:
            assert (
                training_memory(
                    weighed, layout.model_copy(update={"zero": layout.zero - 1}), context, microbatches
                ).total
                >= memory.total
            )
