"""The command line: light to start, and one clear line for everything its user can mend."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import Field
from safetensors.torch import load_file

import slingshot
from slingshot.base.config import StageConfig, Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.keys import keys_of
from slingshot.cli import main as cli
from slingshot.cost.receipt import Meter
from slingshot.machine.machine import Machine
from slingshot.recipe.recipe import Recipe, shipped
from slingshot.stages.kinds import STAGES
from slingshot.tasks.loader import TaskConfig

Command = Callable[..., tuple[int, str, str]]


class Table(Strict):
    """how responses are drawn"""

    top_p: float = Field(1.0, le=1, description="share of the probability kept")


class Config(StageConfig):
    """What the stage of these tests can be told."""

    model: str | None = None
    lr: float = Field(0.1, gt=0, description="step size of the update")
    sizes: dict[str, int] = {}
    sampling: Table = Table(top_p=0.9)
    tasks: list[TaskConfig] = []


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stage that remembers what it was run with; `fail` is raised instead where it is set."""
    fake = SimpleNamespace(config=Config, what="reinforces", ran=[], fail=None)

    def run(config: Config, out: Path) -> None:
        if fake.fail is not None:
            raise fake.fail
        fake.ran.append((config, out))
        out.mkdir(exist_ok=True)
        meter = Meter()
        meter.add(tokens=1500, all=2e9)
        machine = Machine(cpu="none", cores=1, memory_bytes=1)
        meter.receipt("rl", out.name, config.model_dump(mode="json"), [], out, machine).write(out)

    fake.run = run
    for kind in STAGES:
        monkeypatch.setitem(STAGES, kind, fake)
    return fake


def test_help_and_import_are_light() -> None:
    script = "import sys, slingshot.cli.main; sys.argv = ['slingshot', '--help']\n"
    script += "try: slingshot.cli.main.main()\nexcept SystemExit: pass\n"
    script += "print({'torch', 'matplotlib', 'transformers', 'reasoning_gym'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    names = "run pretrain sft rl sample evaluate convert inspect plan receipt chat generate doctor report tasks recipes"
    for name in names.split():
        assert f" {name} " in done.stdout


def test_ctrl_c_while_the_command_is_imported_ends_it_quietly() -> None:
    script = "import sys; from slingshot.__main__ import main\n"
    script += "class Pressed:\n    def find_spec(self, name, *_):\n        if name == 'slingshot.cli.main':\n"
    script += "            raise KeyboardInterrupt\nsys.meta_path.insert(0, Pressed()); main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_package_offers_what_it_promises(command: Command) -> None:
    assert command("--version") == (0, f"slingshot {slingshot.__version__}\n", "")
    assert [getattr(slingshot, name).__name__ for name in slingshot.__all__] == slingshot.__all__
    assert dir(slingshot) == sorted([*slingshot.__all__, "__version__"])
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        slingshot.Motor  # noqa: B018


@pytest.mark.parametrize("name", [name for name, _ in shipped()])
def test_shipped_recipes_are_valid(name: str) -> None:
    loaded = Recipe.load(name)
    assert loaded.stages and all(stage.kind in STAGES for stage in loaded.stages)


