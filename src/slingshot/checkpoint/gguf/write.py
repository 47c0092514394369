"""GGUF files, written for llama.cpp: the weights of a checkpoint and its tokenizer in one file.

    notes = write_gguf(Path("tiny.gguf"), open_weights("runs/tiny/zero"), load_tokenizer("runs/tiny/zero"), "bfloat16")

Tensors are read, converted and written one after the other, piece by piece. What llama.cpp does not compute as the checkpoint's config.json
says is refused before anything is written; src/llama-model.cpp, src/llama-context.cpp and src/models/ of llama.cpp are where it shows.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.read import NAMED_TOKENS, ROPE_FREQS, SIGMOID, kv_b_parts, llama3_factors, place
from slingshot.checkpoint.layout import Spec, layout
from slingshot.checkpoint.load_save import StoredWeights
from slingshot.model.config import ModelConfig
from slingshot.model.rope import rotation_scale, yarn_mscale
from slingshot.text.pretokenizers import recognise
from slingshot.text.tokenizer import Tokenizer

Dtype = Literal["float32", "float16", "bfloat16", "q8_0"]

_KINDS = {
    "float32": (Kind.F32, LlamaFileType.ALL_F32),
    "float16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_LARGEST = {
    Kind.F32: torch.finfo(torch.float32).max,
    Kind.F16: 65504.0,
    Kind.BF16: torch.finfo(torch.bfloat16).max,
    Kind.Q8_0: 127 * 65504.0,
}
_VALUE_TYPES = {
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    bool: GGUFValueType.BOOL,
}
_PIECE = 2**22  # numbers read, converted and written at a time

_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # llama.cpp's
_LITE_DEPTHS = (26, 27)  # at which its deepseek2 looks for no q_lora_rank: DeepSeek-V2-Lite's and GigaChat3's


@dataclass(frozen=True)
class _Part:
    """One tensor of the file to be; `pieces` gives its rows in order, with the name they have in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    pieces: Callable[[], Iterator[tuple[str, Tensor]]]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def write_gguf(file: Path, weights: StoredWeights, tokenizer: Tokenizer, dtype: Dtype) -> list[str]:
    """Write a checkpoint's weights and tokenizer, whole or not at all. Returns what the file has otherwise than asked for, a line each.

    Matrices are of `dtype`; norms, biases and routers stay float32. In q8_0 a matrix whose rows do not fill blocks of 32 is float16 instead,
    as in llama.cpp's own converter. SlingshotError when llama.cpp has no place for the architecture, the tokenizer or a value.
    """
    config, (kind, file_type) = weights.config, _KINDS[dtype]
    if problem := next(_problems(config), None):
        raise SlingshotError(f"{file}: llama.cpp does not compute this model: {problem}")
    architecture = _architecture(config)
    writer = GGUFWriter(None, architecture)
    writer.add_name(file.stem.encode(errors="replace").decode())
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in _keys(config).items():
        writer.add_key_value(f"{architecture}.{key}", value, _VALUE_TYPES[type(value)])
    try:
        notes = _add_tokenizer(writer, tokenizer, config.vocab_size)
    except SlingshotError as error:
        raise SlingshotError(f"{file}: {error}") from error
    parts = list(_parts(weights, kind))
    if short := [part.name for part in parts if kind == Kind.Q8_0 and part.kind == Kind.F16]:
        notes.append(
            f"{len(short)} matrices, {short[0]} the first, are float16: their rows do not fill q8_0's blocks of 32"
        )
    for part in parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.nbytes, part.kind)
    _write(file, writer, parts, weights)
    return notes


