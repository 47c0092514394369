"""Ranks under torchrun (gloo, FSDP2, experts by all-to-all) train as one process does."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import hf_tensors
from slingshot.checkpoint.safetensors import write_shards
from slingshot.model.transformer import Transformer
from slingshot.training.expert_parallel import share_experts
from slingshot.training.parallel import Parallel

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def ranks():
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    return ranks.train(Parallel(), tmp_path_factory.mktemp("alone") / "state")


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "model"
    model = Transformer(ranks.CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ranks.CONFIG.to_hf()))
    write_shards(folder, hf_tensors(ranks.CONFIG, model.state_dict()))
    return folder


@pytest.fixture(scope="module", params=[(2, 1), (4, 2)], ids=["dp 2", "dp 2 x ep 2"])
def spread(request, checkpoint, tmp_path_factory):
    """What every rank of so many says, of which so many share experts."""
    (size, expert_parallel), folder = request.param, tmp_path_factory.mktemp("spread")
    (folder / "model").symlink_to(checkpoint)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*torchrun, SCRIPT, folder, str(expert_parallel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]


def test_losses_and_norms_are_those_of_one_process(alone, spread):
    """20 float32 steps: cross entropy, MTP and balance loss, norm and loads, on every rank, over a resumption; also
    where blocks and logits are computed again."""
    assert len(alone["losses"]) == 20 and alone["losses"][-1][0] < alone["losses"][0][0] - 0.1
    for rank in spread:
        for losses in (rank["losses"], rank["again"], rank["some"]):
            assert torch.allclose(torch.tensor(losses), torch.tensor(alone["losses"]), atol=1e-5, rtol=1e-6)


def test_products_in_fp8_are_sharded_alike(alone, spread):
    """A token's products do not depend on who has it; gradients of weights round in tiles of a rank's own tokens."""
    losses = torch.tensor(alone["fp8"])
    assert abs(losses[0, 0] - alone["losses"][0][0]) > 1e-5
    for rank in spread:
        found = torch.tensor(rank["fp8"])
        assert torch.allclose(found[0, 0], losses[0, 0], atol=1e-5) and torch.allclose(found, losses, rtol=0.03)


def test_router_biases_are_equal_on_all_ranks(alone, spread):
    assert all(rank["biases"] == alone["biases"] for rank in spread)
    assert any(abs(bias) > 0.05 for layer in alone["biases"] for bias in layer)


def test_parameters_are_sharded_and_gather_to_the_same_weights(alone, spread):
    assert all(rank["sharded"] == [True] for rank in spread) and alone["sharded"] == [False]
    assert all(rank["weights"] == spread[0]["weights"] for rank in spread)
    for name, values in alone["weights"].items():
        assert spread[0]["weights"][name] == pytest.approx(values, abs=1e-4), name


def test_rows_and_numbers_meet_on_every_rank(alone, spread):
    rows, size = [{"row": row, "text": "é"} for row in range(5)], len(spread)
    assert all(each["gathered"] == rows for each in (alone, *spread))
    sums = {"ranks": size, "rank": sum(range(size))}
    assert all((each["sums"], each["max"]) == (sums, size - 1) for each in spread)
    assert alone["sums"] == {"ranks": 1.0, "rank": 0.0}


def test_each_rank_reads_only_the_bytes_it_keeps(spread):
    for rank in spread:
        reading = rank["reading"]
        assert reading["same"] and reading["read"] == reading["own"] < (1.4 / len(spread)) * reading["file"]


@pytest.mark.parametrize(("size", "expert_parallel"), [("1", 2), ("4", 3)])
def test_processes_that_cannot_share_experts_are_refused_before_they_meet(monkeypatch, size, expert_parallel):
    monkeypatch.setenv("WORLD_SIZE", size)
    message = f"expert_parallel: {expert_parallel} is no divisor of {size} processes"
    with pytest.raises(SlingshotError, match=message):
        Parallel.start(expert_parallel)


def test_experts_that_cannot_be_shared_out_evenly_are_refused(ranks):
    class Three:
        def size(self):
            return 3

    with pytest.raises(SlingshotError, match="8 routed experts cannot be shared by 3 ranks; make expert_p"):
        share_experts(Transformer(ranks.CONFIG).moe_layers()[0], Three())
