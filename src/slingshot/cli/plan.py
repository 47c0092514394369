"""`slingshot plan`: what pre-training, reinforcement learning, distillation and serving will cost, and a whole recipe.

    slingshot plan pretrain --model deepseek-v3 --tokens 14.8T --device h800 --count 2048 --tflops 385
    slingshot plan rl --model deepseek-v3 --device h800 --count 512 --steps 10400 --response 6.7K --longest 32K
    slingshot plan serve --model deepseek-v3 --device h800 --hit-share 56.3% --prices 0.14/0.55/2.19
    slingshot plan recipe tiny

A command's options are the fields of its request (planning/request.py). Table, page and JSON say the same. Without a
recipe, and for presets and folders, it runs without torch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slingshot.base.config import Strict
from slingshot.base.files import read_json, write_text
from slingshot.model.config import ModelConfig, presets
from slingshot.planning.page import PlanPage, Section, plan_page, render
from slingshot.planning.plan import Plan
from slingshot.planning.plan_serving import plan_serve
from slingshot.planning.plan_training import plan_distill, plan_pretrain, plan_rl
from slingshot.planning.request import DistillRequest, NamedModel, PlanRequest, PretrainRequest, RLRequest, ServeRequest

_HELP = "What it will cost, before anything runs. Numbers may be written 14.8T, 7e12, 671B, 50ms."
app = typer.Typer(help=_HELP, no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Html = Annotated[Path | None, typer.Option(help="Write a page there, too.", show_default=False)]


def named_model(source: str) -> NamedModel:
    """The architecture of a folder, preset, .gguf file, package:NAME or hub name, whose weights stay there."""
    path = Path(source)
    if not (path / "config.json").is_file() and (source in presets() or not (path.exists() or {*"/:"} & {*source})):
        config = ModelConfig.preset(source)  # or the error that names the nearest
    elif (path / "config.json").is_file():
        config = ModelConfig.from_hf(read_json(path / "config.json"), source)
    else:
        from slingshot.checkpoint.inspection import described  # only here: presets and folders need none of it

        config = described(source)
    return NamedModel(name=source, config=config)


def _command(request: type[PlanRequest], plan: Callable[[Any], Plan], what: str) -> None:
    """Make a command whose options are the request's fields."""

    def command(as_json: bool, html: Path | None, **given: Any) -> None:
        asked = {key: value for key, value in given.items() if value is not None}
        for key in {"model", "teacher"} & asked.keys():
            asked[key] = named_model(asked[key])
        found = plan(request.parse(asked))
        deliver(found, plan_page(found), as_json, html)

    parameters: dict[str, Any] = {}
    for key, field in request.model_fields.items():
        many = key == "stage"
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = False if field.is_required() or default in (None, {}) else str(default)
        option = typer.Option(f"--{key.replace('_', '-')}", help=field.description, show_default=shown)
        parameters[key] = (Annotated[list[str] | None if many else str if field.is_required() else str | None, option],
                           inspect.Parameter.empty if field.is_required() else None)  # fmt: skip
    parameters |= {"as_json": (Json, False), "html": (Html, None)}
    command.__annotations__ = {key: annotation for key, (annotation, _) in parameters.items()}
    command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for key, (annotation, default) in parameters.items()
    ])  # fmt: skip
    app.command(request.kind, help=f"What {what}.")(command)


_command(PretrainRequest, plan_pretrain, "training on so many tokens costs: hours, money, energy, memory")
_command(RLRequest, plan_rl, "GRPO costs: rollouts, verification and update, each on a line of its own")
_command(DistillRequest, plan_distill, "it costs to sample a teacher and train a student on what it wrote")
_command(ServeRequest, plan_serve, "serving costs: tokens a second against batch, cost per million, margin")


@app.command("recipe")
def recipe(
    source: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped one or a .toml file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Change any key of the recipe.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """What a whole recipe takes on this machine: a dry run of every stage with a few steps, scaled up."""
    from slingshot.planning.dry_run import dry_run, dry_run_page  # only here: it reads recipes and runs stages
    from slingshot.recipe.recipe import Recipe

    found = dry_run(Recipe.load(source, overrides or []), until)
    deliver(found, dry_run_page(found), as_json, html)


def deliver(found: Strict, page: PlanPage, as_json: bool, html: Path | None) -> None:
    """Print what was found, as JSON if so asked, else its page; write the page as HTML if one is wanted."""
    if html is not None:
        write_text(html, render(page))
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2, allow_nan=False))
        return
    _show(page)
    if html is not None:
        print(f"\nmade {html}")


def _show(page: PlanPage) -> None:
    console = Console()
    console.print(Text(page.title, style="bold"))
    if page.warning:
        console.print(Text(page.warning, style="bold red"))
    head = Table(box=None, pad_edge=False, show_header=False)
    for value, label in page.figures:
        head.add_row(Text(value, style="bold"), Text(label, style="dim"))
    console.print(head)
    for section in page.sections:
        console.print(Text(f"\n{section.title}", style="bold"))
        if section.note:
            console.print(Text(section.note, style="dim"))
        for at, block in enumerate(_blocks(section, console.width)):
            if at:
                console.print()
            console.print(block)
    console.print(Text("\nAssumed", style="bold"))
    if page.assumptions:
        console.print(Text("\n".join(f"- {text}" for text in page.assumptions), style="dim"))


def _blocks(section: Section, width: int) -> Iterator[Table]:
    """The table of a section; where it is wider than `width`, one under the other, the first column in each."""
    columns = zip(section.columns, *section.rows, strict=True)
    first, *widths = (2 + max(map(cell_len, column)) for column in columns)
    blocks, used = [[0]], first
    for at, wide in enumerate(widths, start=1):
        if used + wide - 2 > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = first
        blocks[-1].append(at)
        used += wide
    for block in blocks:
        grid = Table(box=None, pad_edge=False, show_header=any(section.columns), header_style="dim")
        for at in block:
            grid.add_column(section.columns[at], justify="right" if at else "left", overflow="fold")
        for index, row in enumerate(section.rows):
            grid.add_row(*(Text(row[at]) for at in block), style="bold" if index == section.strong else None)
        yield grid
