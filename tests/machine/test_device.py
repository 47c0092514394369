"""machine/device.py: measuring for real, briefly, and choosing by what was measured."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest
import torch

from slingshot.machine import device
from slingshot.machine.device import auto_device, auto_dtype, auto_threads, dtype_name, machine_key, machine_peak
from slingshot.machine.machine import Machine, Measurement, load_measurement, save_measurement

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not busy, of which nothing was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def test_peak_agrees_with_a_product_timed_by_hand() -> None:
    a, runs = torch.rand(256, 256), []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, a)
        runs.append(time.perf_counter() - start)
    by_hand = 2 * 256**3 / min(runs)
    # Machines are noisy and a width of 256 is not the fastest: no more than an order and a half always holds.
    assert by_hand / 30 < device.measure_peak(torch.float32, CPU, seconds=0.1) < by_hand * 30


def test_peak_counts_two_flops_per_multiply_add_and_bandwidth_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which everything takes one second, the first width of 256 is also the last."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    assert device.measure_peak(torch.float32, CPU, seconds=0.001) == 2 * 256**3
    assert device.measure_bandwidth(CPU, seconds=0.0) == 256 * 2**20


def test_every_dtype_is_measured_or_refused_by_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        assert device.measure_peak(dtype, CPU, seconds=0.01) > 0
    with pytest.raises(RuntimeError):
        device.measure_peak(torch.bool, CPU, seconds=0.01)


def test_machine_peak_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([7e9, 8e9])
    monkeypatch.setattr(device, "measure_peak", lambda dtype, where, seconds: next(peaks))
    assert machine_peak(torch.float32, CPU) == machine_peak(torch.float32, CPU) == 7e9
    assert load_measurement(machine_key(CPU)).peak == {"float32": 7e9}


def test_what_was_measured_on_a_busy_machine_is_measured_again_on_an_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(device, "describe", lambda **_: Machine(cpu="x", cores=8, memory_bytes=1))
    peaks, threads, loads = iter([7e9, 6e9, 9e9]), iter([1, 8]), iter([9.0] * 4 + [0.0] * 4)
    monkeypatch.setattr(device, "measure_peak", lambda dtype, where, seconds: next(peaks))
    monkeypatch.setattr(device, "measure_threads", lambda width, most: next(threads))
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    found = [(machine_peak(torch.float32, CPU), auto_threads()) for _ in range(4)]
    assert found == [(7e9, 1), (7e9, 1), (7e9, 8), (7e9, 8)]  # others only ever slow a product down


@pytest.mark.parametrize(("bf16", "expected"), [(14.9e9, torch.float32), (15e9, torch.bfloat16)])
def test_auto_takes_bfloat16_from_one_and_a_half_times_on(bf16: float, expected: torch.dtype) -> None:
    save_measurement(machine_key(CPU), Measurement(peak={"float32": 10e9, "bfloat16": bf16}))
    assert auto_dtype(CPU) == expected


def test_auto_threads_are_measured_once_per_width_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(device, "describe", lambda: Machine(cpu="x", cores=8, memory_bytes=1))
    asked = []
    monkeypatch.setattr(device, "measure_threads", lambda width, most: asked.append((width, most)) or 4)
    assert auto_threads(100) == auto_threads(127) == auto_threads(64) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert auto_threads(4096) == auto_threads(576) == auto_threads(576, anew=True) == 4
    assert asked == [(64, 8), (512, 2), (512, 2)]
    for value, most in (("4,2", 4), (" 3 ", 3), ("many", 8), ("0", 8), ("-1", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert auto_threads(576, anew=True) == 4 and asked[-1] == (512, most)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 2: 1.0}, 1), ({1: 1.0, 2: 0.92}, 1), ({1: 1.0, 2: 0.6, 4: 0.5, 6: 0.4}, 6),
        ({1: 9.0, 2: 5.0, 4: 5.5}, 2),
    ],
)  # fmt: skip
def test_threads_are_doubled_while_that_gains_a_tenth(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], expected: int
) -> None:
    """On a clock that says how long each number of threads takes; the caller's own number is put back."""
    ticks = itertools.accumulate(seconds[torch.get_num_threads()] for _ in itertools.count())
    monkeypatch.setattr(time, "perf_counter", ticks.__next__)
    assert device.measure_threads(64, max(seconds), seconds=0.0) == expected
    assert torch.get_num_threads() == 1


def test_threads_are_measured_for_real() -> None:
    assert device.measure_threads(64, 2, seconds=0.01) in (1, 2)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "privateuseone"])
def test_auto_takes_the_accelerator_torch_has(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """ROCm's devices are called cuda too; Ascend's are torch's private use device, which torch_npu renames."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert auto_device() == torch.device(kind, 1) and device.why_cpu() == ""


def test_why_the_cpu_is_taken_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert auto_device() == CPU and device.why_cpu() == "none that torch can use"
    monkeypatch.setitem(device.DRIVERS, str(tmp_path), "an NVIDIA GPU")
    assert device.why_cpu().startswith("an NVIDIA GPU is here, but this torch is built for CPUs alone")
    built = lambda check_available=False: None if check_available else torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", built)
    assert auto_device() == CPU and "built for cuda but finds no such device" in device.why_cpu()


def test_names_and_device() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert auto_device().type == "cpu" or torch.accelerator.is_available()
    assert torch.__version__ in machine_key(CPU) and f"{torch.get_num_threads()} threads" in machine_key(CPU)
