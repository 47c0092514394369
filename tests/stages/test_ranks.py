"""Stages over several processes: killed at any moment on any rank, they go on with as many or another number."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from slingshot.stages import pretrain
from slingshot.training.state import State

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("stage_ranks.py")


@pytest.fixture
def on_ranks(tmp_path):
    """on_ranks(kind, config, ranks, out, killed=None, **changes): the finished process; `killed`: rank and line."""

    def run(kind, config, ranks, out, killed=None, **changes):
        file = tmp_path / f"{kind}.json"
        file.write_text(config.model_copy(update=changes).model_dump_json())
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, SCRIPT, kind, file, out, *map(str, killed or ())]
        for _ in range(3):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if "SIGSEGV" not in done.stderr:  # gloo's own thread dies now and then; what it left is gone on from
                break
        assert (done.returncode == 0) == (killed is None), done.stderr
        return done

    return run


def test_a_run_killed_on_so_many_ranks_goes_on_with_others(on_ranks, pretraining, metrics, tmp_path):
    """Two ranks, one, four of which two share experts, two that share them; each time another one is killed -9."""
    config, out = pretraining(save_seconds=0.0), tmp_path / "out"
    for ranks, shared, killed in ((2, 1, (1, 5)), (1, 1, (0, 10)), (4, 2, (3, 15)), (2, 2, (0, 20))):
        on_ranks("pretrain", config, ranks, out, killed, expert_parallel=shared)
        assert not out.exists()
        (folder,) = tmp_path.glob("out.partial/state-*")
        agrees_with_torchs_reader(folder)
    on_ranks("pretrain", config, 2, out)
    pretrain.run(config, tmp_path / "alone")
    for mine, alone in zip(metrics(out), metrics(tmp_path / "alone"), strict=True):
        for key in ("loss", "mtp_loss", "balance_loss"):
            assert mine[key] == pytest.approx(alone[key], abs=1e-5), (mine["step"], key)


def agrees_with_torchs_reader(folder):
    reader, state = HuggingFaceStorageReader(str(folder)), State(folder)
    found = {
        name: torch.empty(known.size, dtype=known.properties.dtype)
        for name, known in reader.read_metadata().state_dict_metadata.items()
        if known.size  # it has no way to read a scalar
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert len(found) > 100 and all(torch.equal(tensor, state.read(name)) for name, tensor in found.items())


def test_rl_killed_on_two_ranks_ends_as_it_would_have(on_ranks, training, metrics, tmp_path):
    """To the byte as two ranks that were left alone; the losses of one process, to 1e-4."""
    loss = {"name": "cispo", "importance": "truncated", "kl": 0.01, "reference_steps": 2, "replay_routing": True}
    sizes = {"refill": 2, "group_size": 4, "prompts_per_step": 4, "steps": 12, "save_seconds": 0.0}
    config = training(loss=loss, **sizes)
    on_ranks("rl", config, 2, tmp_path / "out", (1, 4))
    assert not (tmp_path / "out").exists()
    for ranks, name in ((2, "out"), (2, "whole"), (1, "alone")):
        on_ranks("rl", config, ranks, tmp_path / name)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]
    for two, alone in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "alone"), strict=True):
        for key in ("reward", "loss", "kl", "entropy", "gradient_norm"):
            assert two[key] == pytest.approx(alone[key], abs=1e-4, rel=1e-3), (two["step"], key)
