"""A run's report: report.json for programs, report.html for people. One file, inline SVG, no scripts, light and dark.

It tells what was built, what each stage can do, how training went and what it cost, from what the stages left in the run's folder:

    runs/tiny/recipe.json                       {"name", "stages": [{"name", "kind", ...}]}, in order
    runs/tiny/STAGE/receipt.json                what the stage consumed; metrics.jsonl: one line a step
    runs/tiny/evaluations/STAGE/evaluation.json {"tasks": {TASK: scores}, "examples": {TASK: [one solved problem each]}}

    build(Path("runs/tiny"))                    # after every stage; stages not reached yet are shown as such
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from pydantic import ConfigDict, Field

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_jsonl, write_json, write_text
from slingshot.base.quantity import (
    show_count,
    show_duration,
    show_energy,
    show_flops,
    show_money,
    show_share,
    show_size,
)
from slingshot.cost.bill import Sums
from slingshot.cost.flops import Parameters, parameters
from slingshot.cost.receipt import RECEIPT, PeakMemory, Receipt
from slingshot.model.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 240  # per curve: more than a small chart has pixels for
LONGEST_TEXT = 4000  # characters shown of one response; the evaluation keeps the rest


class _Lenient(Strict):
    """Read what is needed here and let the rest pass."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Score(_Lenient):
    """What an evaluation says of one task."""

    pass_at_1: float = Field(alias="pass@1")
    ci95: tuple[float, float]
    pass_at_8: float | None = Field(alias="pass@8", default=None)
    mean_tokens: float
    format: float
    language: float | None = None
    n: int


class Example(_Lenient):
    """One problem as one stage answered it."""

    prompt: str
    answer: str
    completion: str = ""
    reasoning: str | None = None
    response: str | None = None
    correct: bool


class _Evaluation(_Lenient):
    tasks: dict[str, Score]
    examples: dict[str, list[Example]] = {}


class _StageEntry(_Lenient):
    name: str
    kind: str


class _Recipe(_Lenient):
    name: str = ""
    stages: list[_StageEntry]


@dataclass(frozen=True)
class Stage:
    """A stage as far as it got: without a receipt it has not run, without scores it was not evaluated."""

    name: str
    kind: str
    receipt: Receipt | None
    metrics: list[dict[str, Any]]
    scores: dict[str, Score]
    examples: dict[str, list[Example]]
    model: Parameters | None


def build(run: Path) -> dict[str, Any]:
    """Write report.json and report.html into the folder of a run; returns the former's content.

    Raises SlingshotError when `run` is no run's folder, when a file in it is broken, or when the report cannot be written.
    """
    recipe = _Recipe.parse(_object(run / "recipe.json"), str(run / "recipe.json"))
    stages = [_read_stage(run, entry) for entry in recipe.stages]
    folders = [
        run / "evaluations" / stage.name for stage in stages if (run / "evaluations" / stage.name / RECEIPT).is_file()
    ]
    evaluations = [Receipt.read(folder) for folder in folders]
    bill = _bill(stages, evaluations)
    summary: dict[str, Any] = {"stages": [_summary(stage) for stage in stages if stage.receipt]}
    if bill:
        summary["bill"] = bill.model_dump(include={"seconds", "tokens", "flops", "energy_joules", "money"})
    page = _page(recipe.name or run.resolve().name, stages, bill)
    write_json(run / "report.json", summary)
    write_text(run / "report.html", page)
    return summary


# Reading


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SlingshotError(f"{path} does not exist; a report is made of a folder that `slingshot run` wrote")
    value = read_json(path)
    if not isinstance(value, dict):
        raise SlingshotError(f"{path} should hold a JSON object")
    return value


