"""One line of progress: a bar with time left in a terminal, a plain line now and then elsewhere.

with Progress("pretrain", steps, done=resumed_at) as progress:
    progress.update(step, loss=1.234, **{"tokens/s": 41000})
"""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from slingshot.base.quantity import show_duration

_QUIET_SECONDS = 15.0


class Progress:
    """Progress of `total` steps, shown on standard error; `shown` False (other ranks) shows nothing. `total` may be
    corrected on the way."""

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.shown = title, total, shown
        self._bar: Bar | None = None
        if shown and sys.stderr.isatty():
            texts = TextColumn("{task.description}"), TextColumn("{task.fields[values]}")
            columns = texts[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), texts[1]
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, completed=done, values="")
        self._first, self._start, self._last = done, time.monotonic(), time.monotonic()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, **values: float) -> None:
        """`step` steps are done; the values are shown beside the bar."""
        shown = (f"{name} {value:{',.0f' if abs(value) >= 1000 else '.3g'}}" for name, value in values.items())
        text = "  ".join(shown)
        if self._bar:
            self._bar.update(self._task, completed=step, total=self.total, values=text)
        elif self.shown and (time.monotonic() - self._last > _QUIET_SECONDS or step == self.total):
            self._last = time.monotonic()
            left = (self._last - self._start) / max(1, step - self._first) * (self.total - step)
            print(f"{self.title} {step}/{self.total}  {text}  {show_duration(left)} left", file=sys.stderr, flush=True)
