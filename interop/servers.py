"""Servers of the comparisons, each a process on a free port of loopback, and the Pythons of their environments."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import openai
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
    with started(command, port, log, environment) as (url, _):
        yield url


@contextlib.contextmanager
def started(
    command: list[str], port: int, log: Path, environment: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """As `running`, and what kills it."""
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
        yield url, lambda: os.killpg(process.pid, signal.SIGKILL)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def peer_python(name: str) -> str:
    python = REPO / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python.parents[1].name} is not there: make interop installs the peers", pytrace=False)
    return str(python)


@contextlib.contextmanager
def gateway(engine: str, checkpoint: Path, dtype: str, work: Path) -> Iterator[tuple[str, openai.OpenAI]]:
    """`slingshot serve --engine`: the other engine's URL, and a client. llama.cpp's server is slingshot's own child."""
    own = free_port()
    command = [sys.executable, "-m", "slingshot", "serve", str(checkpoint), "--engine", engine, "--port", str(own)]
    command += ["--ledger", str(work / "ledger.sqlite")]
    with contextlib.ExitStack() as stack:
        more = {}
        if engine == "llama.cpp":
            packages = Path(peer_python("llama-cpp")).parents[1].glob("lib/python*/site-packages")
            paths = [*filter(None, [os.environ.get("PYTHONPATH")]), *map(str, packages)]
            more = {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(work)}
            command += ["--cache-gib", "0.2", "--dtype", dtype]
        else:
            port = free_port()
            theirs = [peer_python("vllm-cpu"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
            theirs += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
            theirs += ["--max-model-len", "1024", "--enable-prompt-tokens-details"]
            if "Deepseek" in (checkpoint / "config.json").read_text():
                theirs += ["--attention-config", '{"backend": "CPU_MLA"}']
            command += ["--upstream", stack.enter_context(running(theirs, port, work / "upstream.log"))]
        url = stack.enter_context(running(command, own, work / "gateway.log", more))
        [runs] = re.findall(r"^Model +\S+: (\S+) ", (work / "gateway.log").read_text(), re.MULTILINE)
        yield runs, stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))


def busy(url: str) -> bool:
    """Whether the upstream makes an answer."""
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{url}/slots", timeout=5) as slots:
        return b'"is_processing":true' in slots.read()
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as metrics:
        lines = metrics.read().decode().splitlines()
    return any(float(line.split()[-1]) > 0 for line in lines if line.startswith("vllm:num_requests_running"))
