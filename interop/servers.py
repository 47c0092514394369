"""Servers of the comparisons, each a process on a free port of loopback, and the Pythons of their environments."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

REPO = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as its:
        its.bind(("127.0.0.1", 0))
        port: int = its.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    command: list[str], port: int, log: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """A server's process, and what it started: its URL. Fails with the end of its log where it does not answer."""
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **environment}  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | more, start_new_session=True, cwd=log.parent
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            time.sleep(0.5)
        else:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            pytest.fail(f"{command[0]} does not answer; the end of {log}:\n{tail}", pytrace=False)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def peer_python(name: str) -> str:
    python = REPO / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python.parents[1].name} is not there: make interop installs the peers", pytrace=False)
    return str(python)
