"""A dry run: every stage of a recipe for real with a few steps, then the seconds, memory and money of the whole by
scaling.

    dry_run(Recipe.load("tiny"), until="rl_final").seconds

Each stage has a process of its own (recipe/dry_stage.py), in a temporary folder, and the model that the dry stage
before it made. No torch here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_jsonl, write_json, write_jsonl
from slingshot.base.quantity import plural, show_duration, show_money, show_size
from slingshot.cost.receipt import Receipt
from slingshot.machine.memory import PeakMemory
from slingshot.planning.page import PlanPage, table
from slingshot.planning.plan import ASSUMPTIONS
from slingshot.recipe.recipe import Recipe, RecipeStage
from slingshot.stages.kinds import STAGES

STEPS = {"pretrain": 10, "rl": 4, "distill": 4}  # of these kinds
SAMPLE_CHUNKS = 3  # of problems
LEAST_PROBLEMS = 16  # of an evaluation
BATCHES = 12  # of examples, at most, that are fine-tuned on
ERROR = "slingshot: "  # how a process begins the line that says why it ends


class DryStage(PeakMemory):
    """A stage as it is expected; memory as its few steps needed it."""

    name: str
    kind: str
    seconds: float
    fixed_seconds: float  # of these, that do not grow with its steps
    tokens: float
    flops: float
    share: float  # of it that was run
    money: float | None  # at the stage's price, None without one


class DryRun(Strict):
    """A recipe's stages and their sums."""

    recipe: str
    machine: str
    stages: list[DryStage]
    seconds: float
    start_seconds: float  # of starting the processes, which no receipt counts
    flops: float
    money: float | None
    assumptions: list[str]


def dry_run(recipe: Recipe, until: str | None = None) -> DryRun:
    """Run every stage up to `until`. SlingshotError when one fails, with what it printed last."""
    with tempfile.TemporaryDirectory(prefix="slingshot-dry-run-") as folder:
        run = _DryRun(Path(folder))
        asked = recipe.until(until)
        print(f"a few steps of {plural(len(asked), 'stage')}; answers are scripted, so losses and scores mean nothing",
              file=sys.stderr)  # fmt: skip
        stages = [run.stage(stage, f"{at} of {len(asked)}") for at, stage in enumerate(asked, start=1)]
    known = [stage.money for stage in stages if stage.money is not None]
    return DryRun(
        recipe=recipe.name, machine=run.machine, stages=stages,
        seconds=sum(stage.seconds for stage in stages) + run.start_seconds, start_seconds=run.start_seconds,
        flops=sum(stage.flops for stage in stages), money=sum(known) if known else None,
        assumptions=ASSUMPTIONS["recipe"],
    )  # fmt: skip


