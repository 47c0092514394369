"""Tasks by name: `load_task`, the kinds there are, and how a recipe names one.

load_task("arithmetic", max_terms=6)          # or "countdown", "gym:chain_sum", "path/to/file.py"
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from slingshot.base.config import Strict
from slingshot.base.names import unknown_name
from slingshot.tasks.arithmetic import Arithmetic
from slingshot.tasks.countdown import Countdown
from slingshot.tasks.reasoning_gym import Gym
from slingshot.tasks.task import Task
from slingshot.tasks.user import UserTask


class TaskConfig(Strict):
    """A task as recipes name it: what `load_task` takes, and its share where several are mixed."""

    name: str
    weight: float = Field(1.0, gt=0)
    params: dict[str, Any] = {}


def load_task(name: str, **params: Any) -> Task:
    """The task called `name`: "arithmetic", "countdown", "gym:NAME" (any reasoning-gym dataset) or the path of a user's .py file.

    Raises SlingshotError for an unknown name or parameter, and names the nearest known one.
    """
    if name == "arithmetic":
        return Arithmetic.parse(params, name)
    if name == "countdown":
        return Countdown.parse(params, name)
    if name.startswith("gym:"):
        return Gym.load(name.removeprefix("gym:"), params)
    if name.endswith(".py"):
        return UserTask.load(name, params)
    raise unknown_name("task", name, ("arithmetic", "countdown", "gym:NAME", "path/to/file.py"))
