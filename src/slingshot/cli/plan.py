"""`slingshot plan`: what pre-training, reinforcement learning, distillation and serving will cost, as a table, as JSON, as a page.

    slingshot plan pretrain --model deepseek-v3 --tokens 14.8T --device h800 --count 2048 --tflops 385
    slingshot plan rl --model deepseek-v3 --device h800 --count 512 --steps 10400 --response 6.7K --longest 32K --rollout 8192
    slingshot plan distill --model qwen2.5-32b --teacher deepseek-v3 --samples 800K --response 5.4K --device h800 --count 64
    slingshot plan serve --model deepseek-v3 --device h800 --prompt 4383 --response 1210 --hit-share 56.3% --prices 0.14/0.55/2.19

Table, page and JSON say the same: the page and the table are made of the same sections. Starts without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slingshot import __version__
from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, write_text
from slingshot.base.quantity import count as read_count
from slingshot.base.quantity import (
    seconds,
    share,
    show_count,
    show_money,
    show_seconds,
    show_share,
    show_size,
    size,
    whole,
)
from slingshot.cost.devices import DEVICES, Device, device
from slingshot.model.config import ModelConfig, presets
from slingshot.planning.plan import DistillPlan, Plan, PretrainPlan, RLPlan, ServePlan
from slingshot.planning.plan_serving import plan_serve
from slingshot.planning.plan_training import plan_distill, plan_pretrain, plan_rl
from slingshot.planning.throughput import DECODE_EFFICIENCY

app = typer.Typer(
    help="What it will cost, before anything runs. Numbers may be written 14.8T, 7e12, 671B, 50ms.",
    no_args_is_help=True,
)

# What a plan says, for the table and the page alike


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and a table; `shares` are lengths of bars beside the rows, `strong` a row that stands out."""

    title: str
    note: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    shares: tuple[float, ...] = ()
    strong: int | None = None


@dataclass(frozen=True)
class Story:
    """A plan in words: a title, a sentence, its headline figures and its sections; whether it fits, and on what; its command's name."""

    title: str
    lede: str
    figures: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    fits: bool
    where: str
    command: str


def tell(plan: Plan) -> Story:
    """Put a plan into words and tables."""
    many = f"{plan.count:,} {plan.device}" if plan.device != "local" else "this machine"
    figures = [(_hours(plan.device_hours), _hours_of(plan) + (" a day" if isinstance(plan, ServePlan) else ""))]
    if not isinstance(plan, ServePlan):
        figures.append((show_seconds(plan.days * 86400), f"on {many}"))
    if plan.money is not None:
        figures.append((show_money(plan.money), f"at ${plan.price:g} an hour"))
    if plan.energy_kwh is not None:
        figures.append((_energy(plan.energy_kwh), "by the devices alone"))
    own: list[Section] = []
    if isinstance(plan, PretrainPlan):
        title = f"Pre-training {plan.model}"
        lede = f"{show_count(plan.tokens)} tokens in {plan.precision} on {many}, {_tflops(plan.tflops_per_device)} each: {_mfus(plan)}."
        if plan.tflops_per_device > plan.tflops_bound:
            lede += f" That is more than this layout lets through, which is {_tflops(plan.tflops_bound)}: expect longer, or find a better layout."
        own = [_published(plan), _flops(plan), _network(plan)]
    elif isinstance(plan, RLPlan):
        title = f"Reinforcement learning of {plan.model}"
        lede = (
            f"{plan.steps:,} steps, {plan.responses:,} responses and {show_count(plan.tokens)} tokens on {many}: {plan.rounds:,.0f} rounds of "
            f"rollouts, {show_seconds(plan.round_seconds)} each, with a copy of the policy on every {plan.devices_per_copy}."
        )
    elif isinstance(plan, DistillPlan):
        title = f"Distilling {plan.teacher} into {plan.model}"
        lede = (
            f"{show_count(plan.sampled)} responses sampled, {show_count(plan.kept)} kept, on {many}; a copy of the teacher on every "
            f"{plan.devices_per_copy} writes {plan.sampled_tokens_per_second_per_device:,.0f} tokens a second on each."
        )
    else:
        assert isinstance(plan, ServePlan)
        title = f"Serving {plan.model}"
        lede = _serving_lede(plan, many)
        own = _serving(plan)
        if plan.output_cost_per_million is not None:
            figures.append((show_money(plan.output_cost_per_million), "a million output tokens"))
    assumed = Section("Assumed", rows=tuple((text,) for text in plan.assumptions))
    sections = [_bill(plan), *own, _memory(plan), _dominates(plan), *_alternatives(plan), _model(plan), assumed]
    told = tuple(section for section in sections if section.rows or section.note)
    return Story(title, lede, tuple(figures), told, plan.fits, plan.device, plan.kind)


