"""GGUF files, llama.cpp's format: weights dequantised into a Transformer, and the tokenizer they carry.

    model = load_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), torch.float32)
    tokenizer = load_gguf_tokenizer(path)

Architecture llama with a byte-level BPE vocabulary split as SmolLM's; any tensor type `gguf` can dequantise (F32, F16, BF16, Q8_0, Q4_0,
Q4_1, the K-quants ...). Whatever would read differently than it was written is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from torch import Tensor

from slingshot.config import ModelConfig
from slingshot.data.tokenizer import Tokenizer
from slingshot.files import SlingshotError
from slingshot.model.checkpoint import from_hf_tensors
from slingshot.model.transformer import Transformer

# GGUF's names of modules and Hugging Face's; those of a block stand behind `blk.N.` and `model.layers.N.`.
_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_Value = TypeVar("_Value")


def load_gguf(path: Path, dtype: torch.dtype) -> Transformer:
    """The model of a .gguf file in `dtype`. SlingshotError names the file and the key or tensor that does not fit."""
    file = _File(path)
    config = _config(file)
    return from_hf_tensors(config, _tensors(file, config), str(path), dtype)


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer and chat template of a .gguf file. SlingshotError names the file and the key that does not fit."""
    file = _File(path)
    for key, known in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
        if (kind := file.get(key, str)) != known:
            raise SlingshotError(f"{path}: {key} {kind!r} is not supported, {known!r} is; give a checkpoint folder with its tokenizer.json instead")
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", list)
    added = {
        token: kind == TokenType.CONTROL for token, kind in zip(tokens, types, strict=False) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    config: dict[str, Any] = {"add_bos_token": file.get("tokenizer.ggml.add_bos_token", bool, False)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        if id >= len(tokens):
            raise SlingshotError(f"{path}: tokenizer.ggml.{key}_token_id {id} is beyond the {len(tokens)} tokens")
        if id >= 0:
            config[f"{name}_token"] = tokens[id]
    if template := file.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in file.get("tokenizer.ggml.merges", list))]
    try:
        return Tokenizer.from_bpe({token: id for id, token in enumerate(tokens)}, merges, added, config)
    except Exception as error:  # the Rust side raises plain Exception
        raise SlingshotError(f"{path}: tokenizer.ggml.tokens and .merges make no tokenizer: {error}") from error


class _File:
    """A GGUF file: its keys by type, its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = GGUFReader(path)
        except OSError as error:
            raise SlingshotError(f"cannot read {path}: {error.strerror or error}") from error
        except Exception as error:  # a parser of foreign bytes: whatever it raises, the file is not what it should be
            raise SlingshotError(f"{path} is no whole GGUF file: {error}; is the download complete?") from error
        self._fields = reader.fields
        self.tensors: list[ReaderTensor] = reader.tensors

    def get(self, key: str, kind: type[_Value], default: _Value | None = None) -> _Value:
        """The value of a key; SlingshotError when it is missing and has no default, or is of another type."""
        if key not in self._fields:
            if default is None:
                raise SlingshotError(f"{self.path}: the key {key} is missing; slingshot reads models of architecture llama as llama.cpp writes them")
            return default
        try:
            value = self._fields[key].contents()
        except ValueError as error:
            raise SlingshotError(f"{self.path}: {key} is not UTF-8 text: {error}") from error
        if type(value) is not kind:
            raise SlingshotError(f"{self.path}: {key} must be of type {kind.__name__}, got {value!r:.80}")
        return value


def _config(file: _File) -> ModelConfig:
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise SlingshotError(f"{file.path}: general.architecture {architecture!r} is not supported, 'llama' is; give a checkpoint folder instead")
    names = {tensor.name for tensor in file.tensors}
    heads, width = file.get("llama.attention.head_count", int), file.get("llama.embedding_length", int)
    values: dict[str, Any] = {
        "family": "dense",
        "vocab_size": len(file.get("tokenizer.ggml.tokens", list)),
        "hidden_size": width,
        "intermediate_size": file.get("llama.feed_forward_length", int),
        "num_hidden_layers": file.get("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", int, heads),
        "head_dim": file.get("llama.attention.key_length", int, width // max(heads, 1)),
        "max_position_embeddings": file.get("llama.context_length", int),
        "rms_norm_eps": _shortest(file.get("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(file.get("llama.rope.freq_base", float, 10000.0)),
        "tie_word_embeddings": "output.weight" not in names,
    }
    config = ModelConfig.parse(values, str(file.path))
    implied: dict[str, Any] = {
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
    }
    for key, value in implied.items():
        if (given := file.get(key, type(value), value)) != value:
            raise SlingshotError(f"{file.path}: {key} {given!r} is not supported, {value!r} is")
    return config


def _shortest(value: float) -> float:
    """The decimal number that was written as this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tensors(file: _File, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's name and float32 values of every tensor, one at a time."""
    for tensor in file.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        module = _BLOCK_MODULES.get(block[2]) if block else _MODULES.get(tensor.name.removesuffix(".weight"))
        if module is None:
            raise SlingshotError(f"{file.path}: the tensor {tensor.name} is not part of a plain llama model; give a checkpoint folder instead")
        try:
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except NotImplementedError as error:
            raise SlingshotError(
                f"{file.path}: {tensor.name} is of type {tensor.tensor_type.name}, which cannot be dequantised; give F16 or Q8_0"
            ) from error
        name = f"model.layers.{block[1]}.{module}.weight" if block else f"{module}.weight"
        if name.endswith(("q_proj.weight", "k_proj.weight")) and len(values) % config.head_dim == 0:
            values = _half_split(values, config.head_dim)
        yield name, values


def _half_split(weight_FD: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k back in Hugging Face's order: llama.cpp interleaves the two halves of every head, so that rotated pairs are neighbours.

    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    return weight_FD.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight_FD.shape)
