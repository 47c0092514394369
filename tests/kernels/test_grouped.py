"""Each group of rows meets its own matrix and no other."""

import torch

from slingshot.kernels.grouped import grouped_matmul, grouped_matmul_reference


def test_output_and_gradients_are_those_of_one_product_per_group() -> None:
    """Experts without rows get a gradient of zeros."""
    generator, counts = torch.Generator().manual_seed(0), [2, 0, 4, 0]
    x_ND, weight_EFD, seed_NF = (torch.randn(s, generator=generator) for s in ((6, 3), (4, 5, 3), (6, 5)))
    x_ND.requires_grad_(), weight_EFD.requires_grad_()
    found, expected = (product(x_ND, weight_EFD, counts) for product in (grouped_matmul, grouped_matmul_reference))
    torch.testing.assert_close(found, expected)
    dx_ND, dw_EFD = torch.autograd.grad(found, (x_ND, weight_EFD), seed_NF)
    for one, other in zip((dx_ND, dw_EFD), torch.autograd.grad(expected, (x_ND, weight_EFD), seed_NF), strict=True):
        torch.testing.assert_close(one, other)
    assert dw_EFD[[1, 3]].count_nonzero() == 0 and dw_EFD[2].count_nonzero() == 15
