"""From a question to its answer: the prompt rendered and checked, the samples run, their tokens counted.

    gateway = Gateway([ServedModel("tiny", tokenizer, backend)])
    exchange = gateway.ask(question)
    async for sample, piece in exchange.pieces(): ...
    exchange.usage; exchange.answers[0].finish_reason

Leaving `pieces` early aborts what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, replace
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean
from slingshot.serving.answer import AnswerStream, Piece
from slingshot.serving.backend import Backend, Generation
from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import Usage
from slingshot.serving.question import Question
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model by the name that clients call it."""

    name: str
    tokenizer: Tokenizer
    backend: Backend
    created: int = 0

    def encode(self, question: Question) -> list[int]:
        """The prompt's ids; ApiError where the template or the tokenizer refuses it."""
        try:
            if question.messages is None:
                prompt = question.prompt or ""
                return self.tokenizer.encode_raw(prompt) if isinstance(prompt, str) else list(prompt)
            more: dict[str, Any] = {"tools": list(question.tools)} if question.tools else {}
            if question.thinking is not None:
                more["thinking"] = question.thinking
            return self.tokenizer.encode_chat(
                question.messages,
                add_generation_prompt=not question.continues,
                continue_final_message=question.continues,
                **more,
            )
        except SlingshotError as error:
            raise ApiError(400, str(error), param="messages") from error


class Exchange:
    """A question on its way to its answers, one a sample."""

    def __init__(self, model: ServedModel, question: Question, prompt_ids: list[int], most: int) -> None:
        self.id, self.created = secrets.token_hex(12), int(time.time())
        self.model, self.question, self.prompt_ids = model, question, prompt_ids
        opened = ends_in_reasoning(prompt_ids, model.tokenizer)
        stop = question.params.stop
        self.answers = [AnswerStream(model.tokenizer, opened, stop) for _ in range(question.params.n)]
        seed = question.params.seed if question.seeded else secrets.randbits(31)
        self._params = replace(question.params, n=1, stop=(), seed=seed, max_tokens=most)
        self.cached = 0

    @property
    def usage(self) -> Usage:
        completion = sum(answer.completion_tokens for answer in self.answers)
        reasoning = sum(answer.reasoning_tokens for answer in self.answers)
        return Usage(len(self.prompt_ids), self.cached, completion, reasoning)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (sample, piece) as the samples grow; the others begin when the first has its prompt in the cache."""
        queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()
        begun = asyncio.Event()

        async def run(sample: int) -> None:
            try:
                if sample:
                    await begun.wait()
                async for piece in self._sample(sample, begun):
                    queue.put_nowait((sample, piece))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(run(sample)) for sample in range(len(self.answers))]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, sample: int, begun: asyncio.Event) -> AsyncGenerator[Piece, None]:
        answer = self.answers[sample]
        generation = Generation(tuple(self.prompt_ids), self._params, key=str(sample), salt=self.question.user)
        async with contextlib.aclosing(self.model.backend.generate(generation)) as deltas:
            async for delta in deltas:
                if not begun.is_set():
                    self.cached = delta.cached
                    begun.set()
                for piece in answer.push(delta):
                    yield piece
                if answer.finish_reason is not None:
                    return


class Gateway:
    """The models that are served, and the way to them."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self.models = {model.name: model for model in models}

    def model(self, name: str) -> ServedModel:
        if name not in self.models:
            hint = did_you_mean(name, list(self.models))
            raise ApiError(404, f"there is no model {name!r}; {hint}", code="model_not_found", param="model")
        return self.models[name]

    def ask(self, question: Question) -> Exchange:
        """Begin an exchange; ApiError where the question cannot be answered."""
        model = self.model(question.model)
        prompt_ids = model.encode(question)
        room = model.backend.max_length - len(prompt_ids)
        wanted = 1 if question.most is None else question.most
        if room < wanted:
            asked = f"the prompt has {len(prompt_ids)} tokens" + (f" and asks for {wanted}" if question.most else "")
            message = f"{asked}; this model's context is {model.backend.max_length}: shorten one of them"
            raise ApiError(400, message, code="context_length_exceeded", param="messages")
        if not prompt_ids:
            raise ApiError(400, "the prompt is empty: nothing says where to begin", param="prompt")
        return Exchange(model, question, prompt_ids, question.most or room)
