"""Documents of pre-training in which a tool is called: question, call, what the tool said, answer, as chat turns.

document = ToolDocument.write(task, problem, solution)       # the task's worker is asked what its tools say
ids = document.encode(tokenizer)                             # as a rollout would have it, the end token included
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slingshot.base.errors import SlingshotError
from slingshot.tasks.task import Problem, Solution, Task
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolCall, tool_format
from slingshot.text.turns import cut_text, encode_calling, told_calls, turn_suffix


@dataclass(frozen=True)
class ToolDocument:
    """A question to a model that is told of `tools`, the answer, and where it calls some, what they said before it."""

    prompt: str
    tools: Sequence[Mapping[str, Any]]
    solution: Solution
    observations: Sequence[Mapping[str, Any]]
    most: int | None = None  # tokens of an observation, as the task bounds it

    @classmethod
    def write(cls, task: Task, problem: Problem, solution: Solution) -> Self:
        calls = told_calls([ToolCall(*call) for call in solution.calls])
        chat: list[dict[str, Any]] = [{"role": "user", "content": problem.prompt}]
        chat += [{"role": "assistant", "content": "", "tool_calls": calls}]
        told = (task.step(problem, chat) or []) if calls else []
        return cls(problem.prompt, task.tools, solution, told, task.observation_tokens)

    @property
    def texts(self) -> Iterator[str]:
        """What a tokenizer is to be trained on."""
        yield self.prompt
        yield self.solution.reasoning
        for call, said in zip(self.solution.calls, self.observations, strict=True):
            yield f"{call.name} {call.arguments}"
            yield said["content"]
        yield self.solution.answer

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the whole."""
        if tool_format(tokenizer) is None:
            raise SlingshotError("this tokenizer's chat template knows no tools; leave `tokenizer` out to train one")
        ids = tokenizer.encode_chat([{"role": "user", "content": self.prompt}], tools=list(self.tools))
        reasoning, calls = self.solution.reasoning, [ToolCall(*call) for call in self.solution.calls]
        if calls:
            cut = [{**each, "content": cut_text(tokenizer, each["content"], self.most)} for each in self.observations]
            ids += encode_calling(tokenizer, reasoning, "", calls, opened=True)
            ids += turn_suffix(tokenizer, cut, calls)
            reasoning = ""
        return ids + encode_calling(tokenizer, reasoning, self.solution.answer, (), opened=True)