def _mfus(plan: PretrainPlan) -> str:
    of_mix = f"an MFU of {show_share(plan.mfu)} of what this model's products have in {plan.precision}"
    if plan.mfu_of_bfloat16 is None or plan.precision == "bfloat16":
        return of_mix
    return f"{of_mix}, {show_share(plan.mfu_of_bfloat16)} of the bfloat16 peak"


def _tflops(rate: float) -> str:
    return f"{rate:,.0f} TFLOP/s" if rate >= 100 else f"{rate:.3g} TFLOP/s"


def _model(plan: Plan) -> Section:
    counts = plan.parameters
    rows = [
        ("parameters", show_count(counts.total, 5)),
        ("active for a token, all counted", show_count(counts.active, 4)),
        ("active without the embedding", show_count(counts.active_without_embedding, 4)),
        ("active without embedding and head", show_count(counts.active_without_embedding_and_head, 4)),
    ]
    if counts.active == counts.total:
        rows = [rows[0], ("without embedding and head", show_count(counts.active_without_embedding_and_head, 4))]
    if counts.mtp:
        rows.append(("the MTP module, not counted above", show_count(counts.mtp, 4)))
    rows.append(("KV cache of a token, 16 bits", f"{counts.cache_bytes_per_token:,.0f} bytes"))
    return Section("The model", rows=tuple(rows))


def _bill(plan: Plan) -> Section:
    longest = max(stage.device_hours for stage in plan.stages) or 1.0
    rows = [
        (
            stage.name,
            show_count(stage.tokens) if stage.tokens else "",
            f"{stage.flops:.3g}" if stage.flops else "",
            _hours(stage.device_hours),
            show_seconds(stage.days * 86400) if stage.days else "",
            show_money(stage.money) if stage.money else "",
        )
        for stage in plan.stages
    ]
    money = show_money(plan.money) if plan.money is not None else ""
    rows.append(("in all", "", f"{plan.flops:.3g}", _hours(plan.device_hours), show_seconds(plan.days * 86400), money))
    notes = "; ".join(f"{stage.name}: {stage.note}" for stage in plan.stages if stage.note)
    shares = (*(stage.device_hours / longest for stage in plan.stages), 0.0)
    columns = ("", "tokens", "FLOPs", _hours_of(plan), "time", "money")
    return Section("The bill", _sentence(notes), columns, tuple(rows), shares, len(rows) - 1)


def _published(plan: PretrainPlan) -> Section:
    """The bill beside the one that somebody published of the same work."""
    bill = plan.published
    if bill is None:
        return Section("Beside the published bill")
    here = {stage.name: stage for stage in plan.stages}
    missing = [name for name in bill.device_hours if name not in here]
    lines = [(name, hours, here[name].device_hours if name in here else 0.0, name in here and not here[name].flops)
             for name, hours in bill.device_hours.items()]  # fmt: skip
    lines.append(
        ("in all", sum(bill.device_hours.values()), 0.0 if missing else sum(own for _, _, own, _ in lines), False)
    )
    rows = []
    for name, hours, own, given in lines:
        distance = "given" if given else f"{round(own / hours - 1, 3) + 0:+.1%}" if own else ""
        money = [
            show_money(each * price) if each and price else ""
            for each, price in ((hours, bill.price), (own, plan.price))
        ]
        rows.append((name, _hours(hours), _hours(own), distance, *money))
    options = " ".join(f'--stage "{name}={show_count(bill.device_hours[name])}"' for name in missing)
    note = f"{bill.source}." + (f" What no plan computes is added by {options}." if missing else "")
    columns = ("", "published hours", "hours here", "distance", "published", "money here")
    return Section("Beside the published bill", note, columns, tuple(rows), strong=len(rows) - 1)


