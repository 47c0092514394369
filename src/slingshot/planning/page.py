"""What a plan says, in sections, of which the tables on the terminal and the HTML page are both made. No torch.

A section is made of a field of the plan: a table of a list, names and values of anything else. How a value is written
follows from its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slingshot import __version__
from slingshot.base.files import rendered
from slingshot.base.quantity import show_count, show_energy, show_money, show_seconds, show_share, show_size
from slingshot.planning.plan import Plan


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and a table."""

    title: str
    note: str = ""
    columns: tuple[str, ...] = ("", "")
    rows: tuple[tuple[str, ...], ...] = ()
    bars: tuple[float, ...] = ()  # lengths of bars beside the rows
    strong: int | None = None  # a row that stands out


@dataclass(frozen=True)
class PlanPage:
    """What a plan's command shows."""

    title: str
    figures: tuple[tuple[str, str], ...]  # headline figures: value, what it is
    sections: tuple[Section, ...]
    assumptions: tuple[str, ...]
    warning: str | None  # that the work does not fit in memory; empty where it does, None where that is not asked
    command: str


_TITLES = {"pretrain": "Pre-training {model}", "rl": "Reinforcement learning of {model}",
           "distill": "Distilling {teacher} into {model}", "serve": "Serving {model}"}  # fmt: skip
_SECTIONS = {
    "flops_by_part": "Where the FLOPs go", "transfers": "The network, in an optimizer step",
    "curve": "Tokens a second against batch", "break_even": "Make or buy", "day": "A day",
    "memory": "Memory of the fullest device", "dominates": "What dominates",
    "alternatives": "Other devices and precisions", "parameters": "The model",
}  # fmt: skip
_CHOSEN = {"curve": ("batch",), "alternatives": ("device", "precision")}  # what tells the row that stands out
_ENDINGS = {
    "seconds": show_seconds, "latency": show_seconds, "days": lambda days: show_seconds(86400 * days),
    "hours": lambda hours: f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}", "bytes": show_size,
    "cache_bytes_per_token": lambda n_bytes: f"{n_bytes:,.0f} bytes", "bytes_per_token": show_size,
    "flops": "{:.4g}".format, "margin": "{:.0%}".format,
    "prices": lambda prices: "/".join(f"{price:g}" for price in prices),
    **dict.fromkeys(("share", "mfu", "bubble", "utilisation", "mfu_of_bfloat16"), show_share),
    **dict.fromkeys(("money", "per_million", "cost", "revenue", "devices_per_day"), show_money),
    **dict.fromkeys(("total", "active", "embedding", "head", "mtp", "parameters"), lambda count: show_count(count, 5)),
}  # fmt: skip


def shown(field: str, value: Any) -> str:
    """A field's value for people, by what its name says it is; nothing where there is none."""
    if isinstance(value, bool | str) or value is None:
        return value if isinstance(value, str) else {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, list):
        return "; ".join(value)
    ending = max((ending for ending in _ENDINGS if field.endswith(ending)), key=len, default="")
    if ending:
        return _ENDINGS[ending](value) if value or ending not in ("hours", "days", "money", "flops") else ""
    return show_count(value, 4) if abs(value) >= 1e6 else f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.3g}"


def table(
    title: str, rows: Sequence[Mapping[str, Any]], note: str = "", bar: str = "", strong: int | None = None
) -> Section:
    """A section of rows of named values; `bar` names the one that is drawn, too, but for the row `strong`."""
    _, *names = (field.replace("_", " ").replace("days", "time") for field in rows[0])
    lengths = [float(row[bar] or 0) if bar and at != strong else 0.0 for at, row in enumerate(rows)]
    bars = tuple(length / max(lengths) for length in lengths) if any(lengths) else ()
    cells = tuple(tuple(shown(field, value) for field, value in row.items()) for row in rows)
    return Section(title, note, ("", *names), cells, bars, strong)


def facts(title: str, values: Mapping[str, Any]) -> Section:
    """A section of names and values, what is not known left out."""
    rows = ((name.replace("_", " "), shown(name, value)) for name, value in values.items())
    return Section(title, rows=tuple(row for row in rows if row[1]))


def _section(field: str, value: Any, plan: Mapping[str, Any]) -> Section:
    """One of a plan's fields; in a table what the plan has chosen stands out."""
    title = _SECTIONS[field]
    if isinstance(value, list):
        bar = next((key for key in ("seconds", "tokens_per_second_per_device") if key in value[0]), "")
        chosen = _CHOSEN.get(field, ("kind",))
        strong = (at for at, row in enumerate(value) if all(row.get(key) == plan[key] for key in chosen))
        return replace(table(title, value, bar=bar), strong=next(strong, None))
    if field in ("memory", "flops_by_part"):  # parts of a whole
        unit, whole = ("bytes", value["total"]) if field == "memory" else ("flops", sum(value.values()))
        held = {name.replace("_", " "): part for name, part in value.items() if part}
        parts = [{"part": name, unit: part, "share": part / whole} for name, part in held.items()]
        return table(title, parts, bar=unit, strong=len(parts) - 1 if field == "memory" else None)
    return facts(title, value)


def plan_page(plan: Plan) -> PlanPage:
    """Put a plan into tables."""
    fields, fit = plan.model_dump(), plan.nearest_fit
    named = f"{plan.device} hours", f"{plan.count:,} {plan.device}"
    unit, many = ("hours", "this machine") if plan.device == "local" else named
    figures = [
        (shown("hours", plan.device_hours), unit), (shown("days", plan.days), f"on {many}, in {plan.precision}"),
        (show_money(plan.money), f"at ${plan.price or 0:g} an hour"),
        (show_energy(plan.energy_kwh and plan.energy_kwh * 3.6e6), "by the devices alone"),
    ]  # fmt: skip
    lines = [{key: value or None for key, value in line.items() if key != "note"} for line in fields["stages"]]
    total = {key: fields.get(key) for key in lines[0]} | {"name": "in all", "tokens": None}
    notes = ". ".join(f"{line.name}: {line.note}" for line in plan.stages if line.note)
    own = {name: value for name, value in fields.items() if name not in {*Plan.model_fields, *_SECTIONS}}
    nearest = f"The nearest that does: {fit['count']:,} x {fit['device']}, {fit['layout']}" if fit else "Nothing does"
    sections = [
        table("The bill", [*lines, total], notes, "device_hours", len(lines)),
        facts("The figures", {name: value for name, value in own.items() if not isinstance(value, dict)}),
        *(_section(field, fields[field], fields) for field in _SECTIONS if fields.get(field)),
    ]
    warning = "" if plan.fits else f"It does NOT fit in the memory of one {plan.device}. {nearest}."
    title, known = _TITLES[plan.kind].format(**fields), tuple(figure for figure in figures if figure[0])
    return PlanPage(title, known, tuple(sections), tuple(plan.assumptions), warning, plan.kind)


def render(page: PlanPage) -> str:
    """A page as one HTML file: no scripts, nothing loaded from anywhere, light and dark."""
    return rendered("slingshot.planning", "plan.html.jinja", page=page, version=__version__)
