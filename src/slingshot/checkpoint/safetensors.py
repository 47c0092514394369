"""The safetensors files of a checkpoint folder, one or many with their index: headers first, tensors when asked for.

    shards = Shards(folder)
    shards.headers["model.norm.weight"]                  # TensorHeader(dtype="BF16", shape=(7168,), file=..., ...)
    config, problems = fit(config, shards.headers, folder)    # what does not fit the architecture, a line each
    shards.read("lm_head.weight", slice(0, 1024))        # only these rows leave the disk
    write_shards(folder, tensors, max_shard_size=5e9)    # tensors: pairs of name and tensor, taken one at a time

Importing this and looking at headers needs no torch; `read` and `write_shards` do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from slingshot.base.errors import SlingshotError
from slingshot.base.files import inside, os_errors, read_json, read_span, write_json
from slingshot.checkpoint.layout import Spec, layout, tensor_count
from slingshot.model.config import ModelConfig
from slingshot.quantization.formats import PACKED, PACKED_SCALE, PACKED_SHAPE, SCALE, scale_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NEVER_READ = "is pickled, can run code when opened, and is never read"

# safetensors' names of the types that weights come in, torch's names, and bytes per number; then those of FP8's scales.
_WEIGHTS = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
}  # fmt: skip
_SCALES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F8_E8M0": ("float8_e8m0fnu", 1)}
_INTEGERS = {"I8": ("int8", 1), "U8": ("uint8", 1), "I32": ("int32", 4), "I64": ("int64", 8)}
DTYPES = _WEIGHTS | _SCALES | _INTEGERS


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor before its data: safetensors' dtype name, shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0


class Shards:
    """The tensors of a folder's safetensors files. Opening reads headers; `bytes_read` counts what is read since."""

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        """SlingshotError names the file that is missing, truncated or corrupt, or the tensor that two files hold."""
        self.bytes_read = 0
        self.headers: dict[str, TensorHeader] = {}
        index = read_index(folder) if single == SINGLE else {}
        for file in sorted(set(index.values())) if index else [single]:
            found = _headers(_shard(folder, file))
            if name := next(iter(found.keys() & self.headers.keys()), None):
                twice = f"{name} is in {self.headers[name].file.name} too; one of the two is from another checkpoint"
                raise SlingshotError(f"{folder / file}: {twice}")
            self.headers |= found
        for name, file in index.items():
            if name not in self.headers or self.headers[name].file.name != file:
                said = f"{file} holds {name}, which it does not; is it from another checkpoint?"
                raise SlingshotError(f"{folder / INDEX} says that {said}")

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor as stored, or these rows of it (dimension 0). SlingshotError when its type is none of `DTYPES`."""
        import torch

        header = self.headers[name]
        if header.dtype not in DTYPES:
            raise SlingshotError(f"{header.file}: {name} {_stored_as(header, DTYPES)}")
        dtype, size = DTYPES[header.dtype]
        shape, start = header.shape, header.offset
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
            start += rows.start * math.prod(shape[1:]) * size
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        read_span(header.file, start, tensor.reshape(-1).view(torch.uint8).numpy().data, name)
        self.bytes_read += tensor.nbytes
        return tensor


def fit(config: ModelConfig, headers: Mapping[str, TensorHeader], where: Path) -> tuple[ModelConfig, list[str]]:
    """The architecture as the files of the checkpoint at `where` hold it, and what does not fit it, a line each.

    A config.json that mentions an MTP module which the files have not (transformers drops it) is read without it.
    """
    found = list(_problems(config, headers, where))
    if found and config.num_nextn_predict_layers:
        without = config.model_copy(update={"num_nextn_predict_layers": 0})
        if next(_problems(without, headers, where), None) is None:
            return without, []
    return config, found


def _problems(config: ModelConfig, headers: Mapping[str, TensorHeader], where: Path) -> Iterator[str]:
    """What does not fit; the first missing tensor is the last to be named."""
    known = set()
    for spec in layout(config):
        known.add(spec.name)
        if spec.stored == "linear" and of_few_bits(headers, spec.name):
            known |= {spec.name + suffix for suffix in ("", PACKED, PACKED_SCALE, PACKED_SHAPE)}
            yield from _packed_problems(config, spec, headers)
            continue
        if spec.name not in headers:
            if spec.copy_of is None:
                counts = f"config.json asks for {tensor_count(config)} tensors, the files hold {len(headers)}"
                yield f"{where}: {spec.name} is missing; {counts}"
                return
            continue
        header = headers[spec.name]
        place = f"{header.file}: {spec.name}"
        if header.shape != spec.shape:
            yield f"{place} has shape {list(header.shape)}, config.json says {list(spec.shape)}"
        if header.dtype not in _WEIGHTS:
            yield f"{place} {_stored_as(header, _WEIGHTS)}"
        if header.dtype == "F8_E4M3":
            known.add(spec.name + SCALE)
            scale = headers.get(spec.name + SCALE)
            if scale is None or len(spec.shape) != 2 or scale.shape != scale_shape(spec.shape):
                yield f"{place} is stored in FP8 without the scales of its 128 x 128 blocks, {spec.name}{SCALE}"
            elif scale.dtype not in _SCALES:
                yield f"{scale.file}: {spec.name}{SCALE} {_stored_as(scale, _SCALES, 'FP8 scales')}"
    for name in sorted(headers.keys() - known):
        if not (name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")):
            yield f"{headers[name].file}: {name} is no tensor of this architecture; is config.json another model's?"


def of_few_bits(headers: Mapping[str, TensorHeader], name: str) -> bool:
    """Whether a matrix lies there as compressed-tensors stores it: packed, or as int8 numbers."""
    return name + PACKED in headers or (name in headers and headers[name].dtype == "I8")


def _packed_problems(config: ModelConfig, spec: Spec, headers: Mapping[str, TensorHeader]) -> Iterator[str]:
    """What does not fit of the parts that a matrix of few bits is stored in."""
    marked = headers[spec.name + PACKED if spec.name + PACKED in headers else spec.name]
    if (scheme := config.scheme) is None:
        yield f"{marked.file}: {spec.name} is packed, and config.json has no quantization_config of int8 or int4"
        return
    if spec.shape[1] % (scheme.group or 1):
        groups = f"rows of {spec.shape[1]} do not divide into groups of {scheme.group}"
        yield f"{marked.file}: {spec.name}{PACKED}: {groups}; is config.json another model's?"
        return
    for suffix, (dtype, shape) in scheme.parts(spec.name, spec.shape).items():
        header, types = headers.get(spec.name + suffix), tuple(_WEIGHTS) if dtype in ("", "F32") else (dtype,)
        if header is None:
            if suffix != PACKED_SHAPE:
                beside = "" if marked.dtype == "I8" else PACKED
                yield f"{marked.file}: {spec.name}{suffix} is missing beside {spec.name}{beside}"
        elif header.shape != shape:
            wanted = f"config.json says {list(shape)}"
            yield f"{header.file}: {spec.name}{suffix} has shape {list(header.shape)}, {wanted}"
        elif header.dtype not in types and suffix != PACKED_SHAPE:
            yield f"{header.file}: {spec.name}{suffix} {_stored_as(header, types, 'they')}"


def _stored_as(header: TensorHeader, known: Iterable[str], what: str = "weights") -> str:
    return f"is stored as {header.dtype}; {what} are read from {', '.join(known)}"


def read_index(folder: Path) -> dict[str, str]:
    """The index's map of tensors to files; empty where there is no index."""
    path = inside(folder, INDEX)
    if not path.exists():
        return {}
    raw = read_json(path)
    index = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise SlingshotError(f"{path} has no weight_map of tensors to files")
    return index