def _read_stage(run: Path, entry: _StageEntry) -> Stage:
    folder = run / entry.name
    receipt = Receipt.read(folder) if (folder / RECEIPT).is_file() else None
    metrics = read_jsonl(folder / "metrics.jsonl") if receipt and (folder / "metrics.jsonl").is_file() else []
    # A stage's scores lie beside it; an evaluation that is a stage of the recipe holds its own.
    evaluation = _Evaluation(tasks={})
    for place in (run / "evaluations" / entry.name / "evaluation.json", folder / "evaluation.json"):
        if receipt and place.is_file():
            evaluation = _Evaluation.parse(_object(place), str(place))
            break
    model = parameters(_architecture(folder)) if receipt and (folder / "config.json").is_file() else None
    return Stage(entry.name, entry.kind, receipt, metrics, evaluation.tasks, evaluation.examples, model)


def _architecture(folder: Path) -> ModelConfig:
    return ModelConfig.from_hf(_object(folder / "config.json"), str(folder / "config.json"))


class RunBill(Sums):
    """The sums of a run, its evaluations among them and once apart."""

    evaluations: RunBill | None


def _bill(stages: list[Stage], evaluations: list[Receipt]) -> RunBill | None:
    """The bill of what has run so far; None when nothing has."""
    receipts = [stage.receipt for stage in stages if stage.receipt] + evaluations
    if not receipts:
        return None
    return RunBill(**dict(Sums.of(receipts)), evaluations=_bill([], evaluations) if stages else None)


def _summary(stage: Stage) -> dict[str, Any]:
    """A finished stage as report.json has it; the artifact's path is relative to the run."""
    assert stage.receipt is not None
    return {
        "name": stage.name,
        "kind": stage.kind,
        "artifact": stage.name,
        "receipt": stage.receipt.model_dump(
            include={"tokens", "flops", "seconds", *PeakMemory.model_fields, "mfu", "energy_joules", "money"}
        ),
        "eval": {task: score.model_dump(mode="json", by_alias=True) for task, score in stage.scores.items()},
    }


# The page


def _page(title: str, stages: list[Stage], bill: RunBill | None) -> str:
    evaluated = [stage for stage in stages if stage.scores]
    tasks = list(dict.fromkeys(task for stage in evaluated for task in stage.scores))
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # everything a model wrote is text, never markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    finished = [stage.receipt for stage in stages if stage.receipt]
    first, best = (
        (evaluated[0], max(evaluated, key=lambda stage: _score_on(stage, tasks[0]))) if tasks else (None, None)
    )
    return template.render(
        title=title,
        stages=stages,
        evaluated=evaluated,
        tasks=tasks,
        first=first,
        best=best,
        has_pass_at_8=any(score.pass_at_8 is not None for stage in evaluated for score in stage.scores.values()),
        has_language=any(score.language is not None for stage in evaluated for score in stage.scores.values()),
        built=max((stage.model for stage in stages if stage.model), key=lambda model: model.total, default=None),
        machine=finished[-1].machine if finished else None,
        version=finished[-1].version if finished else "",
        bill=bill,
        longest=max(
            [receipt.seconds for receipt in finished] + [bill.evaluations.seconds if bill and bill.evaluations else 0.0]
        ),
        accuracy_chart=_accuracy_chart(evaluated, tasks) if tasks else "",
        curves=_curves(stages),
        problems=_problems(evaluated, best, tasks),
        percent=show_share,
        duration=show_duration,
        count=show_count,
        flops=show_flops,
        size=show_size,
        energy=show_energy,
        money=functools.partial(show_money, currency=""),
        clip=_clip,
        parent_names=lambda receipt: ", ".join(Path(parent.path).name for parent in receipt.parents) or "nothing",
    )


def _score_on(stage: Stage, task: str) -> float:
    return stage.scores[task].pass_at_1 if task in stage.scores else -1.0


@dataclass(frozen=True)
class Problem:
    """One problem and each stage's answer to it (None where that stage was not asked)."""

    task: str
    prompt: str
    answer: str
    lesson: str
    tries: list[tuple[Stage, Example | None]]


LEARNED, BEYOND, KNOWN = "learned on the way", "still beyond it", "right from the start"


