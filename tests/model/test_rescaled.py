"""Matrices whose scales are trained: what every product sees, and where its gradient goes."""

import pytest
import torch

from slingshot.model.config import ModelConfig
from slingshot.model.linear import GroupedLinear, Linear
from slingshot.model.moe import MoE
from slingshot.model.rescaled import RescaledMatrix
from slingshot.model.stored import hold
from slingshot.quantization.gptq import rounded
from slingshot.quantization.integers import IntegerGrid, from_numbers


def rescaling(module, weight):
    """The module with its weight on a grid of 4 bits."""
    numbers, scales = (each.view(*weight.shape[:-1], -1) for each in rounded(weight.flatten(0, -2), IntegerGrid(4, 32)))
    hold(module, RescaledMatrix(numbers.to(torch.int8), scales, torch.Generator().manual_seed(0)))
    return module


def test_a_product_is_of_numbers_times_scales_and_its_gradient_goes_to_the_scales():
    """By autograd of the same, which knows nothing of bfloat16's rounding."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(7, 64)
    linear = rescaling(Linear(64, 24), weight)
    linear(x).square().sum().backward()
    held = linear.weight
    factors = torch.ones_like(held.scales, requires_grad=True)
    wanted = from_numbers(held.numbers, held.scales * factors)
    y = x @ wanted.T
    y.square().sum().backward()
    assert torch.allclose(linear(x), y) and torch.equal(held.matrix(torch.float32), wanted)
    assert torch.allclose(held.factors.grad, factors.grad, rtol=1e-5, atol=1e-4)
    assert held.matrix(torch.bfloat16).equal(wanted.bfloat16())


def test_scales_are_rounded_to_bfloat16_at_every_product():
    linear = rescaling(Linear(64, 1), torch.linspace(-1.0, 1.0, 64)[None])
    held, before = linear.weight, linear.weight.matrix(torch.float32)
    with torch.no_grad():
        held.factors[0, 1] += 0.02
    assert torch.equal(held.rescaled(), held.rescaled().bfloat16().float())
    changed = (held.matrix(torch.float32) != before)[0]
    assert not changed[:32].any() and changed[32:][held.numbers[0, 32:] != 0].all()


def test_scales_begin_as_they_were_and_the_smallest_move_changes_a_few():
    """Of the millions that a model has, so that what they come to moves as they do."""
    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(1000, 10, generator=generator) - 0.5).bfloat16().float()
    held = RescaledMatrix(torch.ones(1000, 320, dtype=torch.int8), scales, generator)
    assert torch.equal(held.rescaled(), scales)
    with torch.no_grad():
        held.factors *= 1.0002
    changed = held.rescaled() != scales
    assert 0.01 < changed.float().mean() < 0.1
    assert (held.rescaled() / scales).mean() == pytest.approx(1.0002, abs=1e-4)


def test_stacked_experts_have_each_scales_of_its_own():
    torch.manual_seed(1)
    weight, x = torch.randn(3, 2, 32, 64), torch.randn(9, 64)
    grouped = rescaling(GroupedLinear(3, 64, 2, 32), weight)
    y = grouped(x, [4, 0, 5])
    stack = grouped.weight.matrix(torch.float32)
    assert torch.allclose(y, torch.cat([x[:4] @ stack[0].flatten(0, 1).T, x[4:] @ stack[2].flatten(0, 1).T]), atol=1e-5)
    y.sum().backward()
    assert grouped.weight.factors.grad[0].any() and not grouped.weight.factors.grad[1].any()


def test_routed_experts_give_the_same_gradients_through_kernels_and_without():
    torch.manual_seed(2)
    config = ModelConfig(
        family="deepseek_v3", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip
    moe, x = MoE(config), torch.randn(300, 64, requires_grad=True)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    both = moe.experts.gate_up_proj, moe.experts.down_proj
    for grouped in both:
        rescaling(grouped, grouped.weight.detach())
    found = []
    for routed in (lambda: moe(x)[0], lambda: moe.dispatcher(x, moe.gate(x), moe.experts)):
        y = routed()
        y.square().sum().backward()
        found.append([y, x.grad, *(grouped.weight.factors.grad for grouped in both)])
        x.grad = None
        moe.zero_grad()
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
