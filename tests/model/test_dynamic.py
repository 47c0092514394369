"""Weights and activations of 8 bits: products of whole numbers, exact but for the rounding of activations to 8 bits."""

import pytest
import torch

from slingshot.kernels.grouped import grouped_matmul
from slingshot.model.dynamic import DynamicGroupedLinear, DynamicLinear
from slingshot.model.linear import GroupedLinear, Linear


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(x, numbers, scales):
    """In float64: every row of x to 8 bits by its largest magnitude."""
    step = x.double().abs().amax(-1, keepdim=True) / 127
    return ((x.double() / step).round() * step) @ (numbers.double() * scales.double()).T


def whole(linear, seed):
    """A layer's weights made whole numbers times scales; -> the numbers and scales."""
    shape = linear.weight.shape
    numbers = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    scales = (0.01 * (1 + draw(*shape[:-1], 1, seed=seed).abs())).bfloat16().float()
    with torch.no_grad():
        linear.weight.copy_(numbers * scales)
    return numbers, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_is_that_of_whole_numbers(dtype, rows):
    base = Linear(96, 40, bias=True)
    numbers, scales = whole(base, 1)
    base.bias.data.copy_(draw(40, seed=2))
    base.to(dtype)  # which rounds the weights; the numbers come back
    linear, x = DynamicLinear(base, scales), draw(2, rows, 96, seed=3).to(dtype)
    assert torch.equal(linear.weight, numbers)
    wanted = by_hand(x.flatten(0, 1), numbers, scales).view(2, rows, 40) + base.bias.double()
    assert (linear(x).double() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 2**-7) * wanted.abs().max()
    assert linear(x).dtype == dtype and torch.equal(linear.matrix(torch.float32), numbers * scales)


def test_experts_take_their_own_rows_none_included():
    base = GroupedLinear(3, 64, 2, 16)
    numbers, scales = whole(base, 4)
    experts, x, counts = DynamicGroupedLinear(base, scales), draw(7, 64, seed=5), [4, 0, 3]
    found = experts(x, counts)
    parts = [by_hand(part, *each) for part, each in zip(
        x.split(counts), zip(numbers.flatten(1, 2), scales.flatten(1, 2), strict=True), strict=True
    ) if len(part)]  # fmt: skip
    assert (found.double() - torch.cat(parts)).abs().max() < 1e-5
    plain = grouped_matmul(x, experts.matrix(torch.float32).flatten(1, 2), counts)
    assert 0 < (found - plain).abs().max() < 0.05 * plain.abs().max()


def test_a_row_of_zeros_is_zeros_and_what_is_no_number_makes_none():
    base = Linear(32, 8)
    _, scales = whole(base, 6)
    x = draw(3, 32, seed=7)
    x[0], x[1, 3] = 0.0, torch.nan
    y = DynamicLinear(base, scales)(x)
    assert not y[0].any() and y[1].isnan().all() and y[2].isfinite().all()