def _flops(plan: PretrainPlan) -> Section:
    largest = max(plan.flops_by_part.values())
    rows = [
        (part.replace("_", " "), f"{flops:.3g}", show_share(flops / plan.flops))
        for part, flops in plan.flops_by_part.items()
    ]
    note = (
        f"{plan.flops:.4g} FLOPs of the main model, attention counted exactly over the causal half"
        f"; six times active parameters times tokens comes to {plan.six_nd_flops:.4g}."
    )
    return Section(
        "Where the FLOPs go",
        note,
        ("", "FLOPs", "of the main model"),
        tuple(rows),
        tuple(v / largest for v in plan.flops_by_part.values()),
    )


def _network(plan: PretrainPlan) -> Section:
    if not plan.transfers:
        return Section("The network")
    rows = [(sent.purpose, show_size(sent.n_bytes), "within a node" if sent.link == "node" else "between nodes", show_seconds(sent.seconds))
            for sent in plan.transfers]  # fmt: skip
    longest = max(sent.seconds for sent in plan.transfers)
    hidden = (
        "hidden behind compute"
        if not plan.exposed_network_seconds
        else f"{show_seconds(plan.exposed_network_seconds)} of it not hidden"
    )
    note = (
        f"Layout: {plan.layout_text}. What one device sends in an optimizer step of {show_count(plan.batch_tokens)} tokens, {hidden}; "
        f"the pipeline stands idle {show_share(plan.bubble)} of the time. At most {_tflops(plan.tflops_bound)} get through."
    )
    shares = tuple(sent.seconds / longest for sent in plan.transfers)
    return Section("The network", note, ("", "bytes", "link", "time"), tuple(rows), shares)


def _memory(plan: Plan) -> Section:
    memory = plan.memory
    parts = [(name, getattr(memory, name)) for name in ("weights", "gradients", "optimizer", "activations", "cache")]
    rows = [
        ("KV cache" if name == "cache" else name, show_size(n_bytes), show_share(n_bytes / memory.total))
        for name, n_bytes in parts
        if n_bytes
    ]
    rows.append(("in all", show_size(memory.total), f"of {show_size(plan.usable_memory_bytes)} usable"))
    shares = (*(n_bytes / memory.total for _, n_bytes in parts if n_bytes), 0.0)
    if plan.fits:
        note = f"It fits: the fullest device is {show_share(memory.total / plan.usable_memory_bytes)} full."
    elif plan.nearest_fit:
        fit = plan.nearest_fit
        note = f"It does NOT fit. The nearest that does: {fit.count:,} x {fit.device}, {fit.layout}."
    else:
        note = "It does NOT fit, and neither does anything in the table of devices."
    return Section("Memory of the fullest device", note, ("", "bytes", "share"), tuple(rows), shares, len(rows) - 1)


def _dominates(plan: Plan) -> Section:
    found = plan.dominates
    times = (
        ("compute", found.compute_seconds),
        ("memory traffic", found.memory_traffic_seconds),
        ("network", found.network_seconds),
    )
    longest = max(time for _, time in times) or 1.0
    note = f"In {found.what}, each resource alone and at its best, {found.dominant} takes longest: {found.factor:.3g} times the next."
    rows = tuple((name, show_seconds(time) if time else "none") for name, time in times)
    return Section("What dominates", note, ("", "time"), rows, tuple(time / longest for _, time in times))


