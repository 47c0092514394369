"""A checkpoint's matrices in fewer bits: which grid each is rounded to, and the tensors that it is stored as.

numbers_FD, scales_FG = rounded(weight_FD, grid(scheme, name))
for suffix, tensor in encoded(scheme, name, numbers_FD, scales_FG): ...   # under NAME + suffix
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slingshot.quantization import mxfp4
from slingshot.quantization.formats import PACKED, PACKED_SCALE, PACKED_SHAPE, Scheme
from slingshot.quantization.gptq import Grid
from slingshot.quantization.integers import IntegerGrid, pack


def grid(scheme: Scheme, name: str) -> Grid:
    """What a matrix's weights are rounded to."""
    return mxfp4.MXFP4Grid() if scheme.kind == "mxfp4" else IntegerGrid(scheme.bits(name), scheme.group)


def encoded(scheme: Scheme, name: str, numbers_FD: Tensor, scales_FG: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The parts that `Scheme.parts` tells of; scales of groups of whole numbers are bfloat16."""
    if scheme.kind == "mxfp4":
        yield PACKED, mxfp4.pack(numbers_FD)
        yield PACKED_SCALE, mxfp4.exponents(scales_FG)
        return
    if scheme.kind == "int8-dynamic":
        yield "", numbers_FD.to(torch.int8)
        yield PACKED_SCALE, scales_FG
        return
    yield PACKED, pack(numbers_FD, scheme.bits(name))
    yield PACKED_SCALE, scales_FG.bfloat16()
    yield PACKED_SHAPE, torch.tensor(numbers_FD.shape)
