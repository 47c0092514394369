"""POST /v1/chat/completions, as OpenAI has it, with DeepSeek's reasoning_content.

question = ChatCompletionRequest.model_validate(body).question()
chat_completion(exchange), or chunks(exchange, ...) where it is streamed
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.serving.answer import Piece
from slingshot.serving.errors import ApiError
from slingshot.serving.gateway import Exchange
from slingshot.serving.ledger import Usage
from slingshot.serving.question import Question
from slingshot.serving.sse import to_json

REASONER = {"temperature": 0.6, "top_p": 0.95}  # R1's recommended settings, where a client sets none


class StreamOptions(BaseModel):
    include_usage: bool = False


class Thinking(BaseModel):
    """DeepSeek's switch; budget_tokens is Anthropic's."""

    type: Literal["enabled", "disabled", "adaptive"] = "enabled"
    budget_tokens: int | None = Field(None, ge=0)


class ChatCompletionRequest(BaseModel):
    """What clients send. Keys that are not known here are tolerated; those that would change the answer are."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, float] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    thinking: Thinking | None = None

    def question(self) -> Question:
        """As the gateway takes it; ApiError 400 for what contradicts itself."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        given = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                         "repetition_penalty", "logit_bias", "top_logprobs", "seed")
            if getattr(self, name) is not None
        }  # fmt: skip
        if given.get("top_k") == -1:
            given["top_k"] = 0
        thinking = self.thinking
        if thinking is not None and thinking.budget_tokens is not None:
            given["thinking_budget"] = thinking.budget_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            params = SamplingParams(**REASONER | given | {"n": self.n, "stop": stop})
        except SlingshotError as error:
            raise ApiError(400, str(error)) from error
        return Question(
            self.model,
            messages=self.messages,
            params=params,
            most=self.max_completion_tokens or self.max_tokens,
            thinking=None if thinking is None else thinking.type != "disabled",
            continues=bool(self.messages[-1].get("prefix")),
            seeded=self.seed is not None,
        )


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


def _logprobs(exchange: Exchange, pieces: list[Piece]) -> dict[str, Any]:
    told: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
    detokenizer = exchange.model.tokenizer.detokenizer

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        raw = detokenizer.bytes_of(token_id)
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(raw)}

    for piece in pieces:
        for token in piece.tokens:
            top = [named(*pair) for pair in token.top_logprobs.items()]
            kind = "reasoning_content" if piece.kind == "reasoning" else "content"
            told[kind].append(named(token.id, token.logprob) | {"top_logprobs": top})
    return {**told, "refusal": None}


async def chat_completion(exchange: Exchange, logprobs: bool) -> dict[str, Any]:
    """The answer in one object."""
    pieces: list[list[Piece]] = [[] for _ in exchange.answers]
    async for sample, piece in exchange.pieces():
        pieces[sample].append(piece)
    choices = []
    for index, (answer, its) in enumerate(zip(exchange.answers, pieces, strict=True)):
        reasoning = "".join(piece.text for piece in its if piece.kind == "reasoning")
        content = "".join(piece.text for piece in its if piece.kind == "content")
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if reasoning:
            message["reasoning_content"] = reasoning
        choice = {"index": index, "message": message, "finish_reason": answer.finish_reason}
        choices.append(choice | {"logprobs": _logprobs(exchange, its) if logprobs else None})
    return {
        "id": f"chatcmpl-{exchange.id}",
        "object": "chat.completion",
        "created": exchange.created,
        "model": exchange.model.name,
        "choices": choices,
        "usage": usage_of(exchange.usage),
    }


async def chunks(exchange: Exchange, logprobs: bool, include_usage: bool) -> AsyncGenerator[str, None]:
    """The answer as events: one kind of text a chunk, then the finish reasons, then the usage where asked for."""
    head = {
        "id": f"chatcmpl-{exchange.id}",
        "object": "chat.completion.chunk",
        "created": exchange.created,
        "model": exchange.model.name,
    }

    def event(index: int, delta: dict[str, Any], reason: str | None = None, told: Any = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}
        return f"data: {to_json(head | {'choices': [choice]})}\n\n"

    try:
        for index in range(len(exchange.answers)):
            yield event(index, {"role": "assistant", "content": ""})
        async for sample, piece in exchange.pieces():
            name = "reasoning_content" if piece.kind == "reasoning" else "content"
            yield event(sample, {name: piece.text}, None, _logprobs(exchange, [piece]) if logprobs else None)
        for index, answer in enumerate(exchange.answers):
            yield event(index, {}, answer.finish_reason)
        if include_usage:
            yield f"data: {to_json(head | {'choices': [], 'usage': usage_of(exchange.usage)})}\n\n"
    except SlingshotError as error:
        yield f"data: {to_json(ApiError(400, str(error)).body)}\n\n"
    yield "data: [DONE]\n\n"
