"""Plans: what pre-training, reinforcement learning, distillation and serving will cost, before anything runs. No torch.

These are the nouns; the arithmetic is in plan_training.py and plan_serving.py:

    plan = plan_pretrain(ModelConfig.preset("deepseek-v3"), "deepseek-v3", device("h800"), 2048, tokens=14.8e12, tflops=385)
    plan.device_hours, plan.days, plan.money
    plan.model_dump(mode="json")           # what `slingshot plan ... --json` prints

Every plan says what it assumed (`assumptions`): nothing that is not in the architecture, in the table of devices or in the request enters a
figure without a line there. Nonsense is a SlingshotError of one line with the nearest thing that makes sense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import show_count, show_share, show_size
from slingshot.cost.devices import Device, dtype_peak, mixed_peak
from slingshot.cost.flops import cache_bytes_per_token, parameters
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS, TRAINABLE, Memory, Precision
from slingshot.planning.published import PublishedBill
from slingshot.planning.scaling import DenseEquivalent
from slingshot.planning.sharding import Layout
from slingshot.planning.throughput import Times

# MFU where the request gives no rate: the share of the peak for the mix of products a model has in that precision.
ASSUMED_MFU = {"fp8": 0.22, "int8": 0.22, "bfloat16": 0.4, "float16": 0.4, "float32": 0.4}
_MFU_SOURCE = {
    "fp8": "what DeepSeek-V3's 385 TFLOP/s on an H800 come to (arXiv 2505.09343, Table 4)",
    "bfloat16": "Llama 3 405B reports 38 to 43% (arXiv 2407.21783, Table 4)",
}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
USABLE = 0.9  # share of a device's memory a plan may fill: the rest is for the framework, buffers of collectives and fragmentation
MOST = 10**7  # devices a plan takes
HOURS = 24.0


class Counts(Strict):
    """A model's parameters, the three ways active ones are counted included."""

    total: int
    active: int
    active_without_embedding: int
    active_without_embedding_and_head: int
    mtp: int
    cache_bytes_per_token: float


class Stage(Strict):
    """A line of the bill. `device_hours` are every device's hours together; a line of 0 hours is part of another, as its note says."""

    name: str
    tokens: float = 0.0
    flops: float = 0.0
    device_hours: float
    days: float
    money: float | None
    note: str = ""


class Dominates(Strict):
    """What one device would wait for in `what`, each resource alone; `dominant` is the longest and `factor` times the next."""

    what: str
    compute_seconds: float
    memory_traffic_seconds: float
    network_seconds: float
    dominant: str
    factor: float


class Alternative(Strict):
    """The same work on another device or in another precision."""

    device: str
    precision: str
    device_hours: float
    days: float
    money: float | None
    fits: bool


class Fit(Strict):
    """The nearest thing that fits."""

    device: str
    count: int
    layout: str


class Transferred(Strict):
    """What one device sends in one optimizer step."""

    purpose: str
    n_bytes: float
    link: str
    seconds: float


class Plan(Strict):
    """What every plan has. Money is in the currency of the price, energy that of the devices alone."""

    kind: str
    model: str
    device: str
    count: int
    precision: str
    parameters: Counts
    device_hours: float
    days: float
    price: float | None
    money: float | None
    energy_kwh: float | None
    flops: float
    flops_by_part: dict[str, float]
    memory: Memory
    memory_per_device_bytes: float
    usable_memory_bytes: float
    fits: bool
    nearest_fit: Fit | None
    stages: list[Stage]
    dominates: Dominates
    alternatives: list[Alternative]
    assumptions: list[str]


class PretrainPlan(Plan):
    """tflops_per_device and both MFUs are of the main model's FLOPs, as published rates are; six_nd_flops is 6 x active x tokens.

    tflops_bound   what this layout lets through at most: no step is shorter than its compute at the peak with the pipeline's bubble, its memory
                   traffic, or its network. A rate above it was not reached in this layout, or not on these links
    published      the bill somebody published of the same work
    """

    tokens: float
    context: int
    batch_tokens: float
    optimizer_steps: float
    tokens_per_day: float
    six_nd_flops: float
    tflops_per_device: float
    mfu: float
    mfu_of_bfloat16: float | None
    tflops_bound: float
    layout: Layout
    layout_text: str
    bubble: float
    exposed_network_seconds: float
    transfers: list[Transferred]
    dense_equivalent: DenseEquivalent | None
    dense_device_hours: float | None
    published: PublishedBill | None


class RLPlan(Plan):
    """`rounds` of rollouts, `round_seconds` each; `devices_per_copy` devices hold one copy of the policy while it samples."""

    steps: int
    responses: int
    rounds: float
    round_seconds: float
    tokens: float
    devices_per_copy: int
    layout_text: str
    tflops_per_device: float
    mfu: float


