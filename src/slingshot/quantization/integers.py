"""Weights of 4 or 8 bits: whole numbers, and a scale for every `group` neighbours of a row: w = scale * number.

    numbers_FD, scales_FG = rounded(weight_FD, IntegerGrid(bits=4, group=32))   # gptq.py; -8 to 7; 8 bits: -128 to 127
    weight_FD = from_numbers(numbers_FD, scales_FG)                # float32
    words = pack(numbers_FD, bits=4)                               # int32, eight numbers a word
    numbers_FD = unpack(words, bits=4, width=D)

Scales are bfloat16 numbers, whatever they are stored in, of either sign with 4 bits; numbers are rounded by these.
Words are those of compressed-tensors' `pack-quantized`: number + 2^(bits-1), the first of a row in the lowest bits.

Shape suffixes: F output width, D input width, G groups of a row, I numbers of a group, W words of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError

WORD = 32  # bits
# Scales tried for a group, of the one that makes its furthest weight the furthest number: with 4 bits that is -8, so a
# scale has either sign, and some weights may be cut off; with 8 that gains nothing, but one of some wider grids lies
# better, before all in what was of fewer bits before.
SHARES = {4: torch.linspace(1.2, 0.6, 25), 8: torch.linspace(1.0, 1.25, 24)}


@dataclass(frozen=True)
class WeightGrid:
    """What weights of a model are whole numbers of: by name of a weight bits and float32 scales [..., F, G].

    bits        8, 4, or FLOAT4 (kernels/native.py): mxfp4's, which name one of 16 numbers, whole when they are doubled
    group       neighbours of a row that share a scale; 0: a row, and activations are rounded to 8 bits too, each token
                by a scale of its own
    """

    bits: Mapping[str, int]
    group: int
    scales: Mapping[str, Tensor]


def check_groups(shape: tuple[int, ...], group: int, name: str) -> None:
    """Raise SlingshotError where a matrix's rows are not whole groups."""
    if shape[-1] % group:
        fitting = next((size for size in (128, 64, 32) if shape[-1] % size == 0), None)
        way_out = f"group_size {fitting} does" if fitting else "fp8 takes any: slingshot convert --dtype fp8"
        raise SlingshotError(f"{name}: rows of {shape[-1]} do not divide into groups of {group}; {way_out}")


@dataclass(frozen=True)
class IntegerGrid:
    """Whole numbers of so many bits, `group` neighbours of a row to a scale; 0: the whole row."""

    bits: int
    group: int

    @property
    def power(self) -> int:
        """With 4 bits a model feels most what its largest weights lose (as ggml has it for Q4_K)."""
        return int(self.bits == 4)

    def candidates(self, weight_FGI: Tensor) -> Tensor:
        """bfloat16 scales, in float32."""
        least_FG, most_FG = weight_FGI.amin(-1), weight_FGI.amax(-1)  # aminmax takes five times as long
        furthest_FG = torch.where(most_FG > -least_FG, most_FG, least_FG)
        whole_FG = furthest_FG / -8 if self.bits == 4 else furthest_FG.abs() / 127
        scales_CFG = (SHARES[self.bits][:, None, None] * whole_FG).bfloat16().float()
        return torch.where(scales_CFG == 0, 1.0, scales_CFG)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The nearest whole numbers, halves to the even one; what is beyond the largest is cut off."""
        end = 2.0 ** (self.bits - 1)
        return scaled.round().clamp_(-end, end - 1)


def from_numbers(numbers_FD: Tensor, scales_FG: Tensor) -> Tensor:
    """The float32 weights that numbers and scales stand for."""
    return (numbers_FD.float().unflatten(-1, (scales_FG.shape[-1], -1)) * scales_FG[..., None].float()).flatten(-2)


def pack(numbers_FD: Tensor, bits: int) -> Tensor:
    """int32 words [F, ceil(D * bits / 32)] of whole numbers."""
    unsigned = (numbers_FD + 2 ** (bits - 1)).to(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[-1] % (WORD // bits)))
    if bits == 4:
        unsigned = unsigned[..., ::2] | unsigned[..., 1::2] << 4
    return unsigned.view(torch.int32)  # little-endian, as files are


def unpack(words_FW: Tensor, bits: int, width: int) -> Tensor:
    """int8 numbers [F, width] of packed words."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    unsigned = (words_FW[..., None] >> shifts) & (2**bits - 1)
    return (unsigned - 2 ** (bits - 1)).flatten(-2)[..., :width].to(torch.int8)
