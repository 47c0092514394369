"""The program's side of sandbox/program.py: a process that gives up its rights, then runs a Python source.

python -c "..." SPEC     # SPEC in JSON: "home" and what else `launch` reads; the source is home/program.py

Two processes: this one waits, and ends the other if nobody else does; its child is the first of a process namespace
where the system allows one, gives up its rights, and becomes the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import traceback
import types
from typing import Any

from slingshot.sandbox import landlock, seccomp

_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWUSER, NEWPID, NEWNET, NEWIPC
_CAPABILITIES_3 = 0x20080522  # version of capset's structures
_PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


def launch() -> None:
    """Run the program that the command line tells of, and end as it ended."""
    spec = json.loads(sys.argv.pop())
    source = os.path.join(spec["home"], "program.py")
    with open(source, encoding="utf-8", errors="surrogatepass") as file:
        text = file.read()
    linux = sys.platform == "linux"
    if linux:
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != spec["parent"]:  # killed in the meantime
        os._exit(1)
    if linux and spec["namespaces"]:  # a layer more where it is allowed; what must hold holds without it
        ctypes.CDLL(None, use_errno=True).unshare(_NAMESPACES)
    if child := os.fork():
        _wait(child, spec["seconds"])
    if linux:
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    os.chdir(spec["home"])
    _limit(spec)
    _forget()
    if linux:
        _drop_capabilities()
        landlock.no_new_privileges()
    if spec["landlock"]:
        landlock.restrict([*spec["readable"], spec["home"]], ["/dev/null", *[spec["home"]] * bool(spec["files"])])
    if spec["seccomp"]:
        seccomp.restrict()
    _become(text, source)


def _wait(child: int, seconds: float) -> None:
    """Until the child ends; then end like it. Where nobody tells of a parent's death, the alarm ends both."""
    for descriptor in range(3):
        os.close(descriptor)
    signal.alarm(int(seconds) + 5)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


def _limit(spec: dict[str, Any]) -> None:
    cpu = int(spec["seconds"]) + 2
    limits = {"CPU": cpu, "AS": spec["memory"], "FSIZE": spec["files"], "NOFILE": 64, "CORE": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(kind)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses a limit of its address space
            resource.setrlimit(kind, (value, value))


def _drop_capabilities() -> None:
    """Root's, and those that a namespace of users gives: with them a limit could be raised again."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(struct.pack("Ii", _CAPABILITIES_3, 0), bytes(24)) != 0:  # none effective, permitted or inheritable
        raise OSError(ctypes.get_errno(), "capset")


def _forget() -> None:
    """Nothing of slingshot stays in sight, so that the program's imports are those of a bare interpreter."""
    os.environ.clear()
    os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd())
    del sys.path[-1]
    for name in [name for name in sys.modules if name.partition(".")[0] == "slingshot"]:
        del sys.modules[name]


def _become(text: str, source: str) -> None:
    sys.argv[:] = [source]
    main = types.ModuleType("__main__")
    main.__file__ = source
    sys.modules["__main__"] = main
    try:
        exec(compile(text, source, "exec"), main.__dict__)
    except Exception as error:
        here = error.__traceback__
        traceback.print_exception(type(error), error, here and here.tb_next)
        sys.exit(1)
