"""Each group of rows meets its own matrix and no other."""

import pytest
import torch

from slingshot.kernels.grouped import grouped_matmul, grouped_matmul_reference


@pytest.mark.parametrize("counts", [[2, 0, 4, 0], [2, 2, 2, 2]], ids=["uneven", "even"])
def test_output_and_gradients_are_those_of_one_product_per_group(counts: list[int]) -> None:
    """Experts without rows get a gradient of zeros."""
    generator, rows = torch.Generator().manual_seed(0), sum(counts)
    x_ND, weight_EFD, seed_NF = (torch.randn(s, generator=generator) for s in ((rows, 3), (4, 5, 3), (rows, 5)))
    x_ND.requires_grad_(), weight_EFD.requires_grad_()
    found, expected = (product(x_ND, weight_EFD, counts) for product in (grouped_matmul, grouped_matmul_reference))
    torch.testing.assert_close(found, expected)
    dx_ND, dw_EFD = torch.autograd.grad(found, (x_ND, weight_EFD), seed_NF)
    for one, other in zip((dx_ND, dw_EFD), torch.autograd.grad(expected, (x_ND, weight_EFD), seed_NF), strict=True):
        torch.testing.assert_close(one, other)
    assert [int(dw_FD.count_nonzero()) for dw_FD in dw_EFD] == [15 if count else 0 for count in counts]
