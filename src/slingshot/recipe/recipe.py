"""A recipe: named stages in a TOML file, each fed by earlier ones, run as one process per stage; a run resumes where it stopped.

    [defaults]                        # goes to every stage that knows the key and does not set it itself
    task = "arithmetic"

    [defaults.optimizer]              # a table of defaults goes to every stage that has the table, key by key
    lr = 1e-3

    [base]                            # a stage: its name, its kind, and the keys of that kind's config
    stage = "pretrain"

    [rl]
    stage = "rl"
    model = "@base"                   # the artifact folder of an earlier stage
    flops = { flops_of = "base", times = 3 }      # a number: what that stage's receipt says it cost, times 3

    [evaluation]                      # the evaluate stage's config, run after every stage that makes a checkpoint;
    problems = 500                    # a stage's own `evaluation` table changes keys of it, `evaluation = false` leaves it out

`Recipe.load("tiny", ["rl.optimizer.lr=1e-4"])` checks every config before anything runs; `run(recipe, out)` makes this folder:

    out/recipe.json                   the stages as this run understood them
    out/configs/<stage>.json          what the stage's process was given
    out/<stage>/                      its artifact; it stands while its receipt's config and parents' digests are the recipe's
    out/evaluations/<stage>/          its evaluation
    out/report.html, report.json      built anew after every stage
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.resources
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_text, write_json
from slingshot.base.names import did_you_mean
from slingshot.base.quantity import show_duration
from slingshot.cost.receipt import Receipt
from slingshot.recipe.results import headline
from slingshot.stages.kinds import STAGES

# How a stage's process is started, after the interpreter's name.
PROGRAM = ["-m", "slingshot"]

# How long to wait for a folder's lock: a killed runner's child needs a moment to be gone.
LOCK_SECONDS = 5.0

_PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal this process gets when its parent dies


def parse_override(text: str) -> tuple[list[str], Any]:
    """`rl.lr=1e-4` -> (["rl", "lr"], 0.0001). The value is read as TOML; what is not TOML is a string."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise SlingshotError(f"{text!r}: an override is written key=value, like lr=1e-4")
    with contextlib.suppress(tomllib.TOMLDecodeError):
        parsed = tomllib.loads(f"value = {value}")
        if len(parsed) == 1:
            return path, parsed["value"]
    return path, value


def apply_override(values: dict[str, Any], text: str) -> None:
    """Set one key of nested tables in place; a table on the way that is not there yet is made."""
    path, value = parse_override(text)
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SlingshotError(f"{text!r}: {part} is no table, so it has no key {path[-1]}")
    values[path[-1]] = value


@dataclass(frozen=True)
class Stage:
    """One process of a run; `values` is its config with references still in it. The evaluation of a stage X is the stage X.evaluation."""

    name: str
    kind: str
    values: dict[str, Any]

    @property
    def folder(self) -> str:
        """The artifact's place in the run."""
        return (
            f"evaluations/{self.name.removesuffix('.evaluation')}" if self.name.endswith(".evaluation") else self.name
        )

    @property
    def parents(self) -> list[str]:
        """Names of the stages whose artifacts this one reads."""
        return self._references()[0]

    @property
    def sources(self) -> list[str]:
        """Names of all stages this one depends on: its parents, and those whose cost it takes a number from."""
        artifacts, costs = self._references()
        return artifacts + costs

    def _references(self) -> tuple[list[str], list[str]]:
        artifacts: dict[str, None] = {}
        costs: dict[str, float] = {}
        resolve(self.values, artifacts.setdefault, lambda name: costs.setdefault(name, 1.0))
        return list(artifacts), list(costs)


@dataclass(frozen=True)
class Recipe:
    """Stages in the order they run, every config of theirs found valid."""

    name: str
    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, source: str, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
        """Read a shipped recipe by name or a TOML file by path, change keys, and check all of it.

        `seed` replaces every stage's. Raises SlingshotError that names the table and key of the first thing that is wrong.
        """
        name, text = _find(source)
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SlingshotError(f"recipe {source}: not valid TOML: {error}") from error
        for override in overrides:
            path, _ = parse_override(override)
            if len(path) < 2 or path[0] not in {*tables, "defaults", "evaluation"}:
                raise SlingshotError(
                    f"{override!r}: an override is written STAGE.KEY=VALUE; {did_you_mean(path[0], list(tables))}"
                )
            apply_override(tables, override)
        return cls(name, _stages(name, tables, seed))

    def until(self, name: str | None) -> tuple[Stage, ...]:
        """The stages up to and including `name` and its evaluation; all of them for None."""
        if name is None:
            return self.stages
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise SlingshotError(
                f"--until {name}: the recipe {self.name} has no such stage; {did_you_mean(name, _plain(names))}"
            )
        last = max(names.index(name), names.index(f"{name}.evaluation") if f"{name}.evaluation" in names else 0)
        return self.stages[: last + 1]


