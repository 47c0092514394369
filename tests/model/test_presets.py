"""Presets: the published configurations are the published models, to the last number, and recipes can build on them."""

import json

import pytest

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.cost.flops import parameters
from slingshot.model.config import PRESETS, ModelConfig, presets

# Numbers in the weights that were published, tied heads counted once.
PUBLISHED = {
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000, "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-v3": 671_026_404_352,
    "llama-3.1-405b": 405_853_388_800, "llama-3.1-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "smollm2-135m": 134_515_008,
    # 139,644 tensors of 1,026,470,731,056 numbers, less 61 tables of 56 rotary frequencies, 60 x 384 router biases and
    # 62,495,192 FP8 scales
    "kimi-k2": 1_026_470_731_056 - 61 * 56 - 60 * 384 - 62_495_192,
}  # fmt: skip


@pytest.mark.parametrize(("name", "numbers"), PUBLISHED.items())
def test_a_preset_has_the_size_of_its_model(name, numbers):
    assert parameters(ModelConfig.preset(name)).total == numbers


def test_every_preset_is_explained():
    rows = (PRESETS / "README.md").read_text().splitlines()
    assert {row.split("|")[1].strip() for row in rows if row.startswith("|")} - {"preset", "---"} == set(presets())
    assert set(PUBLISHED) | {"moonlight-16b-a3b", "deepseek-v3-239m", "deepseek-v3-tiny-576"} == set(presets())


def test_kimi_keeps_its_name_and_moonlight_its_plain_query():
    kimi, moonlight = ModelConfig.preset("kimi-k2"), ModelConfig.preset("moonlight-16b-a3b")
    assert kimi.model_type == kimi.to_hf()["model_type"] == "kimi_k2"
    assert kimi.to_hf()["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (moonlight.q_lora_rank, moonlight.n_group, moonlight.n_shared_experts) == (None, 1, 2)


def test_the_tiny_one_has_the_latent_that_kernels_know():
    assert {ModelConfig.preset(name).cache_width for name in ("deepseek-v3-tiny-576", "deepseek-v3")} == {576}


@pytest.mark.parametrize(("name", "hint"), [
    ("DeepSeek-V3", "did you mean deepseek-v3[?]"),
    ("qwen3-7b", "did you mean qwen3-8b[?]"),
    ("../presets/kimi-k2", "there are "),
    ("../config", "there are deepseek-r1-distill-qwen-1.5b, .*smollm2-135m"),
    ("", "there are "),
])  # fmt: skip
def test_an_unknown_preset_is_refused_with_the_nearest(name, hint):
    with pytest.raises(SlingshotError, match=f"^no preset is called {name}; {hint}"):
        ModelConfig.preset(name)


class Config(StageConfig):
    model: ModelConfig


def test_a_recipe_builds_on_a_preset():
    """By its name alone, or with changes beside it; without the published one's FP8 and its other keys."""
    named = Config.parse({"model": "deepseek-v3"}, "base").model
    published = ModelConfig.preset("deepseek-v3")
    assert named == published.model_copy(update={"quantization": None, "extra": {}}) and named.extra == {}
    changes = {"num_hidden_layers": 4, "vocab_size": 512, "rope_scaling": None}
    changed = ModelConfig.parse({"preset": "deepseek-v3"} | changes, "model")
    assert changed == named.model_copy(update=changes) and changed.n_routed_experts == 256
    assert "torch_dtype" not in changed.extra and json.dumps(changed.to_hf())
    dense = ModelConfig.parse({"preset": "smollm2-135m", "num_hidden_layers": 2}, "model")
    assert (dense.head_dim, dense.num_key_value_heads, dense.to_hf()["model_type"]) == (64, 3, "llama")


@pytest.mark.parametrize(("model", "message"), [
    ("deepseek-v4", "^base.model: no preset is called deepseek-v4; did you mean deepseek-v3[?]$"),
    ({"preset": 3}, "^base.model: no preset is called 3; there are "),
    ({"preset": "deepseek-v3", "n_group": 7}, "^base.model: n_routed_experts 256 must divide evenly into n_group 7"),
    (3, "^base.model: Input should be .*got 3$"),
])  # fmt: skip
def test_a_wrong_model_in_a_recipe_is_named(model, message):
    with pytest.raises(SlingshotError, match=message):
        Config.parse({"model": model}, "base")
