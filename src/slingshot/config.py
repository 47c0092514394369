"""The architecture as numbers (`ModelConfig`) and the base class of every stage's configuration.

`ModelConfig` is one frozen object for both families: `deepseek_v3` (MLA, MoE, MTP) and `dense` (GQA: Llama, Qwen2, Qwen3).
It reads and writes Hugging Face's config.json with DeepSeek's spellings. No torch here.

    config = ModelConfig.from_hf(json.loads(Path("config.json").read_text()))
    config.to_hf()["kv_lora_rank"]
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slingshot.files import SlingshotError

# Hugging Face's model_type -> (our family, architectures entry).
MODEL_TYPES = {
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "llama": ("dense", "LlamaForCausalLM"),
    "qwen2": ("dense", "Qwen2ForCausalLM"),
    "qwen3": ("dense", "Qwen3ForCausalLM"),
}

# Keys that change nothing in the forward pass; kept as they came so that config.json survives a round trip.
HARMLESS_KEYS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux",
    "_name_or_path", "is_llama_config", "rope_interleaved", "transformers.js_config", "max_window_layers", "layer_types", "num_key_value_heads",
    "mlp_bias", "return_dict", "output_hidden_states", "router_aux_loss_coef", "norm_topk_prob", "_attn_implementation", "unsloth_fixed",
    "output_router_logits", "qk_head_dim",
}  # fmt: skip


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and names the nearest right one; all configs derive from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "") -> Self:
        """Validate `values`; raises SlingshotError of one line that names `where`, the key and the way out."""
        try:
            return cls.model_validate(values)
        except SlingshotError as error:  # of a config that a validator of this one parsed
            raise SlingshotError(f"{where}.{error}" if where else str(error)) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            place = f"{where}.{key}" if where and key else where or key
            if first["type"] == "extra_forbidden":
                names = list(_nested(cls, first["loc"][:-1]).model_fields)
                near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}"
                raise SlingshotError(f"{place}: unknown key; {hint}") from error
            message = first["msg"].removeprefix("Value error, ")
            given = "" if first["type"] in {"missing", "value_error"} else f", got {first['input']!r:.80}"
            raise SlingshotError(f"{place}: {message}{given}") from error


def _nested(model: type[Strict], location: Sequence[int | str]) -> type[Strict]:
    """The config class that stands at a place within `model`'s fields, lists and unions on the way looked through."""
    for part in location:
        waiting = [model.model_fields[str(part)].annotation] if part in model.model_fields else []
        while waiting:
            annotation = waiting.pop()
            if isinstance(annotation, type) and issubclass(annotation, Strict):
                model = annotation
                break
            waiting += get_args(annotation)
    return model


class RopeScaling(Strict):
    """Context extension of rotary embeddings: YaRN (arXiv 2309.00071, as DeepSeek-V3 applies it) or Llama 3's."""

    rope_type: Literal["yarn", "llama3"]
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


