"""Products in FP8: all three against sums written out in float64, at any shape, and what each scaling loses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slingshot.quantization.fp8_product import TILES, FP8Scaling, fp8_grouped_matmul, fp8_matmul, rounded

SCALINGS: tuple[FP8Scaling, ...] = ("block", "tensor")
SHAPES = [(5, 3, 7), (128, 128, 128), (300, 130, 257), (64, 384, 200)]  # N, D, F


def spread(*shape: int, seed: int) -> Tensor:
    """Rows and columns of very different size, so that another tile's scale is far off."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (10 ** (4 * torch.rand(size, generator=generator) - 2) for size in shape)
    return torch.randn(shape, generator=generator) * rows[:, None] * columns


def e4m3(number: float) -> float:
    """The nearest number of e4m3 (OCP 8-bit Floating Point 1.0): 3 bits behind the point, exponents from -6, 448 at
    most; halves to even."""
    if number == 0:
        return 0.0
    step = 2.0 ** (max(-6, math.floor(math.log2(abs(number)))) - 3)
    return math.copysign(min(448.0, round(abs(number) / step) * step), number)


def by_definition(matrix: Tensor, height: int, width: int, power: bool) -> tuple[Tensor, Tensor]:
    """e4m3's numbers and the scale of each, float64, a tile at a time."""
    numbers, scales = torch.zeros(matrix.shape, dtype=torch.float64), torch.zeros(matrix.shape, dtype=torch.float64)
    for row in range(0, matrix.shape[0], height):
        for column in range(0, matrix.shape[1], width):
            tile = matrix[row : row + height, column : column + width].double()
            scale = float(tile.abs().max().float() / 448) or 1.0
            if power:
                scale = 2.0 ** math.ceil(math.log2(scale))
            place = slice(row, row + height), slice(column, column + width)
            numbers[place] = torch.tensor([[e4m3(x / scale) for x in line] for line in tile.tolist()])
            scales[place] = scale
    return numbers, scales


def promoted(a_MK: tuple[Tensor, Tensor], b_NK: tuple[Tensor, Tensor]) -> Tensor:
    """Sums over 128 of e4m3's numbers, each times both scales, added: DeepSeek-V3's order (3.3.2, figure 7)."""
    total = torch.zeros(len(a_MK[0]), len(b_NK[0]), dtype=torch.float64)
    for start in range(0, a_MK[0].shape[1], 128):
        (a, a_scale), (b, b_scale) = (tuple(each[:, start : start + 128] for each in pair) for pair in (a_MK, b_NK))
        total += (a @ b.T) * a_scale[:, :1] * b_scale[:, :1].T
    return total


def turned(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].T, pair[1].T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_three_products_are_those_of_the_definition(shape: tuple[int, int, int], scaling: FP8Scaling) -> None:
    """Every sum within float32's rounding of the sum of magnitudes; edges of tiles included."""
    rows, inner, out = shape
    x_ND, weight_FD, grad_NF = (
        spread(*sides, seed=seed) for seed, sides in enumerate(((rows, inner), (out, inner), (rows, out)))
    )
    x_ND.requires_grad_(), weight_FD.requires_grad_()
    y_NF = fp8_matmul(x_ND, weight_FD, scaling)
    dx_ND, dw_FD = torch.autograd.grad(y_NF, (x_ND, weight_FD), grad_NF)

    def tiles(matrix: Tensor, height: int, width: int, power: bool = True) -> tuple[Tensor, Tensor]:
        whole = scaling == "tensor"
        return by_definition(matrix.detach(), *(matrix.shape if whole else (height, width)), power)

    x, weight, grad = tiles(x_ND, 1, 128), tiles(weight_FD, 128, 128, power=False), tiles(grad_NF, 1, 128)
    kept_ND = (x[0] * x[1]).float()  # what the backward pass has of x
    x_columns, grad_columns = tiles(kept_ND, 128, 1), tiles(grad_NF, 128, 1)
    for found, factors in (
        (y_NF, (x, weight)), (dx_ND, (grad, turned(weight))), (dw_FD, (turned(grad_columns), turned(x_columns)))
    ):  # fmt: skip
        bound = promoted(*((numbers.abs(), scales) for numbers, scales in factors))
        assert ((found.detach().double() - promoted(*factors)).abs() <= 1e-5 * bound).all()


