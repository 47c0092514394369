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
from slingshot.text.reasoning import encode_responses
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_calls import ToolCall, tool_format
from slingshot.text.turns import cut_text, encode_calls, told_calls, turn_suffix


@dataclass(frozen=True)
class ToolDocument:
    """A question to a model that is told of `tools`, the answer, and where it calls some, what they said before it."""

    prompt: str
    tools: Sequence[Mapping[str, Any]]
    solution: Solution
    observations: Sequence[Mapping[str, Any]]

    @classmethod
    def write(cls, task: Task, problem: Problem, solution: Solution) -> Self:
        calls = told_calls([ToolCall(*call) for call in solution.calls])
        chat: list[dict[str, Any]] = [{"role": "user", "content": problem.prompt}]
        chat += [{"role": "assistant", "content": "", "tool_calls": calls}]
        return cls(problem.prompt, task.tools, solution, (task.step(problem, chat) or []) if calls else [])

    @property
    def texts(self) -> Iterator[str]:
        """What a tokenizer is to be trained on."""
        yield self.prompt
        yield self.solution.reasoning
        for call, said in zip(self.solution.calls, self.observations, strict=True):
            yield f"{call.name} {call.arguments}"
            yield said["content"]
        yield self.solution.answer

    def encode(self, tokenizer: Tokenizer, most_tokens: int | None = None) -> list[int]:
        """Ids of the whole. most_tokens: of an observation, as the task cuts it."""
        if (form := tool_format(tokenizer)) is None:
            raise SlingshotError("this tokenizer's chat template knows no tools; leave `tokenizer` out to train one")
        ids = tokenizer.encode_chat([{"role": "user", "content": self.prompt}], tools=list(self.tools))
        reasoning, answer = self.solution.reasoning, self.solution.answer
        if self.solution.calls:
            calls = [ToolCall(*call) for call in self.solution.calls]
            (said,) = encode_responses(tokenizer, [(reasoning, "")], opened=True)
            said = [*said[:-1], *encode_calls(tokenizer, form, calls), said[-1]]
            told = [
                {**each, "content": cut_text(tokenizer, each["content"], most_tokens)} for each in self.observations
            ]
            ids, reasoning = [*ids, *said, *turn_suffix(tokenizer, told, calls)], ""
        (said,) = encode_responses(tokenizer, [(reasoning, answer)], opened=True)
        return [*ids, *said]
