"""bubblewrap, where it is installed: a program in namespaces of its own, with nothing but what it may read mounted.

    [*wrapped("/usr/bin/bwrap", home, ["/usr/lib"], hidden=[], shown=[]), "/usr/bin/python3", ...]

It may be set-uid, and then makes namespaces where nobody else is allowed to. https://github.com/containers/bubblewrap
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence

_PARTS = ("user", "pid", "net", "ipc", "uts")
_LINKS = ("/lib", "/lib64", "/usr/lib64")  # on systems where all is below /usr; programs name their loader by them


def installed() -> str | None:
    """The path of `bwrap`; None where there is none."""
    return shutil.which("bwrap")


def wrapped(bwrap: str, home: str, readable: Sequence[str], hidden: Iterable[str], shown: Iterable[str]) -> list[str]:
    """The beginning of a command whose process sees `readable` and `home`, and can write to neither.

    Folders that are `hidden` are empty where they lie in what is readable, but for what is `shown`. The process is the
    child of its namespace's first, and ends with the one that started it.
    """
    empty = [path for path in hidden if any(path.startswith(root + os.sep) for root in readable)]
    mounts = [option for path in _LINKS if os.path.islink(path) for option in ("--symlink", os.readlink(path), path)]
    for path in readable:
        mounts += ["--dev-bind-try" if path.startswith("/dev/") else "--ro-bind-try", path, path]
    mounts += [option for path in empty for option in ("--tmpfs", path)]
    mounts += [option for path in shown for option in ("--ro-bind", path, path)]
    mounts += ["--ro-bind", home, home]
    mounts += [option for path in (*empty, "/") for option in ("--remount-ro", path)]
    return [bwrap, *(f"--unshare-{part}" for part in _PARTS), "--die-with-parent", "--cap-drop", "ALL", *mounts, "--"]
