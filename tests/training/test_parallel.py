"""Two ranks under torchrun (gloo, FSDP2) train as one process does."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slingshot.checkpoint.load_save import hf_tensors
from slingshot.checkpoint.safetensors import write_shards
from slingshot.model.transformer import Transformer
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
def alone(ranks):
    return ranks.train(Parallel())


@pytest.fixture(scope="module")
def two(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model = Transformer(ranks.CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(ranks.CONFIG.to_hf()))
    write_shards(folder / "model", hf_tensors(ranks.CONFIG, model.state_dict()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, SCRIPT, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_losses_and_norms_are_those_of_one_process(alone, two):
    """20 float32 steps: cross entropy, MTP and balance loss, norm and loads, on either rank, over a resumption."""
    assert len(alone["losses"]) == 20 and alone["losses"][-1][0] < alone["losses"][0][0] - 0.1
    for rank in two:
        assert torch.allclose(torch.tensor(rank["losses"]), torch.tensor(alone["losses"]), atol=1e-5, rtol=1e-6)


def test_router_biases_are_equal_on_all_ranks(alone, two):
    assert two[0]["biases"] == two[1]["biases"] == alone["biases"]
    assert any(abs(bias) > 0.05 for layer in alone["biases"] for bias in layer)


def test_parameters_are_sharded_and_gather_to_the_same_weights(alone, two):
    assert two[0]["sharded"] == two[1]["sharded"] == [True] and alone["sharded"] == [False]
    assert two[0]["weights"] == two[1]["weights"]
    for name, values in alone["weights"].items():
        assert two[0]["weights"][name] == pytest.approx(values, abs=1e-4), name


def test_rows_and_numbers_meet_on_every_rank(alone, two):
    rows = [{"row": row, "text": "é"} for row in range(5)]
    assert [each["gathered"] for each in (alone, *two)] == [rows] * 3
    assert [(each["sums"], each["max"]) for each in two] == [({"ranks": 2.0, "rank": 1.0}, 1)] * 2
    assert alone["sums"] == {"ranks": 1.0, "rank": 0.0}


def test_each_rank_reads_only_the_bytes_it_keeps(two):
    for rank in two:
        reading = rank["reading"]
        assert reading["same"] and reading["read"] == reading["own"] < 0.7 * reading["file"]
