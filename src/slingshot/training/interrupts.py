"""Ctrl-C and SIGTERM as a wish: noted while a stage is in its loop, which saves after the step and stops.

with Interrupts() as interrupts:
    for step in ...:
        work.keep(step, state, stop=interrupts.asked)       # saves and raises KeyboardInterrupt
"""

from __future__ import annotations

import signal
import threading
from typing import Any, Self


class Interrupts:
    """`asked` is set by the first signal; a second Ctrl-C interrupts at once. At the end handlers are what they were.

    Outside of the main thread, where Python sets no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}
        self._pressed = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.asked = True
        self._pressed += number == signal.SIGINT  # torchrun passes a Ctrl-C on as SIGTERM too, which is no second one
        if self._pressed > 1:
            raise KeyboardInterrupt
