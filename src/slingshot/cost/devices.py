"""Devices as numbers: what each multiplies, remembers, moves, draws and costs, with the source of every figure. No
torch.

    device("h800").peak["bfloat16"]          # 989.4e12 FLOP/s, dense
    device("local")                          # this machine, as `slingshot doctor` measured it
    mixed_peak(device("h800"), "fp8", parts) # FLOP/s of work that is partly in FP8, partly in bfloat16

Peaks are of dense matrix products with float32 accumulation; vendors print twice as much "with sparsity", which no
training here has. Links are bytes/s one way; vendors add both directions. Memory is what the maker's "80 GB" holds, in
powers of two; how much of it a plan may fill is the plan's assumption. Prices are examples of what an hour of one
device was offered for, in dollars, and change by the month.
"""

from __future__ import annotations

from collections.abc import Mapping

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.names import closest
from slingshot.machine.machine import describe, measurements

GIB = 2.0**30

# What runs in FP8 where a model is trained or served in it: the matrix products with weights but for the router, the
# head and MLA's two halves around the latent attention; attention itself stays in bfloat16 (DeepSeek-V3, arXiv
# 2412.19437, 3.3.1).
LOW_PARTS = {"projections", "mlp", "shared_experts", "routed_experts"}


class Device(Strict):
    """One device.

    peak           FLOP/s of dense matrix products by dtype
    memory_bytes   its own memory;  bandwidth   bytes/s of reading it
    link           bytes/s one way to a neighbour in the same node, of which there are `per_node` in all
    network        bytes/s one way, per device, between nodes; 0 where there is no such thing
    power_watts    its maximum, of the device alone; None where nobody says
    price          an example, per hour; None where none was found
    sources        where the figures are from
    """

    name: str
    title: str
    peak: dict[str, float]
    memory_bytes: float
    bandwidth: float
    link: float = 0.0
    per_node: int = 1
    network: float = 0.0
    power_watts: float | None = None
    price: float | None = None
    sources: tuple[str, ...]


# Hopper's peaks: NVIDIA H100 datasheet, halved where it says "with sparsity" (1,979 bfloat16, 3,958 FP8); 66.9 float32
# without tensor cores.
_HOPPER = {"float32": 66.9e12, "bfloat16": 989.4e12, "float16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12}
_RUNPOD = "price: RunPod's rate in March 2026 after deploybase.ai/articles/runpod-gpu-pricing (secondary)"

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="h800", title="NVIDIA H800 SXM", peak=_HOPPER, memory_bytes=80 * GIB, bandwidth=3.35e12, link=200e9, per_node=8, network=50e9,
            power_watts=700, price=2.0,
            sources=(
                "peaks, memory, power: as the H100 SXM's, whose chip it is",
                "link 400 GB/s both ways, 8 x 400 Gb/s InfiniBand a node: arXiv 2505.09343, 4.1 and 4.3",
                "price: arXiv 2412.19437, Table 1",
            ),
        ),
        Device(
            name="h100", title="NVIDIA H100 SXM", peak=_HOPPER, memory_bytes=80 * GIB, bandwidth=3.35e12, link=450e9, per_node=8, network=50e9,
            power_watts=700, price=2.69,
            sources=(
                "peaks, memory, link 900 GB/s both ways, power: NVIDIA H100 datasheet",
                "network: 8 x 400 Gb/s a node, DGX H100 datasheet", _RUNPOD,
            ),
        ),
        Device(
            name="h200", title="NVIDIA H200 SXM", peak=_HOPPER, memory_bytes=141 * GIB, bandwidth=4.8e12, link=450e9, per_node=8, network=50e9,
            power_watts=700, price=3.59,
            sources=(
                "peaks, memory, link 900 GB/s both ways, power: NVIDIA H200 datasheet",
                "network: 8 x 400 Gb/s a node, DGX H200 datasheet", _RUNPOD,
            ),
        ),
        Device(
            name="a100", title="NVIDIA A100 80GB SXM",
            peak={"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12},
            memory_bytes=80 * GIB, bandwidth=2.039e12, link=300e9, per_node=8, network=25e9, power_watts=400, price=1.39,
            sources=(
                "peaks, memory, link 600 GB/s both ways, power: NVIDIA A100 datasheet",
                "network: 8 x 200 Gb/s a node, DGX A100 datasheet", _RUNPOD,
            ),
        ),
        Device(
            name="l40s", title="NVIDIA L40S",
            peak={"float32": 91.6e12, "bfloat16": 362.05e12, "float16": 362.05e12, "fp8": 733e12, "int8": 733e12},
            memory_bytes=48 * GIB, bandwidth=864e9, link=32e9, per_node=8, network=12.5e9, power_watts=350, price=0.79,
            sources=(
                "peaks, memory, power: NVIDIA L40S datasheet", "link: PCIe 4.0 x16, 64 GB/s both ways, no NVLink: the same",
                "8 a node, 100 Gb/s each: assumed", _RUNPOD,
            ),
        ),
        Device(
            name="rtx4090", title="NVIDIA GeForce RTX 4090",
            peak={"float32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12},
            memory_bytes=24 * GIB, bandwidth=1.008e12, link=32e9, per_node=8, network=3.125e9, power_watts=450, price=0.34,
            sources=(
                "peaks (float32 accumulation: half the rate with float16's), memory, power: NVIDIA Ada GPU Architecture whitepaper",
                "link: PCIe 4.0 x16, no peer access", "8 a node, 25 Gb/s each: assumed", _RUNPOD,
            ),
        ),
        Device(
            name="mi300x", title="AMD Instinct MI300X",
            peak={"float32": 163.4e12, "bfloat16": 1307.4e12, "float16": 1307.4e12, "fp8": 2614.9e12, "int8": 2614.9e12},
            memory_bytes=192 * GIB, bandwidth=5.3e12, link=448e9, per_node=8, network=50e9, power_watts=750, price=1.71,
            sources=(
                "peaks, memory, power, 7 links of 128 GB/s both ways: AMD Instinct MI300X datasheet", "network: 400 Gb/s each, assumed",
                "price: TensorWave's, after gpu.blog/gpus/instinct-mi300x-mi300x (secondary)",
            ),
        ),
        Device(
            name="m4-max", title="Apple M4 Max, 40 GPU cores", peak={"float32": 17.2e12, "bfloat16": 17.2e12, "float16": 17.2e12},
            memory_bytes=128 * GIB, bandwidth=546e9, network=10e9, power_watts=145,
            sources=(
                "peak: 40 cores x 128 lanes x 2 x 1.678 GHz, the clock after hmc-tech.com (Apple prints none); one rate for every dtype",
                "memory, bandwidth: Apple, M4 Max, 2024", "network: Thunderbolt 5, 80 Gb/s",
                "power: 145 W of the M2 Max Mac Studio, support.apple.com/102027",
            ),
        ),
        Device(
            name="m3-ultra", title="Apple M3 Ultra, 80 GPU cores", peak={"float32": 28.6e12, "bfloat16": 28.6e12, "float16": 28.6e12},
            memory_bytes=512 * GIB, bandwidth=819e9, network=10e9, power_watts=295,
            sources=(
                "peak: 80 cores x 128 lanes x 2 x 1.398 GHz, the clock of the M3 Max after hmc-tech.com; one rate for every dtype",
                "memory, bandwidth: Apple, M3 Ultra, 2025", "network: Thunderbolt 5, 80 Gb/s",
                "power: 295 W of the M2 Ultra Mac Studio, support.apple.com/102027",
            ),
        ),
        Device(
            name="cpu", title="a server CPU: AMD EPYC 9654, 96 cores", peak={"float32": 7.4e12, "bfloat16": 14.7e12},
            memory_bytes=768 * GIB, bandwidth=460.8e9, network=12.5e9, power_watts=360,
            sources=(
                "96 cores at 2.4 GHz, 12 channels of DDR5-4800, 360 W: AMD EPYC 9004 series datasheet",
                "peak: 32 float32 FLOPs a cycle and core (two 256-bit multiply-adds), twice that in bfloat16 (AVX512-BF16)",
                "memory: 12 modules of 64 GiB, network 100 Gb/s: assumed",
            ),
        ),
    )
}  # fmt: skip


