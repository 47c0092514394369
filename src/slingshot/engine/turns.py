"""A lock that serves threads in the order they came, so that one that steps in a loop does not keep the others out."""

from __future__ import annotations

import threading


class Turns:
    """`with turns:` is one turn. A thread that is interrupted while it waits gives its place up. Not reentrant."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._serving = 0
        self._gone: set[int] = set()

    def __enter__(self) -> None:
        with self._changed:
            ticket, self._next = self._next, self._next + 1
            try:
                self._changed.wait_for(lambda: self._serving == ticket)
            except BaseException:
                self._gone.add(ticket)
                self._skip()
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._serving += 1
            self._skip()

    def _skip(self) -> None:
        while self._serving in self._gone:
            self._gone.remove(self._serving)
            self._serving += 1
        self._changed.notify_all()
