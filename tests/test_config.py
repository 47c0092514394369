"""Configurations: config.json there and back, and everything impossible refused in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.config import MODEL_TYPES, ModelConfig, StageConfig, TaskConfig
from slingshot.files import SlingshotError

Config = Callable[..., ModelConfig]

# DeepSeek-V3's published config.json (huggingface.co/deepseek-ai/DeepSeek-V3), quantisation aside.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip


def test_deepseek_v3s_own_config_is_read() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    assert (config.family, config.q_lora_rank, config.n_routed_experts, config.topk_group) == ("deepseek_v3", 1536, 256, 4)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) == ("yarn", 40.0, 1.0)
    assert (config.qk_head_dim, config.cache_width, config.n_moe_layers) == (192, 576, 59)


def test_llamas_old_and_new_spelling_of_rope() -> None:
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    old = ModelConfig.from_hf(shape | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = ModelConfig.from_hf(shape | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == new and old.rope_theta == 5e5 and old.rope_scaling is not None and old.rope_scaling.original_max_position_embeddings == 8192
    assert ModelConfig.from_hf(shape | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}).rope_theta == 7.0
    assert (old.num_key_value_heads, old.head_dim, old.cache_width) == (4, 8, 64)


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("llama", {"head_dim": 6}), ("qwen2", {"attention_bias": True}), ("qwen3", {"qk_norm": True})]
)
def test_dense_models_keep_their_type(dense: Config, model_type: str, changes: dict[str, Any]) -> None:
    raw = dense(**changes).to_hf()
    assert raw["model_type"] == model_type and raw["architectures"] == [MODEL_TYPES[model_type][1]]
    assert not {"kv_lora_rank", "n_routed_experts", "num_nextn_predict_layers"} & set(raw)


SIZES = st.integers(1, 4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    groups=SIZES, per_group=st.integers(2, 4), top=SIZES, heads=SIZES, rank=st.none() | SIZES, tied=st.booleans(), mtp=st.integers(0, 1),
    dense_layers=st.integers(0, 3), kept=st.dictionaries(st.sampled_from(["transformers_version", "pretraining_tp", "use_cache"]), st.integers()),
)  # fmt: skip
def test_any_config_survives_config_json(
    deepseek: Config,
    groups: int,
    per_group: int,
    top: int,
    heads: int,
    rank: int | None,
    tied: bool,
    mtp: int,
    dense_layers: int,
    kept: dict[str, int],
) -> None:
    """Written as JSON and read again, keys we only keep included; what is written twice is the same."""
    config = deepseek(
        n_routed_experts=groups * per_group, n_group=groups, topk_group=min(top, groups), num_experts_per_tok=min(top, groups),
        num_attention_heads=heads, q_lora_rank=rank,
        tie_word_embeddings=tied, num_nextn_predict_layers=mtp, first_k_dense_replace=dense_layers, eos_token_id=1,
    )  # fmt: skip
    raw = json.loads(json.dumps(config.to_hf() | kept))
    again = ModelConfig.from_hf(raw)
    assert again.model_copy(update={"extra": {}}) == config
    assert again.to_hf() == raw and kept.items() <= again.extra.items()


def test_several_ends_survive_config_json(dense: Config) -> None:
    config = ModelConfig.from_hf(dense().to_hf() | {"eos_token_id": [7, 9]})
    assert config.eos_token_id == 7 and config.to_hf()["eos_token_id"] == [7, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; supported: deepseek_v3, llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; 'sigmoid' is"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; 'silu' is"),
        ({"attention_bias": True}, "attention_bias true is not supported for deepseek_v3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoints .* are not supported; use a bfloat16 one"),
        ({"softcap": 30.0}, "unknown key 'softcap' could change the mathematics; remove it if it does not"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: Input should be 'yarn' or 'llama3', got 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0.5}}, "rope_scaling.attention_factor: unknown key"),
        ({"hidden_size": "wide"}, "hidden_size: Input should be a valid integer.*got 'wide'"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers 2 is not supported; 0 or 1 is"),
    ],
)
def test_a_config_json_of_other_mathematics_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SlingshotError, match=f"^here/config.json.*{message}") as refused:
        ModelConfig.from_hf(DEEPSEEK_V3 | changes, "here/config.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek", {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ("deepseek", {"num_attention_heads": -2}, "num_attention_heads must be at least 1"),
        ("deepseek", {"kv_lora_rank": 0}, "kv_lora_rank must be at least 1 for deepseek_v3"),
        ("deepseek", {"q_lora_rank": 0}, "q_lora_rank must be null .* or at least 1"),
        ("deepseek", {"qk_rope_head_dim": 5}, "qk_rope_head_dim 5 must be even: rotary embeddings turn pairs"),
        ("deepseek", {"n_routed_experts": 0}, "n_routed_experts and moe_intermediate_size must be at least 1 unless first_k_dense_replace"),
        ("deepseek", {"n_group": 3}, "n_routed_experts 8 must divide evenly into n_group 3"),
        ("deepseek", {"n_group": 8, "topk_group": 4}, "a group needs at least 2 experts"),
        ("deepseek", {"topk_group": 5}, "topk_group 5 must be between 1 and n_group 4"),
        ("deepseek", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 must be between 1 and the 4 experts of topk_group groups"),
        ("deepseek", {"n_shared_experts": -1}, "n_shared_experts must be at least 0"),
        ("deepseek", {"first_k_dense_replace": -1}, "first_k_dense_replace must be at least 0"),
        ("dense", {"num_key_value_heads": 3}, "num_attention_heads 4 must divide evenly into num_key_value_heads 3"),
        ("dense", {"num_key_value_heads": -1}, "num_key_value_heads must be at least 1"),
        ("dense", {"head_dim": 5}, "head_dim 5 must be even"),
        ("dense", {"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
)
def test_an_impossible_shape_is_named(request: pytest.FixtureRequest, family: str, changes: dict[str, Any], message: str) -> None:
    values = request.getfixturevalue(family)().model_dump() | changes
    with pytest.raises(SlingshotError, match=f"^model: {message}") as refused:
        ModelConfig.parse(values, "model")
    assert "\n" not in str(refused.value)


def test_a_misspelt_key_is_named_with_its_neighbour(deepseek: Config) -> None:
    with pytest.raises(SlingshotError, match=r"^base\.model\.hiden_size: unknown key; did you mean hidden_size\?$"):
        ModelConfig.parse({**deepseek().model_dump(), "hiden_size": 3}, "base.model")
    with pytest.raises(SlingshotError, match=r"^task\.zzz: unknown key; known keys: name, weight, params$"):
        TaskConfig.parse({"name": "arithmetic", "zzz": 1}, "task")
    with pytest.raises(SlingshotError, match=r"^task\.name: Field required$"):
        TaskConfig.parse({}, "task")


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [(StageConfig, {"seed": -1}, "seed"), (StageConfig, {"threads": -1}, "threads"), (StageConfig, {"price": -0.5}, "price")]
    + [(TaskConfig, {"name": "x", "weight": weight}, "weight") for weight in (0.0, -1.0)],
)
def test_numbers_without_a_meaning_are_refused(kind: type[StageConfig], values: dict[str, Any], key: str) -> None:
    with pytest.raises(SlingshotError, match=f"^it.{key}: Input should be greater than .*, got"):
        kind.parse(values, "it")


def test_a_misspelt_key_is_compared_with_those_of_its_own_table(deepseek: Config) -> None:
    """Also within an optional table and within a list."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fest": 3.0}
    with pytest.raises(SlingshotError, match=r"^model\.rope_scaling\.beta_fest: unknown key; did you mean beta_fast\?$"):
        ModelConfig.parse({**deepseek().model_dump(), "rope_scaling": rope}, "model")

    class Config(StageConfig):
        tasks: list[TaskConfig] = []

    with pytest.raises(SlingshotError, match=r"^rl\.tasks\.1\.wieght: unknown key; did you mean weight\?$"):
        Config.parse({"tasks": [{"name": "a"}, {"name": "b", "wieght": 1}]}, "rl")


def test_configs_are_frozen(dense: Config) -> None:
    with pytest.raises(ValueError, match="frozen"):
        dense().hidden_size = 3  # type: ignore[misc]
