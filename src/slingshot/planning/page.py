"""What a plan says, as tables on the terminal and as an HTML page: both are made of the same sections. No torch.

deliver(plan, plan_page(plan), as_json=False, html=Path("plan.html"))
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slingshot import __version__
from slingshot.base.config import Strict
from slingshot.base.files import write_text
from slingshot.base.quantity import show_count, show_energy, show_money, show_seconds, show_share, show_size
from slingshot.planning.plan import DistillPlan, Plan, PretrainPlan, RLPlan, ServePlan


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and a table; `shares` are lengths of bars beside the rows, `strong` a row that stands
    out."""

    title: str
    note: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    shares: tuple[float, ...] = ()
    strong: int | None = None


@dataclass(frozen=True)
class PlanPage:
    """A title, a sentence, headline figures (value, what it is), sections, its command's name.

    warning   says that the work does not fit in memory; empty where it does, None where that is not asked
    """

    title: str
    lede: str
    figures: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    warning: str | None
    command: str


def plan_page(plan: Plan) -> PlanPage:
    """Put a plan into words and tables."""
    many = f"{plan.count:,} {plan.device}" if plan.device != "local" else "this machine"
    per_day = " a day" if isinstance(plan, ServePlan) else ""
    figures = [(_hours(plan.device_hours), _hours_of(plan) + per_day)]
    if not per_day:
        figures.append((show_seconds(plan.days * 86400), f"on {many}"))
    if plan.money is not None:
        figures.append((show_money(plan.money), f"at ${plan.price:g} an hour"))
    if plan.energy_kwh is not None:
        figures.append((show_energy(plan.energy_kwh * 3.6e6), "by the devices alone"))
    own: list[Section] = []
    if isinstance(plan, PretrainPlan):
        title, own = f"Pre-training {plan.model}", [_published(plan), _flops(plan), _network(plan)]
        mfu = f"an MFU of {show_share(plan.mfu)} of what this model's products have in {plan.precision}"
        if plan.mfu_of_bfloat16 is not None and plan.precision != "bfloat16":
            mfu += f", {show_share(plan.mfu_of_bfloat16)} of the bfloat16 peak"
        rate = _tflops(plan.tflops_per_device)
        lede = f"{show_count(plan.tokens)} tokens in {plan.precision} on {many}, {rate} each: {mfu}."
        if plan.tflops_per_device > plan.tflops_bound:
            lede += (
                f" That is more than this layout lets through, which is {_tflops(plan.tflops_bound)}: expect longer, "
                "or find a better layout."
            )
    elif isinstance(plan, RLPlan):
        title = f"Reinforcement learning of {plan.model}"
        lede = (
            f"{plan.steps:,} steps, {plan.responses:,} responses and {show_count(plan.tokens)} tokens on {many}: "
            f"{plan.rounds:,} rounds of rollouts, {show_seconds(plan.round_seconds)} each, with a copy of the policy "
            f"on every {plan.devices_per_copy}."
        )
    elif isinstance(plan, DistillPlan):
        title = f"Distilling {plan.teacher} into {plan.model}"
        lede = (
            f"{show_count(plan.sampled)} responses sampled, {show_count(plan.kept)} kept, on {many}; a copy of the "
            f"teacher on every {plan.devices_per_copy} writes {plan.sampled_tokens_per_second_per_device:,.0f} tokens "
            "a second on each."
        )
    else:
        assert isinstance(plan, ServePlan)
        title, own = f"Serving {plan.model}", _serving(plan)
        late = plan.tokens_per_second_per_user * plan.latency < 1 - 1e-9
        lede = (
            f"In {plan.precision} on {many}, a copy on every {plan.devices_per_copy}: "
            f"{plan.tokens_per_second_per_device:,.0f} tokens a second a device at {plan.batch} sequences each, "
            f"{plan.tokens_per_second_per_user:.3g} a second to a user; the roofline allows "
            f"{plan.bound_tokens_per_second_per_device:,.0f}."
            f"{' That is slower than asked: no batch is in time.' if late else ''}"
        )
        if plan.output_cost_per_million is not None:
            figures.append((show_money(plan.output_cost_per_million), "a million output tokens"))
    assumed = Section("Assumed", rows=tuple((text,) for text in plan.assumptions))
    sections = [_bill(plan), *own, _memory(plan), _dominates(plan), *_alternatives(plan), _model(plan), assumed]
    warning = "" if plan.fits else f"It does NOT fit in the memory of one {plan.device}."
    told = tuple(section for section in sections if section.rows or section.note)
    return PlanPage(title, lede, tuple(figures), told, warning, plan.kind)