def _alternatives(plan: Plan) -> list[Section]:
    found = []
    if isinstance(plan, PretrainPlan) and plan.dense_equivalent and plan.dense_device_hours is not None:
        dense = plan.dense_equivalent
        outside = f" This lies outside the range of its fit: {'; '.join(dense.outside)}." if dense.outside else ""
        note = (
            f"A dense model would need {show_count(dense.parameters)} parameters for the same loss after the same tokens: {dense.ratio:.3g} times "
            f"the FLOPs and, at the same MFU, {plan.dense_device_hours:,.0f} {_hours_of(plan)}. Rule: {dense.rule}.{outside}"
        )
        found.append(Section("Against a dense model of equal loss", note))
    if plan.alternatives:
        rows = []
        for other in plan.alternatives:
            here = other.device == plan.device and other.precision == plan.precision
            rows.append(
                (
                    other.device + (" (this plan)" if here else ""),
                    other.precision,
                    f"{other.device_hours:,.0f}" if other.fits else "",
                    (
                        show_seconds(other.days * 86400)
                        if not isinstance(plan, ServePlan)
                        else f"{other.device_hours / 24:,.1f}"
                    )
                    if other.fits
                    else "",
                    show_money(other.money) if other.fits and other.money is not None else "",
                    "yes" if other.fits else "no",
                )
            )
        serving = isinstance(plan, ServePlan)
        note = "The same work on as many of each."
        if isinstance(plan, ServePlan):
            whole_fleets = "The same traffic, in whole copies of the best size on each."
            shares = "As many requests as these devices serve, by copies of the best size at full load; of a larger fleet, the share they take."
            note = whole_fleets if plan.day else shares
        columns = (
            "",
            "precision",
            "hours",
            "devices" if serving else "time",
            "money",
            "room, in time" if serving else "has room",
        )
        found.append(
            Section(
                "Other devices and precisions",
                note + " Other devices' prices are the table's examples.",
                columns,
                tuple(rows),
            )
        )
    return found


def _serving_lede(plan: ServePlan, many: str) -> str:
    late = (
        " That is slower than asked: no batch is in time."
        if plan.tokens_per_second_per_user * plan.latency < 1 - 1e-9
        else ""
    )
    return (
        f"In {plan.precision} on {many}, a copy on every {plan.devices_per_copy}: {plan.tokens_per_second_per_device:,.0f} tokens a second a device "
        f"at {plan.batch} sequences each, {plan.tokens_per_second_per_user:.3g} a second to a user; the roofline allows "
        f"{plan.bound_tokens_per_second_per_device:,.0f}.{late}"
    )


def _serving(plan: ServePlan) -> list[Section]:
    rows: tuple[tuple[str, ...], ...] = tuple(
        (
            f"{point.batch:,.0f}",
            f"{point.tokens_per_second_per_device:,.0f}",
            f"{point.tokens_per_second_per_user:,.3g}",
            f"{point.bound_tokens_per_second_per_device:,.0f}",
            show_size(point.bytes_per_token),
            point.dominant.split()[0],
            "yes" if point.fits and point.within_latency else "no room" if not point.fits else "too late",
        )
        for point in plan.curve
    )
    fastest = max(point.tokens_per_second_per_device for point in plan.curve)
    chosen = next(index for index, point in enumerate(plan.curve) if point.batch == plan.batch)
    columns = ("batch", "tokens/s a device", "to a user", "roofline", "read a token", "bound by", "possible")
    note = f"Decoding, with {plan.prompt + plan.response / 2:,.0f} cached tokens a sequence; a user waits at most {show_seconds(plan.latency)} a token."
    shares = tuple(point.tokens_per_second_per_device / fastest for point in plan.curve)
    found = [Section("Tokens a second against batch", note, columns, rows, shares, chosen)]
    if plan.cost_by_hit_share:
        rows = tuple(
            (show_share(cost.hit_share), show_money(cost.prompt), show_money(cost.blended))
            for cost in plan.cost_by_hit_share
        )
        note = f"Output tokens cost {show_money(plan.output_cost_per_million or 0)} a million whatever is cached."
        found.append(
            Section(
                "Cost per million tokens, by cache hits", note, ("prompt tokens cached", "prompt", "all tokens"), rows
            )
        )
    if plan.break_even and plan.margin is not None and plan.prices:
        even = plan.break_even
        listed = "/".join(f"{price:g}" for price in plan.prices)
        when = (
            f"this fleet costs as much as buying at {show_count(even.tokens_per_day)} tokens a day, {show_share(even.utilisation)} of what it can do"
            if even.tokens_per_day is not None and even.utilisation is not None
            else "this fleet never costs as little as buying"
        )
        rows = (
            ("made here, a million tokens", show_money(even.made_per_million)),
            ("at the price list, a million tokens", show_money(even.bought_per_million)),
            ("this fleet, a day", show_money(even.fleet_per_day)),
            ("tokens it can do, a day", show_count(even.fleet_tokens_per_day)),
        )
        note = f"At {listed} a million (cached, other input, output): a margin of {plan.margin:.0%} over cost at full load; {when}."
        found.append(Section("Make or buy", note, rows=rows))
    if plan.day:
        day = plan.day
        rows = (
            ("input tokens", show_count(day.input_tokens)),
            ("output tokens", show_count(day.output_tokens)),
            ("devices the traffic needs", f"{day.devices_needed:,.0f} of {plan.count:,}"),
            *((("cost", show_money(day.cost)),) if day.cost is not None else ()),
            *((("income at the price list", show_money(day.revenue)),) if day.revenue is not None else ()),
            *((("margin over cost", f"{day.margin:.0%}"),) if day.margin is not None else ()),
        )
        found.append(Section("A day", rows=rows))
    return found


