"""Weights meeting activations: stacked expert matrices, and float32 masters with activations in another dtype."""

from __future__ import annotations

import torch

from slingshot.model.linear import GroupedLinear, Linear


def test_each_group_of_rows_meets_its_own_matrix_and_no_other() -> None:
    """Forward and both gradients against one product per group; experts without rows get a gradient of zeros."""
    generator = torch.Generator().manual_seed(0)
    layer, counts = GroupedLinear(4, 3, 2, 5), [2, 0, 4, 0]
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    x_ND = torch.randn(6, 3, generator=generator, requires_grad=True)
    seed_NF = torch.randn(6, 10, generator=generator)
    y_NF = layer(x_ND, counts)
    y_NF.backward(seed_NF)

    x, weight = x_ND.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    expected = torch.cat([x[:2] @ weight[0].flatten(0, 1).T, x[2:] @ weight[2].flatten(0, 1).T])
    expected.backward(seed_NF)
    assert torch.allclose(y_NF, expected, atol=1e-6)
    assert x_ND.grad is not None and x.grad is not None and torch.allclose(x_ND.grad, x.grad, atol=1e-6)
    assert (
        layer.weight.grad is not None
        and weight.grad is not None
        and torch.allclose(layer.weight.grad, weight.grad, atol=1e-6)
    )
    assert layer.weight.grad[[1, 3]].count_nonzero() == 0


def test_masters_stay_float32_while_products_run_in_the_activations_dtype() -> None:
    layer = Linear(3, 2, bias=True)
    torch.nn.init.ones_(layer.weight)
    y = layer(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and y.tolist() == [6.0, 6.0]
    assert (
        layer.weight.grad is not None
        and layer.weight.grad.dtype == torch.float32
        and layer.weight.grad[1].tolist() == [1.0, 2.0, 3.0]
    )
