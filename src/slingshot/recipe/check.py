"""What would stop a stage hours later, found before anything runs: inputs that are not there, tasks that cannot be
loaded.

check(config, "tuned", coming=["runs/mine/base"])       # SlingshotError: "tuned.data: my.jsonl does not exist"
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.hub import locate
from slingshot.tasks.loader import TaskConfig, load_task
from slingshot.training.identity import local_inputs


def check(config: StageConfig, where: str, coming: Collection[str] = ()) -> None:
    """All that the recipe and the disk tell of a stage's inputs; `coming` are those that earlier stages will make.

    SlingshotError begins with `where`. What is on the hub is not looked for.
    """
    try:
        for name, checkpoint in local_inputs(config.model_dump(mode="json")).items():
            if name not in coming and not (locate(name) if checkpoint else Path(name)).exists():
                raise SlingshotError(f"{name} does not exist")
        documents = getattr(config, "documents", None)
        tasks: list[TaskConfig] = getattr(config, "tasks", [])
        for task in [*tasks, *(documents.tasks if documents else [])]:
            loaded = load_task(task.name, **task.params)
            # The stages that train on what tasks write: pretrain, by its table documents, and sft, by its key style.
            if not loaded.has_solutions and (documents or getattr(config, "style", None)):
                raise SlingshotError(f"{task.name} writes no solutions to train on; take another task, or give data")
    except SlingshotError as error:
        raise SlingshotError(f"{where}: {error}") from error
