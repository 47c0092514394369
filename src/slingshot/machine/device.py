"""What "auto" means: the device, the dtype and the threads this machine computes fastest with, by measurement.

bf16 halves memory everywhere but multiplies fast only where the processor has instructions for it (AMX, AVX512-BF16,
tensor cores); elsewhere it is slower than float32, so `auto` asks the machine. More threads help large products and
slow small ones down. Measurements are kept by `slingshot.machine.machine`:

    device = auto_device()
    dtype = auto_dtype(device)                          # torch.bfloat16 or torch.float32
    threads = auto_threads(config.hidden_size)
    mfu = flops / seconds / machine_peak(dtype, device)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch

from slingshot.base.errors import SlingshotError
from slingshot.machine.machine import Machine, Measurement, describe, is_busy, load_measurement, save_measurement

Dtype = Literal["auto", "float32", "bfloat16"]  # of activations; parameters and optimizer state stay float32

BF16_WORTH_IT = 1.5  # below this gain over float32, casts and lost digits cost more than the faster product saves
THREADS_WORTH_IT = 1.1  # the gain for which twice the threads are taken
DRIVERS = {"/proc/driver/nvidia": "an NVIDIA GPU", "/dev/kfd": "an AMD GPU", "/dev/davinci_manager": "an Ascend NPU"}


def auto_device() -> torch.device:
    """The accelerator torch finds and uses (CUDA, ROCm, XPU, MPS, Ascend with torch_npu), else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def why_cpu() -> str:
    """Why `auto_device` takes the CPU, in words for people; empty where it does not."""
    if torch.accelerator.is_available():
        return ""
    if (built_for := torch.accelerator.current_accelerator()) is not None:
        return f"this torch is built for {built_for.type} but finds no such device; is its driver installed?"
    for driver, device in DRIVERS.items():
        if Path(driver).exists():
            return f"{device} is here, but this torch is built for CPUs alone; install the torch for it"
    return "none that torch can use"


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it multiplies at least 1.5 times as fast as float32 on `device`, else float32.

    Measured once per machine, then remembered.
    """
    gain = machine_peak(torch.bfloat16, device) / machine_peak(torch.float32, device)
    return torch.bfloat16 if gain >= BF16_WORTH_IT else torch.float32


def named_dtype(name: str, device: torch.device) -> torch.dtype:
    """What one of `Dtype` is on `device`; SlingshotError for another name."""
    if name not in get_args(Dtype):
        raise SlingshotError(f"dtype {name!r} is not supported; choose {', '.join(get_args(Dtype))}")
    return auto_dtype(device) if name == "auto" else getattr(torch, name)


def auto_threads(width: int = 256, anew: bool = False) -> int:
    """The threads with which a model of about this hidden size trains fastest on this machine's CPU.

    Measured once per machine and power of two (0.3 s), or `anew`, then remembered; once more if it was busy then.
    OMP_NUM_THREADS is the most: a number, or a list for nested levels; anything else says nothing, as OpenMP has it.
    """
    machine, first = describe(), os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    most = min(machine.cores, (int(first) if first.isdecimal() else 0) or machine.cores)
    if most == 1:
        return 1
    rounded = 1 << max(6, min(9, width.bit_length() - 1))
    key = f"{machine.cpu}, up to {most} threads, torch {torch.__version__}"
    name, known, busy = str(rounded), load_measurement(key), is_busy()
    best = known.threads.get(name)
    if best is None or anew or (name in known.busy and not busy):
        best = measure_threads(rounded, most)
        save_measurement(key, Measurement(threads={name: best}, busy=[name] if busy else []))
    return best


def measure_threads(width: int, most: int, seconds: float = 0.3) -> int:
    """Threads for small batches of a feed-forward block of this width: doubled while that gains a tenth.

    Training of small models is many products and passes like these, each too short to share.
    """
    x = torch.ones(256, width)
    up, down = (torch.full(shape, 0.01, requires_grad=True) for shape in ((3 * width, width), (width, 3 * width)))

    def work() -> None:
        hidden = torch.nn.functional.silu(x @ up.T)
        (x + hidden @ down.T).square().mean().backward()

    before, chosen, best = torch.get_num_threads(), 1, float("inf")
    counts = sorted({1 << power for power in range(most.bit_length())} | {most})
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            took = _fastest(work, x.device, seconds / len(counts), runs=3)  # the first run prepares code
            if took * THREADS_WORTH_IT > best:
                break
            chosen, best = threads, took
    finally:
        torch.set_num_threads(before)
    return chosen


def machine_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest matrix product in `dtype` seen on `device`: as saved, or as measured now (0.6 s)."""
    key, name = machine_key(device), dtype_name(dtype)
    known, busy = load_measurement(key), is_busy()
    peak = known.peak.get(name)
    if peak is None or (name in known.busy and not busy):
        peak = max(peak or 0.0, measure_peak(dtype, device, seconds=0.6))
        save_measurement(key, Measurement(peak={name: peak}, busy=[name] if busy else []))
    return peak


