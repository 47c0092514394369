"""Answers that a client may lose and come back to: their events are kept for a while.

kept = ResumableAnswers(patience=30.0)
events = kept.keep(exchange.id, account, chunks(exchange, told))      # runs on without its reader, for `patience`
events = kept.find("chatcmpl-...", account).read(after=12)            # from the 13th on, then as they come
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import Account


class ResumableAnswer:
    """An answer on its way and what it has said. When nobody has read it for `patience` seconds it ends and is
    forgotten, whole or not: what was sent last may have been lost on its way."""

    def __init__(
        self, account: Account, events: AsyncGenerator[str, None], patience: float, forget: Callable[[], None]
    ) -> None:
        self.account = account
        self._events, self._patience, self._forget = list[str](), patience, forget
        self._failure: Exception | None = None
        self._news, self._ended, self._readers = asyncio.Event(), False, 0
        self._leaving: asyncio.TimerHandle | None = None
        self._task = asyncio.create_task(self._take(events))

    async def _take(self, events: AsyncGenerator[str, None]) -> None:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._events.append(event)
                    self._tell()
        except Exception as error:  # its readers are told
            self._failure = error
        finally:
            self._ended = True
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def read(self, after: int = 0) -> AsyncGenerator[str, None]:
        """Events behind the first `after`, until the last; raises what ended the answer too early."""
        self._readers += 1
        if self._leaving is not None:
            self._leaving.cancel()
        try:
            while True:
                for event in self._events[after:]:
                    yield event
                    after += 1
                if after >= len(self._events):
                    if self._ended:
                        break
                    await self._news.wait()
            if self._failure is not None:
                raise self._failure
        finally:
            self._readers -= 1
            if not self._readers:
                self._leaving = asyncio.get_running_loop().call_later(self._patience, self.stop)

    def stop(self) -> None:
        """Give it up: what still runs of it is aborted, and booked."""
        self._forget()
        self._task.cancel()


class ResumableAnswers:
    """Those of a server. patience: seconds that one runs on, and is kept, while nobody reads it."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._answers: dict[str, ResumableAnswer] = {}

    def keep(self, id: str, account: Account, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        """Its events, as its first reader takes them."""

        def forget() -> None:
            self._answers.pop(id, None)

        self._answers[id] = ResumableAnswer(account, events, self._patience, forget)
        return self._answers[id].read()

    def find(self, id: str, account: Account) -> ResumableAnswer:
        """This account's; ApiError 404 where it has none of this id, or nobody asked for it in time."""
        answer = self._answers.get(id.rpartition("-")[2])
        if answer is None or answer.account.id != account.id:
            raise ApiError(404, f"no answer {id!r} is kept", code="not_found", param="id")
        return answer
