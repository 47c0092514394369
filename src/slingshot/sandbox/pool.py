"""Several workers that run beside the caller: `submit` gives a Future, and threads wait for the workers' answers.

pool = WorkerPool(2, [target])             # the workers start and build their objects in the background
future = pool.submit(Worker.call, target, "verify", problem, text)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Concatenate, ParamSpec, TypeVar

from slingshot.sandbox.worker import SandboxError, Target, Worker

P = ParamSpec("P")
T = TypeVar("T")
_Queue = SimpleQueue[tuple[Future[Any], Callable[[Worker], Any]] | None]


class WorkerPool:
    """`size` workers, each with a thread that waits for it; `targets` are built at once, others at their first call."""

    def __init__(self, size: int, targets: Sequence[Target] = ()) -> None:
        self._waiting: _Queue = SimpleQueue()
        workers = [Worker() for _ in range(size)]
        # The threads know nothing of the pool, so that one that is forgotten ends its workers.
        self.close = weakref.finalize(self, _stop, self._waiting, workers)
        for worker in workers:
            Thread(target=_run, args=(worker, list(targets), self._waiting), daemon=True).start()

    def submit(self, function: Callable[Concatenate[Worker, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The Future of function(worker, *args, **kwargs), with the first worker that is free."""
        future: Future[T] = Future()
        self._waiting.put((future, lambda worker: function(worker, *args, **kwargs)))
        return future


def _run(worker: Worker, targets: list[Target], waiting: _Queue) -> None:
    for target in targets:
        with contextlib.suppress(SandboxError):  # the first call tells
            worker.build(target)
    while (request := waiting.get()) is not None:
        future, function = request
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(worker))
            except BaseException as error:
                future.set_exception(error)
    worker.close()


def _stop(waiting: _Queue, workers: list[Worker]) -> None:
    """What waits is cancelled, what runs fails."""
    with contextlib.suppress(Empty):
        while (request := waiting.get_nowait()) is not None:
            request[0].cancel()
    for worker in workers:
        waiting.put(None)
        worker.kill()
