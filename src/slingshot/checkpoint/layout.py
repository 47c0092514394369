"""The tensors of a checkpoint in the Hugging Face layout: every name with its shape, and how it is stored. No torch.

    for spec in layout(config): spec.name, spec.shape, spec.stored
    scale_shape((7168, 2112))                            # (56, 17): one number for each block of an FP8 matrix

Names and shapes are those of DeepSeek-V3's released checkpoint and of transformers' Llama, Mistral, Qwen2 and Qwen3.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from slingshot.model.config import ModelConfig
from slingshot.quantization.formats import is_packed

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Spec:
    """One tensor: shape is [out, in] for matrices.

    stored      "linear": a matrix that an FP8 checkpoint keeps in e4m3 with block scales; "float32": never narrowed
                (router biases); "plain": the checkpoint's own dtype
    copy_of     the tensor this one repeats: the MTP module's embedding and head
    """

    name: str
    shape: tuple[int, ...]
    stored: Literal["linear", "plain", "float32"] = "plain"
    copy_of: str | None = None


def layout(config: ModelConfig) -> Iterator[Spec]:
    """Every tensor a checkpoint of this architecture holds, in order; FP8 has NAME_scale_inv beside each "linear"."""
    embedding = (config.vocab_size, config.hidden_size)
    yield Spec("model.embed_tokens.weight", embedding)
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer)
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        yield from _mtp(config, layer)
    yield _vector("model.norm", config.hidden_size)
    if not config.tie_word_embeddings:
        yield Spec("lm_head.weight", embedding)


def packed_layout(config: ModelConfig) -> list[Spec]:
    """The matrices that get few bits where a checkpoint's do."""
    return [spec for spec in layout(config) if is_packed(spec.name, spec.stored)]


def tensor_count(config: ModelConfig) -> int:
    """How many tensors `layout` yields."""
    return sum(1 for _ in layout(config))


def place(name: str) -> tuple[str, tuple[int, ...]]:
    """Where the module keeps a tensor: the name of its state, and the index in the stack of expert matrices."""
    if (expert := _EXPERT.fullmatch(name)) is None:
        return name, ()
    stack, index, part = expert[1], int(expert[2]), expert[3]
    if part == "down_proj":
        return f"{stack}.down_proj.weight", (index,)
    return f"{stack}.gate_up_proj.weight", (index, int(part == "up_proj"))


def adapter_group(module: str) -> Literal["attention", "mlp", "experts"]:
    """Which of LoRA's targets a matrix of a block belongs to; `mlp` is dense layers and shared experts."""
    return "attention" if ".self_attn." in module else "experts" if ".experts." in module else "mlp"


class AdapterNumbers(NamedTuple):
    """How many numbers adapters hold, and through how many of them a token passes."""

    held: int
    passed: int


def adapter_numbers(config: ModelConfig, rank: int, targets: Collection[str]) -> AdapterNumbers:
    """Of adapters of this rank beside the `targets` (training/lora.py)."""
    held = experts = 0
    for layer in range(config.num_hidden_layers):
        for spec in _block(config, layer):
            module = place(spec.name)[0].removesuffix(".weight")
            if spec.stored == "linear" and {adapter_group(module), module.split(".")[-1]} & {*targets}:
                held += rank * sum(spec.shape)
                experts += rank * sum(spec.shape) if adapter_group(module) == "experts" else 0
    chosen = experts // config.n_routed_experts * config.num_experts_per_tok if experts else 0
    return AdapterNumbers(held, held - experts + chosen)


def _vector(name: str, width: int) -> Spec:
    return Spec(f"{name}.weight", (width,))


def _linear(name: str, out: int, width: int) -> Spec:
    return Spec(f"{name}.weight", (out, width), "linear")


def _block(config: ModelConfig, layer: int) -> Iterator[Spec]:
    prefix, width, experts = f"model.layers.{layer}", config.hidden_size, config.n_routed_experts
    yield _vector(f"{prefix}.input_layernorm", width)
    yield from (_mla if config.family == "deepseek_v3" else _gqa)(config, f"{prefix}.self_attn")
    yield _vector(f"{prefix}.post_attention_layernorm", width)
    if not config.has_experts(layer):
        yield from _mlp(f"{prefix}.mlp", width, config.intermediate_size)
        return
    yield Spec(f"{prefix}.mlp.gate.weight", (experts, width))
    yield Spec(f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), "float32")
    for expert in range(experts):
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", width, config.moe_intermediate_size)
    if config.n_shared_experts:
        yield from _mlp(f"{prefix}.mlp.shared_experts", width, config.moe_intermediate_size * config.n_shared_experts)


def _mtp(config: ModelConfig, layer: int) -> Iterator[Spec]:
    """The MTP module as DeepSeek released it: a block, what joins and ends it, and copies of embedding and head."""
    prefix, width, embedding = f"model.layers.{layer}", config.hidden_size, (config.vocab_size, config.hidden_size)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield Spec(f"{prefix}.embed_tokens.weight", embedding, copy_of="model.embed_tokens.weight")
    yield _vector(f"{prefix}.enorm", width)
    yield _vector(f"{prefix}.hnorm", width)
    yield Spec(f"{prefix}.eh_proj.weight", (width, 2 * width))
    yield from _block(config, layer)
    yield _vector(f"{prefix}.shared_head.norm", width)
    yield Spec(f"{prefix}.shared_head.head.weight", embedding, copy_of=head)


def _mla(config: ModelConfig, prefix: str) -> Iterator[Spec]:
    width, heads, latent, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
    if rank is None:
        yield _linear(f"{prefix}.q_proj", heads * config.qk_head_dim, width)
    else:
        yield _linear(f"{prefix}.q_a_proj", rank, width)
        yield _vector(f"{prefix}.q_a_layernorm", rank)
        yield _linear(f"{prefix}.q_b_proj", heads * config.qk_head_dim, rank)
    yield _linear(f"{prefix}.kv_a_proj_with_mqa", latent + config.qk_rope_head_dim, width)
    yield _vector(f"{prefix}.kv_a_layernorm", latent)
    yield _linear(f"{prefix}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield _linear(f"{prefix}.o_proj", width, heads * config.v_head_dim)


def _gqa(config: ModelConfig, prefix: str) -> Iterator[Spec]:
    width, head = config.hidden_size, config.head_dim
    for name in ("q_proj", "k_proj", "v_proj"):
        rows = head * (config.num_attention_heads if name == "q_proj" else config.num_key_value_heads)
        yield _linear(f"{prefix}.{name}", rows, width)
        if config.attention_bias:
            yield Spec(f"{prefix}.{name}.bias", (rows,))
    yield _linear(f"{prefix}.o_proj", width, head * config.num_attention_heads)
    if config.qk_norm:
        yield _vector(f"{prefix}.q_norm", head)
        yield _vector(f"{prefix}.k_norm", head)


def _mlp(prefix: str, width: int, intermediate: int) -> Iterator[Spec]:
    yield _linear(f"{prefix}.gate_proj", intermediate, width)
    yield _linear(f"{prefix}.up_proj", intermediate, width)
    yield _linear(f"{prefix}.down_proj", width, intermediate)
