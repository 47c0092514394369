"""A group's prompt computed once: hidden states, losses, gradients and loads are those of whole trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slingshot.kernels.native import native_levels
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.rollout.trajectory import Trajectory, pack
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem
from slingshot.training.lora import LoRAConfig, add_lora
from slingshot.training.parallel import Parallel
from slingshot.training.policy import PolicyLoss, PolicyRows, policy_step, trainer_logprobs

Make, Config = Callable[..., Transformer], Callable[..., ModelConfig]
ALONE = Parallel()


@pytest.fixture(params=["off", *native_levels()])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLINGSHOT_NATIVE", request.param)


@pytest.fixture(params=["dense", "deepseek_v3"])
def model(request: pytest.FixtureRequest, make_model: Make, dense: Config, deepseek: Config) -> Iterator[Transformer]:
    yield make_model(dense() if request.param == "dense" else deepseek())


def trajectories(config: ModelConfig, prompt: int = 9) -> list[Trajectory]:
    """Three problems, four responses each: of one turn, and of two with what an environment says between them."""
    generator = torch.Generator().manual_seed(0)
    task, made = load_task("arithmetic"), []

    def ids(count: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()

    for number in range(3):
        item, asked = Item(task, Problem("p", f"{number}"), f"{number}"), ids(prompt + number)
        for index in range(4):
            each = Trajectory(item, asked, [])
            for read, said in ((0, 2 + 3 * index), (2 * (index % 2), index % 2)):
                each.ids, each.mask = each.ids + ids(read + said), each.mask + [0] * read + [1] * said
            each.logprobs = [-4.0 * float(sampled) for sampled in each.mask]
            each.advantage = index - 1.5
            made.append(each)
    return made


def step(model: Transformer, rows: PolicyRows, **loss: Any) -> tuple[dict[str, float], list[Tensor], dict[str, Tensor]]:
    reference = Transformer(model.config)
    reference.load_state_dict(model.state_dict(), strict=False)
    model.zero_grad()
    config = PolicyLoss(kl=0.1, **loss)
    values, load_LE = policy_step(model, reference, rows, len(rows), config, 0.9, 2, ALONE)
    return values, load_LE, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model: Transformer, shared: PolicyRows, apart: PolicyRows, **loss: Any) -> None:
    assert shared.prefixes_BT is not None and apart.prefixes_BT is None
    (found, loads, gradients), (values, load_LE, expected) = (step(model, rows, **loss) for rows in (shared, apart))
    if not found["mtp_loss"]:  # then no one asks who predicts a token from two places off
        del found["far"], values["far"]
    assert found == pytest.approx(values, rel=1e-4, abs=1e-6) and gradients.keys() == expected.keys()
    main = (
        model.config.n_moe_layers - model.config.num_nextn_predict_layers
    )  # MTP's layer also has a place behind each document, and what follows there
    for load, other in zip(loads[:main], load_LE[:main], strict=True):
        assert torch.equal(load, other)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 2e-4 * gradient.abs().max() + 1e-8, name


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("length", [40, 96])
def test_an_update_is_that_of_whole_trajectories(model: Transformer, length: int) -> None:
    """In rows that hold a group each, and in such that split it; KL, and MTP where the model has it."""
    each = trajectories(model.config)
    own = 1 + model.config.num_nextn_predict_layers
    for aggregation in ("token", "prompt"):
        shared, apart = (pack(each, length, aggregation, own=keeps) for keeps in (own, None))
        same(model, shared, apart)
    assert (shared.segments_BT > 0).sum() < (apart.segments_BT > 0).sum()
    first, second = (trainer_logprobs(model, rows, len(rows), 1.0, 4) for rows in (shared, apart))
    by_place = [logprobs[rows.mask_BT > 0].sort().values for logprobs, rows in ((first, shared), (second, apart))]
    torch.testing.assert_close(*by_place, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("level")
def test_an_update_of_adapters_is_that_of_whole_trajectories(model: Transformer) -> None:
    add_lora(model, LoRAConfig(rank=4, alpha=8), 0, ALONE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    each = trajectories(model.config)
    same(model, *(pack(each, 96, own=keeps) for keeps in (1, None)), mtp=0.0)


def test_an_update_replays_the_samplers_experts_in_the_prompt_too(make_model: Make, deepseek: Config) -> None:
    """Responses to a problem were sampled behind one prompt: its experts are the same in all of them."""
    model, generator = make_model(deepseek()), torch.Generator().manual_seed(3)
    each = trajectories(model.config)
    told: dict[str, Tensor] = {}
    for t in each:
        experts = torch.rand(len(t.ids) - 1, 2, 8, generator=generator).argsort(-1)[..., :3]
        prompt = t.mask.index(1)
        experts[:prompt] = told.setdefault(t.item.key, experts[:prompt].clone())
        t.routed_experts = experts
    same(model, *(pack(each, 96, own=keeps) for keeps in (2, None)))


@pytest.mark.parametrize("prompt", [9, pytest.param(300, marks=pytest.mark.slow)])
def test_hidden_states_and_their_gradients_are_those_of_whole_documents(
    make_model: Make, dense: Config, deepseek: Config, prompt: int
) -> None:
    """In float64, but rotary tables and routers, float32 in any. Long rows take torch's fused kernel with a mask."""
    for config, tolerance in ((dense(), 1e-7), (deepseek(), 1e-5)):
        model = make_model(config)
        model.cast(torch.float64)
        each = trajectories(config, prompt)
        found = []
        for own in (2, None):
            rows = pack(each, 2 * prompt, own=own)
            model.zero_grad()
            hidden_BTD = model(**rows.documents()).hidden_BTD
            (hidden_BTD * rows.mask_BT[..., None]).pow(3).sum().backward()
            found.append([hidden_BTD[rows.mask_BT > 0].pow(2).sum(), *(p.grad for p in model.parameters())])
        for value, expected in zip(*found, strict=True):
            if value is not None:
                assert (value - expected).abs().max() <= tolerance * expected.abs().max() + 1e-12
