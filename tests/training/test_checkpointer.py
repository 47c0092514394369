"""The working folder of a stage: what survives a kill, what starts anew, how it stops; nothing is half-written."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from slingshot.base.config import StageConfig, Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_jsonl, write_text
from slingshot.cost.receipt import Receipt, artifact_digest
from slingshot.text.tokenizer import Tokenizer
from slingshot.training import checkpointer, state
from slingshot.training.checkpointer import Checkpointer
from slingshot.training.interrupts import Interrupts
from slingshot.training.parallel import Parallel


class Table(Strict):
    warmup: float = 0.1


class Config(StageConfig):
    """A stage's config with everything that names an input."""

    model: str | None = None
    data: list[str] = []
    tasks: list[dict[str, Any]] = []
    lr: float = 0.1
    optimizer: Table = Table()
    dtype: str | None = None
    save_seconds: float = 0.0


@pytest.fixture
def out(tmp_path):
    return tmp_path / "stage"


@pytest.fixture
def open_work(out):
    """open_work(config, at, kind): a checkpointer that is left at the end of the test."""
    with ExitStack() as stack:

        def work(config=None, at=out, kind="sft"):
            return stack.enter_context(Checkpointer(at, kind, config or Config(), Parallel()))

        yield work


@pytest.fixture
def begun(open_work):
    """A checkpointer with nothing to go on from."""
    work = open_work()
    assert not work.load()
    return work


def state_of(step):
    return lambda: ({"model/w": torch.full((2, 3), float(step)), "count": torch.tensor(step)}, {"rows": [step, "é"]})


def run_steps(work, first, last, saved=None):
    """Log steps first to last; save after each, or after step `saved` only."""
    for step in range(first, last + 1):
        work.log({"step": step, "loss": 1 / step})
        if saved is None or step == saved:
            work.keep(step, state_of(step))


def test_a_killed_stage_goes_on_from_its_last_state(open_work, begun):
    begun.meter.add(100, training=2.0, mtp=0.5)
    run_steps(begun, 1, 5, saved=3)
    begun.meter.add(7, training=9.0)  # after the last state: lost
    with (begun.folder / "metrics.jsonl").open("a") as file:
        file.write("\0" * 40 + '\n{}\n{"step": 6, "lo')  # by a power cut; killed while writing
    again = open_work()
    saved = again.load()
    assert (saved.step, saved.info) == (3, {"rows": [3, "é"]})
    assert saved.read("model/w").tolist() == [[3.0] * 3] * 2 and saved.read("count").dtype == torch.int64
    assert again.meter.tokens == 100 and again.meter.flops_by_part == {"training": 2.0, "mtp": 0.5}
    run_steps(again, 4, 6)
    assert [row["step"] for row in read_jsonl(again.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in again.folder.glob("state-*")] == ["state-6"], "only the last state is kept"


def test_metrics_before_the_first_state_are_written_anew(open_work):
    work = open_work(Config(save_seconds=60.0))
    work.load()
    run_steps(work, 1, 3)
    assert not list(work.folder.glob("state-*")), "not due yet"
    again = open_work()
    assert not again.load()
    assert (again.folder / "metrics.jsonl").read_text() == ""


def interrupted(out, config, kind="sft"):
    """Two steps into a stage; its working folder."""
    with Checkpointer(out, kind, config, Parallel()) as work:
        work.load()
        run_steps(work, 1, 2)
        return work.folder


def resumed_at(out, config, kind="sft"):
    with Checkpointer(out, kind, config, Parallel()) as work:
        return work.load().step


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A config whose inputs lie in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "in" / "model" / "config.json", "{}")
    files = {"data.jsonl": "{}", "task.py": "import helper", "helper.py": "'rows.csv'", "rows.csv": "1"}
    for name, text in files.items():
        write_text(tmp_path / "in" / name, text)
    return Config(model="in/model", data=["in/data.jsonl"], tasks=[{"name": "in/task.py"}, {"name": "countdown"}])