def test_turning_tiles_adds_no_error_where_the_exponents_suffice() -> None:
    """Scales are powers of two (arXiv 2412.19437, 3.3.3): numbers of one binade or six apart come over exactly."""
    row, column, _ = TILES["block"]
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(256, 256, generator=generator).clamp(-4, 4)
    x_ND += 0.1 * x_ND.sign()
    kept_ND = rounded(x_ND, row)
    assert torch.equal(rounded(kept_ND, column), kept_ND)
    other_ND = rounded(x_ND, row, scale_fmt=None)  # scales that are no powers of two
    assert not torch.equal(rounded(other_ND, column, scale_fmt=None), other_ND)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(scaling: FP8Scaling) -> None:
    x_ND, weight_FD = torch.zeros(130, 200), torch.ones(3, 200)
    assert not fp8_matmul(x_ND, weight_FD, scaling).any()
    for number in (math.inf, math.nan):
        x_ND[129, 199] = number
        y_NF = fp8_matmul(x_ND, weight_FD, scaling)
        assert y_NF[129].isnan().all() and (scaling == "tensor" or not y_NF[:129].any())


def test_a_number_far_above_the_others_costs_its_own_tile_or_all_of_them() -> None:
    """2^20 in one row: its tile loses what is below 2^-10 of the scale, and with one scale for all every row does."""
    x_ND, weight_FD = torch.full((4, 256), 1.0), torch.full((128, 256), 0.5)
    x_ND[2, 5] = 2.0**20
    fine, coarse = (fp8_matmul(x_ND, weight_FD, scaling)[:, 0].tolist() for scaling in SCALINGS)
    assert fine == [128.0, 128.0, 2.0**19 + 64, 128.0] and coarse == [0.0, 0.0, 2.0**19, 0.0]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_experts_multiply_their_own_rows_by_matrices_with_scales_of_their_own(scaling: FP8Scaling) -> None:
    """Two matrices of 20 rows an expert, one with a large number; an expert without rows; gradients of each alone."""
    generator, counts = torch.Generator().manual_seed(0), [128, 0, 5]
    x_ND, grad_NF = (torch.randn(133, width, generator=generator) for width in (140, 40))
    weight_EGFD = torch.randn(3, 2, 20, 140, generator=generator)
    weight_EGFD[0, 1, 0, 0] = 2.0**20
    x_ND.requires_grad_(), weight_EGFD.requires_grad_()
    y_NF = fp8_grouped_matmul(x_ND, weight_EGFD, counts, scaling)
    dx_ND, dw_EGFD = torch.autograd.grad(y_NF, (x_ND, weight_EGFD), grad_NF)
    row, column, block = TILES[scaling]
    with torch.no_grad():
        kept_ND = rounded(x_ND, row)
        x_columns, grad_rows, grad_columns = rounded(kept_ND, column), rounded(grad_NF, row), rounded(grad_NF, column)
        for expert, rows in ((0, slice(0, 128)), (2, slice(128, 133))):
            parts = [rounded(part_FD, block, None) for part_FD in weight_EGFD[expert]]
            for part, side in ((0, slice(0, 20)), (1, slice(20, 40))):
                torch.testing.assert_close(y_NF[rows, side], kept_ND[rows] @ parts[part].T)
                torch.testing.assert_close(dw_EGFD[expert, part], grad_columns[rows, side].T @ x_columns[rows])
            torch.testing.assert_close(dx_ND[rows], grad_rows[rows] @ torch.cat(parts))
    assert not dw_EGFD[1].any() and y_NF[:128, :20].abs().max() < 100


def test_activations_keep_their_dtype_and_gradients_that_of_the_weight() -> None:
    x_ND = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    weight_FD = torch.ones(2, 4, requires_grad=True)
    y_NF = fp8_matmul(x_ND, weight_FD, "block")
    dx_ND, dw_FD = torch.autograd.grad(y_NF.sum(), (x_ND, weight_FD))
    assert [each.dtype for each in (y_NF, dx_ND, dw_FD)] == [torch.bfloat16, torch.bfloat16, torch.float32]
