"""POST /v1/completions: text that is gone on with as it stands, as OpenAI has it.

    questions = body.questions()                                 # one a prompt; each becomes an exchange
    completion(exchanges, body), or completion_chunks(exchanges, body) where it is streamed

What the model says is one text here, tags included. With `suffix` it fills the hole between the two, where the model
has tokens for that. `echo` puts the prompt before the answer, with `logprobs` those of its tokens too; max_tokens 0 is
possible then: a token is computed and not shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from pydantic import Field, model_validator

from slingshot.serving.answer import AnswerStream, Piece
from slingshot.serving.chat_completions import LEAST_LOGPROB, head_of, usage_of
from slingshot.serving.exchange import Exchange
from slingshot.serving.ledger import Usage
from slingshot.serving.question import Question
from slingshot.serving.sampling_fields import SamplingFields
from slingshot.serving.sse import DONE, choice_events, plain_event
from slingshot.serving.together import together

Ids = list[int]
_PROMPTS = 128  # of one request


class CompletionRequest(SamplingFields):
    """What clients send."""

    model: str
    prompt: str | Ids | list[str] | list[Ids] = Field(union_mode="left_to_right")
    suffix: str | None = None
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    @model_validator(mode="after")
    def _agrees(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n or 1):
            raise ValueError("best_of is not supported by this server: leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is at least 1, or 0 with echo: true")
        if self.suffix is not None and self.echo:
            raise ValueError("echo and suffix contradict each other: leave one of them out")
        if not self.prompts or len(self.prompts) > _PROMPTS:
            raise ValueError(f"prompt is a text, token ids, or from 1 to {_PROMPTS} of either")
        return self

    @property
    def prompts(self) -> list[str] | list[Ids]:
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return [prompt] if one else prompt

    def questions(self) -> list[Question]:
        told = self.logprobs if self.echo else None
        params = self.sampling({}, top_logprobs=self.logprobs or 0, prompt_logprobs=told)
        most = self.max_tokens or (None if self.max_tokens is None else 1)
        asked = Question(self.model, suffix=self.suffix, params=params, most=most, seeded=self.seed is not None)
        return [replace(asked, prompt=prompt, logprobs=self.logprobs is not None) for prompt in self.prompts]


class _Choice:
    """One sample's text as it grows, the prompt before it where that is wanted, and OpenAI's logprobs of its tokens."""

    def __init__(self, exchange: Exchange, body: CompletionRequest) -> None:
        self._exchange, self._body, self._begun, self._offset = exchange, body, False, 0

    def grow(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What a client is told of these pieces."""
        exchange, text, told, wanted = self._exchange, "", list[dict[str, Any]](), self._body.logprobs is not None
        if not self._begun and self._body.echo:
            ids = exchange.prompt_ids
            text = exchange.model.tokenizer.decode(ids)
            if wanted:
                logprobs = exchange.prompt_logprobs or [None] * len(ids)
                tops = exchange.prompt_top_logprobs or [None] * len(ids)
                told += [self._token(*token) for token in zip(ids, logprobs, tops, strict=True)]
        self._begun = True
        if self._body.max_tokens != 0:
            text += "".join(piece.text for piece in pieces)
            tokens = [token for piece in pieces for token in piece.tokens] if wanted else []
            told += [self._token(token.id, token.logprob, token.top_logprobs) for token in tokens]
        lists = {name: [token[name] for token in told] for name in _OF_A_TOKEN} if wanted else None
        return {"text": text, "logprobs": lists}

    def _token(self, id: int, logprob: float | None, top: Mapping[int, float] | None) -> dict[str, Any]:
        offset, self._offset = self._offset, self._offset + len(self._named(id))
        others = None if top is None else {self._named(its): max(value, LEAST_LOGPROB) for its, value in top.items()}
        own = None if logprob is None else max(logprob, LEAST_LOGPROB)
        return dict(zip(_OF_A_TOKEN, (self._named(id), own, others, offset), strict=True))

    def _named(self, id: int) -> str:
        return self._exchange.model.tokenizer.detokenizer.bytes_of(id).decode("utf-8", errors="replace")


_OF_A_TOKEN = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def _sum(exchanges: Sequence[Exchange]) -> Usage:
    its = [astuple(exchange.usage) for exchange in exchanges]
    return Usage(*map(sum, zip(*its, strict=True)))


async def _pieces(exchanges: Sequence[Exchange]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(index of the choice, piece) of all prompts, which run together."""
    samples = len(exchanges[0].answers)

    async def numbered(first: int, exchange: Exchange) -> AsyncGenerator[tuple[int, Piece], None]:
        async with contextlib.aclosing(exchange.pieces()) as pieces:
            async for sample, piece in pieces:
                yield first + sample, piece

    streams = [numbered(place * samples, exchange) for place, exchange in enumerate(exchanges)]
    try:
        async with contextlib.aclosing(together(streams)) as items:
            async for item in items:
                yield item
    finally:
        for exchange in exchanges:  # those that had not begun, too
            await exchange.close()


def _answers(exchanges: Sequence[Exchange], body: CompletionRequest) -> list[tuple[_Choice, AnswerStream]]:
    return [(_Choice(exchange, body), answer) for exchange in exchanges for answer in exchange.answers]


async def completion(exchanges: Sequence[Exchange], body: CompletionRequest) -> dict[str, Any]:
    """The answers in one object, those of the first prompt first."""
    answers = _answers(exchanges, body)
    pieces: list[list[Piece]] = [[] for _ in answers]
    async for index, piece in _pieces(exchanges):
        pieces[index].append(piece)
    choices = [
        {"index": index, **choice.grow(its), "finish_reason": answer.finish_reason}
        for index, ((choice, answer), its) in enumerate(zip(answers, pieces, strict=True))
    ]
    head = head_of(exchanges[0], "cmpl", "text_completion")
    return head | {"choices": choices, "usage": usage_of(_sum(exchanges))}


async def completion_chunks(exchanges: Sequence[Exchange], body: CompletionRequest) -> AsyncGenerator[str, None]:
    """The answers as events, then their finish reasons, then the usage where asked for."""
    head, answers = head_of(exchanges[0], "cmpl", "text_completion"), _answers(exchanges, body)
    written = choice_events(head)

    def event(index: int, pieces: list[Piece], reason: str | None) -> str:
        return written({"index": index, **answers[index][0].grow(pieces), "finish_reason": reason})

    async for index, piece in _pieces(exchanges):
        yield event(index, [piece], None)
    for index, (_, answer) in enumerate(answers):
        yield event(index, [], answer.finish_reason)
    if body.tells_usage:
        yield plain_event(head | {"choices": [], "usage": usage_of(_sum(exchanges))})
    yield DONE