class ModelConfig(Strict):
    """Everything that decides the network's mathematics. Spelling as in DeepSeek-V3's and Llama's config.json."""

    family: Literal["deepseek_v3", "dense"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    # deepseek_v3: MLA
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # deepseek_v3: MoE
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    # deepseek_v3: MTP
    num_nextn_predict_layers: int = 0
    # dense: GQA
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False
    qk_norm: bool = False
    # what config.json said besides, kept for the round trip
    extra: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        values = dict(values)
        if values.get("family") == "dense" and values.get("num_attention_heads"):
            values["num_key_value_heads"] = values.get("num_key_value_heads") or values["num_attention_heads"]
            if not values.get("head_dim"):
                values["head_dim"], left_over = divmod(values.get("hidden_size", 0), values["num_attention_heads"])
                if left_over:
                    heads = f"num_attention_heads {values['num_attention_heads']}"
                    raise ValueError(f"hidden_size {values['hidden_size']} must divide evenly into {heads}, or head_dim be given")
        return values

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.family == "dense":
            if self.num_key_value_heads < 1:
                raise ValueError(f"num_key_value_heads must be at least 1, got {self.num_key_value_heads}")
            if self.num_attention_heads % self.num_key_value_heads:
                heads = f"num_attention_heads {self.num_attention_heads}"
                raise ValueError(f"{heads} must divide evenly into num_key_value_heads {self.num_key_value_heads}")
            if self.head_dim < 2 or self.head_dim % 2:
                raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs")
            return self
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 for deepseek_v3, got {getattr(self, name)}")
        for name in ("n_shared_experts", "first_k_dense_replace"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError("q_lora_rank must be null (a plain q_proj) or at least 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even: rotary embeddings turn pairs")
        if self.n_moe_layers:
            if self.n_routed_experts < 1 or self.moe_intermediate_size < 1:
                raise ValueError("n_routed_experts and moe_intermediate_size must be at least 1 unless first_k_dense_replace covers every layer")
            if self.n_group < 1 or self.n_routed_experts % self.n_group:
                raise ValueError(f"n_routed_experts {self.n_routed_experts} must divide evenly into n_group {self.n_group}")
            if not 1 <= self.topk_group <= self.n_group:
                raise ValueError(f"topk_group {self.topk_group} must be between 1 and n_group {self.n_group}")
            reachable = self.topk_group * self.n_routed_experts // self.n_group
            if not 1 <= self.num_experts_per_tok <= reachable:
                raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} must be between 1 and the {reachable} experts of topk_group groups")
            if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
                raise ValueError("a group needs at least 2 experts: it is scored by the sum of its two best (arXiv 2412.19437, 2.1.2)")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(f"num_nextn_predict_layers {self.num_nextn_predict_layers} is not supported; 0 or 1 is")
        return self

    @property
    def n_moe_layers(self) -> int:
        """MoE blocks in the main model plus the MTP module's (its block is one whenever experts exist)."""
        if self.family == "dense":
            return 0
        return max(0, self.num_hidden_layers - self.first_k_dense_replace) + self.num_nextn_predict_layers

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim if self.family == "dense" else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token per layer: the MLA latent and rope key, or K and V of every KV head."""
        if self.family == "dense":
            return 2 * self.num_key_value_heads * self.head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read Hugging Face's config.json. A key that would change the mathematics and is unknown is refused."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise SlingshotError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
        family, _ = MODEL_TYPES[model_type]
        values: dict[str, Any] = {"family": family, "extra": {}}
        if model_type == "qwen2":
            values["attention_bias"] = True
        if model_type == "qwen3":
            values["qk_norm"] = True
        rope = dict(raw.get("rope_parameters") or {})
        for key, value in raw.items():
            if key in {"rope_parameters", "rope_scaling", "quantization_config", "num_nextn_predict_layers", "head_dim"}:
                continue
            if key in cls.model_fields and key not in {"family", "extra"}:
                values[key] = value
            if key in HARMLESS_KEYS:
                if key not in cls.model_fields:
                    values["extra"][key] = value
            elif key not in cls.model_fields:
                values["extra"][key] = _refuse_unless_default(key, value, where)
        if family == "deepseek_v3":
            values["num_nextn_predict_layers"] = raw.get("num_nextn_predict_layers", 0)
            values.pop("num_key_value_heads", None)
            if raw.get("attention_bias"):
                raise SlingshotError(f"{where}: attention_bias true is not supported for deepseek_v3")
        elif raw.get("head_dim"):
            values["head_dim"] = raw["head_dim"]
        if isinstance(values.get("eos_token_id"), list):
            values["extra"]["eos_token_id"] = values["eos_token_id"]
            values["eos_token_id"] = values["eos_token_id"][0]
        if raw.get("quantization_config"):
            raise SlingshotError(f"{where}: quantised checkpoints (quantization_config) are not supported; use a bfloat16 one")
        values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
        scaling = raw.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        if scaling:
            scaling = {("rope_type" if k == "type" else k): v for k, v in scaling.items() if k not in {"rope_theta", "partial_rotary_factor"}}
            if scaling.get("rope_type", "default") != "default":
                scaling.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
                values["rope_scaling"] = scaling
        return cls.parse(values, where)

    def to_hf(self) -> dict[str, Any]:
        """Hugging Face's config.json of this architecture, with every key readers of the format insist on written out."""
        model_type = "deepseek_v3"
        if self.family == "dense":
            model_type = "qwen3" if self.qk_norm else "qwen2" if self.attention_bias else "llama"
        raw = self.model_dump(exclude={"family", "extra", "rope_scaling", "qk_norm"})
        if self.family == "dense":
            for key in list(raw):
                if key in _DEEPSEEK_KEYS:
                    del raw[key]
            if model_type == "qwen2":
                del raw["attention_bias"]
        else:
            raw |= {"num_key_value_heads": self.num_attention_heads, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
            del raw["head_dim"]
        raw["rope_scaling"] = None
        if self.rope_scaling is not None:
            keys = {"rope_type", "factor", "original_max_position_embeddings"}
            yarn = self.rope_scaling.rope_type == "yarn"
            keys |= {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} if yarn else {"low_freq_factor", "high_freq_factor"}
            raw["rope_scaling"] = {key: value for key, value in self.rope_scaling.model_dump().items() if key in keys}
        raw |= {"hidden_act": "silu", "model_type": model_type, "architectures": [MODEL_TYPES[model_type][1]], "torch_dtype": "float32"}
        return raw | self.extra


_DEEPSEEK_KEYS = {
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob",
    "num_nextn_predict_layers",
}  # fmt: skip

# Keys understood only at the value that leaves the mathematics as implemented.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,), "sliding_window": (None,),
    "use_sliding_window": (False, None), "partial_rotary_factor": (1.0, None), "rope_interleave": (True,), "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
}  # fmt: skip


def _refuse_unless_default(key: str, value: Any, where: str) -> Any:
    if key == "sliding_window" or key not in _ONLY_VALUES:
        if key == "sliding_window" or value is None:
            return value  # Qwen2 writes a window beside use_sliding_window false; that switch decides
        raise SlingshotError(f"{where}: unknown key {key!r} could change the mathematics; remove it if it does not")
    if value not in _ONLY_VALUES[key]:
        raise SlingshotError(f"{where}: {key} {value!r} is not supported; {_ONLY_VALUES[key][0]!r} is")
    return value


class StageConfig(Strict):
    """What every stage's Config has. `threads` 0 leaves torch's own choice; `price` is money per hour of this machine."""

    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)
    price: float | None = Field(None, ge=0)


class TaskConfig(Strict):
    """A task as recipes name it: what `load_task` takes, and its share where several are mixed."""

    name: str
    weight: float = Field(1.0, gt=0)
    params: dict[str, Any] = {}
