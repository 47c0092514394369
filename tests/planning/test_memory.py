"""Weights against the parameter count, activations against what autograd keeps, DeepSeek-V3's own layout."""

from __future__ import annotations

import gc

import pytest
import torch

from slingshot.cost.devices import device
from slingshot.cost.flops import parameters
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.planning.layout import Layout
from slingshot.planning.memory import PRECISIONS, Blocks, block_activations, stored_bytes, training_memory, with_momenta
from slingshot.planning.model_copy import ModelCopy
from slingshot.quantization.formats import Scheme
from slingshot.training.language_model import MemoryConfig

MOE = ModelConfig(
    family="deepseek_v3", vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    moe_intermediate_size=96, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)  # fmt: skip
DENSE = ModelConfig(
    family="dense", vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip
ALONE = MOE.model_copy(update={"num_nextn_predict_layers": 0})
CONFIGS = [
    MOE, ALONE.model_copy(update={"q_lora_rank": None, "n_shared_experts": 0, "first_k_dense_replace": 0}),
    MOE.model_copy(update={"first_k_dense_replace": 3, "num_hidden_layers": 7}),
    DENSE.model_copy(update={"attention_bias": True, "tie_word_embeddings": True}),
    DENSE.model_copy(update={"qk_norm": True}),
]  # fmt: skip
FP32 = PRECISIONS["float32"]
EXPERTS = 3 * 8 * 3 * 128 * 96  # numbers in MOE's three blocks of eight


@pytest.mark.parametrize("config", CONFIGS)
def test_devices_hold_every_number_once(config: ModelConfig) -> None:
    counts = parameters(config)
    assert sum(ModelCopy(config, device("h100"), FP32, 1).held) == counts.total
    for pp in (1, 2, 3, 4):
        blocks = Blocks(config, FP32)
        stages = blocks.stages(pp)
        columns = [sum(column) for column in zip(*stages, strict=True)]
        assert columns[0] + columns[1] == config.num_hidden_layers and columns[2] == config.num_nextn_predict_layers
        assert max(map(sum, stages)) - min(map(sum, stages)) <= 1
        twice = counts.embedding if pp > 1 and (config.tie_word_embeddings or config.num_nextn_predict_layers) else 0
        held = sum(sum(blocks.on_device(Layout(pp=pp), stage)) for stage in range(pp))
        assert held == counts.total + counts.mtp + twice


def kept_by_autograd(config: ModelConfig, tokens: int, recompute: str = "none") -> int:
    """Bytes of every tensor a forward pass of the real network keeps for its backward pass, parameters left out."""
    torch.manual_seed(0)
    model = Transformer(config)
    MemoryConfig(recompute=recompute).apply(model)
    parameters = {each.untyped_storage().data_ptr() for each in model.state_dict().values()}
    gc.collect()
    gc.freeze()  # what is there already is not looked at again
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        output = model(torch.randint(0, config.vocab_size, (1, tokens)))  # which holds the graph
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    gc.unfreeze()
    assert output.logits_BTV is not None
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in found.items() if address not in parameters)


QWEN = DENSE.model_copy(update={"qk_norm": True})
MLA_ALONE = ALONE.model_copy(update={"n_group": 1})


