"""The architecture as numbers (`ModelConfig`) and the base class of every stage's configuration.

`ModelConfig` is one frozen object for both families: `deepseek_v3` (MLA, MoE, MTP) and `dense` (GQA: Llama, Mistral, Qwen2, Qwen3).
It reads and writes Hugging Face's config.json with DeepSeek's spellings. No torch here.

    config = ModelConfig.from_hf(json.loads(Path("config.json").read_text()))
    config.to_hf()["kv_lora_rank"]
    ModelConfig.preset("deepseek-v3")                    # a published model's, from presets/; `presets()` lists them
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, model_validator

from slingshot.base.config import Strict, printable
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json

PRESETS = Path(__file__).parent / "presets"

# Hugging Face's model_type -> (our family, architectures entry). Kimi K2 is DeepSeek-V3's architecture under a name of its own.
MODEL_TYPES = {
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "kimi_k2": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "llama": ("dense", "LlamaForCausalLM"),
    "mistral": ("dense", "MistralForCausalLM"),
    "qwen2": ("dense", "Qwen2ForCausalLM"),
    "qwen3": ("dense", "Qwen3ForCausalLM"),
}

# Sizes beyond any model; they keep a hostile config.json from filling memory or holding up whoever walks through its layers.
_Width = Annotated[int, Field(strict=True, ge=1, le=2**20)]
_WidthOr0 = Annotated[int, Field(strict=True, ge=0, le=2**20)]
_Layers = Annotated[int, Field(strict=True, ge=1, le=2**10)]
_Count = Annotated[int, Field(strict=True, ge=1, le=2**14)]
_CountOr0 = Annotated[int, Field(strict=True, ge=0, le=2**14)]
_Vocabulary = Annotated[int, Field(strict=True, ge=1, le=2**22)]
_Length = Annotated[int, Field(strict=True, ge=1, le=2**30)]
_Token = Annotated[int, Field(strict=True, ge=0, le=2**22)]
_Number = Annotated[float, Field(strict=True, gt=0, le=1e15, allow_inf_nan=False)]
_NumberOr0 = Annotated[float, Field(strict=True, ge=0, le=1e15, allow_inf_nan=False)]
_MAX_EXPERTS = 2**18  # of all layers together


class RopeScaling(Strict):
    """Context extension of rotary embeddings: YaRN (arXiv 2309.00071, as DeepSeek-V3 applies it) or Llama 3's."""

    rope_type: Literal["yarn", "llama3"]
    factor: _Number
    original_max_position_embeddings: _Length
    beta_fast: _Number = 32.0
    beta_slow: _Number = 1.0
    mscale: _NumberOr0 = 1.0
    mscale_all_dim: _NumberOr0 = 0.0
    low_freq_factor: _Number = 1.0
    high_freq_factor: _Number = 4.0

    @model_validator(mode="after")
    def _bands_are_in_order(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must be at least beta_slow {self.beta_slow}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be greater than low_freq_factor {self.low_freq_factor}"
            )
        return self


