"""Norms, SwiGLU, log-probabilities and their gradients: what the definitions give, at every level of instructions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slingshot.kernels.logprobs import logprobs_reference, token_logprobs
from slingshot.kernels.norm import residual_norm, rms_norm, rms_norm_reference
from slingshot.kernels.swiglu import swiglu, swiglu_reference

from .agreement import agree


def plain_residual_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x + more, rms_norm_reference(x + more, weight, eps)


SHAPES = [(1, 9), (3, 16), (5, 24), (2, 40), (130, 128), (200, 7)]


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
def test_rms_norm_by_hand(norm) -> None:
    # mean square of (1, 3) is 5; sqrt(5.5) = 2.345208
    found = norm(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0]), 0.5)
    assert torch.allclose(found, torch.tensor([1 / 2.345208, 30 / 2.345208]))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    x, more = (torch.randn(2, *shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(shape[1], generator=generator) + 0.5
    if dtype == torch.bfloat16:
        weight = weight.bfloat16().float()  # as the activations' type holds it
    agree(lambda x, w: (rms_norm(x, w, 1e-3),), lambda x, w: (rms_norm_reference(x, w, 1e-3),), x, weight)
    agree(lambda *t: residual_norm(*t, 1e-3), lambda *t: plain_residual_norm(*t, 1e-3), x, more, weight)
    agree(lambda x, w: residual_norm(x, None, w, 1e-3), lambda x, w: (x, rms_norm_reference(x, w, 1e-3)), x, weight)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_of_a_part_of_wider_rows(shape: tuple[int, int]) -> None:
    wide = torch.randn(2, shape[0], shape[1] + 5, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(shape[1])
    both = (lambda x, w, norm=norm: (norm(x[..., : shape[1]], w, 1e-3),) for norm in (rms_norm, rms_norm_reference))
    agree(*both, wide, weight)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = 4 * torch.randn(*shape, 2 * shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    agree(lambda x: (swiglu(x),), lambda x: (swiglu_reference(x),), gate_up)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", [(1, 2), (3, 16), (5, 300), (40, 512)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs(dtype: torch.dtype, shape: tuple[int, int], temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = 3 * torch.randn(shape, generator=generator).to(dtype)
    targets_N = torch.randint(shape[1], shape[:1], generator=generator)
    agree(
        lambda x: token_logprobs(x, targets_N, temperature),
        lambda x: logprobs_reference(x, targets_N, temperature),
        logits_NV,
    )


@given(rows=st.integers(1, 200), width=st.integers(1, 70), threads=st.integers(1, 3))
def test_threads_change_nothing(rows: int, width: int, threads: int) -> None:
    """Every sum is made in parts that do not depend on the number of threads."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, width, generator=generator), torch.ones(width)
    before, gradients = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        held = weight.clone().requires_grad_()
        rms_norm(x, held, 1e-3).backward(x)
        gradients.append(held.grad)
    torch.set_num_threads(before)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_torch_forms_are_exact() -> None:
    """In float64, which no native kernel takes."""
    generator = torch.Generator().manual_seed(0)
    x, more = (torch.randn(3, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.rand(6, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: residual_norm(*t, 1e-3), (x, more, weight))
    assert torch.autograd.gradcheck(swiglu, (x,))
    targets = torch.tensor([0, 5, 2])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, 0.7)[0], (x,))
