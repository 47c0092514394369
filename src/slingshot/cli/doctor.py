"""`slingshot doctor`: what this machine has, how fast it multiplies in which dtype, and what `auto` will use.

It measures for a few seconds, prints a table and keeps the measurement, by which `auto`, every receipt's MFU
and plans for this machine go:

    examine(Console())                        # keeps the best ever measured: a busy machine measures low, never high
    examine(Console(), calibrate=True)        # longer, forgetting what was kept: for a machine that has changed
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from slingshot.base.quantity import plural, show_size
from slingshot.kernels.native import native_kernels
from slingshot.machine import device as hardware
from slingshot.machine.device import BF16_WORTH_IT, auto_device, auto_threads, describe_machine, dtype_name
from slingshot.machine.machine import Measurement, is_busy, load_measurement, measurement_path, save_measurement
from slingshot.sandbox.program import isolation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def measure(device: torch.device, seconds: float = 0.5, anew: bool = False) -> tuple[Measurement, bool]:
    """Measure every dtype and the memory, `seconds` each; a dtype torch cannot multiply here is left out.

    Returns the best ever measured on this machine (`anew`: only this time counts), and whether it could be kept.
    """
    peak = {}
    for dtype in DTYPES:
        try:
            peak[dtype_name(dtype)] = hardware.measure_peak(dtype, device, seconds)
        except RuntimeError:
            continue
    measurement = Measurement(peak=peak, bandwidth=hardware.measure_bandwidth(device, seconds))
    kept = save_measurement(hardware.machine_key(device), measurement, anew)
    return load_measurement(hardware.machine_key(device)) if kept else measurement, kept


def examine(console: Console, seconds: float = 0.5, calibrate: bool = False) -> None:
    """Measure the machine and print what was found; with `calibrate` four times as long, forgetting what was kept."""
    device = auto_device()
    load, busy = os.getloadavg()[0], is_busy()
    with console.status("measuring ..."):
        measurement, kept = measure(device, 4 * seconds if calibrate else seconds, calibrate)
    machine = describe_machine(device)

    has = Table(show_header=False, box=None, pad_edge=False)
    has.add_row("processor", f"{machine.cpu}, {plural(machine.cores, 'core')}")
    has.add_row("memory", f"{show_size(machine.memory_bytes)}, read at {(measurement.bandwidth or 0) / 1e9:.1f} GB/s")
    has.add_row("free disk here", show_size(shutil.disk_usage(Path.cwd()).free))
    has.add_row("accelerator", machine.accelerator or hardware.why_cpu())
    software = f"Python {platform.python_version()}, torch {machine.torch}, {plural(machine.threads or 0, 'thread')}"
    has.add_row("software", software)
    kernels = native_kernels()
    has.add_row("kernels", f"native ({kernels.level})" if kernels else "torch's: no native library, or it is off")
    threads = {width: plural(auto_threads(width, anew=True), "thread") for width in (128, 512)}
    fastest = ", ".join(f"{many} for models of width {width}" for width, many in threads.items())
    has.add_row("fastest with", fastest)
    has.add_row("programs", str(isolation()))

    fast = Table("dtype", box=None, pad_edge=False, header_style="dim")
    fast.add_column("GFLOP/s", justify="right")
    fast.add_column("to float32", justify="right")
    for dtype in map(dtype_name, DTYPES):
        speed = measurement.peak.get(dtype)
        shown = (f"{speed / 1e9:,.0f}", f"{speed / measurement.peak['float32']:.2f}") if speed else ("not offered", "")
        fast.add_row(dtype, *shown)

    uses = verdict(device, measurement)
    for heading, body in (("This machine", has), ("Matrix products", fast), ("What auto will use", uses)):
        console.print(heading, style="bold")
        console.print(body, "", highlight=False, sep="\n")
    if busy:
        cores = plural(machine.cores, "core")
        console.print(f"The machine is busy (load {load:.1f} on {cores}): its full speed shows when it is idle.")
    anew = ", in place of what was measured before" if calibrate else ""
    unkept = f"{measurement_path()} cannot be written, so this is measured again each time."
    where = f"Kept in {measurement_path()}{anew}." if kept else unkept
    console.print(where, style="dim", soft_wrap=True, highlight=False)


def verdict(device: torch.device, measurement: Measurement) -> str:
    """What `auto` uses on this device, and why, in one sentence."""
    gain = measurement.peak.get("bfloat16", 0.0) / measurement.peak["float32"]
    chosen, comparison = ("bfloat16", "at least") if gain >= BF16_WORTH_IT else ("float32", "less than")
    reason = f"bfloat16 multiplies {gain:.1f} times as fast as float32 here"
    return f"{chosen} on {device.type}: {reason}, {comparison} the {BF16_WORTH_IT} times that pay."
