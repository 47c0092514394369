"""`slingshot chat PATH --tools calculator,python`: what a model in the terminal may call.

tools = ChatTools.open("calculator,search:notes", tokenizer)
ids = tools.prompt(messages)                              # the model is told of them
calls = tools.calls(ids, said)
ids = tools.after(ids + said, calls, list(map(tools.ask, calls)))     # what it goes on from; what it said stays
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slingshot.base.errors import SlingshotError
from slingshot.environments.tool import observation
from slingshot.environments.toolbox import ask, toolbox
from slingshot.sandbox.worker import SandboxError, Target, Worker
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolCall, ToolFormat, tool_format
from slingshot.text.turns import cut_text, read_turn, told_calls, turn_suffix


@dataclass
class ChatTools:
    """Tools in a worker of their own, for answers of `max_turns` turns, each observation of so many tokens."""

    tokenizer: Tokenizer
    form: ToolFormat
    worker: Worker
    box: Target
    schemas: list[dict[str, Any]]
    max_turns: int = 8
    observation_tokens: int = 2048

    @classmethod
    def open(cls, named: str, tokenizer: Tokenizer) -> Self:
        """Raises SlingshotError for a tool that is not to be had, and a model that knows none."""
        if (form := tool_format(tokenizer)) is None:
            raise SlingshotError("--tools: this model's chat template knows no tools; leave them out")
        # A comma within a command is one where no tool's name follows it.
        specs = re.split(r",(?=calculator$|calculator,|python$|python,|search:|mcp:|[^,:]+\.py)", named)
        worker, box = Worker(), toolbox(specs)
        try:
            return cls(tokenizer, form, worker, box, worker.call(box, "schemas"))
        except SandboxError as error:
            raise SlingshotError(f"--tools: {error}") from error

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.tokenizer.encode_chat(messages, tools=self.schemas)

    def calls(self, prompt: Sequence[int], said: Sequence[int]) -> list[ToolCall]:
        """What was called in the ids of an answer."""
        return read_turn(said, ends_in_reasoning(prompt, self.tokenizer), self.tokenizer, self.form)[1]

    def ask(self, call: ToolCall) -> str:
        return ask(self.worker, self.box, call.name, call.arguments)

    def after(self, ids: list[int], calls: Sequence[ToolCall], said: Sequence[str]) -> list[int]:
        """What the model goes on from, once it is told what the tools said."""
        cut = [cut_text(self.tokenizer, each, self.observation_tokens) for each in said]
        told = list(map(observation, told_calls(calls), cut))
        return [*ids, *turn_suffix(self.tokenizer, told, calls)]
