"""A task whose model may call tools: the problems and the verifier are another task's, the turns are the calls'.

    task = ToolTask.load(load_task("arithmetic"), ["calculator"], max_turns=4, observation_tokens=256)
    task.step(problem, [..., {"role": "assistant", "content": "", "tool_calls": [...]}])
    # [{"role": "tool", "content": "42", "tool_call_id": "call_1", "name": "calculator"}]

Tools run in a worker (environments/toolbox.py). A response without a call is the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from pydantic import PrivateAttr

from slingshot.base.errors import SlingshotError
from slingshot.environments.tool import failure, observation
from slingshot.environments.toolbox import ask, toolbox
from slingshot.sandbox.worker import Target, Worker
from slingshot.tasks.task import Problem, Reward, Solution, Split, Style, Task
from slingshot.tasks.verification import IsolatedTask

_AT_ONCE = 8  # calls of a response that are answered


class ToolTask(IsolatedTask):
    """`task` with tools. The conversation is over at an answer, or after `max_turns` responses."""

    task: Task
    specs: tuple[str, ...]
    max_turns: int
    most_tokens: int
    _tools: list[dict[str, Any]] = PrivateAttr()

    @classmethod
    def load(cls, task: Task, specs: Sequence[str], max_turns: int, observation_tokens: int) -> Self:
        """Raises SlingshotError for a tool that is unknown or does not start."""
        made = cls(task=task, specs=tuple(specs), max_turns=max_turns, most_tokens=observation_tokens)
        made._tools = made.call("schemas", doing="")
        return made

    def on(self, worker: Worker) -> Self:
        made = super().on(worker)
        return made.model_copy(update={"task": self.task.on(worker)}) if isinstance(self.task, IsolatedTask) else made

    @property
    def target(self) -> Target:
        return toolbox(self.specs)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self._tools

    @property
    def observation_tokens(self) -> int | None:
        return self.most_tokens

    @property
    def has_turns(self) -> bool:
        return True

    def step(self, problem: Problem, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        calls = messages[-1].get("tool_calls") or ()
        if sum(message["role"] == "assistant" for message in messages) >= self.max_turns:
            return None
        if not calls:
            return self.task.step(problem, messages)
        return [self._answer(call, place) for place, call in enumerate(calls)]

    def _answer(self, call: Mapping[str, Any], place: int) -> dict[str, Any]:
        if place >= _AT_ONCE:
            return observation(call, failure(f"{_AT_ONCE} calls are answered at once; ask again"))
        return observation(call, ask(self._worker, self.target, **call["function"]))

    def solution(self, problem: Problem, style: Style, rng: random.Random) -> Solution:
        """In style "calls" by what the task itself would call; else the task's own, without any."""
        if style != "calls":
            return self.task.solution(problem, style, rng)
        names = {tool["function"]["name"] for tool in self._tools}
        calls = tuple(call for call in self.task.calls(problem) if call.name in names)
        if not calls:
            raise SlingshotError(f"{self.name}: writes no solutions with calls of {', '.join(sorted(names))}")
        return Solution("", problem.answer, calls)

    def write(self, problem: Problem, style: Style, rng: random.Random, language_mix: float = 0.0) -> Solution:
        if style == "calls":
            return self.solution(problem, style, rng)
        return self.task.write(problem, style, rng, language_mix)

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def is_given(self) -> bool:
        return self.task.is_given

    @property
    def has_solutions(self) -> bool:
        return self.task.has_solutions

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return self.task.problems(split, seed)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        return self.task.verify(problem, text, lenient)
