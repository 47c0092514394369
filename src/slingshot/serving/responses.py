"""POST /v1/responses, as OpenAI has it and the Codex CLI asks it: each request holds the whole conversation.

    question = ResponseRequest.model_validate(body).question()

Nothing is stored, so that an answer cannot be named in a later request. A response is a list of items: reasoning, a
message, a call; those that follow one another are one turn of the chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, model_validator

from slingshot.serving.chat_completions import REASONER, Effort, told_effort
from slingshot.serving.errors import ApiError
from slingshot.serving.question import Question, joined, role_of, text_of
from slingshot.serving.sampling_fields import JsonSchemaFormat, ResponseFormat, SamplingFields
from slingshot.serving.sse import to_json
from slingshot.serving.tools import read_choice, read_tools

Item = Mapping[str, Any]


class TextFormat(BaseModel):
    """The schema stands beside the type here."""

    type: str
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")

    def in_chat(self) -> ResponseFormat:
        """As the chat API has it."""
        given = None if self.schema_ is None else JsonSchemaFormat.model_validate({"schema": self.schema_})
        return ResponseFormat(type=self.type, json_schema=given)


class TextSettings(BaseModel):
    format: TextFormat | None = None


class ReasoningSettings(BaseModel):
    effort: Effort | None = None


class ResponseRequest(SamplingFields):
    """What clients send."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    @model_validator(mode="after")
    def _one_format(self) -> ResponseRequest:
        if self.n not in (None, 1):
            raise ValueError("n is not of this API: ask again for another answer")
        if self.text and self.text.format:
            self.response_format = self.text.format.in_chat()
        return self

    def question(self) -> Question:
        """As the gateway takes it; ApiError 400 for what this server cannot do."""
        for name in ("previous_response_id", "conversation", "prompt", "background"):
            if getattr(self, name):
                message = f"{name}: this server keeps nothing of earlier requests; send the whole conversation as input"
                raise ApiError(400, message, param=name)
        try:
            json.dumps(self.tools, ensure_ascii=False).encode()  # the answer tells of them
        except UnicodeEncodeError as error:
            raise ApiError(400, "tools: half a character; send whole ones", param="tools") from error
        effort = None if self.reasoning is None else self.reasoning.effort
        tools = read_tools(self.tools)
        return Question(
            self.model,
            messages=joined(chat_messages(self.input, self.instructions)),
            params=self.sampling(REASONER),
            most=self.max_output_tokens,
            thinking=None if effort is None else effort != "none",
            effort=told_effort(effort),
            tools=tools,
            parallel=self.parallel_tool_calls is not False,
            **read_choice(self.tool_choice, self.tools, tools),
            seeded=self.seed is not None,
        )


def chat_messages(given: str | list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation as chat templates read it. Items of an assistant that follow one another are one message, whose
    texts are joined as they were parted; a message or reasoning behind a message begins another."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    turn: dict[str, Any] | None = None  # the assistant's that may still grow
    last = ""
    for place, item in enumerate(given):
        where, kind = f"input.{place}", str(item.get("type") or "message")
        grown, other = _read_item(item, kind, where)
        if other is not None:
            turn = None
            messages.append(other)
            continue
        if turn is None or (last == "message" and kind in ("message", "reasoning")):
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        last = kind
        for name, value in grown.items():
            turn[name] = turn[name] + value if name in turn else value
    if not messages:
        raise ApiError(400, "input: it holds no item", param="input")
    return messages


def _read_item(item: Item, kind: str, where: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What an item adds to the assistant's message, or a message of its own."""

    def named(*names: str) -> list[str]:
        values = [item.get(name) for name in names]
        if not all(isinstance(value, str) for value in values):
            raise ApiError(400, f"{where}: an item {kind} has {', '.join(names)}, each a text", param=where)
        return [str(value) for value in values]

    if kind in ("function_call", "custom_tool_call"):
        id, name, arguments = named("call_id", "name", "arguments" if kind == "function_call" else "input")
        if kind == "custom_tool_call":
            arguments = to_json({"input": arguments})
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"tool_calls": [call]}, None
    if kind in ("function_call_output", "custom_tool_call_output"):
        output = text_of(item.get("output") or "", f"{where}.output")
        return {}, {"role": "tool", "tool_call_id": named("call_id")[0], "content": output}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
        reasoning = "".join(text for text in texts if isinstance(text, str))
        return ({"reasoning_content": reasoning} if reasoning else {}), None
    if kind != "message":
        raise ApiError(400, f"{where}: an item of type {kind!r:.80} is not read by this server", param=f"{where}.type")
    role, content = role_of(item, ("user", "assistant", "system", "developer"), where), item.get("content")
    if role == "assistant":
        parts = content if isinstance(content, list) else [content]
        return {"content": "".join(text_of([part], f"{where}.content") for part in parts)}, None
    return {}, {"role": "user" if role == "user" else "system", "content": text_of(content, f"{where}.content")}