def run(recipe: Recipe, out: Path, until: str | None = None, processes: int = 1) -> None:
    """Run the recipe's stages into the folder `out`, each in `processes` processes (torchrun starts them when more than 1).

    Finished stages are skipped, stale ones run again, an unfinished one goes on. Raises SlingshotError when a stage fails without having
    said why, SystemExit(2) when it has, and KeyboardInterrupt after Ctrl-C, once the stage has saved.
    """
    stages = recipe.until(until)
    with _locked(out) as lock:
        _Run(recipe, out, processes, lock).go(stages)


class _Run:
    """One `run` at work: where it is, what it says, and the lock its children share."""

    def __init__(self, recipe: Recipe, out: Path, processes: int, lock: int) -> None:
        self.recipe = recipe
        self.out = out
        self.processes = processes
        self.lock = lock
        self.stages = {stage.name: stage for stage in recipe.stages}
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def go(self, stages: Sequence[Stage]) -> None:
        from slingshot.recipe import report  # brings matplotlib, which `slingshot --help` need not wait for

        record = self.out / "recipe.json"
        if record.exists() and read_json(record).get("name") != self.recipe.name:
            raise SlingshotError(
                f"{self.out} holds a run of the recipe {read_json(record).get('name')}; choose another --out"
            )
        shown = [
            {"name": stage.name, "kind": stage.kind, "config": stage.values}
            for stage in self.recipe.stages
            if "." not in stage.name
        ]
        write_json(record, {"name": self.recipe.name, "stages": shown})
        self._announce_stale(stages)
        names = _plain([stage.name for stage in stages])
        for stage in stages:
            place = f"[{names.index(stage.name.split('.')[0]) + 1}/{len(names)}]"
            if self._finished(stage) and not self._changes(stage):
                self._say(f"{place} {stage.name}: skipped (unchanged)", "dim")
                continue
            begin = time.monotonic()
            self._say(f"{place} {stage.name}: {self._intent(stage)}", "bold")
            self._execute(stage)
            report.build(self.out)
            self._say(
                f"{place} {stage.name}: done in {show_duration(time.monotonic() - begin)}; {headline(self.out / stage.folder)}",
                "green",
            )
        report.build(self.out)
        self._show_solved(stages)
        Console(highlight=False, soft_wrap=True).print(Text(f"report: {self.out / 'report.html'}"))

    def _finished(self, stage: Stage) -> bool:
        return (self.out / stage.folder / "receipt.json").exists()

    def _given(self, stage: Stage) -> Path:
        """The config the stage's process was last started with."""
        return self.out / "configs" / f"{stage.name}.json"

    def _receipt(self, name: str) -> Receipt:
        return Receipt.read(self.out / self.stages[name].folder)

    def _config(self, stage: Stage) -> dict[str, Any]:
        """The stage's whole config with references resolved: paths into this run, and numbers from receipts that are there."""
        values = resolve(
            stage.values, lambda name: str(self.out / self.stages[name].folder), lambda name: self._receipt(name).flops
        )
        return STAGES[stage.kind].config.parse(values, stage.name).model_dump(mode="json")

    def _changes(self, stage: Stage) -> list[str]:
        """Why a finished stage's artifact is not what the recipe now asks for: keys old -> new and changed parents. Empty: it is."""
        receipt = self._receipt(stage.name)
        if receipt.stage != stage.kind:
            return [f"stage {receipt.stage} -> {stage.kind}"]
        changes = _differences(stage, receipt.config, self._config(stage))
        known = {parent.digest for parent in receipt.parents}
        return changes + [
            f"its parent {name} changed" for name in stage.parents if self._receipt(name).digest not in known
        ]

    def _announce_stale(self, stages: Sequence[Stage]) -> None:
        again: set[str] = set()
        for stage in stages:
            reasons = [f"its parent {name} runs again" for name in stage.sources if name in again]
            if self._finished(stage) and not reasons:
                reasons = self._changes(stage)
            if reasons and self._finished(stage):
                self._say(f"{stage.name} is stale: {', '.join(reasons)}", "yellow")
            if reasons or not self._finished(stage):
                again.add(stage.name)

    def _intent(self, stage: Stage) -> str:
        source = f" (from {', '.join(stage.parents)})" if stage.parents else ""
        # What was begun with another config is begun anew.
        begun = (self.out / f"{stage.folder}.partial").exists() and self._given(stage).exists()
        resumed = (
            ", going on where it stopped"
            if begun and not _differences(stage, read_json(self._given(stage)), self._config(stage))
            else ""
        )
        return f"{STAGES[stage.kind].what}{source} -> {self.out / stage.folder}{resumed}"

    def _execute(self, stage: Stage) -> None:
        """Run one stage's process to its end; a stale artifact of it goes first."""
        folder = self.out / stage.folder
        write_json(self._given(stage), self._config(stage))
        if folder.exists():
            if not self._finished(stage):
                raise SlingshotError(
                    f"{folder} is in the way: it is no artifact of slingshot's; move it or choose another --out"
                )
            retired = folder.with_name(
                f".{folder.name}.old"
            )  # killed while it deletes, a run must not leave half an artifact
            shutil.rmtree(retired, ignore_errors=True)
            folder.rename(retired)
            shutil.rmtree(retired)
        arguments = ["stage", stage.kind, "--config", str(self._given(stage)), "--out", str(folder)]
        code = _supervise([sys.executable, *self._launcher(), *arguments], self.lock)
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code == 2:
            raise SystemExit(2)
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            raise SlingshotError(
                f"{stage.name}: its process was killed by {name}{hint}; the same command goes on where it stopped"
            )
        if code or not self._finished(stage):
            raise SlingshotError(
                f"{stage.name}: its process ended with code {code} and no artifact; what it printed says why"
            )

    def _launcher(self) -> list[str]:
        if self.processes == 1:
            return PROGRAM
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), *PROGRAM]

    def _show_solved(self, stages: Sequence[Stage]) -> None:
        """Print the solved problem of the last evaluated model with the longest reasoning, as a person would like to read it."""
        places = [self.out / stage.folder / "evaluation.json" for stage in reversed(stages) if stage.kind == "evaluate"]
        for place in (place for place in places if place.exists()):
            solved = [
                example
                for examples in read_json(place)["examples"].values()
                for example in examples
                if example["correct"]
            ]
            if solved:
                example = max(solved, key=lambda example: len(example["reasoning"]))
                console = Console(highlight=False)
                console.print(Text(f"\n{example['prompt'].strip()}", "bold"))
                if example["reasoning"]:
                    console.print(Text(example["reasoning"].strip(), "dim italic"))
                console.print(Text(f"{example['response'].strip()}\n", "green"))
                return

    def _say(self, line: str, style: str) -> None:
        self.console.print(Text(line, style))