class ModelConfig(Strict):
    """Everything that decides the network's mathematics. Spelling as in DeepSeek-V3's and Llama's config.json.

    Where a config is read, the name of a preset stands for all of its architecture, and in a table `preset = NAME` for what the table
    does not say itself. `quantization` says how a checkpoint's matrices are stored ("fp8": e4m3 in blocks of 128 x 128, as DeepSeek-V3's);
    a new model made after a preset has none.
    """

    family: Literal["deepseek_v3", "dense"]
    vocab_size: _Vocabulary
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Layers
    num_attention_heads: _Count
    max_position_embeddings: _Length = 4096
    rms_norm_eps: _Number = 1e-6
    rope_theta: _Number = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: StrictBool = False
    initializer_range: _NumberOr0 = 0.02
    bos_token_id: _Token | None = None
    eos_token_id: _Token | None = None
    pad_token_id: _Token | None = None
    # deepseek_v3: MLA
    q_lora_rank: _Width | None = None  # a plain q_proj
    kv_lora_rank: _WidthOr0 = 0
    qk_nope_head_dim: _WidthOr0 = 0
    qk_rope_head_dim: _WidthOr0 = 0
    v_head_dim: _WidthOr0 = 0
    # deepseek_v3: MoE
    moe_intermediate_size: _WidthOr0 = 0
    n_routed_experts: _CountOr0 = 0
    n_shared_experts: _CountOr0 = 0
    num_experts_per_tok: _CountOr0 = 0
    n_group: _CountOr0 = 1
    topk_group: _CountOr0 = 1
    first_k_dense_replace: _CountOr0 = 0
    routed_scaling_factor: _Number = 1.0
    norm_topk_prob: StrictBool = True
    # deepseek_v3: MTP
    num_nextn_predict_layers: _CountOr0 = 0
    # dense: GQA
    num_key_value_heads: _CountOr0 = 0
    head_dim: _WidthOr0 = 0
    attention_bias: StrictBool = False
    qk_norm: StrictBool = False
    quantization: Literal["fp8"] | None = None
    # what config.json said besides, kept for the round trip
    extra: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"preset": values}
        if not isinstance(values, dict):
            return values
        if "preset" in values:
            try:
                preset = cls.preset(values["preset"]).model_dump(exclude={"quantization", "extra"})
            except SlingshotError as error:
                raise ValueError(str(error)) from error
            values = preset | {key: value for key, value in values.items() if key != "preset"}
        values = dict(values)
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        if values.get("family") == "dense" and isinstance(heads, int) and isinstance(width, int) and heads > 0:
            if values.get("num_key_value_heads") in (None, 0):
                values["num_key_value_heads"] = heads
            if values.get("head_dim") in (None, 0):
                values["head_dim"], left_over = divmod(width, heads)
                if left_over:
                    raise ValueError(
                        f"hidden_size {width} must divide evenly into num_attention_heads {heads}, or head_dim be given"
                    )
        return values

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta {self.rope_theta} must be greater than 1")
        if self.family == "dense":
            if self.num_attention_heads % self.num_key_value_heads:
                heads = f"num_attention_heads {self.num_attention_heads}"
                raise ValueError(f"{heads} must divide evenly into num_key_value_heads {self.num_key_value_heads}")
            if self.head_dim < 2 or self.head_dim % 2:
                raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs")
            if self.attention_bias and self.qk_norm:
                raise ValueError(
                    "attention_bias (Qwen2's) and qk_norm (Qwen3's) exclude each other: no model type in Hugging Face's format has both"
                )
            return self
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 for deepseek_v3, got {getattr(self, name)}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even: rotary embeddings turn pairs")
        if self.num_nextn_predict_layers > 1:
            raise ValueError(f"num_nextn_predict_layers {self.num_nextn_predict_layers} is not supported; 0 or 1 is")
        if self.n_moe_layers:
            if self.n_routed_experts < 1 or self.moe_intermediate_size < 1:
                raise ValueError(
                    "n_routed_experts and moe_intermediate_size must be at least 1 unless first_k_dense_replace covers every layer"
                )
            if self.n_moe_layers * self.n_routed_experts > _MAX_EXPERTS:
                raise ValueError(
                    f"{self.n_moe_layers} layers of n_routed_experts {self.n_routed_experts} exceed {_MAX_EXPERTS} experts in all"
                )
            if self.n_group < 1 or self.n_routed_experts % self.n_group:
                raise ValueError(
                    f"n_routed_experts {self.n_routed_experts} must divide evenly into n_group {self.n_group}; 1 means no groups"
                )
            if not 1 <= self.topk_group <= self.n_group:
                raise ValueError(f"topk_group {self.topk_group} must be between 1 and n_group {self.n_group}")
            reachable = self.topk_group * self.n_routed_experts // self.n_group
            if not 1 <= self.num_experts_per_tok <= reachable:
                raise ValueError(
                    f"num_experts_per_tok {self.num_experts_per_tok} must be between 1 and the {reachable} experts of topk_group groups"
                )
            if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
                raise ValueError(
                    "a group needs at least 2 experts: it is scored by the sum of its two best (arXiv 2412.19437, 2.1.2)"
                )
        return self

    @property
    def n_moe_layers(self) -> int:
        """MoE blocks in the main model plus the MTP module's (its block is one whenever experts exist)."""
        if self.family == "dense":
            return 0
        return max(0, self.num_hidden_layers + self.num_nextn_predict_layers - self.first_k_dense_replace)

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim if self.family == "dense" else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token per layer: the MLA latent and rope key, or K and V of every KV head."""
        if self.family == "dense":
            return 2 * self.num_key_value_heads * self.head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture: the one it came with, else the plainest that computes the same."""
        if self.family == "deepseek_v3":
            return str(self.extra.get("model_type", "deepseek_v3"))
        plain = "qwen3" if self.qk_norm else "qwen2" if self.attention_bias else "llama"
        return "mistral" if plain == "llama" and self.extra.get("model_type") == "mistral" else plain

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A published model's configuration, by its name in `presets()`."""
        names = presets()
        if name not in names:
            near = difflib.get_close_matches(str(name).lower(), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise SlingshotError(f"no preset is called {printable(str(name))}; {hint}")
        file = PRESETS / f"{name}.json"
        return cls.from_hf(read_json(file), str(file))

    @classmethod
    def from_hf(cls, raw: Any, where: str = "config.json") -> ModelConfig:
        """Read Hugging Face's config.json. What would change the mathematics and is not computed here is refused by its name."""
        if not isinstance(raw, dict):
            raise SlingshotError(f"{where} does not hold a JSON object")
        try:
            json.dumps(raw, allow_nan=False, ensure_ascii=False).encode()
        except (
            ValueError,
            TypeError,
            RecursionError,
        ) as error:  # NaN, infinity, half a surrogate pair, nested without end
            raise SlingshotError(f"{where} cannot be written as JSON again: {error}") from error
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise SlingshotError(
                f"{where}: model_type {_short(model_type)} is not supported; supported: {', '.join(MODEL_TYPES)}"
            )
        family = MODEL_TYPES[model_type][0]
        known, required = (
            (_DEEPSEEK_KEYS, _DEEPSEEK_KEYS - {"num_nextn_predict_layers"})
            if family == "deepseek_v3"
            else (_DENSE_KEYS, set())
        )
        if missing := sorted((_SHAPE_KEYS | required) - raw.keys()):
            raise SlingshotError(f"{where}: no {', '.join(missing)}; is it a whole config.json?")
        raw = _WHERE_SILENT[model_type] | raw
        values: dict[str, Any] = {"family": family, "extra": {"model_type": model_type}}
        values["attention_bias"], values["qk_norm"] = model_type == "qwen2", model_type == "qwen3"
        for key, value in raw.items():
            if key in _SHARED_KEYS | known:
                values[key] = value
            elif key in _HARMLESS_KEYS:
                values["extra"][key] = value
            elif key not in _READ_APART and not (key in _ONLY_VALUES and value is None):
                values["extra"][key] = _at_its_only_value(key, value, model_type, where)
        for key in known & {"num_key_value_heads", "head_dim"}:
            if values.get(key) is None:
                values.pop(key, None)
            elif not values[key]:
                raise SlingshotError(f"{where}: {key} must be at least 1 or null, got {_short(values[key])}")
        if isinstance(ends := raw.get("eos_token_id"), list):
            if not ends or any(type(end) is not int or end < 0 for end in ends):
                raise SlingshotError(f"{where}: eos_token_id must be a token's id or several, got {_short(ends)}")
            values["eos_token_id"], values["extra"]["eos_token_id"] = ends[0], ends
        values["rope_theta"], values["rope_scaling"] = _rope(raw, family, where)
        values["quantization"] = _quantization(raw.get("quantization_config"), where)
        return cls.parse(values, where)

    def to_hf(self) -> dict[str, Any]:
        """Hugging Face's config.json of this architecture, with every key readers of the format insist on written out."""
        known = _DEEPSEEK_KEYS if self.family == "deepseek_v3" else _DENSE_KEYS
        raw = self.model_dump(include=_SHARED_KEYS | known)
        if self.family == "deepseek_v3":
            raw |= {
                "num_key_value_heads": self.num_attention_heads,
                "moe_layer_freq": 1,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
            }
        raw["rope_scaling"] = None
        if self.rope_scaling is not None:
            kind = self.rope_scaling.rope_type
            raw["rope_scaling"] = self.rope_scaling.model_dump(include={"rope_type", *_ROPE_KEYS[kind]})
            if self.family == "deepseek_v3":
                raw["rope_scaling"]["type"] = kind  # the only spelling that DeepSeek's own modeling_deepseek.py knows
        if self.quantization is not None:
            raw["quantization_config"] = dict(_FP8)
        extra = {key: value for key, value in self.extra.items() if key != "eos_token_id" or self.eos_token_id in value}
        if "dtype" not in extra:
            raw["torch_dtype"] = "float32"
        raw |= {"hidden_act": "silu", "architectures": [MODEL_TYPES[self.model_type][1]]} | extra
        return raw | {"model_type": self.model_type}


def presets() -> list[str]:
    """Names of the published models whose configurations come with slingshot; presets/README.md says from where."""
    return sorted(file.stem for file in PRESETS.glob("*.json"))


_SHAPE_KEYS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_SHARED_KEYS = _SHAPE_KEYS | {
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip
_DENSE_KEYS = {"num_key_value_heads", "head_dim"}
_DEEPSEEK_KEYS = {
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob",
    "num_nextn_predict_layers",
}  # fmt: skip

# What transformers 5 takes where a config.json is silent and ModelConfig's own default is another.
_WHERE_SILENT: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "kimi_k2": {},
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}

# Keys that change nothing in the forward pass; kept as they came so that config.json survives a round trip.
_HARMLESS_KEYS = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "use_cache", "attention_dropout", "pretraining_tp",
    "ep_size", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "output_router_logits", "_name_or_path", "is_llama_config",
    "max_window_layers", "_attn_implementation", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version",
    # transformers' own of all models, some of them settings of its generate()
    "return_dict", "output_hidden_states", "output_attentions", "output_scores", "return_dict_in_generate", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "chunk_size_feed_forward", "cross_attention_hidden_size", "max_length", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "finetuning_task", "id2label", "label2id", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id", "task_specific_params",
    "problem_type", "is_decoder",
}  # fmt: skip

