"""Where the time goes: seconds by part of the work.

clock = Clock()
with clock("answers"): ...
clock.seconds                              # {"answers": 12.5}
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall-clock seconds of every part, its several times added up; a part within another counts there alone."""

    def __init__(self) -> None:
        self.seconds = Counter[str]()
        self._within = 0.0  # seconds of parts within the one that runs

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began, outer, self._within = time.perf_counter(), self._within, 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[part] += took - self._within  # type: ignore[assignment]  # a Counter of seconds
            self._within = outer + took
