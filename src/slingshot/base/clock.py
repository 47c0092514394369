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
    """Wall-clock seconds of every part, its several times added up."""

    def __init__(self) -> None:
        self.seconds = Counter[str]()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began  # type: ignore[assignment]  # a Counter of seconds
