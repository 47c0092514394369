"""A question on its way to its answers: the samples run, their tokens counted and booked once.

    exchange = await gateway.ask(question, account)
    async for sample, piece in exchange.pieces(): ...
    exchange.usage; exchange.answers[0].finish_reason

Leaving `pieces` early aborts what still runs and books what was generated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.serving.answer import AnswerStream, Piece, joined
from slingshot.serving.backend import Generation, TokenDelta
from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import Reservation, Usage
from slingshot.serving.load import Place
from slingshot.serving.metrics import ModelMeter
from slingshot.serving.question import Question
from slingshot.serving.served_model import ServedModel
from slingshot.serving.together import together
from slingshot.serving.tools import told_call
from slingshot.text.reasoning import ends_in_reasoning

_LOG = logging.getLogger(__name__)


class Exchange:
    """One question and its answers, one a sample.

    params: of each sample. place: its own in the queue. patience: seconds for the first token. salt: whose cache it
    shares. began: when it was asked (time.perf_counter). reservation is the ledger's; on_end is told when all is over;
    failure: the status of an error that ended it.
    """

    def __init__(
        self, model: ServedModel, question: Question, prompt_ids: list[int], params: SamplingParams, place: Place,
        patience: float, meter: ModelMeter, began: float, salt: str = "",
    ) -> None:  # fmt: skip
        self.id, self.created = secrets.token_hex(12), int(time.time())
        self.model, self.question, self.prompt_ids = model, question, prompt_ids
        raw = question.messages is None
        opened = not raw and ends_in_reasoning(prompt_ids, model.tokenizer)
        tools = model.tool_format if question.tools and question.tool_choice != "none" else None
        form = model.tokenizer, opened, question.params.stop, raw, tools, question.parallel
        self.answers = [AnswerStream(*form) for _ in range(question.params.n)]
        self._params = params
        self._place, self._patience, self._salt = place, patience, salt
        self._hurry = False
        self._meter, self._began = meter, began
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.failure: int | None = None
        self._asked = False
        self.cached = 0
        self.prompt_logprobs: list[float | None] | None = None  # where asked for, once the first piece is there
        self.prompt_top_logprobs: list[dict[int, float] | None] | None = None
        self.reservation: Reservation | None = None
        self.on_end: Callable[[Exchange], None] = lambda _: None
        self._settling: asyncio.Task[None] | None = None

    @property
    def usage(self) -> Usage:
        completion = sum(answer.completion_tokens for answer in self.answers)
        reasoning = sum(answer.reasoning_tokens for answer in self.answers)
        return Usage(len(self.prompt_ids), self.cached, completion, reasoning)

    def answer_now(self) -> int:
        """Close the reasoning of its samples with the next token; -> how many are reasoning."""
        reasoning = [answer for answer in self.answers if answer.reasoning and answer.finish_reason is None]
        self._hurry = self._hurry or bool(reasoning)
        return len(reasoning)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (sample, piece) as the samples grow; the others begin when the first has its prompt in the cache.

        Raises nothing but ApiError.
        """
        try:
            begun = asyncio.Event()
            streams = [self._sample(sample, begun) for sample in range(len(self.answers))]
            async with contextlib.aclosing(together(streams)) as samples:
                async for item in samples:
                    yield item
        except SlingshotError as error:
            self.failure = 400
            raise ApiError(400, str(error)) from error
        except ApiError as error:
            self.failure = error.status
            raise
        except Exception as error:
            _LOG.error("request %s: %s", self.id, type(error).__name__)  # its text may hold what was asked
            self.failure = 500
            raise ApiError(500, f"the server failed with {type(error).__name__}; ask again") from error
        finally:
            await self.close()

    async def close(self) -> None:
        """Leave the queue and book, once, whoever is cancelled meanwhile; who never took `pieces` calls it."""
        self._place.leave()
        if self._settling is None:
            self._settling = asyncio.create_task(self._settle())
        await asyncio.shield(self._settling)

    @property
    def _booked(self) -> Usage:
        """Nothing of what was never asked, or failed before its first token: who hangs up pays for the prompt."""
        refused = self.failure is not None or not self._asked
        return Usage() if refused and self.first_token_seconds is None else self.usage

    async def _settle(self) -> None:
        try:
            if self.reservation is not None:
                await self.reservation.ledger.aside(self.reservation.settle, self._booked)
        finally:
            cost = self.reservation.cost if self.reservation else 0
            self._meter.ended(self.usage, cost, self.queue_seconds, self.first_token_seconds)
            self.on_end(self)

    async def _sample(self, sample: int, begun: asyncio.Event) -> AsyncGenerator[tuple[int, Piece], None]:
        """One sample; where its reasoning is closed from outside it goes on behind the closing words, once."""
        if sample:
            await begun.wait()
        answer, params = self.answers[sample], self._params
        while True:
            prompt_ids = (*self.prompt_ids, *answer.token_ids)
            wanted, said = self.question, len(answer.token_ids)
            self._asked = True
            generation = Generation(
                prompt_ids, params, str(sample), self._salt, logprobs=wanted.logprobs, glass=wanted.glass, said=said
            )
            try:
                async with contextlib.aclosing(self._deltas(generation, begun)) as deltas:
                    async for delta in deltas:
                        for piece in joined(answer.push(delta)):
                            yield sample, piece
                        if self.reservation is not None:
                            self.reservation.progress(self.cached, sum(its.completion_tokens for its in self.answers))
                        if answer.finish_reason is not None:
                            self._keep_calls(answer)
                            return
                        if answer.unanswered or (self._hurry and answer.reasoning and not answer.closed):
                            break
            except (GeneratorExit, asyncio.CancelledError):  # the reader left
                answer.count_untold(generation.untold.tokens)
                self._meter.grew(generation.untold.tokens, None)
                raise
            for piece in answer.close_reasoning(self.model.vocabulary):
                yield sample, piece
            left = self._params.max_tokens - answer.completion_tokens
            if left < 1:
                for piece in answer.push(TokenDelta([], [], finish_reason="length")):
                    yield sample, piece
                return
            params = self.model.resumed(params, left)

    def _keep_calls(self, answer: AnswerStream) -> None:
        """The next turn will name its calls: it then finds the very tokens."""
        if answer.calls and answer.finish_reason == "stop" and not (answer.stopped or answer.trimmed):
            calls = [told_call(call) for call in answer.calls]
            message = {"role": "assistant", "content": answer.content, "tool_calls": calls}
            self.model.exact_turns.keep(self.question, message, self.prompt_ids + answer.token_ids)

    async def _deltas(self, generation: Generation, begun: asyncio.Event) -> AsyncGenerator[TokenDelta, None]:
        """What the backend gives; ApiError 503 where the first of it does not come in time."""
        async with contextlib.aclosing(self.model.backend.generate(generation)) as deltas:
            asked, last, leads = time.perf_counter(), None, not begun.is_set()
            if leads:
                try:
                    async with asyncio.timeout(self._patience):
                        first = await anext(deltas)
                except TimeoutError as error:
                    message = f"no token came within {self._patience:g} seconds: the server is busy; try again later"
                    raise ApiError(503, message, code="overloaded", retry_after=self._place.room.seconds) from error
                self.cached = first.cached
                self.prompt_logprobs, self.prompt_top_logprobs = first.prompt_logprobs, first.prompt_top_logprobs
                self._place.leave(served=True)
                begun.set()
                last = time.perf_counter()
                self.queue_seconds, self.first_token_seconds = asked - self._began + first.waited, last - self._began
                self._meter.grew(len(first.token_ids), None)
                yield first
            async for delta in deltas:
                if leads:
                    self.cached = max(self.cached, delta.cached)  # some servers tell it last
                now = time.perf_counter()
                self._meter.grew(len(delta.token_ids), None if last is None else now - last)
                last = now
                yield delta
