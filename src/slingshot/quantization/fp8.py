"""FP8 weights as DeepSeek-V3 stores them: e4m3, and a float32 scale for each 128 x 128 block (arXiv 2412.19437, 3.3).

    weight_FD, scale_inv = quantize(weight_FD)           # "ue8m0": scales that are powers of two, in a byte each
    weight_FD = dequantize(weight_FD, scale_inv)         # float32; scale_inv multiplies, despite its name

Shape suffixes: F output width, D input width. Blocks at the right and lower edge may be partly filled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.quantization.formats import FP8_BLOCK, scale_shape

E4M3_MAX = 448.0


def quantize(weight_FD: Tensor, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 weights [F, D] and float32 scales [ceil(F/128), ceil(D/128)]: each block's largest magnitude becomes 448.

    With scale_fmt "ue8m0" scales are the next power of two (float8_e8m0fnu), as DeepSeek-V3.1's: it becomes 224 to 448.
    Off by at most 1/16 of a number or half of e4m3's smallest step (2^-10) times the block's scale, the larger.
    """
    rows, columns = scale_shape(tuple(weight_FD.shape))
    padding = (0, columns * FP8_BLOCK - weight_FD.shape[1], 0, rows * FP8_BLOCK - weight_FD.shape[0])
    blocks = F.pad(weight_FD.float(), padding).unflatten(1, (columns, FP8_BLOCK)).unflatten(0, (rows, FP8_BLOCK))
    scale = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)  # NaN and infinity stay, for the caller to see
    if scale_fmt == "ue8m0":
        mantissa, exponent = scale.frexp()
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    scaled = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).flatten(2, 3).flatten(0, 1)
    return scaled[: weight_FD.shape[0], : weight_FD.shape[1]].to(torch.float8_e4m3fn).contiguous(), (
        scale.to(torch.float8_e8m0fnu) if scale_fmt else scale
    )


def dequantize(weight_FD: Tensor, scale_inv: Tensor, first_row: int = 0) -> Tensor:
    """The float32 values of e4m3 rows; `first_row` says where in the matrix of `scale_inv` they stand."""
    scale_inv = scale_inv.float()
    block_of_row = torch.arange(first_row, first_row + weight_FD.shape[0]) // FP8_BLOCK
    scale_FD = scale_inv[block_of_row].repeat_interleave(FP8_BLOCK, dim=1)[:, : weight_FD.shape[1]]
    return weight_FD.float().mul_(scale_FD)
