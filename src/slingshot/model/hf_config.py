"""Hugging Face's config.json: from its keys to ModelConfig's values, and back.

    values = read(json.loads(text), "config.json")       # SlingshotError names the key that changes the mathematics
    raw = write(config.model_dump(), config.model_type)

Every key is read, kept (it changes nothing in the forward pass), understood at one value only, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slingshot.base.config import printable
from slingshot.base.errors import SlingshotError
from slingshot.quantization.formats import Scheme

# Hugging Face's model_type -> (our family, architectures entry). Kimi K2 is DeepSeek-V3's architecture under its name.
MODEL_TYPES = {
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "kimi_k2": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "llama": ("dense", "LlamaForCausalLM"),
    "mistral": ("dense", "MistralForCausalLM"),
    "qwen2": ("dense", "Qwen2ForCausalLM"),
    "qwen3": ("dense", "Qwen3ForCausalLM"),
}

_SHAPE_KEYS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_SHARED_KEYS = _SHAPE_KEYS | {
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id",
}  # fmt: skip
_FAMILY_KEYS = {
    "dense": {"num_key_value_heads", "head_dim"},
    "deepseek_v3": {
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size",
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace",
        "routed_scaling_factor", "norm_topk_prob", "num_nextn_predict_layers",
    },
}  # fmt: skip
_REQUIRED_KEYS = {
    "dense": _SHAPE_KEYS,
    "deepseek_v3": _SHAPE_KEYS | _FAMILY_KEYS["deepseek_v3"] - {"num_nextn_predict_layers"},
}

# What transformers 5 takes where a config.json is silent and ModelConfig's own default is another.
_WHERE_SILENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}

# Keys that change nothing in the forward pass; kept as they came so that config.json survives a round trip. From
# return_dict on transformers' own of all models, some of them settings of its generate().
_HARMLESS = """
architectures torch_dtype dtype transformers_version transformers.js_config use_cache attention_dropout pretraining_tp
ep_size aux_loss_alpha seq_aux router_aux_loss_coef output_router_logits _name_or_path is_llama_config max_window_layers
_attn_implementation _attn_implementation_autoset unsloth_fixed unsloth_version return_dict output_hidden_states
output_attentions output_scores return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward
cross_attention_hidden_size max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task id2label label2id tokenizer_class
prefix sep_token_id decoder_start_token_id task_specific_params problem_type is_decoder
"""
_HARMLESS_KEYS = set(_HARMLESS.split())

# Keys read by a function of their own, or not at all: what follows from other keys, and the Python files of other
# programs, which are neither read nor written here.
_READ_APART = {
    "model_type", "rope_scaling", "rope_parameters", "quantization_config", "auto_map", "num_key_value_heads",
    "head_dim", "qk_head_dim",
}  # fmt: skip

# Keys understood only at the value that leaves the mathematics as implemented.
_ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    "use_sliding_window": False, "partial_rotary_factor": 1, "rope_interleave": True, "rope_interleaved": False,
    "use_mrope": False, "mlp_bias": False, "tie_encoder_decoder": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "pruned_heads": {},
}  # fmt: skip

_YARN_OPTIONS = {"attention_factor": None, "attn_factor": 1.0, "truncate": True}  # written where they are others
_ROPE_KEYS = {
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        *_YARN_OPTIONS,
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "default": (),
}  # fmt: skip

_FP8: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip

# Modules that no FP8 checkpoint stores in FP8, so that a list of exceptions may name them.
_NEVER_FP8 = ("lm_head", "embed_tokens", "gate", "eh_proj", "head", "norm", "layernorm")


def read(raw: Any, where: str) -> dict[str, Any]:
    """ModelConfig's values, among them `extra`: what config.json said besides."""
    if not isinstance(raw, dict):
        raise SlingshotError(f"{where} does not hold a JSON object")
    try:
        json.dumps(raw, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:  # NaN, half a surrogate pair, nested without end
        raise SlingshotError(f"{where} cannot be written as JSON again: {error}") from error
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        supported = f"supported: {', '.join(MODEL_TYPES)}"
        raise SlingshotError(f"{where}: model_type {_short(model_type)} is not supported; {supported}")
    family = MODEL_TYPES[model_type][0]
    known = _FAMILY_KEYS[family]
    if missing := sorted(_REQUIRED_KEYS[family] - raw.keys()):
        raise SlingshotError(f"{where}: no {', '.join(missing)}; is it a whole config.json?")
    raw = _WHERE_SILENT.get(model_type, {}) | raw
    extra: dict[str, Any] = {"model_type": model_type}
    values: dict[str, Any] = {"family": family, "extra": extra}
    values["attention_bias"], values["qk_norm"] = model_type == "qwen2", model_type == "qwen3"
    for key, value in raw.items():
        if key in _SHARED_KEYS | known:
            values[key] = value
        elif key in _HARMLESS_KEYS:
            extra[key] = value
        elif key not in _READ_APART and not (key in _ONLY_VALUE and value is None):
            _check_value(key, value, model_type, where)
            extra[key] = value
    for key in known & {"num_key_value_heads", "head_dim"}:
        if values.get(key) is None:
            values.pop(key, None)
        elif not values[key]:
            raise SlingshotError(f"{where}: {key} must be at least 1 or null, got {_short(values[key])}")
    if isinstance(ends := raw.get("eos_token_id"), list):
        if not ends or any(type(end) is not int or end < 0 for end in ends):
            raise SlingshotError(f"{where}: eos_token_id must be a token's id or several, got {_short(ends)}")
        values["eos_token_id"], extra["eos_token_id"] = ends[0], ends
    values["rope_theta"], values["rope_scaling"] = _rope(raw, family, where)
    return values | _quantization(raw.get("quantization_config"), where)


def write(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """config.json of a ModelConfig's values."""
    family = values["family"]
    raw = {key: values[key] for key in values if key in _SHARED_KEYS | _FAMILY_KEYS[family]}
    if family == "deepseek_v3":
        raw |= {"num_key_value_heads": values["num_attention_heads"], "moe_layer_freq": 1}
        raw |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    raw["rope_scaling"] = None
    if (rope := values["rope_scaling"]) is not None:
        kind = rope["rope_type"]
        usual = {key for key, value in _YARN_OPTIONS.items() if rope[key] == value}
        raw["rope_scaling"] = {"rope_type": kind, **{key: rope[key] for key in _ROPE_KEYS[kind] if key not in usual}}
        if family == "deepseek_v3":
            raw["rope_scaling"]["type"] = kind  # the only spelling that DeepSeek's own modeling_deepseek.py knows
    if values["quantization"] is not None:
        if values["quantization"] == "fp8":
            scale_fmt = {"scale_fmt": values["quantization_scale_fmt"]} if values["quantization_scale_fmt"] else {}
            raw["quantization_config"] = _FP8 | scale_fmt
        else:
            told = (values[f"quantization{key}"] for key in ("", "_group_size", "_wide"))
            raw["quantization_config"] = Scheme(*told).config()
    extra = dict(values["extra"])
    if values["eos_token_id"] not in extra.get("eos_token_id", []):
        extra.pop("eos_token_id", None)
    if "dtype" not in extra:
        raw["torch_dtype"] = "float32"
    raw |= {"hidden_act": "silu", "architectures": [MODEL_TYPES[model_type][1]]} | extra
    return raw | {"model_type": model_type}


def _check_value(key: str, value: Any, model_type: str, where: str) -> None:
    """Refuse a value that would change the mathematics as implemented."""
    if value is None:
        return
    place = f"{where}: {printable(key)} {_short(value)} is not supported"
    if key == "attention_bias":
        # Llama's and Qwen3's would be on o_proj too, DeepSeek's on three matrices; Qwen2's class does not ask.
        if value is not (model_type == "qwen2"):
            raise SlingshotError(f"{place} for {model_type}; {_short(model_type == 'qwen2')} is")
    elif key == "sliding_window":
        if model_type not in ("qwen2", "qwen3"):  # there the switch use_sliding_window beside it decides
            raise SlingshotError(f"{place}; null is: attention over the whole text")
    elif key == "layer_types":
        if not isinstance(value, list) or any(kind != "full_attention" for kind in value):
            raise SlingshotError(f"{place}; 'full_attention' in every layer is")
    elif key not in _ONLY_VALUE:
        key = _short(key)
        raise SlingshotError(f"{where}: unknown key {key} could change the mathematics; remove it if it does not")
    elif value != _ONLY_VALUE[key] or isinstance(value, bool) != isinstance(_ONLY_VALUE[key], bool):
        raise SlingshotError(f"{place}; {_short(_ONLY_VALUE[key])} is")


def _rope(raw: dict[str, Any], family: str, where: str) -> tuple[Any, dict[str, Any] | None]:
    """rope_theta and rope_scaling from any of their spellings: top-level keys or rope_parameters; type or rope_type."""
    thetas: list[Any] = [raw["rope_theta"]] if "rope_theta" in raw else []
    found: list[dict[str, Any] | None] = []
    for name in ("rope_scaling", "rope_parameters"):
        table = raw.get(name)
        if table is None or table == {}:
            continue
        if not isinstance(table, dict):
            raise SlingshotError(f"{where}: {name} must be an object or null, got {_short(table)}")
        table = {key: value for key, value in table.items() if value is not None}
        kinds: list[Any] = [table.pop(key) for key in ("rope_type", "type") if key in table] or ["default"]
        kind = kinds[0]
        if kind != kinds[-1] or not isinstance(kind, str) or kind not in _ROPE_KEYS:
            given = " and ".join(map(_short, kinds))
            raise SlingshotError(f"{where}: {name}.rope_type {given} is not supported; {', '.join(_ROPE_KEYS)} are")
        if "rope_theta" in table:
            thetas.append(table.pop("rope_theta"))
        if table.get("partial_rotary_factor") == 1:
            del table["partial_rotary_factor"]
        if unknown := next((key for key in table if key not in _ROPE_KEYS[kind]), None):
            known = f"rope_type {kind} is read with {', '.join(_ROPE_KEYS[kind]) or 'no other keys'}"
            given = f"{name}.{printable(unknown)} {_short(table[unknown])}"
            raise SlingshotError(f"{where}: {given} is not supported; {known}")
        if kind == "yarn" and family == "dense" and not (table.get("mscale") and table.get("mscale_all_dim")):
            # transformers heeds both or neither
            table = {key: value for key, value in table.items() if not key.startswith("mscale")}
        scaling = {"rope_type": kind, "original_max_position_embeddings": raw.get("max_position_embeddings", 4096)}
        found.append(None if kind == "default" else scaling | table)
    for name, values in (("rope_theta", thetas), ("rope_scaling", found)):
        if values and values[0] != values[-1]:
            both = f"{_short(values[0])} in one place and {_short(values[-1])} in another"
            raise SlingshotError(f"{where}: {name} is {both}; make them agree")
    return (thetas or [10000.0])[0], (found or [None])[0]


def _quantization(table: Any, where: str) -> dict[str, Any]:
    """How the matrices are stored, by quantization_config: plainly, as DeepSeek-V3's FP8, or packed; else refused."""
    if table is None:
        return {}
    way_out = (
        "DeepSeek-V3's fp8 (e4m3 in 128 x 128 blocks) is read, compressed-tensors' pack-quantized (symmetric int4 or "
        "int8 weights with a scale a group), int-quantized and mxfp4-pack-quantized, and any checkpoint that is not "
        "quantised"
    )
    place = f"{where}: quantization_config"
    method = table.get("quant_method") if isinstance(table, dict) else table
    if method == "compressed-tensors" and isinstance(table, dict):
        scheme = Scheme.read(table)
        if isinstance(scheme, str):
            raise SlingshotError(f"{place}: {scheme} is not supported; {way_out}")
        told = {"quantization": scheme.kind, "quantization_group_size": scheme.group, "quantization_wide": scheme.wide}
        return {key: value for key, value in told.items() if value}
    if method != "fp8" or not isinstance(table, dict):
        raise SlingshotError(f"{place}.quant_method {_short(method)} is not supported; {way_out}")
    # scale_fmt: DeepSeek-V3.1's scales are powers of two, in float32 or e8m0; dequantize: transformers' own switch,
    # which changes no file
    allowed: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in _FP8.items()}
    allowed |= {"scale_fmt": ("ue8m0", None), "dequantize": (False, True), "modules_to_not_convert": (None,)}
    given: dict[str, Any] = {"weight_block_size": None, **table}
    for key, value in given.items():
        if key == "modules_to_not_convert" and isinstance(value, list):
            value = next((name for name in value if not str(name).endswith(_NEVER_FP8)), None)
        if key not in allowed or value not in allowed[key]:
            raise SlingshotError(f"{place}.{printable(key)} {_short(value)} is not supported; {way_out}")
    return {"quantization": "fp8", "quantization_scale_fmt": table.get("scale_fmt")}


def _short(value: Any) -> str:
    """A value from a file in an error's one line: null, true and false as in JSON, the rest as in Python, cut off."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
