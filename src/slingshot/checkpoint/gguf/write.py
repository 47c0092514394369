"""GGUF files, written for llama.cpp: the weights of a checkpoint and its tokenizer in one file.

    notes = write_gguf(Path("tiny.gguf"), open_weights("runs/tiny/zero"), load_tokenizer("runs/tiny/zero"), "bfloat16")

Tensors are read, converted and written one after the other, piece by piece. What llama.cpp does not compute as the
checkpoint's config.json says is refused before anything is written. An int4 or int8 checkpoint's matrices become q4_0
or q8_0 without being rounded again.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, GGUFWriter, LlamaFileType
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.config import architecture, llama3_factors, problems, write_keys
from slingshot.checkpoint.gguf.names import ROPE_FREQS, kv_b_parts, place
from slingshot.checkpoint.gguf.read import PLAIN
from slingshot.checkpoint.gguf.tokenizer import add_tokenizer
from slingshot.checkpoint.layout import Spec, layout
from slingshot.checkpoint.load_save import FolderWeights, StoredWeights
from slingshot.quantization.ggml_blocks import BLOCK, blocks
from slingshot.text.tokenizer import Tokenizer

Dtype = Literal["float32", "float16", "bfloat16", "q8_0"]

_KINDS = {
    "float32": (Kind.F32, LlamaFileType.ALL_F32),
    "float16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_BLOCKS = {4: Kind.Q4_0, 8: Kind.Q8_0}  # of so many bits
_BLOCK_FILES = {"int4": LlamaFileType.MOSTLY_Q4_0, "int8": LlamaFileType.MOSTLY_Q8_0}
_LARGEST = {kind: torch.finfo(dtype).max for kind, dtype in PLAIN.items()} | {Kind.Q8_0: 127 * 65504.0}
_VALUE_TYPES = {
    int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING, bool: GGUFValueType.BOOL,
}  # fmt: skip
PIECE = 2**22  # numbers read, converted and written at a time


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


def write_gguf(file: Path, weights: StoredWeights, tokenizer: Tokenizer, dtype: Dtype | None) -> list[str]:
    """Write a checkpoint's weights and tokenizer, whole or not at all. Returns what is not as asked, a line each.

    Matrices are of `dtype`; norms, biases and routers stay float32. None: bfloat16, but packed matrices of an int4 or
    int8 checkpoint q4_0 or q8_0 of the same numbers. In q8_0 a matrix whose rows do not fill blocks of
    32 is float16 instead, as in llama.cpp's own converter. SlingshotError when llama.cpp has no place for the
    architecture, the tokenizer or a value.
    """
    config, (kind, file_type) = weights.config, _KINDS[dtype or "bfloat16"]
    packed = dtype is None and isinstance(weights, FolderWeights) and config.quantization in _BLOCK_FILES
    if packed:
        file_type = _BLOCK_FILES[config.quantization or ""]
        if config.quantization_group_size % BLOCK:
            groups = f"groups of {config.quantization_group_size} are no whole blocks of {BLOCK}"
            raise SlingshotError(f"{file}: {groups}; give --dtype bfloat16 or q8_0")
    if problem := next(problems(config), None):
        raise SlingshotError(f"{file}: llama.cpp does not compute this model: {problem}")
    name = architecture(config)
    writer = GGUFWriter(None, name)
    writer.add_name(file.stem.encode(errors="replace").decode())
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in write_keys(config).items():
        writer.add_key_value(f"{name}.{key}", value, _VALUE_TYPES[type(value)])
    try:
        notes = add_tokenizer(writer, tokenizer, config.vocab_size)
    except SlingshotError as error:
        raise SlingshotError(f"{file}: {error}") from error
    parts = list(_parts(weights, kind, packed))
    if short := [part.name for part in parts if kind == Kind.Q8_0 and part.kind == Kind.F16]:
        why = "their rows do not fill q8_0's blocks of 32"
        notes.append(f"{len(short)} matrices, {short[0]} the first, are float16: {why}")
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
        raise SlingshotError(f"{file}: the chat template holds half a surrogate pair: {error}") from error
    except OSError as error:
        why = f"{error.strerror or error}; free space there or choose another place"
        raise SlingshotError(f"cannot write {file}: {why}") from error
    finally:
        for tidy in (writer.close, temporary.unlink):
            with contextlib.suppress(OSError):
                tidy()


def _converted(piece: Tensor, kind: Kind) -> np.ndarray:
    """The bytes of some rows in the file's type, uint8; ValueError when there are none for a value.

    What is uint8 is such bytes already.
    """
    if piece.dtype == torch.uint8:
        return piece.contiguous().numpy()
    if not math.isfinite(largest := piece.abs().max().item()):
        raise ValueError("holds NaN or infinite values")
    if largest > _LARGEST[kind]:
        raise ValueError(f"holds values too large for {kind.name}; bfloat16 has room")
    if kind == Kind.Q8_0:
        return np.ascontiguousarray(gguf.quants.quantize(piece.float().numpy(), Kind.Q8_0))
    return piece.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy()


def _parts(weights: StoredWeights, kind: Kind, packed: bool) -> Iterator[_Part]:
    """Every tensor of the file, without the MTP module's copies of embedding and head: llama.cpp takes the model's.

    packed: matrices that the checkpoint has packed are written as blocks of the same numbers.
    """
    config = weights.config
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        yield _Part(ROPE_FREQS, (config.head_dim // 2,), Kind.F32, lambda: iter([(ROPE_FREQS, llama3_factors(config))]))
    for spec in layout(config):
        name, expert = place(spec.name)
        if spec.copy_of or expert:
            continue  # a later expert stands in the stack of the first
        if spec.name.endswith("kv_b_proj.weight"):
            yield from _kv_b_proj(weights, spec, kind)
            continue
        exact = len(spec.shape) == 1 or spec.name.endswith("mlp.gate.weight")
        stored = Kind.F32 if exact else _fitting(kind, spec.shape[-1])
        names, shape = [spec.name], spec.shape
        if expert == 0:
            names = [spec.name.replace(".experts.0.", f".experts.{i}.") for i in range(config.n_routed_experts)]
            shape = (len(names), *shape)
        rotated = architecture(config) == "llama" and spec.name.endswith(("q_proj.weight", "k_proj.weight"))
        read = weights.read
        if packed and isinstance(weights, FolderWeights) and all(map(weights.is_packed, names)):
            assert config.scheme is not None
            bits = config.scheme.bits(spec.name)
            stored, read = _BLOCKS[bits], partial(_blocks, weights, bits)
        yield _Part(name, shape, stored, partial(_rows, read, names, spec.shape, config.head_dim if rotated else 0))


def _blocks(weights: FolderWeights, bits: int, name: str, rows: slice) -> Tensor:
    """The bytes of a packed matrix's rows."""
    packed = weights.packed(name, rows)
    assert packed is not None, name
    try:
        return blocks(*packed, bits)
    except ValueError as error:
        raise SlingshotError(f"{weights.where(name)}: {name} {error}") from error


