"""The machine: what it has (`describe`), and what was measured on it (`Measurement`), kept across runs. No torch.

`slingshot.machine.device` and `slingshot doctor` measure. Measurements live in ~/.cache/slingshot/machine.json
($XDG_CACHE_HOME is respected) under a key of processor, threads and torch, so that none speaks for another machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, write_json


class Machine(Strict, extra="ignore"):  # what receipts of later versions say besides
    """What a receipt says about where a stage ran; `cores` and `memory_bytes` are what this process may use of it."""

    cpu: str
    cores: int
    memory_bytes: int
    accelerator: str | None = None
    threads: int | None = None
    torch: str | None = None


class Measurement(Strict):
    """Of one device: FLOP/s (for int8: operations/s) of a matrix product by dtype, bytes/s of reading memory, and how
    many threads are fastest by the model's width. `busy`: dtypes and widths of which that was measured on a busy
    machine, and is measured again on an idle one."""

    peak: dict[str, float] = {}
    bandwidth: float | None = None
    threads: dict[str, int] = {}
    busy: list[str] = []


def describe(**known: Any) -> Machine:
    """The machine as the system shows it; what only torch knows (`accelerator`, `threads`, `torch`) is handed in."""
    return Machine(cpu=_cpu_name(), cores=_cores(), memory_bytes=_memory_bytes(), **known)


def is_busy() -> bool:
    """Whether more than half of the cores have had work in the last minute: what is measured may then be too low."""
    return os.getloadavg()[0] > _cores() / 2


def cache_folder() -> Path:
    """What may be lost, and is then made again, is kept here: ~/.cache/slingshot, or $XDG_CACHE_HOME's."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slingshot"


def measurement_path() -> Path:
    """Where measurements are kept: machine.json in the user's cache folder."""
    return cache_folder() / "machine.json"


def load_measurement(key: str) -> Measurement:
    """What was measured under `key`; empty when nothing was, or the file is another's: a cache may always be lost."""
    return measurements().get(key, Measurement())


def measurements() -> dict[str, Measurement]:
    """Everything measured on this machine so far, by key; what is not a measurement counts as lost."""
    content, found = None, {}
    with contextlib.suppress(SlingshotError):
        content = read_json(measurement_path())
    for key, value in content.items() if isinstance(content, dict) else ():
        with contextlib.suppress(SlingshotError):
            found[key] = Measurement.parse(value)
    return found


def save_measurement(key: str, measurement: Measurement, anew: bool = False) -> bool:
    """Keep the best of `measurement` and what is known under `key`: a busy machine measures low, never high.

    `anew` forgets what was known. False when the cache cannot be written: it is measured again next time.
    """
    known = Measurement() if anew else load_measurement(key)
    peak = known.peak | {dtype: max(value, known.peak.get(dtype, 0.0)) for dtype, value in measurement.peak.items()}
    bandwidth = max(known.bandwidth or 0.0, measurement.bandwidth or 0.0) or None
    threads, named = known.threads | measurement.threads, {*measurement.peak, *measurement.threads}
    busy = sorted({*known.busy} - named | {*measurement.busy})
    best = Measurement(peak=peak, bandwidth=bandwidth, threads=threads, busy=busy)
    try:
        write_json(measurement_path(), {name: of.model_dump() for name, of in (measurements() | {key: best}).items()})
    except SlingshotError:
        return False
    return True


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """Cores this process may run on: its affinity, bounded by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))  # "max" is not a number: no quota
    return cores


def _memory_bytes() -> int:
    """Memory this process may use: the machine's, bounded by a container's limit; 0 when the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(limit).read_text(encoding="ascii")))
    return total
