"""Worker processes for code that may raise, hang, flood or die: one is killed when it does not answer in time.

    target = Target("slingshot.tasks.reasoning_gym:Dataset", ("chain_sum", {}))   # a class and its arguments
    Worker().call(target, "take", 7, 0, 10)      # a method of that object, which is built inside the worker
    WorkerPool(2, [target]).submit(lambda worker: worker.call(target, "take", 7, 0, 10))      # a Future

Parent and worker exchange JSON lines over pipes, nothing is unpickled. The next call after a failure starts another
worker. This contains accidents, not malice: the worker has its user's rights.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from subprocess import DEVNULL, PIPE
from threading import Condition, Timer
from typing import Any, TypeVar

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.isolate import environment

T = TypeVar("T")

_SHORT = 0.05  # seconds: for calls of no more, another worker is not worth its start
_MAX_REPLY = 16 << 20  # bytes of one reply
_LAUNCH = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); import slingshot.sandbox.isolate as i; i.serve()"


class SandboxError(SlingshotError):
    """The call failed, in words that continue "verify() ...": raised, took too long, died, or returned no JSON."""


@dataclass(frozen=True)
class Target:
    """An object to be built inside a worker: "module:Class" and its arguments.

    Seconds `timeout` for each call, `start_timeout` for building the object; `memory` in bytes of address space.
    """

    name: str
    args: tuple[Any, ...] = ()
    timeout: float = 10.0
    start_timeout: float = 60.0
    memory: int = 2 << 30


class Worker:
    """One process holding the objects of its targets, each built at its first call. Serves one thread; any may kill."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._objects: dict[str, int] = {}
        self.calls, self.computed, self.took = 0, 0.0, 0.0  # so far, and their seconds of a core and of the clock
        self._used = 0.0  # seconds of a core in the last call

    def call(self, target: Target, method: str, *args: Any, timeout: float | None = None) -> Any:
        """The method's result, as JSON brings it back; `timeout` instead of the target's. Raises SandboxError."""
        message = {"object": self.build(target), "method": method, "args": args}
        began, self._used = time.monotonic(), 0.0
        try:
            return self._exchange(message, timeout or target.timeout)
        finally:
            self.calls += 1
            self.took += time.monotonic() - began
            self.computed += self._used

    def build(self, target: Target) -> int:
        """Start the worker and build the target's object, unless they are there; its number. Raises SandboxError."""
        message = {"target": target.name, "args": target.args, "memory": target.memory}
        key = json.dumps(message)
        if key not in self._objects:
            self._objects[key] = self._exchange(message, target.start_timeout)
        return self._objects[key]

    def close(self) -> None:
        """End the worker and all it started; the next call would start another."""
        if self._process is not None:
            self._finalizer()
            self._process, self._objects = None, {}

    def kill(self) -> None:
        """Make the call that another thread waits for fail at once."""
        if (process := self._process) is not None:
            _kill(process)

    def _start(self) -> subprocess.Popen[bytes]:
        home = tempfile.mkdtemp(prefix="slingshot-worker-")
        command = [sys.executable, "-P", "-c", _LAUNCH, json.dumps(sys.path)]
        # In a session of its own: Ctrl-C is the parent's to handle, and a kill reaches the worker's own children.
        process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment(home), start_new_session=True
        )
        self._finalizer = weakref.finalize(self, _end, process, home)
        return process

    def _exchange(self, message: dict[str, Any], timeout: float) -> Any:
        """Send a line, wait for a line. A worker that did not answer properly is ended, for its state is unknown."""
        process = self._process = self._process or self._start()
        deadline = time.monotonic() + timeout
        timer = Timer(timeout, _kill, [process])
        timer.daemon = True
        timer.start()
        try:
            reply = _round_trip(process, json.dumps(message | {"timeout": timeout}).encode() + b"\n")
            told = json.loads(reply)
            (kind, outcome), *_ = told.items()
            self._used = float(told["computed"])
        except BaseException as error:  # Ctrl-C too: the answer to this call must not be taken for the next one's
            self.close()
            if time.monotonic() >= deadline:
                raise SandboxError(f"took longer than {timeout:g} s") from error
            if isinstance(error, ValueError | TypeError | LookupError | AttributeError | RecursionError):
                raise SandboxError("wrote over the worker's pipe to slingshot") from error
            raise
        finally:
            timer.cancel()
        if time.monotonic() >= deadline:  # it may have been killed in the moment it answered
            self.close()
        if kind == "error":
            raise SandboxError(outcome)
        return outcome


class WorkerPool:
    """`size` workers that run beside the caller; `targets` are built at once, others at their first call.

    While calls queue up there are more workers: `cores` where they compute, and more where they wait more than they
    compute (for a server, a process, a clock); `most` at most. `close()`, or the end of a pool that is forgotten, ends
    them: what waits is cancelled, what runs fails.
    """

    def __init__(self, size: int, targets: Sequence[Target] = (), most: int = 0, cores: int = 0) -> None:
        self._crew = _Crew(size, max(size, most), max(size, cores))
        self._threads = ThreadPoolExecutor(self._crew.most)
        self.close = weakref.finalize(self, _stop, self._threads, self._crew.workers)
        for target in targets:
            for _ in range(size):  # the queue hands them out in turn; should a build fail, the first call tells
                self.submit(partial(Worker.build, target=target))

    @property
    def n_workers(self) -> int:
        return len(self._crew.workers)

    def submit(self, function: Callable[[Worker], T]) -> Future[T]:
        """The Future of function(worker), with the first worker that is free."""
        return self._threads.submit(self._crew.run, function)


class _Crew:
    """The workers of a pool, at first `size`, and which of them are free."""

    def __init__(self, size: int, most: int, cores: int) -> None:
        self._cores, self.most, self.workers = cores, most, [Worker() for _ in range(size)]
        self._size, self._free, self._changed = size, deque(self.workers), Condition()

    def run(self, function: Callable[[Worker], T]) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._free or len(self.workers) < self._worthwhile())
            if not self._free:
                self.workers.append(Worker())
            worker = self._free.popleft() if self._free else self.workers[-1]
        try:
            return function(worker)
        finally:
            with self._changed:
                self._free.append(worker)
                self._changed.notify_all()

    def _worthwhile(self) -> int:
        """As many as there are cores for them, or as keep a quarter of the cores that `size` of them may have busy.

        A quarter: calls that compute on a busy machine wait for their core too, and shall not become more for that.
        """
        calls, took, computed = (sum(getattr(w, name) for w in self.workers) for name in ("calls", "took", "computed"))
        if took <= _SHORT * calls:
            return self._size
        return min(self.most, max(self._cores, round(self._size * took / (4 * computed + 0.01))))


def _stop(threads: ThreadPoolExecutor, workers: Sequence[Worker]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.kill()


def _round_trip(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    reply = b""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line)
        process.stdin.flush()
        reply = process.stdout.readline(_MAX_REPLY)
    if reply.endswith(b"\n"):
        return reply
    if len(reply) == _MAX_REPLY:
        raise SandboxError(f"returned more than {_MAX_REPLY >> 20} MiB")
    how = ""
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process may close its pipe and live on
        status = process.wait(1.0)
        how = f" (killed by {signal.Signals(-status).name})" if status < 0 else f" (exit status {status})"
    raise SandboxError(f"ended its process{how}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], home: str) -> None:
    _kill(process)
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(BrokenPipeError):  # a line that the worker did not read
            pipe.close()
    process.wait()
    shutil.rmtree(home, ignore_errors=True)
