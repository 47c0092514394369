"""Landlock, Linux's own file sandbox: a process gives up every file but those it names, for good.

Standard library alone. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls; the numbers are the same on every architecture
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_ONLY = 1 << 0 | 1 << 1 | _READ_FILE | 1 << 14  # execute, write, read, truncate: what a rule on a file may name
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # from this ABI on, so many rights of files exist
_NO_NEW_PRIVS = 38  # prctl's option

_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    if os.uname().sysname != "Linux":
        return 0
    return max(0, _libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def no_new_privileges() -> None:
    """Programs with a set-uid bit no longer give rights, which is also what allows the rest without root."""
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """From here on only what lies below these paths can be opened; no TCP, no abstract socket, no signal to others.

    Paths that are not there are passed over. Raises OSError where the kernel refuses.
    """
    abi = version()
    rights = (1 << max(count for since, count in _FILE_RIGHTS.items() if since <= max(abi, 1))) - 1
    # Rights over files, TCP ports (ABI 4) and what lies outside (ABI 6): all handled, hence refused without a rule.
    attributes = struct.pack("QQQ", rights, 0b11, 0b11)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    _check(ruleset, "landlock_create_ruleset")
    read = _READ_FILE | _READ_DIR
    for path, allowed in [*((path, read) for path in readable), *((path, rights & ~1) for path in writable)]:
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            allowed &= _FILE_ONLY & rights
        rule = struct.pack("=Qi", allowed, parent)
        _check(_libc.syscall(_ADD, ruleset, ctypes.c_uint(1), rule, ctypes.c_uint(0)), f"landlock_add_rule {path}")
        os.close(parent)
    _check(_libc.syscall(_RESTRICT, ruleset, ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(ruleset)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
