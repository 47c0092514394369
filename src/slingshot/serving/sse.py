"""Server-sent events over any stream of payloads, and what an answer does when its client leaves.

return event_stream(payloads)            # `: keep-alive` while nothing comes; closing it closes `payloads`
body = await unless_gone(request, work)  # the same for an answer in one piece
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

T = TypeVar("T")

KEEP_ALIVE = 10.0  # seconds of silence; proxies give up after 30 or 60

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


def to_json(payload: Any) -> str:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":"))


def event_stream(events: AsyncGenerator[str, None]) -> StreamingResponse:
    """A response of events that are written out already, `data: ...` with an empty line behind."""
    return StreamingResponse(_alive(events), media_type="text/event-stream", headers=_HEADERS)


async def _alive(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events))
            try:
                while not (await asyncio.wait({coming}, timeout=KEEP_ALIVE))[0]:
                    yield ": keep-alive\n\n"
            except BaseException:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
                raise
            try:
                yield coming.result()
            except StopAsyncIteration:
                return


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