def _bill(plan: Plan) -> Section:
    longest = max(stage.device_hours for stage in plan.stages) or 1.0
    rows = [
        (
            stage.name, show_count(stage.tokens) if stage.tokens else "", f"{stage.flops:.3g}" if stage.flops else "",
            _hours(stage.device_hours), show_seconds(stage.days * 86400) if stage.days else "",
            show_money(stage.money) if stage.money else "",
        )
        for stage in plan.stages
    ]  # fmt: skip
    money = show_money(plan.money) if plan.money is not None else ""
    rows.append(("in all", "", f"{plan.flops:.3g}", _hours(plan.device_hours), show_seconds(plan.days * 86400), money))
    notes = "; ".join(f"{stage.name}: {stage.note}" for stage in plan.stages if stage.note)
    columns = ("", "tokens", "FLOPs", _hours_of(plan), "time", "money")
    bars = (*(stage.device_hours / longest for stage in plan.stages), 0.0)
    return Section(
        "The bill", f"{notes[:1].upper()}{notes[1:]}." if notes else "", columns, tuple(rows), bars, len(rows) - 1
    )


def _published(plan: PretrainPlan) -> Section:
    """The bill beside the one that somebody published of the same work."""
    bill = plan.published
    if bill is None:
        return Section("Beside the published bill")
    here = {stage.name: stage for stage in plan.stages}
    missing = [name for name in bill.device_hours if name not in here]
    lines = [(name, hours, here[name].device_hours if name in here else 0.0, name in here and not here[name].flops)
             for name, hours in bill.device_hours.items()]  # fmt: skip
    own_total = 0.0 if missing else sum(own for _, _, own, _ in lines)
    rows = []
    for name, hours, own, given in [*lines, ("in all", sum(bill.device_hours.values()), own_total, False)]:
        distance = "given" if given else f"{round(own / hours - 1, 3) + 0:+.1%}" if own else ""
        prices = ((hours, bill.price), (own, plan.price))
        money = [show_money(each * price) if each and price else "" for each, price in prices]
        rows.append((name, _hours(hours), _hours(own), distance, *money))
    options = " ".join(f'--stage "{name}={show_count(bill.device_hours[name])}"' for name in missing)
    note = f"{bill.source}." + (f" What no plan computes is added by {options}." if missing else "")
    columns = ("", "published hours", "hours here", "distance", "published", "money here")
    return Section("Beside the published bill", note, columns, tuple(rows), strong=len(rows) - 1)


def _flops(plan: PretrainPlan) -> Section:
    largest = max(plan.flops_by_part.values())
    parts = plan.flops_by_part.items()
    rows = tuple((part.replace("_", " "), f"{flops:.3g}", show_share(flops / plan.flops)) for part, flops in parts)
    note = (
        f"{plan.flops:.4g} FLOPs of the main model, attention counted exactly over the causal half; six times active "
        f"parameters times tokens comes to {plan.six_nd_flops:.4g}."
    )
    bars = tuple(flops / largest for _, flops in parts)
    return Section("Where the FLOPs go", note, ("", "FLOPs", "of the main model"), rows, bars)


def _network(plan: PretrainPlan) -> Section:
    if not plan.transfers:
        return Section("The network")
    where = {"node": "within a node", "network": "between nodes"}
    rows = tuple(
        (sent.purpose, show_size(sent.n_bytes), where[sent.link], show_seconds(sent.seconds)) for sent in plan.transfers
    )
    longest, exposed = max(sent.seconds for sent in plan.transfers), plan.exposed_network_seconds
    note = (
        f"Layout: {plan.layout_text}. What one device sends in an optimizer step of {show_count(plan.batch_tokens)} "
        f"tokens, {f'{show_seconds(exposed)} of it not hidden' if exposed else 'hidden behind compute'}; the pipeline "
        f"stands idle {show_share(plan.bubble)} of the time. At most {_tflops(plan.tflops_bound)} get through."
    )
    bars = tuple(sent.seconds / longest for sent in plan.transfers)
    return Section("The network", note, ("", "bytes", "link", "time"), rows, bars)


