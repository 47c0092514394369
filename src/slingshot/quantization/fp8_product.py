"""The products of a linear layer in FP8, forward and backward, as DeepSeek-V3 trains (arXiv 2412.19437, 3.3).

    y_NF = fp8_matmul(x_ND, weight_FD, "block")          # x of any dtype, the weight a float32 master

Both factors of each of the three products are rounded to e4m3 when they are needed, by the largest number that they
have then. With "block" activations and gradients have a scale for 128 neighbours along the dimension that is summed
over, 1 x 128 or 128 x 1, and weights one for 128 x 128; "tensor" is the coarse scaling, one for each matrix.

Scales of activations and gradients are powers of two, as V3's are where tiles are turned: x is kept for the backward
pass in e4m3, in tiles of 1 x 128, and turned to 128 x 1 without a further error but in numbers too small for the new
tile. Scales of weights are float32: the forward pass sees what an FP8 checkpoint stores.

V3 multiplies 128 of e4m3's numbers at a time and adds their sum, times both scales, to the others in float32, since
tensor cores add with fewer bits. Here all sums are float32's, of numbers times scales: on a CPU and on a GPU alike.

Shape suffixes: N rows, D input width, F output width, E experts, G the matrices that an expert has side by side.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slingshot.kernels.grouped import grouped_matmul
from slingshot.quantization.formats import FP8_BLOCK
from slingshot.quantization.fp8 import BLOCK, Tile, dequantize, quantize

FP8Scaling = Literal["block", "tensor"]
WHOLE: Tile = (sys.maxsize, sys.maxsize)
TILES: dict[FP8Scaling, tuple[Tile, Tile, Tile]] = {  # of rows that are summed along, of columns, of weights
    "block": ((1, FP8_BLOCK), (FP8_BLOCK, 1), BLOCK),
    "tensor": (WHOLE, WHOLE, WHOLE),
}


def fp8_matmul(x_ND: Tensor, weight_FD: Tensor, scaling: FP8Scaling) -> Tensor:
    """x W^T of factors rounded to e4m3: y_NF in x's dtype. Gradients are rounded alike, and each in its own dtype."""
    return fp8_grouped_matmul(x_ND, weight_FD[None], [len(x_ND)], scaling)


def fp8_grouped_matmul(x_ND: Tensor, weight_EGFD: Tensor, counts: list[int], scaling: FP8Scaling) -> Tensor:
    """`fp8_matmul` of rows sorted by expert, counts[e] each, by the matrices of each: y [N, G F].

    Matrices [E, *G, F, D] have scales of their own; 128 neighbouring rows share theirs whosever they are.
    """
    y_NF: Tensor = FP8Product.apply(x_ND, weight_EGFD, counts, *TILES[scaling])
    return y_NF


class FP8Product(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x, an expert's rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_EGFD: Tensor, counts: list[int], row: Tile, column: Tile, block: Tile
    ) -> Tensor:
        numbers_ND, scales = quantize(x_ND, "ue8m0", row)
        ctx.save_for_backward(numbers_ND, scales, weight_EGFD)
        ctx.counts, ctx.tiles = counts, (row, column, block)
        weight_EFD = rounded(weight_EGFD, block, None).flatten(1, -2)
        return grouped_matmul(dequantize(numbers_ND, scales, tile=row), weight_EFD, counts).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        numbers_ND, scales, weight_EGFD = ctx.saved_tensors
        row, column, block = ctx.tiles
        dx_ND = dw_EGFD = None
        if ctx.needs_input_grad[0]:
            weight_EFD = rounded(weight_EGFD, block, None).flatten(1, -2)
            dx_ND = grouped_matmul(rounded(grad_NF, row), weight_EFD.mT, ctx.counts).to(grad_NF.dtype)
        if ctx.needs_input_grad[1]:
            x_ND = rounded(dequantize(numbers_ND, scales, tile=row), column)
            groups = zip(rounded(grad_NF, column).split(ctx.counts), x_ND.split(ctx.counts), strict=True)
            dw_EFD = torch.stack([grad_nF.T @ x_nD for grad_nF, x_nD in groups])
            dw_EGFD = dw_EFD.view_as(weight_EGFD).to(weight_EGFD.dtype)
        return dx_ND, dw_EGFD, None, None, None, None


def rounded(matrix: Tensor, tile: Tile, scale_fmt: str | None = "ue8m0") -> Tensor:
    """The float32 values of the e4m3 numbers of a matrix, or of a stack of them."""
    return dequantize(*quantize(matrix, scale_fmt, tile), tile=tile)
