"""A recipe's run: what is skipped, what runs again and why, what is checked first, and how a run ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, write_jsonl
from slingshot.cost.receipt import Receipt
from slingshot.recipe.process import launcher
from slingshot.recipe.recipe import Recipe
from slingshot.recipe.runner import check, run
from slingshot.stages.pretrain import PretrainConfig
from slingshot.stages.sft import SFTConfig
from tests.waiting import PATIENCE, until

Refusal = Callable[[Callable[[], object]], str]
Load = Callable[..., Recipe]
Start = Callable[..., subprocess.Popen[str]]
Captured = pytest.CaptureFixture[str]

FAKES = Path(__file__).with_name("fake_stages.py")
TEXT = Path(__file__).with_name("three.toml").read_text()

TASK_FILE = """
def problems(split, seed):
    yield {"prompt": "1+1?", "answer": "2"}
def verify(problem, text):
    return text == problem["answer"]
"""

pytestmark = pytest.mark.usefixtures("built")


def states(output: str) -> dict[str, str]:
    """The last word of the runner on each stage: done or skipped."""
    lines = [line.split(" ", 1)[1] for line in output.splitlines() if line.startswith("[")]
    return {name: said.split(" ")[0] for name, said in (line.split(": ", 1) for line in lines)}


def test_run_makes_every_artifact_and_then_skips_all(load: Load, finished: SimpleNamespace, capsys: Captured) -> None:
    said, out = finished, finished.folder
    assert set(states(said.err).values()) == {"done"}
    assert re.search(r"^\[3/3\] tuned: done in \S+ s; loss 0.250, 1.5K tokens, 15 FLOP$", said.err, re.MULTILINE)
    assert "sums 2 of 4 (few problems, so chance has a large part in it), 1.5K tokens" in said.err
    assert "supervised fine-tuning (from picks, base)" in said.err
    assert "What is 2+2?" in said.out and "two and two" in said.out and "1+1" not in said.out
    assert f"report: {out / 'report.html'}" in said.out
    assert "\x1b" not in said.err + said.out
    assert len(finished.built) == 6 and set(finished.built) == {out}  # after each of five, and at the end
    assert Receipt.read(out / "tuned").flops == 15  # three times what base cost
    assert [parent.path for parent in Receipt.read(out / "tuned").parents] == [str(out / "picks"), str(out / "base")]
    assert Receipt.read(out / "evaluations" / "tuned").config["model"] == str(out / "tuned")
    listed = read_json(out / "recipe.json")
    assert listed["name"] == "three"
    run(load(), out)
    said = capsys.readouterr()
    assert set(states(said.err).values()) == {"skipped"}
    assert "skipped (unchanged)" in said.err and "What is 2+2?" in said.out


@pytest.mark.slow
def test_a_changed_key_runs_its_stage_and_what_came_of_it_again(load: Load, out: Path, capsys: Captured) -> None:
    run(load(TEXT, "picks.lr=0.75"), out)
    said = capsys.readouterr().err
    assert "picks is stale: lr 0.5 -> 0.75" in said
    assert "tuned is stale: its parent picks runs again" in said
    assert list(states(said).values()) == ["skipped", "skipped", "done", "done", "done"]


@pytest.mark.slow
def test_a_cost_that_changed_changes_what_takes_its_number_from_it(load: Load, out: Path) -> None:
    run(load(TEXT, "base.flops=7"), out)
    assert Receipt.read(out / "tuned").flops == 21


@pytest.mark.slow
def test_children_go_by_what_their_parent_holds(load: Load, out: Path, capsys: Captured) -> None:
    """One made anew that ends the same leaves them standing; one changed from outside does not."""
    run(load(TEXT, "picks.text=other"), out)  # text does not show in what the stage makes
    assert states(capsys.readouterr().err)["tuned"] == "skipped"
    receipt = read_json(out / "picks" / "receipt.json")
    (out / "picks" / "receipt.json").write_text(json.dumps(receipt | {"digest": "0" * 16}))
    run(load(TEXT, "picks.text=other"), out)
    said = capsys.readouterr().err
    assert "tuned is stale: picks changed" in said
    assert states(said)["picks"] == "skipped" and states(said)["tuned"] == "done"


def test_price_and_place_make_nothing_stale(
    load: Load, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)  # and `out` is a copy of the run that was made elsewhere
    run(load(TEXT, "defaults.price=2.5"), Path(out.name))
    assert set(states(capsys.readouterr().err).values()) == {"skipped"}


@pytest.mark.slow
def test_stale_work_is_put_aside_and_said_where(load: Load, out: Path, capsys: Captured) -> None:
    before = (out / "picks" / "content.json").read_text()
    for lr in (0.75, 0.8):
        run(load(TEXT, f"picks.lr={lr}"), out)
    said = capsys.readouterr().err
    for number in (1, 2):
        assert f"{out / 'picks'}: kept as {out / '.stale' / f'picks-{number}'}" in said
        assert (out / ".stale" / f"picks-{number}" / "receipt.json").is_file()
    assert (out / ".stale" / "picks-1" / "content.json").read_text() == before


@pytest.fixture
def reading(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, Path]:
    """A recipe that reads a checkpoint folder, a JSONL file and a task file beside it, and its finished run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "model").mkdir(parents=True)
    (tmp_path / "in" / "model" / "content.json").write_text("weights")
    (tmp_path / "in" / "my.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    (tmp_path / "in" / "task.py").write_text(TASK_FILE + "import helper\n")
    (tmp_path / "in" / "helper.py").write_text("THREE = 3\n")
    loaded = load('[tuned]\nstage = "sft"\nmodel = "in/model"\ndata = ["in/my.jsonl"]\ntasks = ["in/task.py"]\n')
    run(loaded, tmp_path / "run")
    return loaded, tmp_path / "run"


@pytest.mark.slow
def test_a_stage_is_stale_when_what_it_reads_changed(
    reading: tuple[Recipe, Path], tmp_path: Path, capsys: Captured
) -> None:
    loaded, out = reading
    for file in ("model/content.json", "my.jsonl", "task.py", "helper.py"):
        path = tmp_path / "in" / file
        path.write_text(path.read_text() + "\n\n")
        run(loaded, out)
        said = capsys.readouterr().err
        assert f"tuned is stale: {file.split('/')[0]} changed\n" in said and states(said) == {"tuned": "done"}


def test_a_moved_run_and_another_spelling_of_paths_make_nothing_stale(
    reading: tuple[Recipe, Path], load: Load, tmp_path: Path, capsys: Captured
) -> None:
    _, out = reading
    places = f'model = "{tmp_path}/in/model"\ndata = ["./in/my.jsonl"]\ntasks = ["./in/task.py"]\n'
    other = load(f'[tuned]\nstage = "sft"\n{places}')
    out.rename(tmp_path / "elsewhere")
    run(other, Path("elsewhere"))
    assert states(capsys.readouterr().err) == {"tuned": "skipped"}
    shutil.rmtree(tmp_path / "in" / "model")  # what a finished stage has read need not be there any more
    run(other, Path("elsewhere"))
    assert states(capsys.readouterr().err) == {"tuned": "skipped"}


@pytest.mark.slow
def test_keys_of_another_version_make_nothing_stale(load: Load, out: Path, capsys: Captured) -> None:
    """One that is new since, and one that is gone; another kind or a value that differs still does."""
    for path in out.glob("**/receipt.json"):
        receipt = read_json(path)
        del receipt["config"]["shape"], receipt["config"]["text"]
        path.write_text(json.dumps(receipt | {"config": receipt["config"] | {"gone": 1}}))
    run(load(), out)
    assert set(states(capsys.readouterr().err).values()) == {"skipped"}
    run(load(TEXT, "tuned.lr=7"), out)
    run(load(TEXT.replace('"sft"', '"rl"')), out)
    said = capsys.readouterr().err
    assert "tuned is stale: lr 0.25 -> 7.0" in said and "tuned is stale: stage sft -> rl" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('data = ["none.jsonl"]', "last: none.jsonl does not exist"),
        ('data = ["bad.jsonl"]', "last: bad.jsonl line 1: an example"), ('model = "none"', "last: none: no such "),
        ('tasks = ["arithmetik"]', "last: task 'arithmetik' is unknown; did you mean arithmetic?"),
        ('tasks = ["none.py"]', "last: none.py does not exist"),
        ('tasks = [{ name = "arithmetic", params = { max_term = 3 } }]', "did you mean max_terms?"),
    ],
)  # fmt: skip
def test_what_can_be_known_is_checked_before_anything_runs(
    load: Load, tmp_path: Path, change: str, message: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1?"}\n')
    out = tmp_path / "run"
    assert message in refusal(lambda: run(load(f'{TEXT}[last]\nstage = "evaluate"\n{change}\n'), out))
    assert not (out / "base").exists()


def test_a_corpus_is_looked_into_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1?"}\n')
    config = PretrainConfig.parse({"model": "deepseek-v3", "text": [str(tmp_path / "bad.jsonl")]})
    with pytest.raises(SlingshotError, match=r"bad\.jsonl line 1 has no text under 'text' \(keys: question\)"):
        check(config, coming=())


def test_only_what_is_trained_on_has_to_write_solutions(tmp_path: Path) -> None:
    """SFT on data alone takes any tasks that a recipe's defaults name; with `examples` they write some."""
    write_jsonl(tmp_path / "my.jsonl", [{"prompt": "1+1?", "answer": "2"}])
    reads = {"model": "@base", "tasks": [{"name": "countdown", "params": {"n_numbers": 6}}]}
    data = {"data": [str(tmp_path / "my.jsonl")]}
    check(SFTConfig.parse({**reads, **data}), coming=["@base"])
    for given, way in (data, "leave `examples` out"), ({}, "give data"):
        with pytest.raises(SlingshotError, match=f"writes no solutions to train on; take another task, or {way}$"):
            check(SFTConfig.parse({**reads, **given, "examples": 5}), coming=["@base"])


@pytest.mark.slow
def test_the_end_of_a_run_says_what_comes_next(
    load: Load, tmp_path: Path, out: Path, capsys: Captured, refusal: Refusal
) -> None:
    part = tmp_path / "part"
    run(load(), part, until="picks")
    said = capsys.readouterr().out
    assert "the recipe has 1 stage more; the same command without --until goes on" in said
    assert read_json(part / "recipe.json")["asked"] == ["base", "picks"]
    run(load(f'chat = "base"\n{TEXT}'), out)
    model = out / "base"
    assert f"next: slingshot chat {model}, or on a page: slingshot serve {model}\n" in capsys.readouterr().out
    assert "chat = 'picks' names no stage that makes a checkpoint" in refusal(lambda: load(f'chat = "picks"\n{TEXT}'))


def test_several_processes_are_started_by_torchrun() -> None:
    assert launcher(["-m", "slingshot"], 1) == ["-m", "slingshot"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert launcher(["-m", "slingshot"], 2) == [*torchrun, "-m", "slingshot"]


# How a run ends badly


@pytest.mark.slow
def test_a_stage_that_refuses_crashes_or_is_killed(
    load: Load, tmp_path: Path, capfd: Captured, refusal: Refusal
) -> None:
    """The first ends the run with its own line, the others are named."""
    with pytest.raises(SystemExit) as ended:
        run(load(TEXT, "picks.do=refuse"), tmp_path / "run")
    said = capfd.readouterr().err
    assert ended.value.code == 2 and "slingshot: no such luck; try again\n" in said and "Traceback" not in said
    assert (tmp_path / "run" / "base").exists() and not (tmp_path / "run" / "picks").exists()
    for does, said in (("crash", "ended with code 1"), ("vanish", "was killed by SIGKILL")):
        recipe = load(TEXT, f"picks.do={does}")
        assert f"picks: its process {said}" in refusal(lambda recipe=recipe: run(recipe, tmp_path / "run"))


def test_folders_of_others_are_left_alone_and_found_before_anything_runs(
    load: Load, tmp_path: Path, refusal: Refusal
) -> None:
    out = tmp_path / "run"
    (out / "tuned").mkdir(parents=True)
    (out / "tuned" / "thesis.txt").write_text("years of work")
    assert f"{out / 'tuned'} is in the way" in refusal(lambda: run(load(), out))
    assert (out / "tuned" / "thesis.txt").exists() and not (out / "base").exists()
    (out / "recipe.json").write_text(json.dumps({"name": "tiny", "stages": []}))
    assert "holds a run of the recipe tiny" in refusal(lambda: run(load(), out))
    (out / "recipe.json").write_text("[]")
    assert f"{out / 'recipe.json'} should hold a JSON object" in refusal(lambda: run(load(), out))
    place = out / "recipe.json" / "run"
    assert f"cannot write {place}" in refusal(lambda: run(load(), place))


# Signals: a runner of its own process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "three.toml").write_text(TEXT)
    runners: list[subprocess.Popen[str]] = []

    def start_runner(*overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(FAKES), "run", str(tmp_path / "three.toml"), *overrides]
        pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        runners.append(subprocess.Popen([*command, "--out", tmp_path / "run"], start_new_session=True, **pipes))
        return runners[-1]

    yield start_runner
    for started in runners:
        started.kill()
        started.communicate()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that ended and was not waited for by its new parent yet is a zombie.
    return not Path(f"/proc/{pid}/stat").exists() or ") Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_saves_and_the_same_command_goes_on(start: Start, tmp_path: Path, number: int) -> None:
    partial = tmp_path / "run" / "tuned.partial"
    runner = start("tuned.do=wait")
    until((partial / "pid").exists)
    runner.send_signal(number)
    said = runner.communicate(timeout=PATIENCE)[1]
    assert runner.returncode == 130 and said.count("slingshot:") == 1 and "Traceback" not in said
    assert said.splitlines()[-1] == "slingshot: stopped and saved; the same command goes on from here"
    assert (partial / "saved").exists()
    (tmp_path / "run" / "go").touch()
    runner = start("tuned.do=wait")
    said = runner.communicate(timeout=PATIENCE)[1]
    assert runner.returncode == 0
    assert list(states(said).values()) == ["skipped", "skipped", "skipped", "done", "done"]
    assert "going on where it stopped" in said


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder_and_a_killed_one_leaves_no_stage_running(start: Start, tmp_path: Path) -> None:
    only = ("base.do=wait", "base.evaluation=false", "--until", "base")
    runner = start(*only)
    mark = tmp_path / "run" / "base.partial" / "pid"
    until(mark.exists)
    second = start(*only)
    said = second.communicate(timeout=PATIENCE)[1]
    assert second.returncode == 2 and f"another slingshot is at work in {tmp_path / 'run'}" in said
    pid = int(mark.read_text())
    assert alive(pid)
    runner.kill()
    until(lambda: not alive(pid))
    (tmp_path / "run" / "go").touch()
    assert start(*only).wait(timeout=PATIENCE) == 0
