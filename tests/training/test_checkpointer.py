"""The working folder of a stage: what survives a kill, what starts anew, how a stage stops, and that nothing half-written is left."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_jsonl, write_text
from slingshot.cost.receipt import Receipt
from slingshot.training import checkpointer as workspace
from slingshot.training.checkpointer import Workspace
from slingshot.training.parallel import Parallel

ALONE = Parallel(0, 1, torch.device("cpu"), None)


class Config(StageConfig):
    lr: float = 0.1


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "stage"


Open = Callable[..., Workspace]


@pytest.fixture
def open_work(out: Path) -> Open:
    def work(
        config: StageConfig | None = None, parents: list[Path] | None = None, save_seconds: float = 0.0
    ) -> Workspace:
        return Workspace(out, "sft", config or Config(), parents or [], ALONE, save_seconds)

    return work


def state_of(step: int) -> Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]:
    return lambda: ({"model/w": torch.full((2, 3), float(step)), "count": torch.tensor(step)}, {"rows": [step, "é"]})


def run_steps(work: Workspace, first: int, last: int, saved: int | None = None) -> None:
    """Log steps first to last; save after each, or after step `saved` only."""
    for step in range(first, last + 1):
        work.log({"step": step, "loss": 1 / step})
        if saved is None or step == saved:
            work.keep(step, state_of(step))


def test_a_killed_stage_goes_on_from_its_last_state(open_work: Open, out: Path) -> None:
    work = open_work()
    assert work.load() is None
    run_steps(work, 1, 5, saved=3)
    work.meter.add(7, training=1.0)  # after the last state: lost
    with (work.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing

    again = open_work()
    saved = again.load()
    assert saved is not None and saved.step == 3 and saved.info == {"rows": [3, "é"]}
    assert saved.group("model")["w"].tolist() == [[3.0] * 3] * 2 and saved.tensors["count"].dtype == torch.int64
    assert again.meter.tokens == 0
    run_steps(again, 4, 6)
    assert [row["step"] for row in read_jsonl(out.with_name("stage.partial") / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in again.folder.glob("state-*")] == ["state-6"], "only the last state is kept"


def test_metrics_before_the_first_state_are_written_anew(open_work: Open) -> None:
    work = open_work(save_seconds=60.0)
    work.load()
    run_steps(work, 1, 3)
    assert not list(work.folder.glob("state-*")), "not due yet"
    again = open_work()
    assert again.load() is None
    assert (again.folder / "metrics.jsonl").read_text() == ""


def test_the_meter_goes_on_with_the_state(open_work: Open) -> None:
    work = open_work()
    work.meter.add(100, training=2.0, mtp=0.5)
    work.keep(1, state_of(1))
    again = open_work()
    again.load()
    assert again.meter.tokens == 100 and again.meter.flops_by_part == {"training": 2.0, "mtp": 0.5}


@pytest.mark.parametrize("change", ["config", "parent", "half removed"])
def test_a_changed_stage_starts_anew(open_work: Open, tmp_path: Path, change: str) -> None:
    """Also one whose removal was cut short: states without the mark of what they are of are not trusted."""
    parent = tmp_path / "data.jsonl"
    write_text(parent, "{}\n")
    work = open_work(Config(lr=0.1), [parent])
    work.load()
    run_steps(work, 1, 2)
    unchanged = open_work(Config(lr=0.1), [parent]).load()
    assert unchanged is not None and unchanged.step == 2

    config = Config(lr=0.2) if change == "config" else Config(lr=0.1)
    if change == "parent":
        write_text(parent, '{"more": 1}\n')
    if change == "half removed":
        (work.folder / "identity.json").unlink()
    again = open_work(config, [parent])
    assert again.load() is None
    assert not list(again.folder.glob("state-*")) and (again.folder / "metrics.jsonl").read_text() == ""


def test_an_artifact_that_exists_is_refused_untouched(open_work: Open, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(SlingshotError, match=r"stage exists already; remove it or choose another --out"):
        open_work()
    assert (out / "mine.txt").read_text() == "precious" and not out.with_name("stage.partial").exists()


def test_a_parent_that_is_not_there_is_named(open_work: Open, tmp_path: Path) -> None:
    with pytest.raises(SlingshotError, match="nowhere does not exist"):
        open_work(parents=[tmp_path / "nowhere"])


def test_a_broken_state_is_named_with_the_way_out(open_work: Open) -> None:
    work = open_work()
    run_steps(work, 1, 1)
    (work.folder / "state-1" / "tensors.safetensors").write_bytes(b"nonsense")
    with pytest.raises(
        SlingshotError, match=r"state-1 cannot be read: .*; remove .*stage\.partial to start the stage anew"
    ):
        open_work().load()


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_stops_the_stage_and_keeps_the_last_state(
    open_work: Open, value: float, shown: str
) -> None:
    work = open_work()
    work.load()
    run_steps(work, 1, 4, saved=3)
    work.check(4, loss=1.0, gradient_norm=0.0)
    line = rf"^stage: loss is {shown} at step 5; the state of step 3 is kept in .*stage\.partial; lower the learning rate and run again$"
    with pytest.raises(SlingshotError, match=line):
        work.check(5, gradient_norm=1.0, loss=value)
    saved = open_work().load()
    assert saved is not None and saved.step == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_after_the_step_and_stops(open_work: Open, number: signal.Signals) -> None:
    work = open_work(save_seconds=60.0)
    work.load()
    run_steps(work, 1, 1)
    os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        run_steps(work, 2, 5)
    saved = open_work().load()
    assert saved is not None and saved.step == 2


def test_what_is_logged_is_what_float32_holds(open_work: Open) -> None:
    work = open_work()
    work.load()
    work.log({"step": 1, "loss": 0.1234567891234, "load": [1 / 3, 2.0], "count": 12345678901})
    assert (
        work.folder / "metrics.jsonl"
    ).read_text() == '{"step": 1, "loss": 0.123456789, "load": [0.333333333, 2.0], "count": 12345678901}\n'


def test_no_space_for_metrics_is_one_line(open_work: Open) -> None:
    work = open_work()
    work.load()
    (work.folder / "metrics.jsonl").unlink()
    (work.folder / "metrics.jsonl").mkdir()
    with pytest.raises(
        SlingshotError, match=r"cannot write .*stage\.partial: .*; free space there and run the same command to go on"
    ):
        work.log({"step": 1})


def test_no_space_for_a_state_leaves_the_one_before(open_work: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    work = open_work()
    work.load()
    run_steps(work, 1, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workspace, "save_file", full)
    with pytest.raises(
        SlingshotError,
        match=r"cannot write .*: .*No space left on device.*; free space there and run the same command to go on",
    ):
        work.keep(2, state_of(2))
    assert [path.name for path in work.folder.glob("*state*")] == ["state-1"]
    saved = open_work().load()
    assert saved is not None and saved.step == 1


def test_finish_makes_the_artifact_and_clears_up(open_work: Open, out: Path) -> None:
    work = open_work(Config(price=3.6))
    work.load()
    run_steps(work, 1, 2)
    work.meter.add(50, training=4.0, mtp=1.0)
    work.finish(lambda folder: write_text(folder / "weights", "w"), {"examples": 9})
    receipt = Receipt.read(out)
    assert (receipt.stage, receipt.name, receipt.tokens, receipt.flops, receipt.extra) == (
        "sft",
        "stage",
        50,
        5.0,
        {"examples": 9},
    )
    assert receipt.config["lr"] == 0.1 and receipt.money == pytest.approx(receipt.seconds * 0.001)
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2] and (out / "weights").read_text() == "w"
    assert sorted(path.name for path in out.parent.iterdir()) == ["stage"]


def test_an_artifact_that_cannot_be_written_is_none_and_the_work_is_kept(open_work: Open, out: Path) -> None:
    work = open_work()
    work.load()
    run_steps(work, 1, 2)

    def fail(folder: Path) -> None:
        write_text(folder / "weights", "half")
        raise SlingshotError("no space")

    with pytest.raises(SlingshotError, match="no space"):
        work.finish(fail)
    assert sorted(path.name for path in out.parent.iterdir()) == ["stage.partial"]
    saved = open_work().load()
    assert saved is not None and saved.step == 2


def test_leftovers_of_a_kill_are_cleared(open_work: Open) -> None:
    work = open_work()
    run_steps(work, 1, 1)
    shutil.copytree(work.folder / "state-1", work.folder / ".state-2.tmp")
    (work.folder / ".metrics.jsonl.tmp").write_text("half")
    saved = open_work().load()
    assert saved is not None and saved.step == 1
    assert sorted(path.name for path in work.folder.iterdir()) == ["identity.json", "metrics.jsonl", "state-1"]


def test_tensorboard_gets_the_numbers_where_it_is_installed(
    open_work: Open, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.file = Path(folder) / "events.json"
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.seen: list[Any] = [purge_step]

        def add_scalar(self, *scalar: Any) -> None:
            self.seen.append(scalar)

        def close(self) -> None:
            self.file.write_text(json.dumps(self.seen))

    monkeypatch.setattr(workspace, "SummaryWriter", Writer)
    work = open_work()
    work.load()
    work.log({"step": 1, "loss": 0.5, "expert_load": [1.0]})
    work.finish(lambda folder: None)
    assert json.loads((out / "tensorboard" / "events.json").read_text()) == [1, ["step", 1, 1], ["loss", 0.5, 1]]
