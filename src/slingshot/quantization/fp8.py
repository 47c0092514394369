"""FP8 numbers as DeepSeek-V3 has them: e4m3, and a scale for each tile of them (arXiv 2412.19437, 3.3.2).

    weight_FD, scale_inv = quantize(weight_FD)           # "ue8m0": scales that are powers of two, in a byte each
    weight_FD = dequantize(weight_FD, scale_inv)         # float32; scale_inv multiplies, despite its name
    numbers_ND, scales = quantize(x_ND, "ue8m0", tile=(1, 128))

A stored weight has a float32 scale for each 128 x 128 block. Tiles at the right and lower edge may be partly filled.

Shape suffixes: S the dimensions of a stack of matrices, F output width, D input width, N rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.quantization.formats import FP8_BLOCK

E4M3_MAX = 448.0
Tile = tuple[int, int]  # rows and columns that share a scale, as many as there are at most
BLOCK: Tile = (FP8_BLOCK, FP8_BLOCK)
_SMALLEST = torch.finfo(torch.float32).tiny  # of scales that are powers of two: float8_e8m0fnu has none below 2^-127
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # of every byte


def quantize(matrix_SFD: Tensor, scale_fmt: str | None = None, tile: Tile = BLOCK) -> tuple[Tensor, Tensor]:
    """e4m3 numbers [*S, F, D] and each tile's float32 scale: its largest magnitude becomes 448; of zeros alone it is 1.

    With scale_fmt "ue8m0" scales are the next power of two (float8_e8m0fnu), as DeepSeek-V3.1's: it becomes 224 to 448.
    Off by at most 1/16 of a number or half of e4m3's smallest step (2^-10) times the tile's scale, the larger. A tile
    with a number that is not finite comes back as NaN.
    """
    out, inner = matrix_SFD.shape[-2:]
    height, width = min(tile[0], max(1, out)), min(tile[1], inner)
    rows, columns = -(-out // height), -(-inner // width)
    padding = 0, columns * width - inner, 0, rows * height - out
    tiles = F.pad(matrix_SFD.float(), padding) if any(padding) else matrix_SFD.float()
    tiles = tiles.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
    scale = tiles.abs().amax(dim=(-3, -1)) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    if scale_fmt == "ue8m0":
        mantissa, exponent = scale.clamp(min=_SMALLEST).frexp()
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where(scale.isfinite(), power, torch.nan)
    scaled = (tiles / scale[..., :, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).flatten(-2).flatten(-3, -2)
    numbers = scaled[..., :out, :inner].to(torch.float8_e4m3fn).contiguous()
    return numbers, scale.to(torch.float8_e8m0fnu) if scale_fmt else scale


def dequantize(numbers_SFD: Tensor, scale: Tensor, first_row: int = 0, tile: Tile = BLOCK) -> Tensor:
    """The float32 values of e4m3 rows; `first_row` says where in the matrix of `scale` they stand."""
    rows, columns = numbers_SFD.shape[-2:]
    if numbers_SFD.is_cpu:  # torch's own conversion takes five times as long
        values_SFD = _VALUES.index_select(0, numbers_SFD.view(torch.uint8).flatten().int()).view_as(numbers_SFD)
    else:
        values_SFD = numbers_SFD.float()
    tile_of_row = torch.arange(first_row, first_row + rows, device=scale.device) // tile[0]
    scale_SFD = scale.float()[..., tile_of_row, :].repeat_interleave(min(tile[1], columns), dim=-1)[..., :columns]
    return values_SFD.mul_(scale_SFD)
