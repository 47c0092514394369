"""A recipe: named stages in a TOML file, each fed by earlier ones.

    chat = "rl"                       # whose model a reader will want to talk to; the last checkpoint where not said

    [defaults]                        # goes to every stage that knows the key and does not set it itself
    tasks = ["arithmetic"]

    [defaults.optimizer]              # a table of defaults goes to every stage that has the table, key by key
    lr = 1e-3

    [base]                            # a stage: its name, its kind, and the keys of that kind's config
    stage = "pretrain"

    [rl]
    stage = "rl"
    model = "@base"                   # the artifact folder of an earlier stage
    max_flops = { flops_of = "base", times = 3 }  # a number: what that stage's receipt says it cost, times 3

    [evaluation]                      # the evaluate stage's config, run after every stage that makes a checkpoint; a
    problems = 500                    # stage's own `evaluation` changes keys of it, `evaluation = false` leaves it out

`Recipe.load("tiny", ["rl.optimizer.lr=1e-4"])` finds every config valid, or says what is not; recipe/runner.py runs it.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_text
from slingshot.base.names import did_you_mean
from slingshot.recipe.tables import apply_override, merged, parse_override, resolve
from slingshot.stages.kinds import STAGES

EVALUATION = ".evaluation"


@dataclass(frozen=True)
class RecipeStage:
    """One process of a run; `values` is its config with references still in it. The evaluation of a stage X is the
    stage X.evaluation."""

    name: str
    kind: str
    values: dict[str, Any]

    @property
    def own(self) -> bool:
        """Whether it stands in the recipe, and is no evaluation that follows from one that does."""
        return not self.name.endswith(EVALUATION)

    @property
    def folder(self) -> str:
        """The artifact's place in the run."""
        return self.name if self.own else f"evaluations/{self.name.removesuffix(EVALUATION)}"

    @property
    def parents(self) -> list[str]:
        """Names of the stages whose artifacts this one reads."""
        names: dict[str, None] = {}
        resolve(self.values, names.setdefault, lambda name: 1.0)
        return list(names)

    @property
    def sources(self) -> list[str]:
        """Names of all stages this one depends on: its parents, and those whose cost it takes a number from."""
        names: dict[str, float] = {}
        resolve(self.values, lambda name: names.setdefault(name, 1.0), lambda name: names.setdefault(name, 1.0))
        return list(names)

    def config(self, run: Path, flops: Callable[[str], float]) -> StageConfig:
        """Its whole config, references resolved: to paths into the folder `run`, and to what earlier stages cost."""
        return STAGES[self.kind].config.parse(resolve(self.values, lambda name: str(run / name), flops), self.name)