def _problems(evaluated: list[Stage], best: Stage | None, tasks: list[str]) -> list[Problem]:
    """Three problems that most stages were asked: two learned on the way to `best`, one it still fails; from different tasks if possible."""
    found: list[Problem] = []
    for task in tasks:
        by_prompt: dict[str, list[tuple[Stage, Example | None]]] = {}
        for index, stage in enumerate(evaluated):
            for example in stage.examples.get(task, []):
                by_prompt.setdefault(example.prompt, [(other, None) for other in evaluated])[index] = (stage, example)
        for prompt, tries in by_prompt.items():
            asked = [example for _, example in tries if example]
            final = next((example for stage, example in tries if stage is best and example), asked[-1])
            lesson = BEYOND if not final.correct else KNOWN if asked[0].correct else LEARNED
            found.append(Problem(task, prompt, final.answer, lesson, tries))

    def asked_of(problem: Problem) -> int:
        return sum(example is not None for _, example in problem.tries)

    most = max(map(asked_of, found), default=0)
    chosen: list[Problem] = []
    for lesson in (LEARNED, LEARNED, BEYOND, LEARNED, KNOWN, KNOWN, KNOWN, BEYOND, BEYOND):
        rest = [
            problem
            for problem in found
            if problem.lesson == lesson and asked_of(problem) == most and problem not in chosen
        ]
        if rest and len(chosen) < 3:
            chosen.append(
                max(rest, key=lambda problem: problem.task not in {other.task for other in chosen})
            )  # the first of a new task
    return chosen


# Charts: drawn in stand-in colours that become CSS variables, so that one drawing serves light and dark

INK, MUTED, RULE = "#010101", "#020202", "#030303"
SERIES = [f"#0a0a{index:02x}" for index in range(1, 7)]
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {
    colour: f"series-{index}" for index, colour in enumerate(SERIES, start=1)
}


def _draw(name: str, width: float, height: float, left: float, right: float, paint: Callable[[Axes], None]) -> Markup:
    """Paint one pair of axes and return it as inline SVG; a screen reader says its `name`.

    `width` and `height` in inches give its shape; `left` and `right` are the shares of the width kept for labels.
    """
    import matplotlib as mpl  # heavy, and wanted only here
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": name,
        "text.parse_math": False,  # a stage may be called $x$
        "font.size": 9,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.edgecolor": RULE,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height))
        paint(figure.add_axes((left, 0.3 / height, 1 - left - right, 1 - 0.4 / height)))
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"#[0-9a-f]{6}", lambda match: f"var(--{_VARIABLES[match[0]]})" if match[0] in _VARIABLES else match[0], svg
    )
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    # The page sets the size; the shape is in the viewBox.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{Markup.escape(name)}">{rest}')


def _accuracy_chart(evaluated: list[Stage], tasks: list[str]) -> Markup:
    """pass@1 of every stage, a dot with its 95% interval per task; faint lines lead from the checkpoints it was made from."""

    def paint(axes: Axes) -> None:
        for index, task in enumerate(tasks):
            colour = SERIES[index % len(SERIES)]
            offset = (index - (len(tasks) - 1) / 2) * 0.2
            dots = {
                stage.name: (place + offset, 100 * stage.scores[task].pass_at_1)
                for place, stage in enumerate(evaluated)
                if task in stage.scores
            }
            for stage in evaluated:
                for parent in stage.receipt.parents if stage.receipt else []:
                    if stage.name in dots and (start := Path(parent.path).name) in dots:
                        axes.plot(
                            *zip(dots[start], dots[stage.name], strict=True), color=colour, linewidth=1, alpha=0.3
                        )
            x, y = zip(*dots.values(), strict=True)
            low, high = (
                [100 * stage.scores[task].ci95[end] for stage in evaluated if task in stage.scores] for end in (0, 1)
            )
            axes.vlines(x, low, high, color=colour, linewidth=2.4, alpha=0.5)
            axes.plot(x, y, "o", color=colour, markersize=5.5)
            for place, value, above in zip(x, y, high, strict=True):
                axes.annotate(
                    f"{value:.0f}", (place, above), (0, 4), textcoords="offset points", color=colour, ha="center"
                )
        names = [stage.name.replace("_", "_\n", 1) if len(evaluated) > 9 else stage.name for stage in evaluated]
        axes.set_xticks(range(len(evaluated)), names, color=INK)
        axes.set_xlim(-0.5, len(evaluated) - 0.5)
        axes.set_ylim(0, 109)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])

    return _draw("pass@1 by stage with 95% intervals", 10, 3.4, 0.05, 0, paint)


