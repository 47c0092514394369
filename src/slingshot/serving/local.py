"""The engine of this process as a backend: one thread owns it, requests and deltas cross queues.

backend = LocalBackend(Engine.load("runs/tiny/rl_final"))
async for delta in backend.generate(generation): ...
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.engine.scheduler import EngineCounters
from slingshot.engine.sequence import Request
from slingshot.serving.backend import Generation, TokenDelta
from slingshot.serving.careful_grammars import CarefulGrammars
from slingshot.serving.errors import ApiError, places

if TYPE_CHECKING:
    import xgrammar

# Between two tellings of a sample, for each that runs: telling takes a tenth of that from the other threads, or less.
# A few samples are told of each token, 64 of them about every 100 ms of what came meanwhile.
_PACE = 1.5e-3  # seconds

_LOG = logging.getLogger(__name__)
_Event = TokenDelta | SlingshotError | ApiError


@dataclass(eq=False)
class _Sample:
    """One generation on its way; `request` and `told` (tokens of it that were handed out) are the engine thread's."""

    generation: Generation
    loop: asyncio.AbstractEventLoop
    grammar: xgrammar.CompiledGrammar | None = None
    events: list[_Event] = field(default_factory=list)
    news: asyncio.Future[None] | None = None  # its reader waits for events
    request: Request | None = None
    told: int = 0
    asked: float = field(default_factory=time.perf_counter)


class LocalBackend:
    """Serves an engine from a thread of its own; any event loop may ask.

    Where the engine fails for no reason that it knows, `obstacle` says so, and whoever asks is told.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.max_length = engine, engine.max_length
        self.obstacle: str | None = None
        self._inbox: queue.SimpleQueue[tuple[str, _Sample | None]] = queue.SimpleQueue()
        self._running: dict[_Sample, None] = {}
        self._careful = CarefulGrammars()
        self._told = 0.0  # when all were told last
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    @property
    def counters(self) -> EngineCounters:
        return self.engine.counters

    async def start(self) -> None:
        # A step waits for the interpreter's lock where an event loop has it; by default that may take 5 ms each time.
        sys.setswitchinterval(min(sys.getswitchinterval(), 0.5e-3))
        self._thread.start()

    async def generate(self, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        grammar = None
        if structure := generation.params.structure:
            grammars = await asyncio.to_thread(lambda: self.engine.grammars)  # the engine goes on meanwhile
            grammar = await self._careful.compile(grammars, structure)
        sample = _Sample(generation, asyncio.get_running_loop(), grammar)
        self._inbox.put(("add", sample))
        told = 0
        try:
            while True:
                if not sample.events:
                    sample.news = sample.loop.create_future()
                    await sample.news
                event, sample.events = _joined(sample.events)
                told += len(event.token_ids)
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            if sample.request is not None:
                generation.untold.tokens = len(sample.request.sequences[0].token_ids) - told
            self._inbox.put(("abort", sample))

    async def close(self) -> None:
        self._careful.close()
        self._inbox.put(("close", None))
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        try:
            self._run()
        except Exception as error:
            self.obstacle = f"the engine stopped with {type(error).__name__}; restart the server"
            _LOG.error("%s (%s)", self.obstacle, places(error))
            self._refuse()

    def _refuse(self) -> None:
        """Tell all who wait, and whoever comes, until the backend is closed."""
        failure = ApiError(500, self.obstacle or "", code="engine_stopped")
        self._break_off(failure)
        while True:
            what, sample = self._inbox.get()
            if sample is None:
                return
            if what == "add":
                self._hand({sample: failure})

    def _run(self) -> None:
        while True:
            while not self._running or not self._inbox.empty():
                what, sample = self._inbox.get()
                if sample is None:
                    return self._break_off(TokenDelta([], [], finish_reason="abort"))
                if what == "add":
                    self._add(sample)
                elif sample.request is not None:
                    self.engine.abort(sample.request.request_id)
                    self._running.pop(sample, None)
            try:
                self.engine.advance()
            except SlingshotError as error:  # of the model as a whole: logits that are no numbers
                self._break_off(ApiError(500, str(error)))
            self._tell()

    def _break_off(self, end: _Event) -> None:
        """End all that runs: each is told of the tokens that were made of it, and then this."""
        for sample in self._running:
            request = sample.request
            assert request is not None
            with suppress(Exception):  # an engine that failed may fail again
                if len(request.sequences[0].token_ids) > sample.told:
                    self._hand({sample: self._delta(sample, request)})
                self.engine.abort(request.request_id)
            self._hand({sample: end})
        self._running.clear()

    def _add(self, sample: _Sample) -> None:
        generation = sample.generation
        try:
            sample.request = self.engine.submit(
                generation.prompt_ids,
                generation.params,
                generation.key,
                salt=generation.salt,
                traced=generation.glass,
                said=generation.said,
                grammar=sample.grammar,
                adapter=generation.adapter,
            )
            self._running[sample] = None
        except SlingshotError as error:
            self._hand({sample: error})
        except Exception as error:  # it was not taken in: the others go on
            _LOG.error("a request could not be taken in: %s (%s)", type(error).__name__, places(error))
            self._hand({sample: ApiError(500, f"the server failed with {type(error).__name__}")})

    def _tell(self) -> None:
        """Hand out what was added: first tokens and ends at once, what lies between together."""
        events: dict[_Sample, _Event] = {}
        now = time.perf_counter()
        due = now - self._told >= _PACE * len(self._running)
        self._told = now if due else self._told
        for sample in self._running:
            request = sample.request
            assert request is not None
            result = request.result
            if result is not None and result.error is not None:
                events[sample] = result.error
            elif result is not None or ((due or not sample.told) and len(request.sequences[0].token_ids) > sample.told):
                events[sample] = self._delta(sample, request)
        for sample, event in events.items():
            if not isinstance(event, TokenDelta) or event.finish_reason is not None:
                del self._running[sample]
        self._hand(events)

    def _delta(self, sample: _Sample, request: Request) -> TokenDelta:
        sequence, params = request.sequences[0], request.params
        first, sample.told = sample.told, len(sequence.token_ids)
        reason = None if request.result is None else request.result.outputs[0].finish_reason
        top = sequence.top_logprobs[first:] if params.top_logprobs else []
        experts = sequence.experts_of(first, sample.told) if request.traced else []
        drafted = [number in sequence.accepted for number in range(first, sample.told)] if request.traced else []
        record = request.prompt_record if first == 0 else None
        prompt = (record.logprobs, record.top) if record is not None else (None, None)
        new = sequence.token_ids[first:], sequence.logprobs[first:]
        waited = 0.0 if request.admitted is None else request.admitted - sample.asked
        return TokenDelta(*new, request.cached, reason, top, experts, drafted, prompt[0], prompt[1], waited)

    def _hand(self, events: dict[_Sample, _Event]) -> None:
        """One call a loop and step, however many samples grew."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Sample, _Event]]] = defaultdict(list)
        for sample, event in events.items():
            by_loop[sample.loop].append((sample, event))
        for loop, its in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, its)


