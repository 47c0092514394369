"""How tests wait for what must happen, on a machine that may be busy with other things."""

import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds until a test gives up: a whole launch on a starved core takes most of a minute."""


def until(true: Callable[[], object], *, pause: Callable[[float], object] = time.sleep) -> None:
    """Wait for it to come true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        pause(0.01)