def _find(source: str) -> tuple[str, str]:
    """A recipe's name and text, from the path of a TOML file or the name of a shipped one."""
    if source.endswith(".toml") or os.sep in source:
        return Path(source).stem, read_text(Path(source))
    shipped = importlib.resources.files("slingshot.recipe") / "recipes"
    names = sorted(file.name.removesuffix(".toml") for file in shipped.iterdir() if file.name.endswith(".toml"))
    if source not in names:
        raise SlingshotError(f"no recipe {source!r}; {did_you_mean(source, names)} (or give the path of a .toml file)")
    return source, (shipped / f"{source}.toml").read_text(encoding="utf-8")


def _stages(recipe: str, tables: dict[str, Any], seed: int | None) -> tuple[Stage, ...]:
    """The stages of a recipe's tables, defaults filled in, references checked, configs validated."""
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SlingshotError(f"recipe {recipe}: {name} stands outside a table; put it under [defaults] or a stage")
    tables = dict(tables)
    defaults = tables.pop("defaults", {})
    evaluation = tables.pop("evaluation", None)
    unused = set(defaults)
    stages: dict[str, Stage] = {}

    def add(name: str, kind: str, values: dict[str, Any]) -> None:
        fields = STAGES[kind].config.model_fields
        unused.difference_update(fields)
        values = _merged({key: value for key, value in defaults.items() if key in fields}, values)
        if seed is not None:
            values["seed"] = seed

        def artifact(other: str) -> str:
            if other not in stages:
                why = (
                    f"[{other}] comes later; move it up"
                    if other in tables
                    else did_you_mean(other, _plain(list(stages)))
                    if stages
                    else "it is the first"
                )
                raise SlingshotError(f"{name}: no earlier stage {other!r} to refer to; {why}")
            return other

        def flops(other: str) -> float:
            artifact(other)
            return 1.0  # any cost will do until the receipt is there

        STAGES[kind].config.parse(resolve(values, artifact, flops, name), name)
        stages[name] = Stage(name, kind, values)

    for name, table in tables.items():
        values = dict(table)
        kind = values.pop("stage", None)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in {"configs", "evaluations"}:
            raise SlingshotError(
                f"recipe {recipe}: [{name}] cannot name a stage; use letters, digits, _ and - (not configs or evaluations)"
            )
        if kind not in STAGES:
            missing = "has no stage = ..." if kind is None else f"stage = {kind!r} is no kind of stage"
            raise SlingshotError(f"recipe {recipe}: [{name}] {missing}; {did_you_mean(str(kind), list(STAGES))}")
        own = values.pop("evaluation", {})
        if own is not False and not isinstance(own, dict):
            raise SlingshotError(
                f"{name}.evaluation: must be a table of keys that differ from [evaluation], or false, got {own!r}"
            )
        add(name, kind, values)
        if STAGES[kind].makes_checkpoint and own is not False and (evaluation is not None or own):
            add(f"{name}.evaluation", "evaluate", {**_merged(evaluation or {}, own), "model": f"@{name}"})
    if unused:
        raise SlingshotError(f"defaults.{min(unused)}: no stage of the recipe {recipe} knows this key")
    if not stages:
        raise SlingshotError(
            f"recipe {recipe} has no stages; write a table like [base] with stage = {next(iter(STAGES))!r}"
        )
    return tuple(stages.values())


