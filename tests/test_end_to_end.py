"""The recipe micro from one command: whole, interrupted at several moments, and on two ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slingshot.base.files import read_json, read_jsonl
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.receipt import Receipt
from slingshot.stages import pretrain

STAGES = {"base": "pretrain", "cold_start": "sft", "rl": "rl", "sample": "sample", "sft": "sft"}
EVALUATED = ["base", "rl"]
CLOCKS = {"seconds", "tokens_per_second", "mfu"}
WAIT = 300  # seconds at most for a moment or an end, on a machine that has other work
SMALL = ["micro", "base.steps=60", "cold_start.epochs=1"]


def launch(*arguments: object, ranks: int = 1) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "slingshot", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process printed on standard error, once it has ended with `code`."""
    _, error = process.communicate(timeout=WAIT)
    assert process.returncode == code, error
    return error


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in CLOCKS} for row in read_jsonl(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, run without interruption."""
    out = tmp_path_factory.mktemp("runs") / "micro"
    end(launch("run", *SMALL, "--out", out))
    return out


@pytest.mark.slow
def test_the_report_tells_of_every_stage(micro: Path) -> None:
    report = read_json(micro / "report.json")
    assert [(stage["name"], stage["kind"]) for stage in report["stages"]] == list(STAGES.items())
    for stage in report["stages"]:
        assert (micro / stage["artifact"]).is_dir()
        receipt = Receipt.read(micro / stage["name"])
        for key in ("tokens", "flops", "seconds", "peak_host_memory_bytes", "mfu"):
            assert stage["receipt"][key] == pytest.approx(getattr(receipt, key)), key
        assert set(stage["eval"]) == ({"arithmetic"} if stage["name"] in EVALUATED else set())
        for score in stage["eval"].values():
            low, high = score["ci95"]
            assert 0 <= low <= score["pass@1"] <= high <= 1 and score["pass@8"] is None and score["n"] == 16
            assert score["mean_tokens"] > 0 and 0 <= score["format"] <= 1
    page = (micro / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and all(name in page for name in STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATED)
def test_transformers_loads_what_was_trained(micro: Path, name: str) -> None:
    """Logits of a problem with a response agree within 1e-4 of their standard deviation, and so do tokenizer and
    template."""
    loaded = {"dtype": torch.float32, "output_loading_info": True}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(micro / name, **loaded)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tokenizer, their_tokenizer = load_tokenizer(micro / name), transformers.AutoTokenizer.from_pretrained(micro / name)
    chat = [{"role": "user", "content": "What is 3+4?"}]
    prompt = tokenizer.encode_chat(chat)
    assert their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == prompt
    ids = torch.tensor([prompt + tokenizer.encode("3 plus 4 is 7")])
    model = load_model(micro / name)
    with torch.no_grad():
        expected, found = theirs(ids).logits, model(ids).logits_BTV
    assert model.config.num_nextn_predict_layers == 1 and expected.std() > 1
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.slow
def test_a_finished_run_is_skipped_whole(micro: Path) -> None:
    before = {path: path.stat().st_mtime_ns for name in STAGES for path in (micro / name).iterdir()}
    said = end(launch("run", *SMALL, "--out", micro)).splitlines()
    assert [line.split(": ")[-1] for line in said] == ["skipped (unchanged)"] * (len(STAGES) + len(EVALUATED))
    assert {path: path.stat().st_mtime_ns for name in STAGES for path in (micro / name).iterdir()} == before


# Save after every step, and stop after every few problems: neither may change what comes out.
EAGER = [f"{name}.save_seconds=0.0" for name in [*STAGES, "evaluation"]] + ["sample.chunk=4", "evaluation.chunk=2"]


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, "ended before the moment of its interruption"
        time.sleep(0.002)


def lines(folder: Path) -> int:
    """Steps logged in a working folder."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def states(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("state-")) for path in folder.glob("state-*"))


def child_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, its runner killed within pre-training, and then run to its end."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    alone = ["base.evaluation=false", "rl.evaluation=false"]
    command, base = ("run", *SMALL, "base.save_seconds=0.1", *alone, "--out", out), out / "base.partial"
    process = launch(*command)
    try:
        wait_for(process, lambda: lines(base) >= 10 and bool(states(base)))
    finally:
        process.kill()
    end(process, -signal.SIGKILL)
    assert states(base)
    end(launch(*command))
    return out


def test_every_stage_leaves_its_artifact_and_account(killed: Path) -> None:
    for name, kind in STAGES.items():
        receipt = Receipt.read(killed / name)
        assert (receipt.stage, receipt.name) == (kind, name)
        assert min(receipt.tokens, receipt.flops, receipt.seconds) > 0
        assert receipt.mfu is not None and 0 < receipt.mfu < 1 and receipt.peak_host_memory_bytes > 2**26
        for parent in receipt.parents:
            assert parent.digest == Receipt.read(Path(parent.path)).digest
    assert [Path(parent.path).name for parent in Receipt.read(killed / "sft").parents] == ["base", "sample"]
    assert not list(killed.glob("**/*.partial")) and not list(killed.glob("**/.*.tmp"))
    assert metrics(killed / "base")[-1]["loss"] < 0.3 * metrics(killed / "base")[0]["loss"]


def test_a_killed_stage_goes_on_to_the_same_weights(killed: Path, tmp_path: Path) -> None:
    """Those of one that nobody stops, here in this process."""
    config = read_json(killed / "configs" / "base.json") | {"save_seconds": 60}
    pretrain.run(pretrain.PretrainConfig.parse(config), tmp_path / "base")
    weights = Path("base") / "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (killed / weights).read_bytes()
    assert metrics(tmp_path / "base") == metrics(killed / "base")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The same recipe, stopped four times and started again each time; and what was seen at the stops."""
    out = tmp_path_factory.mktemp("runs") / "interrupted"
    seen: dict[str, Any] = {}
    running: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        running.append(launch("run", *SMALL, *EAGER, "--out", out))
        return running[-1]

    base, rl = out / "base.partial", out / "rl.partial"
    try:
        process = start()  # Ctrl-C within pre-training
        wait_for(process, lambda: lines(base) >= 10)
        process.send_signal(signal.SIGINT)
        seen["said at Ctrl-C"] = end(process, 130)
        seen["steps at Ctrl-C"] = (lines(base), states(base))

        process = start()  # kill -9 of the stage within RL
        wait_for(process, lambda: bool(states(rl)))
        os.kill(child_of(process), signal.SIGKILL)
        seen["said at the stage's death"] = end(process, 2)

        for place in (out / "evaluations" / "rl.partial", out / "sample.partial"):
            process = start()  # kill -9 within these, or just behind if they are too quick
            wait_for(process, lambda: bool(states(place)) or place.with_suffix("").exists())  # noqa: B023
            process.kill()
            end(process, -signal.SIGKILL)
        end(start())
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    yield out, seen


@pytest.mark.slow
def test_what_was_interrupted_saves_at_once_and_says_so_in_one_line(interrupted: tuple[Path, dict[str, Any]]) -> None:
    _, seen = interrupted
    logged, saved = seen["steps at Ctrl-C"]
    assert saved == [logged]
    assert re.search(r" base: .*going on where it stopped", seen["said at the stage's death"])
    assert seen["said at Ctrl-C"].splitlines()[-1] == "slingshot: stopped and saved; the same command goes on from here"
    assert "Traceback" not in seen["said at Ctrl-C"]
    said = seen["said at the stage's death"]
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("slingshot: rl: its process was killed by SIGKILL")
    assert said.count("slingshot: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_interruptions_leave_no_trace(micro: Path, interrupted: tuple[Path, dict[str, Any]], name: str) -> None:
    """Weights, datasets and logged losses are those of the uninterrupted run, byte by byte."""
    out, _ = interrupted
    files = sorted(path.name for path in (micro / name).iterdir())
    assert sorted(path.name for path in (out / name).iterdir()) == files
    for file in files:
        if file not in ("receipt.json", "metrics.jsonl"):
            assert (out / name / file).read_bytes() == (micro / name / file).read_bytes(), file
    if name == "sample":  # its steps are chunks, which are smaller here
        assert [row["step"] for row in metrics(out / name)] == list(range(1, 9))
    else:
        assert metrics(out / name) == metrics(micro / name)
    mine, theirs = Receipt.read(out / name), Receipt.read(micro / name)
    assert (mine.digest, mine.tokens) == (theirs.digest, theirs.tokens)
    assert mine.flops_by_part == pytest.approx(theirs.flops_by_part, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATED)
def test_interruptions_leave_no_trace_in_evaluations(
    micro: Path, interrupted: tuple[Path, dict[str, Any]], name: str
) -> None:
    place = Path("evaluations") / name / "evaluation.json"
    assert (interrupted[0] / place).read_bytes() == (micro / place).read_bytes()


@pytest.mark.slow
def test_two_ranks_sample_the_same_dataset(micro: Path, tmp_path: Path) -> None:
    """From the same parents."""
    two = tmp_path / "sample"
    end(launch("sample", "--config", micro / "configs" / "sample.json", "chunk=5", "--out", two, ranks=2))
    assert (two / "data.jsonl").read_bytes() == (micro / "sample" / "data.jsonl").read_bytes()
    assert Receipt.read(two).tokens == Receipt.read(micro / "sample").tokens


@pytest.mark.slow
def test_ctrl_c_stops_two_ranks_with_their_state(micro: Path, tmp_path: Path) -> None:
    process = launch("run", *SMALL, "--nproc", 2, "--until", "base", "--out", tmp_path / "run")
    base = tmp_path / "run" / "base.partial"
    wait_for(process, lambda: lines(base) >= 3)
    process.send_signal(signal.SIGINT)
    assert "stopped and saved" in end(process, 130)
    assert states(base) == [lines(base)]