def _hours_of(plan: Plan) -> str:
    return f"{plan.device} hours" if plan.device != "local" else "hours"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}" if hours else ""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _energy(kwh: float) -> str:
    return f"{kwh / 1e6:,.3g} GWh" if kwh >= 1e6 else f"{kwh / 1e3:,.3g} MWh" if kwh >= 1e3 else f"{kwh:,.3g} kWh"


# The doors


def show(story: Story, console: Console) -> None:
    """Print a story as tables and lists."""
    console.print(Text(story.title, style="bold"))
    console.print(Text(story.lede))
    if not story.fits:
        console.print(Text(f"It does NOT fit in the memory of one {story.where}.", style="bold red"))
    head = Table(box=None, pad_edge=False, show_header=False)
    for value, label in story.figures:
        head.add_row(Text(value, style="bold"), Text(label, style="dim"))
    console.print(head)
    for section in story.sections:
        console.print(Text(f"\n{section.title}", style="bold"))
        if section.note:
            console.print(Text(section.note, style="" if "NOT fit" in section.note else "dim"))
        if section.rows and len(section.rows[0]) == 1:
            for (text,) in section.rows:
                console.print(Text(f"- {text}", style="dim"))
        elif section.rows:
            table = Table(box=None, pad_edge=False, show_header=any(section.columns), header_style="dim")
            for index in range(len(section.rows[0])):
                heading = section.columns[index] if index < len(section.columns) else ""
                table.add_column(
                    heading, justify="left" if index == 0 else "right", overflow="ellipsis" if index else "fold"
                )
            for index, row in enumerate(section.rows):
                table.add_row(*(Text(cell) for cell in row), style="bold" if index == section.strong else None)
            console.print(table)


def page(story: Story) -> str:
    """A story as one HTML file: no scripts, nothing loaded from anywhere, light and dark."""
    import jinja2  # only here

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("plan.html.jinja").render(story=story, version=__version__)


def deliver(found: Strict, story: Story, as_json: bool, html: Path | None) -> None:
    """Print what was found, as JSON if so asked, else its story; write the story's page if one is wanted."""
    if html is not None:
        write_text(html, page(story))
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2, allow_nan=False))
        return
    show(story, Console())
    if html is not None:
        print(f"\nmade {html}")


# The commands


def load_model_config(name: str) -> ModelConfig:
    """The config.json of a folder, or a preset by its name."""
    file = Path(name) / "config.json"
    if file.is_file():
        return ModelConfig.from_hf(read_json(file), str(file))
    if name not in presets() and Path(name).exists():
        raise SlingshotError(
            f"{name}: no config.json there; name a folder that has one, or one of {', '.join(presets())}"
        )
    return ModelConfig.preset(name)


def _given(read: Callable[[str, str], Any], text: str | None, what: str) -> Any:
    return None if text is None else read(text, what)


