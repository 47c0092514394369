"""DeepSeekMoE: choice by hand, and sorted, padded experts equal to a loop over tokens, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.model.config import ModelConfig
from slingshot.model.dispatch import LocalDispatcher, through_all
from slingshot.model.moe import Gate, MoE, balance_loss, expert_load
from slingshot.model.transformer import Transformer

Config, Make = Callable[..., ModelConfig], Callable[..., Transformer]


def gate_with_scores(config: ModelConfig, bias: list[float], scores: list[float]) -> tuple[list[int], list[float]]:
    """Chosen experts and gate values of a token to which the router gives these scores."""
    gate = Gate(config)
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = torch.tensor(scores).logit()
        gate.e_score_correction_bias.copy_(torch.tensor(bias))
        x_ND = torch.zeros(1, config.hidden_size)
        x_ND[0, 0] = 1
        routing = gate(x_ND)
    assert torch.allclose(routing.scores_NE, torch.tensor([scores]))
    chosen = sorted(zip(routing.experts_Nk[0].tolist(), routing.gates_Nk[0].tolist(), strict=True))
    return [expert for expert, _ in chosen], [value for _, value in chosen]


SCORES = [0.9, 0.6, 0.3, 0.2]
ONE_OF_TWO, SIX = {"n_group": 2, "topk_group": 1}, {"n_routed_experts": 6}
THREE_OF_SIX = {**SIX, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}


@pytest.mark.parametrize(
    ("changes", "bias", "scores", "experts", "gates"),
    [
        # The bias moves the choice but not the gate values.
        ({}, [0.0] * 4, SCORES, [0, 1], [0.6, 0.4]),
        ({}, [0.0, 0.0, 0.4, 0.0], SCORES, [0, 2], [0.75, 0.25]),
        # Gate values are normalised on request and scaled always.
        ({"norm_topk_prob": False}, [0.0] * 4, SCORES, [0, 1], [0.9, 0.6]),
        ({"norm_topk_prob": False, "routed_scaling_factor": 2.5}, [0.0] * 4, SCORES, [0, 1], [2.25, 1.5]),
        ({"routed_scaling_factor": 2.5}, [0.0] * 4, SCORES, [0, 1], [1.5, 1.0]),
        # Groups score 0.8 + 0.1 and 0.5 + 0.45: the best expert's is closed. Biases may make open experts negative.
        (ONE_OF_TWO, [0.0] * 4, [0.8, 0.1, 0.5, 0.45], [2, 3], [0.5 / 0.95, 0.45 / 0.95]),
        (ONE_OF_TWO, [-0.9, -0.9, -0.6, -0.6], [0.8, 0.1, 0.5, 0.45], [2, 3], [0.5 / 0.95, 0.45 / 0.95]),
        # 0.6 + 0.5 beats 0.5 + 0.5, whose third would make it the larger sum; a bias of 0.2 turns that round.
        ({**SIX, **ONE_OF_TWO}, [0.0] * 6, [0.6, 0.5, 0.1, 0.5, 0.5, 0.4], [0, 1], [0.6 / 1.1, 0.5 / 1.1]),
        ({**SIX, **ONE_OF_TWO}, [0.0] * 3 + [0.2, 0.0, 0.0], [0.6, 0.5, 0.1, 0.5, 0.5, 0.4], [3, 4], [0.5, 0.5]),
        # Groups score 1.0, 0.9 and 1.1: the last three experts come from the first and the last.
        (THREE_OF_SIX, [0.0] * 6, [0.9, 0.1, 0.5, 0.4, 0.6, 0.5], [0, 4, 5], [0.45, 0.3, 0.25]),
    ],
)
def test_choice_and_gate_values_by_hand(
    deepseek: Config,
    changes: dict[str, Any],
    bias: list[float],
    scores: list[float],
    experts: list[int],
    gates: list[float],
) -> None:
    four = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    }  # fmt: skip
    assert gate_with_scores(deepseek(**four | changes), bias, scores) == (experts, pytest.approx(gates))


def naive(moe: MoE, x_ND: Tensor, config: ModelConfig) -> Tensor:
    """Equations 12 to 16 of arXiv 2412.19437 and the group limit of 2.1.2, token by token."""
    rows = []
    for x_D in x_ND:
        scores_E = (moe.gate.weight @ x_D).sigmoid()
        choice = (scores_E + moe.gate.e_score_correction_bias).tolist()
        size = config.n_routed_experts // config.n_group
        groups = [range(start, start + size) for start in range(0, config.n_routed_experts, size)]
        groups.sort(key=lambda group: -sum(sorted((choice[expert] for expert in group), reverse=True)[:2]))
        reachable = [expert for group in groups[: config.topk_group] for expert in group]
        chosen = sorted(reachable, key=lambda expert: -choice[expert])[: config.num_experts_per_tok]
        total = sum(scores_E[expert] for expert in chosen)
        y_D = torch.zeros_like(x_D)
        for expert in chosen:
            gate_FD, up_FD = moe.experts.gate_up_proj.weight[expert]
            inner_F = F.silu(gate_FD @ x_D) * (up_FD @ x_D) * config.routed_scaling_factor * scores_E[expert] / total
            y_D = y_D + moe.experts.down_proj.weight[expert] @ inner_F
        if (shared := moe.shared_experts) is not None:
            inner_F = F.silu(shared.gate_proj.weight @ x_D) * (shared.up_proj.weight @ x_D)
            y_D = y_D + shared.down_proj.weight @ inner_F
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 37, 1400], ids=["one token", "padded to 16", "padded to 128"])
@pytest.mark.parametrize(
    "shape",
    [{"n_group": 1, "topk_group": 1, "n_shared_experts": 0}, {"n_group": 4, "topk_group": 2, "n_shared_experts": 2}],
)
def test_output_and_all_gradients_equal_a_loop_over_tokens_and_another_dispatcher(
    make_model: Make, deepseek: Config, tokens: int, shape: dict[str, int]
) -> None:
    """Row counts that are no multiple of a block, experts without a token, enough assignments for the larger block."""
    config = deepseek(**shape)
    moe = make_model(config).moe_layers()[0]
    moe.gate.e_score_correction_bias[5] = -10.0  # an expert nobody chooses
    generator = torch.Generator().manual_seed(0)
    x_ND, seed_ND = torch.randn(2, tokens, config.hidden_size, generator=generator)

    def gradients(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        moe.zero_grad()
        x = x_ND.clone().requires_grad_()
        y = run(x)
        y.backward(seed_ND)
        assert x.grad is not None
        grads = {
            name: parameter.grad.clone() for name, parameter in moe.named_parameters() if parameter.grad is not None
        }
        return y.detach(), {"x": x.grad} | grads

    def serve(x: Tensor) -> Tensor:
        return moe(x[None])[0][0]

    y, found = gradients(serve)
    assert isinstance(moe.dispatcher, LocalDispatcher)
    moe.dispatcher = through_all
    loop = (lambda x: naive(moe, x, config),) if tokens < 1000 else ()  # so many would take seconds
    for reference in (*loop, serve):
        expected_y, expected = gradients(reference)
        assert torch.allclose(y, expected_y, atol=1e-5)
        assert found.keys() == expected.keys() == {"x"} | {name for name, _ in moe.named_parameters()}
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-3
            assert (found[name] - gradient).abs().max() < 1e-5 * max(1.0, float(gradient.abs().max())), name
    assert found["experts.down_proj.weight"][5].count_nonzero() == 0


def test_replayed_experts_have_gates_of_the_live_scores(deepseek: Config) -> None:
    """Experts given from 1 on are taken, in their order, 0 leaves the choice; gradients go through live scores."""
    gate = Gate(deepseek(n_group=1, topk_group=1))
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(3, gate.config.hidden_size, generator=torch.Generator().manual_seed(1))
    own = gate(x_ND)
    least = own.scores_NE.argsort(-1)[:, :3]
    replayed = least + 1
    replayed[1] = 0
    routing = gate(x_ND, replayed.to(torch.int16))
    assert routing.experts_Nk.tolist() == [least[0].tolist(), own.experts_Nk[1].tolist(), least[2].tolist()]
    scores = own.scores_NE.gather(1, routing.experts_Nk)
    torch.testing.assert_close(routing.gates_Nk, scores / scores.sum(-1, keepdim=True) * 2.5)
    (gradient,) = torch.autograd.grad(routing.gates_Nk[0, 0], gate.weight)
    assert gradient[least[0]].abs().amin(0).max() > 0


def test_expert_load_by_hand() -> None:
    experts_Nk = torch.tensor([[0, 2], [2, 1], [2, 0]])
    assert expert_load(experts_Nk, None, 4).tolist() == [2.0, 1.0, 3.0, 0.0]
    assert expert_load(experts_Nk, torch.tensor([True, False, True]), 4).tolist() == [2.0, 0.0, 2.0, 0.0]


def test_balance_loss_by_hand_is_of_sequences_and_padding_is_none() -> None:
    """Sequences are averaged, not pooled; padded positions and rows of padding only change nothing.

    E = 4, k = 2, T = 2: f counts choices times E / (k T) = 1; P is the mean share. In the first sequence f is
    (2, 1, 1, 0), the shares are (.5, .25, .25, 0) and (.4, 0, .4, .2), so P = (.45, .125, .325, .1).
    """
    even = torch.full((3, 2, 4), 0.5), torch.tensor([[[0, 1], [2, 3]]]).expand(3, 2, 2)
    assert float(balance_loss(*even)) == pytest.approx(1.0)
    scores_BTE = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [0.8, 0.0, 0.8, 0.4]], [[0.5, 0.5, 0.5, 0.5]] * 2])
    experts_BTk = torch.tensor([[[0, 1], [0, 2]], [[0, 1], [0, 1]]])
    assert float(balance_loss(scores_BTE[:1], experts_BTk[:1])) == pytest.approx(2 * 0.45 + 0.125 + 0.325)
    expected = (1.35 + 1.0) / 2
    assert float(balance_loss(scores_BTE, experts_BTk)) == pytest.approx(expected)
    padding = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(0))
    padding[:2, :2] = scores_BTE
    chosen = torch.zeros(3, 3, 2, dtype=torch.long)
    chosen[..., 1] = 3
    chosen[:2, :2] = experts_BTk
    valid = torch.tensor([[True, True, False]] * 2 + [[False] * 3])
    assert float(balance_loss(padding, chosen, valid)) == pytest.approx(expected)
