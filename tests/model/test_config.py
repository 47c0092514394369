"""Configurations: config.json there and back, and everything impossible refused in one line that names it."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.cost.flops import cache_bytes_per_token, parameters
from slingshot.model.config import PRESETS, ModelConfig, presets
from slingshot.model.hf_config import MODEL_TYPES
from slingshot.model.rope import frequencies, rotation_scale
from slingshot.tasks.loader import TaskConfig

# DeepSeek-V3's published config.json, without its quantization_config.
DEEPSEEK_V3 = json.loads((PRESETS / "deepseek-v3.json").read_text())
del DEEPSEEK_V3["quantization_config"], DEEPSEEK_V3["auto_map"]


def same(one, other):
    """Whether two configurations are one but for what config.json said besides."""
    return one.model_copy(update={"extra": {}}) == other.model_copy(update={"extra": {}})


def test_deepseek_v3s_own_config_is_read():
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    rope, family = config.rope_scaling, (config.family, config.q_lora_rank, config.n_routed_experts, config.topk_group)
    assert family == ("deepseek_v3", 1536, 256, 4)
    assert (rope.rope_type, rope.factor, rope.mscale_all_dim) == ("yarn", 40.0, 1.0)
    assert (config.qk_head_dim, config.cache_width, config.n_moe_layers) == (192, 576, 59)


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def test_llamas_old_and_new_spelling_of_rope():
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    new = scaling | {"rope_type": "llama3", "rope_theta": 5e5}
    spellings = (
        {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}},
        {"rope_parameters": new | {"partial_rotary_factor": 1.0}},
        {"rope_theta": 5e5, "rope_parameters": new | {"type": "llama3"}},
    )
    old, *others = (ModelConfig.from_hf(LLAMA | spelling) for spelling in spellings)
    assert others == [old, old] and old.rope_theta == 5e5
    assert old.rope_scaling.original_max_position_embeddings == 8192
    assert (old.num_key_value_heads, old.head_dim, old.cache_width) == (4, 8, 64)
    plain = ModelConfig.from_hf(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert (plain.rope_theta, plain.rope_scaling) == (7.0, None)


def test_yarn_spelt_in_any_way_is_one_config():
    scaling = DEEPSEEK_V3["rope_scaling"]
    new = {key: value for key, value in scaling.items() if key != "type"} | {"rope_type": "yarn", "rope_theta": 10000}
    without = {key: value for key, value in DEEPSEEK_V3.items() if key not in ("rope_scaling", "rope_theta")}
    again = ModelConfig.from_hf(without | {"rope_parameters": new | {"truncate": True}})
    assert again == ModelConfig.from_hf(DEEPSEEK_V3)
    assert again.to_hf()["rope_scaling"] == scaling | {"rope_type": "yarn"}


YARN, LLAMA3 = {"type": "yarn", "factor": 4.0}, {"type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(("base", "said", "means"), [
    ("llama", {}, (1.0, 0.0)),
    ("llama", {"mscale": 0.7}, (1.0, 0.0)),
    ("llama", {"mscale_all_dim": 0.7}, (1.0, 0.0)),
    ("llama", {"mscale": 0.0, "mscale_all_dim": 0.7}, (1.0, 0.0)),
    ("llama", {"mscale": 0.7, "mscale_all_dim": 0.7}, (0.7, 0.7)),
    ("v3", {"mscale_all_dim": 0.7}, (1.0, 0.7)),
])  # fmt: skip
def test_yarn_of_a_dense_model_heeds_mscale_only_with_mscale_all_dim(base, said, means):
    """As transformers does; DeepSeek's own code, for its own models, takes either alone."""
    raw = DEEPSEEK_V3 if base == "v3" else LLAMA
    rope = ModelConfig.from_hf(raw | {"max_position_embeddings": 512, "rope_scaling": YARN | said}).rope_scaling
    assert (rope.mscale, rope.mscale_all_dim) == means
    assert rope.original_max_position_embeddings == 512