def measure_peak(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s (int8: operations/s) of the best square matrix product found within about `seconds`.

    The width doubles from 256 while that stays cheap. The best run counts: neighbours only ever slow a product down.
    Raises RuntimeError where torch has no such product on this device.
    """
    end = time.perf_counter() + seconds
    best, took, width, patience = 0.0, 0.0, 128, seconds
    # Twice the width is eight times the work. Up to 1024 most time is spent waiting for threads, so growth stops only
    # where it would not fit; beyond, many short runs find the peak better than a few long ones.
    while width < 8192 and 8 * took < patience:
        width *= 2
        product = _product(width, dtype, device)
        took = _fastest(product, device, seconds=0.0, runs=2)  # the first run selects and prepares code
        best = max(best, 2 * width**3 / took)
        patience = seconds if width < 1024 else seconds / 20
    return max(best, 2 * width**3 / _fastest(product, device, end - time.perf_counter()))


def measure_bandwidth(device: torch.device, seconds: float = 0.3, size: int | None = None) -> float:
    """Bytes/s of reading `size` bytes: the best sum, by default over 256 MiB (accelerators: 1 GiB), which is memory's
    own where caches are smaller."""
    numbers = torch.ones((size or (256 if device.type == "cpu" else 1024) << 20) // 4, device=device)
    return numbers.nbytes / _fastest(numbers.sum, device, seconds)


def machine_key(device: torch.device) -> str:
    """The name measurements of `device` are kept under: processor, threads and torch, each of which changes speed."""
    machine = describe_machine(device)
    where = machine.accelerator or f"{machine.cpu}, {machine.threads} threads"
    return f"{where}, torch {machine.torch}"


def describe_machine(device: torch.device | str | None = None) -> Machine:
    """`slingshot.machine.machine.describe` with what torch knows: the accelerator in use, the threads, its version."""
    device = auto_device() if device is None else torch.device(device)
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # MPS has none
    accelerator = None if device.type == "cpu" else str(name(device)) if name else device.type
    return describe(accelerator=accelerator, threads=torch.get_num_threads(), torch=torch.__version__)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", the spelling of receipts and measurements."""
    return str(dtype).removeprefix("torch.")


def _product(width: int, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    if dtype == torch.int8:
        whole = torch.ones(width, width, dtype=torch.int8, device=device)
        return lambda: torch._int_mm(whole, whole)  # the only int8 product torch has; accumulates in int32
    # Values near 1: denormals, which some processors multiply in microcode, would distort the measurement.
    square = torch.linspace(0.5, 1.5, width * width, device=device).reshape(width, width).to(dtype)
    return lambda: torch.mm(square, square)


def _fastest(work: Callable[[], object], device: torch.device, seconds: float, runs: int = 1) -> float:
    """Seconds of the fastest of at least so many runs, and of all that begin within `seconds`."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda _: None  # for the device's queue
    end, best = time.perf_counter() + seconds, float("inf")
    while runs > 0 or time.perf_counter() < end:
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        best, runs = min(best, time.perf_counter() - start), runs - 1
    return best
