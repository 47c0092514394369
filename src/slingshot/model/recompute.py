"""Memory for time: what a function's backward pass needs is computed again there instead of kept.

    y = recomputed(block, x, context)        # the same numbers and gradients as block(x, context); x alone is kept
    y = recomputed_cheaply(block, x, context)   # all but what was said within block to be made again from what is kept:
    h = remade(swiglu(gate_up), swiglu, gate_up)

`recomputed` is as torch.utils.checkpoint without reentrance, whose first call imports torch's compiler: 150 MiB and
seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Enough(Exception):
    """All that was asked for is computed: what comes after it would be thrown away."""


def recomputed(function: Callable[..., Any], *given: Any) -> Any:
    """function(*given), of which only `given` is kept. It must compute the same again, and draw nothing at random."""
    count = 0
    found: list[Tensor] = []

    def number(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1

    def keep(tensor: Tensor) -> Any:  # nothing of the second graph is ever asked for
        found.append(tensor.detach())
        if len(found) == count:
            raise _Enough

    def back(index: int) -> Tensor:
        if not found:
            try:
                with torch.enable_grad(), saved_tensors_hooks(keep, lambda kept: kept):
                    function(*given)
            except _Enough:
                pass
        return found[index]

    with saved_tensors_hooks(number, back):
        return function(*given)


class _Part(NamedTuple):
    """A tensor within the storage of one that is made again."""

    whole: _Remade
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any  # int


@dataclass
class _Remade:
    """function(*given), made when it is first asked for and held until all who kept it have asked."""

    function: Callable[..., Tensor]
    given: list[Any]
    original: weakref.ref[Tensor]  # while it lives, its storage is no other's
    users: int = 0
    held: Tensor | None = field(default=None, repr=False)

    def value(self) -> Tensor:
        if self.held is None:
            with torch.enable_grad():  # as it was made at first: without gradients other kernels may do it
                self.held = self.function(*map(_unpacked, self.given)).detach()
        value, self.users = self.held, self.users - 1
        if self.users < 1:
            self.held = None
        return value


_CHEAP: ContextVar[dict[int, _Remade] | None] = ContextVar("_CHEAP", default=None)  # by the address of the storage


def recomputed_cheaply(function: Callable[..., Any], *given: Any) -> Any:
    """function(*given), of which all is kept but what `remade` names."""
    before = _CHEAP.set({})
    try:
        with saved_tensors_hooks(_packed, _unpacked):
            return function(*given)
    finally:
        _CHEAP.reset(before)


def remade(result: Tensor, function: Callable[..., Tensor], *given: Any) -> Tensor:
    """`result`, which is function(*given), to the bit, and cheap to make. Within `recomputed_cheaply` `given` is kept
    instead."""
    if (cheap := _CHEAP.get()) is not None and torch.is_grad_enabled():
        packed = [_packed(each) if isinstance(each, Tensor) else each for each in given]
        cheap[result.untyped_storage().data_ptr()] = _Remade(function, packed, weakref.ref(result))
    return result


def _packed(tensor: Tensor) -> Any:
    if type(tensor) is Tensor and (cheap := _CHEAP.get()):
        found = cheap.get(tensor.untyped_storage().data_ptr())
        if found is not None and found.original() is not None:
            found.users += 1
            return _Part(found, tensor.size(), tensor.stride(), tensor.storage_offset())
    return tensor.detach()  # one that its own function gave would hold itself


def _unpacked(packed: Any) -> Any:
    return packed.whole.value().as_strided(*packed[1:]) if isinstance(packed, _Part) else packed
