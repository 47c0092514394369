"""The layout is DeepSeek-V3's released one, name by name, and what the module holds."""

import math

import pytest
import torch

from slingshot.checkpoint.layout import layout, tensor_count
from slingshot.checkpoint.load_save import to_hf_tensors
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.quantization.formats import SCALE, scale_shape

V3 = ModelConfig.preset("deepseek-v3")


def released():
    """Every tensor of DeepSeek-V3's released checkpoint: shape [out, in] and safetensors' dtype, from the figures its
    config.json gives."""
    tensors = {}

    def plain(name, *shape):
        tensors[name] = (shape, "BF16")

    def linear(name, out, into):
        tensors[f"{name}.weight"] = ((out, into), "F8_E4M3")
        tensors[f"{name}.weight_scale_inv"] = ((math.ceil(out / 128), math.ceil(into / 128)), "F32")

    def mlp(name, intermediate):
        linear(f"{name}.gate_proj", intermediate, 7168)
        linear(f"{name}.up_proj", intermediate, 7168)
        linear(f"{name}.down_proj", 7168, intermediate)

    plain("model.embed_tokens.weight", 129280, 7168)
    plain("lm_head.weight", 129280, 7168)
    plain("model.norm.weight", 7168)
    for number in range(62):
        layer = f"model.layers.{number}"
        plain(f"{layer}.input_layernorm.weight", 7168)
        plain(f"{layer}.post_attention_layernorm.weight", 7168)
        linear(f"{layer}.self_attn.q_a_proj", 1536, 7168)
        plain(f"{layer}.self_attn.q_a_layernorm.weight", 1536)
        linear(f"{layer}.self_attn.q_b_proj", 24576, 1536)
        linear(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        plain(f"{layer}.self_attn.kv_a_layernorm.weight", 512)
        linear(f"{layer}.self_attn.kv_b_proj", 32768, 512)
        linear(f"{layer}.self_attn.o_proj", 7168, 16384)
        if number < 3:
            mlp(f"{layer}.mlp", 18432)
            continue
        plain(f"{layer}.mlp.gate.weight", 256, 7168)
        tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = ((256,), "F32")
        mlp(f"{layer}.mlp.shared_experts", 2048)
        for expert in range(256):
            mlp(f"{layer}.mlp.experts.{expert}", 2048)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        plain(f"model.layers.61.{name}.weight", 7168)
    plain("model.layers.61.eh_proj.weight", 7168, 14336)
    plain("model.layers.61.embed_tokens.weight", 129280, 7168)
    plain("model.layers.61.shared_head.head.weight", 129280, 7168)
    return tensors


def stored_in_fp8(config):
    for spec in layout(config):
        if spec.stored == "linear":
            yield spec.name, (spec.shape, "F8_E4M3")
            yield spec.name + SCALE, (scale_shape(spec.shape), "F32")
        else:
            yield spec.name, (spec.shape, "F32" if spec.stored == "float32" else "BF16")


def test_deepseek_v3s_own_config_gives_its_91991_tensors():
    expected, ours = released(), list(stored_in_fp8(V3))
    assert len(ours) == len(expected) == 91_991
    assert dict(ours) == expected
    assert round(sum(math.prod(shape) for shape, _ in expected.values()) / 1e9, 2) == 684.53


def test_the_module_on_the_meta_device_holds_them_too():
    with torch.device("meta"):
        model = Transformer(V3)
    tensors = to_hf_tensors(V3, model.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, (shape, _) in released().items() if not name.endswith(SCALE)
    }
    assert tensors["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.parametrize("changes", [
    {},
    {"q_lora_rank": None, "num_nextn_predict_layers": 0},
    {"n_shared_experts": 0, "tie_word_embeddings": True},
    {"n_shared_experts": 2, "first_k_dense_replace": 0},
    {"first_k_dense_replace": 3},
    {"first_k_dense_replace": 9},
])  # fmt: skip
def test_every_deepseek_shape_is_what_the_module_holds(deepseek, changes):
    check(deepseek(**changes))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"qk_norm": True, "head_dim": 16}]
)
def test_every_dense_shape_is_what_the_module_holds(dense, changes):
    check(dense(**changes))


def check(config):
    model, specs = Transformer(config), list(layout(config))
    model.init_weights(torch.Generator().manual_seed(0))
    tensors = to_hf_tensors(config, model.state_dict())
    assert [(spec.name, spec.shape) for spec in specs] == [
        (name, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    assert len(specs) == tensor_count(config)
    unique = sum(tensors[spec.name].numel() for spec in specs if spec.copy_of is None)
    assert unique == sum(tensor.numel() for tensor in model.state_dict().values())
    assert all(torch.equal(tensors[spec.name], tensors[spec.copy_of]) for spec in specs if spec.copy_of)
