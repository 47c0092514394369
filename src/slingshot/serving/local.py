"""The engine of this process as a backend: one thread owns it, requests and deltas cross queues.

backend = LocalBackend(Engine.load("runs/tiny/rl_final"))
async for delta in backend.generate(generation): ...
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import traceback
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import STRUCTURES
from slingshot.engine.scheduler import EngineCounters
from slingshot.engine.sequence import Request
from slingshot.serving.backend import Generation, TokenDelta
from slingshot.serving.errors import ApiError

_LOG = logging.getLogger(__name__)
_Event = TokenDelta | SlingshotError | ApiError


@dataclass(eq=False)
class _Sample:
    """One generation on its way; `request` and `told` (tokens of it that were handed out) are the engine thread's."""

    generation: Generation
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[_Event] = field(default_factory=asyncio.Queue)
    request: Request | None = None
    told: int = 0


class LocalBackend:
    """Serves an engine from a thread of its own; any event loop may ask.

    Where the engine fails for no reason that it knows, `obstacle` says so, and whoever asks is told.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.max_length = engine, engine.max_length
        self.obstacle: str | None = None
        self._inbox: queue.SimpleQueue[tuple[str, _Sample | None]] = queue.SimpleQueue()
        self._running: dict[_Sample, None] = {}
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    @property
    def counters(self) -> EngineCounters:
        return self.engine.counters

    async def start(self) -> None:
        self._thread.start()

    async def generate(self, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        if any(getattr(generation.params, name) for name in STRUCTURES):
            await asyncio.to_thread(self.engine.check, generation.params)  # the engine goes on meanwhile
        sample = _Sample(generation, asyncio.get_running_loop())
        self._inbox.put(("add", sample))
        try:
            while True:
                event = await sample.events.get()
                while isinstance(event, TokenDelta) and not sample.events.empty():
                    later = sample.events.get_nowait()
                    event = _joined(event, later) if isinstance(later, TokenDelta) else later
                if not isinstance(event, TokenDelta):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._inbox.put(("abort", sample))

    async def close(self) -> None:
        self._inbox.put(("close", None))
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        try:
            self._run()
        except Exception as error:
            where = "; ".join(f"{frame.name}, {frame.filename}:{frame.lineno}" for frame in _frames(error)[-3:])
            self.obstacle = f"the engine stopped with {type(error).__name__}; restart the server"
            _LOG.error("%s (%s)", self.obstacle, where)
            self._refuse()

    def _refuse(self) -> None:
        """Tell all who wait, and whoever comes, until the backend is closed."""
        failure = ApiError(500, self.obstacle or "", code="engine_stopped")
        self._hand(dict.fromkeys(self._running, failure))
        self._running.clear()
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
                    for running in self._running:
                        self._hand({running: TokenDelta([], [], finish_reason="abort")})
                    return
                if what == "add":
                    self._add(sample)
                elif sample.request is not None:
                    self.engine.abort(sample.request.request_id)
                    self._running.pop(sample, None)
            try:
                self.engine.advance()
            except SlingshotError as error:  # of the model as a whole: logits that are no numbers
                for sample in self._running:
                    if sample.request is not None:
                        self.engine.abort(sample.request.request_id)
                self._hand(dict.fromkeys(self._running, error))
                self._running.clear()
            self._tell()

    def _add(self, sample: _Sample) -> None:
        generation = sample.generation
        try:
            sample.request = self.engine.submit(
                generation.prompt_ids, generation.params, generation.key, salt=generation.salt
            )
            self._running[sample] = None
        except SlingshotError as error:
            self._hand({sample: error})

    def _tell(self) -> None:
        """Hand out what this step added."""
        events: dict[_Sample, _Event] = {}
        for sample in self._running:
            request = sample.request
            assert request is not None
            sequence, result = request.sequences[0], request.result
            if result is not None and result.error is not None:
                events[sample] = result.error
            elif result is not None or len(sequence.token_ids) > sample.told:
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
        experts = sequence.experts_of(first, sample.told) if params.routed_experts else []
        record = request.prompt_record if first == 0 else None
        prompt = (record.logprobs, record.top) if record is not None else (None, None)
        new = sequence.token_ids[first:], sequence.logprobs[first:]
        return TokenDelta(*new, request.cached, reason, top, experts, *prompt)

    def _hand(self, events: dict[_Sample, _Event]) -> None:
        """One call a loop and step, however many samples grew."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Sample, _Event]]] = defaultdict(list)
        for sample, event in events.items():
            by_loop[sample.loop].append((sample, event))
        for loop, its in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, its)


def _deliver(events: list[tuple[_Sample, _Event]]) -> None:
    for sample, event in events:
        sample.events.put_nowait(event)


def _joined(delta: TokenDelta, later: TokenDelta) -> TokenDelta:
    """Two deltas as one, for a reader who was busy."""
    lists = ("token_ids", "logprobs", "top_logprobs", "experts")
    joined = {name: getattr(delta, name) + getattr(later, name) for name in lists}
    return replace(delta, **joined, finish_reason=later.finish_reason)


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)
