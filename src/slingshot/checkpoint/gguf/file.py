"""The GGUF container, llama.cpp's format: keys with values, and tensors. No torch.

    file = GGUFFile(Path("DeepSeek-V3-Q4_K_M-00001-of-00009.gguf"))     # the first of several parts stands for all
    file.get("deepseek2.block_count", int)
    tensor = file.tensors["token_embd.weight"]                          # its kind (Q8_0, ...), shape, file and offset
    file.read(tensor, 0, 10)                                            # bytes of ten rows

Opening reads the header. Every count in it is held against the bytes that are there before anything is made of it, so a
broken or hostile file costs no more than a header of 64 MiB (the gguf package's reader believes every count, and takes
seconds for a vocabulary).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slingshot.base.errors import SlingshotError
from slingshot.base.files import os_errors, read_span

_HEADER_LIMIT = 2**26  # bytes; a vocabulary of 262,144 tokens and its merges take 15 million
_MAX_DIMENSIONS = 4  # ggml's

# The format's numbers of its types, with struct's and numpy's letters for them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class GGUFTensor:
    """What a header says of a tensor. shape: [out, in] for matrices, experts in front; a row is the last dimension."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFFile:
    """The keys and tensors of a .gguf file, or of all parts of a model that is split over several."""

    def __init__(self, path: Path) -> None:
        """SlingshotError names the file, and the tensor or part that is not as it should be."""
        self.path = path
        header = _open_header(path)
        self.keys, self.tensors = header.keys, header.tensors
        parts = self.get("split.count", int, 1)
        if parts < 2:
            return
        suffix = f"-00001-of-{parts:05d}.gguf"
        if not path.name.endswith(suffix):
            raise SlingshotError(f"{path} is one of {parts} parts; give the first, whose name ends in {suffix}")
        for part in range(2, parts + 1):
            name = path.name.removesuffix(suffix) + suffix.replace("-00001-", f"-{part:05d}-")
            self.tensors |= _open_header(path.with_name(name)).tensors

    def get(self, key: str, kind: type[_Value], default: _Value | None = None) -> _Value:
        """The value of a key; SlingshotError when it is missing and has no default, or is of another type."""
        value = self.keys.get(key, default)
        if value is None:
            raise SlingshotError(f"{self.path}: the key {key} is missing; llama.cpp's converter writes it")
        if type(value) is not kind:
            raise SlingshotError(f"{self.path}: {key} must be of type {kind.__name__}, got {value!r:.80}")
        return value

    def read(self, tensor: GGUFTensor, first: int, count: int) -> np.ndarray:
        """The bytes of `count` rows of a tensor from row `first` on, uint8 [count, row_bytes]."""
        data = np.empty((count, tensor.row_bytes), dtype=np.uint8)
        read_span(tensor.file, tensor.offset + first * tensor.row_bytes, data.reshape(-1).data, "its tensors")
        return data


def read_header(data: bytes | mmap.mmap, length: int, path: Path) -> GGUFHeader | None:
    """The header of a file of `length` bytes that begins with `data`; None when more of them are needed."""
    try:
        return GGUFHeader(data, length, path)
    except _CutOffError:
        return None
    except ValueError as error:
        raise SlingshotError(f"{path} is no whole GGUF file: {error}; is the download complete?") from error


def _open_header(path: Path) -> GGUFHeader:
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        if not (length := path.stat().st_size):
            raise SlingshotError(f"{path} is no whole GGUF file: it is empty; is the download complete?")
        with mmap.mmap(file.fileno(), min(length, _HEADER_LIMIT), access=mmap.ACCESS_READ) as data:
            header = read_header(data, length, path)
    assert header is not None  # all bytes that it may take were there
    return header


class _CutOffError(ValueError):
    """The bytes at hand end within the header, the file does not."""


class GGUFHeader:
    """The first bytes of a file, read from front to back; ValueError says what is wrong with them."""

    def __init__(self, data: bytes | mmap.mmap, length: int, path: Path) -> None:
        self._data, self._at, self._length = data, 4, min(length, _HEADER_LIMIT)
        if data[:4] != b"GGUF":
            raise ValueError(f"it begins with {data[:4]!r}, not with b'GGUF'")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are read, little-endian")
        n_tensors, n_keys = self._number("Q"), self._number("Q")
        self.keys: dict[str, Any] = {}
        for _ in range(n_keys):  # however many are claimed: it ends with the bytes
            key = self._text()
            if key in self.keys:
                raise ValueError(f"it has the key {key!r:.80} twice")
            self.keys[key] = self._value(self._number("I"))
        alignment = self.keys.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r:.80} is no power of two")
        self.tensors: dict[str, GGUFTensor] = {}
        for _ in range(n_tensors):
            name = self._text()
            if name in self.tensors:
                raise ValueError(f"it has the tensor {name!r:.80} twice")
            self.tensors[name] = self._tensor(f"its tensor {name!r:.80}", path)
        start = -(-self._at // alignment) * alignment
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor = replace(tensor, offset=start + tensor.offset)
            if tensor.offset % alignment or tensor.offset + tensor.nbytes > length:
                raise ValueError(f"its tensor {name!r:.80} does not lie where it says")

    def _tensor(self, what: str, path: Path) -> GGUFTensor:
        if not 1 <= (n_dimensions := self._number("I")) <= _MAX_DIMENSIONS:
            raise ValueError(f"{what} has {n_dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(n_dimensions))[::-1]
        number, offset = self._number("I"), self._number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ValueError(f"{what} is of the unknown type {number}") from error
        if not math.prod(shape) or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"{what} has the shape {list(shape)}, impossible for {kind.name}")
        return GGUFTensor(kind, shape, path, offset)

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > self._length:
            cut = self._length < _HEADER_LIMIT
            raise ValueError("it ends within its header" if cut else f"its header exceeds {_HEADER_LIMIT} bytes")
        if self._at > len(self._data):
            raise _CutOffError
        return self._data[start : self._at]

    def _number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self._bytes(struct.calcsize("<" + letter)))[0]

    def _count(self, smallest: int) -> int:
        """A number of entries to come, of at least `smallest` bytes each."""
        count: int = self._number("Q")
        if count * smallest > self._length - self._at:
            raise ValueError(f"it claims {count} entries where {self._length - self._at} bytes follow")
        return count

    def _text(self) -> str:
        return self._bytes(self._count(1)).decode()

    def _value(self, kind: int) -> Any:
        """Numbers, bools and texts as Python's; several texts as a list, several numbers as a numpy array."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        inner = self._number("I") if kind == _ARRAY else None
        if inner == _STRING:
            return [self._text() for _ in range(self._count(8))]
        if inner not in _SCALARS:
            raise ValueError(f"it has a value of the unknown type {kind}" + (f" of {inner}" if kind == _ARRAY else ""))
        dtype = np.dtype("<" + _SCALARS[inner])
        return np.frombuffer(self._bytes(self._count(dtype.itemsize) * dtype.itemsize), dtype=dtype)
