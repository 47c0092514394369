"""A worker process for code that may raise, hang, flood or die: other people's verifiers run there, and it is killed when it does not answer in time.

    target = Target("slingshot.tasks.reasoning_gym:Dataset", ("chain_sum", {}))   # a class and its arguments
    worker = Worker()
    worker.call(target, "take", 7, 0, 10)      # a method of that object, which is built inside the worker; raises SandboxError

Parent and worker exchange JSON lines over pipes, nothing is unpickled. A worker that failed to answer is started anew by the next call.
This contains accidents, not malice: the worker has its user's rights.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.isolate import environment

_MAX_REPLY = 16 << 20  # bytes of one reply
_LAUNCH = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from slingshot.sandbox.isolate import serve; serve()"
)


class SandboxError(SlingshotError):
    """The call failed, in words that continue "verify() ...": raised, took too long, died, or returned what is not JSON."""


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
    """One process holding the objects of its targets, each built at its first call. Serves one thread at a time; any may close it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._objects: dict[str, int] = {}

    def call(self, target: Target, method: str, *args: Any, timeout: float | None = None) -> Any:
        """The method's result, as JSON brings it back; `timeout` instead of the target's. Raises SandboxError."""
        message = {"object": self.build(target), "method": method, "args": args}
        return self._exchange(message, timeout or target.timeout)

    def build(self, target: Target) -> int:
        """Start the worker and build the target's object, unless they are there; its number. Raises SandboxError."""
        if self._process is None:
            self._start()
        message = {"target": target.name, "args": target.args, "memory": target.memory}
        key = json.dumps(message)
        if key not in self._objects:
            self._objects[key] = self._exchange(message, target.start_timeout)
        return self._objects[key]

    def close(self) -> None:
        """End the worker and all it started; the next call would start another."""
        if self._process is not None:
            self._finalizer()
            self._process = None
            self._objects = {}

    def kill(self) -> None:
        """Make the call that another thread waits for fail at once."""
        if (process := self._process) is not None:
            _kill(process)

    def _start(self) -> None:
        home = tempfile.mkdtemp(prefix="slingshot-worker-")
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _LAUNCH, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment(home),
            start_new_session=True,  # Ctrl-C is the parent's to handle, and a kill reaches the worker's own children
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process, home)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def _exchange(self, message: dict[str, Any], timeout: float) -> Any:
        """Send one line, wait for one line. The worker is ended whenever it did not answer properly, for then its state is unknown."""
        line = json.dumps(message | {"timeout": timeout}).encode() + b"\n"
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


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], home: str) -> None:
    _kill(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
    shutil.rmtree(home, ignore_errors=True)
