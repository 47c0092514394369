"""A worker process for code that may raise, hang, flood or die: other people's verifiers run there, and it is killed when it does not answer in time.

    sandbox = Sandbox("slingshot.tasks.reasoning_gym:Dataset", "chain_sum", {})    # a class and its arguments, built inside the worker
    sandbox.call("take", 7, 0, 10)                                       # a method of that object; raises SandboxError

Parent and worker exchange JSON lines over pipes, nothing is unpickled. A worker that failed to answer is started anew by the next call.
This contains accidents, not malice: the worker has its user's rights.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from slingshot.base.errors import SlingshotError

_MAX_REPLY = 16 << 20  # bytes of one reply
_MAX_MESSAGE = 300  # characters of an error's own words
_LAUNCH = "import sys; sys.path.insert(0, sys.argv.pop(1)); from slingshot.sandbox.worker import serve; serve()"


Item = TypeVar("Item")


class SandboxError(SlingshotError):
    """The call failed, in words that continue "verify() ...": raised, took too long, died, or returned what is not JSON."""


class Sandbox:
    """One worker process holding one object. Seconds `timeout` for each call, `start_timeout` for building the object; `memory` in bytes."""

    def __init__(
        self, target: str, *args: Any, timeout: float = 10.0, start_timeout: float = 60.0, memory: int = 2 << 30
    ) -> None:
        self._target, self._args = target, args
        self._timeout, self._start_timeout, self._memory = timeout, start_timeout, memory
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, method: str, *args: Any) -> Any:
        """The method's result, as JSON brings it back. Raises SandboxError."""
        self.start()
        return self._exchange({"method": method, "args": args}, self._timeout)

    def close(self) -> None:
        """End the worker; the next call would start another."""
        if self._process is not None:
            self._finalizer()
            self._process = None

    def start(self) -> None:
        """Start the worker and build its object, unless it runs. Raises SandboxError."""
        if self._process is not None:
            return
        # One thread each, as every thread reserves address space; a fixed hash seed, so that code which iterates over sets repeats itself.
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _LAUNCH, str(Path(__file__).resolve().parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | settings,
            start_new_session=True,  # Ctrl-C is the parent's to handle, and a kill reaches the worker's own children
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        limits = {"timeout": self._timeout, "start_timeout": self._start_timeout, "memory": self._memory}
        try:
            self._exchange({"target": self._target, "args": self._args, "limits": limits}, self._start_timeout)
        except SandboxError:
            self.close()
            raise

    def _exchange(self, message: dict[str, Any], timeout: float) -> Any:
        """Send one line, wait for one line. The worker is ended whenever it did not answer properly, for then its state is unknown."""
        line = json.dumps(message).encode() + b"\n"
        try:
            reply = json.loads(self._round_trip(line, timeout))
            failed = "error" in reply
            outcome = reply["error" if failed else "value"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.close()
            raise SandboxError("wrote over the worker's pipe to slingshot") from error
        except BaseException:  # Ctrl-C too: the answer to this call must not be taken for the next one's
            self.close()
            raise
        if failed:
            raise SandboxError(outcome)
        return outcome

    def _round_trip(self, line: bytes, timeout: float) -> bytes:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        out, into = process.stdout.fileno(), process.stdin.fileno()
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(out, select.POLLIN)
        poll.register(into, select.POLLOUT)
        reply = bytearray()
        while True:
            remaining = deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, remaining) * 1000))
            if remaining <= 0 and out not in ready:
                raise SandboxError(f"took longer than {timeout:g} s")
            if out in ready:
                chunk = os.read(out, 1 << 16)
                if not chunk:
                    raise SandboxError(f"ended its process{_how(process)}")
                reply += chunk
                if chunk.endswith(b"\n"):
                    return bytes(reply)
                if len(reply) > _MAX_REPLY:
                    raise SandboxError(f"returned more than {_MAX_REPLY >> 20} MiB")
            elif into in ready:
                try:
                    line = line[os.write(into, line[: 1 << 16]) :]
                except BrokenPipeError as error:
                    raise SandboxError(f"ended its process{_how(process)}") from error
                if not line:
                    poll.unregister(into)


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process that closed its pipe ended, if it ends within the second."""
    try:
        status = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return ""
    return f" (killed by {signal.Signals(-status).name})" if status < 0 else f" (exit status {status})"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def serve() -> None:
    """The worker's side: build the object named in the first line, then answer one call a line until the pipe closes."""
    import resource

    # The pipes move out of the way of print() and input(): what the code writes goes nowhere, and it reads nothing.
    lines, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    target: Any = None
    patience = 0.0
    for line in lines:
        message = json.loads(line)
        if "limits" in message:
            limits = message["limits"]
            resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            patience = limits["start_timeout"]
        # Should the parent itself be killed meanwhile, nobody is left to stop a call that hangs but the alarm, which ends the process.
        signal.alarm(int(patience) + 10)
        try:
            if target is None:
                module, _, name = message["target"].partition(":")
                target = getattr(importlib.import_module(module), name)(*message["args"])
                patience, value = limits["timeout"], None
            else:
                value = getattr(target, message["method"])(*message["args"])
            reply = _encode(value)
        except BaseException as error:  # sys.exit() in a user's verifier too
            reply = json.dumps({"error": _describe(error)})
        signal.alarm(0)
        replies.write(reply.encode() + b"\n")
        replies.flush()


def take(items: Iterator[Item], count: int, seconds: float = 1.0) -> list[Item]:
    """Up to `count` next items, but no more once `seconds` have passed: slow generators stay within a call's timeout. Empty at the end only."""
    deadline = time.monotonic() + seconds
    taken = list(itertools.islice(items, 1))
    while len(taken) < count and time.monotonic() < deadline and (more := list(itertools.islice(items, 1))):
        taken += more
    return taken


def _encode(value: Any) -> str:
    try:
        return json.dumps({"value": value}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps({"error": f"returned something that is not JSON: {_shorten(error)}"})


def _describe(error: BaseException) -> str:
    """One line: what was raised and where. A SlingshotError has said so itself."""
    if isinstance(error, SlingshotError):
        return str(error)
    where = ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({Path(error.filename).name} line {error.lineno})"
    elif frames := traceback.extract_tb(error.__traceback__):
        where = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})"
    return f"raised {type(error).__name__}: {_shorten(error)}{where}"


def _shorten(error: BaseException) -> str:
    try:
        words = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # a user's exception may fail at this as well
        words = "without words"
    return " ".join(words[:_MAX_MESSAGE].split())