@pytest.mark.parametrize("file", ["model/config.json", "data.jsonl", "task.py", "helper.py", "rows.csv"])
def test_a_stage_starts_anew_when_what_it_reads_changed(read, tmp_path, capsys, file):
    out = tmp_path / "stage"
    interrupted(out, read)
    assert resumed_at(out, read) == 2
    write_text(tmp_path / "in" / file, "changed")
    assert resumed_at(out, read) == 0
    assert "changed); kept in" in capsys.readouterr().err
    assert list((tmp_path / ".stale" / "stage.partial-1").glob("state-2"))  # what was begun is never thrown away


def test_a_stage_starts_anew_when_its_config_or_kind_changed(read, tmp_path, capsys):
    out = tmp_path / "stage"
    for lr, kind, why in ((0.2, "sft", "(lr 0.1 -> 0.2)"), (0.1, "rl", "(stage sft -> rl)")):
        interrupted(out, read)
        assert resumed_at(out, read.model_copy(update={"lr": lr}), kind) == 0
        assert why in capsys.readouterr().err


def test_what_changes_nothing_in_the_artifact_lets_a_stage_go_on(read, tmp_path, monkeypatch):
    """Another spelling of a path, working directory, place of the folder, price, number of threads."""
    interrupted(tmp_path / "stage", read)
    elsewhere = {"price": 3.0, "save_seconds": 9.0, "threads": 1}
    assert resumed_at(tmp_path / "stage", read.model_copy(update=elsewhere)) == 2
    absolute = {"model": str(tmp_path / "in/model"), "data": [str(tmp_path / "in/data.jsonl")],
                "tasks": [{"name": "./in/task.py"}, {"name": "countdown"}]}  # fmt: skip
    assert resumed_at(Path("stage"), read.model_copy(update=absolute)) == 2
    (tmp_path / "moved").mkdir()
    for name in ("in", "stage.partial"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved")
    assert resumed_at(Path("stage"), read) == 2


def test_a_key_that_only_one_version_knows_lets_a_stage_go_on(read, tmp_path):
    out = tmp_path / "stage"
    mark = interrupted(out, read) / "identity.json"
    identity = json.loads(mark.read_text())
    del identity["config"]["optimizer"]
    mark.write_text(json.dumps(identity | {"config": identity["config"] | {"gone": 1}}))
    assert resumed_at(out, read) == 2


def test_states_without_the_mark_of_what_they_are_of_are_put_aside(read, tmp_path):
    """Also those of a version that marked them otherwise."""
    out = tmp_path / "stage"
    for spoil in (Path.unlink, lambda mark: mark.write_text('"0123456789abcdef"')):
        spoil(interrupted(out, read) / "identity.json")
        assert resumed_at(out, read) == 0
    assert [len(list((tmp_path / ".stale").glob(f"stage.partial-{n}/state-2"))) for n in (1, 2)] == [1, 1]


OTHER = [sys.executable, "-c", """
import sys, time
from pathlib import Path
from unittest.mock import Mock
from slingshot.base.config import StageConfig
from slingshot.training.checkpointer import Checkpointer
from slingshot.training.parallel import Parallel
with Checkpointer(Path(sys.argv[1]), "sft", StageConfig(), Parallel()) as work:
    print("working", flush=True)
    time.sleep(float(sys.argv[2]))
"""]  # fmt: skip


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_dead_one_is_none(open_work, out):
    work = open_work()
    run_steps(work, 1, 1)
    refused = subprocess.run([*OTHER, str(out), "0"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "another slingshot is at work in" in refused.stderr
    assert list(work.folder.glob("state-1"))
    work.__exit__(None, None, None)
    killed = subprocess.Popen([*OTHER, str(out), "60"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "working\n"
    with pytest.raises(SlingshotError, match="another slingshot is at work in"):
        open_work()
    killed.kill()
    killed.wait()
    open_work()


def test_an_artifact_that_exists_is_refused_untouched(open_work, out):
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(SlingshotError, match=r"stage exists already; remove it or choose another --out"):
        open_work()
    assert (out / "mine.txt").read_text() == "precious" and not out.with_name("stage.partial").exists()


def test_a_parent_that_is_not_there_is_named(open_work, read):
    with pytest.raises(SlingshotError, match="nowhere does not exist"):
        open_work(read.model_copy(update={"data": ["nowhere"]}))
    assert [path.name for path in Path().iterdir()] == ["in"]


def test_what_was_read_stands_in_the_receipt_by_content(read, open_work, out):
    open_work(read).finish(lambda folder: None)
    found = {parent.path: parent.digest for parent in Receipt.read(out).parents}
    names = "model", "data.jsonl", "task.py", "helper.py", "rows.csv"
    assert found == {f"in/{name}": artifact_digest(Path("in", name)) for name in names}


def test_what_auto_means_is_decided_once_and_written_down(open_work, out, monkeypatch):
    """Another measurement, another number of threads in force: a resumed stage goes on as it began."""
    before = torch.get_num_threads()
    monkeypatch.setattr(checkpointer, "auto_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(checkpointer, "auto_threads", lambda width: before)
    work = open_work(Config(dtype="auto"))
    assert work.dtype == torch.bfloat16
    monkeypatch.setattr(checkpointer, "auto_dtype", lambda device: torch.float32)
    monkeypatch.setattr(checkpointer, "auto_threads", lambda width: before + 2)
    torch.set_num_threads(before + 2)
    again = open_work(Config(dtype="auto"))
    assert again.dtype == torch.bfloat16 and torch.get_num_threads() == before
    again.finish(lambda folder: None)
    assert Receipt.read(out).extra["chosen"] == {"device": "cpu", "dtype": "bfloat16", "threads": before}


def test_a_broken_state_is_named_with_the_way_out(open_work):
    work = open_work()
    run_steps(work, 1, 1)
    (work.folder / "state-1" / "tensors.safetensors").write_bytes(b"nonsense")
    line = r"state-1 cannot be read: .*; remove .*stage\.partial to start the stage anew"
    with pytest.raises(SlingshotError, match=line):
        open_work().load()


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), ([1.0, -math.inf], "-inf")])
def test_a_value_that_is_not_finite_stops_the_stage_and_keeps_the_last_state(open_work, begun, value, shown):
    run_steps(begun, 1, 4, saved=3)
    line = rf"^stage: loss is {shown} at step 5; the state of step 3 is kept in .*stage\.partial; lower the learning"
    with pytest.raises(SlingshotError, match=line):
        begun.log({"step": 5, "gradient_norm": 1.0, "loss": value})
    assert [row["step"] for row in read_jsonl(begun.folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert open_work().load().step == 3


@pytest.mark.parametrize("damage", [math.nan, 1e38])
def test_a_model_that_cannot_compute_is_no_artifact(open_work, out, make_model, deepseek, damage):
    """After the last update, of which no loss tells: a NaN somewhere, or weights whose products are infinite."""
    model, tokenizer = make_model(deepseek(vocab_size=268)), Tokenizer.train(["three plus three"], 268)
    with torch.no_grad():
        weight = next(p for name, p in model.named_parameters() if name.endswith("down_proj.weight"))
        weight.view(-1)[: 1 if math.isnan(damage) else None] = damage
    work = open_work()
    run_steps(work, 1, 2)
    with pytest.raises(SlingshotError, match=r"stage: after the last update .* NaN or inf.*; the state of step 2"):
        work.finish_checkpoint(model, tokenizer)
    assert not out.exists() and list(work.folder.glob("state-2"))
    with torch.no_grad():
        weight.fill_(0.01)
    work.finish_checkpoint(model, tokenizer)
    assert (out / "model.safetensors").exists()


def test_metrics_are_on_the_disk_before_the_state_that_counts_on_them(begun, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    begun.log({"step": 1})
    monkeypatch.setattr(os, "fsync", fsync)
    begun.keep(1, state_of(1))
    assert synced.index("metrics.jsonl") < synced.index(".state-1.tmp")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_after_the_step_and_stops(open_work, number):
    work = open_work(Config(save_seconds=60.0))
    work.load()
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        for step in range(1, 5):
            if step == 2:
                os.kill(os.getpid(), number)
            work.keep(step, state_of(step), stop=interrupts.asked)
    assert signal.getsignal(number) is before, "a notebook keeps its Ctrl-C"
    assert open_work().load().step == 2


def test_what_is_logged_is_what_float32_holds(begun):
    begun.log({"step": 1, "loss": 0.1234567891234, "load": [1 / 3, 2.0], "count": 12345678901})
    written = '{"step": 1, "loss": 0.123456789, "load": [0.333333333, 2.0], "count": 12345678901}\n'
    assert (begun.folder / "metrics.jsonl").read_text() == written


def test_speed_is_of_one_step(begun):
    begun.peak = 1e9
    begun.meter.add(10, training=5e6)
    assert begun.speed(10)["mfu"] > 0.0 == begun.speed(10)["mfu"]


def test_no_space_for_metrics_is_one_line(begun):
    (begun.folder / "metrics.jsonl").unlink()
    (begun.folder / "metrics.jsonl").mkdir()
    with pytest.raises(SlingshotError, match=r"cannot write .*stage\.partial: .*; free space there and run the same"):
        begun.log({"step": 1})


def test_no_space_for_a_state_leaves_the_one_before(open_work, begun, monkeypatch):
    run_steps(begun, 1, 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(state, "save_file", Mock(side_effect=full))
    line = r"cannot write .*: .*No space left on device.*; free space there and run the same command to go on"
    with pytest.raises(SlingshotError, match=line):
        begun.keep(2, state_of(2))
    assert [path.name for path in begun.folder.glob("*state*")] == ["state-1"]
    assert open_work().load().step == 1


def test_finish_makes_the_artifact_and_clears_up(open_work, out):
    work = open_work(Config(price=3.6))
    work.load()
    run_steps(work, 1, 2)
    work.meter.add(50, training=4.0, mtp=1.0)
    work.finish(lambda folder: write_text(folder / "weights", "w"), {"examples": 9})
    receipt = Receipt.read(out)
    assert (receipt.stage, receipt.name, receipt.tokens, receipt.flops) == ("sft", "stage", 50, 5.0)
    chosen = {"device": "cpu", "dtype": None, "threads": torch.get_num_threads()}
    assert receipt.extra == {"examples": 9, "chosen": chosen}
    assert receipt.config["lr"] == 0.1 and receipt.money == pytest.approx(receipt.seconds * 0.001)
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2] and (out / "weights").read_text() == "w"
    assert sorted(path.name for path in out.parent.iterdir()) == ["stage"]


def test_an_artifact_that_cannot_be_written_is_none_and_the_work_is_kept(open_work, begun, out):
    run_steps(begun, 1, 2)

    def fail(folder):
        write_text(folder / "weights", "half")
        raise SlingshotError("no space")

    with pytest.raises(SlingshotError, match="no space"):
        begun.finish(fail)
    assert sorted(path.name for path in out.parent.iterdir()) == ["stage.partial"]
    assert open_work().load().step == 2


def test_leftovers_of_a_kill_are_cleared(open_work):
    work = open_work()
    run_steps(work, 1, 1)
    shutil.copytree(work.folder / "state-1", work.folder / ".state-2.tmp")
    (work.folder / ".metrics.jsonl.tmp").touch()
    assert open_work().load().step == 1
    assert sorted(path.name for path in work.folder.iterdir()) == [".lock", "identity.json", "metrics.jsonl", "state-1"]


def test_tensorboard_gets_the_numbers_where_it_is_installed(open_work, out, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            self.file = Path(folder) / "events.json"
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.seen = [purge_step]

        def add_scalar(self, *scalar):
            self.seen.append(scalar)

        def close(self):
            self.file.write_text(json.dumps(self.seen))

    monkeypatch.setattr(checkpointer, "SummaryWriter", Writer)
    work = open_work()
    work.load()
    work.log({"step": 1, "loss": 0.5, "expert_load": [1.0]})
    work.finish(lambda folder: None)
    assert json.loads((out / "tensorboard" / "events.json").read_text()) == [1, ["step", 1, 1], ["loss", 0.5, 1]]
