"""Untrusted programs: each in a fresh process that can read Python's own files, and reach nothing else.

    outcome = run_program("print(int(input()) + 1)", stdin="41")          # Outcome(stdout="42\\n", reason="ok", ...)
    with Program(source, ProgramLimits(seconds=2)) as program:                   # or in conversation, a line for a line
        reply = program.exchange("41")

On Linux the process has Landlock (files), a seccomp filter (no network, no second process, no signal to others),
namespaces where they are allowed, limits, an empty environment and a private folder. Where there is no Landlock, or
namespaces are refused, bubblewrap makes them if it is installed. `isolation()` says what holds
here. Where it is too little for code that nobody has read, a program is refused unless `trusted`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import IO, Literal, Self, cast

from slingshot.base.errors import SlingshotError
from slingshot.sandbox import bubblewrap, landlock, seccomp

Reason = Literal["ok", "exit", "timeout", "memory", "output", "killed"]
Namespaces = Literal["own", "bubblewrap", "none"]

_LAUNCH = "import sys; sys.path.append(sys.argv.pop(1)); from slingshot.sandbox.launch import launch; launch()"
_PACKAGE = str(Path(__file__).parents[2])
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom")
_REAPS_LATER = hasattr(os, "waitid")  # macOS has it from Python 3.13 on
_PIECE = 1 << 16  # bytes moved at a time


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may use: seconds by the clock, bytes of address space, of output (each stream).

    It has one process, and threads, and can write no file.
    """

    seconds: float = 10.0
    memory: int = 512 << 20
    output: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `status` is its exit status, negative a signal, None where slingshot ended it."""

    stdout: str
    stderr: str
    status: int | None
    reason: Reason
    seconds: float


@dataclass(frozen=True)
class Isolation:
    """What this machine offers against a program: Landlock's ABI (0: none), seccomp filters, who makes namespaces."""

    landlock: int
    seccomp: bool
    namespaces: Namespaces

    @property
    def missing(self) -> str:
        """What untrusted programs need and this machine has not, in words; empty where all is there."""
        files = self.landlock or self.namespaces == "bubblewrap"
        return " and ".join([*["landlock"] * (not files), *["seccomp"] * (not self.seccomp)])

    def __str__(self) -> str:
        if self.missing:
            return f"untrusted ones are refused: no {self.missing}"
        named = {"own": ["namespaces"], "bubblewrap": ["bubblewrap"], "none": []}[self.namespaces]
        layers = [*[f"Landlock {self.landlock}"] * (self.landlock > 0), "seccomp", *named]
        return f"contained by {', '.join(layers[:-1])}{' and ' * (len(layers) > 1)}{layers[-1]}"


@functools.cache
def isolation() -> Isolation:
    """What holds here, as a program finds it. Raises SlingshotError where not even a harmless one can be run."""
    return Isolation(landlock.version(), seccomp.available(), _namespaces())


def require_isolation(trusted: bool = False) -> None:
    """Raise SlingshotError where this machine cannot contain programs that are not `trusted`."""
    if trusted or (landlock.version() and seccomp.available()):
        return
    if lacks := Isolation(landlock.version(), seccomp.available(), _namespaces()).missing:
        way = "Linux 5.13 or newer has both, and bubblewrap (bwrap) does for landlock"
        trust = "or say trusted = true if whoever writes the programs is to be trusted"
        raise SlingshotError(f"this machine cannot contain untrusted programs, for it has no {lacks}: {way}; {trust}")


def best_namespaces(kernel: bool, makes: Callable[[], bool], wraps: Callable[[], bool]) -> Namespaces:
    """A process's own where they are enough, for they take no time; else bubblewrap's, which hide files as well.

    kernel: whether Landlock hides files. makes, wraps: whether a process, or bubblewrap, can make namespaces here.
    """
    if kernel and makes():
        return "own"
    return "bubblewrap" if wraps() else "own" if makes() else "none"


def _namespaces() -> Namespaces:
    wraps = _bubblewrap_works if bubblewrap.installed() else lambda: False
    return best_namespaces(landlock.version() > 0, _makes_namespaces, wraps)


@functools.cache
def _makes_namespaces() -> bool:
    probe = run_program("import os; print(os.getpid())", trusted=True, namespaces="own")
    if probe.reason != "ok":
        said = probe.stderr.strip().rpartition("\n")[2]
        raise SlingshotError(f"no program can be run in a sandbox here ({probe.reason}): {said}")
    return probe.stdout == "1\n"  # the first of its namespace


@functools.cache
def _bubblewrap_works() -> bool:
    return run_program("print(1)", trusted=True, namespaces="bubblewrap").stdout == "1\n"


def run_program(
    source: str,
    stdin: str = "",
    limits: ProgramLimits | None = None,
    trusted: bool = False,
    namespaces: Namespaces | None = None,
) -> Outcome:
    """Run a Python source to its end, in `namespaces` that are said or the best of this machine.

    Raises SlingshotError where this machine cannot contain it.
    """
    with Program(source, limits, trusted, namespaces) as program:
        return program.finish(stdin)


