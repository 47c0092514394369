"""Checkpoints in the Hugging Face layout: config.json, safetensors files (with an index for several), tokenizer.

    model = load_model("runs/tiny/zero", dtype=torch.float32)       # a folder, or a .gguf file
    save_checkpoint(folder, model, tokenizer)
    weights = open_weights(folder)                                   # one tensor at a time, without a model
    weights.read("model.layers.3.mlp.experts.7.up_proj.weight")

Tensor names are Hugging Face's (layout.py). Expert matrices, stacked in the module, are one tensor per expert in the
file; the MTP module is layer `num_hidden_layers` with its copies of embedding and head, as DeepSeek released it. FP8
matrices are read through their block scales. Reading and writing go piece by piece: neither needs more memory than the
model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.adapter import Adapter, described_by, is_adapter
from slingshot.checkpoint.description import check_tokenizer, folder_tokenizer, load_config, write_description
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.layout import Spec, layout, packed_layout, place
from slingshot.checkpoint.safetensors import DTYPES, Shards, Unmade, fit, of_few_bits, write_shards
from slingshot.kernels.native import FLOAT4
from slingshot.machine.device import dtype_name
from slingshot.model.config import ModelConfig
from slingshot.model.dynamic import multiply_whole_numbers
from slingshot.model.transformer import Transformer, local_part
from slingshot.quantization import mxfp4
from slingshot.quantization.formats import BITS, FP8_BLOCK, PACKED, PACKED_SCALE, SCALE
from slingshot.quantization.fp8 import dequantize
from slingshot.quantization.integers import WeightGrid, from_numbers, unpack
from slingshot.text.tokenizer import Tokenizer

_PIECE = 2**23  # numbers read at a time: 32 MiB in float32


class StoredWeights(Protocol):
    """Named tensors of an architecture, wherever they lie, to be loaded into a model or written in another format."""

    config: ModelConfig
    dtype: str  # torch's name of the type that most are stored in, float32 where files know other types

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of `layout(config)` in float32 or in its own 16-bit type, or these rows of it (dimension 0)."""

    def where(self, name: str) -> Path:
        """The file a tensor lies in, for messages."""


def open_weights(path: Path | str) -> StoredWeights:
    """The weights of a checkpoint: a folder, an adapter's with its base, or a .gguf file.

    SlingshotError names what does not fit its configuration.
    """
    path = locate(path)
    if is_adapter(path):
        return AdaptedWeights(Adapter(path))
    if path.suffix == ".gguf":
        from slingshot.checkpoint.gguf.read import GGUFWeights

        return GGUFWeights(path)
    return FolderWeights(path)