class DistillPlan(Plan):
    """`sampled` responses of the teacher, of which `kept` become the student's data."""

    teacher: str
    sampled: float
    kept: float
    sampled_tokens_per_second_per_device: float
    devices_per_copy: int
    layout_text: str
    tflops_per_device: float
    mfu: float


class Batch(Strict):
    """Decoding at one batch: sequences a device, tokens/s of a device and of a user, what bounds it, and whether it has room and is fast enough."""

    batch: float
    tokens_per_second_per_device: float
    tokens_per_second_per_user: float
    bound_tokens_per_second_per_device: float
    step_seconds: float
    bytes_per_token: float
    dominant: str
    fits: bool
    within_latency: bool


class HitCost(Strict):
    """Cost per million tokens when this share of the prompt tokens is cached; `blended` over prompt and response tokens as they come."""

    hit_share: float
    prompt: float
    blended: float


class BreakEven(Strict):
    """Against buying the same tokens at the price list. `tokens_per_day` is where this fleet, idle or not, costs as much; None: it never does."""

    bought_per_million: float
    made_per_million: float
    fleet_per_day: float
    fleet_tokens_per_day: float
    tokens_per_day: float | None
    utilisation: float | None


class Day(Strict):
    """A day of the traffic asked about: what the fleet costs and what the price list brings in."""

    input_tokens: float
    output_tokens: float
    cost: float | None
    revenue: float | None
    margin: float | None
    devices_needed: float
    utilisation: float


class ServePlan(Plan):
    """A day's plan: `device_hours` and `money` are a day's, costs are per million tokens. Rates of prompts count cached tokens as read."""

    prompt: float
    response: float
    hit_share: float
    latency: float
    devices_per_copy: int
    batch: int
    tokens_per_second_per_device: float
    bound_tokens_per_second_per_device: float
    tokens_per_second_per_user: float
    prompt_tokens_per_second_per_device: float
    output_cost_per_million: float | None
    prompt_cost_per_million: float | None
    curve: list[Batch]
    cost_by_hit_share: list[HitCost]
    prices: tuple[float, float, float] | None
    margin: float | None
    break_even: BreakEven | None
    day: Day | None


# What plans share


@dataclass(frozen=True)
class Pool:
    """The devices asked for and what an hour of one costs; `example`: the price is the table's."""

    device: Device
    count: int
    price: float | None
    example: bool

    @property
    def usable(self) -> float:
        return USABLE * self.device.memory_bytes

    def stage(self, name: str, device_hours: float, tokens: float = 0.0, flops: float = 0.0, note: str = "") -> Stage:
        days = device_hours / self.count / HOURS
        money = None if self.price is None else device_hours * self.price
        return Stage(
            name=name, tokens=tokens, flops=flops, device_hours=device_hours, days=days, money=money, note=note
        )

    def common(
        self, kind: str, config: ModelConfig, model: str, precision: Precision, memory: Memory, lines: list[Stage]
    ) -> dict[str, Any]:
        """The fields every plan fills in the same way."""
        watts, whole = self.device.power_watts, self.stage("in all", sum(line.device_hours for line in lines))
        counts = parameters(config)
        return {
            "kind": kind, "model": model, "device": self.device.name, "count": self.count, "precision": precision.dtype,
            "parameters": Counts(
                total=counts.total, active=counts.active, active_without_embedding=counts.active - counts.embedding,
                active_without_embedding_and_head=counts.active - counts.embedding - counts.head, mtp=counts.mtp,
                cache_bytes_per_token=cache_bytes_per_token(config),
            ),
            "device_hours": whole.device_hours, "days": whole.days, "price": self.price, "money": whole.money,
            "energy_kwh": None if watts is None else whole.device_hours * watts / 1000,
            "memory": memory, "memory_per_device_bytes": memory.total, "usable_memory_bytes": self.usable, "fits": memory.total <= self.usable,
            "stages": lines,
        }  # fmt: skip

    def notes(self) -> list[str]:
        if self.price is None:
            price = f"no price: none is known for {self.device.name}; give one per device-hour"
        elif self.example:
            price = f"${self.price:g} per {self.device.name} hour, the table's example"
        else:
            price = f"${self.price:g} per {self.device.name} hour, as given"
        watts = (
            f"{self.device.power_watts:g} W a device, hosts, network and cooling left out"
            if self.device.power_watts
            else "energy unknown"
        )
        return [f"{show_share(USABLE)} of {show_size(self.device.memory_bytes)} may be filled", price, watts]


