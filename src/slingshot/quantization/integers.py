"""Weights of 4 or 8 bits: whole numbers, and a scale for every `group` neighbours of a row: w = scale * number.

    scales_FG = best_scales(weight_FD, bits=4, group=32)
    numbers_FD = to_numbers(weight_FD, scales_FG, bits=4)          # int8, from -8 to 7; 8 bits: -128 to 127
    weight_FD = from_numbers(numbers_FD, scales_FG)                # float32
    words = pack(numbers_FD, bits=4)                               # int32, eight numbers a word
    numbers_FD = unpack(words, bits=4, width=D)

Scales are bfloat16 numbers, whatever they are stored in, and numbers are rounded by these. Words are those of
compressed-tensors' `pack-quantized`: number + 2^(bits-1), the first of a row in the lowest bits.

Shape suffixes: F output width, D input width, G groups of a row, W words of a row, C scales tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError

WORD = 32  # bits
_TRIED = 24  # scales of a group
_LEAST = 0.6  # the smallest of them, of the one under which nothing is cut off
_CHUNK = 1 << 20  # numbers at a time


@dataclass(frozen=True)
class WeightGrid:
    """What a model's weights are whole numbers of: bits, group, and by name of a weight float32 scales [..., F, G]."""

    bits: int
    group: int
    scales: Mapping[str, Tensor]


def largest(bits: int) -> int:
    """The largest number of so many bits; the smallest is one further from 0."""
    return int(2 ** (bits - 1)) - 1


def check_groups(shape: tuple[int, ...], group: int, name: str) -> None:
    """Raise SlingshotError where a matrix's rows are not whole groups."""
    if shape[-1] % group:
        fitting = next((size for size in (128, 64, 32) if shape[-1] % size == 0), None)
        way_out = f"group_size {fitting} does" if fitting else "fp8 takes any: slingshot convert --dtype fp8"
        raise SlingshotError(f"{name}: rows of {shape[-1]} do not divide into groups of {group}; {way_out}")


def best_scales(weight_FD: Tensor, bits: int, group: int, importance_D: Tensor | None = None) -> Tensor:
    """bfloat16 scales [F, G], in float32: of several from the largest weight downwards those of least squared error.

    With 8 bits cutting off gains nothing, and the largest weight decides. importance_D: what the square of an error in
    each column counts, such as the mean square of its inputs.
    """
    weight_FGI = weight_FD.float().unflatten(-1, (-1, group))
    whole_FG = weight_FGI.abs().amax(-1) / largest(bits)
    if bits == 8:
        return _rounded(whole_FG)
    shares_C = torch.linspace(1.0, _LEAST, _TRIED)
    importance_GI = torch.ones(weight_FGI.shape[1:]) if importance_D is None else importance_D.unflatten(0, (-1, group))
    best = []
    for rows, wholes in zip(
        *(t.split(max(1, _CHUNK // weight_FD.shape[-1])) for t in (weight_FGI, whole_FG)), strict=True
    ):
        errors = torch.stack([_error(rows, _rounded(wholes * share), bits, importance_GI) for share in shares_C])
        best.append(_rounded(wholes * shares_C[errors.argmin(0)]))
    return torch.cat(best)


def _error(weight_FGI: Tensor, scales_FG: Tensor, bits: int, importance_GI: Tensor) -> Tensor:
    numbers = _numbers(weight_FGI, scales_FG[..., None], bits)
    return ((numbers * scales_FG[..., None] - weight_FGI).square_() * importance_GI).sum(-1)


def _rounded(scales: Tensor) -> Tensor:
    """As bfloat16 has them; 1 for groups of zeros."""
    scales = scales.bfloat16().float()
    return torch.where(scales == 0, 1.0, scales)


def _numbers(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (weight / scale).round_().clamp_(-largest(bits) - 1, largest(bits))


def to_numbers(weight_FD: Tensor, scales_FG: Tensor, bits: int) -> Tensor:
    """The nearest numbers (int8), halves to the even one; what is beyond the largest is cut off."""
    weight_FGI = weight_FD.float().unflatten(-1, (scales_FG.shape[-1], -1))
    return _numbers(weight_FGI, scales_FG[..., None], bits).flatten(-2).to(torch.int8)


def from_numbers(numbers_FD: Tensor, scales_FG: Tensor) -> Tensor:
    """The float32 weights that numbers and scales stand for."""
    return (numbers_FD.float().unflatten(-1, (scales_FG.shape[-1], -1)) * scales_FG[..., None].float()).flatten(-2)


def pack(numbers_FD: Tensor, bits: int) -> Tensor:
    """int32 words [F, ceil(D * bits / 32)] of int8 numbers."""
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