# Keys read by a function of their own, or not at all: what follows from other keys, and the Python files of other programs, which are
# neither read nor written here.
_READ_APART = {
    "model_type",
    "rope_scaling",
    "rope_parameters",
    "quantization_config",
    "auto_map",
    "num_key_value_heads",
    "head_dim",
    "qk_head_dim",
}

# Keys understood only at the values that leave the mathematics as implemented; the first is the usual one.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,), "use_sliding_window": (False,),
    "partial_rotary_factor": (1,), "rope_interleave": (True,), "rope_interleaved": (False,), "use_mrope": (False,), "mlp_bias": (False,),
    "tie_encoder_decoder": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "pruned_heads": ({},),
}  # fmt: skip


def _at_its_only_value(key: str, value: Any, model_type: str, where: str) -> Any:
    """The value of a key that leaves the mathematics as implemented; any other is a SlingshotError."""
    place = f"{where}: {printable(key)}"
    if value is None:
        return value
    if (
        key == "attention_bias"
    ):  # Llama's and Qwen3's would be on o_proj too, DeepSeek's on three matrices; Qwen2's class does not ask
        if value is (model_type == "qwen2"):
            return value
        raise SlingshotError(
            f"{place} {_short(value)} is not supported for {model_type}; {_short(model_type == 'qwen2')} is"
        )
    if key == "sliding_window" and model_type in ("qwen2", "qwen3"):
        return value  # written beside use_sliding_window false: that switch decides
    if key == "layer_types":
        if isinstance(value, list) and all(kind == "full_attention" for kind in value):
            return value
        raise SlingshotError(f"{place} {_short(value)} is not supported; 'full_attention' in every layer is")
    if key == "sliding_window":
        raise SlingshotError(f"{place} {_short(value)} is not supported; null is: attention over the whole text")
    if key not in _ONLY_VALUES:
        raise SlingshotError(
            f"{where}: unknown key {_short(key)} could change the mathematics; remove it if it does not"
        )
    if not any(value == only and isinstance(value, bool) == isinstance(only, bool) for only in _ONLY_VALUES[key]):
        raise SlingshotError(f"{place} {_short(value)} is not supported; {_short(_ONLY_VALUES[key][0])} is")
    return value