def pool(device: Device, count: int, price: float | None) -> Pool:
    """Take `count` devices at `price` an hour, or at the table's example."""
    if count < 1:
        raise SlingshotError(f"{count} devices: the nearest valid count is 1")
    if count > MOST:
        raise SlingshotError(f"{count} devices: the largest count a plan takes is {MOST}")
    if count > 1 and not device.network:
        raise SlingshotError(
            f"{count} x {device.name}: what joins several of them is not known; the nearest valid count is 1"
        )
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise SlingshotError(f"price {price:g}: must not be negative; the nearest valid value is 0")
    return Pool(device, count, device.price if price is None else price, price is None)


def positive(**values: float) -> None:
    """Refuse what is not above 0, by its name."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise SlingshotError(
                f"{name.replace('_', ' ')} {value:g}: must be more than 0; did you mean {abs(value) or 1:g}?"
            )


def chosen_precision(config: ModelConfig, device: Device, name: str | None) -> Precision:
    """The precision asked for; else the one the model comes in, where the device has it, else 16 bits, else float32."""
    if name is None:
        wanted = (config.quantization, "bfloat16", "float32")
        name = next((dtype for dtype in wanted if dtype in device.peak), "float32")
    name = _SHORT.get(name.lower(), name.lower())
    dtype_peak(device, name)
    return PRECISIONS[name]


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one device, which share of the mix's peak that is, and where it is from."""

    per_device: float
    mfu: float
    note: str


def training_rate(
    device: Device,
    precision: Precision,
    parts: Mapping[str, float],
    mfu: float | None,
    tflops: float | None,
    hours: float | None = None,
) -> Rate:
    """How fast one device trains: by at most one of the three, else by what is assumed of the precision. Never above the peak for `parts`."""
    if precision.dtype not in TRAINABLE:
        raise SlingshotError(
            f"precision {precision.dtype}: nothing is trained in it; the nearest that is are {', '.join(TRAINABLE)}"
        )
    if sum(given is not None for given in (mfu, tflops, hours)) > 1:
        raise SlingshotError("mfu, tflops and hours each set the rate; give one of them")
    peak = mixed_peak(device, precision.dtype, parts)
    if tflops is not None:
        positive(tflops=tflops)
        rate, source = tflops * 1e12, f"{tflops:g} TFLOP/s a device, as given"
    elif hours is not None:
        positive(hours=hours)
        rate, source = sum(parts.values()) / hours / 3600, f"{show_count(hours)} device-hours, as given"
    elif mfu is not None:
        rate, source = checked_mfu(mfu) * peak, f"MFU {show_share(mfu)}, as given"
    else:
        assumed = ASSUMED_MFU[precision.dtype]
        rate, source = (
            assumed * peak,
            f"MFU {show_share(assumed)}, assumed; {_MFU_SOURCE.get(precision.dtype, 'as in bfloat16')}",
        )
    if rate > peak * (1 + 1e-9):
        below = f"{math.floor(peak / 1e9) / 1000:.10g}"
        most = f"one {device.name} does at most {below} of this model's products in {precision.dtype}"
        nearest = f"{math.ceil(sum(parts.values()) / peak / 3600):,} hours" if hours is not None else below
        raise SlingshotError(f"{rate / 1e12:.4g} TFLOP/s: {most}; the nearest valid value is {nearest}")
    return Rate(
        rate,
        rate / peak,
        f"{source}: {rate / 1e12:.4g} TFLOP/s, {show_share(rate / peak)} of {peak / 1e12:.4g} for this mix in {precision.dtype}",
    )


def beyond(config: ModelConfig, tokens: float) -> list[str]:
    """The assumption behind sequences longer than the model's own."""
    most = config.max_position_embeddings
    return (
        [f"sequences of {tokens:g} tokens, though the model is made for {most}: its context extended first"]
        if tokens > most
        else []
    )


def checked_mfu(mfu: float) -> float:
    if not 0 < mfu <= 1:
        raise SlingshotError(
            f"mfu {mfu:g}: a share above 0 and up to 1; the nearest valid value is {1 if mfu > 1 else 0.01:g}"
        )
    return mfu


def checked_prices(prices: Sequence[float]) -> tuple[float, float, float]:
    if len(prices) != 3 or any(not (each >= 0 and math.isfinite(each)) for each in prices):
        raise SlingshotError(
            "prices: three per million tokens, none negative: cached input, other input, output, such as 0.14/0.55/2.19"
        )
    return prices[0], prices[1], prices[2]


def dominates(what: str, times: Times) -> Dominates:
    (first, longest), (_, second), _ = times.ranked
    return Dominates(
        what=what, compute_seconds=times.compute, memory_traffic_seconds=times.memory, network_seconds=times.network, dominant=first,
        factor=longest / second if second else 1.0,
    )  # fmt: skip
