"""Stages over several processes: killed at any moment on any rank, they go on with as many or another number."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from slingshot.cost.receipt import Receipt
from slingshot.stages import pretrain, rl, sft, tokenize
from slingshot.training.state import State
from tests.rollout.vllm_double import VllmDouble

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("stage_ranks.py")


@pytest.fixture
def on_ranks(tmp_path):
    """on_ranks(kind, config, ranks, out, trouble, **changes): the finished process; `trouble`: of one rank."""

    def run(kind, config, ranks, out, trouble=None, **changes):
        file = tmp_path / f"{kind}.json"
        file.write_text(config.model_copy(update=changes).model_dump_json())
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, SCRIPT, kind, file, out, json.dumps(trouble or {})]
        for _ in range(3):
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
            if "SIGSEGV" not in done.stderr:  # gloo's own thread dies now and then; what it left is gone on from
                break
        assert (done.returncode == 0) == (trouble is None), done.stderr
        return [line for line in done.stderr.splitlines() if line.startswith("slingshot:")]

    return run


def test_a_run_killed_on_so_many_ranks_goes_on_with_others(on_ranks, pretraining, metrics, tmp_path):
    """Two ranks, four of which two share experts, one; each time another one is killed -9. Half of the rows are of
    token shards, half of a task's documents."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(f"{i} and {k} make {i + k}." for i in range(40) for k in range(i)))
    written = {"text": [str(text)], "vocab_size": 300, "shard_tokens": 2000, "threads": 1}
    tokenize.run(tokenize.TokenizeConfig.parse(written, "shards"), tmp_path / "shards")
    config = pretraining(save_seconds=0.0, steps=12, shards=[str(tmp_path / "shards")])
    for ranks, shared, rank, step in ((2, 1, 1, 3), (4, 2, 3, 6)):
        said = on_ranks("pretrain", config, ranks, out, {"rank": rank, "dies_at": step}, expert_parallel=shared)
        assert not out.exists() and len(said) == 1, said
        assert all("another process is gone, killed or out of memory; run the same" in line for line in said)
        (folder,) = tmp_path.glob("out.partial/state-*")
        agrees_with_torchs_reader(folder)
    for place in (out, tmp_path / "alone"):
        pretrain.run(config, place)
    resumed, whole = (Receipt.read(place) for place in (out, tmp_path / "alone"))
    assert (resumed.tokens, resumed.flops_by_part) == (whole.tokens, pytest.approx(whole.flops_by_part))
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
    sizes = {"refill": 2, "group_size": 4, "prompts_per_step": 4, "steps": 4, "save_seconds": 0.0}
    config = training(loss=loss, **sizes)
    on_ranks("rl", config, 2, tmp_path / "out", {"rank": 1, "dies_at": 2})
    assert not (tmp_path / "out").exists()
    for name in ("out", "whole"):
        on_ranks("rl", config, 2, tmp_path / name)
    rl.run(config, tmp_path / "alone")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]
    for two, alone in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "alone"), strict=True):
        for key in ("reward", "loss", "kl", "entropy", "gradient_norm"):
            assert two[key] == pytest.approx(alone[key], abs=1e-4, rel=1e-3), (two["step"], key)


def test_adapters_are_trained_on_two_ranks_as_by_one_process(on_ranks, base, sums, metrics, tmp_path):
    lora = {"rank": 4, "targets": ["attention", "mlp", "experts"]}
    tuning = {"model": str(base), "tasks": [sums], "examples": 40, "batch_size": 4, "lora": lora, "dtype": "float32"}
    config = sft.SFTConfig.parse({**tuning, "sequence_length": 48, "threads": 1})
    on_ranks("sft", config, 2, tmp_path / "two")
    sft.run(config, tmp_path / "alone")
    two, alone = (metrics(tmp_path / name) for name in ("two", "alone"))
    assert len(two) >= 4
    for mine, its in zip(two, alone, strict=True):
        assert [mine[key] for key in ("loss", "mtp_loss")] == pytest.approx([its["loss"], its["mtp_loss"]], abs=1e-5)
    same_weights(tmp_path / "two", tmp_path / "alone")


def same_weights(folder, other):
    for name in ("model", "adapter/adapter_model"):
        mine, its = (load_file(each / f"{name}.safetensors") for each in (folder, other))
        assert mine.keys() == its.keys()
        assert all(torch.allclose(tensor, its[key], atol=1e-4) for key, tensor in mine.items())


