"""A recipe's run: one process per stage, in a folder that resumes where it stopped.

    run(Recipe.load("tiny"), Path("runs/tiny"))

    out/recipe.json                   the stages as this run understood them, and which of them were asked for
    out/configs/<stage>.json          what the stage's process was given
    out/<stage>/                      its artifact; it stands while its receipt agrees with the recipe
    out/evaluations/<stage>/          its evaluation
    out/report.html, report.json      built anew after every stage

What can be known from the recipe and the disk is checked before anything runs. A stale artifact is put aside, never
deleted.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import lock, put_aside, read_json, unlock, write_json
from slingshot.base.quantity import plural, show_duration
from slingshot.cost.receipt import Receipt
from slingshot.data.corpora import check_corpus
from slingshot.data.examples import read_examples
from slingshot.data.shards import TokenShards
from slingshot.recipe.process import launcher, supervise
from slingshot.recipe.recipe import Recipe, RecipeStage
from slingshot.recipe.results import Evaluation, headline, read_object
from slingshot.stages.kinds import STAGES
from slingshot.tasks.loader import TaskConfig
from slingshot.training.identity import Identity, input_path, local_inputs

PROGRAM = ["-m", "slingshot"]  # how a stage's process is started, after the interpreter's name
LOCK_SECONDS = 5.0  # patience with a folder's lock: a killed runner's child needs a moment to be gone


def run(recipe: Recipe, out: Path, until: str | None = None, processes: int = 1) -> None:
    """Run the recipe's stages into the folder `out`, each in `processes` processes (torchrun starts more than one).

    Finished stages are skipped, stale ones run again, an unfinished one goes on. Raises SlingshotError when a stage
    fails without having said why, SystemExit(2) when it has, KeyboardInterrupt after Ctrl-C, once the stage has saved.
    """
    stages = recipe.until(until)
    held = lock(out, LOCK_SECONDS)
    try:
        _Run(recipe, out, processes, held).go(stages)
    finally:
        unlock(held)


class _Run:
    """One `run` at work: where it is, what it says, and the lock its children share."""

    def __init__(self, recipe: Recipe, out: Path, processes: int, held: int) -> None:
        self.recipe, self.out, self.processes, self.lock = recipe, out, processes, held
        self.stages = {stage.name: stage for stage in recipe.stages}
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def go(self, stages: Sequence[RecipeStage]) -> None:
        from slingshot.recipe import report  # brings matplotlib, which `slingshot --help` need not wait for

        record = self.out / "recipe.json"
        if record.exists() and (other := read_object(record).get("name")) != self.recipe.name:
            raise SlingshotError(f"{self.out} holds a run of the recipe {other}; choose another --out")
        self._check(stages, self._again(stages))
        names = [stage.name for stage in stages if stage.own]
        own = [stage for stage in self.recipe.stages if stage.own]
        shown = [{"name": stage.name, "kind": stage.kind, "config": stage.values} for stage in own]
        talking = [name for name in names if STAGES[self.stages[name].kind].makes_checkpoint]
        chat = self.recipe.chat if self.recipe.chat in talking else talking[-1] if talking else None
        write_json(record, {"name": self.recipe.name, "stages": shown, "asked": names, "chat": chat})
        for stage in stages:
            place = f"[{names.index(stage.name.split('.')[0]) + 1}/{len(names)}] {stage.name}"
            if self._finished(stage) and not self._changes(stage):
                self._say(f"{place}: skipped (unchanged)", "dim")
                continue
            begin = time.monotonic()
            self._say(f"{place}: {self._intent(stage)}", "bold")
            self._execute(stage)
            report.build(self.out)
            took = show_duration(time.monotonic() - begin)
            self._say(f"{place}: done in {took}; {headline(self.out / stage.folder)}", "green")
        report.build(self.out)
        self._show_solved(stages)
        print(f"report: {self.out / 'report.html'}")
        if chat:
            model = shlex.quote(str(self.out / chat))
            print(f"next: slingshot chat {model}, or on a page: slingshot serve {model}")
        if more := len(own) - len(names):
            print(f"the recipe has {plural(more, 'stage')} more; the same command without --until goes on")

    def _finished(self, stage: RecipeStage) -> bool:
        return (self.out / stage.folder / "receipt.json").exists()

    def _given(self, stage: RecipeStage) -> Path:
        """The config the stage's process was last started with."""
        return self.out / "configs" / f"{stage.name}.json"

    def _receipt(self, name: str) -> Receipt:
        return Receipt.read(self.out / self.stages[name].folder)

    def _config(self, stage: RecipeStage, coming: bool = False) -> StageConfig:
        """The stage's whole config with references resolved: paths into this run, and numbers from receipts; where
        receipts are still `coming`, any number."""

        def flops(name: str) -> float:
            return 1.0 if coming else self._receipt(name).flops

        return stage.config(self.out, flops)

    def _changes(self, stage: RecipeStage, begun: bool = False) -> list[str]:
        """Why a stage's artifact, or what is `begun` of it, is not what the recipe now asks for. Empty: it is."""
        config = self._config(stage)
        identity = Identity.of(stage.kind, config)
        if begun:
            return identity.differences(Identity(stage.kind, read_json(self._given(stage)), {}), type(config))
        return identity.differences(Identity.of_receipt(self._receipt(stage.name)), type(config))

    def _again(self, stages: Sequence[RecipeStage]) -> set[str]:
        """Names of the stages that will run; says of finished ones why they are stale."""
        again: set[str] = set()
        for stage in stages:
            why = [f"its parent {name} runs again" for name in stage.sources if name in again]
            if self._finished(stage) and (why := why or self._changes(stage)):
                self._say(f"{stage.name} is stale: {', '.join(why)}", "yellow")
            if why or not self._finished(stage):
                again.add(stage.name)
        return again

    def _check(self, stages: Sequence[RecipeStage], again: set[str]) -> None:
        """Refuse now what a stage that will run would refuse hours later."""
        coming = {str(self.out / self.stages[name].folder) for name in again}
        for stage in (stage for stage in stages if stage.name in again):
            try:
                check(self._config(stage, coming=True), coming)
            except SlingshotError as error:
                raise SlingshotError(f"{stage.name}: {error}") from error
            folder = self.out / stage.folder
            if folder.exists() and not self._finished(stage):
                what = f"{folder} is in the way: it is no artifact of slingshot's"
                raise SlingshotError(f"{what}; move it or choose another --out")

    def _intent(self, stage: RecipeStage) -> str:
        source = f" (from {', '.join(stage.parents)})" if stage.parents else ""
        begun = (self.out / f"{stage.folder}.partial").exists() and self._given(stage).exists()
        goes_on = ", going on where it stopped" if begun and not self._changes(stage, begun) else ""
        return f"{STAGES[stage.kind].what}{source} -> {self.out / stage.folder}{goes_on}"

    def _execute(self, stage: RecipeStage) -> None:
        """Run one stage's process to its end; a stale artifact of it is put aside first."""
        folder = self.out / stage.folder
        write_json(self._given(stage), self._config(stage).model_dump(mode="json"))
        if folder.exists():
            self._say(f"{folder}: kept as {put_aside(folder)}", "yellow")
        arguments = ["stage", stage.kind, "--config", str(self._given(stage)), "--out", str(folder)]
        code = supervise([*launcher(PROGRAM, self.processes), *arguments], self.lock)
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code == 2:
            raise SystemExit(2)
        if code < 0:
            by = signal.Signals(-code).name + (" (out of memory?)" if code == -signal.SIGKILL else "")
            raise SlingshotError(f"{stage.name}: its process was killed by {by}; the same command goes on from there")
        if code or not self._finished(stage):
            ended = f"{stage.name}: its process ended with code {code} and no artifact"
            raise SlingshotError(f"{ended}; what it printed says why")

    def _show_solved(self, stages: Sequence[RecipeStage]) -> None:
        """Print the solved problem of the last evaluated model that has the longest reasoning."""
        for stage in (stage for stage in reversed(stages) if stage.kind == "evaluate"):
            examples = Evaluation.read(self.out / stage.folder).examples.values()
            if solved := [example for of_task in examples for example in of_task if example.correct]:
                example = max(solved, key=lambda example: len(example.reasoning or ""))
                console = Console(highlight=False)
                console.print(Text(f"\n{example.prompt.strip()}", "bold"))
                if example.reasoning:
                    console.print(Text(example.reasoning.strip(), "dim italic"))
                console.print(Text(f"{(example.response or '').strip()}\n", "green"))
                return

    def _say(self, line: str, style: str) -> None:
        self.console.print(Text(line, style))


