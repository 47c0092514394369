"""A stage's process: started, watched and stopped by the runner, and gone when the runner is gone.

code = supervise(["-m", "slingshot", "stage", ...], lock)
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal this process gets when its parent dies
_TORCHRUN = "torch.distributed.run"


def launcher(program: Sequence[str], processes: int) -> list[str]:
    """How `program` is started, after the interpreter's name: by itself, or by torchrun as several processes."""
    if processes == 1:
        return [*program]
    return ["-m", _TORCHRUN, "--standalone", "--nproc-per-node", str(processes), *program]


def supervise(arguments: Sequence[str], lock: int) -> int:
    """Run Python on `arguments` to its end; its exit code, -signal if one killed it. It dies with this process.

    The child inherits the descriptor `lock` and has a session of its own, so a terminal's Ctrl-C reaches it once, from
    here; KeyboardInterrupt goes up when it has ended. A second Ctrl-C kills it.
    """
    parent = os.getpid()
    # Linux only; on other systems an orphan finishes its stage, and the lock keeps others out.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    # torchrun ends its workers when it is told to; killed outright it would leave them.
    death = signal.SIGTERM if _TORCHRUN in arguments else signal.SIGKILL

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(death))
        if os.getppid() != parent:
            os._exit(1)

    child: dict[str, Any] = {"start_new_session": True, "preexec_fn": die_with_parent, "pass_fds": [lock]}
    process = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL, **child)
    interrupted = False
    try:
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                if interrupted:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.send_signal(signal.SIGINT)
                interrupted = True
    finally:
        if process.poll() is None:
            process.kill()
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode
