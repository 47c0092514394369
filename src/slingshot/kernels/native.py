"""The compiled kernels of native/: found, checked against the processor, and called through ctypes.

    kernels = native_kernels()               # at the processor's best level, or None: then torch does the work
    kernels.door("attend")(...)              # the C function slingshot_attend_<level>

`SLINGSHOT_NATIVE` chooses another level (avx2, avx512, avx512bf16, amx) or none (off).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError

LIBRARY = Path(__file__).parent / "slingshot_native.so"
LEVELS = ("avx2", "avx512", "avx512bf16", "amx")  # each has the instructions of those before it
SOURCES = Path(__file__).parents[3] / "native"  # in a source tree
ALIGNMENT = 64
GROUP_STEP = 32  # quantized weights share a scale in groups of a multiple of so many
FLOAT4 = 16 + 4  # bits of weights that are mxfp4's: native/quantized.h
SLACK = 4096  # bytes that kernels may read past the end of what they are given


class NativeKernels:
    """The library's functions at one level of instructions."""

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.library, self.level = library, level

    def door(self, name: str, result: Any = None) -> Callable[..., Any]:
        """The C function of this name; what it returns is a `result` (a ctypes type), by default nothing."""
        function: Callable[..., Any] = getattr(self.library, f"slingshot_{name}_{self.level}")
        function.restype = result  # type: ignore[attr-defined]
        return function

    def pack(self, weight_FD: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight matrix in the kernels' order, as bytes. float32 and bfloat16, from either."""
        rows, width = weight_FD.shape
        size = self.door("packed_bytes", ctypes.c_size_t)(int(dtype == torch.bfloat16), rows, width)
        packed = aligned_bytes(size)
        kinds = int(weight_FD.dtype == torch.bfloat16), int(dtype == torch.bfloat16)
        self.door("pack")(*kinds, pointer(weight_FD.contiguous()), rows, width, pointer(packed))
        return packed

    def matmul(self, x_ND: Tensor, packed: Tensor, out_features: int, threads: int = 1) -> Tensor:
        """x W^T in float32 for a packed weight of x's dtype: y_NF."""
        rows, width = x_ND.shape
        y_NF = torch.empty(rows, out_features)
        x = padded(x_ND)
        is_bf16 = int(x_ND.dtype == torch.bfloat16)
        self.door("matmul")(is_bf16, out_features, width, pointer(packed), pointer(x), rows, pointer(y_NF), threads)
        return y_NF


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous tensor on the CPU; it must outlive the call."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def aligned_bytes(size: int) -> Tensor:
    """Zeros, at a cache line, with the slack after them that kernels may read."""
    memory = torch.zeros(size + SLACK + ALIGNMENT, dtype=torch.uint8)
    return memory[-memory.data_ptr() % ALIGNMENT :]


def padded(tensor: Tensor) -> Tensor:
    """A contiguous copy with slack after its end."""
    copy = aligned_bytes(16 * tensor.shape[-1] * tensor.element_size() + tensor.nbytes).view(tensor.dtype)
    copy[: tensor.numel()] = tensor.flatten()
    return copy


def sources_digest(folder: Path) -> str:
    """Names the contents of native/, as setup.py does."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@cache
def native_library() -> ctypes.CDLL | None:
    """The library, if it is there and is ours; one that is not is named in a warning and left aside."""
    if not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.slingshot_sources.restype = ctypes.c_char_p
        built_from = library.slingshot_sources().decode()
    except (OSError, AttributeError) as error:
        warnings.warn(f"{LIBRARY} is no library of slingshot's and is left aside: {error}", stacklevel=2)
        return None
    if SOURCES.is_dir() and built_from != sources_digest(SOURCES):
        way_out = "pip install -e . builds it again"
        warnings.warn(f"{LIBRARY} was built from other sources and is left aside; {way_out}", stacklevel=2)
        return None
    return library


def native_levels() -> list[str]:
    """The levels that both this library and this processor have, the best one last."""
    library = native_library()
    if library is None:
        return []
    return [level for level in LEVELS[: library.slingshot_level()] if hasattr(library, f"slingshot_matmul_{level}")]


def native_kernels(level: str | None = None) -> NativeKernels | None:
    """The kernels at this level (default: what SLINGSHOT_NATIVE says, else the best there is), None without any.

    Raises SlingshotError for a level that is asked for and is not to be had.
    """
    asked = os.environ.get("SLINGSHOT_NATIVE", "") if level is None else level
    if asked == "off":
        return None
    if asked and asked not in LEVELS:
        raise SlingshotError(f"SLINGSHOT_NATIVE is {asked!r}; choose off, {', '.join(LEVELS)}")
    levels = native_levels()
    if asked and asked not in levels:
        found = f"this machine has {', '.join(levels)}" if levels else "no native library is built here"
        raise SlingshotError(f"native kernels at level {asked} are not to be had: {found}")
    library = native_library()
    return NativeKernels(library, asked or levels[-1]) if library is not None and levels else None
