"""Weights meeting activations: in another dtype, in parts, and stored otherwise."""

from __future__ import annotations

import torch

from slingshot.model.linear import Embedding, Linear


def test_masters_stay_float32_while_products_run_in_the_activations_dtype() -> None:
    layer = Linear(3, 2, bias=True)
    torch.nn.init.ones_(layer.weight)
    y = layer(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and y.tolist() == [6.0, 6.0]
    grad = layer.weight.grad
    assert grad is not None and grad.dtype == torch.float32 and grad[1].tolist() == [1.0, 2.0, 3.0]


def test_each_head_meets_its_part_of_the_weight() -> None:
    """Rows 1 and 2 of each head's three, as they stand and transposed, for any leading dimensions."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(5, 4 * 3)
    torch.nn.init.normal_(layer.weight, generator=generator)
    x_XHD, y_XHF = torch.randn(2, 7, 4, 5, generator=generator), torch.randn(7, 4, 2, generator=generator)
    weight_HFD = layer.weight.view(4, 3, 5)[:, 1:]
    torch.testing.assert_close(layer.by_head(x_XHD, slice(1, None)), torch.einsum("bthd,hfd->bthf", x_XHD, weight_HFD))
    back = layer.by_head(y_XHF, slice(1, None), transposed=True)
    torch.testing.assert_close(back, torch.einsum("thf,hfd->thd", y_XHF, weight_HFD))


def test_a_weight_stored_in_another_form_serves_every_product() -> None:
    """A subclass that says what its matrix is changes look-up, product and head product alike."""

    class Doubled(Embedding):
        def matrix(self, dtype: torch.dtype) -> torch.Tensor:
            return 2 * super().matrix(dtype)

    plain, doubled = Embedding(6, 3), Doubled(6, 3)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(0))
    doubled.load_state_dict(plain.state_dict())
    ids, x_ND, x_NHD = torch.tensor([[4, 0]]), torch.ones(2, 3), torch.ones(2, 2, 3)
    assert torch.equal(doubled(ids), 2 * plain(ids)) and torch.equal(doubled.product(x_ND), 2 * plain.product(x_ND))
    assert torch.equal(doubled.by_head(x_NHD, slice(1, 2)), 2 * plain.by_head(x_NHD, slice(1, 2)))
