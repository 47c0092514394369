"""POST /v1/chat/completions, as OpenAI has it, with DeepSeek's reasoning_content.

    question = ChatCompletionRequest.model_validate(body).question()
    chat_completion(exchange, told), or chunks(exchange, told) where it is streamed; told: what of it the client reads

How much a model reasons: `thinking` (DeepSeek's and Anthropic's), `reasoning_effort` (OpenAI's; as DeepSeek maps it,
minimal is low, medium and xhigh are high), and a budget in tokens by any of its names.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slingshot.serving.answer import AnswerStream, Piece
from slingshot.serving.errors import ApiError
from slingshot.serving.exchange import Exchange
from slingshot.serving.ledger import Usage
from slingshot.serving.question import Question, plain_messages
from slingshot.serving.sampling_fields import SamplingFields
from slingshot.serving.sse import DONE, choice_events, plain_event
from slingshot.serving.tools import read_choice, read_tools, told_call

REASONER = {"temperature": 0.6, "top_p": 0.95}  # R1's recommended settings, where a client sets none
LEAST_LOGPROB = -9999.0  # what DeepSeek and OpenAI write for one that JSON cannot hold

_EFFORTS = {"none": None, "minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]


def told_effort(asked: Effort | None) -> str | None:
    """As templates read it."""
    return None if asked is None else _EFFORTS.get(asked, asked)


class Thinking(BaseModel):
    """DeepSeek's switch; budget_tokens is Anthropic's."""

    type: Literal["enabled", "disabled", "adaptive"] = "enabled"
    budget_tokens: int | None = Field(None, ge=0)

    @property
    def on(self) -> bool | None:
        return None if self.type == "adaptive" else self.type == "enabled"


class TemplateArguments(BaseModel):
    """vLLM's chat_template_kwargs: DeepSeek's name for the switch, and Qwen's."""

    model_config = ConfigDict(extra="forbid")
    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatCompletionRequest(SamplingFields):
    """What clients send."""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    thinking_token_budget: int | None = Field(None, ge=-1)
    thinking_budget: int | None = Field(None, ge=-1)
    chat_template_kwargs: TemplateArguments | None = None
    think: bool | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    glass: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        switches = {its for its in self._switches() if its is not None}
        if len(switches) > 1:
            raise ValueError("thinking and reasoning_effort contradict each other: give one of them")
        return self

    def question(self) -> Question:
        """As the gateway takes it; ApiError 400 for what contradicts itself."""
        messages = plain_messages(self.messages)
        continues = bool(self.messages[-1].get("prefix") or self.continue_final_message)
        if continues and messages[-1]["role"] != "assistant":
            raise ApiError(400, "prefix: only an assistant's message is gone on with, as the last", param="messages")
        tools = read_tools(self.tools)
        return Question(
            self.model,
            messages=messages,
            params=self.sampling(REASONER, top_logprobs=self.top_logprobs or 0, thinking_budget=self._budget()),
            most=self.max_completion_tokens or self.max_tokens,
            thinking=next((its for its in self._switches() if its is not None), None),
            effort=told_effort(self.reasoning_effort),
            tools=tools,
            parallel=self.parallel_tool_calls is not False,
            **read_choice(self.tool_choice, self.tools, tools),
            continues=continues,
            seeded=self.seed is not None,
            glass=bool(self.glass),
            logprobs=bool(self.logprobs),
        )

    def _switches(self) -> list[bool | None]:
        """Whether to reason, as each of the fields that say so has it."""
        thinking, template, effort = self.thinking, self.chat_template_kwargs, self.reasoning_effort
        return [
            None if thinking is None else thinking.on,
            None if template is None else template.thinking,
            None if template is None else template.enable_thinking,
            self.think,
            self.enable_thinking,
            False if effort == "none" else None if effort is None else True,
        ]

    def _budget(self) -> int | None:
        own = None if self.thinking is None else self.thinking.budget_tokens
        budgets = [its for its in (own, self.thinking_token_budget, self.thinking_budget) if its not in (None, -1)]
        return min(its for its in budgets if its is not None) if budgets else None


@dataclass(frozen=True)
class ToldToClient:
    """logprobs: of every token. glass: beside them its experts, [token][layer][experts], and whether it was drafted.
    usage: when the stream ends. also_reasoning: as `reasoning` too, vLLM's name for it."""

    logprobs: bool = False
    glass: bool = False
    usage: bool = False
    also_reasoning: bool = False

    def said(self, piece: Piece) -> dict[str, Any]:
        """A delta that tells of the piece."""
        if piece.call is not None:
            begun = {"id": piece.call.id, "type": "function"} if piece.begins else {}
            name = {"name": piece.call.name} if piece.begins else {}
            return {"tool_calls": [{"index": piece.call.number, **begun, "function": name | {"arguments": piece.text}}]}
        if piece.kind != "reasoning":
            return {"content": piece.text}
        return {"reasoning_content": piece.text} | ({"reasoning": piece.text} if self.also_reasoning else {})


