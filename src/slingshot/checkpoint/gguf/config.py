"""The architecture of a GGUF file: from its keys to ModelConfig, and back.

    config = read_config(GGUFFile(path))                 # SlingshotError names what llama.cpp would compute otherwise
    architecture(config); write_keys(config)             # "deepseek2", {"context_length": 4096, ...}

src/llama-model.cpp, src/llama-context.cpp and src/models/ of llama.cpp are where the meaning of the keys shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.file import GGUFFile
from slingshot.checkpoint.gguf.names import ROPE_FREQS, SIGMOID
from slingshot.model.config import ModelConfig, RopeScaling
from slingshot.model.rope import frequencies, rotation_scale, yarn_mscale

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2")
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # llama.cpp's
_LITE_DEPTHS = (26, 27)  # at which its deepseek2 looks for no q_lora_rank: DeepSeek-V2-Lite's and GigaChat3's

# Keys that are one of ModelConfig's numbers each: in every architecture, in deepseek2, in its MoE blocks.
_COUNTS = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "context_length": "max_position_embeddings",
}  # fmt: skip
_LATENT_COUNTS = {
    "attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "n_shared_experts",
}  # fmt: skip
_EXPERTS = {
    "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
    "expert_weights_scale": "routed_scaling_factor", "expert_weights_norm": "norm_topk_prob",
}  # fmt: skip

# Keys of an architecture that do not change what is computed.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "expert_used_count")


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of it."""
    if config.family == "deepseek_v3":
        return "deepseek2"
    return "llama" if config.model_type == "mistral" else config.model_type


def read_config(file: GGUFFile) -> ModelConfig:
    """The architecture that the keys describe; llama.cpp's defaults where they are silent."""
    kind = file.get("general.architecture", str)
    if kind not in _ARCHITECTURES:
        place = f"{file.path}: general.architecture"
        raise SlingshotError(f"{place} {kind!r:.80} is not supported; llama, qwen2, qwen3 and deepseek2 are")
    keys = _Keys(file, kind)
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in file.tensors:
            raise SlingshotError(f"{file.path}: the tensor {name} is missing; does the file hold a vocabulary alone?")
    values: dict[str, Any] = {field: keys.get(key, int) for key, field in _COUNTS.items()}
    values |= {
        "vocab_size": math.prod(file.tensors["token_embd.weight"].shape[:-1]),
        "num_hidden_layers": keys.get("block_count", int),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    values |= _read_deepseek2(keys, values) if kind == "deepseek2" else _read_dense(keys)
    values["rope_scaling"] = _read_yarn(keys)
    config = ModelConfig.parse(values, str(file.path))
    keys.only("attention.causal", True)
    if config.family == "dense":
        keys.only("attention.value_length", config.head_dim)
        keys.only("rope.dimension_count", config.head_dim)
        keys.only("expert_count", 0)
    if unknown := next((key for key in file.keys if key.startswith(f"{kind}.") and key not in keys.read), None):
        raise SlingshotError(f"{file.path}: the key {unknown!r:.80} could change what is computed and is not supported")
    return _read_llama3(file, config) if kind == "llama" and ROPE_FREQS in file.tensors else config


class _Keys:
    """The keys of an architecture, its name left out; remembers in `read` which were read."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture
        self.read = {f"{architecture}.{key}" for key in _HARMLESS}

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        self.read.add(f"{self.architecture}.{key}")
        return self.file.get(f"{self.architecture}.{key}", kind, default)

    def number(self, key: str, default: float | None = None) -> float:
        """The decimal number that was written as this float32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self.get(key, float, default))))

    def only(self, key: str, *values: Any) -> None:
        """Refuse a key at any but these values; the first is what its absence means."""
        if (given := self.get(key, type(values[0]), values[0])) not in values:
            known = " and ".join(map(str, values)) + (" is" if len(values) == 1 else " are")
            self.refuse(f"{key} {given!r:.80} is not supported, {known}")

    def refuse(self, what: str) -> None:
        raise SlingshotError(f"{self.file.path}: {self.architecture}.{what}")


def _read_dense(keys: _Keys) -> dict[str, Any]:
    return {
        "family": "dense",
        "num_key_value_heads": keys.get("attention.head_count_kv", int, 0),  # 0: as many as heads
        "head_dim": keys.get("attention.key_length", int, 0),  # 0: their share of the width
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        "qk_norm": keys.architecture == "qwen3",
    }