@dataclass(frozen=True)
class Curve:
    """A small chart with its heading."""

    title: str
    unit: str
    svg: Markup


def _curves(stages: list[Stage]) -> list[Curve]:
    """How training went, a chart per quantity, stages of a kind together. Quantities nobody logged are left out."""
    learning = "pretrain" if any(stage.kind == "pretrain" for stage in stages) else "sft"
    plans = [
        (
            "Loss in pre-training" if learning == "pretrain" else "Loss in fine-tuning",
            "nats per token",
            learning,
            ("loss", "mtp_loss"),
        ),
        (
            "Busiest expert in pre-training",
            "its load over the mean of its layer; 1 is even",
            "pretrain",
            ("expert_load",),
        ),
        ("Reward", "mean of a step", "rl", ("reward",)),
        ("Response length", "tokens", "rl", ("response_tokens",)),
        ("Entropy", "nats per token", "rl", ("entropy",)),
        ("KL to the reference", "nats per token", "rl", ("kl",)),
    ]
    curves = []
    for title, unit, kind, keys in plans:
        lines = {}
        for stage in stages:
            for key in keys:
                points = _points(stage.metrics, key) if stage.kind == kind else []
                if len(points) > 1:
                    lines[stage.name + (" MTP" if key == "mtp_loss" else "")] = points
        if lines:
            curves.append(
                Curve(title, unit, _draw(title, 3.6, 1.7, 0.09, 0.35, functools.partial(_paint_lines, lines=lines)))
            )
    return curves


def _points(metrics: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of what was logged under `key`; a list, such as the load per layer, counts by its mean; at most POINTS, by averaging."""
    points = []
    for row in metrics:
        value = row.get(key)
        if isinstance(value, list) and value:
            value = sum(value) / len(value)
        if isinstance(value, int | float) and isinstance(row.get("step"), int):
            points.append((float(row["step"]), float(value)))
    width = -(-len(points) // POINTS) or 1
    buckets = [points[start : start + width] for start in range(0, len(points), width)]
    return [(bucket[-1][0], sum(value for _, value in bucket) / len(bucket)) for bucket in buckets]


def _smooth(values: Sequence[float]) -> list[float]:
    """A centred mean over a twelfth of the curve, so that the trend reads and the ends stay where they are."""
    reach = len(values) // 24
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _paint_lines(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    ends = []
    for colour, (label, points) in zip(SERIES, lines.items(), strict=False):  # a seventh line would be unreadable
        x, y = [step for step, _ in points], [value for _, value in points]
        smooth = _smooth(y)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(x, smooth, color=colour, linewidth=1.8)
        ends.append((smooth[-1], f"{label} {smooth[-1]:.3g}", colour))
    axes.margins(x=0, y=0.08)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.locator_params(axis="y", nbins=4)
    # Labels stand at the right edge, each at its line's end, pushed apart where they would touch.
    low, high = axes.get_ylim()
    ends.sort()
    heights = _apart([(value - low) / (high - low) for value, _, _ in ends], gap=0.12)
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        axes.text(1.03, height, text, color=colour, transform=axes.transAxes, va="center")


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as keeps them `gap` apart and below 1: upwards first, then down where the top was passed."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    ceiling = 1.0
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], ceiling)
        ceiling = moved[place] - gap
    return moved


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
