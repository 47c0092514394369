"""A frozen matrix in the numbers that a checkpoint stores, int4, int8 or FP8, and their scales: no larger than there.

    hold(linear, StoredMatrix(linear.weight.shape, words, scales, bits=4))
    linear.weight.matrix(torch.bfloat16)         # made anew at every product, forward and backward, and let go

Shape suffixes: S the dimensions of a stack of expert matrices, F output width, D input width, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from slingshot.quantization.fp8 import dequantize


class StoredMatrix(nn.Module):
    """Stands where a Linear or GroupedLinear has its `weight` [*S, F, D].

    numbers         of `bits` 4 or 8 the int32 words [*S, F, D bits / 32] of quantization/integers.py; of bits 0 e4m3
    scales          [*S, F, G], or of blocks of 128 x 128 (quantization/fp8.py)
    """

    requires_grad = False

    def __init__(self, shape: Sequence[int], numbers: Tensor, scales: Tensor, bits: int = 0) -> None:
        super().__init__()
        self.shape, self.bits = torch.Size(shape), bits
        self.register_buffer("numbers", numbers.contiguous())
        self.register_buffer("scales", scales.contiguous())
        self.numbers: Tensor
        self.scales: Tensor

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def matrix(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """What the numbers stand for, rounded once, [*S, F, D]; or of one expert, without the first dimension."""
        numbers, scales = (each if expert is None else each[expert] for each in (self.numbers, self.scales))
        if not self.bits:
            stacked = zip(numbers.flatten(0, -3), scales.flatten(0, -3), strict=True) if numbers.dim() > 2 else ()
            parts = [dequantize(*each).to(dtype) for each in stacked]
            return torch.stack(parts).view(numbers.shape) if parts else dequantize(numbers, scales).to(dtype)
        exact = dtype if scales.dtype == dtype else torch.float32  # a number of 8 bits has no rounding in bfloat16
        bytes_FB = numbers.view(torch.uint8)
        if self.bits == 4:
            pairs = _pairs(exact).to(numbers.device)
            values_FD = pairs[bytes_FB.flatten().int()].view(exact).view(*numbers.shape[:-1], -1)
        else:
            values_FD = (bytes_FB ^ 128).view(torch.int8).to(exact)
        values_FD = values_FD[..., : self.shape[-1]]
        values_FD.unflatten(-1, (scales.shape[-1], -1)).mul_(scales[..., None].to(exact))
        return values_FD.to(dtype)


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """The two 4-bit numbers of every byte, the lower half's first, as one number of twice the width."""
    byte = torch.arange(256)
    pairs = torch.stack((byte % 16 - 8, byte // 16 - 8), dim=1).to(dtype)
    return pairs.view(torch.int64 if dtype.itemsize == 4 else torch.int32).flatten()


def hold(module: nn.Module, stored: nn.Module) -> None:
    """Put the matrix where `module` has its weight."""
    del module.weight
    module.weight = stored


def share_stored(target: nn.Module, source: nn.Module) -> None:
    """Give a model of the same architecture the matrices that another holds as they are stored."""
    for name, module in source.named_modules():
        if isinstance(module, StoredMatrix):
            hold(target.get_submodule(name.removesuffix(".weight")), module)


def holds_stored(model: nn.Module) -> bool:
    """Whether any matrix is held as it is stored."""
    return any(isinstance(module, StoredMatrix) for module in model.modules())
