"""Calls of native/'s functions for training: tensors in, tensors out, on as many threads as torch has.

    if (native := native_for(x)) is not None:
        native("swiglu_forward", gate, up, ld, rows, width, y)

A kernel asks for each call; without a library, for another dtype or on another device it does the same with torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slingshot.kernels.native import native_kernels

NativeCall = Callable[..., None]


def native_for(x: Tensor) -> NativeCall | None:
    """The functions that take numbers of x's type, where there are any: each is called by its name."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    return _calls(os.environ.get("SLINGSHOT_NATIVE", ""), x.dtype == torch.bfloat16)


@cache
def _calls(level: str, is_bf16: bool) -> NativeCall | None:
    kernels = native_kernels(level or None)
    if kernels is None:
        return None
    doors: dict[str, Callable[..., Any]] = {}

    def call(name: str, *arguments: Tensor | float | None) -> None:
        door = doors.get(name) or doors.setdefault(name, kernels.door(name))
        door(int(is_bf16), *map(_as_c, arguments), torch.get_num_threads())

    return call


def _as_c(value: Tensor | float | None) -> Any:
    """Tensors as addresses, which the caller keeps alive during the call; whole numbers as long, others as float."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value)


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] whose numbers lie side by side in a row; rows may lie apart. A copy only where need be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or not rows.numel() else rows.contiguous()
