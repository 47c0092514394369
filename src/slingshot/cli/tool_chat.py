"""`slingshot chat PATH --tools calculator,python`: what a model in the terminal may call.

tools = ChatTools.open("calculator,search:notes", tokenizer)
ids = tools.prompt(tokenizer, messages)                              # the model is told of them
ids = tools.after(tokenizer, ids + said, calls, observations)        # what it goes on from; nothing it said is redone
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slingshot.base.errors import SlingshotError
from slingshot.environments.tool import failure
from slingshot.environments.toolbox import ask, toolbox
from slingshot.sandbox.worker import SandboxError, Target, Worker
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_calls import ToolCall, tool_format
from slingshot.text.turns import cut_text, read_turn, turn_suffix


@dataclass
class ChatTools:
    """Tools in a worker of their own, for answers of `max_turns` turns, each observation of so many tokens."""

    worker: Worker
    box: Target
    schemas: list[dict[str, Any]]
    max_turns: int = 8
    observation_tokens: int = 2048

    @classmethod
    def open(cls, named: str, tokenizer: Tokenizer) -> Self:
        """Raises SlingshotError for a tool that is not to be had, and a model that knows none."""
        if tool_format(tokenizer) is None:
            raise SlingshotError("--tools: this model's chat template knows no tools; leave them out")
        # A comma within a command is one where no tool's name follows it.
        specs = re.split(r",(?=calculator$|calculator,|python$|python,|search:|mcp:|[^,:]+\.py)", named)
        worker, box = Worker(), toolbox(specs)
        try:
            return cls(worker, box, worker.call(box, "schemas"))
        except SandboxError as error:
            raise SlingshotError(f"--tools: {error}") from error

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return tokenizer.encode_chat(messages, tools=self.schemas)

    def begin(self, tokenizer: Tokenizer) -> str:
        """With what a call begins, where that is more than a bracket."""
        form = tool_format(tokenizer)
        return form.begin if form else ""

    def calls(self, tokenizer: Tokenizer, prompt: Sequence[int], said: Sequence[int]) -> list[ToolCall]:
        """What was called in the ids of an answer."""
        return read_turn(said, ends_in_reasoning(prompt, tokenizer), tokenizer, tool_format(tokenizer))[1]

    def ask(self, call: ToolCall) -> str:
        if not call.name:
            return failure(f"this is no call of a tool: {call.arguments}")
        return ask(self.worker, self.box, call.name, call.arguments)

    def after(
        self, tokenizer: Tokenizer, ids: list[int], calls: Sequence[ToolCall], observations: Sequence[str]
    ) -> list[int]:
        told = [
            {"role": "tool", "name": call.name, "content": cut_text(tokenizer, said, self.observation_tokens),
             "tool_call_id": f"call_{number}"}
            for number, (call, said) in enumerate(zip(calls, observations, strict=True), start=1)
        ]  # fmt: skip
        return [*ids, *turn_suffix(tokenizer, told, calls)]
