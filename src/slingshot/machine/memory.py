"""This process's memory: kept, so that what one step frees the next takes again, in pages of 2 MB if Linux has them;
and the most it had. No torch.

A step takes and frees hundreds of megabytes in blocks of a few. By default the C library gives each back to the system
and gets fresh pages for the next, which cost more than what is computed in them. What is kept has holes: torch's blocks
are aligned, and glibc never gives an aligned block a hole of its own size. native/heap, where it is built, asks for
them in another way, and a hole serves the next block of its size. With MALLOC_MMAP_THRESHOLD_=131072 in the environment
every block is given back, which takes a third more time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from slingshot.base.config import Strict
from slingshot.base.quantity import show_size

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14  # sys/mman.h, linux/mman.h
LARGEST = (1 << 31) - 1  # bytes; blocks from here on are still mapped and given back one by one
LARGE_PAGE = 2 << 20
HEAP = Path(__file__).with_name("slingshot_heap.so")


@cache
def _library() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None)


def advise(address: int, size: int, advice: int) -> None:
    """Tell the system how so many bytes are used from here on: madvise(2)."""
    _library().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


@cache
def keep_memory() -> bool:
    """Have this process keep the memory it frees. False where the C library is not glibc, or its user set when it gives
    memory back, and nothing is changed."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        library = _library()
        mallopt, malloc, free = library.mallopt, library.malloc, library.free
        _ = library.gnu_get_libc_version  # glibc's alone; others have a mallopt of other options
    except (OSError, AttributeError, TypeError):
        return False
    if not (mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, -1)):
        return False
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    # Addresses at the heap's end, not memory: that is taken when they are first written to. Free, they stay the heap's.
    if block := malloc(LARGEST - LARGE_PAGE):
        advise(-(-block // LARGE_PAGE) * LARGE_PAGE, LARGEST // LARGE_PAGE * LARGE_PAGE - 2 * LARGE_PAGE, MADV_HUGEPAGE)
        free(block)
    if HEAP.exists():
        with contextlib.suppress(OSError):  # built for another machine
            ctypes.CDLL(str(HEAP)).slingshot_align_blocks()  # of torch, if it is loaded
    return True


class PeakMemory(Strict):
    """The most memory held at once: the first process's resident set, and what torch allocated on an accelerator."""

    peak_host_memory_bytes: int | None = Field(None, ge=0)
    peak_device_memory_bytes: int | None = Field(None, ge=0)

    @property
    def peak_memory(self) -> str:
        """For people: "1.2 GiB", or "1.2 GiB host, 30 GiB device"; nothing where it is not known."""
        host, device = self.peak_host_memory_bytes, self.peak_device_memory_bytes
        if device is None:
            return "" if host is None else show_size(host)
        return ("" if host is None else f"{show_size(host)} host, ") + f"{show_size(device)} device"


def peak_device_memory_bytes() -> int | None:
    """The most torch has allocated on this process's accelerator; None where it used none or does not count."""
    torch: Any = sys.modules.get("torch")  # who uses an accelerator has imported it; this file does not
    try:
        return torch.accelerator.max_memory_allocated() or None
    except (AttributeError, RuntimeError):  # no torch, no accelerator, or one whose memory torch does not count
        return None


def peak_host_memory_bytes() -> int:
    """The largest resident set this process has had, from /proc where there is one: getrusage's figure survives exec,
    so a child of a large process would start with its parent's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
