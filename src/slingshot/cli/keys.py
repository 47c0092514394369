"""What can be set: the keys of a stage, the tasks and their parameters, the recipes that come along.

show_keys("sft", SFTConfig, Console())   # slingshot sft --keys
show_tasks("countdown", Console())       # slingshot tasks countdown
show_recipes(Console())                  # slingshot recipes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from slingshot.base.config import Strict
from slingshot.base.files import packaged_toml
from slingshot.base.keys import Key, keys_of
from slingshot.recipe.recipe import shipped


def show_keys(kind: str, config: type[Strict], console: Console) -> None:
    """Every key of a config: default, type in words, meaning; those of a table below its heading."""
    console.print(Text(_summary(config)))
    meanings = packaged_toml("slingshot.cli", "meanings.toml")
    groups: dict[str, list[Key]] = {"": []}
    for key in keys_of(config):
        meaning = key.meaning or meanings.get(f"{kind}.{key.name}") or meanings.get(key.name, "")
        groups.setdefault(key.name.rpartition(".")[0], []).append(replace(key, meaning=meaning))
    for table, keys in groups.items():
        if table:
            owner = config.model_fields[table.split(".")[0]].annotation
            console.print(Text.assemble(("\n" + table, "bold"), f": {_summary(owner)}"))
        console.print(_listed(keys))


def show_tasks(name: str | None, console: Console) -> None:
    """The tasks there are, or the parameters of one and a problem of it."""
    from slingshot.tasks.loader import KINDS, load_task, task_keys
    from slingshot.tasks.verifiers import VERIFIERS

    if name is None:
        console.print(_pairs(KINDS.items()))
        more = "slingshot tasks NAME shows parameters and a problem; slingshot tasks gym, its datasets"
        console.print(more, style="dim")
        return
    keys = task_keys(name)
    if name in ("gym", "gym:NAME"):
        console.print(Text(", ".join(key.name for key in keys)))
        return
    console.print(_listed(keys))
    if name in ("dataset", "dataset:SOURCE", "code:SOURCE"):
        console.print(Text("\nverifiers", "bold"))
        console.print(_pairs((verifier, of.meaning) for verifier, of in VERIFIERS.items()))
        console.print(Text('in a recipe: tasks = ["dataset:gsm8k"]; docs/task.md has more', "dim"))
        return
    problem = next(iter(load_task(name).problems("train", 0)))
    console.print(Text(f"\na problem: {problem.prompt.strip()}\nexpected: {problem.answer or 'whatever verifies'}"))
    console.print(Text(f'in a recipe: tasks = [{{ name = "{name}", params = {{ KEY = VALUE }} }}]', "dim"))


def show_recipes(console: Console) -> None:
    """Every recipe that comes along, by the comment it begins with."""
    first_lines = ((name, text.partition("\n")[0].lstrip("# ")) for name, text in shipped())
    console.print(_pairs((name, line.removeprefix(f"{name}: ")) for name, line in first_lines))


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, what in rows:
        table.add_row(Text(name, "bold"), what)
    return table


def _listed(keys: Iterable[Key]) -> Table:
    columns = [Column(heading, overflow="fold") for heading in ("default", "type", "what it is for")]
    table = Table(Column("key", no_wrap=True), *columns, box=None, pad_edge=False, header_style="dim")
    for key in keys:
        table.add_row(Text(key.name, "bold"), "required" if key.default is None else key.default, key.kind, key.meaning)
    return table


def _summary(thing: object) -> str:
    """The first paragraph of its docstring."""
    return (thing.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
