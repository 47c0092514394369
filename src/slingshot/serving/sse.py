"""Server-sent events over any stream of payloads, and what an answer does when its client leaves.

return await event_stream(request, events, told)     # `: keep-alive` while nothing comes
body = await unless_gone(request, work)              # the same for an answer in one piece
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from slingshot.serving.errors import ApiError

T = TypeVar("T")

COMMENT = ": keep-alive\n\n"
KEEP_ALIVE = 10.0  # seconds of silence; proxies give up after 30 or 60
_AHEAD = 64  # events that wait for a slow reader; what it has not taken of the tokens behind them is joined

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


def to_json(payload: Any) -> str:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":"))


async def event_stream(
    request: Request,
    events: AsyncGenerator[str, None],
    told: Callable[[ApiError], str],
    silence: Callable[[], str] = lambda: COMMENT,
) -> StreamingResponse:
    """A response of events that are written out already, `data: ...` with an empty line behind.

    An ApiError before the first of them is raised here, so that it is answered with its status; later ones end the
    stream with what `told` makes of them. silence: gives what is sent while nothing comes. Raises ClientGone where
    nobody waits any more.
    """
    flow = _Flow(events, told)
    gone = asyncio.ensure_future(_gone(request))
    try:
        begun = asyncio.ensure_future(flow.begun.wait())
        await asyncio.wait({begun, gone}, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if gone.done():
            raise ClientGone
        if flow.refused is not None:
            raise flow.refused
        flow.answering = True
    except BaseException:
        await flow.close()
        raise
    finally:
        gone.cancel()
    return _EventResponse(flow, silence)


class _Flow:
    """Takes events in a task of its own, so that waiting for one can be given up without giving up the stream."""

    def __init__(self, events: AsyncGenerator[str, None], told: Callable[[ApiError], str]) -> None:
        self._events, self._told = events, told
        self._queue: asyncio.Queue[str | None] = asyncio.Queue(_AHEAD)
        self.begun, self.answering = asyncio.Event(), False
        self.refused: Exception | None = None  # what came instead of the first event
        self._task = asyncio.create_task(self._take())

    async def _take(self) -> None:
        first = True
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await self._queue.put(event)
                    if first:
                        first = False
                        self.begun.set()
        except Exception as error:
            failure = error if isinstance(error, ApiError) else ApiError(500, "the server failed; ask again")
            if first and not self.answering:
                self.refused = error
            else:
                await self._queue.put(self._told(failure))
        self.begun.set()
        await self._queue.put(None)

    async def read(self, silence: Callable[[], str]) -> AsyncGenerator[str, None]:
        """Events as they come, several at once where they are there."""
        if self._queue.empty():
            yield ": keep-alive\n\n"
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    event = await self._queue.get()
            except TimeoutError:
                if self._queue.empty():
                    yield silence()
                continue
            parts = []
            while event is not None:
                parts.append(event)
                if self._queue.empty():
                    break
                event = self._queue.get_nowait()
            if parts:
                yield "".join(parts)
            if event is None:
                return

    async def close(self) -> None:
        """Give the stream up, if it has not ended; its own end is waited for."""
        self._task.cancel()
        await asyncio.wait({self._task})


class _EventResponse(StreamingResponse):
    def __init__(self, flow: _Flow, silence: Callable[[], str]) -> None:
        super().__init__(flow.read(silence), media_type="text/event-stream", headers=_HEADERS)
        self._flow = flow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._flow.close()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; where the client leaves before, it is cancelled and ClientGone raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