class Program:
    """A running program, for one thread at a time. It can import the standard library."""

    def __init__(
        self,
        source: str,
        limits: ProgramLimits | None = None,
        trusted: bool = False,
        namespaces: Namespaces | None = None,
    ) -> None:
        self._limits = limits or ProgramLimits()
        require_isolation(trusted)
        made = namespaces or _namespaces()
        self._wrapped = made == "bubblewrap"
        layers = {"landlock": landlock.version() > 0, "seccomp": seccomp.available(), "namespaces": made == "own"}
        self._home = tempfile.mkdtemp(prefix="slingshot-program-")
        Path(self._home, "program.py").write_text(source, encoding="utf-8", errors="surrogatepass")
        parent = 1 if self._wrapped else os.getpid()
        spec = (parent, self._limits.seconds, self._limits.memory)
        told = [self._home, *map(str, spec), " ".join(name for name, there in layers.items() if there), *_readable()]
        command = [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", _LAUNCH, _PACKAGE, *told]
        if self._wrapped:
            command[0] = os.path.realpath(sys.executable)
            libraries, hidden = _libraries()
            seen, shown = [*_FILES, *libraries], [command[0], os.path.join(_PACKAGE, "slingshot")]
            command[:0] = bubblewrap.wrapped(bubblewrap.installed() or "bwrap", self._home, seen, hidden, shown)
        self._began, self._reason = time.monotonic(), cast(Reason | None, None)
        self._process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env={"PYTHONHASHSEED": "0"}, start_new_session=True
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._pipes = self._process.stdin, (self._process.stdout, self._process.stderr)
        self._unsent, self._ends = b"", False  # what it is to read yet; whether that is all
        self._written, self._errors = bytearray(), bytearray()
        self._taken = 0  # bytes of what was written that `exchange` has returned
        self._selector = selectors.DefaultSelector()
        for pipe, kept in zip(self._pipes, (self._written, self._errors), strict=True):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, kept)
        os.set_blocking(self._stdin.fileno(), False)

    def exchange(self, line: str) -> str | None:
        """Send a line; the next line that the program writes. None when there is none: it ended, or was ended."""
        self._send(line + "\n")
        while (end := self._written.find(b"\n", self._taken)) < 0:
            if not self._pump():
                return None
        line, self._taken = self._written[self._taken : end].decode("utf-8", "replace"), end + 1
        return line

    def finish(self, stdin: str = "") -> Outcome:
        """Send the rest of its input, and read until it ends or is ended."""
        self._ends = True
        self._send(stdin)
        while self._pump():
            pass
        while self._reason is None and not self._has_ended():
            time.sleep(0.001)
            if self._left() <= 0:
                self._reason = "timeout"
        seconds = time.monotonic() - self._began
        self.close()
        status = None if self._reason else self._status()
        out, err = (kept.decode("utf-8", "replace") for kept in (self._written, self._errors))
        return Outcome(out, err, status, self._reason or _reason(self._status(), err), seconds)

    def close(self) -> None:
        """End it and all it started, and remove its folder."""
        if self._process.returncode is None or not _REAPS_LATER:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of those that have ended
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._selector.close()
        for pipe in (self._stdin, *self._pipes):
            with contextlib.suppress(OSError):
                pipe.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _status(self) -> int:
        """bubblewrap tells of a signal as shells do."""
        status = self._process.returncode
        return 128 - status if self._wrapped and status > 128 else status

    def _left(self) -> float:
        return self._began + self._limits.seconds - time.monotonic()

    def _has_ended(self) -> bool:
        """It is not reaped yet, so that its number stays its own until its group is killed."""
        if not _REAPS_LATER:
            return self._process.poll() is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _send(self, text: str) -> None:
        if not self._stdin.closed:
            if not self._unsent:
                self._selector.register(self._stdin, selectors.EVENT_WRITE)
            self._unsent += text.encode("utf-8", "surrogatepass")

    def _pump(self) -> bool:
        """Move what can be moved. False when no more will come: its pipes are closed, or a limit is passed."""
        if self._reason or all(pipe.closed for pipe in self._pipes):
            return False
        for key, _ in self._selector.select(max(0.0, self._left())):
            if key.fileobj is self._stdin:
                self._write()
            else:
                self._read(cast(IO[bytes], key.fileobj), key.data)
        if self._reason is None and self._left() <= 0:
            self._reason = "timeout"
        return self._reason is None

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent[:_PIECE]) :]
        except OSError:  # it reads no more
            self._unsent, self._ends = b"", True
        if not self._unsent:
            self._selector.unregister(self._stdin)
            if self._ends:
                self._stdin.close()

    def _read(self, pipe: IO[bytes], kept: bytearray) -> None:
        piece = os.read(pipe.fileno(), _PIECE)
        kept += piece
        if not piece:
            self._selector.unregister(pipe)
            pipe.close()
        elif len(kept) > self._limits.output:
            self._reason = "output"
            del kept[self._limits.output :]


def _reason(status: int, errors: str) -> Reason:
    if status < 0:
        return "killed"
    last = errors.rstrip().rpartition("\n")[2]
    return "ok" if status == 0 else "memory" if last.startswith("MemoryError") else "exit"


@functools.cache
def _libraries() -> tuple[list[str], set[str]]:
    """Folders of Python's standard library and the system's, and of installed packages, whose data may hold answers."""
    standard = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    packages = [*site.getsitepackages(), site.getusersitepackages(), "/usr/lib/python3/dist-packages"]
    packages += [os.path.join(path, name) for path in standard for name in ("site-packages", "dist-packages")]
    hidden = {os.path.realpath(path) for path in packages if os.path.isdir(path)}
    roots = {os.path.realpath(path) for path in (*_LIBRARIES, os.path.join(sys.base_prefix, "lib"), *standard)}
    return [root for root in sorted(roots) if not any(root.startswith(other + os.sep) for other in roots)], hidden


@functools.cache
def _readable() -> list[str]:
    """What covers the libraries, but no installed package."""
    roots, hidden = _libraries()
    return [*_FILES, *(path for root in roots for path in _without(root, hidden))]


def _without(path: str, hidden: set[str]) -> list[str]:
    """Paths that cover all below `path` except what is hidden."""
    if path in hidden or not os.path.exists(path):
        return []
    if not any(other.startswith(path + os.sep) for other in hidden):
        return [path]
    return [found for name in sorted(os.listdir(path)) for found in _without(os.path.join(path, name), hidden)]
