"""Devices as numbers: what each multiplies, remembers, moves, draws and costs; devices.toml has the figures. No torch.

    device("h800").peak["bfloat16"]          # 989.4e12 FLOP/s, dense; "local" is this machine, as it was measured

Peaks are of dense matrix products with float32 accumulation; vendors print twice as much "with sparsity". Links are
bytes/s one way; vendors add both directions. Memory is what the maker's "80 GB" holds, in powers of two. Prices are
examples of what an hour of one device was offered for, in dollars, and change by the month.
"""

from __future__ import annotations

from collections.abc import Mapping

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import packaged_toml
from slingshot.base.names import did_you_mean
from slingshot.machine.machine import describe, measurements

# What runs in FP8 where a model is trained or served in it: the products with weights but for the router, the head and
# MLA's two halves around the latent attention; attention itself stays in bfloat16 (DeepSeek-V3, 2412.19437, 3.3.1).
LOW_PARTS = {"projections", "mlp", "shared_experts", "routed_experts"}
USABLE = 0.9  # share of a device's memory a plan may fill: the rest is for the framework, buffers and fragmentation


class Device(Strict):
    """One device, its figures with their sources."""

    name: str
    peak: dict[str, float]  # FLOP/s of dense matrix products by dtype
    memory_bytes: float
    bandwidth: float  # bytes/s of reading its memory
    link: float = 0.0  # bytes/s one way to a neighbour in the same node
    per_node: int = 1  # devices of a node
    network: float = 0.0  # bytes/s one way, per device, between nodes; 0 where there is no such thing
    power_watts: float | None = None  # its maximum, of the device alone; None where nobody says
    price: float | None = None  # an example, per hour; None where none was found
    sources: tuple[str, ...]

    @property
    def usable_bytes(self) -> float:
        return USABLE * self.memory_bytes


DEVICES = {
    name: Device(name=name, memory_bytes=row.pop("memory_gib") * 2.0**30, **row)
    for name, row in packaged_toml("slingshot.cost", "devices.toml").items()
}


def device(name: str) -> Device:
    """The device of that name; "local" is this machine as it was measured. SlingshotError names the nearest one."""
    if name.lower() == "local":
        return local_device()
    found = DEVICES.get(name.lower().replace("_", "-").replace(" ", ""))
    if found is None:
        hint = did_you_mean(name, DEVICES, f"the table has {', '.join(DEVICES)}", cutoff=0.4)
        raise SlingshotError(f"no device is called {name!r:.60}; {hint} (local is this machine)")
    return found


def and_others(device: Device, dtype: str | None = None) -> list[Device]:
    """`device` itself, then the rest of the table; with a `dtype` those that multiply in it."""
    every = [device, *(entry for entry in DEVICES.values() if entry.name != device.name)]
    return [each for each in every if dtype is None or dtype in each.peak]


def local_device() -> Device:
    """This machine, by the best of all that `slingshot doctor` measured under this processor's name."""
    machine = describe()
    # An accelerator's measurements stand under its own name, the processor's under the processor's.
    mine = [known for key, known in measurements().items() if key.startswith(f"{machine.cpu}, ")]
    peak = dict(sorted(pair for known in mine for pair in known.peak.items()))  # of each dtype the largest stays
    bandwidth = max((known.bandwidth or 0.0 for known in mine), default=0.0)
    if not peak or not bandwidth:
        missing = "this machine's memory" if peak else "this machine"
        raise SlingshotError(f"{missing} has not been measured yet; run `slingshot doctor` once, or name a device")
    return Device(
        name="local", peak=peak, bandwidth=bandwidth, memory_bytes=float(machine.memory_bytes),
        sources=("slingshot doctor; what the system lets this process use",),
    )  # fmt: skip


def dtype_peak(device: Device, dtype: str) -> float:
    """FLOP/s of `device` in `dtype`. SlingshotError when it has no such products."""
    if dtype not in device.peak:
        hint = f"{did_you_mean(dtype, device.peak, ' ', cutoff=0.3)} it multiplies in {', '.join(device.peak)}"
        raise SlingshotError(f"{device.name} has no products in {dtype!r:.40}; {hint.strip()}")
    return device.peak[dtype]


def mixed_peak(device: Device, dtype: str, parts: Mapping[str, float]) -> float:
    """FLOP/s of work in `dtype` made of `parts` (FLOPs by part of the network), each at its own dtype's peak.

    In FP8 and int8 only LOW_PARTS do; the rest runs in the fastest 16-bit type.
    """
    low = dtype_peak(device, dtype)
    if dtype not in ("fp8", "int8"):
        return low
    high = max(device.peak.get("bfloat16", 0.0), device.peak.get("float16", 0.0)) or device.peak["float32"]
    total = sum(parts.values())
    return total / sum(flops / (low if part in LOW_PARTS else high) for part, flops in parts.items()) if total else low
