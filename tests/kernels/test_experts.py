"""Routed experts in one call: output and every gradient are the definition's, at every level of instructions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slingshot.kernels.calls import NativeCall, native_for
from slingshot.kernels.experts import experts_reference, grouped_experts, routed_experts
from slingshot.kernels.native import native_levels

from .agreement import agree

# tokens, experts, k, width, hidden: full tiles, widths that fill none, more rows than a block, experts without any
SHAPES = [(70, 4, 2, 32, 16), (100, 8, 3, 24, 20), (600, 3, 2, 64, 48), (9, 16, 1, 7, 5)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_the_definitions(
    native: Callable[[torch.dtype], NativeCall], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tokens, n_experts, k, width, hidden = shape
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, width), (n_experts, 2, hidden, width), (n_experts, width, hidden)
    x, gate_up, down = (torch.randn(size, generator=generator) for size in shapes)
    experts_Nk = torch.rand(tokens, n_experts, generator=generator).topk(k).indices
    gates = torch.rand(tokens, k, generator=generator).to(dtype).float()
    masters = gates, (gate_up / width**0.5).to(dtype).float(), (down / hidden**0.5).to(dtype).float()
    agree(
        lambda x, *weights: (routed_experts(native(dtype), x, experts_Nk, *weights),),
        lambda x, *weights: (experts_reference(x, experts_Nk, *weights),),
        x.to(dtype),
        *masters,
    )


@pytest.mark.skipif(not native_levels(), reason="no native library is built here")
def test_threads_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(size, generator=generator) for size in ((300, 32), (4, 2, 16, 32), (4, 32, 16)))
    experts_Nk, gates = torch.rand(300, 4, generator=generator).topk(2).indices, torch.rand(300, 2, generator=generator)
    native, before, results = native_for(x), torch.get_num_threads(), []
    assert native is not None
    for threads in (1, 3):
        torch.set_num_threads(threads)
        given = [t.clone().requires_grad_() for t in (x, gates, gate_up, down)]
        y = routed_experts(native, given[0], experts_Nk, *given[1:])
        results.append([y, *torch.autograd.grad(y.sum(), given)])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 40])
@torch.inference_mode()
def test_experts_by_grouped_products_are_the_definition(tokens):
    """One token, which most experts do not see; and an expert that nobody chooses."""
    generator = torch.Generator().manual_seed(0)
    x_ND, gates_Nk = torch.randn(tokens, 16, generator=generator), torch.rand(tokens, 3, generator=generator)
    experts_Nk = torch.rand(tokens, 8, generator=generator).index_fill_(1, torch.tensor([4]), 0).topk(3).indices
    weights = [0.2 * torch.randn(shape, generator=generator) for shape in ((8, 2, 24, 16), (8, 16, 24))]
    found, expected = (kernel(x_ND, experts_Nk, gates_Nk, *weights) for kernel in (grouped_experts, experts_reference))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
