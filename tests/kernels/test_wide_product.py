"""Logits in float32 of bfloat16 factors, against the same numbers multiplied in float64."""

import pytest
import torch
from torch import Tensor

from slingshot.kernels.native import native_levels
from slingshot.kernels.wide_product import wide_product

SHAPES = [(1, 33, 8), (70, 100, 64), (64, 1000, 96)]


def drawn(rows: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x_ND, weight_VD, grad_NV = (
        torch.randn(shape, generator=generator) for shape in ((rows, width), (vocab, width), (rows, vocab))
    )
    return x_ND.to(dtype).requires_grad_(), weight_VD.requires_grad_(), grad_NV


@pytest.mark.parametrize("level", ["off", *native_levels()])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_not_rounded_and_gradients_are_to_the_factors_dtype(shape, dtype, level, monkeypatch):
    monkeypatch.setenv("SLINGSHOT_NATIVE", level)
    x_ND, weight_VD, grad_NV = drawn(*shape, dtype)
    y_NV = wide_product(x_ND, weight_VD)
    y_NV.backward(grad_NV)
    x, weight, grad = x_ND.detach().double(), weight_VD.detach().to(dtype).double(), grad_NV.double()
    assert y_NV.dtype == torch.float32 and weight_VD.grad.dtype == torch.float32 and x_ND.grad.dtype == dtype
    torch.testing.assert_close(y_NV.double(), x @ weight.T, atol=1e-4, rtol=1e-5)
    close = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.15, "rtol": 2**-7}
    torch.testing.assert_close(x_ND.grad.double(), grad @ weight, **close)
    torch.testing.assert_close(weight_VD.grad.double(), grad.T @ x, **close)


def test_a_frozen_weight_gets_no_gradient():
    x_ND, weight_VD, grad_NV = drawn(*SHAPES[1], torch.bfloat16)
    wide_product(x_ND, weight_VD.requires_grad_(False)).backward(grad_NV)
    assert weight_VD.grad is None and x_ND.grad is not None
