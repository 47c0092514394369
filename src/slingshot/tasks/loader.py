"""Tasks by name: `load_task`, the kinds there are, and how a recipe or a command line names them.

load_task("arithmetic", max_terms=6)          # or "countdown", "gym:chain_sum", "dataset:gsm8k", "path/to/file.py"
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.keys import Key, keys_of
from slingshot.base.names import did_you_mean
from slingshot.tasks.arithmetic import Arithmetic
from slingshot.tasks.code import Code
from slingshot.tasks.countdown import Countdown
from slingshot.tasks.dataset import DatasetTask
from slingshot.tasks.knights import Knights
from slingshot.tasks.multiplication import Multiplication
from slingshot.tasks.needle import Needle
from slingshot.tasks.reasoning_gym import Gym, gym_keys
from slingshot.tasks.task import GeneratedTask, Task
from slingshot.tasks.tool_task import ToolTask
from slingshot.tasks.user import UserTask

KINDS = {
    "arithmetic": "chains of + - x over small numbers, asked in English or Japanese; writes worked solutions",
    "code": "Python that hidden tests judge, with worked solutions",
    "code:SOURCE": "programs of a data set: humaneval, mbpp, livecodebench by name, code:mine.jsonl of your own",
    "countdown": "reach a target with given numbers; writes worked solutions that search in a fixed order",
    "knights": "knights and knaves: who is which follows from what they say; writes worked solutions, case by case",
    "multiplication": "products of numbers of several digits; writes worked solutions, digit by digit",
    "needle": "a number that stands somewhere in a long text is asked for at its end",
    "gym:NAME": "any dataset of reasoning-gym; gym:chain_sum writes worked solutions",
    "dataset:SOURCE": "problems of a data set: gsm8k, math-500 and others by name, a hub's org/name, your own file",
    "path/to/file.py": "your own: one file with problems(split, seed) and verify(problem, text)",
}


class TaskConfig(Strict):
    """A task as recipes name it: what `load_task` takes, and its share where several are mixed. A text is its name.

    `tools` are what the model may call (docs/tools.md), over `max_turns` responses at most; each observation is told
    in `observation_tokens` at most.
    """

    name: str
    weight: float = Field(1.0, gt=0)
    params: dict[str, Any] = {}
    tools: list[str] = []
    max_turns: int = Field(4, ge=2)
    observation_tokens: int = Field(256, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    def load(self) -> Task:
        """The task, with its tools where it has some. Raises SlingshotError where one cannot be had."""
        task = load_task(self.name, **self.params)
        return ToolTask.load(task, self.tools, self.max_turns, self.observation_tokens) if self.tools else task


def load_task(name: str, **params: Any) -> Task:
    """The task called `name`, one of KINDS. Raises SlingshotError for an unknown name or parameter."""
    if name.startswith("gym:"):
        return Gym.load(name.removeprefix("gym:"), params)
    kind, _, source = name.partition(":")
    given = {"source": source} | params if source else params
    if kind == "code" and "source" in given:
        return DatasetTask.load({"verifier": "code"} | given)
    if kind == "code":
        return Code.load(params)
    if kind == "dataset":
        return DatasetTask.load(given)
    return UserTask.load(name, params) if name.endswith(".py") else _generated(name).parse(params, name)


def task_keys(name: str) -> list[Key]:
    """The parameters of a task; of "gym", what datasets there are. Raises SlingshotError for an unknown name."""
    if name in ("gym", "gym:NAME"):
        return gym_keys()
    if name.startswith("gym:"):
        return gym_keys(name.removeprefix("gym:"))
    if name.partition(":")[0] == "dataset" or name.startswith("code:"):
        return list(keys_of(DatasetTask))
    kind = UserTask if name.endswith(".py") else Code if name == "code" else _generated(name)
    return [key for key in keys_of(kind) if key.name != "path"]


def _generated(name: str) -> type[GeneratedTask]:
    every: list[type[GeneratedTask]] = [Arithmetic, Countdown, Knights, Multiplication, Needle]
    kinds = {kind.__name__.lower(): kind for kind in every}
    if name not in kinds:
        there_are = f"there are: {', '.join(KINDS)}"
        raise SlingshotError(f"task {name!r:.80} is unknown; {did_you_mean(name, KINDS, there_are)}")
    return kinds[name]
