"""Matrices that are rounded while they are trained: what every product sees, and where its gradient goes."""

import torch

from slingshot.model.config import ModelConfig
from slingshot.model.linear import GroupedLinear, Linear
from slingshot.model.moe import MoE
from slingshot.model.rounded import RoundedMatrix
from slingshot.model.stored import hold
from slingshot.quantization.gptq import rounded
from slingshot.quantization.integers import IntegerGrid, from_numbers

GRID = IntegerGrid(4, 32)


def rounding(module, weight):
    """The module with its weight over scales of the grid, rounded at every product."""
    numbers, scales = (each.view(*weight.shape[:-1], -1) for each in rounded(weight.flatten(0, -2), GRID))
    latents = (weight.unflatten(-1, (scales.shape[-1], -1)) / scales[..., None]).flatten(-2)
    assert torch.equal(GRID.nearest(latents), numbers)
    hold(module, RoundedMatrix(latents, scales, GRID.nearest))
    return module


def test_a_product_is_of_the_rounded_numbers_and_its_gradient_passes_as_if_nothing_was_rounded():
    """dL/dlatent is the scale times dL/dweight, by autograd of latent + (rounded - latent) cut off from the graph."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(7, 64)
    linear = rounding(Linear(64, 24), weight)
    linear(x).square().sum().backward()
    held = linear.weight
    latents = held.latents.detach().clone().requires_grad_()
    passed = latents + (GRID.nearest(latents) - latents).detach()
    wanted = (passed.unflatten(-1, (2, 32)) * held.scales[..., None]).flatten(-2)
    y = x @ wanted.T
    y.square().sum().backward()
    assert torch.allclose(linear(x), y) and torch.equal(held.matrix(torch.float32), wanted)
    assert torch.allclose(held.latents.grad, latents.grad, rtol=1e-5, atol=1e-5)
    assert held.latents.grad.abs().min() > 0  # also of the weights that the grid cuts off
    assert held.matrix(torch.bfloat16).equal(from_numbers(held.numbers(), held.scales).bfloat16())


def test_small_moves_change_nothing_until_a_number_flips():
    linear = rounding(Linear(32, 1), torch.linspace(-1.0, 1.0, 32)[None])
    held, before = linear.weight, linear.weight.matrix(torch.float32)
    with torch.no_grad():
        held.latents[0, 0] += 0.01
        held.latents[0, 9] += 1.0
    changed = (held.matrix(torch.float32) != before)[0].nonzero().flatten().tolist()
    assert changed == [9] and held.matrix(torch.float32)[0, 9] - before[0, 9] == held.scales[0, 0]


def test_stacked_experts_are_rounded_each_by_its_own_scales():
    torch.manual_seed(1)
    weight, x = torch.randn(3, 2, 32, 64), torch.randn(9, 64)
    grouped = rounding(GroupedLinear(3, 64, 2, 32), weight)
    y = grouped(x, [4, 0, 5])
    stack = grouped.weight.matrix(torch.float32)
    assert torch.allclose(y, torch.cat([x[:4] @ stack[0].flatten(0, 1).T, x[4:] @ stack[2].flatten(0, 1).T]), atol=1e-5)
    y.sum().backward()
    assert grouped.weight.latents.grad[0].any() and not grouped.weight.latents.grad[1].any()


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
        rounding(grouped, grouped.weight.detach())
    found = []
    for routed in (lambda: moe(x)[0], lambda: moe.dispatcher(x, moe.gate(x), moe.experts)):
        y = routed()
        y.square().sum().backward()
        found.append([y, x.grad, *(grouped.weight.latents.grad for grouped in both)])
        x.grad = None
        moe.zero_grad()
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
