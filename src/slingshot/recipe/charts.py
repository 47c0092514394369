"""The report's charts: inline SVG in stand-in colours that become CSS variables, so that one drawing serves light and
dark.

accuracy_chart(evaluated, ["arithmetic"])       # pass@1 by stage
training_curves(stages)                         # loss, reward, entropy ... by step
compute_curves(stages)                          # reward by compute, with the fit that says where it ends
compression_charts(evaluated, tasks)            # pass@1 by bytes and by speed of a model and its quantised forms
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from slingshot.base.quantity import show_duration, show_share
from slingshot.recipe.results import StageResult
from slingshot.recipe.scaling import SigmoidFit, fit_sigmoid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 240  # per curve: more than a small chart has pixels for
INK, MUTED, RULE = "#010101", "#020202", "#030303"
SERIES = [f"#0a0a{index:02x}" for index in range(1, 7)]
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {
    colour: f"series-{index}" for index, colour in enumerate(SERIES, start=1)
}


def draw(
    name: str, width: float, height: float, left: float, right: float, paint: Callable[[Axes], None], top: float = 0.1
) -> Markup:
    """Paint one pair of axes and return it as inline SVG; a screen reader says its `name`.

    `width` and `height` in inches give its shape; `left` and `right` are the shares of the width kept for labels, `top`
    the inches above.
    """
    import matplotlib as mpl  # heavy, and wanted only here
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name,  # text stays text, in the page's own font
        "text.parse_math": False,  # a stage may be called $x$
        "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": RULE, "grid.color": RULE,
        "axes.facecolor": "none", "figure.facecolor": "none", "font.size": 9, "grid.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
        "axes.grid.axis": "y", "xtick.major.size": 0, "ytick.major.size": 0, "lines.solid_capstyle": "round",
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height))
        paint(figure.add_axes((left, 0.3 / height, 1 - left - right, 1 - (0.3 + top) / height)))
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    svg = target.getvalue()
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    # The page sets the size; the shape is in the viewBox.
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{Markup.escape(name)}">{rest}')


def accuracy_chart(evaluated: list[StageResult], tasks: list[str]) -> Markup:
    """pass@1 of every stage, a dot with its 95% interval per task; faint lines lead from what it was made from."""

    def paint(axes: Axes) -> None:
        for index, task in enumerate(tasks):
            colour = SERIES[index % len(SERIES)]
            offset = (index - (len(tasks) - 1) / 2) * 0.2
            dots: dict[str, tuple[float, float]] = {}
            for place, stage in enumerate(evaluated):
                if (score := stage.scores.get(task)) is None:
                    continue
                x, y = dots[stage.name] = place + offset, 100 * score.pass_at_1
                for parent in stage.parents:
                    if parent in dots:
                        axes.plot(*zip(dots[parent], (x, y), strict=True), color=colour, linewidth=1, alpha=0.3)
                low, high = (100 * end for end in score.ci95)
                axes.vlines(x, low, high, color=colour, linewidth=2.4, alpha=0.5)
                axes.plot(x, y, "o", color=colour, markersize=5.5)
                label: dict[str, Any] = {"textcoords": "offset points", "color": colour, "ha": "center"}
                axes.annotate(f"{y:.0f}", (x, high), (0, 4), **label)
        names = [stage.name.replace("_", "_\n", 1) if len(evaluated) > 9 else stage.name for stage in evaluated]
        axes.set_xticks(range(len(evaluated)), names, color=INK)
        axes.set_xlim(-0.5, len(evaluated) - 0.5)
        axes.set_ylim(0, 109)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])

    return draw("pass@1 by stage with 95% intervals", 10, 3.4, 0.05, 0, paint)


@dataclass(frozen=True)
class Curve:
    """A small chart with its heading."""

    title: str
    unit: str
    svg: Markup


def training_curves(stages: list[StageResult]) -> list[Curve]:
    """How training went, a chart per quantity, stages of a kind together. Quantities nobody logged are left out."""
    pretrained = any(stage.kind == "pretrain" for stage in stages)
    title, learning = ("Loss in pre-training", "pretrain") if pretrained else ("Loss in fine-tuning", "sft")
    plans = [
        (title, "nats per token", learning, ("loss", "mtp_loss")),
        ("Busiest expert in pre-training", "load over its layer's mean; 1 is even", "pretrain", ("expert_load",)),
        ("Reward", "mean of a step", "rl", ("reward",)),
        ("Response length", "tokens", "rl", ("response_tokens",)),
        ("Entropy", "nats per token", "rl", ("entropy",)),
        ("KL to the reference", "nats per token", "rl", ("kl",)),
    ]
    curves = []
    for title, unit, kind, keys in plans:
        lines = {}
        for stage, key in ((stage, key) for stage in stages if stage.kind == kind for key in keys):
            if len(points := points_of(stage.metrics, key)) > 1:
                lines[stage.name + (" MTP" if key == "mtp_loss" else "")] = points
        if lines:
            svg = draw(title, 3.6, 1.7, 0.09, 0.35, functools.partial(_paint_lines, lines=lines))
            curves.append(Curve(title, unit, svg))
    return curves


def compute_curves(stages: list[StageResult]) -> list[Curve]:
    """Reward of each rl stage by the seconds it had spent, with ScaleRL's fit in words where there is one."""
    curves = []
    for stage in (stage for stage in stages if stage.kind == "rl"):
        rows = [(row.get("seconds"), row.get("reward")) for row in stage.metrics]
        points = [pair for pair in rows if all(isinstance(value, int | float) for value in pair)]
        if len(points) < 2:
            continue
        seconds, rewards = (list(values) for values in zip(*points, strict=True))
        fit = fit_sigmoid(seconds, rewards)
        said = "where it ends these points do not tell"
        if fit:
            middle = f"C_mid {show_duration(fit.middle)} ± {show_share(fit.middle_se)}"
            said = (
                f"A {fit.ceiling:.3g} ± {fit.ceiling_se:.1g}, {middle}, B {fit.steepness:.2g} ± {fit.steepness_se:.1g}"
            )
        title = f"Reward of {stage.name} by compute"
        paint = functools.partial(_paint_fit, seconds=seconds, rewards=rewards, fit=fit)
        curves.append(Curve(title, f"seconds; {said}", draw(title, 3.6, 1.7, 0.09, 0.35, paint)))
    return curves


