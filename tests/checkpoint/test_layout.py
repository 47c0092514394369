"""The layout is DeepSeek-V3's released one, name by name, and what the module holds."""

import math

import pytest
import torch

from slingshot.checkpoint.layout import layout, tensor_count
from slingshot.checkpoint.load_save import hf_tensors
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.quantization.formats import SCALE, scale_shape

V3 = ModelConfig.preset("deepseek-v3")


def mlp(name, width):
    return {f"{name}.gate_proj": (width, 7168), f"{name}.up_proj": (width, 7168), f"{name}.down_proj": (7168, width)}


def released():
    """Every tensor of DeepSeek-V3's released checkpoint: shape [out, in] and dtype, by its config.json's figures."""
    plain = {"model.embed_tokens": (129280, 7168), "lm_head": (129280, 7168), "model.norm": (7168,)}
    linear, biases = {}, {}
    for number in range(62):
        layer = f"model.layers.{number}"
        plain |= {f"{layer}.input_layernorm": (7168,), f"{layer}.post_attention_layernorm": (7168,)}
        plain |= {f"{layer}.self_attn.q_a_layernorm": (1536,), f"{layer}.self_attn.kv_a_layernorm": (512,)}
        linear |= {
            f"{layer}.self_attn.q_a_proj": (1536, 7168), f"{layer}.self_attn.q_b_proj": (24576, 1536),
            f"{layer}.self_attn.kv_a_proj_with_mqa": (576, 7168), f"{layer}.self_attn.kv_b_proj": (32768, 512),
            f"{layer}.self_attn.o_proj": (7168, 16384),
        }  # fmt: skip
        if number < 3:
            linear |= mlp(f"{layer}.mlp", 18432)
            continue
        plain[f"{layer}.mlp.gate"] = (256, 7168)
        biases[f"{layer}.mlp.gate.e_score_correction_bias"] = ((256,), "F32")
        for expert in ("shared_experts", *(f"experts.{index}" for index in range(256))):
            linear |= mlp(f"{layer}.mlp.{expert}", 2048)
    plain |= {f"model.layers.61.{name}": (7168,) for name in ("enorm", "hnorm", "shared_head.norm")}
    plain |= {f"model.layers.61.{name}": (129280, 7168) for name in ("embed_tokens", "shared_head.head")}
    plain["model.layers.61.eh_proj"] = (7168, 14336)
    scales = {name: (math.ceil(out / 128), math.ceil(into / 128)) for name, (out, into) in linear.items()}
    kinds = ((".weight", "BF16", plain), (".weight", "F8_E4M3", linear), (".weight_scale_inv", "F32", scales))
    return biases | {name + suffix: (shape, dtype) for suffix, dtype, kind in kinds for name, shape in kind.items()}


def stored_in_fp8(config):
    for spec in layout(config):
        if spec.stored == "linear":
            yield spec.name, (spec.shape, "F8_E4M3")
            yield spec.name + SCALE, (scale_shape(spec.shape), "F32")
        else:
            yield spec.name, (spec.shape, "F32" if spec.stored == "float32" else "BF16")


def test_deepseek_v3s_own_config_gives_its_91991_tensors():
    expected, ours = released(), list(stored_in_fp8(V3))
    assert len(ours) == len(expected) == 91_991 and dict(ours) == expected
    assert round(sum(math.prod(shape) for shape, _ in expected.values()) / 1e9, 2) == 684.53


@pytest.mark.slow
def test_the_module_on_the_meta_device_holds_them_too():
    with torch.device("meta"):
        tensors = {name: each.make() for name, each in hf_tensors(V3, Transformer(V3).state_dict())}
    expected = {name: shape for name, (shape, _) in released().items() if not name.endswith(SCALE)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert tensors["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.parametrize(("family", "changes"), [
    ("deepseek", {}),
    ("deepseek", {"q_lora_rank": None, "num_nextn_predict_layers": 0}),
    ("deepseek", {"n_shared_experts": 0, "tie_word_embeddings": True}),
    ("deepseek", {"n_shared_experts": 2, "first_k_dense_replace": 0}),
    ("deepseek", {"first_k_dense_replace": 3}),
    ("deepseek", {"first_k_dense_replace": 9}),
    ("dense", {}),
    ("dense", {"tie_word_embeddings": True}),
    ("dense", {"attention_bias": True}),
    ("dense", {"qk_norm": True, "head_dim": 16}),
])  # fmt: skip
def test_every_shape_is_what_the_module_holds(request, family, changes):
    config = request.getfixturevalue(family)(**changes)
    model, specs = Transformer(config), list(layout(config))
    model.init_weights(torch.Generator().manual_seed(0))
    tensors = {name: each.make() for name, each in hf_tensors(config, model.state_dict())}
    assert [(spec.name, spec.shape) for spec in specs] == [(name, tuple(each.shape)) for name, each in tensors.items()]
    assert len(specs) == tensor_count(config)
    unique = sum(tensors[spec.name].numel() for spec in specs if spec.copy_of is None)
    assert unique == sum(tensor.numel() for tensor in model.state_dict().values())
    assert all(torch.equal(tensors[spec.name], tensors[spec.copy_of]) for spec in specs if spec.copy_of)
