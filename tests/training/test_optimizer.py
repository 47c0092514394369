"""The optimizer step: Muon computed by hand, AdamW as torch's, which parameter goes where, schedule, resuming."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from slingshot.training.offload import StatePlace
from slingshot.training.optimizer import (
    AdamW,
    Muon,
    Optimizer,
    OptimizerConfig,
    newton_schulz,
    schedule,
    update_router_biases,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rule(kind, parameters, lr, decay, kept_as=None):
    own = [(0.9, 0.95)] if kind is AdamW else [0.9, torch.float32]
    return kind(parameters, StatePlace(parameters, kept_as, None), lr, decay, *own)


@pytest.mark.parametrize("shape", [(3, 2, 8, 20), (3, 2, 20, 8), (12, 12)])
def test_newton_schulz_pushes_singular_values_to_one_in_every_matrix(shape):
    """Five quintic steps leave them between 0.6 and 1.3; directions stay; a batch is its matrices one by one."""
    matrices = normal(*shape)
    if len(shape) > 2:
        matrices *= torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    result = newton_schulz(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    for found, matrix in zip(result.view(-1, *shape[-2:]), matrices.view(-1, *shape[-2:]), strict=True):
        assert torch.allclose(found, newton_schulz(matrix), atol=1e-5)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        through = u.T @ found @ vh.T
        assert (through - through.diag().diag()).abs().max() < 1e-3 and (through.diag() > 0.6).all()


def test_newton_schulz_of_a_diagonal_by_hand():
    """One step on diag(3, 4): normalised to (0.6, 0.8), then 3.4445 x - 4.7750 x^3 + 2.0315 x^5 each."""
    expected = [3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5 for x in (0.6, 0.8)]
    found = newton_schulz(torch.diag(torch.tensor([3.0, 4.0])), steps=1)
    assert found.diag().tolist() == pytest.approx(expected, rel=1e-5)
    assert newton_schulz(torch.zeros(2, 4, 3)).count_nonzero() == 0


def test_muon_by_an_independent_computation():
    """Two steps of W -= lr (0.2 sqrt(max(M, N)) NS(g + 0.9 (m - g)) + 0.1 W), m = 0.9 m + 0.1 g; also of a stack."""
    plain, stack = nn.Parameter(normal(3, 5)), nn.Parameter(normal(2, 2, 3, 5, seed=1))
    optimizer = rule(Muon, [plain, stack], 0.02, 0.1)
    matrices = [plain.detach().clone(), *stack.detach().clone().view(4, 3, 5)]
    momenta = [torch.zeros(3, 5) for _ in matrices]
    for step in range(2):
        gradients = [normal(3, 5, seed=10 + step), *normal(4, 3, 5, seed=20 + step)]
        plain.grad, stack.grad = gradients[0].clone(), torch.stack(gradients[1:]).view(2, 2, 3, 5)
        optimizer.step(1.0)
        for index, gradient in enumerate(gradients):
            momenta[index] = 0.9 * momenta[index] + 0.1 * gradient
            direction = gradient + 0.9 * (momenta[index] - gradient)
            x = direction / direction.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
            matrices[index] = matrices[index] - 0.02 * (0.2 * math.sqrt(5) * x + 0.1 * matrices[index])
    assert torch.allclose(plain, matrices[0], atol=1e-6)
    assert torch.allclose(stack.view(4, 3, 5), torch.stack(matrices[1:]), atol=1e-6)


def test_muon_leaves_parameters_without_gradient_alone():
    parameter = nn.Parameter(normal(3, 5))
    before = parameter.detach().clone()
    rule(Muon, [parameter], 0.1, 0.5).step(1.0)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs_to_the_bit(dtype):
    """Over changing rates, with and without decay, a parameter without a gradient among them."""
    shapes = (5, 7), (64, 64), (3,), (2, 2)
    ours, theirs = ([nn.Parameter(normal(*shape).to(dtype)) for shape in shapes] for _ in range(2))
    mine = [rule(AdamW, ours[:2], 1e-2, 0.1), rule(AdamW, ours[2:], 1e-2, 0.0)]
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        for parameter in (*ours[:3], *theirs[:3]):
            parameter.grad = normal(*parameter.shape, seed=step).to(dtype)
        for part in mine:
            part.step(step + 1)
        for group in torchs.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        torchs.step()
    assert all(map(torch.equal, ours, theirs)) and torch.equal(ours[3], normal(2, 2).to(dtype))
    state = {**mine[0].state, **mine[1].state}
    for each, its in zip(ours[:3], theirs[:3], strict=True):  # and so are checkpoints
        torch.testing.assert_close(state[each], dict(torchs.state[its]), rtol=0, atol=0)
    assert ours[3] not in state


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_momenta_kept_in_16_bits_are_those_of_32_rounded_after_every_step(kind):
    def part(kept_as):
        parameters = [nn.Parameter(normal(8, 8)), nn.Parameter(normal(3, 8, seed=1))]
        return parameters, rule(kind, parameters, 1e-2, 0.1, kept_as)

    (narrow, ours), (wide, theirs) = part(torch.bfloat16), part(None)
    for step in range(3):
        for parameters, its in ((narrow, ours), (wide, theirs)):
            for parameter in parameters:
                parameter.grad = normal(*parameter.shape, seed=10 + step)
            its.step(1.0)
        for state in theirs.state.values():
            for name in state.keys() - {"step"}:
                state[name].copy_(state[name].bfloat16())
    assert all(map(torch.equal, narrow, wide))
    dtypes = {each.dtype for state in ours.state.values() for name, each in state.items() if name != "step"}
    assert dtypes == {torch.bfloat16}


STEP = """
import sys
import torch
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.training.optimizer import Optimizer, OptimizerConfig

shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
model = Transformer.empty(ModelConfig(family="dense", num_key_value_heads=1, **shape))
model.init_weights(torch.Generator().manual_seed(0))
optimizer = Optimizer(model, OptimizerConfig())
model(torch.zeros(1, 4, dtype=torch.long)).logits_BTV.sum().backward()
optimizer.step(1.0)
print(*{"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys())
"""


@pytest.mark.slow
def test_a_step_needs_neither_torchs_compiler_nor_its_algebra():
    """Which would take longer to import than torch itself, at every stage's start."""
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def take_step(model, optimizer, seed=0, fraction=1.0):
    rows = torch.randint(0, model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(seed))
    output = model(rows, mtp=model.config.num_nextn_predict_layers > 0)
    loss = output.logits_BTV.logsumexp(-1).mean()
    if output.mtp_hidden_BTD is not None:
        loss = loss + model.lm_logits(output.mtp_hidden_BTD).logsumexp(-1).mean()
    loss.backward()
    return optimizer.step(fraction)


def test_matrices_go_to_muon_and_the_rest_to_adamw_each_once(make_model, deepseek):
    """Embedding, head, router and norms are AdamW's; norms decay nowhere."""
    model = make_model(deepseek())
    optimizer = Optimizer(model, OptimizerConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain, by_muon = ({names[p] for p in part.parameters} for part in optimizer.parts)
    assert by_muon | decayed | plain == set(names.values()) and len(by_muon) + len(decayed) + len(plain) == len(names)
    assert decayed == {"model.embed_tokens.weight", "lm_head.weight"} | {
        f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2, 3)
    }
    assert "model.layers.1.mlp.experts.gate_up_proj.weight" in by_muon and "model.layers.3.eh_proj.weight" in by_muon
    assert all("norm" in name for name in plain)
    assert [part.weight_decay for part in optimizer.parts] == [0.1, 0.0, 0.1]


def test_adamw_alone_has_one_learning_rate(make_model, dense):
    model = make_model(dense())
    parts = Optimizer(model, OptimizerConfig(name="adamw", lr=0.5, adam_lr=0.1)).parts
    assert {part.lr for part in parts} == {0.5} and sum(len(p.parameters) for p in parts) == len([*model.parameters()])


def test_a_step_clips_the_norm_scales_the_rate_and_drops_the_gradients(make_model, dense):
    """AdamW's first step moves every weight by lr g / |g|; the norm returned is the one before clipping."""
    model = make_model(dense())
    optimizer = Optimizer(model, OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.0, clip=0.5))
    before = model.model.norm.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradient = model.model.norm.weight.grad
    assert gradient is not None
    gradient[:2] = torch.tensor([3.0, -4.0])
    assert optimizer.step(fraction=0.5) == pytest.approx(5.0)
    assert (model.model.norm.weight - before)[:3].tolist() == pytest.approx([-0.005, 0.005, 0.0], abs=1e-6)
    moment = optimizer.state()["model.norm.weight.exp_avg"]
    clipped = [0.3, -0.4]  # to norm 0.5
    assert moment[:2].tolist() == pytest.approx([0.1 * value for value in clipped], rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_weights_untouched(make_model, dense, value):
    model = make_model(dense())
    optimizer = Optimizer(model, OptimizerConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    assert not math.isfinite(optimizer.step(1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_schedule_warms_up_stays_and_decays_by_hand():
    config = OptimizerConfig(warmup=0.2, decay=0.4, final=0.1)
    # 2 steps of warm-up, 4 of decay: 6 to 9 at 1, .75, .5, .25 of the way from 0.1 to 1
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325]
    assert [schedule(config, step, 10) for step in range(10)] == pytest.approx(expected)
    flat = OptimizerConfig(warmup=0.0, decay=0.0)
    assert [schedule(flat, step, 3) for step in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("changes", [{}, {"name": "adamw"}])
def test_a_restored_optimizer_goes_on_identically(make_model, deepseek, changes):
    config = OptimizerConfig(**changes)
    model = make_model(deepseek())
    optimizer = Optimizer(model, config)
    for seed in range(3):
        take_step(model, optimizer, seed)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    norms = [take_step(model, optimizer, seed) for seed in (3, 4)]

    again = make_model(deepseek(), seed=9)
    again.load_state_dict(weights)
    restored = Optimizer(again, config)
    restored.load(lambda name, _: state.get(name))
    assert [take_step(again, restored, seed) for seed in (3, 4)] == norms
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())

    fresh = make_model(deepseek())
    fresh.load_state_dict(weights)
    unrestored = Optimizer(fresh, config)
    for seed in (3, 4):
        take_step(fresh, unrestored, seed)
    assert not torch.equal(fresh.model.norm.weight, model.model.norm.weight), "the state must matter"


def test_router_biases_rise_where_the_load_is_low(make_model, deepseek):
    model = make_model(deepseek())
    before = [layer.gate.e_score_correction_bias.clone() for layer in model.moe_layers()]
    load = torch.tensor([8.0, 0.0, 4.0, 4.0, 4.0, 4.0, 2.0, 6.0])
    update_router_biases(model, [load, load.flip(0), load], speed=0.01)
    signs = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, -1.0])
    moved = [layer.gate.e_score_correction_bias - old for layer, old in zip(model.moe_layers(), before, strict=True)]
    for found, expected in zip(moved, (signs, signs.flip(0), signs), strict=True):
        assert torch.allclose(found, 0.01 * expected, atol=1e-7)