def _paint_fit(axes: Axes, seconds: list[float], rewards: list[float], fit: SigmoidFit | None) -> None:
    axes.plot(seconds, rewards, "o", color=SERIES[0], markersize=2.2, alpha=0.4)
    axes.margins(x=0.02, y=0.08)
    axes.locator_params(axis="both", nbins=4)
    if fit:
        axes.plot(seconds, fit.at(seconds), color=SERIES[0], linewidth=1.8)
        axes.axhline(fit.ceiling, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.text(
            1.03, fit.ceiling, f"A {fit.ceiling:.3g}", color=MUTED, transform=axes.get_yaxis_transform(), va="center"
        )


def compression_charts(evaluated: list[StageResult], tasks: list[str]) -> list[Curve]:
    """pass@1 against bytes and against tokens a second: every model that was quantised, and what it became."""
    charts = []
    for full in evaluated:
        small = [(stage, stage.quantization) for stage in evaluated if full.name in stage.parents]
        made = [(stage, told) for stage, told in small if told is not None]
        if not made:
            continue
        whole = made[0][1]
        megabytes = [(full, whole.bytes / whole.share_of_bfloat16 / 1e6)]
        megabytes += [(stage, told.bytes / 1e6) for stage, told in made]
        speeds = [(full, sum(told.tokens_per_second["full"] for _, told in made) / len(made))]
        speeds += [(stage, told.tokens_per_second["small"]) for stage, told in made]
        plans = [
            (f"Accuracy of {full.name} by bytes", f"pass@1; MB of weights, {full.name}'s in bfloat16", megabytes),
            (f"Accuracy of {full.name} by speed", "pass@1; tokens a second, many answers at once", speeds),
        ]
        for title, unit, places in plans:
            paint = functools.partial(_paint_columns, places=places, tasks=tasks)
            charts.append(Curve(title, unit, draw(title, 4.8, 2.6, 0.08, 0.04, paint, top=0.3)))
    return charts


def _paint_columns(axes: Axes, places: list[tuple[StageResult, float]], tasks: list[str]) -> None:
    """A column of dots with intervals, one for each task, over every stage's place on the x axis; names on top, numbers
    beside the dots, away from a column that stands close."""
    places = sorted(places, key=lambda each: each[1])
    width = 1.1 * places[-1][1]
    shares = kept_apart([x / width for _, x in places], gap=0.14)
    ends = [x for _, x in places[1:]] + [2 * width]
    faint: dict[str, Any] = {"color": MUTED, "linewidth": 0.6, "alpha": 0.5}
    for (stage, x), moved, end in zip(places, shares, ends, strict=True):
        side = {"ha": "left"} if end - x > 0.14 * width else {"ha": "right"}
        axes.axvline(x, zorder=0, **faint)
        line = {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 0} | faint
        given: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "axes fraction", "ha": "center"}
        axes.annotate(stage.name, (x, 1.0), (moved, 1.07), color=INK, arrowprops=line, **given)
        for colour, task in zip(SERIES, tasks, strict=False):
            if (score := stage.scores.get(task)) is not None:
                low, y, high = (100 * each for each in (score.ci95[0], score.pass_at_1, score.ci95[1]))
                axes.vlines(x, low, high, color=colour, linewidth=2.4, alpha=0.5)
                axes.plot(x, y, "o", color=colour, markersize=5.5)
                label: dict[str, Any] = {"textcoords": "offset points", "color": colour, "va": "center"} | side
                axes.annotate(f"{y:.1f}", (x, y), (6 if label["ha"] == "left" else -6, 0), **label)
    axes.set_xlim(0, width)
    axes.margins(y=0.15)
    axes.locator_params(axis="both", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def points_of(metrics: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of what was logged under `key`, at most POINTS, by averaging; a list, such as the load per layer,
    counts by its mean."""
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


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over a twelfth of the curve, so that the trend reads and the ends stay where they are."""
    reach = len(values) // 24
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _paint_lines(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    ends = []
    for colour, (label, points) in zip(SERIES, lines.items(), strict=False):  # a seventh line would be unreadable
        x, y = [step for step, _ in points], [value for _, value in points]
        smooth = smoothed(y)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(x, smooth, color=colour, linewidth=1.8)
        ends.append((smooth[-1], f"{label} {smooth[-1]:.3g}", colour))
    axes.margins(x=0, y=0.08)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.locator_params(axis="y", nbins=4)
    # Labels stand at the right edge, each at its line's end, pushed apart where they would touch.
    low, high = axes.get_ylim()
    ends.sort()
    heights = kept_apart([(value - low) / (high - low) for value, _, _ in ends], gap=0.12)
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        axes.text(1.03, height, text, color=colour, transform=axes.transAxes, va="center")


def kept_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as keeps them `gap` apart and below 1: up first, then down from the top."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    ceiling = 1.0
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], ceiling)
        ceiling = moved[place] - gap
    return moved
