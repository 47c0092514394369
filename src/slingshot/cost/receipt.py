"""The receipt every artifact carries: what a stage consumed, and the artifacts it came from. No torch.

meter = Meter(saved_state)                       # None at the start; `meter.state()` of before an interruption
meter.add(tokens=4096, training=3e12, mtp=2e11)  # every step: tokens, and FLOPs by what they were spent on
meter.receipt("pretrain", out.name, config, parents=[], artifact=folder, machine=describe()).write(folder)
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from slingshot import __version__
from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import digest, os_errors, read_json, read_text, write_json, write_text
from slingshot.machine.energy import Energy
from slingshot.machine.machine import Machine, measurement_path
from slingshot.machine.memory import PeakMemory, peak_device_memory_bytes, peak_host_memory_bytes

RECEIPT = "receipt.json"
_LARGE = 1 << 24  # bytes; less than this is read faster than it is worth remembering


class Parent(Strict):
    """An artifact a stage was made from."""

    path: str
    digest: str


class Receipt(PeakMemory, extra="ignore"):
    """The content of receipt.json. Of other versions, what they lack is unknown, what they have besides left out."""

    stage: str  # its kind: pretrain, sft, rl ...
    name: str  # the artifact's own
    config: dict[str, Any] = {}  # the stage's whole configuration
    parents: list[Parent] = []  # the artifacts read, by path and content
    digest: str  # of this artifact's content; see `artifact_digest`
    tokens: int = Field(ge=0)  # processed
    flops: float = Field(ge=0)  # spent on them, from the architecture (slingshot.cost.flops)
    flops_by_part: dict[str, float] = {}  # the same by what they were spent on; sums to `flops`
    seconds: float = Field(ge=0)  # wall clock while the stage ran, interruptions excluded
    mfu: float | None = None  # flops / seconds / the machine's measured matrix peak; None when nothing was measured
    money: float | None = None  # seconds at the given price per hour; None when no price was given
    machine: Machine = Machine(cpu="unknown", cores=0, memory_bytes=0)
    version: str = "unknown"
    energy_joules: float | None = None  # of processors and GPUs meanwhile; None where the system does not tell
    devices: int = Field(1, ge=1)  # that worked at once: accelerators, or 1 without
    extra: dict[str, Any] = {}  # what else a stage has to say

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.devices

    def write(self, folder: Path) -> None:
        """Write receipt.json into the artifact's folder."""
        write_json(folder / RECEIPT, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Read a folder's receipt.json. Raises SlingshotError when it is missing, broken or not a receipt."""
        values = read_json(folder / RECEIPT)
        if not isinstance(values, dict):
            raise SlingshotError(f"{folder / RECEIPT} is no receipt; remove {folder} to have it made again")
        return cls.parse(values, str(folder / RECEIPT))


class Meter:
    """Counts what a stage consumes; a resumed stage goes on counting from `state()`."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._before = state or {"energy_joules": 0.0}  # a state without joules is of an attempt that could not count
        self.tokens: int = self._before.get("tokens", 0)
        self.flops_by_part: dict[str, float] = dict(self._before.get("flops_by_part", {}))
        self._energy = Energy()
        self._start = time.perf_counter()

    def add(self, tokens: int = 0, **flops: float) -> None:
        """Count tokens, and FLOPs under the names of what they were spent on."""
        self.tokens += tokens
        self._energy.poll()
        for part, count in flops.items():
            self.flops_by_part[part] = self.flops_by_part.get(part, 0.0) + count

    @property
    def flops(self) -> float:
        return sum(self.flops_by_part.values())

    @property
    def seconds(self) -> float:
        """Wall clock this stage has run, earlier attempts up to their last saved state included."""
        return self._before.get("seconds", 0.0) + time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """JSON from which `Meter(state)` goes on, by a Receipt's keys. Energy: None unless all of it was counted."""
        joules, earlier = self._energy.joules, self._before.get("energy_joules")
        device = max(self._before.get("peak_device_memory_bytes") or 0, peak_device_memory_bytes() or 0)
        return {
            "tokens": self.tokens, "flops_by_part": dict(self.flops_by_part), "seconds": self.seconds,
            "energy_joules": None if joules is None or earlier is None else earlier + joules,
            "peak_host_memory_bytes": max(self._before.get("peak_host_memory_bytes", 0), peak_host_memory_bytes()),
            "peak_device_memory_bytes": device or None,
        }  # fmt: skip

    def receipt(
        self, stage: str, name: str, config: Mapping[str, Any], parents: Iterable[Path | Parent], artifact: Path,
        machine: Machine, peak: float | None = None, price: float | None = None, devices: int = 1,
        extra: Mapping[str, Any] | None = None,
    ) -> Receipt:  # fmt: skip
        """Close the account of the finished folder `artifact`, made from `parents`.

        `peak`: measured FLOP/s of a matrix product in the dtype used, for the MFU (arXiv 2204.02311, appendix B);
        `price`: money per hour of this machine; `devices`: see `Receipt`.
        """
        state = self.state()
        made_from = [p if isinstance(p, Parent) else Parent(path=str(p), digest=artifact_digest(p)) for p in parents]
        return Receipt(
            stage=stage, name=name, config=dict(config), parents=made_from, digest=artifact_digest(artifact),
            flops=self.flops, mfu=self.flops / state["seconds"] / peak if peak else None, machine=machine,
            money=None if price is None else state["seconds"] / 3600 * price, devices=devices, extra=dict(extra or {}),
            version=__version__, **state,
        )  # fmt: skip


def artifact_digest(path: Path) -> str:
    """A short name of an artifact's content: 16 hex digits of a SHA-256 over its files' names and bytes.

    A folder with a receipt answers from it, unless something in it is younger, as in a copy. What is large is read once
    and remembered as long as size, inode and times of its files stay. Files that hold clocks do not count: the same
    stage run twice is the same artifact. SlingshotError when there is nothing at `path`.
    """
    if not path.exists():
        raise SlingshotError(f"{path} does not exist; a stage was to read it")
    files = {Path(path.name): path}
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        files = {file.relative_to(path): file for file in found if _counts(file.relative_to(path))}
    began, stats = time.time_ns(), _stats(files)
    if (receipt := path / RECEIPT).is_file():
        written = receipt.stat().st_ctime_ns
        # The receipt's own arrival changes the folder, a little after the receipt's own time.
        settled = path.stat().st_mtime_ns <= written + 10_000_000
        if settled and all(max(mtime, ctime) < written for *_, mtime, ctime in stats):
            return Receipt.read(path).digest
    remembered = measurement_path().with_name("digests") / digest(stats)
    with contextlib.suppress(SlingshotError):
        return read_text(remembered)
    total = hashlib.sha256()
    for relative, file in files.items():
        with os_errors(f"cannot read {file}"), file.open("rb") as content:
            total.update(bytes(relative) + b"\0" + hashlib.file_digest(content, "sha256").digest())
    name = total.hexdigest()[:16]
    # A change within a tick of the clock after another leaves no trace: only files that have rested are remembered.
    rested = all(ctime < began - 2_000_000_000 for *_, ctime in stats)
    if rested and sum(size for _, size, *_ in stats) >= _LARGE and _stats(files) == stats:
        with contextlib.suppress(SlingshotError):  # a cache that cannot be written makes the next time slow, not wrong
            write_text(remembered, name)
    return name


def _stats(files: Mapping[Path, Path]) -> list[tuple[str, int, int, int, int, int]]:
    """Name, size, device, inode and times of every file: what changes when one is written, replaced or copied."""
    stats = [(name.as_posix(), file.stat()) for name, file in files.items()]
    return [(name, s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]


def _counts(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return not (hidden or file.name in {RECEIPT, "metrics.jsonl"} or "tfevents" in file.name)