@dataclass(frozen=True)
class Recipe:
    """Stages in the order they run, every config of theirs found valid; `chat` is whose model to talk to."""

    name: str
    stages: tuple[RecipeStage, ...]
    chat: str | None = None

    @classmethod
    def load(cls, source: str, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
        """Read a shipped recipe by name or a TOML file by path, change keys, and check all of it.

        `seed` replaces every stage's. SlingshotError names the table and key of the first thing that is wrong.
        """
        name, text = _find(source)
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SlingshotError(f"recipe {source}: not valid TOML: {error}") from error
        for override in overrides:
            path, _ = parse_override(override)
            if len(path) < 2 or path[0] not in {*tables, "defaults", "evaluation"}:
                hint = did_you_mean(path[0], [table for table, keys in tables.items() if isinstance(keys, dict)])
                raise SlingshotError(f"{override!r}: an override is written STAGE.KEY=VALUE; {hint}")
            apply_override(tables, override)
        chat = tables.pop("chat", None)
        stages = tuple(_read(name, tables, seed))
        made = [stage.name for stage in stages if stage.own and STAGES[stage.kind].makes_checkpoint]
        if chat is not None and chat not in made:
            hint = did_you_mean(str(chat), made)
            raise SlingshotError(f"recipe {name}: chat = {chat!r} names no stage that makes a checkpoint; {hint}")
        return cls(name, stages, chat or (made[-1] if made else None))

    @property
    def names(self) -> list[str]:
        """Of the stages that stand in the recipe."""
        return [stage.name for stage in self.stages if stage.own]

    def until(self, name: str | None) -> tuple[RecipeStage, ...]:
        """The stages up to and including `name` and its evaluation; all of them for None."""
        if name is None:
            return self.stages
        if name not in self.names:
            hint = did_you_mean(name, self.names)
            raise SlingshotError(f"--until {name}: the recipe {self.name} has no such stage; {hint}")
        last = max(i for i, stage in enumerate(self.stages) if stage.name in (name, name + EVALUATION))
        return self.stages[: last + 1]


def shipped() -> Iterator[tuple[str, str]]:
    """Name and text of every recipe that comes along."""
    folder = importlib.resources.files("slingshot.recipe") / "recipes"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            yield file.name.removesuffix(".toml"), file.read_text(encoding="utf-8")


def _find(source: str) -> tuple[str, str]:
    """A recipe's name and text, from the path of a TOML file or the name of a shipped one."""
    if source.endswith(".toml") or os.sep in source:
        return Path(source).stem, read_text(Path(source))
    texts = dict(shipped())
    if source not in texts:
        hint = did_you_mean(source, texts)
        raise SlingshotError(f"no recipe {source!r}; {hint} (or give the path of a .toml file)")
    return source, texts[source]


def _read(recipe: str, tables: dict[str, Any], seed: int | None) -> Iterator[RecipeStage]:
    """The stages of a recipe's tables: defaults filled in, references checked, configs validated."""
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SlingshotError(f"recipe {recipe}: {name} stands outside a table; put it under [defaults] or a stage")
    defaults, evaluation = tables.pop("defaults", {}), tables.pop("evaluation", None)
    before: list[str] = []
    known: set[str] = set()

    def read(name: str, kind: str, values: dict[str, Any]) -> RecipeStage:
        config = STAGES[kind].config
        known.update(config.model_fields)
        values = merged({key: value for key, value in defaults.items() if key in config.model_fields}, values)
        if seed is not None:
            values["seed"] = seed

        def artifact(other: str) -> str:
            if other not in before:
                hint = f"[{other}] comes later; move it up" if other in tables else did_you_mean(other, before)
                raise SlingshotError(f"{name}: no earlier stage {other!r} to refer to; {hint}")
            return other

        def flops(other: str) -> float:
            artifact(other)
            return 1.0  # any cost will do until the receipt is there

        config.parse(resolve(values, artifact, flops, name), name)
        return RecipeStage(name, kind, values)

    for name, table in tables.items():
        values = dict(table)
        kind = values.pop("stage", None)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in {"configs", "evaluations"}:
            way_out = "use letters, digits, _ and - (not configs or evaluations)"
            raise SlingshotError(f"recipe {recipe}: [{name}] cannot name a stage; {way_out}")
        if kind not in STAGES:
            missing = "has no stage = ..." if kind is None else f"stage = {kind!r} is no kind of stage"
            raise SlingshotError(f"recipe {recipe}: [{name}] {missing}; {did_you_mean(str(kind), STAGES)}")
        own = values.pop("evaluation", {})
        if own is not False and not isinstance(own, dict):
            what = "must be a table of keys that differ from [evaluation], or false"
            raise SlingshotError(f"{name}.evaluation: {what}, got {own!r}")
        yield read(name, kind, values)
        before.append(name)
        if STAGES[kind].makes_checkpoint and own is not False and (evaluation is not None or own):
            yield read(name + EVALUATION, "evaluate", {**merged(evaluation or {}, own), "model": f"@{name}"})
    if not tables:
        kind = next(iter(STAGES))
        raise SlingshotError(f"recipe {recipe} has no stages; write a table like [base] with stage = {kind!r}")
    if unused := defaults.keys() - known:
        raise SlingshotError(f"defaults.{min(unused)}: no stage of the recipe {recipe} knows this key")