class FolderWeights:
    """The weights of a folder; `config` is without an MTP module that the files have not."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise SlingshotError(f"{path} is not a checkpoint folder, which holds config.json and model.safetensors")
        config = load_config(path)
        self.shards = Shards(path)
        self.config, problems = fit(config, self.shards.headers, path)
        if problems:
            raise SlingshotError(problems[0])
        self.dtype = DTYPES[self.shards.headers["model.norm.weight"].dtype][0]  # which FP8 does not touch

    def where(self, name: str) -> Path:
        return self.shards.headers[name + PACKED if name + PACKED in self.shards.headers else name].file

    def is_packed(self, name: str) -> bool:
        """Whether a matrix is stored as whole numbers of few bits."""
        return of_few_bits(self.shards.headers, name) and self.config.quantization != "mxfp4"

    def scales(self, name: str, rows: slice | None = None) -> Tensor | None:
        """Scales [F, G] of a matrix of few bits, or of these rows of it; mxfp4's are of its values doubled, which are
        whole. None where it is no such one."""
        if not of_few_bits(self.shards.headers, name):
            return None
        scales_FG = self.shards.read(name + PACKED_SCALE, rows)
        return mxfp4.powers(scales_FG) / 2 if self.config.quantization == "mxfp4" else scales_FG.float()

    def packed(self, name: str, rows: slice | None = None) -> tuple[Tensor, Tensor] | None:
        """Numbers (int8) and scales of a matrix of whole numbers, or of these rows of it; None where it is none."""
        scheme, scales_FG = self.config.scheme, self.scales(name, rows)
        if scheme is None or scales_FG is None or not self.is_packed(name):
            return None
        if scheme.kind == "int8-dynamic":
            return self.shards.read(name, rows), scales_FG
        width = scales_FG.shape[1] * scheme.group
        return unpack(self.shards.read(name + PACKED, rows), scheme.bits(name), width), scales_FG

    def stored(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Words or e4m3 numbers of a matrix and their scales, as they are stored; None where it has none."""
        if self.is_packed(name) and self.config.quantization in BITS:
            return self.shards.read(name + PACKED), self.shards.read(name + PACKED_SCALE)
        if name + SCALE in self.shards.headers:
            return self.shards.read(name), self.shards.read(name + SCALE).float()
        return None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name + PACKED in self.shards.headers and self.config.quantization == "mxfp4":
            return mxfp4.dequantize(*(self.shards.read(name + suffix, rows) for suffix in (PACKED, PACKED_SCALE)))
        if (packed := self.packed(name, rows)) is not None:
            return from_numbers(*packed)
        tensor = self.shards.read(name, rows)
        if tensor.dtype == torch.float8_e4m3fn:
            first = rows.start if rows else 0
            blocks = slice(first // FP8_BLOCK, -(-(first + len(tensor)) // FP8_BLOCK))
            tensor = dequantize(tensor, self.shards.read(name + SCALE, blocks).float(), first % FP8_BLOCK)
        return tensor.float() if tensor.dtype == torch.float64 else tensor


class AdaptedWeights:
    """The weights of an adapter's base, changed by it as they are read."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self._base = adapter, open_weights(adapter.base)
        self.over = self._base.config.quantization  # what the base's matrices are stored in
        self.config, self.dtype = self._base.config.stored_as(None), self._base.dtype
        self._changes = adapter.changes(adapter.fit(self.config))

    def where(self, name: str) -> Path:
        return self._base.where(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._base.read(name, rows)
        if name not in self._changes:
            return tensor
        a_RD, b_FR, scale = self._changes[name]
        return tensor.float().addmm_(b_FR if rows is None else b_FR[rows], a_RD, alpha=scale)


def refuse_merged_numbers(weights: StoredWeights) -> None:
    """SlingshotError for an adapter whose base is quantised: a sum would be rounded where neither part was trained."""
    if isinstance(weights, AdaptedWeights) and weights.over:
        file, base = weights.adapter.file, weights.adapter.base
        full = f"write the model that {base} was quantised from as base_model_name_or_path into {file}"
        dense = f"slingshot convert {base} DENSE --dtype bfloat16, and write DENSE there"
        raise SlingshotError(f"{file.parent} changes {weights.over} numbers and is not merged: {full}; or {dense}")


def load_weights(model: Transformer, weights: StoredWeights) -> None:
    """Fill a model's parameters and router biases, piece by piece; of a sharded one (a DTensor) this rank's rows."""
    _fill({name: local_part(tensor) for name, tensor in model.state_dict().items()}, weights)


def load_part(module: nn.Module, weights: StoredWeights, prefix: str) -> None:
    """Give a part of a model that was made without memory its weights in float32, those whose names begin so."""
    module.to_empty(device="cpu")
    _fill({prefix + name: (tensor, 0) for name, tensor in module.state_dict().items()}, weights)


def _fill(state: Mapping[str, tuple[Tensor, int]], weights: StoredWeights) -> None:
    """Tensors by their names in a model, and the first row that each has of them."""
    for spec in layout(weights.config):
        if spec.copy_of is not None:
            continue
        name, index = place(spec.name)
        if name not in state:  # the model holds it as it is stored, or is a part of one
            continue
        target, first = state[name]
        if index:  # one expert's matrix within the stack
            if not first <= index[0] < first + len(target):
                continue
            target, first = target[index[0] - first][index[1:]], 0
        read_into(target, weights, spec, first)


def read_into(target: Tensor, weights: StoredWeights, spec: Spec, first: int = 0) -> None:
    """Fill `target`, of any dtype, with a tensor's rows from `first` on, holding no more than a piece of it besides."""
    for rows in pieces(spec, first, first + len(target)):
        piece = target[rows.start - first : rows.stop - first]
        piece.copy_(weights.read(spec.copy_of or spec.name, rows))
        if not torch.stack(piece.aminmax()).isfinite().all():  # NaN is the least and the most of what it is among
            where, dtype = weights.where(spec.copy_of or spec.name), dtype_name(target.dtype)
            raise SlingshotError(f"{where}: {spec.name} holds NaN or infinite values in {dtype}")


def pieces(spec: Spec, start: int, stop: int) -> Iterator[slice]:
    """Rows start to stop of a tensor in pieces of at most `_PIECE` numbers, whole FP8 blocks where possible."""
    rows = max(1, _PIECE // math.prod(spec.shape[1:]))
    rows = rows // FP8_BLOCK * FP8_BLOCK or rows
    return (slice(first, min(first + rows, stop)) for first in range(start, stop, rows))


def load_model(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shard: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """Load a checkpoint folder or a .gguf file in `dtype`; routers stay float32.

    The model is made on the meta device and filled piece by piece. `shard` splits the still empty model over ranks
    (Parallel.shard): each then reads only the bytes it keeps. SlingshotError names the file and tensor that do not fit.
    """
    weights = open_weights(path)
    config = weights.config.stored_as(None)
    model = Transformer.empty(config, device, dtype, shard)
    load_weights(model, weights)
    return model


def load_grid(path: Path | str) -> WeightGrid | None:
    """Bits and scales of the matrices that a checkpoint has as whole numbers; None where it has none.

    Experts have the most bits that one of their layer has.
    """
    weights = open_weights(path)
    scheme = weights.config.scheme
    if not isinstance(weights, FolderWeights) or scheme is None:
        return None
    bits, scales, plain = dict[str, int](), dict[str, Tensor](), set[str]()
    for spec in packed_layout(weights.config):
        name, index = place(spec.name)
        if (own_FG := weights.scales(spec.name)) is None or not own_FG.all():
            plain.add(name)
            continue
        its = FLOAT4 if scheme.kind == "mxfp4" else scheme.bits(spec.name)
        bits[name] = max(bits.get(name, 0), its)
        stack = (weights.config.n_routed_experts, 2)[: len(index)]
        scales.setdefault(name, torch.empty(*stack, *own_FG.shape))[index] = own_FG
    kept = scales.keys() - plain
    return WeightGrid({n: bits[n] for n in kept}, scheme.group, {n: scales[n] for n in kept}) if kept else None


def load_as_stored(
    path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Transformer, WeightGrid | None]:
    """As `load_model`, for inference: an int8-dynamic checkpoint's matrices multiply whole numbers. And the grid of
    others, for kernels that keep it."""
    model, grid = load_model(path, dtype, device), load_grid(path)
    if grid is None or grid.group:
        return model, grid
    multiply_whole_numbers(model, grid)
    return model, None


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer and chat template of a folder or .gguf file. SlingshotError when it has more ids than the model."""
    path = locate(path)
    if path.suffix == ".gguf":
        from slingshot.checkpoint.gguf.file import GGUFFile
        from slingshot.checkpoint.gguf.tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(GGUFFile(path))
    if is_adapter(path) and not (path / "tokenizer.json").exists():
        return load_tokenizer(described_by(path))
    tokenizer = folder_tokenizer(path)
    if (path / "config.json").exists():
        check_tokenizer(tokenizer, load_config(path).vocab_size, path)
    return tokenizer


def hf_tensors(
    config: ModelConfig, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Unmade]]:
    """A model's state under Hugging Face's names, the MTP module's copies of embedding and head included, as views.

    like: tensors of the same types under the same names, where those of `state` are made when they are asked for.
    """
    for spec in layout(config):
        name, index = place(spec.copy_of or spec.name)
        dtype = (state if like is None else like)[name].dtype
        yield spec.name, Unmade(dtype, spec.shape, partial(_part, state, name, index))


def _part(state: Mapping[str, Tensor], name: str, index: tuple[int, ...]) -> Tensor:
    return state[name].detach()[index]


def save_checkpoint(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    state: Mapping[str, Tensor] | None = None,
    max_shard_size: float = 5e9,
    source: Path | None = None,
) -> None:
    """Write model (or `state`, its gathered weights) and tokenizer into an existing folder; the caller makes it atomic.

    source: the checkpoint that the model was made from, whose generation_config.json is passed on.
    """
    own = model.state_dict()
    write_shards(folder, hf_tensors(model.config, own if state is None else state, like=own), max_shard_size)
    write_description(
        folder, model.config, tokenizer, dtype_name(own["model.norm.weight"].dtype), source and described_by(source)
    )
