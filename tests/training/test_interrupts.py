"""A stage's Ctrl-C: once asks, twice stops, and afterwards the signal is its owner's again."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from slingshot.training.interrupts import Interrupts


def test_a_second_ctrl_c_stops_at_once_and_another_thread_is_left_alone():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    def asked_elsewhere():
        with Interrupts() as interrupts:
            return interrupts.asked

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asked_elsewhere).result() is False
    assert signal.getsignal(signal.SIGINT) is before