def finish_reason(answer: AnswerStream) -> str | None:
    called = answer.finish_reason == "stop" and bool(answer.calls) and answer.calls[-1].whole
    return "tool_calls" if called else answer.finish_reason


def usage_of(usage: Usage) -> dict[str, Any]:
    """OpenAI's names and DeepSeek's; hit + miss = prompt."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        "prompt_cache_hit_tokens": usage.cached,
        "prompt_cache_miss_tokens": usage.prompt - usage.cached,
    }


def _of_tokens(exchange: Exchange, pieces: list[Piece], told: ToldToClient) -> dict[str, Any]:
    """What a choice says of its tokens."""
    extra: dict[str, Any] = {"logprobs": _logprobs(exchange, pieces) if told.logprobs else None}
    if told.glass:
        ordered = sorted(pieces, key=lambda piece: piece.kind != "reasoning")
        tokens = [token for piece in ordered for token in piece.tokens]
        extra["glass"] = {"experts": [its.experts for its in tokens], "drafted": [its.drafted for its in tokens]}
    return extra


def _logprobs(exchange: Exchange, pieces: list[Piece]) -> dict[str, Any]:
    told: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
    detokenizer = exchange.model.tokenizer.detokenizer

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        raw = detokenizer.bytes_of(token_id)
        token = raw.decode("utf-8", errors="replace")
        return {"token": token, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}

    for piece in pieces:
        for token in piece.tokens:
            top = [named(*pair) for pair in token.top_logprobs.items()]
            kind = "reasoning_content" if piece.kind == "reasoning" else "content"
            told[kind].append(named(token.id, token.logprob) | {"top_logprobs": top})
    return {**told, "refusal": None}


def head_of(exchange: Exchange, prefix: str, kind: str) -> dict[str, Any]:
    """What an answer, or a part of it, begins with."""
    return {"id": f"{prefix}-{exchange.id}", "object": kind, "created": exchange.created, "model": exchange.model.name}


async def chat_completion(exchange: Exchange, told: ToldToClient) -> dict[str, Any]:
    """The answer in one object."""
    pieces: list[list[Piece]] = [[] for _ in exchange.answers]
    async for sample, piece in exchange.pieces():
        pieces[sample].append(piece)
    choices = []
    for index, (answer, its) in enumerate(zip(exchange.answers, pieces, strict=True)):
        reasoning = "".join(piece.text for piece in its if piece.kind == "reasoning")
        content = "".join(piece.text for piece in its if piece.kind == "content")
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if answer.calls:
            message["tool_calls"] = [told_call(call) for call in answer.calls]
        if reasoning:
            message |= told.said(Piece("reasoning", reasoning))
        choice = {"index": index, "message": message, "finish_reason": finish_reason(answer)}
        choices.append(choice | _of_tokens(exchange, its, told))
    head = head_of(exchange, "chatcmpl", "chat.completion")
    return head | {"choices": choices, "usage": usage_of(exchange.usage)}


async def chunks(exchange: Exchange, told: ToldToClient) -> AsyncGenerator[str, None]:
    """The answer as events: one kind of text a chunk, then the finish reasons, then the usage where asked for."""
    head = head_of(exchange, "chatcmpl", "chat.completion.chunk")
    written = choice_events(head)

    def event(index: int, delta: dict[str, Any], reason: str | None = None, pieces: list[Piece] | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason}
        choice |= _of_tokens(exchange, pieces, told) if pieces else {"logprobs": None}
        return written(choice)

    begun = set[int]()
    async for sample, piece in exchange.pieces():
        if sample not in begun:
            begun.add(sample)
            yield event(sample, {"role": "assistant", "content": ""})
        yield event(sample, told.said(piece), None, [piece])
    for index, answer in enumerate(exchange.answers):
        role = {} if index in begun else {"role": "assistant", "content": ""}
        yield event(index, role, finish_reason(answer))
    if told.usage:
        yield plain_event(head | {"choices": [], "usage": usage_of(exchange.usage)})
    yield DONE


def error_events(error: ApiError) -> str:
    return plain_event(error.body) + DONE