def _memory(plan: Plan) -> Section:
    memory, usable = plan.memory, plan.usable_memory_bytes
    parts = [(name, n_bytes) for name, n_bytes in memory.model_dump(exclude={"total"}).items() if n_bytes]
    rows = [
        (name.replace("cache", "KV cache"), show_size(held), show_share(held / memory.total)) for name, held in parts
    ]
    rows.append(("in all", show_size(memory.total), f"of {show_size(usable)} usable"))
    if plan.fits:
        note = f"It fits: the fullest device is {show_share(memory.total / usable)} full."
    elif fit := plan.nearest_fit:
        note = f"It does NOT fit. The nearest that does: {fit.count:,} x {fit.device}, {fit.layout}."
    else:
        note = "It does NOT fit, and neither does anything in the table of devices."
    bars = (*(held / memory.total for _, held in parts), 0.0)
    return Section("Memory of the fullest device", note, ("", "bytes", "share"), tuple(rows), bars, len(rows) - 1)


def _dominates(plan: Plan) -> Section:
    found = plan.dominates
    times = (found.compute_seconds, found.memory_traffic_seconds, found.network_seconds)
    longest = max(times) or 1.0
    note = (
        f"In {found.what}, each resource alone and at its best, {found.dominant} takes longest: {found.factor:.3g} "
        "times the next."
    )
    shown = (show_seconds(time) if time else "none" for time in times)
    rows = tuple(zip(("compute", "memory traffic", "network"), shown, strict=True))
    return Section("What dominates", note, ("", "time"), rows, tuple(time / longest for time in times))


def _alternatives(plan: Plan) -> list[Section]:
    found = []
    if isinstance(plan, PretrainPlan) and (dense := plan.dense_equivalent):
        outside = f" This lies outside the range of its fit: {'; '.join(dense.outside)}." if dense.outside else ""
        note = (
            f"A dense model would need {show_count(dense.parameters)} parameters for the same loss after the same "
            f"tokens: {dense.ratio:.3g} times the FLOPs and, at the same MFU, {_hours(plan.dense_device_hours)} "
            f"{_hours_of(plan)}. Rule: {dense.rule}.{outside}"
        )
        found.append(Section("Against a dense model of equal loss", note))
    serving = isinstance(plan, ServePlan)
    note = "The same work on as many of each."
    if isinstance(plan, ServePlan):
        note = "The same traffic, in whole copies of the best size on each." if plan.day else (
            "As many requests as these devices serve, by copies of the best size at full load; of more devices, the "
            "share they take."
        )  # fmt: skip
    rows = []
    for other in plan.alternatives:
        here = " (this plan)" if (other.device, other.precision) == (plan.device, plan.precision) else ""
        hours, days = (other.device_hours or 0.0, other.days or 0.0) if other.fits else (0.0, 0.0)
        span = f"{hours / 24:,.1f}" if serving else show_seconds(days * 86400)
        money = show_money(other.money) if other.fits and other.money is not None else ""
        rows.append((
            other.device + here, other.precision, _hours(hours), span if other.fits else "", money,
            "yes" if other.fits else "no",
        ))  # fmt: skip
    span, room = ("devices", "room, in time") if serving else ("time", "has room")
    columns = ("", "precision", "hours", span, "money", room)
    note += " Other devices' prices are the table's examples."
    return [*found, Section("Other devices and precisions", note, columns, tuple(rows))]


def _model(plan: Plan) -> Section:
    counts = plan.parameters
    rows = [("parameters", show_count(counts.total, 5))]
    if counts.active == counts.total:
        rows.append(("without embedding and head", show_count(counts.active_without_embedding_and_head, 4)))
    else:
        rows += [
            ("active for a token, all counted", show_count(counts.active, 4)),
            ("active without the embedding", show_count(counts.active_without_embedding, 4)),
            ("active without embedding and head", show_count(counts.active_without_embedding_and_head, 4)),
        ]
    if counts.mtp:
        rows.append(("the MTP module, not counted above", show_count(counts.mtp, 4)))
    rows.append(("KV cache of a token, 16 bits", f"{counts.cache_bytes_per_token:,.0f} bytes"))
    return Section("The model", rows=tuple(rows))