_ROPE_KEYS = {
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "default": (),
}


def _rope(raw: dict[str, Any], family: str, where: str) -> tuple[Any, dict[str, Any] | None]:
    """rope_theta and rope_scaling from any of their spellings: top-level keys, or transformers 5's rope_parameters; `type` or `rope_type`."""
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
            raise SlingshotError(
                f"{where}: {name}.rope_type {' and '.join(map(_short, kinds))} is not supported; {', '.join(_ROPE_KEYS)} are"
            )
        if "rope_theta" in table:
            thetas.append(table.pop("rope_theta"))
        if table.get("partial_rotary_factor") == 1:
            del table["partial_rotary_factor"]
        if table.get("truncate") is True:
            del table["truncate"]
        if unknown := next((key for key in table if key not in _ROPE_KEYS[kind]), None):
            reason = f"rope_type {kind} is read with {', '.join(_ROPE_KEYS[kind]) or 'no other keys'}"
            raise SlingshotError(
                f"{where}: {name}.{printable(unknown)} {_short(table[unknown])} is not supported; {reason}"
            )
        if kind == "default":
            found.append(None)
            continue
        if kind == "yarn" and family == "dense" and not (table.get("mscale") and table.get("mscale_all_dim")):
            table = {
                key: value for key, value in table.items() if not key.startswith("mscale")
            }  # transformers heeds both or neither
        found.append(
            {"rope_type": kind, "original_max_position_embeddings": raw.get("max_position_embeddings", 4096)} | table
        )
    for name, values in (("rope_theta", thetas), ("rope_scaling", found)):
        if values and values[0] != values[-1]:
            raise SlingshotError(
                f"{where}: {name} is {_short(values[0])} in one place and {_short(values[-1])} in another; make them agree"
            )
    return (thetas or [10000.0])[0], (found or [None])[0]


_FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

# Modules that no FP8 checkpoint stores in FP8, so that a list of exceptions may name them.
_NEVER_FP8 = ("lm_head", "embed_tokens", "gate", "eh_proj", "head", "norm", "layernorm")


def _quantization(table: Any, where: str) -> Literal["fp8"] | None:
    """How the matrices are stored, by quantization_config: DeepSeek-V3's FP8, or as plain numbers. Anything else is refused."""
    if table is None:
        return None
    way_out = "DeepSeek-V3's fp8 (e4m3 in 128 x 128 blocks) is read, and so is any checkpoint that is not quantised"
    if not isinstance(table, dict) or table.get("quant_method") != "fp8":
        method = table.get("quant_method") if isinstance(table, dict) else table
        raise SlingshotError(f"{where}: quantization_config.quant_method {_short(method)} is not supported; {way_out}")
    # scale_fmt: DeepSeek-V3.1's scales are powers of two, stored as any others; dequantize: transformers' own switch, which changes no file
    allowed: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in _FP8.items()}
    allowed |= {"scale_fmt": ("ue8m0", None), "dequantize": (False, True), "modules_to_not_convert": (None,)}
    given: dict[str, Any] = {"weight_block_size": None, **table}
    for key, value in given.items():
        if key == "modules_to_not_convert" and isinstance(value, list):
            value = next((name for name in value if not str(name).endswith(_NEVER_FP8)), None)
        if key not in allowed or value not in allowed[key]:
            raise SlingshotError(
                f"{where}: quantization_config.{printable(key)} {_short(value)} is not supported; {way_out}"
            )
    return "fp8"


def _short(value: Any) -> str:
    """A value from a file, fit for an error's one line: null, true and false as JSON spells them, the rest as Python does, cut off where long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
