"""Weights of 4 or 8 bits: whole numbers, and a scale for every `group` neighbours of a row: w = scale * number.

    numbers_FD, scales_FG = rounded(weight_FD, IntegerGrid(bits=4, group=32))   # gptq.py; -8 to 7; 8 bits: -128 to 127
    weight_FD = from_numbers(numbers_FD, scales_FG)                # float32
    words = pack(numbers_FD, bits=4)                               # int32, eight numbers a word
    numbers_FD = unpack(words, bits=4, width=D)

Scales are bfloat16 numbers, whatever they are stored in, and numbers are rounded by these.
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
# Scales tried for a group, of the one that makes its largest weight the largest number: with 4 bits some may be cut
# off; with 8 that gains nothing, but one of some wider grids lies better, before all in what was of fewer bits before.
_SHARES = {4: torch.linspace(1.0, 0.6, 12).tolist(), 8: torch.linspace(1.0, 1.25, 24).tolist()}
_CHUNK = 1 << 20  # numbers at a time


@dataclass(frozen=True)
class WeightGrid:
    """What a model's weights are whole numbers of: bits, group, and by name of a weight float32 scales [..., F, G].

    dynamic     activations are rounded to 8 bits too, each token by a scale of its own; groups are rows
    """

    bits: int
    group: int
    scales: Mapping[str, Tensor]
    dynamic: bool = False


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

    def scales(self, weight_FD: Tensor, importance_D: Tensor | None = None) -> Tensor:
        """bfloat16 scales [F, G], in float32: of several that of least squared error.

        importance_D: what the square of an error in each column counts, such as the mean square of its inputs.
        """
        weight_FGI = weight_FD.float().unflatten(-1, (-1, self.group or weight_FD.shape[-1]))
        importance_GI = torch.ones(weight_FGI.shape[1:])
        if importance_D is not None:
            importance_GI = importance_D.view_as(importance_GI)
        best = []
        for rows in weight_FGI.split(max(1, _CHUNK // weight_FD.shape[-1])):
            whole_FG = rows.abs().amax(-1) / (2 ** (self.bits - 1) - 1)
            scales_FG, least_FG = _rounded(whole_FG), torch.full_like(whole_FG, torch.inf)
            for share in _SHARES[self.bits]:
                tried_FG = _rounded(whole_FG * share)
                error_FGI = self.nearest(rows / tried_FG[..., None]) * tried_FG[..., None] - rows
                error_FG = (error_FGI.square_() * importance_GI).sum(-1)
                scales_FG = torch.where(error_FG < least_FG, tried_FG, scales_FG)
                least_FG = torch.minimum(error_FG, least_FG)
            best.append(scales_FG)
        return torch.cat(best)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The nearest whole numbers, halves to the even one; what is beyond the largest is cut off."""
        end = 2.0 ** (self.bits - 1)
        return scaled.round().clamp_(-end, end - 1)


def _rounded(scales: Tensor) -> Tensor:
    """As bfloat16 has them; 1 for groups of zeros."""
    scales = scales.bfloat16().float()
    return torch.where(scales == 0, 1.0, scales)


def from_numbers(numbers_FD: Tensor, scales_FG: Tensor) -> Tensor:
    """The float32 weights that numbers and scales stand for."""
    return (numbers_FD.float().unflatten(-1, (scales_FG.shape[-1], -1)) * scales_FG[..., None].float()).flatten(-2)


def pack(numbers_FD: Tensor, bits: int) -> Tensor:
    """int32 words [F, ceil(D * bits / 32)] of whole numbers."""
    per_word = WORD // bits
    unsigned = numbers_FD.int() + 2 ** (bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[-1] % per_word))
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return (unsigned.unflatten(-1, (-1, per_word)) << shifts).sum(-1, dtype=torch.int64).to(torch.int32)


def unpack(words_FW: Tensor, bits: int, width: int) -> Tensor:
    """int8 numbers [F, width] of packed words."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    unsigned = (words_FW[..., None] >> shifts) & (2**bits - 1)
    return (unsigned - 2 ** (bits - 1)).flatten(-2)[..., :width].to(torch.int8)