def _fitting(kind: Kind, width: int) -> Kind:
    return Kind.F16 if width % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _rows(
    read: Callable[[str, slice], Tensor], names: list[str], shape: tuple[int, ...], head: int
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one shape after each other, some rows at a time. `head` rows of llama's q or k, unless 0, are put as
    llama.cpp rotates them: row j of a head's first half, then row j of its second."""
    unit = head or 1
    count = max(1, PIECE // math.prod(shape[1:]) // unit) * unit
    for name in names:
        for start in range(0, shape[0], count):
            rows = read(name, slice(start, min(start + count, shape[0])))
            yield name, rows.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2) if head else rows


def _kv_b_proj(weights: StoredWeights, spec: Spec, kind: Kind) -> Iterator[_Part]:
    """Keys [H, K, N], transposed so that llama.cpp can absorb them into the queries, and values [H, V, K]."""
    config = weights.config
    heads, latent, width = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    key, value = kv_b_parts(place(spec.name)[0])

    def part(keys: bool) -> Iterator[tuple[str, Tensor]]:
        rows_HXK = weights.read(spec.name).unflatten(0, (heads, -1))
        yield spec.name, (rows_HXK[:, :width].transpose(1, 2) if keys else rows_HXK[:, width:]).flatten(0, 1)

    yield _Part(key, (heads, latent, width), _fitting(kind, width), partial(part, True))
    yield _Part(value, (heads, config.v_head_dim, latent), _fitting(kind, latent), partial(part, False))