def _write(file: Path, writer: GGUFWriter, parts: Sequence[_Part], weights: StoredWeights) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (out,) = writer.fout
        for part in parts:
            writer.write_padding(out, out.tell())
            start = out.tell()
            for source, piece in part.pieces():
                try:
                    out.write(_converted(piece, part.kind).data)
                except ValueError as error:
                    raise SlingshotError(f"{weights.where(source)}: {source} {error}") from error
            assert out.tell() == start + part.nbytes, part.name
        writer.write_padding(out, out.tell())
        out.flush()
        os.fsync(out.fileno())
        writer.close()
        temporary.replace(file)
    except UnicodeEncodeError as error:
        raise SlingshotError(
            f"{file}: the chat template holds half a surrogate pair, which UTF-8 cannot carry: {error}"
        ) from error
    except OSError as error:
        raise SlingshotError(
            f"cannot write {file}: {error.strerror or error}; free space there or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _converted(piece: Tensor, kind: Kind) -> np.ndarray:
    """The bytes of some rows in the file's type, uint8; ValueError when there are none for a value."""
    if not (largest := piece.abs().max().item()) <= _LARGEST[kind]:
        raise ValueError(
            f"holds values too large for {kind.name}; bfloat16 has room"
            if math.isfinite(largest)
            else "holds NaN or infinite values"
        )
    if kind == Kind.Q8_0:
        return np.ascontiguousarray(gguf.quants.quantize(piece.float().numpy(), Kind.Q8_0))
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    return piece.to(dtype).contiguous().view(torch.uint8).numpy()


def _parts(weights: StoredWeights, kind: Kind) -> Iterator[_Part]:
    """Every tensor of the file. The MTP module's copies of embedding and head are left to llama.cpp, which takes the model's own."""
    config = weights.config
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        yield _Part(ROPE_FREQS, (config.head_dim // 2,), Kind.F32, lambda: iter([(ROPE_FREQS, llama3_factors(config))]))
    for spec in layout(config):
        name, expert = place(spec.name)
        if spec.copy_of or expert:
            continue  # a later expert stands in the stack of the first
        exact = len(spec.shape) == 1 or spec.name.endswith("mlp.gate.weight")
        if expert == 0:
            names = [
                spec.name.replace(".experts.0.", f".experts.{number}.") for number in range(config.n_routed_experts)
            ]
            yield _Part(
                name,
                (len(names), *spec.shape),
                _fitting(kind, spec.shape[-1]),
                partial(_rows, weights, names, spec.shape),
            )
        elif spec.name.endswith("kv_b_proj.weight"):
            yield from _kv_b_proj(weights, spec, kind)
        else:
            pieces = partial(_rows, weights, [spec.name], spec.shape)
            if _architecture(config) == "llama" and spec.name.endswith(("q_proj.weight", "k_proj.weight")):
                pieces = partial(_interleaved, weights, spec)
            yield _Part(name, spec.shape, Kind.F32 if exact else _fitting(kind, spec.shape[-1]), pieces)


def _fitting(kind: Kind, width: int) -> Kind:
    return Kind.F16 if width % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _rows(
    weights: StoredWeights, names: Sequence[str], shape: tuple[int, ...], unit: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one shape after each other, some multiple of `unit` rows at a time."""
    count = max(1, _PIECE // math.prod(shape[1:]) // unit) * unit
    for name in names:
        for start in range(0, shape[0], count):
            yield name, weights.read(name, slice(start, min(start + count, shape[0])))


def _interleaved(weights: StoredWeights, spec: Spec) -> Iterator[tuple[str, Tensor]]:
    """llama's q or k as llama.cpp rotates them: row j of a head's first half, then row j of its second."""
    head_dim = weights.config.head_dim
    for name, rows in _rows(weights, [spec.name], spec.shape, head_dim):
        yield name, rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _kv_b_proj(weights: StoredWeights, spec: Spec, kind: Kind) -> Iterator[_Part]:
    """Keys [H, K, N], transposed so that llama.cpp can absorb them into the queries, and values [H, V, K]."""
    config = weights.config
    heads, latent, width = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    key, value = kv_b_parts(place(spec.name)[0])

    def keys() -> Iterator[tuple[str, Tensor]]:
        yield spec.name, weights.read(spec.name).unflatten(0, (heads, -1))[:, :width].transpose(1, 2).flatten(0, 1)

    def values() -> Iterator[tuple[str, Tensor]]:
        yield spec.name, weights.read(spec.name).unflatten(0, (heads, -1))[:, width:].flatten(0, 1)

    yield _Part(key, (heads, latent, width), _fitting(kind, width), keys)
    yield _Part(value, (heads, config.v_head_dim, latent), _fitting(kind, latent), values)


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name of it."""
    return {"deepseek_v3": "deepseek2", "kimi_k2": "deepseek2", "mistral": "llama"}.get(
        config.model_type, config.model_type
    )


def _problems(config: ModelConfig) -> Iterator[str]:
    """What llama.cpp would refuse, or compute otherwise."""
    layers, rope = config.num_hidden_layers, config.rope_scaling
    kind = rope.rope_type if rope is not None else None
    if (blocks := layers + config.num_nextn_predict_layers) > _MAX_LAYERS:
        yield f"it has {blocks} blocks, {_MAX_LAYERS} at most are supported"
    if config.family == "dense":
        if config.model_type == "qwen2" and config.hidden_size != config.num_attention_heads * config.head_dim:
            yield f"in qwen2, hidden_size {config.hidden_size} must be num_attention_heads {config.num_attention_heads} x head_dim {config.head_dim}"
        if kind == "llama3" and _architecture(config) != "llama":
            yield f"rope_scaling of type llama3 is known to its llama only, not to {config.model_type}"
        if (
            rope is not None
            and kind == "yarn"
            and not math.isclose(rotation_scale(config), yarn_mscale(rope.factor, 1.0))
        ):
            yield "of YaRN's mscale and mscale_all_dim it knows none for a dense model; leave them out"
        return
    if kind == "llama3":
        yield "rope_scaling of type llama3 is known to its llama only, not to deepseek2"
    if rope is not None and kind == "yarn" and not rope.mscale == rope.mscale_all_dim > 0:
        yield f"of YaRN it knows mscale equal to mscale_all_dim, DeepSeek-V3's way, not {rope.mscale} and {rope.mscale_all_dim}"
    if config.q_lora_rank is not None and (layers in _LITE_DEPTHS or (layers == 48 and config.vocab_size == 128256)):
        yield f"it takes a deepseek2 of {layers} layers for one without q_lora_rank"
    if config.n_moe_layers:
        if config.n_shared_experts == 0:
            yield "its deepseek2 has at least one shared expert; n_shared_experts is 0"
        if config.n_routed_experts > _MAX_EXPERTS:
            yield f"n_routed_experts {config.n_routed_experts} exceeds its {_MAX_EXPERTS}"


def _keys(config: ModelConfig) -> dict[str, Any]:
    """The architecture's keys, without its name in front."""
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.family == "dense":
        keys |= {"attention.head_count_kv": config.num_key_value_heads}
        keys |= dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"), config.head_dim
        )
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
    """Attention's keys describe one key-value head, the latent cache's entry; those of each head after expansion end in _mla."""
    depth, rope = config.num_hidden_layers + config.num_nextn_predict_layers, config.qk_rope_head_dim
    keys: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank or 0,  # llama.cpp wants the key; at 0 it takes the plain projection
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + rope,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": rope,
        "leading_dense_block_count": min(config.first_k_dense_replace, depth) if config.n_moe_layers else depth,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
    }
    if config.num_nextn_predict_layers:
        keys["nextn_predict_layers"] = config.num_nextn_predict_layers
    if config.n_moe_layers:
        keys |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_gating_func": SIGMOID,
        }
        keys |= {"expert_weights_scale": config.routed_scaling_factor, "expert_weights_norm": config.norm_topk_prob}
    if (
        config.n_moe_layers and config.topk_group < config.n_group
    ):  # all groups chosen is no choice, and llama.cpp refuses it
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return keys


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """The vocabulary, filled up to the embedding's rows, and the chat template."""
    description = tokenizer.description()
    model, added = description["model"], {token["id"]: token for token in description["added_tokens"]}
    split = recognise(description)
    if odd := next(
        (key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)), None
    ):
        raise SlingshotError(f"llama.cpp knows no tokenizer with {odd} {model[odd]!r:.80}")
    if tokenizer.vocab_size > vocab_size:
        raise SlingshotError(
            f"the tokenizer's highest id is {tokenizer.vocab_size - 1}, the model has {vocab_size} embeddings; are they of one model?"
        )
    if tokenizer.eos_id is None:
        raise SlingshotError(
            "the tokenizer names no eos_token; llama.cpp would take token 11 for it: name one in tokenizer_config.json"
        )
    if not model["merges"]:
        raise SlingshotError("the tokenizer has no merges; llama.cpp reads none without")
    texts = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(vocab_size)]
    if len(set(tokens)) < vocab_size:
        raise SlingshotError("two tokens of the tokenizer have the same text, which llama.cpp refuses")
    kinds = [TokenType.NORMAL if id in texts else TokenType.UNUSED for id in range(vocab_size)]
    for id, token in added.items():
        kinds[id] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ids, ends = {text: id for id, text in texts.items()}, sorted(tokenizer.eos_ids - {tokenizer.eos_id}, reverse=True)
    named = {key: ids.get(_content(tokenizer, f"{name}_token")) for name, key in NAMED_TOKENS.items()} | dict(
        zip(("eot", "eom"), ends, strict=False)
    )
    for key, id in named.items():
        if id is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", id)
    writer.add_add_bos_token(bool(tokenizer.begin_ids))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return [
        f"token {id} ends a generation too; of such tokens llama.cpp has places for three, not for this one"
        for id in ends[2:]
    ]


def _content(tokenizer: Tokenizer, key: str) -> Any:
    """The text of a token that tokenizer_config.json names, as a string or as an object that holds it."""
    token = tokenizer.config.get(key)
    return token.get("content") if isinstance(token, Mapping) else token