class AdapterBackend:
    """An adapter of another backend's engine, which that one starts and ends, and whose counters it tells."""

    counters = None

    def __init__(self, base: LocalBackend, adapter: str) -> None:
        self._base, self._adapter, self.max_length = base, adapter, base.max_length

    @property
    def obstacle(self) -> str | None:
        return self._base.obstacle

    async def start(self) -> None:
        """Nothing: the base does."""

    def generate(self, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        return self._base.generate(replace(generation, adapter=self._adapter))

    async def close(self) -> None:
        """Nothing: the base does."""


def _deliver(events: list[tuple[_Sample, _Event]]) -> None:
    for sample, event in events:
        sample.events.append(event)
        if sample.news is not None and not sample.news.done():
            sample.news.set_result(None)


def _joined(events: list[_Event]) -> tuple[TokenDelta, list[_Event]]:
    """Deltas that follow each other as one, of a reader who was busy there are several, and what comes behind them.
    Raises an error that is the first."""
    deltas = list[TokenDelta]()
    for event in events:
        if not isinstance(event, TokenDelta):
            break
        deltas.append(event)
    if not deltas:
        assert isinstance(events[0], Exception)
        raise events[0]
    behind = events[len(deltas) :]
    if len(deltas) == 1:
        return deltas[0], behind
    of_tokens: dict[str, Any] = {
        name: [part for delta in deltas for part in getattr(delta, name)]
        for name in ("token_ids", "logprobs", "top_logprobs", "experts", "drafted")
    }
    return replace(deltas[0], finish_reason=deltas[-1].finish_reason, **of_tokens), behind
