"""Memory for time: what a function's backward pass needs is computed again there instead of kept.

    y = recomputed(block, x, context)        # the same numbers and gradients as block(x, context)

As torch.utils.checkpoint without reentrance, whose first call imports torch's compiler: 150 MiB and seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
