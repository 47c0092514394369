"""Optimizer state elsewhere: weights are the same to the bit, in files, in the host's memory, over a resumption."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slingshot.base.errors import SlingshotError
from slingshot.training.offload import HOST, StatePlace
from slingshot.training.optimizer import Optimizer, OptimizerConfig


def steps(model, optimizer, seeds):
    for seed in seeds:
        tokens = torch.randint(0, model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(seed))
        device = model.model.norm.weight.device
        model(tokens.to(device)).logits_BTV.logsumexp(-1).mean().backward()
        optimizer.step(1.0)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in one.items()
    )


@pytest.mark.parametrize("settings", [{}, {"name": "adamw"}, {"state_dtype": "bfloat16"}])
def test_state_in_files_moves_weights_alike_and_goes_on(make_model, deepseek, tmp_path, settings):
    plain, mapped = make_model(deepseek()), make_model(deepseek())
    beside = Optimizer(plain, OptimizerConfig(**settings))
    away = Optimizer(mapped, OptimizerConfig(**settings, offload=str(tmp_path / "new" / "place")))
    steps(plain, beside, range(3))
    steps(mapped, away, range(3))
    assert same(plain.state_dict(), mapped.state_dict()) and same(beside.state(), away.state())
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(f"{tmp_path / 'new' / 'place'}/") >= len([n for n in away.state() if not n.endswith(".step")])
    assert [*tmp_path.rglob("*")] == [tmp_path / "new", tmp_path / "new" / "place"]  # names of files are gone

    resumed = Optimizer(mapped, OptimizerConfig(**settings, offload=str(tmp_path)))
    resumed.load(lambda name, _: away.state().get(name))
    steps(plain, beside, (3, 4))
    steps(mapped, resumed, (3, 4))
    assert same(plain.state_dict(), mapped.state_dict()) and same(beside.state(), resumed.state())


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"name": "adamw"}, {"state_dtype": "bfloat16"}])
@pytest.mark.parametrize("file", [False, True])
def test_state_on_the_host_moves_weights_alike(make_model, deepseek, tmp_path, settings, file):
    device = torch.accelerator.current_accelerator()
    plain, streamed = make_model(deepseek()).to(device), make_model(deepseek()).to(device)
    beside = Optimizer(plain, OptimizerConfig(**settings))
    away = Optimizer(streamed, OptimizerConfig(**settings, offload=str(tmp_path) if file else HOST))
    steps(plain, beside, range(3))
    steps(streamed, away, range(3))
    assert same(plain.state_dict(), streamed.state_dict()) and same(beside.state(), away.state())
    assert {tensor.device.type for name, tensor in away.state().items() if not name.endswith(".step")} == {"cpu"}


def test_on_an_accelerator_state_is_made_on_the_host():
    parameter = nn.Parameter(torch.empty(3, 4, dtype=torch.bfloat16, device="meta"))
    place = StatePlace([parameter], torch.float32, HOST)
    kept = place.zeros_like(parameter)
    assert place.moves(parameter) and kept.device.type == "cpu" and torch.equal(kept, torch.zeros(3, 4))
    taken = place.taken(kept, parameter)
    assert (taken.device.type, taken.dtype) == ("meta", torch.bfloat16)


def test_offload_that_can_do_nothing_is_refused(make_model, dense, tmp_path):
    with pytest.raises(SlingshotError, match=r"^optimizer\.offload: host is where the parameters are; name a folder"):
        Optimizer(make_model(dense()), OptimizerConfig(offload=HOST))
    shared = SimpleNamespace(to_local=None)
    for where in (HOST, str(tmp_path)):
        with pytest.raises(
            SlingshotError, match=r"^optimizer\.offload: parameters of several processes keep their state"
        ):
            StatePlace([shared], None, where)
    (tmp_path / "file").touch()
    optimizer = Optimizer(model := make_model(dense()), OptimizerConfig(offload=str(tmp_path / "file")))
    with pytest.raises(SlingshotError, match=r"^optimizer\.offload: .*/file: File exists$"):
        steps(model, optimizer, [0])
