"""A request from its arrival to its end: an id that its answer carries, a count, and a line in the access log.

app.add_middleware(RequestWatch, metrics=gateway.metrics, log=AccessLog(sys.stderr))
record = REQUEST.get()      # of the request that this task serves; None outside of one
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self, TextIO

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slingshot.base.files import os_errors
from slingshot.serving.metrics import Metrics
from slingshot.serving.prices import PICO

if TYPE_CHECKING:
    from slingshot.serving.exchange import Exchange

_LOG = logging.getLogger(__name__)
_LEFT = 499  # the client did, before its answer was whole


@dataclass(eq=False)
class RequestRecord:
    """model: one that is served. exchanges: what it asked of it. began: time.perf_counter."""

    method: str
    path: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    began: float = field(default_factory=time.perf_counter)
    status: int = _LEFT
    key: str | None = None
    model: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        """What the log has of it: no text of anybody's, the path but for its parameters."""
        uses = [exchange.usage for exchange in self.exchanges]
        first = self.exchanges[0] if self.exchanges else None
        cost = sum(exchange.reservation.cost for exchange in self.exchanges if exchange.reservation)
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "key": self.key,
            "method": self.method,
            "path": self.path[:200],
            "model": self.model,
            "status": self.status,
            "prompt_tokens": sum(use.prompt for use in uses),
            "cached_tokens": sum(use.cached for use in uses),
            "completion_tokens": sum(use.completion for use in uses),
            "reasoning_tokens": sum(use.reasoning for use in uses),
            "queue_seconds": first and _rounded(first.queue_seconds),
            "first_token_seconds": first and _rounded(first.first_token_seconds),
            "seconds": _rounded(time.perf_counter() - self.began),
            "cost": cost / PICO,
        }


REQUEST: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


class AccessLog:
    """Writes a JSON line per request. Where the disk takes none, that is logged, and requests are served all the
    same."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @classmethod
    def at(cls, place: str) -> Self:
        """A file that lines are added to, "-": standard error. SlingshotError where it cannot be opened."""
        if place == "-":
            return cls(sys.stderr)
        with os_errors(f"cannot write to the access log {place}"):
            return cls(open(place, "a", encoding="utf-8"))  # for as long as the server runs

    def write(self, record: RequestRecord) -> None:
        try:
            self._file.write(json.dumps(record.line(), ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            _LOG.error("the access log takes no line: %s", error.strerror or error)


class RequestWatch:
    """Around all else, so that refusals are seen too."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: AccessLog | None) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record, status = RequestRecord(scope["method"], scope["path"]), _LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                failures = (exchange.failure for exchange in record.exchanges)
                record.status = next((failure for failure in failures if failure), status)

        token = REQUEST.set(record)
        try:
            await self._app(scope, receive, watched)
        except Exception:
            record.status = 500
            raise
        finally:
            REQUEST.reset(token)
            if record.method == "POST":
                self._metrics.answered(record.model or "", record.status)
            if self._log is not None:
                self._log.write(record)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