def check(config: StageConfig, coming: Collection[str]) -> None:
    """Refuse what the recipe and the disk tell of a stage's inputs: one that is neither there nor made by an earlier
    stage (`coming`), or begins in another format, a task that cannot be loaded. The hub is not asked."""
    for name, checkpoint in local_inputs(config.model_dump(mode="json")).items():
        if name not in coming and not input_path(name, checkpoint).exists():
            raise SlingshotError(f"{name} does not exist")
    for name in set(getattr(config, "data", [])) - set(coming):
        if not (Path(name) / "receipt.json").exists():  # a stage's own is known to be right
            read_examples(Path(name))
    if text_key := getattr(config, "text_key", None):
        check_corpus(sorted(set(getattr(config, "text", [])) - set(coming)), text_key)
    for source in getattr(config, "shards", []):
        if source.path not in coming:
            TokenShards.open(Path(source.path))
    documents = getattr(config, "documents", None)
    tasks: list[TaskConfig] = getattr(config, "tasks", [])
    for task in [*tasks, *(documents.tasks if documents else [])]:
        loaded = task.load()
        # The stages that train on what tasks write: pretrain, by its table documents, and sft, as many as `examples`.
        writes = documents or (getattr(config, "style", None) and getattr(config, "examples", 0))
        if writes and not loaded.has_solutions:
            way = "leave `examples` out" if getattr(config, "data", None) else f"give {'text' if documents else 'data'}"
            raise SlingshotError(f"{task.name} writes no solutions to train on; take another task, or {way}")
