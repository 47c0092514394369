"""What a checkpoint was made of, for whoever talks with it: its tasks, and a question that it solved.

origin = Origin.of(Path("runs/tiny/rl_final"))
origin.introduction         # "Trained on countdown; every question stands alone. Try: ..."
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.cost.bill import total
from slingshot.recipe.results import Evaluation


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was trained on, as its receipts and its evaluation tell; `single_turns`: made from nothing by
    stages that know no second turn, so that a conversation leads it astray."""

    tasks: tuple[str, ...] = ()
    single_turns: bool = False
    example: str = ""

    @classmethod
    def of(cls, path: Path) -> Origin:
        """Of the checkpoint at `path`; empty when it has no receipt."""
        with contextlib.suppress(SlingshotError):
            receipts = [line.receipt for line in total(path).lines]
            names = dict.fromkeys(task["name"] for receipt in receipts for task in _tasks(receipt.config))
            made_here = any(receipt.stage == "pretrain" for receipt in receipts)
            return cls(tuple(names), made_here, _solved(path))
        return cls()

    @property
    def introduction(self) -> str:
        """Half a line to begin with; empty when nothing is known."""
        if not self.tasks:
            return ""
        alone = "; every question stands alone" if self.single_turns else ""
        return f"Trained on {', '.join(self.tasks)}{alone}." + (f" Try: {self.example}" if self.example else "")


def last_task(path: Path) -> dict[str, Any] | None:
    """The table of the task that the artifact at `path` was made for: its own, else that of the data or model nearest
    to it which names one; in what styles it wrote documents is left out."""
    for line in reversed(total(path).lines):
        for task in _tasks(line.receipt.config):
            return {key: value for key, value in task.items() if key != "styles"}
    return None


def _tasks(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tasks in a stage's config."""
    for table in (config, config.get("documents") or {}):
        yield from (task for task in table.get("tasks") or [] if isinstance(task, dict) and "name" in task)


def _solved(path: Path) -> str:
    """The shortest problem of the checkpoint's evaluation that it solved."""
    examples = Evaluation.read(path.resolve().parent / "evaluations" / path.resolve().name).examples.values()
    solved = [example.prompt.strip() for of_task in examples for example in of_task if example.correct]
    lines = [prompt for prompt in solved if "\n" not in prompt]
    return min(lines, key=lambda prompt: (not prompt.isascii(), len(prompt)), default="")
