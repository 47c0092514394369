"""Memory is kept from one step to the next: in a process of its own, whose heap nobody else has touched; and the most
of it is known."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from slingshot.machine.memory import HEAP, PeakMemory, peak_device_memory_bytes, peak_host_memory_bytes
from tests.waiting import PATIENCE

PROGRAM = """
import resource
import torch
from slingshot.machine.memory import keep_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(n << 20, dtype=torch.uint8) for n in (1, 3, 64, 5, 40)]
    del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_memory()
print(kept, keep_memory() == kept, [faults_of_a_step() for _ in range(3)][-1])
blocks = [torch.empty(n << 20, dtype=torch.uint8) for n in (3, 1, 7, 5)]
place = blocks[2].data_ptr()
del blocks[2]
again = torch.empty(7 << 20, dtype=torch.uint8)
print(again.data_ptr() == place, {each.data_ptr() % 64 for each in [again, *blocks]} == {0})
"""


@pytest.mark.slow
def test_what_a_step_frees_the_next_takes_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=PATIENCE)
    kept, same, faults, reused, aligned = done.stdout.split()
    assert (kept == "True") == (platform.libc_ver()[0] == "glibc")
    assert same == aligned == "True" and (reused == "True") == (kept == "True" and HEAP.exists())
    assert kept == "False" or int(faults) < 100  # 113 MB in pages of 4 KB are 29,000


@pytest.mark.slow
def test_the_peak_sees_a_large_allocation() -> None:
    before = peak_host_memory_bytes()
    block = b"x" * (before + 64 * 2**20)  # larger than anything this process has held
    assert peak_host_memory_bytes() >= before + 32 * 2**20 and len(block) > before
    assert peak_device_memory_bytes() is None or peak_device_memory_bytes() > 0


@pytest.mark.parametrize(
    ("host", "device", "shown"),
    [(None, None, ""), (2**30, None, "1 GiB"), (2**30, 3 * 2**30, "1 GiB host, 3 GiB device"), (None, 1, "1 B device")],
)
def test_peak_memory_says_which_memory(host: int | None, device: int | None, shown: str) -> None:
    assert PeakMemory(peak_host_memory_bytes=host, peak_device_memory_bytes=device).peak_memory == shown
