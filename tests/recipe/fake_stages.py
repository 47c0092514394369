"""The slingshot command with stages that do next to nothing, for the tests of the runner: python fake_stages.py run
recipe.toml --out X.

Every kind has the same config. `do` says what the stage's process does: "write" its artifact, "wait" for Ctrl-C or a
file named `go` beside its artifact, "refuse" (SlingshotError), "crash", or "vanish" (kill -9 of itself).
"""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import slingshot.recipe.report
from slingshot.base.config import StageConfig, Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import new_folder, write_json, write_text
from slingshot.cost.receipt import Meter
from slingshot.machine.machine import Machine
from slingshot.recipe import runner
from slingshot.stages.kinds import STAGES
from slingshot.tasks.loader import TaskConfig
from slingshot.training.identity import inputs


class Shape(Strict):
    width: int = 8
    height: int = 8


class Config(StageConfig):
    """A stage that does next to nothing."""

    model: str | None = None
    data: list[str] = []
    tasks: list[TaskConfig] = []
    text: str = ""
    lr: float = 0.1
    flops: float = 5.0
    shape: Shape = Shape()
    do: Literal["write", "wait", "refuse", "crash", "vanish"] = "write"


def _content(path: Path) -> str:
    return (path / "content.json" if path.is_dir() else path).read_text()


def run_kind(kind: str, config: Config, out: Path) -> None:
    partial = out.with_name(f"{out.name}.partial")
    if config.do == "wait":
        write_text(partial / "pid", str(os.getpid()))
        try:
            while not out.with_name("go").exists():
                time.sleep(0.02)
        except KeyboardInterrupt:
            write_text(partial / "saved", "")
            raise
    if config.do == "refuse":
        raise SlingshotError("no such luck; try again")
    if config.do == "crash":
        raise ZeroDivisionError
    if config.do == "vanish":
        os.kill(os.getpid(), signal.SIGKILL)
    parents = list(inputs(config).values())
    meter = Meter()
    meter.add(tokens=1500, all=config.flops)
    with new_folder(out) as folder:
        # What a stage makes depends on its config and on what its parents hold.
        write_json(folder / "content.json", [config.lr, config.seed, [_content(path) for path in parents]])
        if kind == "evaluate":
            score = {"pass@1": 0.5, "ci95": [0.4, 0.6], "pass@8": None, "mean_tokens": 3.0, "format": 1.0, "n": 4}
            wrong = {"prompt": "1+1=", "answer": "2", "reasoning": "hm", "response": "3", "correct": False}
            right = wrong | {"prompt": "What is 2+2?", "reasoning": "two and two", "response": "4", "correct": True}
            write_json(folder / "evaluation.json", {"tasks": {"sums": score}, "examples": {"sums": [wrong, right]}})
        else:
            write_text(folder / "metrics.jsonl", json.dumps({"step": 1, "loss": 0.25}) + "\n")
        machine = Machine(cpu="none", cores=1, memory_bytes=1)
        meter.receipt(kind, out.name, config.model_dump(mode="json"), parents, folder, machine).write(folder)


FAKES: dict[str, Any] = {
    kind: SimpleNamespace(
        config=Config, run=partial(run_kind, kind), what=real.what, makes_checkpoint=real.makes_checkpoint
    )
    for kind, real in STAGES.items()
}


if __name__ == "__main__":
    from slingshot.cli.main import main

    STAGES.update(FAKES)
    runner.PROGRAM = [__file__]
    runner.LOCK_SECONDS = 1.0
    slingshot.recipe.report.build = lambda run: {}
    main()
