"""RMSNorm by hand, and the written-out gradient against that of the definition."""

from __future__ import annotations

import pytest
import torch

from slingshot.kernels.norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
def test_rms_norm_by_hand(norm) -> None:
    # mean square of (1, 3) is 5; sqrt(5.5) = 2.345208
    found = norm(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0]), 0.5)
    assert torch.allclose(found, torch.tensor([1 / 2.345208, 30 / 2.345208]))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_output_and_gradients_are_the_definitions(dtype: torch.dtype, allowed: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, seed = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 5, 16), (16,), (2, 5, 16)))
    x.requires_grad_(), weight.requires_grad_()
    found, expected = rms_norm(x, weight, 1e-3), rms_norm_reference(x, weight, 1e-3)
    torch.testing.assert_close(found, expected, atol=allowed, rtol=allowed)
    for one, other in zip(*(torch.autograd.grad(y, (x, weight), seed) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=allowed * float(other.abs().max()), rtol=allowed)