@pytest.mark.parametrize(("said", "scale"), [
    ({"attn_factor": 0.8782488562869419}, 1.0),  # DeepSeek-R1-0528-Qwen3-8B: it cancels YaRN's own 1.1386
    ({"attention_factor": 0.5}, 0.5),
    ({"attention_factor": 0.5, "attn_factor": 3.0}, 1.5),
    ({"truncate": False}, 1.1386294),
    ({"truncate": True, "attention_factor": None}, 1.1386294),
])  # fmt: skip
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_yarns_factors_are_read_as_the_programs_they_are_written_for_do(place, said, scale):
    """vLLM multiplies by attn_factor, transformers puts attention_factor in the place of YaRN's own."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = ModelConfig.from_hf(LLAMA | {place: yarn | said})
    assert rotation_scale(config) == pytest.approx(scale, rel=1e-6)
    assert config.rope_scaling.truncate is said.get("truncate", True)
    written, usual = config.to_hf(), {"truncate": True, "attention_factor": None}
    assert said.items() - usual.items() <= written["rope_scaling"].items()
    assert same(ModelConfig.from_hf(written), config)


def test_an_untruncated_ramp_begins_between_two_pairs():
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    values = ModelConfig.from_hf(LLAMA | {"head_dim": 64, "rope_scaling": yarn | {"truncate": False}})
    ratio = frequencies(values) / frequencies(values.model_copy(update={"rope_scaling": None}))
    # 64 ln(4096 / (2 pi r)) / (2 ln 10000) is 10.4722 for r = 32 and 22.5134 for r = 1
    assert ratio[12] == pytest.approx(1 - (12 - 10.4722) / (22.5134 - 10.4722) * (1 - 1 / 40), rel=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("llama", {"head_dim": 6}), ("qwen2", {"attention_bias": True}), ("qwen3", {"qk_norm": True})],
)
def test_dense_models_keep_their_type(dense, model_type, changes):
    raw = dense(**changes).to_hf()
    assert raw["model_type"] == model_type and raw["architectures"] == [MODEL_TYPES[model_type][1]]
    assert not {"kv_lora_rank", "n_routed_experts", "num_nextn_predict_layers"} & set(raw)


@pytest.mark.parametrize("name", presets())
def test_every_published_config_survives_the_round_trip(name):
    """All it says is said again, rope_scaling in both spellings; Python files are not named, for none are written."""
    raw = json.loads((PRESETS / f"{name}.json").read_text())
    config = ModelConfig.from_hf(raw)
    again = config.to_hf()
    assert ModelConfig.from_hf(again) == config and ModelConfig.from_hf(again).to_hf() == again
    scaling = raw.pop("rope_scaling", None)
    raw.pop("auto_map", None)
    assert raw.items() <= again.items()
    assert (scaling or {}).items() <= (again["rope_scaling"] or {}).items()


@pytest.mark.parametrize(("model_type", "says", "means"), [
    ("llama", {}, {"max_position_embeddings": 2048, "num_key_value_heads": 4, "head_dim": 8}),
    ("mistral", {"sliding_window": None, "num_attention_heads": 8, "head_dim": None},
     {"max_position_embeddings": 131072, "head_dim": 4}),
    ("mistral", {"sliding_window": None, "num_attention_heads": 16},
     {"num_key_value_heads": 8, "attention_bias": False, "qk_norm": False}),
    ("qwen2", {"num_key_value_heads": None},
     {"max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True}),
    ("qwen2", {"num_attention_heads": 64, "head_dim": 2}, {"num_key_value_heads": 32}),
    ("qwen3", {"num_key_value_heads": 2},
     {"max_position_embeddings": 32768, "head_dim": 128, "qk_norm": True, "attention_bias": False}),
])  # fmt: skip
def test_a_silent_config_json_means_what_transformers_takes(model_type, says, means):
    config = ModelConfig.from_hf(LLAMA | {"model_type": model_type} | says)
    assert {name: getattr(config, name) for name in means} == means
    assert config.to_hf()["model_type"] == model_type and same(ModelConfig.from_hf(config.to_hf()), config)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_a_plain_query_projection_is_written_as_null(model_type):
    """Readers would take a silent q_lora_rank for 1536, and 0 for a matrix without rows."""
    written = ModelConfig.from_hf(DEEPSEEK_V3 | {"q_lora_rank": None, "model_type": model_type}).to_hf()
    assert written["q_lora_rank"] is None and written["model_type"] == model_type
    assert (written["scoring_func"], written["topk_method"]) == ("sigmoid", "noaux_tc")


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NOT_CONVERTED = {"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]}


@pytest.mark.parametrize("also", [{}, {"scale_fmt": "ue8m0"}, NOT_CONVERTED, {"modules_to_not_convert": None}])
def test_deepseeks_fp8_is_read_and_written(also):
    config = ModelConfig.from_hf(DEEPSEEK_V3 | {"quantization_config": FP8 | also})
    kept = {key: value for key, value in also.items() if key == "scale_fmt"}
    assert config.quantization == "fp8" and config.to_hf()["quantization_config"] == FP8 | kept
    assert ModelConfig.from_hf(DEEPSEEK_V3).quantization is None
    assert "quantization_config" not in config.model_copy(update={"quantization": None}).to_hf()


def test_null_leaves_the_mathematics_unsaid():
    silent = dict.fromkeys(("hidden_act", "sliding_window", "quantization_config", "softcap"))
    written = ModelConfig.from_hf(LLAMA | silent).to_hf()
    assert written["hidden_act"] == "silu" and written["sliding_window"] is None and written["softcap"] is None


def test_the_dtype_keeps_its_one_spelling():
    new, old = (ModelConfig.from_hf(LLAMA | {key: "bfloat16"}).to_hf() for key in ("dtype", "torch_dtype"))
    assert new["dtype"] == old["torch_dtype"] == "bfloat16" and "torch_dtype" not in new and "dtype" not in old


SIZES, KEPT = st.integers(1, 4), st.sampled_from(["transformers_version", "pretraining_tp", "use_cache"])


@given(
    groups=SIZES, per_group=st.integers(2, 4), top=SIZES, heads=SIZES, rank=st.none() | SIZES, tied=st.booleans(),
    mtp=st.integers(0, 1), dense_layers=st.integers(0, 3), kept=st.dictionaries(KEPT, st.integers()),
)  # fmt: skip
def test_any_config_survives_config_json(deepseek, groups, per_group, top, heads, rank, tied, mtp, dense_layers, kept):
    """Written as JSON and read again, keys we only keep included; what is written twice is the same."""
    top = min(top, groups)
    config = deepseek(
        n_routed_experts=groups * per_group, n_group=groups, topk_group=top, num_experts_per_tok=top, eos_token_id=1,
        num_attention_heads=heads, q_lora_rank=rank, tie_word_embeddings=tied, num_nextn_predict_layers=mtp,
        first_k_dense_replace=dense_layers,
    )  # fmt: skip
    raw = json.loads(json.dumps(config.to_hf() | kept))
    again = ModelConfig.from_hf(raw)
    assert again.model_copy(update={"extra": {}}) == config
    assert again.to_hf() == raw and kept.items() <= again.extra.items()


def test_several_ends_survive_config_json(dense):
    config = ModelConfig.from_hf(dense().to_hf() | {"eos_token_id": [7, 9]})
    assert config.eos_token_id == 7 and config.to_hf()["eos_token_id"] == [7, 9]
    assert config.model_copy(update={"eos_token_id": 9}).to_hf()["eos_token_id"] == [7, 9]
    other = config.model_copy(update={"eos_token_id": 3})  # of another tokenizer: the list is out of date
    assert other.to_hf()["eos_token_id"] == 3


# What each says otherwise than DeepSeek-V3's config.json, its FP8, or LLAMA under another model_type; what is refused.
REFUSED = [
    ("mixtral", {}, "model_type 'mixtral' is not supported; supported: deepseek_v3, kimi_k2, llama, mistral, qwen2"),
    ("v3", {"model_type": None}, "model_type null is not supported"),
    ("v3", {"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
    ("v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; 'sigmoid' is"),
    ("v3", {"moe_layer_freq": True}, "moe_layer_freq true is not supported; 1 is"),
    ("v3", {"attention_bias": True}, "attention_bias true is not supported for deepseek_v3; false is"),
    ("v3", {"rope_interleave": False}, "rope_interleave false is not supported; true is"),
    ("v3", {"sliding_window": 4096}, "sliding_window 4096 is not supported; null is"),
    ("v3", {"softcap": 30.0}, "unknown key 'softcap' could change the mathematics; remove it if it does not"),
    ("v3", {"n_group": None}, "n_group: Input should be a valid integer, got None"),
    ("v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; 1 is"),
    ("v3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor 0.5 is not"),
    ("v3", {"rope_scaling": {"type": "linear"}}, "rope_type 'linear' is not supported; yarn, llama3, default"),
    ("v3", {"rope_scaling": {"type": "yarn", "rope_type": "llama3"}}, "rope_type 'llama3' and 'yarn' is not"),
    ("v3", {"rope_scaling": {"type": "default", "mrope_section": [8]}}, r"mrope_section \[8\] is not .* default"),
    ("v3", {"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor: Input should be"),
    ("v3", {"rope_scaling": YARN | {"truncate": 0}}, "truncate: Input should be a valid boolean"),
    ("v3", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: Field required"),
    ("v3", {"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast 0.5 must be at least beta_slow"),
    ("v3", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor 1.0 must be greater"),
    ("v3", {"rope_scaling": "yarn"}, "rope_scaling must be an object or null, got 'yarn'"),
    ("v3", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 10000 in one place and 5.0 in another; make"),
    ("v3", {"rope_parameters": {"type": "yarn", "factor": 2.0}}, "rope_scaling is {.* in one place and {.* in another"),
    ("v3", {"hidden_size": "7168"}, "hidden_size: Input should be a valid integer.*got '7168'"),
    ("v3", {"num_hidden_layers": True}, "num_hidden_layers: Input should be a valid integer.*got True"),
    ("v3", {"rms_norm_eps": -1e-6}, "rms_norm_eps: Input should be greater than 0.*got -1e-06"),
    ("v3", {"rope_theta": float("nan")}, "cannot be written as JSON again: Out of range float values are not JSON"),
    ("v3", {"_name_or_path": "\ud800"}, "cannot be written as JSON again"),
    ("v3", {"n_routed_experts": 16384}, "59 layers of n_routed_experts 16384 exceed 262144 in all"),
    ("v3", {"eos_token_id": []}, r"eos_token_id must be a token's id or several, got \[\]"),
    ("v3", {"eos_token_id": [1, True]}, r"eos_token_id must be a token's id or several, got \[1, True\]"),
    ("v3", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers 2 is not supported; 0 or 1 is"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; 'silu' is"),
    ("llama", {"attention_bias": True}, "attention_bias true is not supported for llama; false is"),
    ("qwen3", {"attention_bias": True}, "attention_bias true is not supported for qwen3; false is"),
    ("qwen2", {"attention_bias": False}, "attention_bias false is not supported for qwen2; true is"),
    ("llama", {"mlp_bias": True}, "mlp_bias true is not supported; false is"),
    ("llama", {"kv_lora_rank": 16}, "unknown key 'kv_lora_rank' could change"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved true is not supported; false is"),
    ("mistral", {}, "sliding_window 4096 is not supported; null is"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window true is not supported; false is"),
    ("qwen3", {"layer_types": ["full_attention", "sliding"]}, r"layer_types \['full_.* 'full_attention' in every"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be at least 1 or null, got 0"),
    ("llama", {"head_dim": False}, "head_dim must be at least 1 or null, got false"),
    ("llama", {"num_attention_heads": 5}, "hidden_size 32 must divide evenly into num_attention_heads 5, or head_dim"),
    ("llama", {"rope_scaling": LLAMA3 | {"beta_fast": 3}}, "beta_fast 3 is not .* rope_type llama3"),
    ("llama", {"rope_scaling": LLAMA3 | {"attn_factor": 1}}, "attn_factor 1 is not .* llama3"),
    ("v3", {"kv_lora_rank": 0}, "kv_lora_rank must be at least 1 for deepseek_v3"),
    ("v3", {"q_lora_rank": 0}, "q_lora_rank: Input should be greater than or equal to 1, got 0"),
    ("v3", {"qk_rope_head_dim": 5}, "qk_rope_head_dim 5 must be even: rotary embeddings turn pairs"),
    ("v3", {"n_routed_experts": 0}, "n_routed_experts and moe_intermediate_size must be at least 1 unless first_k_"),
    ("v3", {"n_group": 3}, "n_routed_experts 256 must divide evenly into n_group 3; 1 means no groups"),
    ("v3", {"n_group": 256, "topk_group": 64}, "a group needs at least 2 experts"),
    ("v3", {"topk_group": 9}, "topk_group 9 must be between 1 and n_group 8"),
    ("v3", {"num_experts_per_tok": 129}, "num_experts_per_tok 129 must be between 1 and the 128 experts of topk_group"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 must divide evenly into num_key_value_heads 3"),
    ("llama", {"head_dim": 5}, "head_dim 5 must be even"),
    ("llama", {"rope_theta": 1.0}, "rope_theta 1.0 must be greater than 1"),
    ("fp8", {"quant_method": "gptq"}, "quant_method 'gptq' is not .*; DeepSeek-V3's fp8 .* is read, comp.*pack-quan"),
    ("fp8", {"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
    ("fp8", {"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\] is not"),
    ("fp8", {"weight_block_size": None}, "weight_block_size null is not"),
    ("fp8", {"modules_to_not_convert": ["lm_head", "mlp.up_proj"]}, "modules_to_not_convert 'mlp.up_proj' is not"),
    ("fp8", {"bits": 4}, "bits 4 is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "message"), REFUSED)
def test_a_config_json_of_other_mathematics_is_refused(base, changes, message):
    raw = DEEPSEEK_V3 if base in ("v3", "fp8") else LLAMA | {"model_type": base}
    changes = {"quantization_config": FP8 | changes} if base == "fp8" else changes
    with pytest.raises(SlingshotError, match=f"^here/config.json.*{message}") as refused:
        ModelConfig.from_hf(raw | changes, "here/config.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("raw", "gone"), [
    (LLAMA, ["hidden_size", "num_hidden_layers"]),
    (DEEPSEEK_V3, ["kv_lora_rank", "n_group", "q_lora_rank"]),  # readers take these for other values than 0 or null
])  # fmt: skip
def test_missing_keys_are_all_named(raw, gone):
    with pytest.raises(SlingshotError, match=f"^here: no {', '.join(gone)}; is it a whole config.json[?]$"):
        ModelConfig.from_hf({key: value for key, value in raw.items() if key not in gone}, "here")


@pytest.mark.parametrize("raw", [None, [], "llama", 3])
def test_what_is_no_object_is_no_config(raw):
    with pytest.raises(SlingshotError, match=r"^here does not hold a JSON object$"):
        ModelConfig.from_hf(raw, "here")


@pytest.mark.parametrize("read", [
    lambda key: ModelConfig.from_hf(DEEPSEEK_V3 | {"rope_scaling": {"type": "yarn", key: 1}}),
    lambda key: ModelConfig.parse({"family": "dense", key: 1}, "model"),
])  # fmt: skip
def test_a_key_full_of_control_characters_is_printed_without_them(read):
    with pytest.raises(SlingshotError) as refused:
        read("\x1b[2J\nfactor")
    assert str(refused.value).isprintable()


ODD = [0, -1, 10**9, 10**12, 10**400, 2**64, 1e308, -0.0, 1e-30, 0.5, 1.5, True, False, None]
ODD += ["7168", "null", "yarn", "fp8", "llama3", "\ud800", "\x1b[0m\n"]
TABLES = st.dictionaries(st.sampled_from(["type", "factor", "quant_method"]), st.integers(), max_size=2)
LISTS = st.lists(st.integers(-1, 3), max_size=3)
JUNK = st.sampled_from(ODD) | st.integers(-3, 300) | st.floats() | st.text(max_size=8) | LISTS | TABLES
EXTRA_KEYS = "head_dim rope_parameters layer_types mlp_bias qk_head_dim sliding_window attention_bias extra family"


@st.composite
def mutated(draw):
    """A published config.json, some of whose values are missing, replaced or joined by others, in its tables too."""
    raw = copy.deepcopy(draw(st.sampled_from(PUBLISHED)))
    for _ in range(draw(st.integers(1, 3))):
        table = draw(st.sampled_from([raw, raw, *(value for value in raw.values() if isinstance(value, dict))]))
        own = table and draw(st.integers(0, 3))
        key = draw(st.sampled_from(sorted(table)) if own else st.sampled_from(EXTRA_KEYS.split()) | st.text(max_size=5))
        if draw(st.integers(0, 5)):
            table[key] = draw(JUNK)
        else:
            table.pop(key, None)
    return raw


PUBLISHED = [json.loads((PRESETS / f"{name}.json").read_text()) for name in presets()]


@pytest.mark.slow
@settings(max_examples=500)
@given(raw=mutated())
def test_any_config_json_is_read_or_refused_in_one_line(raw):
    """And what is read can be counted and written, and reads the same again."""
    try:
        config = ModelConfig.from_hf(raw, "here")
    except SlingshotError as error:
        assert str(error).startswith("here") and str(error).isprintable() and len(str(error)) < 500
        return
    written = json.loads(json.dumps(config.to_hf(), allow_nan=False))
    assert same(ModelConfig.from_hf(written), config) and ModelConfig.from_hf(written).to_hf() == written
    assert config.n_moe_layers >= 0 and config.qk_head_dim > 0 and cache_bytes_per_token(config) > 0
    assert 0 < parameters(config).active <= parameters(config).total


@pytest.mark.parametrize(("key", "value"), [
    ("seed", -1), ("threads", -1), ("price", -0.5), ("weight", 0.0), ("weight", -1.0),
])  # fmt: skip
def test_numbers_without_a_meaning_are_refused(key, value):
    kind, others = (TaskConfig, {"name": "x"}) if key == "weight" else (StageConfig, {})
    with pytest.raises(SlingshotError, match=f"^it.{key}: Input should be greater than .*, got"):
        kind.parse(others | {key: value}, "it")


class Tabled(StageConfig):
    tasks: list[TaskConfig] = []
    model: ModelConfig | None = None


ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fest": 3.0}


@pytest.mark.parametrize(("values", "said"), [
    ({"model": {"preset": "deepseek-v3", "hiden_size": 3}}, "model.hiden_size: unknown key; did you mean hidden_size?"),
    ({"model": {"preset": "deepseek-v3", "rope_scaling": ROPE}},
     "model.rope_scaling.beta_fest: unknown key; did you mean beta_fast?"),
    ({"tasks": [{"name": "a"}, {"name": "b", "wieght": 1}]}, "tasks.1.wieght: unknown key; did you mean weight?"),
    ({"tasks": [{"name": "a", "zzz": 1}]},
     "tasks.0.zzz: unknown key; there are: name, weight, params, tools, max_turns, observation_tokens"),
    ({"tasks": [{}]}, "tasks.0.name: Field required"),
])  # fmt: skip
def test_a_misspelt_key_is_compared_with_those_of_its_own_table(values, said):
    with pytest.raises(SlingshotError) as refused:
        Tabled.parse(values, "rl")
    assert str(refused.value) == f"rl.{said}"


def test_no_dense_model_has_both_biases_and_qk_norm(dense):
    with pytest.raises(SlingshotError, match=r"^model: attention_bias .* and qk_norm .* exclude each other"):
        ModelConfig.parse(dense().model_dump() | {"attention_bias": True, "qk_norm": True}, "model")


def test_configs_are_frozen(dense):
    with pytest.raises(ValueError, match="frozen"):
        dense().hidden_size = 3