@pytest.mark.slow
def test_closed_streams_and_small_alphabets_end_no_command() -> None:
    """A daemon starts commands without streams; a terminal may know no more than ASCII."""
    start = ["sh", "-c", 'exec "$0" -m slingshot "$@" <&- >&-', sys.executable]
    for arguments, code in ((["recipes"], 0), (["generate", "none", "-"], 2)):
        done = subprocess.run([*start, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code and "Traceback" not in done.stderr
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    line = [sys.executable, "-m", "slingshot", "tasks", "arithmetic"]
    done = subprocess.run([*line[:-1], "足し算"], capture_output=True, text=True, env=ascii_only, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (
        2,
        1,
    ) and r"task '\u8db3\u3057\u7b97' is unknown" in done.stderr
    done = subprocess.run(line, capture_output=True, text=True, env=ascii_only, check=False)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "there is no command 'rum'; did you mean run?; docs/not-yet.md says what is not there yet"),
        (["lora"], "there is no command 'lora'; docs/not-yet.md says what is not there yet, and what to do"),
        (["list"], "there is no command 'list'; you may want slingshot recipes, or slingshot tasks; "),
        (["generate", "none"], "no prompts; give them as arguments, by --prompts, or - with text on standard input"),
        (["tasks", "arithmetik"], "task 'arithmetik' is unknown; did you mean arithmetic?"),
        (["rl", "one", "two", "--out", "x"], "rl: two models, one and two"), (["rl", "x"], "Field required; "),
        (["run"], "Missing argument 'RECIPE'"), (["run", "tiny", "--untill", "rl"], "No such option: --untill"),
        (["run", "tiny", "--dry-run"], "No such option: --dry-run; slingshot run --help has the rest"),
        (["plan", "serve", "--modle", "x"], "; slingshot plan serve --help has the rest"),
        (["run", "micro", "--out", "/"], "--out / is no folder of the run's own; choose another --out"),
        (["run", "micro", "--out", ""], "--out . is no folder of the run's own"),
        (["run", "mirco"], "no recipe 'mirco'; did you mean micro?"), (["run", "micro", "--nproc", "0"], "nproc"),
        (["run", "none/such.toml"], "cannot read none/such.toml"), (["report", "none"], "none"),
        (["rl", "--out", "x", "--config", "none.json"], "cannot read none.json"), (["chat", "none"], "none"),
        (["generate", "none", "hello"], "none"), (["evaluate", "x", "tasks=arithmetic"], "evaluate: no --out"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_code_2(command: Command, arguments: list[str], message: str) -> None:
    code, out, err = command(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("slingshot: ") and message in err and err.count("\n") == 1


def test_the_evaluation_that_a_stage_names_next_has_its_task_with_all_that_was_set(
    command: Command, stage: SimpleNamespace, tmp_path: Path
) -> None:
    params = "{prompt='{q} Say \"it\".', limit=3, where={level=[1, 2]}}"
    told = f'[{{name="dataset:sums.jsonl", params={params}, tools=["calculator"]}}]'
    code, out, _ = command("rl", f"tasks={told}", "--out", tmp_path / "new")
    assert code == 0
    following = shlex.split(out.partition(", or slingshot ")[2])
    assert following[0] == "evaluate" and command(*following)[0] == 0
    (before, _), (after, _) = stage.ran
    assert before.tasks == after.tasks and before.tasks[0].params["where"] == {"level": [1, 2]}


def test_a_stage_takes_a_model_and_keys_and_a_file(command: Command, stage: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"lr": 0.5, "seed": 3}))
    (tmp_path / "keys.toml").write_text("lr = 0.25\nsizes.a = 1\n")
    code, out, _ = command("rl", "runs/base", "lr=1e-4", "--config", tmp_path / "keys.json", "--out", tmp_path / "new")
    assert code == 0
    assert out.startswith(f"made {tmp_path / 'new'}: 1.5K tokens, 2 GFLOP\nnext: slingshot chat {tmp_path / 'new'}")
    assert command("sft", "--out", tmp_path / "new", "sizes.b=2", "--config", tmp_path / "keys.toml")[0] == 0
    assert stage.ran == [
        (Config(model="runs/base", lr=1e-4, seed=3), tmp_path / "new"),
        (Config(lr=0.25, sizes={"a": 1, "b": 2}), tmp_path / "new"),
    ]


def test_a_stage_shows_its_keys(command: Command, stage: SimpleNamespace) -> None:
    code, out, _ = command("rl", "--keys")
    assert code == 0
    assert out.splitlines()[0] == "What the stage of these tests can be told."
    shown = [" ".join(line.split()) for line in out.splitlines()]
    assert "lr 0.1 number above 0 step size of the update" in shown
    assert any(line.startswith("model nothing text") for line in shown)
    # A table has a heading, its keys below it as a recipe spells them.
    assert "sampling: how responses are drawn" in shown
    assert "sampling.top_p 0.9 number at most 1 share of the probability kept" in shown


def test_every_key_of_a_stage_says_what_it_is_for_and_no_other_thing_does() -> None:
    keys = {(kind, key.name) for kind in STAGES for key in keys_of(STAGES[kind].config) if not key.meaning}
    told = tomllib.loads((files("slingshot.cli") / "meanings.toml").read_text())
    assert [key for key in keys if f"{key[0]}.{key[1]}" not in told and key[1] not in told] == []
    assert told.keys() <= {name for _, name in keys} | {".".join(key) for key in keys}


def test_what_comes_next_names_the_task_that_was_used(command: Command, stage: SimpleNamespace, tmp_path: Path) -> None:
    _, out, err = command("rl", "runs/base", "tasks=hhmm.py", "--out", tmp_path / "new")
    assert f"slingshot evaluate {tmp_path / 'new'} tasks=hhmm.py --out {tmp_path / 'new'}-evaluation" in out
    assert err == f"rl: reinforces (from runs/base) -> {tmp_path / 'new'}\n"
    assert " tasks=TASK --out" in command("rl", "runs/base", "--out", tmp_path / "of no task")[1]
    assert f"slingshot sft MODEL data={tmp_path / 'set'} --out" in command("sample", "--out", tmp_path / "set")[1]


def test_a_model_path_may_hold_an_equals_sign(
    command: Command, stage: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    for number, model in enumerate(("runs/lr=3", "lr=3")):
        assert command("rl", model, "--out", tmp_path / f"new{number}")[0] == 0
    assert [config.model for config, _ in stage.ran] == ["runs/lr=3", "lr=3"]


@pytest.mark.parametrize("place", [".", "/", ".."])
def test_a_place_that_is_no_new_folder_is_one_line(command: Command, checkpoint: Path, place: str) -> None:
    for arguments in (["evaluate", checkpoint, "tasks=arithmetic", "--out", place], ["convert", checkpoint, place]):
        code, _, err = command(*arguments)
        assert code == 2 and err.splitlines()[-1].startswith(f"slingshot: {place} exists already")


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("a.toml", "lrr = 1", "rl.lrr: unknown key; did you mean lr?"), ("a.toml", 'lr = "fast"', "rl.lr: "),
        ("a.toml", "lr = ", "not valid TOML"), ("a.json", "[1]", "must hold a table of keys, got list"),
    ],
)  # fmt: skip
def test_a_stage_refuses_wrong_keys(
    command: Command, stage: SimpleNamespace, tmp_path: Path, file: str, keys: str, message: str
) -> None:
    (tmp_path / file).write_text(keys)
    code, _, err = command("rl", "--out", tmp_path / "new", "--config", tmp_path / file)
    assert code == 2 and message in err and stage.ran == []


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (SlingshotError("the loss is nan\nlower lr"), 2, "slingshot: the loss is nan lower lr\n"),
        (OSError(errno.ENOSPC, "No space left", "/full"), 2,
         "slingshot: /full: No space left; free space there or choose another --out\n"),
        (KeyboardInterrupt(), 130, "slingshot: stopped and saved; the same command goes on from here\n"),
    ],
)  # fmt: skip
def test_how_a_stage_ends_badly(
    command: Command, stage: SimpleNamespace, tmp_path: Path, failure: BaseException, code: int, line: str
) -> None:
    stage.fail = failure
    ended = command("rl", "--out", tmp_path / "new")
    assert ended == (code, "", f"rl: reinforces -> {tmp_path / 'new'}\n{line}")