class _DryRun:
    """The stages run so far, and how many times as many examples the whole ones would have made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start_seconds, self.machine = 0.0, ""
        self._found: dict[str, DryStage] = {}  # by name, and by all that an evaluation's cost depends on
        self._growth: dict[str, float] = {}  # by path of a dataset
        self._styles: dict[str, dict[str, float]] = {}  # by path of a model that was pre-trained on tasks' documents

    def stage(self, stage: RecipeStage, place: str) -> DryStage:
        """Run one stage, `place` in all, with a few steps and scale it up."""
        out = self.folder / stage.folder
        config = stage.config(self.folder, lambda name: self._found[name].flops)
        whole = config.model_dump(mode="json")
        model, styles = whole.get("model"), {"steps": 1.0}  # how responses are written, but for an evaluated base
        if documents := getattr(config, "documents", None):
            counts = sum((Counter(documents.counts(task)) for task in documents.tasks), Counter[str]())
            self._styles[str(out)] = dict(counts)
        key = stage.name
        if stage.kind == "evaluate":
            styles = self._styles.get(str(model), styles)
            # What a model's speed depends on: its config.json where it is a folder, else what names it.
            file = Path(str(model)) / "config.json"
            key = json.dumps([styles, whole | {"model": read_json(file) if file.is_file() else model}], sort_keys=True)
        if key not in self._found:
            print(f"{place}: dry run of {stage.name} ({STAGES[stage.kind].what})", file=sys.stderr)
            self._found[key] = self._run(stage, whole, styles, out)
        self._found[stage.name] = self._found[key].model_copy(update={"name": stage.name})
        return self._found[stage.name]

    def _run(self, stage: RecipeStage, whole: dict[str, Any], styles: dict[str, float], out: Path) -> DryStage:
        (config, factor), result = self._cut(stage, whole), self.folder / "result.json"
        job = {"kind": stage.kind, "name": stage.name, "config": config, "whole": whole, "factor": factor,
               "styles": styles, "out": str(out), "result": str(result)}  # fmt: skip
        write_json(self.folder / "job.json", job)
        result.unlink(missing_ok=True)
        begin = time.perf_counter()
        command = [sys.executable, "-m", "slingshot.recipe.dry_stage", str(self.folder / "job.json")]
        code, said = _watched(command)
        took = time.perf_counter() - begin
        if code or not result.exists():
            raise SlingshotError(f"dry run of {stage.name}: {said or f'its process ended with code {code}'}")
        measured, receipt = read_json(result), Receipt.read(out)
        factor, fixed, varying = measured["factor"], measured["fixed_seconds"], measured["varying_seconds"]
        if (most := whole.get("max_flops")) is not None and receipt.flops:
            factor = min(factor, max(1 / config["steps"], most / receipt.flops))
        self.start_seconds += max(0.0, took - fixed - varying)
        self._growth[str(out)] = factor
        processor = receipt.machine.accelerator or receipt.machine.cpu
        self.machine = f"{processor}, {plural(receipt.machine.threads or 1, 'thread')}"
        seconds, price = fixed + factor * varying, whole.get("price")
        return DryStage(
            name=stage.name, kind=stage.kind, seconds=seconds, fixed_seconds=fixed, tokens=factor * receipt.tokens,
            flops=factor * receipt.flops, share=1 / factor, money=None if price is None else seconds / 3600 * price,
            **receipt.model_dump(include=set(PeakMemory.model_fields)),
        )  # fmt: skip

    def _cut(self, stage: RecipeStage, whole: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The config with a few steps, and how many times as much the whole is (of problems the process knows it)."""
        if stage.kind in STEPS:
            steps = min(STEPS[stage.kind], whole["steps"])
            return whole | {"steps": steps}, whole["steps"] / steps
        if stage.kind == "sample":
            return whole | {"problems": min(whole["problems"], SAMPLE_CHUNKS * whole["chunk"])}, 1.0
        if stage.kind == "evaluate":  # as many answers as a chunk has problems
            most = max(LEAST_PROBLEMS, whole["chunk"] // (whole["samples"] * len(whole["forms"])))
            return whole | {"problems": min(whole["problems"], most)}, 1.0
        if stage.kind != "sft":
            return whole, 1.0
        most, heads = BATCHES * whole["batch_size"], list[str]()
        total, taken = float(whole["examples"]), min(whole["examples"], most)
        for path in whole["data"]:
            rows = read_jsonl(Path(path) / "data.jsonl" if Path(path).is_dir() else Path(path))
            heads.append(str(self.folder / f"head-{len(heads)}.jsonl"))
            write_jsonl(Path(heads[-1]), rows[:most])
            total, taken = total + len(rows) * self._growth.get(path, 1.0), taken + len(rows[:most])
        cut = whole | {"data": heads, "examples": min(whole["examples"], most), "epochs": 1}
        return cut, whole["epochs"] * total / max(1, taken)


def _watched(command: list[str]) -> tuple[int, str]:
    """Run a command, its progress on our standard error; its code, and the last line it wrote."""
    said = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or ():
                said = line.strip() or said
                if not line.startswith(ERROR):
                    print(line, end="", file=sys.stderr, flush=True)
        except BaseException:
            process.kill()
            raise
    return process.returncode, said.removeprefix(ERROR)


def dry_run_page(found: DryRun) -> PlanPage:
    """Put a dry run into a table."""
    rows: list[dict[str, Any]] = [
        {
            "name": stage.name, "time": show_duration(stage.seconds), "once": show_duration(stage.fixed_seconds),
            "kind": stage.kind, "run_share": stage.share, "tokens": stage.tokens, "flops": stage.flops,
            "memory": stage.peak_memory, "money": stage.money,
        }
        for stage in found.stages
    ]  # fmt: skip
    empty, time_of_all = dict.fromkeys(rows[0]), show_duration(found.seconds)
    rows.append(empty | {"name": "starting processes", "time": show_duration(found.start_seconds)})
    rows.append(empty | {"name": "in all", "flops": found.flops, "money": found.money, "time": time_of_all})
    memory = max((stage.peak_host_memory_bytes or 0 for stage in found.stages), default=0)
    figures = [(time_of_all, f"on {found.machine}"), (show_size(memory), "of memory, at the most")]
    if found.money is None:
        rows = [{key: value for key, value in row.items() if key != "money"} for row in rows]
    else:
        figures.append((show_money(found.money, ""), "at the given price"))
    note = "Every stage was run with a few steps; `once` is the part of its time that does not grow with them."
    stages, assumptions = table("The stages", rows, note, strong=len(rows) - 1), tuple(found.assumptions)
    return PlanPage(f"The recipe {found.recipe}", tuple(figures), (stages,), assumptions, None, "recipe")