def _shard(folder: Path, name: str) -> Path:
    file = inside(folder, name)
    if file.is_file():
        return file
    if name not in (SINGLE, "adapter_model.safetensors"):
        raise SlingshotError(f"{folder / INDEX} names {name}, which is not there; is the download complete?")
    pickled = next((file.name for file in sorted(folder.glob("*")) if file.suffix in PICKLED), None)
    never = f"; {pickled} {NEVER_READ}: ask its maker for safetensors" if pickled else ""
    raise SlingshotError(f"{folder} holds no {name}{never}")


def _headers(file: Path) -> dict[str, TensorHeader]:
    """The headers of one file. The library checks them (sizes, offsets, the file's length); offsets are in the JSON."""
    try:
        with os_errors(f"cannot read {file}"), safe_open(file, framework="numpy"), file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            raw = json.loads(content.read(size))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise SlingshotError(f"{file} is no whole safetensors file: {error}; is the download complete?") from error
    raw.pop("__metadata__", None)
    return {
        name: TensorHeader(entry["dtype"], tuple(entry["shape"]), file, 8 + size + entry["data_offsets"][0])
        for name, entry in raw.items()
    }


class Unmade(NamedTuple):
    """A tensor that is made when its turn comes to be written, and let go then; what it will be is known before."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor | Unmade]], max_shard_size: float = 5e9) -> None:
    """Write named tensors into an existing folder: model.safetensors, or shards of `max_shard_size` bytes and an index.

    Tensors are taken one at a time and let go once their shard is written; a single larger one has a shard to itself.
    """
    shards: list[dict[str, int]] = []  # of each shard written: its tensors' sizes
    pending: dict[str, Tensor | Unmade] = {}

    def flush() -> None:
        write_tensors(folder / f"{len(shards)}.part", pending)
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    size = 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > max_shard_size:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
    flush()
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [SINGLE]
    for number, file in enumerate(files):
        (folder / f"{number}.part").replace(folder / file)
    if len(shards) > 1:
        total = sum(sum(shard.values()) for shard in shards)
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(file: Path, tensors: Mapping[str, Tensor | Unmade]) -> None:
    """One file of named tensors, each brought to the CPU, or made, as it is written.

    As the library lays it out, which wants all of them in memory: the widest numbers first, so that each is aligned.
    """
    import torch

    names = {dtype: name for name, (dtype, _) in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))
    header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with os_errors(f"cannot write {file}", "; free space there or choose another --out"):
        with file.open("wb") as content:
            content.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                made = (tensor.make() if isinstance(tensor, Unmade) else tensor).detach().cpu().contiguous()
                content.write(made.flatten().view(torch.uint8).numpy().data)
        file.chmod(file.parent.stat().st_mode & 0o666)  # who reads the folder reads it
