"""What holds for every request and response: sizes, names by which the server is called, headers that keep pages apart.

app.add_middleware(Guard, most=16 << 20, hosts=frozenset({"localhost"}))
"""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slingshot.serving.errors import ApiError

_LOG = logging.getLogger(__name__)
_PATIENCE = 60.0  # seconds for each part of a body
_LINGER = 1.0  # seconds for the rest of a body that was refused

# The page loads nothing from elsewhere and runs no script that is written into it; formulas style themselves.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """most: bytes of a body. hosts: names in the Host header that are served, None: any. A page of another site that
    had its own name lead to this machine would call it by that name.

    Who is answered before his body was read is cut off behind the answer, at most _LINGER seconds and `most` bytes
    later: a client that is cut while it sends may not read why.

    What fails without a reason is answered with 500, and logged without its text, which may hold what was asked.
    """

    def __init__(self, app: ASGIApp, most: int, hosts: frozenset[str] | None) -> None:
        self._app, self._most, self._hosts = app, most, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        begun, taken = False, 0
        whole = length == "0" and "transfer-encoding" not in headers

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                its = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    its.setdefault(name, value)
                if not whole:
                    its["Connection"] = "close"
            elif not whole and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _pass_over(receive, self._most)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        async def counted() -> Message:
            nonlocal taken, whole
            try:
                async with asyncio.timeout(None if whole else _PATIENCE):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the rest of the request did not come in {_PATIENCE:g} seconds") from error
            whole = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise HTTPException(413, self._too_long)
            return message

        host = headers.get("host", "").rpartition("]")[0] + "]" if "[" in headers.get("host", "") else None
        host = host or headers.get("host", "").partition(":")[0]
        if self._hosts is not None and host.lower() not in self._hosts:
            message = (
                f"this server is not called {host!r:.80}: it is this machine's alone. --require-key opens it to any"
            )
            return await _refuse(ApiError(403, message, code="unknown_host"), scope, guarded)
        if length.isdecimal() and int(length[:20]) > self._most:
            return await _refuse(ApiError(413, self._too_long), scope, guarded)
        try:
            await self._app(scope, counted, guarded)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = "; ".join(f"{frame.name}, {frame.filename}:{frame.lineno}" for frame in frames[-3:])
            _LOG.error("%s: %s (%s)", scope["path"], type(error).__name__, where)
            if begun:
                raise ConnectionError("an answer broke off") from None
            await _refuse(ApiError(500, "the server failed; its log says where"), scope, guarded)

    @property
    def _too_long(self) -> str:
        return f"the request is longer than {self._most} bytes, which this server takes at most; shorten it"


async def _pass_over(receive: Receive, most: int) -> None:
    """Take what still comes of a body, and keep nothing of it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while most > 0 and (message := await receive()).get("more_body", False):
                most -= len(message.get("body", b""))


async def _refuse(error: ApiError, scope: Scope, send: Send) -> None:
    body = json.dumps(error.body_at(scope["path"])).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": head})
    await send({"type": "http.response.body", "body": body})
