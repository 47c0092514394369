"""The architecture as numbers, one frozen object for both families. No torch here.

    config = ModelConfig.from_hf(json.loads(Path("config.json").read_text()))
    config.to_hf()["kv_lora_rank"]                       # hf_config.py knows the keys of config.json
    ModelConfig.preset("deepseek-v3")                    # a published model's, from presets/; `presets()` lists them

`deepseek_v3` has MLA, MoE and MTP; `dense` has GQA (Llama, Mistral, Qwen2, Qwen3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, model_validator

from slingshot.base.config import Strict, printable
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json
from slingshot.base.names import did_you_mean
from slingshot.model import hf_config
from slingshot.quantization.formats import Scheme, SchemeKind

PRESETS = Path(__file__).parent / "presets"

# Sizes beyond any model; they keep a hostile config.json from filling memory or holding up whoever walks its layers.
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
    """Context extension of rotary embeddings: YaRN (arXiv 2309.00071, as DeepSeek-V3 applies it) or Llama 3's.

    attention_factor    replaces YaRN's own factor of cos and sin (transformers' key)
    attn_factor         multiplies that factor (vLLM's key; in DeepSeek-R1-0528-Qwen3-8B it cancels it)
    truncate            whether the ends of YaRN's ramp are rounded to whole pairs
    """

    rope_type: Literal["yarn", "llama3"]
    factor: _Number
    original_max_position_embeddings: _Length
    beta_fast: _Number = 32.0
    beta_slow: _Number = 1.0
    mscale: _NumberOr0 = 1.0
    mscale_all_dim: _NumberOr0 = 0.0
    attention_factor: _Number | None = None
    attn_factor: _Number = 1.0
    truncate: StrictBool = True
    low_freq_factor: _Number = 1.0
    high_freq_factor: _Number = 4.0

    @model_validator(mode="after")
    def _bands_are_in_order(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must be at least beta_slow {self.beta_slow}")
        if (high := self.high_freq_factor) <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {high} must be greater than low_freq_factor {self.low_freq_factor}")
        return self


class ModelConfig(Strict):
    """Everything that decides the network's mathematics. Spelling as in DeepSeek-V3's and Llama's config.json.

    Where a config is read, the name of a preset stands for all of its architecture, and in a table `preset = NAME` for
    what the table does not say itself. `quantization` says how a checkpoint's matrices are stored ("fp8": e4m3 in
    blocks of 128 x 128, as DeepSeek-V3's; the others are compressed-tensors', see quantization/formats.py); a new model
    made after a preset has none.
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
    q_lora_rank: _Width | None = None  # None: a plain q_proj
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
    quantization: Literal["fp8"] | SchemeKind | None = None
    quantization_group_size: _CountOr0 = 0  # neighbours of a row that share a scale, where that is not the whole row
    quantization_wide: tuple[str, ...] = ()  # of int4: modules that have 8 bits
    quantization_scale_fmt: Literal["ue8m0"] | None = None  # of fp8: scales are powers of two, in a byte each
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
                preset = cls.preset(values["preset"]).model_dump(
                    exclude={"extra", *(key for key in cls.model_fields if key.startswith("quantization"))}
                )
            except SlingshotError as error:
                raise ValueError(str(error)) from error
            values = preset | {key: value for key, value in values.items() if key != "preset"}
        values = dict(values)
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        if values.get("family") == "dense" and isinstance(heads, int) and isinstance(width, int) and heads > 0:
            values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
            if not values.get("head_dim"):
                values["head_dim"], left_over = divmod(width, heads)
                if left_over:
                    heads = f"num_attention_heads {heads}, or head_dim be given"
                    raise ValueError(f"hidden_size {width} must divide evenly into {heads}")
        return values

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta {self.rope_theta} must be greater than 1")
        (self._check_dense if self.family == "dense" else self._check_deepseek)()
        return self

    def _check_dense(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_attention_heads {heads} must divide evenly into num_key_value_heads {groups}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs")
        if self.n_routed_experts or self.num_nextn_predict_layers:
            raise ValueError("experts and MTP are deepseek_v3's: n_routed_experts, num_nextn_predict_layers must be 0")
        if self.attention_bias and self.qk_norm:
            raise ValueError(
                "attention_bias (Qwen2's) and qk_norm (Qwen3's) exclude each other: no model type has both"
            )

    def _check_deepseek(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 for deepseek_v3, got {getattr(self, name)}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even: rotary embeddings turn pairs")
        if self.num_nextn_predict_layers > 1:
            raise ValueError(f"num_nextn_predict_layers {self.num_nextn_predict_layers} is not supported; 0 or 1 is")
        if not self.n_moe_layers:
            return
        experts, groups, chosen = self.n_routed_experts, self.n_group, self.topk_group
        if experts < 1 or self.moe_intermediate_size < 1:
            unless = "unless first_k_dense_replace covers every layer"
            raise ValueError(f"n_routed_experts and moe_intermediate_size must be at least 1 {unless}")
        if self.n_moe_layers * experts > _MAX_EXPERTS:
            raise ValueError(f"{self.n_moe_layers} layers of n_routed_experts {experts} exceed {_MAX_EXPERTS} in all")
        if groups < 1 or experts % groups:
            raise ValueError(f"n_routed_experts {experts} must divide evenly into n_group {groups}; 1 means no groups")
        if not 1 <= chosen <= groups:
            raise ValueError(f"topk_group {chosen} must be between 1 and n_group {groups}")
        top, most = self.num_experts_per_tok, chosen * experts // groups
        if not 1 <= top <= most:
            raise ValueError(f"num_experts_per_tok {top} must be between 1 and the {most} experts of topk_group groups")
        if groups > 1 and experts // groups < 2:  # arXiv 2412.19437, 2.1.2
            raise ValueError("a group needs at least 2 experts: it is scored by the sum of its two best")

    @property
    def n_moe_layers(self) -> int:
        """MoE blocks in the main model plus the MTP module's (its block is one whenever experts exist)."""
        if self.family == "dense":
            return 0
        return max(0, self.num_hidden_layers + self.num_nextn_predict_layers - self.first_k_dense_replace)

    def has_experts(self, layer: int) -> bool:
        """Whether this block has routed experts; block `num_hidden_layers` is the MTP module's."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

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

    @property
    def scheme(self) -> Scheme | None:
        """How the matrices are stored where that is one of compressed-tensors' ways."""
        if self.quantization is None or self.quantization == "fp8":
            return None
        return Scheme(self.quantization, self.quantization_group_size, self.quantization_wide)

    def stored_as(self, scheme: Scheme | None, fp8: bool = False, scale_fmt: Literal["ue8m0"] | None = None) -> Self:
        """The same architecture whose checkpoint holds its matrices so; without a scheme, plainly or as fp8."""
        kind = "fp8" if fp8 else scheme and scheme.kind
        update = {"quantization": kind, "quantization_scale_fmt": scale_fmt}
        group, wide = (scheme.group, scheme.wide) if scheme else (0, ())
        return self.model_copy(update=update | {"quantization_group_size": group, "quantization_wide": wide})

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A published model's configuration, by its name in `presets()`."""
        names = presets()
        if name not in names:
            hint = did_you_mean(str(name), names, f"there are {', '.join(names)}")
            raise SlingshotError(f"no preset is called {printable(str(name))}; {hint}")
        file = PRESETS / f"{name}.json"
        return cls.from_hf(read_json(file), str(file))

    @classmethod
    def from_hf(cls, raw: Any, where: str = "config.json") -> ModelConfig:
        """Read Hugging Face's config.json. What would change the mathematics and is not computed is refused by name."""
        return cls.parse(hf_config.read(raw, where), where)

    def to_hf(self) -> dict[str, Any]:
        """Hugging Face's config.json of this architecture, with every key its readers insist on written out."""
        return hf_config.write(self.model_dump(), self.model_type)


class Yarn(Strict):
    """A longer context for a model that has none beyond what it was trained with (YaRN, arXiv 2309.00071).

    `factor` times `original_max_position_embeddings` (the model's max_position_embeddings where not given) tokens.
    DeepSeek-V3's (2412.19437, 4.3): factor 40 of 4,096, beta_fast 32, beta_slow 1, and attention's temperature for that
    factor, which each family's config.json says in its own way (rope.py).
    """

    factor: float = Field(gt=1)
    original_max_position_embeddings: _Length | None = None
    beta_fast: _Number = 32.0
    beta_slow: _Number = 1.0

    def extended(self, config: ModelConfig, name: str) -> ModelConfig:
        """The architecture with it; SlingshotError where the model `name` has been extended before."""
        if (before := config.rope_scaling) is not None:
            what = f"{name} has rope_scaling {before.rope_type}, factor {before.factor:g}, already"
            raise SlingshotError(f"{what}; leave yarn out to train it at a greater sequence_length")
        original = self.original_max_position_embeddings or config.max_position_embeddings
        of_deepseek = {"mscale": 1.0, "mscale_all_dim": 1.0} if config.family == "deepseek_v3" else {}
        own = self.model_dump(exclude={"original_max_position_embeddings"})
        rope = {"rope_type": "yarn", "original_max_position_embeddings": original, **own, **of_deepseek}
        length = round(self.factor * original)
        return ModelConfig.parse(config.model_dump() | {"rope_scaling": rope, "max_position_embeddings": length}, name)


def presets() -> list[str]:
    """Names of the published models whose configurations come with slingshot; presets/README.md says from where."""
    return sorted(file.stem for file in PRESETS.glob("*.json"))
