"""A repository of the Hugging Face hub at one revision: what it lists, and what of it is fetched into the cache.

repository = Repository(hub_name("org/name@main"))   # asks the hub; UnreachableError where it does not answer
folder = repository.download(repository.descriptions() + repository.weights())
repository.span("model.safetensors", 0, 100_000)     # some bytes of a file, which is not kept
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_text
from slingshot.checkpoint.description import CONFIG, GENERATION, TOKENIZER
from slingshot.checkpoint.safetensors import INDEX, NEVER_READ, PICKLED, SINGLE, read_index

# The files of a repository that describe the model; its weights are those that the index names, or model.safetensors.
_DESCRIPTION = (CONFIG, GENERATION, *TOKENIZER, INDEX)
_MAX_DESCRIPTION = 50_000_000  # bytes; the largest tokenizer.json in use has 33 MB (Gemma 3), DeepSeek-V3's index 9 MB

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>{_PART}\.gguf))?(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./+-]*))?"
)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")  # a file at the top of a repository
_OF_PARTS = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
COMMIT = re.compile(r"[0-9a-f]{40}")


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

    def path(self, folder: Path) -> Path:
        """What the name stands for, in a folder that holds its files: the folder, or the first .gguf file."""
        return folder / self.parts[0] if self.file else folder


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


class UnreachableError(SlingshotError):
    """No answer from the hub: a clause that says why. What is in the cache may do instead."""


class Repository:
    """The files at the top of a repository at one commit: `sizes` by name."""

    def __init__(self, name: HubName) -> None:
        from huggingface_hub import HfApi, constants

        self.name = name
        # With it, the library asks the hub for more than the user did, and tells it more.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        with _one_line(name):
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=timeout)
            files = {file.rfilename: file for file in info.siblings or [] if _FILE.fullmatch(file.rfilename)}
            self.commit = str(info.sha)
            self.sizes = {file: -1 if entry.size is None else int(entry.size) for file, entry in files.items()}
            if not COMMIT.fullmatch(self.commit) or any(size < 0 for size in self.sizes.values()):
                raise ValueError("its answer holds no commit, or files without a size")
        # their names among the cache's blobs
        self._blobs = {file: str(entry.lfs.sha256 if entry.lfs else entry.blob_id) for file, entry in files.items()}
        self._folder = Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"

    def descriptions(self, small: bool = False) -> list[str]:
        """The files that describe a checkpoint; none of a GGUF model, which holds it all. `small`: of up to 50 MB."""
        there = [] if self.name.file else [file for file in _DESCRIPTION if file in self.sizes]
        return [file for file in there if not small or self.sizes[file] <= _MAX_DESCRIPTION]

    def weights(self) -> list[str]:
        """The files that make up the weights. The index, where there is one, is downloaded for that."""
        sizes, repo, name = self.sizes, self.name.repo, self.name
        packed = [file for file in sizes if file.endswith(".gguf")]
        if missing := [file for file in name.parts if file not in sizes]:
            raise SlingshotError(f"{repo} holds no {missing[0]}; its .gguf files: {', '.join(packed[:10]) or 'none'}")
        if name.file:
            return name.parts
        if large := [file for file in (CONFIG, INDEX) if sizes.get(file, 0) > _MAX_DESCRIPTION]:
            size = f"{sizes[large[0]]} bytes, more than {_MAX_DESCRIPTION}"
            raise SlingshotError(f"{repo}: {large[0]} has {size}; try another revision")
        if INDEX in sizes and CONFIG in sizes:
            files = _indexed(self.download([INDEX]))
            if missing := [file for file in files if file not in sizes]:
                absent = f"{missing[0]}, which the repository does not hold; try another revision"
                raise SlingshotError(f"{repo}: {INDEX} names {absent}")
            return files
        if SINGLE in sizes and CONFIG in sizes:
            return [SINGLE]
        if packed:
            raise SlingshotError(f"{repo} holds GGUF files; name one of them, such as {repo}/{packed[0]}")
        if pickled := [file for file in sizes if file.endswith(PICKLED)]:
            convert = "https://huggingface.co/spaces/safetensors/convert makes one as a pull request"
            way_out = f"look for a revision with safetensors ({convert}), then name it: {repo}@refs/pr/NUMBER"
            raise SlingshotError(f"{repo} holds no safetensors, and {pickled[0]} {NEVER_READ}: {way_out}")
        held = ", ".join(list(sizes)[:10]) or "none"
        raise SlingshotError(f"{repo} holds no {CONFIG} with a {SINGLE}; its files: {held}")

    def missing(self, files: list[str]) -> str:
        """What will be fetched, a line to announce; nothing where all is here. SlingshotError when there is no room."""
        from huggingface_hub import constants

        cache, snapshot = self._folder.parent, self._folder / "snapshots" / self.commit

        def is_here(file: str) -> bool:
            return (self._folder / "blobs" / self._blobs[file]).exists() or (snapshot / file).exists()

        absent = [file for file in files if not is_here(file)]
        total = ByteSize(sum(self.sizes[file] for file in absent))
        free = ByteSize(shutil.disk_usage(next(each for each in (cache, *cache.parents) if each.exists())).free)
        size = total.human_readable(decimal=True)
        if total > free:
            room = f"which has {free.human_readable(decimal=True)} free"
            way_out = "make room there, or set HF_HOME to a folder on a larger disk"
            raise SlingshotError(f"{self.name} needs {size} in {cache}, {room}; {way_out}")
        what = f"fetching {len(absent)} files, {size}, from {constants.ENDPOINT} into {cache}"
        return f"{self.name} (commit {self.commit[:7]}): {what}" if absent else ""

    def download(self, files: list[str]) -> Path:
        """The snapshot's folder with these files in it, one after the other: the library's threads outlive a Ctrl-C.

        What is there stays; a connection that drops is taken up again.
        """
        from huggingface_hub import hf_hub_download

        with _going_on(self.name):
            return [Path(hf_hub_download(self.name.repo, file, revision=self.commit)).parent for file in files][-1]

    def keep_branch(self) -> None:
        """Note where the branch stands, after a whole download: without a connection it is what is here then."""
        if not COMMIT.fullmatch(self.name.revision):
            # A cache that others keep, and that has everything, need not be writable.
            with contextlib.suppress(SlingshotError):
                write_text(self._folder / "refs" / self.name.revision, self.commit)

    def each(self, work: Callable[[str], None], files: list[str]) -> None:
        """Do something with each file, eight at a time, the hub's errors in one line."""
        from huggingface_hub.utils.tqdm import hf_thread_map

        with _going_on(self.name):
            hf_thread_map(work, files, max_workers=8, desc="Reading headers", disable=None)

    def span(self, file: str, start: int, count: int) -> bytes:
        """Bytes of a file on the hub, and no more even from a server that ignores ranges."""
        from huggingface_hub import constants, hf_hub_url, utils

        http: Any = utils  # which names what it exports in a way that mypy does not follow
        headers = http.build_hf_headers() | {"Range": f"bytes={start}-{start + count - 1}"}
        headers["Accept-Encoding"] = "identity"
        url = hf_hub_url(self.name.repo, file, revision=self.commit)
        content, timeout = bytearray(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http.http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
            http.hf_raise_for_status(response)
            skipped = 0 if response.status_code == 206 else start
            for chunk in response.iter_bytes(65_536):
                content += chunk
                if len(content) >= skipped + count:
                    break
        return bytes(content[skipped : skipped + count])


def cached(name: HubName, why: str) -> Path:
    """The download of an earlier day. SlingshotError says what is missing, and `why` it cannot be fetched."""
    from huggingface_hub import constants, try_to_load_from_cache

    missing = f"{name} is not"
    with contextlib.suppress(OSError, ValueError):  # a cache that cannot be read
        found = try_to_load_from_cache(name.repo, name.parts[0] if name.file else CONFIG, revision=name.revision)
        if isinstance(found, str):
            folder = Path(found).parent
            absent = [file for file in name.parts or _indexed(folder) if not (folder / file).exists()]
            if not absent:
                return name.path(folder)
            missing = f"{absent[0]} of {name} is not"
    way_out = "download it once with a connection, or name a local folder"
    raise SlingshotError(f"{missing} in {constants.HF_HUB_CACHE} and {why}; {way_out}")


def _indexed(folder: Path) -> list[str]:
    """The weight files of a snapshot, by its index or, without one, by their usual name."""
    files = set(read_index(folder).values()) or {SINGLE}
    if not all(file.endswith(".safetensors") and _FILE.fullmatch(file) for file in files):
        raise SlingshotError(f"{folder / INDEX} has no weight_map of tensors to safetensors files")
    return sorted(files)


@contextlib.contextmanager
def _going_on(name: HubName) -> Iterator[None]:
    """`_one_line` within a download, for which what is in the cache does not do instead."""
    try:
        with _one_line(name):
            yield
    except UnreachableError as error:
        raise SlingshotError(f"{name}: {error}; the same command goes on from here, whole files are kept") from error


@contextlib.contextmanager
def _one_line(name: HubName) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line: the user's to mend, or `UnreachableError`."""
    from huggingface_hub import constants, errors

    hub, repo, token = constants.ENDPOINT, name.repo, "set HF_TOKEN to a token of yours"
    try:
        yield
    except SlingshotError:
        raise
    except Exception as error:  # the library's own, httpx's, the operating system's, those of a malformed answer
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if isinstance(cause, errors.OfflineModeIsEnabled):
            raise UnreachableError("HF_HUB_OFFLINE is set") from error
        if isinstance(cause, errors.GatedRepoError):
            line = f"{repo} is gated: ask for access at {hub}/{repo}, then {token}"
        elif isinstance(cause, errors.RevisionNotFoundError):
            lists = f"{hub}/{repo}/tree/main lists its branches, tags and commits"
            line = f"{repo} has no revision {name.revision}; {lists}"
        elif status in (401, 403, 404):
            line = f"there is no folder {repo} here, and {hub} has no such repository that you may read ({status}); "
            line += f"check the name and, if it is private, {token}"
        elif status is None and isinstance(cause, OSError) and cause.errno is not None:
            line = f"{name}: cannot write {cause.filename or constants.HF_HUB_CACHE}: {cause.strerror}; "
            line += "make room there, or set HF_HOME to another folder; whole files are kept"
        else:
            said = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
            reason = f"answers {status}" if status else f"does not answer as it should ({said})"
            raise UnreachableError(f"{hub} {reason}") from error
        raise SlingshotError(line) from error
