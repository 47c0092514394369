"""llama.cpp's server as a child of this process, for a checkpoint or a GGUF file.

    with llama_server(locate("runs/tiny/rl_final"), "auto", 256, 1 << 30) as server: ...     # server.url

It is the installed package xllamacpp's, on a free port of loopback, and ends with this process, killed or not.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from slingshot import __version__
from slingshot.base.errors import SlingshotError
from slingshot.base.files import digest
from slingshot.checkpoint.load_save import open_weights
from slingshot.cost.flops import cache_bytes_per_token
from slingshot.machine.machine import cache_folder
from slingshot.stages.convert import write_gguf_file

_LOG = logging.getLogger(__name__)
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)  # seconds before each start anew, while none of them lasts
LASTING = 60.0  # seconds after which one that ends had lasted


@contextlib.contextmanager
def llama_server(
    source: Path,
    dtype: str,
    max_batch: int,
    cache_bytes: int,
    pauses: Sequence[float] = PAUSES,
    lasting: float = LASTING,
) -> Iterator[LlamaProcess]:
    """The server, once it answers. A checkpoint is converted to `dtype` first; SlingshotError where it does not start.

    One that ends on its own is started again, at the same URL: after each of `pauses`, from the first of them once it
    ran for `lasting` seconds. When all of them were in vain it stays ended.
    """
    if find_spec("xllamacpp") is None:
        raise SlingshotError("llama.cpp's server is not installed; pip install xllamacpp, or give --upstream URL")
    slots, context = _room(source, max_batch, cache_bytes)
    model, threads = str(as_gguf(source, dtype)), torch.get_num_threads()
    child = LlamaProcess(model, [str(slots), str(context), str(threads)])
    keeper = threading.Thread(target=child.keep, args=[pauses, lasting], name="llama.cpp", daemon=True)
    try:
        child.start()
        keeper.start()
        yield child
    finally:
        child.end()
        if keeper.ident is not None:
            keeper.join()
        child.close()


class LlamaProcess:
    """The child process, whichever it is at present. obstacle: why it answers nothing, None while it runs."""

    def __init__(self, model: str, arguments: Sequence[str]) -> None:
        self.url = ""
        self.obstacle: str | None = None
        self._model, self._arguments = model, arguments
        self._process: subprocess.Popen[str] | None = None
        self._ended, self._lock = threading.Event(), threading.Lock()

    def start(self) -> None:
        """Returns once it answers; SlingshotError where it does not."""
        port = self.url.rpartition(":")[2].strip("/") or "0"
        command = [sys.executable, "-m", "slingshot.serving.llama_child", self._model, port, *self._arguments]
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            with self._lock:
                if self._ended.is_set():
                    raise SlingshotError("llama.cpp's server was ended")
                # a session of its own: a terminal's Ctrl-C lets what runs come to its end first
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    start_new_session=True,
                )  # fmt: skip
            assert self._process.stdout is not None
            if url := self._process.stdout.readline().strip():
                self.url, self.obstacle = url, None
                return
            log.seek(0)
            lines = log.read().splitlines()
        errors = [line.partition(" E ")[2] for line in lines if " E " in line]  # the first is the cause
        raise SlingshotError(f"llama.cpp's server does not start: {(errors or lines[-1:] or ['it died'])[0]}")

    def keep(self, pauses: Sequence[float], lasting: float) -> None:
        """Start it again whenever it ends, until `end`, or until starts in a row as many as `pauses` did not last."""
        tries, began, why = 0, time.monotonic(), ""
        while True:
            status = self.close()
            if self._ended.is_set():
                return
            if time.monotonic() - began >= lasting:
                tries = 0
            why = why or f"llama.cpp's server ended with status {status}"
            given_up = tries == len(pauses)
            self.obstacle = f"{why}; " + (
                f"{tries} starts did not help: restart slingshot" if given_up else "it is started again"
            )
            _LOG.error("%s", self.obstacle)
            if given_up or self._ended.wait(pauses[tries]):
                return
            tries, began, why = tries + 1, time.monotonic(), ""
            try:
                self.start()
            except SlingshotError as error:
                why = str(error)

    def end(self) -> None:
        """Kill it; nothing is started any more."""
        with self._lock:
            self._ended.set()
            if self._process is not None:
                self._process.kill()

    def close(self) -> int:
        """Wait for its end and close its pipes; -> its status."""
        if self._process is None:
            return 0
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        return status


def as_gguf(source: Path, dtype: str) -> Path:
    """The source if it is a .gguf file, else the one written of it in the user's cache folder: anew where a file of the
    checkpoint is another, which takes the older one's place."""
    if source.suffix == ".gguf":
        if dtype != "auto":
            raise SlingshotError(f"{source} runs as it is: leave --dtype out")
        return source
    dtype = "bfloat16" if dtype == "auto" else dtype
    stats = [(file.name, file.stat()) for file in sorted(source.iterdir())]
    content = digest([__version__, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
    folder, whose = cache_folder() / "gguf", f"{source.resolve().name}-{digest([str(source.resolve()), dtype])}"
    file = folder / f"{whose}-{content}.gguf"
    if not file.exists():
        print(f"slingshot: {source} is written for llama.cpp, once: {file}", file=sys.stderr)
        for note in write_gguf_file(str(source), file, dtype):
            print(f"note: {note}", file=sys.stderr)
        for old in set(folder.glob(f"{whose}-*.gguf")) - {file}:
            old.unlink(missing_ok=True)
    return file


def _room(source: Path, max_batch: int, cache_bytes: int) -> tuple[int, int]:
    """Slots, and the context of each: as many of the model's own length as the cache holds, or a shorter one."""
    try:
        config = open_weights(source).config
    except SlingshotError:  # an architecture that llama.cpp alone knows
        return 1, 0
    held = max(1, int(cache_bytes / cache_bytes_per_token(config)))
    context = min(config.max_position_embeddings, held)
    return max(1, min(max_batch, held // context)), context