def _read_deepseek2(keys: _Keys, values: dict[str, Any]) -> dict[str, Any]:
    """Files whose keys and values are split (the *_mla lengths) describe the latent cache's key-value head besides."""
    gating = keys.get("expert_gating_func", int, 0)
    if keys.get("expert_count", int, 0) and gating != SIGMOID:
        keys.refuse(f"expert_gating_func {gating} is not supported, {SIGMOID} is: DeepSeek-V3's sigmoid router")
    counts = {field: keys.get(key, int) for key, field in _LATENT_COUNTS.items()}
    latent, rope = counts["kv_lora_rank"], counts["qk_rope_head_dim"]
    split = "deepseek2.attention.key_length_mla" in keys.file.keys
    suffix = "_mla" if split else ""
    width, value = (keys.get(f"attention.{name}_length{suffix}", int) for name in ("key", "value"))
    if split:
        keys.only("attention.key_length", latent + rope)
        keys.only("attention.value_length", latent)
    keys.only("attention.head_count_kv", 1 if split else values["num_attention_heads"])
    groups, used = keys.get("expert_group_count", int, 0), keys.get("expert_group_used_count", int, 0)
    nextn = keys.get("nextn_predict_layers", int, 0)
    layers = values["num_hidden_layers"] - nextn
    if f"blk.{layers}.nextn.eh_proj.weight" not in keys.file.tensors:
        nextn = 0  # llama.cpp reads files without the module they mention
    return counts | {
        "family": "deepseek_v3", "num_hidden_layers": layers, "num_nextn_predict_layers": nextn,
        "q_lora_rank": keys.get("attention.q_lora_rank", int, 0) or None,
        "qk_nope_head_dim": max(width - rope, 0), "v_head_dim": value,
        "n_routed_experts": keys.get("expert_count", int, 0),
        "num_experts_per_tok": keys.get("expert_used_count", int, 0),
        "n_group": max(groups, 1), "topk_group": used if groups > 1 else 1,
        "first_k_dense_replace": keys.get("leading_dense_block_count", int, 0),
        "routed_scaling_factor": keys.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": keys.get("expert_weights_norm", bool, False),
    }  # fmt: skip


def _read_yarn(keys: _Keys) -> dict[str, Any] | None:
    """YaRN where the keys ask for it; any other scaling of positions is refused.

    llama.cpp's deepseek2 has one multiplier where DeepSeek has mscale and mscale_all_dim: both alike, a tenth there.
    """
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0) or 1.0
    kind = keys.get("rope.scaling.type", str, "none" if factor == 1 else "linear")
    original = keys.get("rope.scaling.original_context_length", int, keys.get("context_length", int))
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        scaling[name] = keys.number(f"rope.scaling.yarn_{name}", usual)
    keys.only("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    keys.only("rope.scaling.yarn_attn_factor", 1.0)
    keys.only("rope.scaling.attn_factor", 1.0)
    if keys.architecture == "deepseek2":
        multiplier = float(f"{keys.number('rope.scaling.yarn_log_multiplier', 0.0) / 0.1:.6g}")
        scaling |= {"mscale": multiplier, "mscale_all_dim": multiplier}
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind != "yarn":
        keys.refuse(f"rope.scaling.type {kind!r:.80} is not supported, yarn is")
    if scaling.get("mscale") == 0:
        keys.refuse("rope.scaling.yarn_log_multiplier 0 is not supported with YaRN; DeepSeek-V3's is 0.1")
    return scaling


def llama3_factors(config: ModelConfig) -> Tensor:
    """By what Llama 3's scaling divides each rotated pair's frequency: what GGUF files keep of it, float32 [R]."""
    return frequencies(config.model_copy(update={"rope_scaling": None})) / frequencies(config)


def _read_llama3(file: GGUFFile, config: ModelConfig) -> ModelConfig:
    """Llama 3's scaling recovered from its factors: of its four numbers, released models differ in the first alone."""
    stored, pairs = file.tensors[ROPE_FREQS], config.head_dim // 2
    place = f"{stored.file}: {ROPE_FREQS}"
    if (stored.kind, stored.shape) != (Kind.F32, (pairs,)):
        raise SlingshotError(f"{place} is {stored.kind.name} {list(stored.shape)}, F32 [{pairs}] is expected")
    factors = torch.from_numpy(file.read(stored, 0, 1)).view(torch.float32)[0]
    if config.rope_scaling is None:
        if bool((factors == 1).all()):
            return config
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), "original_max_position_embeddings": 8192}
        scaled = config.model_copy(update={"rope_scaling": RopeScaling.parse(scaling, place)})
        if torch.allclose(factors, llama3_factors(scaled), rtol=1e-5, atol=0):
            return scaled
    known = "Llama 3's scaling from 8192 positions (low_freq_factor 1, high_freq_factor 4)"
    raise SlingshotError(f"{place} is not {known}")


def problems(config: ModelConfig) -> Iterator[str]:
    """What llama.cpp would refuse, or compute otherwise."""
    layers, rope, name = config.num_hidden_layers, config.rope_scaling, architecture(config)
    yarn = rope if rope is not None and rope.rope_type == "yarn" else None
    if (blocks := layers + config.num_nextn_predict_layers) > _MAX_LAYERS:
        yield f"it has {blocks} blocks, {_MAX_LAYERS} at most are supported"
    if rope is not yarn and name != "llama":
        yield f"rope_scaling of type llama3 is known to its llama only, not to {name}"
    if yarn and not yarn.truncate:
        yield "it rounds the ends of YaRN's ramp; truncate is false"
    if config.family == "dense":
        width, heads, head = config.hidden_size, config.num_attention_heads, config.head_dim
        if name == "qwen2" and width != heads * head:
            yield f"in qwen2, hidden_size {width} must be num_attention_heads {heads} x head_dim {head}"
        if yarn and not math.isclose(rotation_scale(config), yarn_mscale(yarn.factor, 1.0)):
            yield "of YaRN's mscale, mscale_all_dim, attention_factor and attn_factor it knows none for a dense model"
        return
    if yarn and not (yarn.mscale == yarn.mscale_all_dim > 0 and rotation_scale(config) == 1):
        known = "of YaRN it knows mscale equal to mscale_all_dim, DeepSeek-V3's way"
        yield f"{known}, not {yarn.mscale} and {yarn.mscale_all_dim}"
    if config.q_lora_rank is not None and (layers in _LITE_DEPTHS or (layers == 48 and config.vocab_size == 128256)):
        yield f"it takes a deepseek2 of {layers} layers for one without q_lora_rank"
    if config.n_moe_layers:
        if config.n_shared_experts == 0:
            yield "its deepseek2 has at least one shared expert; n_shared_experts is 0"
        if config.n_routed_experts > _MAX_EXPERTS:
            yield f"n_routed_experts {config.n_routed_experts} exceeds its {_MAX_EXPERTS}"


def write_keys(config: ModelConfig) -> dict[str, Any]:
    """The architecture's keys, without its name in front."""
    keys: dict[str, Any] = {key: getattr(config, field) for key, field in _COUNTS.items()} | {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.family == "dense":
        lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        keys |= {"attention.head_count_kv": config.num_key_value_heads} | dict.fromkeys(lengths, config.head_dim)
    else:
        keys |= _deepseek2_keys(config)
    rope = config.rope_scaling
    if rope is not None and rope.rope_type == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope.factor}
        keys |= {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
        keys |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
        if config.family == "deepseek_v3":
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
    return keys


def _deepseek2_keys(config: ModelConfig) -> dict[str, Any]:
    """Attention's keys describe the latent cache's one key-value head; each head's after expansion end in _mla."""
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    keys: dict[str, Any] = {key: getattr(config, field) for key, field in _LATENT_COUNTS.items()} | {
        "attention.q_lora_rank": config.q_lora_rank or 0,  # llama.cpp wants the key; at 0 it takes the plain projection
        "attention.head_count_kv": 1, "attention.key_length": config.cache_width,
        "attention.value_length": config.kv_lora_rank, "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "leading_dense_block_count": min(config.first_k_dense_replace, depth) if config.n_moe_layers else depth,
    }  # fmt: skip
    if config.num_nextn_predict_layers:
        keys["nextn_predict_layers"] = config.num_nextn_predict_layers
    if config.n_moe_layers:
        keys |= {"expert_gating_func": SIGMOID} | {key: getattr(config, field) for key, field in _EXPERTS.items()}
        if config.topk_group < config.n_group:  # all groups chosen is no choice, and llama.cpp refuses it
            keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return keys
