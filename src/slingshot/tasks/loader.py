"""Tasks by name: `load_task`, the kinds there are, and how a recipe or a command line names them.

load_task("arithmetic", max_terms=6)          # or "countdown", "gym:chain_sum", "path/to/file.py"
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from slingshot.base.config import Strict
from slingshot.base.keys import Key, keys_of
from slingshot.base.names import unknown_name
from slingshot.tasks.arithmetic import Arithmetic
from slingshot.tasks.countdown import Countdown
from slingshot.tasks.reasoning_gym import Gym, gym_keys
from slingshot.tasks.task import Task
from slingshot.tasks.user import UserTask

KINDS = {
    "arithmetic": "chains of + - x over small numbers, asked in English or Japanese; writes worked solutions",
    "countdown": "reach a target with given numbers; writes worked solutions that try, fail and try again",
    "gym:NAME": "any dataset of reasoning-gym; gym:chain_sum writes worked solutions",
    "path/to/file.py": "your own: one file with problems(split, seed) and verify(problem, text)",
}


class TaskConfig(Strict):
    """A task as recipes name it: what `load_task` takes, and its share where several are mixed. A text is its name."""

    name: str
    weight: float = Field(1.0, gt=0)
    params: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


# Several tasks, or one without brackets: tasks=arithmetic, tasks=["a.py", "b.py"], tasks=[{name = "a.py", weight = 2}].
TaskConfigs = Annotated[
    list[TaskConfig], BeforeValidator(lambda given: [given] if isinstance(given, str | dict) else given)
]


def load_task(name: str, **params: Any) -> Task:
    """The task called `name`, one of KINDS. Raises SlingshotError for an unknown name or parameter."""
    if name == "arithmetic":
        return Arithmetic.parse(params, name)
    if name == "countdown":
        return Countdown.parse(params, name)
    if name.startswith("gym:"):
        return Gym.load(name.removeprefix("gym:"), params)
    if name.endswith(".py"):
        return UserTask.load(name, params)
    raise unknown_name("task", name, KINDS)


def task_keys(name: str) -> list[Key]:
    """The parameters of a task; of "gym", what datasets there are. Raises SlingshotError for an unknown name."""
    if name in ("gym", "gym:NAME"):
        return gym_keys()
    if name.startswith("gym:"):
        return gym_keys(name.removeprefix("gym:"))
    if name.endswith(".py"):
        return [key for key in keys_of(UserTask) if key.name != "path"]
    if name not in ("arithmetic", "countdown"):
        raise unknown_name("task", name, KINDS)
    return list(keys_of(Arithmetic if name == "arithmetic" else Countdown))
