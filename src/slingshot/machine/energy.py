"""Energy as the operating system counts it: the processors' RAPL counters, and the counters of NVIDIA's GPUs. No torch.

    energy = Energy()          # nothing readable: energy.joules stays None
    energy.poll()              # now and then: RAPL's counters turn over after some minutes
    energy.joules              # since the start, of the whole machine, whoever used it

RAPL counts a processor package, and on servers its memory apart, in /sys/class/powercap/intel-rapl:*/energy_uj (AMD
has the same files), which many systems show to root alone. NVML counts a GPU in millijoules. What neither sees, disks,
fans, network and the power supply's loss, is not in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Counter:
    """Joules read by `read`, modulo `span` (0: it never turns over), added up in `total`."""

    read: Callable[[], float]
    span: float
    total: float = 0.0

    def __post_init__(self) -> None:
        self.last = self.read()

    def poll(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            now = self.read()
            self.total += now - self.last + (self.span if now < self.last else 0.0)
            self.last = now


class Energy:
    """Every counter that can be read, from now on."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._counters = [*_rapl(powercap), *_nvml()]

    def poll(self) -> None:
        for counter in self._counters:
            counter.poll()

    @property
    def joules(self) -> float | None:
        """Since the start; None where nothing counts."""
        self.poll()
        return sum(counter.total for counter in self._counters) if self._counters else None


def _rapl(powercap: Path) -> list[Counter]:
    """Counters of processor packages, and of memory, which a package's does not include."""
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            if (zone / "name").read_text(encoding="ascii").strip().startswith(("package", "dram")):
                span = _joules(zone / "max_energy_range_uj")
                found.append(Counter(partial(_joules, zone / "energy_uj"), span))
    return found


def _joules(file: Path) -> float:
    return int(file.read_text(encoding="ascii")) / 1e6


def _nvml() -> list[Counter]:
    """Counters of the GPUs this process may use, where NVIDIA's library is and its driver runs."""
    try:
        library, count = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint()
        if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
    except (OSError, AttributeError):  # no library, or another one of that name
        return []
    found = []
    for name in _visible(count.value):
        handle = ctypes.c_void_p()
        if name.isdecimal():
            failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
        else:
            failed = library.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(name.encode()), ctypes.byref(handle))
        if not failed:
            with contextlib.suppress(OSError):
                found.append(Counter(partial(_gpu_joules, library, handle), span=0.0))
    return found


def _visible(count: int) -> list[str]:
    """Numbers and UUIDs in CUDA_VISIBLE_DEVICES, as CUDA reads it: all if not set, else up to the first wrong one."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count)] if given is None else [name.strip() for name in given.split(",")]
    known = [int(name) < count if name.isdecimal() else name.startswith(("GPU-", "MIG-")) for name in names]
    return names[: [*known, False].index(False)]


def _gpu_joules(library: ctypes.CDLL, handle: ctypes.c_void_p) -> float:
    value = ctypes.c_ulonglong()
    if code := library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)):
        raise OSError(code, "this GPU does not count its energy")
    return value.value / 1000