def test_a_child_leaves_the_last_word_to_its_runner(command: Command, stage: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{}")
    child = ("stage", "rl", "--config", tmp_path / "keys.json", "--out", tmp_path / "new")
    assert command(*child)[:2] == (0, "") and len(stage.ran) == 1
    stage.fail = KeyboardInterrupt()
    assert command(*child) == (130, "", "")
    stage.fail = FileNotFoundError(errno.ENOENT, "No such file", "ours")  # a mistake of ours keeps its traceback
    with pytest.raises(FileNotFoundError):
        command(*child)


def test_run_hands_its_options_to_the_recipe(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def load(source: str, overrides: list[str], seed: int | None) -> SimpleNamespace:
        calls.append((source, overrides, seed))
        return SimpleNamespace(name="tiny")

    monkeypatch.setattr(Recipe, "load", load)
    monkeypatch.setattr(cli, "run_recipe", lambda loaded, *options: calls.append((loaded.name, *options)))
    options = ["--until", "rl", "--seed", 3, "--nproc", 2, "base.steps=5", "--out", tmp_path]
    assert command("run", "tiny", "rl.lr=1e-4", *options)[0] == command("run", "tiny")[0] == 0
    assert calls[:2] == [("tiny", ["rl.lr=1e-4", "base.steps=5"], 3), ("tiny", tmp_path, "rl", 2)]
    assert calls[2:] == [("tiny", [], None), ("tiny", Path("runs/tiny"), None, 1)]


def test_convert_there_and_back(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    """Each way a user goes: dtype, shards, a GGUF file, and that file back into a folder of the same numbers."""
    code, out, _ = command("convert", checkpoint, tmp_path / "fp8", "--dtype", "fp8", "--max-shard-size", "50KB")
    assert code == 0 and re.search(r"made .*fp8: 0\.\d MB in \d safetensors files\nnext: slingshot inspect .*fp8", out)
    code, out, _ = command("convert", checkpoint, tmp_path / "model.gguf", "--dtype", "float32")
    assert code == 0 and re.search(r"made .*model\.gguf: 0\.\d MB\nnext: llama-cli -m", out)
    assert command("convert", tmp_path / "model.gguf", tmp_path / "back", "--dtype", "float32")[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "back"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    for folder in (checkpoint, tmp_path / "fp8", tmp_path / "model.gguf", tmp_path / "back"):
        assert command("inspect", folder)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--to", "onnx"], "--to onnx: the formats are hf"), (["x.gguf", "--to", "hf"], "--to hf makes a folder"),
        (["x", "--to", "gguf"], "x: --to gguf makes a file whose name ends in .gguf"),
        (["x", "--dtype", "q8_0"], "--dtype q8_0: a Hugging Face folder has no such type"),
        (["x.gguf", "--dtype", "fp8"], "--dtype fp8: a GGUF file here is one of float32, float16, bfloat16, q8_0"),
        (["x", "--max-shard-size", "big"], "convert.max_shard_size: could not parse value"),
        (["x", "--max-shard-size", "0"], "convert.max_shard_size: Input should be greater than 0"),
        (["pyproject.toml"], "pyproject.toml exists already; remove it or choose another --out"),
    ],
)  # fmt: skip
def test_a_conversion_that_cannot_be_is_one_line(
    command: Command, checkpoint: Path, arguments: list[str], message: str
) -> None:
    code, _, err = command("convert", checkpoint, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_tasks_and_recipes_are_listed(command: Command) -> None:
    out = command("tasks")[1]
    assert all(name in out for name in ("arithmetic", "countdown", "gym:NAME", "path/to/file.py"))
    out = command("tasks", "arithmetic")[1]
    assert re.search(r"max_terms +\d+ +whole number", out) and "a problem: " in out
    out = command("recipes")[1]
    assert all(name in out for name, _ in shipped()) and "the whole of R1 from nothing" in " ".join(out.split())


@pytest.mark.slow
def test_a_family_of_reasoning_gym_is_listed_with_its_parameters(command: Command) -> None:
    assert "chain_sum" in command("tasks", "gym")[1]
    out = command("tasks", "gym:chain_sum")[1]
    assert "max_terms" in out and "seed" not in out and "a problem: " in out
    assert "dataset 'chain_sums' is unknown; did you mean chain_sum?" in command("tasks", "gym:chain_sums")[2]


def test_inspect_ends_with_2_where_something_does_not_fit(command: Command, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-8])
    (code, out, _), (as_json, facts, _) = command("inspect", checkpoint), command("inspect", checkpoint, "--json")
    assert code == as_json == 2 and "model.safetensors is no whole safetensors file" in out
    assert json.loads(facts)["problems"]
