"""What holds for every request and response: sizes, names by which the server is called, headers that keep pages apart.

app.add_middleware(Guard, most=16 << 20, hosts=frozenset({"localhost"}))
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slingshot.serving.errors import ApiError, places

_LOG = logging.getLogger(__name__)
_PATIENCE = 60.0  # seconds for each part of a body
_HOST = re.compile(r"\[[^]]*\]|[^:]*")  # in the Host header: an IPv6 address stands in brackets
_LINGER = 1.0  # seconds for the rest of a body that was refused

# The page loads nothing from elsewhere and runs no script that is written into it; formulas (KaTeX) style themselves.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; font-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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

        async def refuse(error: ApiError) -> None:
            await error_response(error, scope["path"])(scope, receive, guarded)

        host = _HOST.findall(headers.get("host", ""))[0]
        if self._hosts is not None and host.lower() not in self._hosts:
            told = f"this server is not called {host!r:.80}: it is this machine's alone. --require-key opens it to any"
            return await refuse(ApiError(403, told, code="unknown_host"))
        if length.isdecimal() and int(length[:20]) > self._most:
            return await refuse(ApiError(413, self._too_long))
        try:
            await self._app(scope, counted, guarded)
        except Exception as error:
            _LOG.error("%s: %s (%s)", scope["path"], type(error).__name__, places(error))
            if begun:
                raise ConnectionError("an answer broke off") from None
            await refuse(ApiError(500, "the server failed; its log says where"))

    @property
    def _too_long(self) -> str:
        return f"the request is longer than {self._most} bytes, which this server takes at most; shorten it"


async def _pass_over(receive: Receive, most: int) -> None:
    """Take what still comes of a body, and keep nothing of it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while most > 0 and (message := await receive()).get("more_body", False):
                most -= len(message.get("body", b""))


def error_response(error: ApiError, path: str) -> JSONResponse:
    """What is answered to a request for this path that cannot be served."""
    return JSONResponse(error.body_at(path), error.status, error.headers)
