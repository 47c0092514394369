"""`slingshot plan recipe`: what every stage of a recipe will take here, and what it would take elsewhere, before it runs.

    slingshot plan recipe tiny --device h100
    slingshot plan recipe recipes/mine.toml rl.steps=200 --no-probe --json

Architecture, tokenizer and the lengths of responses follow from the recipe alone. Time on this machine comes from rehearsals: every kind of
stage makes at most 10 steps of its own code in a temporary folder (rehearsal.py). What a step took per FLOP, what came before the first one and
what a save took make the forecast. Without the probe, and for other devices, time comes from FLOPs, bytes and an assumed share of the peak.
No receipt is read.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_jsonl
from slingshot.base.quantity import count as read_count
from slingshot.base.quantity import share, show_count, show_duration, show_energy, show_price, show_size
from slingshot.cli.plan import Section, Story, deliver
from slingshot.cost.devices import DEVICES, Device, device
from slingshot.cost.flops import parameters
from slingshot.cost.workload import SOLVED, Elsewhere, Workload, elsewhere
from slingshot.machine.machine import describe
from slingshot.recipe import recipe as recipes
from slingshot.recipe.recipe import Recipe

if TYPE_CHECKING:  # they bring torch, and this module makes a command
    from slingshot.prospect import Prospect
    from slingshot.rehearsal import Rehearsal

PROBE_STEPS = 10  # of one kind of stage, all its shapes together

# Keys of a stage's Config that change what is learned or how often a step is made, but not what one takes.
_NOT_THE_STEP = {
    "model", "data", "seed", "price", "steps", "epochs", "examples", "problems", "per_problem", "lr", "adam_lr", "momentum", "betas", "weight_decay",
    "clip", "warmup", "decay", "final", "temperature", "top_p", "rewards", "max_flops", "reference_steps", "normalize_std", "clip_low", "clip_high",
    "language", "save_seconds", "bias_frozen_share", "style",
}  # fmt: skip


class Here(Strict):
    """What a stage will take on this machine; `seconds` as its receipt will have them, `start` its process before that."""

    seconds: float
    start: float
    memory_bytes: float
    money: float | None
    joules: float | None
    prepare: float  # of the seconds: before the first step
    save: float  # of the seconds: states kept now and then, and the artifact
    probed: int  # steps rehearsed for it; 0: the figures are from FLOPs and bytes


class Line(Strict):
    """One stage of a forecast."""

    name: str
    kind: str
    work: Workload
    here: Here
    elsewhere: list[Elsewhere]


class Forecast(Strict):
    """What a recipe will take."""

    recipe: str
    stages: list[Line]
    probed: bool
    probing_seconds: float
    assumptions: list[str]

    @property
    def seconds(self) -> float:
        """Of all stages, their processes' starts included."""
        return sum(line.here.seconds + line.here.start for line in self.stages)

    def total(self, value: Callable[[Line], float | None]) -> float | None:
        """A sum over the stages; None where no stage has a value."""
        found = [each for line in self.stages if (each := value(line)) is not None]
        return sum(found) if found else None


