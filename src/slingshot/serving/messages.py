"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them and Claude Code asks them.

question = MessageRequest.model_validate(body).question()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from slingshot.serving.chat_completions import REASONER, Effort, Thinking, told_effort
from slingshot.serving.errors import ApiError
from slingshot.serving.question import Question, joined, role_of, text_of
from slingshot.serving.responses import TextFormat
from slingshot.serving.sampling_fields import SamplingFields
from slingshot.serving.tools import read_choice, read_tools

_BILLING = "x-anthropic-billing-header"  # Claude Code's first line: other with every request, so nothing were cached


class OutputConfig(BaseModel):
    effort: Effort | None = None
    format: TextFormat | None = None


class ToolChoice(BaseModel):
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(SamplingFields):
    """What clients send, but for max_tokens."""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop_sequences: list[str] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: TextFormat | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None

    @model_validator(mode="after")
    def _by_other_names(self) -> CountTokensRequest:
        if self.n not in (None, 1):
            raise ValueError("n is not of this API: ask again for another answer")
        self.stop = self.stop_sequences
        if wanted := (self.output_config and self.output_config.format) or self.output_format:
            self.response_format = wanted.in_chat()
        return self

    def question(self) -> Question:
        """As the gateway takes it; ApiError 400 for what contradicts itself."""
        thinking = None if self.thinking is None else self.thinking.on
        budget = self.thinking.budget_tokens if self.thinking and thinking else None
        effort = self.output_config.effort if self.output_config and thinking is not False else None
        offered = _tools(self.tools)
        tools = read_tools(offered)
        messages = joined(chat_messages(self.messages, self.system))
        return Question(
            self.model,
            messages=messages,
            params=self.sampling(REASONER, thinking_budget=budget),
            most=self.max_tokens,
            thinking=False if effort == "none" else thinking,
            effort=told_effort(effort),
            tools=tools,
            parallel=not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
            **read_choice(_choice(self.tool_choice), offered, tools),
            continues=messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
            seeded=self.seed is not None,
        )


class MessageRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)


def _choice(given: ToolChoice | None) -> Any:
    if given is None:
        return None
    return {"name": given.name} if given.type == "tool" else "required" if given.type == "any" else given.type


def _tools(given: list[Any] | None) -> list[Any] | None:
    """As OpenAI has them. Those with a type of their own run at Anthropic, and are passed over like OpenAI's."""
    if given is None:
        return None
    read: list[Any] = []
    for tool in given:
        if isinstance(tool, Mapping) and tool.get("type") in (None, "custom"):
            its = {key: tool.get(key) for key in ("name", "description", "strict")}
            read.append({"type": "function", "function": its | {"parameters": tool.get("input_schema")}})
        else:
            read.append(tool)
    return read


def chat_messages(
    messages: list[dict[str, Any]], system: str | list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The conversation as chat templates read it: results of calls are messages of their own there."""
    told: list[dict[str, Any]] = []
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else list(system or ())
    if blocks and str(blocks[0].get("text")).startswith(_BILLING):
        behind = str(blocks[0]["text"]).partition("\n")[2]  # of a client that sends one text
        blocks[:1] = [{"type": "text", "text": behind}] if behind else []
    if blocks and (text := text_of(blocks, "system")):
        told.append({"role": "system", "content": text})
    for place, message in enumerate(messages):
        where, content = f"messages.{place}", message.get("content")
        role = role_of(message, ("user", "assistant", "system"), where)
        said = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(said, list) or not all(isinstance(block, dict) for block in said):
            raise ApiError(400, f"{where}.content: content is text, or a list of blocks", param=f"{where}.content")
        told += [_assistant(said, where)] if role == "assistant" else _others(role, said, where)
    return told


def _assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    content = reasoning = ""
    calls = []
    for number, block in enumerate(blocks):
        its, kind = f"{where}.content.{number}", block.get("type")
        if kind == "thinking":
            reasoning += text_of(block.get("thinking"), its)
        elif kind == "tool_use":
            if not isinstance(block.get("id"), str) or not isinstance(block.get("name"), str):
                raise ApiError(400, f"{its}: a tool_use has an id, a name and an input", param=its)
            function = {"name": block["name"], "arguments": block.get("input") or {}}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind != "redacted_thinking":
            content += text_of([block], its)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message | ({"tool_calls": calls} if calls else {})


def _others(role: str, blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """A message of the user's or the system's, and what functions gave in between."""
    told: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        its = f"{where}.content.{number}"
        if block.get("type") == "tool_result":
            if not isinstance(block.get("tool_use_id"), str):
                raise ApiError(400, f"{its}: a tool_result has a tool_use_id", param=its)
            result = text_of(block.get("content") or "", its)
            told.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": result})
        elif told and told[-1]["role"] == role:
            told[-1]["content"] += "\n" + text_of([block], its)
        else:
            told.append({"role": role, "content": text_of([block], its)})
    return told or [{"role": role, "content": ""}]