def test_rl_of_adapters_on_two_ranks_takes_the_steps_of_one_process(on_ranks, training, metrics, tmp_path):
    """Two that share the experts."""
    config = training(lora={"rank": 4, "targets": ["attention", "experts"]}, loss={"kl": 0.01}, prompts_per_step=4)
    on_ranks("rl", config, 2, tmp_path / "two", expert_parallel=2)
    rl.run(config, tmp_path / "alone")
    for mine, its in zip(metrics(tmp_path / "two"), metrics(tmp_path / "alone"), strict=True):
        for key in ("reward", "loss", "kl", "entropy", "mtp_loss"):
            assert mine[key] == pytest.approx(its[key], abs=1e-5), (mine["step"], key)
    same_weights(tmp_path / "two", tmp_path / "alone")


def test_two_ranks_sample_at_one_server_as_one_process_does(on_ranks, training, base, metrics, tmp_path):
    """Each asks for its own share, by weights that the first has pushed."""
    with VllmDouble(base) as double:
        config = training(rollouts=[double.url], prompts_per_step=4, steps=3)
        on_ranks("rl", config, 2, tmp_path / "two")
        rl.run(config, tmp_path / "alone")
    for mine, its in zip(metrics(tmp_path / "two"), metrics(tmp_path / "alone"), strict=True):
        assert mine["servers"] == 1 and max(mine["server_gap"], mine["logprob_gap"]) < 1e-4
        for key in ("reward", "loss", "entropy", "response_tokens"):
            assert mine[key] == pytest.approx(its[key], abs=1e-4), (mine["step"], key)


def test_samples_made_beside_the_updates_are_those_of_one_process(on_ranks, training, metrics, tmp_path):
    """Each rank samples its share in a thread, while all of them train on what was begun an update before."""
    config = training(staleness=1, loss={"importance": "truncated"}, prompts_per_step=4, steps=4)
    on_ranks("rl", config, 2, tmp_path / "two")
    rl.run(config, tmp_path / "alone")
    two, alone = (metrics(tmp_path / name) for name in ("two", "alone"))
    assert [row["staleness"] for row in two] == [0, 1, 1, 1]
    for mine, its in zip(two, alone, strict=True):
        for key in ("reward", "loss", "entropy", "response_tokens"):
            assert mine[key] == pytest.approx(its[key], abs=1e-4), (mine["step"], key)


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        ({"options": ["expert_parallel=2"]}, "rank 1 has expert_parallel 2, rank 0 1;"),
        ({"largest_file": 20_000}, "rank 1 cannot write"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_one_rank_in_trouble_ends_all_in_one_line(on_ranks, pretraining, tmp_path, trouble, line):
    said = on_ranks("pretrain", pretraining(save_seconds=0.0), 2, tmp_path / "out", {"rank": 1, **trouble})
    assert len(said) == 1 and said[0].startswith(f"slingshot: {line}"), said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.partial/*state*"))


def test_experts_that_ranks_cannot_share_are_told_in_one_line(on_ranks, pretraining, tmp_path):
    config = pretraining(expert_parallel=3, batch_size=15)
    said = on_ranks("pretrain", config, 3, tmp_path / "out", {"rank": 3})
    assert len(said) == 1 and "8 routed experts cannot be shared by 3 ranks; make expert_parallel a divisor" in said[0]


def test_a_rank_that_reads_something_else_under_the_same_name_is_told(on_ranks, pretraining, monkeypatch, tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "corpus.txt").write_text(f"It is {place}.\n" * 4000)
    monkeypatch.chdir(tmp_path / "here")
    config, trouble = pretraining(documents=None, text=["corpus.txt"]), {"rank": 1, "works_in": str(tmp_path / "there")}
    said = on_ranks("pretrain", config, 2, tmp_path / "out", trouble)
    assert len(said) == 1 and said[0].startswith("slingshot: rank 1 has content of corpus.txt "), said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("trouble", [{"rank": 1, "dies_at": 3}, {"rank": 0, "dies_at": 3}])
def test_when_one_rank_ends_all_end(pretraining, tmp_path, trouble):
    """Nothing watches over these processes, as over those on several machines."""
    file, out = tmp_path / "pretrain.json", tmp_path / "out"
    file.write_text(pretraining(save_seconds=0.0, steps=2000).model_dump_json())
    with socket.socket() as its:
        its.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(its.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, SCRIPT, "pretrain", file, out, json.dumps(trouble)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **where, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    try:
        processes[trouble["rank"]].wait(timeout=1800)
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(codes) and not out.exists()