def resolve(value: Any, artifact: Callable[[str], Any], flops: Callable[[str], float], where: str = "") -> Any:
    """A config value with every "@stage" replaced by artifact(stage) and every {flops_of = stage, times = x} by x * flops(stage)."""
    if isinstance(value, str) and value.startswith("@"):
        return artifact(value[1:])
    if isinstance(value, list):
        return [resolve(part, artifact, flops, where) for part in value]
    if isinstance(value, dict) and "flops_of" in value:
        times = value.get("times", 1)
        if (
            value.keys() - {"flops_of", "times"}
            or not isinstance(value["flops_of"], str)
            or not isinstance(times, int | float)
        ):
            raise SlingshotError(
                f'{where}: a number from a receipt is written {{ flops_of = "STAGE", times = 3 }}, got {value!r:.80}'
            )
        return times * flops(value["flops_of"])
    if isinstance(value, dict):
        return {key: resolve(part, artifact, flops, f"{where}.{key}") for key, part in value.items()}
    return value


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over them, tables key by key."""
    tables = {
        key: {**values[key], **change}
        for key, change in changes.items()
        if isinstance(change, dict) and isinstance(values.get(key), dict)
    }
    return {**values, **changes, **tables}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table of dotted keys; a list is one value, as is a {flops_of = ...}."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, dict) and part and "flops_of" not in part:
            flat |= _flat(part, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = part
    return flat


def _differences(stage: Stage, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key old -> new` for every key in which two configs of a stage would make different artifacts. A key of the config itself that only
    one of them has is of another version, and no difference.

    References to artifacts are left out, since a moved run changes their paths (digests tell whether the parents changed), and so is the price.
    """
    skipped = {key for key, value in _flat(stage.values).items() if Stage("", "", {"value": value}).parents}
    different = STAGES[stage.kind].config.differences(old, new)
    return [f"{key} {_brief(a)} -> {_brief(b)}" for key, (a, b) in different.items() if key not in skipped]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(names: Sequence[str]) -> list[str]:
    return [name for name in names if "." not in name]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Make the run's folder and hold its lock, so that two runs never write into it at once. Yields the lock's descriptor.

    Children inherit the descriptor: while one of them lives on after its runner was killed, the folder stays locked.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SlingshotError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise SlingshotError(
                        f"another slingshot is running in {out}; wait for it or choose another --out"
                    ) from error
                time.sleep(0.1)
        yield lock
    finally:
        os.close(lock)


def _supervise(command: list[str], lock: int) -> int:
    """Run a child to its end and return its exit code (-signal if one killed it). It dies with this process, however that dies.

    The child has a session of its own, so a terminal's Ctrl-C reaches it once, from here; KeyboardInterrupt goes up when it has ended.
    A second Ctrl-C kills it.
    """
    parent = os.getpid()
    prctl = getattr(
        ctypes.CDLL(None), "prctl", None
    )  # Linux only; elsewhere an orphan finishes its stage and the lock keeps others out
    # torchrun ends its workers when it is told to; killed outright it would leave them.
    death = signal.SIGTERM if "torch.distributed.run" in command else signal.SIGKILL

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(death))
        if os.getppid() != parent:
            os._exit(1)

    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=die_with_parent, pass_fds=[lock], stdin=subprocess.DEVNULL
    )
    interrupted = False
    try:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                if interrupted:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.send_signal(signal.SIGINT)
                interrupted = True
    finally:
        if process.poll() is None:
            process.kill()
    if interrupted:
        raise KeyboardInterrupt
    return code