@pytest.mark.parametrize(
    ("config", "moe", "recompute", "unfused"),
    [
        # silu's output, K and V repeated to all heads, one float32 a norm and head.
        (DENSE, False, "none", 4 * 384 + 4 * 2 * 2 * 32 + 4 * (2 + 4)),
        # silu's output, V and the output padded to the width of K; indices are small.
        (MLA_ALONE, True, "none", 4 * 3 * 96 + 4 * 4 * (48 - 32) + 4 * 4 * 48),
        # As before; a padded V is none that is made again, and what is dispatched here is gathered again.
        pytest.param(DENSE, False, "selective", 4 * 384 + 4 * 2 * 2 * 32 + 4 * (2 + 4), marks=pytest.mark.slow),
        (MLA_ALONE, True, "selective", 4 * 3 * 96 + 4 * 4 * 48 + 4 * 4 * 48 - 4 * 2 * 128),
        (DENSE, False, "full", 0),
        # Two norms more; K before it is repeated.
        pytest.param(QWEN, False, "none", 4 * 384 + 4 * 2 * 2 * 32 + 4 * (2 + 4 + 4 + 2), marks=pytest.mark.slow),
        pytest.param(QWEN, False, "selective", 4 * 384 + 4 * 3 * 2 * 32 + 4 * (2 + 4 + 4 + 2), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_activations_are_autograd_s_but_for_what_fusion_saves(
    config: ModelConfig, moe: bool, recompute: str, unfused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU, without the kernels that fuse SwiGLU, autograd also keeps `unfused`, nothing else that grows with tokens
    but experts' padding. Of the fused attention, which is taken beyond 256 tokens."""
    monkeypatch.setenv("SLINGSHOT_NATIVE", "off")
    deeper = config.model_copy(update={"num_hidden_layers": 5})
    few, many = (
        kept_by_autograd(deeper, tokens, recompute) - kept_by_autograd(config, tokens, recompute)
        for tokens in (512, 1024)
    )
    expected = block_activations(config, moe, FP32, recompute) + unfused
    assert (many - few) / 512 == pytest.approx(expected, rel=0.02 if moe else 0.005)


def test_one_device_holds_sixteen_bytes_a_parameter() -> None:
    """ZeRO's count for mixed precision (arXiv 1910.02054, 3.1), and ZeRO's stages each take theirs off."""
    blocks, total = Blocks(DENSE, PRECISIONS["bfloat16"]), parameters(DENSE).total
    found = []
    for zero in (0, 1, 2, 3):
        memory = training_memory(blocks, Layout(dp=8, zero=zero, recompute="full"), 16, 1)
        found.append(memory.weights + memory.gradients + memory.optimizer)
    assert found == [16 * total, (4 + 12 / 8) * total, (2 + 14 / 8) * total, 16 / 8 * total]


def test_of_a_frozen_model_adapters_alone_have_gradients_and_optimizer_state() -> None:
    """16 bytes for each of their numbers, 2 for each of the model's; two stages of two devices share them out."""
    bf16, held = PRECISIONS["bfloat16"], 1e6
    whole, adapted = Blocks(DENSE, bf16), Blocks(DENSE, bf16, held)
    for layout, share in ((Layout(), 1), (Layout(tp=2, pp=2), 4)):
        memory, all_of_it = (training_memory(blocks, layout, 64, 1) for blocks in (adapted, whole))
        assert (memory.gradients, memory.optimizer) == (2 * held / share, 12 * held / share)
        assert memory.activations == all_of_it.activations
    memory = training_memory(adapted, Layout(), 64, 1)
    assert memory.weights == 2 * parameters(DENSE).total + 2 * held
    assert training_memory(adapted, Layout(dp=4, zero=1), 64, 1).optimizer == 12 * held / 4


def test_experts_are_spread_over_ep_and_all_else_over_tp() -> None:
    """Norms, router and experts are not split by tp; each expert's optimizer is shared by the devices that have it."""
    whole, split = Layout(dp=4, zero=0), Layout(dp=4, ep=4, zero=0)
    first, second = (training_memory(Blocks(ALONE, FP32), layout, 16, 1).weights for layout in (whole, split))
    assert first - second == 4 * EXPERTS * 3 / 4
    total, kept = parameters(ALONE).total, 4 * (2 * 128 + 48 + 32) + 128 + 3 * 128 * 8 + EXPERTS
    halves = training_memory(Blocks(ALONE, FP32), Layout(tp=2, zero=0), 16, 1).weights
    assert halves == 4 * ((total - kept) / 2 + kept)
    optimizer = training_memory(Blocks(ALONE, FP32), Layout(dp=4, ep=2, zero=1), 16, 1).optimizer
    assert optimizer == 8 * (EXPERTS / 2 / 2 + (total - EXPERTS) / 4)


def test_activations_of_the_whole_by_hand() -> None:
    """Four blocks, the last norm, logits and their gradient in float32; two stages hold two microbatches and one."""
    block, end = block_activations(DENSE, False, FP32, "none"), 8 * 64 + 2 * 4 * 128
    for layout, expected in (
        (Layout(), 16 * (4 * block + end)), (Layout(pp=2), 16 * 2 * 2 * block), (Layout(pp=2, tp=2), 8 * 2 * 2 * block),
        (Layout(recompute="full"), 16 * (4 * 4 * 128 + block + end)),  # a block is held whole while its turn lasts
    ):  # fmt: skip
        assert training_memory(Blocks(DENSE, FP32), layout, 16, 5).activations == expected


def test_momenta_of_16_bits_and_logits_of_some_tokens_are_counted() -> None:
    """4 bytes a number fewer, or with float32 moments beside FP8 more; 12 tokens' logits fewer, and their gradients."""
    kept = {(name, to): with_momenta(PRECISIONS[name], to).optimizer for name in PRECISIONS for to in ("float32", None)}
    assert kept["float32", "float32"] == kept["float32", None] == 8 and kept["fp8", "float32"] == 12 > kept["fp8", None]
    assert [with_momenta(PRECISIONS[name], "bfloat16").optimizer for name in PRECISIONS] == [4, 8, 8, 8, 0]
    assert [with_momenta(PRECISIONS[name], "bfloat16", True).optimizer for name in PRECISIONS] == [0, 4, 4, 4, 0]
    all_of_it, chunked = (training_memory(Blocks(DENSE, FP32), Layout(), 16, 1, chunk) for chunk in (None, 4))
    assert all_of_it.activations - chunked.activations == 12 * 8 * 64


def test_deepseek_v3_fits_its_own_layout_on_80_gb() -> None:
    """2048 H800, PP16, EP64, ZeRO-1, recomputing norms and up-projections (arXiv 2412.19437, 3.1, 3.2.3, 4.2)."""
    blocks = Blocks(ModelConfig.preset("deepseek-v3"), PRECISIONS["fp8"])
    published = Layout(dp=128, pp=16, ep=64, zero=1, recompute="selective")
    assert 40 * 2**30 < training_memory(blocks, published, 4096, 120).total < 72 * 2**30
    # Without recomputation it would not, which is why they recompute.
    assert training_memory(blocks, Layout(dp=128, pp=16, ep=64), 4096, 120).total > 80 * 2**30


def test_matrices_of_few_bits_count_in_their_own_widths() -> None:
    """Of DENSE 4 blocks of 196,608 numbers, 49,152 of them in down_proj; of MOE kv_b_proj and eh_proj stay."""
    wide = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 2))
    narrow, mixed = (stored_bytes(DENSE.stored_as(Scheme("int4", 32, its))) for its in ((), wide))
    assert narrow == 4.5 / 8 and mixed == pytest.approx((4.5 + 4 * 2 * 49_152 / (4 * 196_608)) / 8)
    left = 5 * 4 * (32 + 32) * 32 + 2 * 128**2
    numbers = sum(sum(kind[:2]) * count for kind, count in zip(Blocks(MOE, FP32).kinds, (1, 3, 1), strict=True))
    assert stored_bytes(MOE.stored_as(Scheme("int8", 64))) == pytest.approx(
        (8.25 / 8 * (numbers - left) + 2 * left) / numbers
    )