def _known_hours(texts: Sequence[str]) -> dict[str, float]:
    stages: dict[str, float] = {}
    for text in texts:
        name, separator, hours = text.rpartition("=")
        if not separator or not name.strip():
            raise SlingshotError(f"--stage {text!r:.60}: write NAME=HOURS, such as 'context extension=119K'")
        if (name := name.strip()) in (*stages, "pre-training"):
            raise SlingshotError(
                f"--stage {text!r:.60}: there is a line {name!r:.40} already; give each stage a name of its own"
            )
        stages[name] = read_count(hours, f"the hours of {name}")
    return stages


def _device(name: str, memory: str | None) -> Device:
    """A device of the table, with another memory if one is given."""
    found = device(name)
    if memory is None:
        return found
    n_bytes = size(memory, "--memory")
    if n_bytes < 1:
        raise SlingshotError(
            f"--memory {memory}: must be more than 0; the table's {name} has {show_size(found.memory_bytes)}"
        )
    return found.model_copy(update={"memory_bytes": n_bytes})


def _prices(text: str | None) -> list[float] | None:
    if text is None:
        return None
    return [read_count(part, "a price") for part in text.split("/")]


_DEVICES = f"{', '.join(DEVICES)}, or local for this machine"

Model = Annotated[
    str, typer.Option(help="A preset such as deepseek-v3, or a folder with a config.json.", show_default=False)
]
On = Annotated[str, typer.Option("--device", help=_DEVICES, show_default=False)]
Count = Annotated[str, typer.Option(help="Devices.")]
Mfu = Annotated[
    str | None, typer.Option(help="Share of the peak reached in training.", show_default="22% in fp8, else 40%")
]
Tflops = Annotated[
    str | None, typer.Option(help="TFLOP/s of a device in training, measured; instead of --mfu.", show_default=False)
]
Price = Annotated[str | None, typer.Option(help="Of a device-hour.", show_default="the table's example")]
Memory = Annotated[str | None, typer.Option(help="Of a device, such as 40GiB.", show_default="the table's")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--precision", help="float32, bfloat16, float16 or fp8.", show_default="as the model is stored, else 16 bits"
    ),
]
Copy = Annotated[
    str | None,
    typer.Option("--devices-per-copy", help="Devices that hold one copy of the model.", show_default="chosen"),
]
Efficiency = Annotated[str, typer.Option(help="Share of the decode roofline that is reached.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Html = Annotated[Path | None, typer.Option(help="Write a page there, too.", show_default=False)]
Tensor = Annotated[str | None, typer.Option("--tp", help="Tensor parallel ways.", show_default="chosen")]
Pipeline = Annotated[str | None, typer.Option("--pp", help="Pipeline stages.", show_default="chosen")]
Expert = Annotated[str | None, typer.Option("--ep", help="Expert parallel ways.", show_default="chosen")]
Zero = Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.", show_default="chosen")]
Recompute = Annotated[str | None, typer.Option(help="none, selective or full.", show_default="chosen")]


def _ways(tp: str | None, pp: str | None, ep: str | None, zero: int | None, recompute: str | None) -> Mapping[str, Any]:
    ways = {
        "tp": _given(whole, tp, "--tp"),
        "pp": _given(whole, pp, "--pp"),
        "ep": _given(whole, ep, "--ep"),
        "zero": zero,
        "recompute": recompute,
    }
    return {name: value for name, value in ways.items() if value is not None}


@app.command()
def pretrain(
    model: Model,
    tokens: Annotated[str, typer.Option(help="Tokens trained on.", show_default=False)],
    on: On,
    count: Count = "1",
    mfu: Mfu = None,
    tflops: Tflops = None,
    hours: Annotated[
        str | None, typer.Option(help="Device-hours it took: shows what rate they come to.", show_default=False)
    ] = None,
    price: Price = None,
    memory: Memory = None,
    precision: Dtype = None,
    context: Annotated[str | None, typer.Option(help="Tokens in a sequence.", show_default="4096")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Tokens in an optimizer step.", show_default="4M, or a sequence a device")
    ] = None,
    tp: Tensor = None,
    pp: Pipeline = None,
    ep: Expert = None,
    zero: Zero = None,
    recompute: Recompute = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="NAME=HOURS: a further line of the bill; may be repeated.", show_default=False),
    ] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """What training on so many tokens costs: hours, days, money, energy, memory, what dominates, and what else could do it."""
    plan = plan_pretrain(
        load_model_config(model),
        model,
        _device(on, memory),
        whole(count, "--count"),
        tokens=read_count(tokens, "--tokens"),
        mfu=_given(share, mfu, "--mfu"),
        tflops=_given(read_count, tflops, "--tflops"),
        hours=_given(read_count, hours, "--hours"),
        price=_given(read_count, price, "--price"),
        precision=precision,
        context=_given(whole, context, "--context"),
        batch=_given(read_count, batch, "--batch"),
        ways=_ways(tp, pp, ep, zero, recompute),
        stages=_known_hours(stage or []),
    )
    deliver(plan, tell(plan), as_json, html)


@app.command()
def rl(
    model: Model,
    on: On,
    steps: Annotated[str, typer.Option(help="Optimizer steps.", show_default=False)],
    response: Annotated[str, typer.Option(help="Mean tokens of a response.", show_default=False)],
    longest: Annotated[str, typer.Option(help="Tokens a response may have at most.", show_default=False)],
    count: Count = "1",
    prompts: Annotated[str, typer.Option(help="Questions in a step.")] = "32",
    group: Annotated[str, typer.Option(help="Responses to each question.")] = "16",
    rollout: Annotated[
        str | None, typer.Option(help="Responses sampled at once.", show_default="those of a step")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Mean tokens of a prompt.")] = "200",
    forwards: Annotated[int, typer.Option(help="Forward passes besides the trained one, such as the reference's.")] = 1,
    verify_seconds: Annotated[str, typer.Option(help="Of one processor core for a response.")] = "0.1",
    verify_workers: Annotated[
        str | None, typer.Option(help="Processor cores that verify.", show_default="16 a device")
    ] = None,
    mfu: Mfu = None,
    tflops: Tflops = None,
    price: Price = None,
    memory: Memory = None,
    precision: Dtype = None,
    per_copy: Copy = None,
    efficiency: Efficiency = str(DECODE_EFFICIENCY),
    tp: Tensor = None,
    pp: Pipeline = None,
    ep: Expert = None,
    zero: Zero = None,
    recompute: Recompute = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """What GRPO costs: rollouts, verification and update, each on a line of its own."""
    plan = plan_rl(
        load_model_config(model),
        model,
        _device(on, memory),
        whole(count, "--count"),
        steps=whole(steps, "--steps"),
        response=read_count(response, "--response"),
        longest=read_count(longest, "--longest"),
        prompts=whole(prompts, "--prompts"),
        group=whole(group, "--group"),
        rollout=_given(whole, rollout, "--rollout"),
        prompt=read_count(prompt, "--prompt"),
        forwards=forwards,
        verify_seconds=seconds(verify_seconds, "--verify-seconds"),
        verify_workers=_given(whole, verify_workers, "--verify-workers"),
        mfu=_given(share, mfu, "--mfu"),
        tflops=_given(read_count, tflops, "--tflops"),
        price=_given(read_count, price, "--price"),
        precision=precision,
        devices_per_copy=_given(whole, per_copy, "--devices-per-copy"),
        efficiency=share(efficiency, "--efficiency"),
        ways=_ways(tp, pp, ep, zero, recompute),
    )
    deliver(plan, tell(plan), as_json, html)


@app.command()
def distill(
    model: Annotated[
        str, typer.Option(help="The student: a preset, or a folder with a config.json.", show_default=False)
    ],
    teacher: Annotated[
        str, typer.Option(help="The teacher: a preset, or a folder with a config.json.", show_default=False)
    ],
    on: On,
    samples: Annotated[str, typer.Option(help="Responses of the teacher to train on.", show_default=False)],
    response: Annotated[str, typer.Option(help="Mean tokens of a response.", show_default=False)],
    count: Count = "1",
    prompt: Annotated[str, typer.Option(help="Mean tokens of a prompt.")] = "200",
    accepted: Annotated[str, typer.Option(help="Share of the teacher's responses that are kept.")] = "1",
    epochs: Annotated[str, typer.Option(help="Passes over the samples.")] = "2",
    mfu: Mfu = None,
    tflops: Tflops = None,
    price: Price = None,
    memory: Memory = None,
    precision: Dtype = None,
    teacher_precision: Annotated[
        str | None, typer.Option(help="Of the teacher.", show_default="as it is stored, else 16 bits")
    ] = None,
    per_copy: Copy = None,
    efficiency: Efficiency = str(DECODE_EFFICIENCY),
    tp: Tensor = None,
    pp: Pipeline = None,
    ep: Expert = None,
    zero: Zero = None,
    recompute: Recompute = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """What it costs to sample a teacher and train a student on what it wrote."""
    plan = plan_distill(
        load_model_config(model),
        model,
        _device(on, memory),
        whole(count, "--count"),
        teacher=load_model_config(teacher),
        teacher_name=teacher,
        samples=read_count(samples, "--samples"),
        response=read_count(response, "--response"),
        prompt=read_count(prompt, "--prompt"),
        accepted=share(accepted, "--accepted"),
        epochs=read_count(epochs, "--epochs"),
        mfu=_given(share, mfu, "--mfu"),
        tflops=_given(read_count, tflops, "--tflops"),
        price=_given(read_count, price, "--price"),
        precision=precision,
        teacher_precision=teacher_precision,
        devices_per_copy=_given(whole, per_copy, "--devices-per-copy"),
        efficiency=share(efficiency, "--efficiency"),
        ways=_ways(tp, pp, ep, zero, recompute),
    )
    deliver(plan, tell(plan), as_json, html)


@app.command()
def serve(
    model: Model,
    on: On,
    count: Annotated[
        str | None, typer.Option(help="Devices.", show_default="what the traffic needs, or one copy")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Mean tokens of a prompt.")] = "4000",
    response: Annotated[str, typer.Option(help="Mean tokens of a response.")] = "1000",
    hit_share: Annotated[str, typer.Option(help="Share of the prompt tokens that are cached.")] = "0",
    latency: Annotated[str, typer.Option(help="What a user waits for a token, at most.")] = "50ms",
    input_tokens: Annotated[
        str | None, typer.Option("--input", help="Input tokens of a day's traffic.", show_default=False)
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option("--output", help="Output tokens of a day's traffic.", show_default=False)
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            help="Price list per million tokens: cached input/other input/output, such as 0.14/0.55/2.19.",
            show_default=False,
        ),
    ] = None,
    price: Price = None,
    memory: Memory = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, fp8 or int8.", show_default="as the model is stored, else 16 bits"
        ),
    ] = None,
    mfu: Annotated[
        str | None,
        typer.Option(help="Share of the peak reached in reading prompts.", show_default="22% in 8 bits, else 40%"),
    ] = None,
    per_copy: Copy = None,
    efficiency: Efficiency = str(DECODE_EFFICIENCY),
    as_json: Json = False,
    html: Html = None,
) -> None:
    """What serving costs: tokens a second against batch, cost per million tokens, margin, and when buying is cheaper."""
    plan = plan_serve(
        load_model_config(model),
        model,
        _device(on, memory),
        _given(whole, count, "--count"),
        prompt=read_count(prompt, "--prompt"),
        response=read_count(response, "--response"),
        hit_share=share(hit_share, "--hit-share"),
        latency=seconds(latency, "--latency"),
        input_tokens=_given(read_count, input_tokens, "--input"),
        output_tokens=_given(read_count, output_tokens, "--output"),
        prices=_prices(prices),
        price=_given(read_count, price, "--price"),
        precision=precision,
        mfu=_given(share, mfu, "--mfu"),
        devices_per_copy=_given(whole, per_copy, "--devices-per-copy"),
        efficiency=share(efficiency, "--efficiency"),
    )
    deliver(plan, tell(plan), as_json, html)
