"""The program's side of sandbox/program.py: a process that gives up its rights, then runs a Python source.

Two processes: one waits and tells how the other ended. That is the first of a process namespace where the system allows
one; it gives up its rights and becomes the program. Imports are few, for most programs take milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import types

from slingshot.sandbox import landlock, seccomp

_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWUSER, NEWPID, NEWNET, NEWIPC
_CAPABILITIES_3 = 0x20080522  # version of capset's structures
_PARENT_DEATH, _DUMPABLE = 1, 4  # prctl's options
_KILL = 9


def launch() -> None:
    """Run home/program.py, and end as it ended. Everything is said by the command line, in this order."""
    _, home, parent, seconds, memory, layers, *readable = sys.argv
    source = os.path.join(home, "program.py")
    with open(source, encoding="utf-8", errors="surrogatepass") as file:
        text = file.read()
    linux = sys.platform == "linux"
    if linux:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_DUMPABLE, 0, 0, 0, 0)  # no core dump, which a system may pipe to a program of its own
        libc.prctl(_PARENT_DEATH, _KILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it was killed in the meantime
        os._exit(1)
    if linux and "namespaces" in layers:  # a layer more where it is allowed; what must hold holds without it
        libc.unshare(_NAMESPACES)
    if child := os.fork():
        _wait(child)
    if linux:
        libc.prctl(_PARENT_DEATH, _KILL, 0, 0, 0)
    os.chdir(home)
    _limit(float(seconds), int(memory))
    _forget()
    if linux:
        _drop_capabilities(libc)
        landlock.no_new_privileges()
    if "landlock" in layers:
        landlock.restrict([*readable, home], ["/dev/null"])
    if "seccomp" in layers:
        seccomp.restrict()
    _become(text, source)


def _wait(child: int) -> None:
    """Until the child ends; then end like it."""
    for descriptor in range(3):
        os.close(descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _limit(seconds: float, memory: int) -> None:
    for name, value in {"CPU": int(seconds) + 2, "AS": memory, "FSIZE": 0, "NOFILE": 64, "CORE": 0}.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(kind)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):  # macOS has no limit of address space
            if sys.platform == "linux":
                raise


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root's, and those that a namespace of users gives: with them a limit could be raised again."""
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
        exec(compile(text, source, "exec", dont_inherit=True), main.__dict__)
    except Exception as error:
        import traceback

        here = error.__traceback__
        traceback.print_exception(type(error), error, here and here.tb_next)
        sys.exit(1)