def forecast(
    recipe: Recipe, devices: Sequence[Device] = (), probe: bool = True, solved: float = SOLVED, hourly: float | None = None, until: str | None = None
) -> Forecast:
    """Look through the recipe's stages in their order, rehearse what differs, and add up. `hourly` is the price of this machine."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="slingshot-plan-") as folder:
        stages = _walk(recipe, recipe.until(until), Path(folder), probe, solved)
        measured = _rehearsals(stages, Path(folder)) if probe else {}
        local = None if probe else device("local")
        lines = []
        for stage in stages:
            here, work = _by_rehearsal(stage, measured[stage.shape]) if local is None else (_by_flops(stage.work, local), stage.work)
            rate = stage.config.price if hourly is None else hourly
            money = None if rate is None else here.seconds / 3600 * rate
            away = [elsewhere(work, each) for each in devices]
            lines.append(Line(name=stage.name, kind=stage.kind, work=work, here=here.model_copy(update={"money": money}), elsewhere=away))
    return Forecast(
        recipe=recipe.name, stages=lines, probed=probe, probing_seconds=time.perf_counter() - begin, assumptions=_assumptions(stages, lines, probe)
    )


# The stages, as far as they are known before they run


class _Stage:
    """A stage with its references resolved to stand-ins, the model it works on, and what it will do."""

    def __init__(self, name: str, kind: str, config: Any, prospect: Prospect, work: Workload) -> None:
        self.name, self.kind, self.config, self.prospect, self.work = name, kind, config, prospect, work

    @property
    def speaks(self) -> bool:
        """Whether the model it samples from is there already, so that its own responses can be had."""
        return self.kind in ("evaluate", "sample", "rl") and self.prospect.source is not None

    @property
    def shape(self) -> str:
        """The same for stages whose steps take the same."""
        keys = {key: value for key, value in self.config.model_dump(mode="json").items() if key not in _NOT_THE_STEP or self.kind == "convert"}
        writer: Any = dict(self.prospect.writer.styles) if any(phase.sort == "rollouts" for phase in self.work.phases) else None
        if self.speaks:
            writer = self.prospect.source
        return json.dumps([self.kind, self.prospect.model.model_dump(mode="json"), keys, writer], sort_keys=True)


def _walk(recipe: Recipe, stages: Sequence[recipes.Stage], folder: Path, probe: bool, solved: float) -> list[_Stage]:
    """Foresee every stage from those before it; stand-ins for their artifacts are written to `folder`."""
    from slingshot.prospect import Prospect
    from slingshot.rehearsal import stand_in

    prospects: dict[str, Prospect] = {}  # by the place of their stand-in
    written: dict[str, str] = {}  # by architecture and tokenizer: stages that pass on the same network share a stand-in
    works: dict[str, Workload] = {}
    found = []
    for stage in stages:
        module = recipes.stage_module(stage.kind)
        values = recipes.resolve(stage.values, lambda name: str(folder / name), lambda name: works[name].flops)
        config = module.Config.parse(values, stage.name)
        if stage.kind == "pretrain":
            prospect = module.foresee(config)
        else:
            source = config.source if stage.kind == "convert" else config.model
            prospect = prospects.get(source) or Prospect.outside(source)
        prospect = prospect.trusting(solved)
        there = prospect.source
        if stage.kind == "rl":  # what pays is written sooner or later
            prospect = prospect.reading(prospect.writer.styles if config.rewards.random else {"steps": 1.0})
        works[stage.name] = work = module.plan(config, prospect)
        if stage.kind == "sft":
            prospect = prospect.reading({config.style: 1.0} if not config.data else {"steps": 1.0})
        if stage.kind == "sample":
            write_jsonl(folder / stage.name / "data.jsonl", module.foresee(config, prospect))
        elif stage.kind != "evaluate":
            prospects[str(folder / stage.name)] = prospect
            key = json.dumps([prospect.model.model_dump(mode="json"), id(prospect.tokenizer)])
            if probe and (size := 4 * parameters(prospect.model).total) > describe().memory_bytes / 2:
                raise SlingshotError(f"{stage.name}: its {show_size(size)} of weights are too much to rehearse here; --no-probe plans without")
            if not probe:  # a later stage may learn from it how to write
                prospect.tokenizer.save(folder / stage.name)
            elif key not in written:
                stand_in(folder / stage.name, prospect.model, prospect.tokenizer)
                written[key] = stage.name
            else:
                (folder / stage.name).symlink_to(folder / written[key], target_is_directory=True)
        found.append(_Stage(stage.name, stage.kind, config, replace(prospect, source=there), work))
    return found


def _rehearsals(stages: Sequence[_Stage], folder: Path) -> dict[str, Rehearsal]:
    """Rehearsals by shape. At most PROBE_STEPS steps of a kind: where shapes are many, each gets few, and the last get none of their own."""
    from slingshot.rehearsal import measure

    measured: dict[str, Rehearsal] = {}
    shapes: dict[str, _Stage] = {}
    for stage in stages:
        shapes.setdefault(stage.shape, stage)
    for number, (shape, stage) in enumerate(shapes.items()):
        alike = [other for other in shapes.values() if other.kind == stage.kind]
        if alike.index(stage) < PROBE_STEPS:
            steps = max(1, PROBE_STEPS // len(alike))
            writer = None if stage.speaks else stage.prospect.writer
            # Four steps of reinforcement: how many groups carry a signal varies from step to step.
            least = min(steps, 4 if stage.speaks and stage.kind == "rl" else max(2, len(stage.work.phases)))
            measured[shape] = measure(stage.kind, _shortened(stage, steps), folder / f"rehearsal-{number}", writer, steps, least)
        else:
            measured[shape] = measured[alike[0].shape]
    return measured


def _by_rehearsal(stage: _Stage, rehearsal: Rehearsal) -> tuple[Here, Workload]:
    """What the stage will take, and its work as the rehearsal corrects it."""
    work = stage.work
    if stage.kind == "convert":
        share = work.phases[0].n_bytes / sum(step.n_bytes for step in rehearsal.steps)
        steps, save = sum(step.seconds for step in rehearsal.steps) * share, rehearsal.save * share
    else:
        if stage.speaks:
            per_step = sum(step.flops for step in rehearsal.steps) / len(rehearsal.steps)
            flops = per_step * (stage.config.steps if stage.kind == "rl" else work.steps)
            work = work.scaled(min(flops, getattr(stage.config, "max_flops", None) or math.inf) / work.flops)
        steps = rehearsal.first + work.flops * rehearsal.seconds_per_flop
        save = rehearsal.save * (int(steps / stage.config.save_seconds) + rehearsal.weights_share)
    seconds = rehearsal.prepare + steps + save
    here = Here(
        seconds=seconds, start=rehearsal.start, memory_bytes=rehearsal.peak_memory_bytes, money=None,
        joules=None if rehearsal.watts is None else rehearsal.watts * seconds, prepare=rehearsal.prepare, save=save, probed=len(rehearsal.steps),
    )  # fmt: skip
    return here, work


def _shortened(stage: _Stage, steps: int) -> Any:
    """The config to rehearse with: an evaluation goes through every task and form by turns, so few chunks of each let few steps see all."""
    config = stage.config
    if stage.kind == "evaluate":
        chunks = max(1, steps // (len(config.tasks) * len(config.forms)))
        config = config.model_copy(update={"problems": min(config.problems, chunks * config.chunk)})
    if stage.speaks:
        config = config.model_copy(update={"model": stage.prospect.source})
    return config


def _by_flops(work: Workload, local: Device) -> Here:
    found = elsewhere(work, local)
    return Here(seconds=found.seconds, start=0.0, memory_bytes=found.memory_bytes, money=None, joules=None, prepare=0.0, save=0.0, probed=0)


def _assumptions(stages: Sequence[_Stage], lines: Sequence[Line], probe: bool) -> list[str]:
    """Every assumption once, with the stages it is made for."""
    made: dict[str, list[str]] = {}
    for stage in stages:
        spoken = ("responses as this model wrote them in the rehearsal",)
        for text in spoken if probe and stage.speaks else stage.work.assumptions:
            made.setdefault(text, []).append(stage.name)
    found = [f"{text} ({', '.join(names) if len(names) < 5 else f'{len(names)} stages'})" for text, names in made.items()]
    if any(stage.kind == "rl" and not (probe and stage.speaks) for stage in stages):
        found.append("reinforcement learning writes worked steps from its first step on, unless its reward is a coin")
    if probe:
        found.append(f"seconds here: at most {PROBE_STEPS} steps of each kind of stage, rehearsed just now; a FLOP takes the rest of a stage as long")
    else:
        found.append("seconds here: as for other devices, at the peaks that doctor measured; documents, files and process starts left out")
    for away in lines[0].elsewhere:
        found += [f"{away.device}: {text}" for text in away.assumptions]
    return found


# What is shown


def columns(found: Forecast) -> list[str]:
    """Headings of `rows`: money and energy only where something is known."""
    here = ["time here", "memory", *(["money"] if _priced(found) else []), *(["energy"] if _metered(found) else [])]
    return ["stage", "tokens", "FLOPs", *here, *(heading for away in found.stages[0].elsewhere for heading in (f"on {away.device}", "money"))]


def rows(found: Forecast) -> list[list[str]]:
    """A row a stage, one for the starts of processes, and the sums."""
    made = []
    for line in found.stages:
        here, away = line.here, [(each.seconds, each.money) for each in line.elsewhere]
        made.append(_row(found, line.name, line.work.tokens, line.work.flops, here.seconds, here.memory_bytes, here.money, here.joules, away))
    if starts := sum(line.here.start for line in found.stages):
        many = "1 process" if len(found.stages) == 1 else f"{len(found.stages)} processes"
        made.append([many, "", "", show_duration(starts), *[""] * (len(columns(found)) - 4)])
    lines = found.stages
    away = [sums(found, index) for index in range(len(lines[0].elsewhere))]
    memory = max(line.here.memory_bytes for line in lines)
    tokens, flops = sum(line.work.tokens for line in lines), sum(line.work.flops for line in lines)
    money, joules = found.total(lambda line: line.here.money), found.total(lambda line: line.here.joules)
    return [*made, _row(found, "in all", tokens, flops, found.seconds, memory, money, joules, away)]


def sums(found: Forecast, index: int) -> tuple[float, float | None]:
    """Seconds and money of the whole recipe on the device asked about at this place."""
    return sum(line.elsewhere[index].seconds for line in found.stages), found.total(lambda line: line.elsewhere[index].money)


def _row(
    found: Forecast, name: str, tokens: float, flops: float, seconds: float, memory: float, money: float | None, joules: float | None,
    away: Sequence[tuple[float, float | None]],
) -> list[str]:  # fmt: skip
    known = [*([show_price(money)] if _priced(found) else []), *([show_energy(joules)] if _metered(found) else [])]
    there = [cell for each, cost in away for cell in (show_duration(each), show_price(cost))]
    return [name, show_count(tokens), show_count(flops), show_duration(seconds), show_size(memory), *known, *there]


def _priced(found: Forecast) -> bool:
    return found.total(lambda line: line.here.money) is not None


def _metered(found: Forecast) -> bool:
    return found.total(lambda line: line.here.joules) is not None


def tell(found: Forecast) -> Story:
    """Put a forecast into words and a table."""
    made = rows(found)
    longest = max(line.here.seconds for line in found.stages)
    shares = [line.here.seconds / longest for line in found.stages] + [0.0] * (len(made) - len(found.stages))
    figures = [(show_duration(found.seconds), "on this machine")]
    for index, away in enumerate(found.stages[0].elsewhere):
        seconds, money = sums(found, index)
        figures.append((show_duration(seconds), f"on {away.device}" + ("" if money is None else f", {show_price(money)} dollars")))
    how = f"rehearsed in {show_duration(found.probing_seconds)}" if found.probed else "reckoned by FLOPs and bytes, nothing rehearsed"
    table = Section("Stage by stage", "", tuple(columns(found)), tuple(map(tuple, made)), tuple(shares), len(made) - 1)
    assumed = Section("Assumed", rows=tuple((text,) for text in found.assumptions))
    fits = all(away.fits for line in found.stages for away in line.elsewhere)
    where = " or ".join(away.device for away in found.stages[0].elsewhere)
    title, lede = f"The recipe {found.recipe}, before it runs", f"{'1 stage' if len(found.stages) == 1 else f'{len(found.stages)} stages'}, {how}."
    return Story(title, lede, tuple(figures), (table, assumed), fits, where, f"recipe {found.recipe}")


def recipe_command(
    source: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (tiny, micro, smollm2 ...) or a .toml file.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Change any key of the recipe.")] = None,
    on: Annotated[list[str] | None, typer.Option("--device", help=f"Also on these: {', '.join(DEVICES)}.", show_default="h100")] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Rehearse up to 10 steps of each kind of stage here, or reckon by FLOPs.")] = True,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of every stage.")] = None,
    solved: Annotated[str, typer.Option(help="Chance that a response is right, on average.")] = f"{SOLVED:.0%}",
    hourly: Annotated[str | None, typer.Option("--price", help="Of an hour of this machine.", show_default="the recipe's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page there, too.", show_default=False)] = None,
) -> None:
    """What a recipe will take: every stage's time, FLOPs, memory and money, here and on other devices."""
    chance = share(solved, "--solved")
    if not 0 < chance < 1:
        raise SlingshotError(f"--solved {solved}: a chance above 0 and below 1; the nearest valid value is {99 if chance == 1 else 1}%")
    loaded = Recipe.load(source, overrides or [], seed)
    devices = [device(name) for name in on or ["h100"]]
    found = forecast(loaded, devices, probe, chance, None if hourly is None else read_count(hourly, "--price"), until)
    deliver(found, tell(found), as_json, html)
