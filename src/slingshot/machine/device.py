"""What "auto" means: the device and the dtype this machine multiplies fastest in, by measurement.

bf16 halves memory everywhere but multiplies fast only where the processor has instructions for it (AMX, AVX512-BF16, tensor cores);
elsewhere it is slower than float32, so `auto` asks the machine. Measurements are kept by `slingshot.machine.machine`:

    device = auto_device()
    dtype = auto_dtype(device)                          # torch.bfloat16 or torch.float32
    mfu = flops / seconds / machine_peak(dtype, device)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from slingshot.machine.machine import Machine, Measurement, describe, load_measurement, save_measurement

BF16_WORTH_IT = 1.5  # below this gain over float32, casts and lost digits cost more than the faster product saves


def auto_device() -> torch.device:
    """The CUDA device torch finds, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def auto_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where it multiplies at least 1.5 times as fast as float32 on `device`, else float32. Measured once per machine, then remembered."""
    device = auto_device() if device is None else torch.device(device)
    gain = machine_peak(torch.bfloat16, device) / machine_peak(torch.float32, device)
    return torch.bfloat16 if gain >= BF16_WORTH_IT else torch.float32


def machine_peak(dtype: torch.dtype, device: torch.device | str | None = None) -> float:
    """FLOP/s of the fastest matrix product in `dtype` seen on `device`: the saved measurement, or one made (0.6 s) and saved now."""
    device = auto_device() if device is None else torch.device(device)
    key = machine_key(device)
    peak = load_measurement(key).peak.get(dtype_name(dtype))
    if peak is None:
        peak = measure_peak(dtype, device, seconds=0.6)
        save_measurement(key, Measurement(peak={dtype_name(dtype): peak}))
    return peak


def measure_peak(dtype: torch.dtype, device: torch.device | str | None = None, seconds: float = 0.3) -> float:
    """FLOP/s (int8: operations/s) of the best square matrix product found within about `seconds`.

    The width doubles from 256 while that stays cheap, so a dtype without fast instructions takes no longer than one with them.
    The best run counts, not the mean: neighbours on a shared machine only ever slow a product down.
    Raises RuntimeError where torch has no such product on this device.
    """
    device = auto_device() if device is None else torch.device(device)
    end = time.perf_counter() + seconds
    best, took, width, patience = 0.0, 0.0, 128, seconds
    # Twice the width is eight times the work. Up to 1024 nearly all of the time is spent waiting for threads, on a busy machine more than
    # for arithmetic, so growth stops only where it would not fit; beyond, many short runs find the peak better than a few long ones.
    while width < 8192 and 8 * took < patience:
        width *= 2
        product = _product(width, dtype, device)
        took = min(_timed(product, device) for _ in range(2))  # the first run selects and prepares code
        best = max(best, 2 * width**3 / took)
        patience = seconds if width < 1024 else seconds / 20
    while time.perf_counter() < end:
        best = max(best, 2 * width**3 / _timed(product, device))
    return best


def measure_bandwidth(device: torch.device | str | None = None, seconds: float = 0.3) -> float:
    """Bytes/s of reading memory: the best sum over 256 MiB (1 GiB on a GPU), far beyond any cache, within about `seconds`."""
    device = auto_device() if device is None else torch.device(device)
    numbers = torch.ones((1024 if device.type == "cuda" else 256) * 2**18, device=device)
    end = time.perf_counter() + seconds
    best = _timed(numbers.sum, device)
    while time.perf_counter() < end:
        best = min(best, _timed(numbers.sum, device))
    return numbers.nbytes / best


def machine_key(device: torch.device | str) -> str:
    """The name measurements of `device` are kept under: processor, threads and torch, since a change of any of them changes the speed."""
    machine = describe_machine(device)
    where = machine.accelerator or f"{machine.cpu}, {machine.threads} threads"
    return f"{where}, torch {machine.torch}"


def describe_machine(device: torch.device | str | None = None) -> Machine:
    """`slingshot.machine.machine.describe` with what torch knows: the accelerator in use, the threads, its version."""
    device = auto_device() if device is None else torch.device(device)
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
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


def _timed(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds one call takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