def device(name: str) -> Device:
    """The device of that name; "local" is this machine as it was measured. SlingshotError names the nearest one."""
    if name.lower() == "local":
        return local_device()
    found = DEVICES.get(name.lower().replace("_", "-").replace(" ", ""))
    if found is None:
        near = closest(name, DEVICES, cutoff=0.4)
        hint = f"did you mean {near}? " if near else ""
        raise SlingshotError(
            f"no device is called {name!r:.60}; {hint}the table has {', '.join(DEVICES)}; local is this machine"
        )
    return found


def and_others(device: Device) -> list[Device]:
    """`device` itself, then the rest of the table."""
    return [device, *(entry for entry in DEVICES.values() if entry.name != device.name)]


def local_device() -> Device:
    """This machine, by what `slingshot doctor` measured on it: the best of every measurement under this processor's
    name."""
    machine = describe()
    # An accelerator's measurements stand under its own name, the processor's under the processor's.
    mine = [known for key, known in measurements().items() if key.startswith(f"{machine.cpu}, ")]
    if not any(known.peak for known in mine):
        raise SlingshotError(
            "this machine has not been measured yet; run `slingshot doctor` once, or name a device of the table"
        )
    peak: dict[str, float] = {}
    for known in mine:
        for dtype, rate in known.peak.items():
            peak[dtype] = max(rate, peak.get(dtype, 0.0))
    bandwidth = max(known.bandwidth or 0.0 for known in mine)
    if not bandwidth:
        raise SlingshotError("this machine's memory has not been measured yet; run `slingshot doctor` once")
    title = f"{machine.cpu}, {machine.cores} core{'' if machine.cores == 1 else 's'}"
    return Device(
        name="local", title=title, peak=peak, memory_bytes=float(machine.memory_bytes), bandwidth=bandwidth,
        sources=("peaks, bandwidth: measured on this machine by slingshot doctor", "memory: what the system lets this process use"),
    )  # fmt: skip


def dtype_peak(device: Device, dtype: str) -> float:
    """FLOP/s of `device` in `dtype`. SlingshotError when it has no such products."""
    if dtype not in device.peak:
        near = closest(dtype, device.peak, cutoff=0.3)
        hint = f"did you mean {near}? " if near else ""
        raise SlingshotError(
            f"{device.name} has no products in {dtype!r:.40}; {hint}it multiplies in {', '.join(device.peak)}"
        )
    return device.peak[dtype]


def mixed_peak(device: Device, dtype: str, parts: Mapping[str, float]) -> float:
    """FLOP/s of work done in `dtype` that is made of `parts` (FLOPs by part of the network), each at the peak of the
    dtype it runs in.

    In FP8 and int8 only LOW_PARTS do; the rest runs in the fastest 16-bit type. The rate is total FLOPs over the sum of
    each part's time.
    """
    low = dtype_peak(device, dtype)
    if dtype not in ("fp8", "int8"):
        return low
    high = max(device.peak.get("bfloat16", 0.0), device.peak.get("float16", 0.0)) or device.peak["float32"]
    total = sum(parts.values())
    return total / sum(flops / (low if part in LOW_PARTS else high) for part, flops in parts.items()) if total else low
