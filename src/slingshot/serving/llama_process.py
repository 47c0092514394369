"""llama.cpp's server as a child of this process, for a checkpoint or a GGUF file.

    with llama_server(locate("runs/tiny/rl_final"), "auto", 256, 1 << 30) as url: ...

It is the installed package xllamacpp's, on a free port of loopback, and ends with this process, killed or not.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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


@contextlib.contextmanager
def llama_server(source: Path, dtype: str, max_batch: int, cache_bytes: int) -> Iterator[str]:
    """Its URL, once it answers. A checkpoint is converted to `dtype` first; SlingshotError where it does not start."""
    if find_spec("xllamacpp") is None:
        raise SlingshotError("llama.cpp's server is not installed; pip install xllamacpp, or give --upstream URL")
    slots, context = _room(source, max_batch, cache_bytes)
    command = [sys.executable, "-m", "slingshot.serving.llama_child", str(as_gguf(source, dtype)), "0"]
    command += [str(slots), str(context), str(torch.get_num_threads())]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        # a session of its own: a terminal's Ctrl-C lets what runs come to its end first
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if not (url := process.stdout.readline().strip()):
                log.seek(0)
                lines = log.read().splitlines()
                errors = [line.partition(" E ")[2] for line in lines if " E " in line]  # the first is the cause
                raise SlingshotError(f"llama.cpp's server does not start: {(errors or lines[-1:] or ['it died'])[0]}")
            yield url
        finally:
            process.kill()


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