def _serving(plan: ServePlan) -> list[Section]:
    rows: list[tuple[str, ...]] = []
    for point in plan.curve:
        possible = "yes" if point.fits and point.within_latency else "too late" if point.fits else "no room"
        rows.append((
            f"{point.batch:,}", f"{point.tokens_per_second_per_device:,.0f}",
            f"{point.tokens_per_second_per_user:,.3g}", f"{point.bound_tokens_per_second_per_device:,.0f}",
            show_size(point.bytes_per_token), point.dominant.split()[0], possible,
        ))  # fmt: skip
    rates = [point.tokens_per_second_per_device for point in plan.curve]
    chosen = next(index for index, point in enumerate(plan.curve) if point.batch == plan.batch)
    columns = ("batch", "tokens/s a device", "to a user", "roofline", "read a token", "bound by", "possible")
    context, most = f"{plan.prompt + plan.response / 2:,.0f}", show_seconds(plan.latency)
    note = f"Decoding, with {context} cached tokens a sequence; a user waits at most {most} a token."
    bars = tuple(rate / max(rates) for rate in rates)
    found = [Section("Tokens a second against batch", note, columns, tuple(rows), bars, chosen)]
    if plan.cost_by_hit_share:
        costs = plan.cost_by_hit_share
        rows = [(show_share(cost.hit_share), show_money(cost.prompt), show_money(cost.blended)) for cost in costs]
        note = f"Output tokens cost {show_money(plan.output_cost_per_million or 0)} a million whatever is cached."
        heads = ("prompt tokens cached", "prompt", "all tokens")
        found.append(Section("Cost per million tokens, by cache hits", note, heads, tuple(rows)))
    if (even := plan.break_even) and plan.margin is not None and plan.prices:
        listed = "/".join(f"{price:g}" for price in plan.prices)
        when = "these devices never cost as little as buying"
        if even.tokens_per_day is not None and even.utilisation is not None:
            share = f"{show_share(even.utilisation)} of what they can do"
            when = f"these devices cost as much as buying at {show_count(even.tokens_per_day)} tokens a day, {share}"
        rows = [
            ("made here, a million tokens", show_money(even.made_per_million)),
            ("at the price list, a million tokens", show_money(even.bought_per_million)),
            ("these devices, a day", show_money(even.devices_per_day)),
            ("tokens they can do, a day", show_count(even.devices_tokens_per_day)),
        ]
        margin = f"a margin of {plan.margin:.0%} over cost at full load"
        note = f"At {listed} a million (cached, other input, output): {margin}; {when}."
        found.append(Section("Make or buy", note, rows=tuple(rows)))
    if day := plan.day:
        rows = [
            ("input tokens", show_count(day.input_tokens)),
            ("output tokens", show_count(day.output_tokens)),
            ("devices the traffic needs", f"{day.devices_needed:,.0f} of {plan.count:,}"),
        ]
        rows += [("cost", show_money(day.cost))] if day.cost is not None else []
        rows += [("income at the price list", show_money(day.revenue))] if day.revenue is not None else []
        rows += [("margin over cost", f"{day.margin:.0%}")] if day.margin is not None else []
        found.append(Section("A day", rows=tuple(rows)))
    return found


def _tflops(rate: float) -> str:
    return f"{rate:,.0f} TFLOP/s" if rate >= 100 else f"{rate:.3g} TFLOP/s"


def _hours_of(plan: Plan) -> str:
    return f"{plan.device} hours" if plan.device != "local" else "hours"


def _hours(hours: float | None) -> str:
    return "" if not hours else f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}"


# The doors


def deliver(found: Strict, page: PlanPage, as_json: bool, html: Path | None) -> None:
    """Print what was found, as JSON if so asked, else its page; write the page as HTML if one is wanted."""
    if html is not None:
        write_text(html, render(page))
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2, allow_nan=False))
        return
    show(page, Console())
    if html is not None:
        print(f"\nmade {html}")


def show(page: PlanPage, console: Console) -> None:
    """Print a page as tables and lists."""
    console.print(Text(page.title, style="bold"))
    console.print(Text(page.lede))
    if page.warning:
        console.print(Text(page.warning, style="bold red"))
    head = Table(box=None, pad_edge=False, show_header=False)
    for value, label in page.figures:
        head.add_row(Text(value, style="bold"), Text(label, style="dim"))
    console.print(head)
    for section in page.sections:
        console.print(Text(f"\n{section.title}", style="bold"))
        if section.note:
            console.print(Text(section.note, style="" if "NOT fit" in section.note else "dim"))
        if section.rows and len(section.rows[0]) == 1:
            for (text,) in section.rows:
                console.print(Text(f"- {text}", style="dim"))
        elif section.rows:
            table = Table(box=None, pad_edge=False, show_header=any(section.columns), header_style="dim")
            for index, _ in enumerate(section.rows[0]):
                heading = section.columns[index] if section.columns else ""
                justify, overflow = ("right", "ellipsis") if index else ("left", "fold")
                table.add_column(heading, justify=justify, overflow=overflow)  # type: ignore[arg-type]
            for index, row in enumerate(section.rows):
                table.add_row(*(Text(cell) for cell in row), style="bold" if index == section.strong else None)
            console.print(table)


def render(page: PlanPage) -> str:
    """A page as one HTML file: no scripts, nothing loaded from anywhere, light and dark."""
    import jinja2  # only here

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("plan.html.jinja").render(page=page, version=__version__)
