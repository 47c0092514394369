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
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from slingshot.serving.errors import ApiError

T = TypeVar("T")

COMMENT = ": keep-alive\n\n"
KEEP_ALIVE = 10.0  # seconds of silence; proxies give up after 30 or 60

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_FAILED = ApiError(500, "the server failed; ask again")
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one each time


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


def to_json(payload: Any) -> str:
    return _ENCODER.encode(payload)


DONE = "data: [DONE]\n\n"


def plain_event(payload: Any) -> str:
    """As OpenAI's chat API has it."""
    return f"data: {to_json(payload)}\n\n"


def typed_event(event: dict[str, Any]) -> str:
    """As Anthropic's API and the Responses API have it: named by its type."""
    return f"event: {event['type']}\ndata: {to_json(event)}\n\n"


async def typed_events(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(events):
        async for event in events:
            yield typed_event(event)


def choice_events(head: dict[str, Any]) -> Callable[[dict[str, Any]], str]:
    """Writes a choice as an event, behind what is alike in all of a stream's."""
    opening = to_json(head).removesuffix("}")
    return lambda choice: f'data: {opening},"choices":[{to_json(choice)}]}}\n\n'


async def event_stream(
    request: Request,
    events: AsyncGenerator[str, None],
    told: Callable[[ApiError], str],
    silence: Callable[[], str] = lambda: COMMENT,
) -> Response:
    """A response of events that are written out already, `data: ...` with an empty line behind.

    An ApiError before the first of them is raised here, so that it is answered with its status; later ones end the
    stream with what `told` makes of them. silence: gives what is sent while nothing comes. Raises ClientGone where
    nobody waits any more.
    """
    response = _EventResponse(events, told, silence)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        begun = asyncio.ensure_future(response.begun.wait())
        await asyncio.wait({begun, gone}, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if gone.done():
            raise ClientGone
        if response.refused is not None:
            raise response.refused
        response.answering = True
    except BaseException:
        await response.close()
        raise
    finally:
        gone.cancel()
    return response


class _EventResponse(Response):
    """Takes events in a task of its own, which begins before it is known where they go, and hands each to the server.

    While a slow reader holds that up nothing is taken: what comes meanwhile is joined where it comes from.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str, None], told: Callable[[ApiError], str], silence: Callable[[], str]
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers(_HEADERS)
        self._events, self._told, self._silence = events, told, silence
        self.begun, self.answering = asyncio.Event(), False
        self.refused: Exception | None = None  # what came instead of the first event
        self._loop = asyncio.get_running_loop()
        self._send: asyncio.Future[Send] = self._loop.create_future()
        self._wrote = self._loop.time()  # when it did last
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    self.begun.set()
                    await self._write(event)
        except Exception as error:
            if not self.begun.is_set() and not self.answering:
                self.refused = error
                self.begun.set()
                return
            await self._write(self._told(error if isinstance(error, ApiError) else _FAILED))
        self.begun.set()
        await (await self._send)({"type": "http.response.body", "body": b""})

    async def _write(self, events: str) -> None:
        send = await self._send
        self._wrote = self._loop.time()
        await send({"type": "http.response.body", "body": events.encode(), "more_body": True})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(self._attend(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._send.set_result(send)
            if not self.begun.is_set():
                await self._write(COMMENT)
            await asyncio.wait({self._task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                self._task.result()
        finally:
            gone.cancel()
            await self.close()

    async def _attend(self, receive: Receive) -> None:
        """Until the client leaves; where nothing was written for long, it hears that all is well."""
        while True:
            try:
                async with asyncio.timeout_at(self._wrote + KEEP_ALIVE):
                    return await _gone(receive)
            except TimeoutError:
                if self._loop.time() >= self._wrote + KEEP_ALIVE:
                    await self._write(self._silence())

    async def close(self) -> None:
        """Give the stream up, if it has not ended; its own end is waited for."""
        self._task.cancel()
        await asyncio.wait({self._task})


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; where the client leaves before, it is cancelled and ClientGone raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
