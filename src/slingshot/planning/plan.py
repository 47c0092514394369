"""Plans: what pre-training, reinforcement learning, distillation and serving will cost, before anything runs. No torch.

These are the nouns and what all plans share; the arithmetic is in plan_training.py and plan_serving.py:

    plan = plan_pretrain(PretrainRequest.parse({"model": "deepseek-v3", "device": "h800", "tokens": "14.8T"}))
    plan.device_hours, plan.days, plan.money
    plan.model_dump(mode="json")           # what `slingshot plan ... --json` prints

Every plan says what it assumed (`assumptions`): nothing that is not in the architecture, in the table of devices or in
the request enters a figure without a line there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import show_share, show_size
from slingshot.cost.devices import Device, and_others, dtype_peak
from slingshot.cost.flops import cache_bytes_per_token, parameters
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Layout
from slingshot.planning.memory import PRECISIONS, USABLE, Memory, Precision
from slingshot.planning.model_copy import ResourceTimes
from slingshot.planning.network import Transfer
from slingshot.planning.published import PublishedBill
from slingshot.planning.request import PlanRequest
from slingshot.planning.scaling import DenseEquivalent

MOST = 10**7  # devices a plan takes
HOURS = 24.0
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


class Counts(Strict):
    """A model's parameters, the three ways active ones are counted included."""

    total: int
    active: int
    active_without_embedding: int
    active_without_embedding_and_head: int
    mtp: int
    cache_bytes_per_token: float


class PlanLine(Strict):
    """A line of the bill. `device_hours` are every device's hours together; a line of 0 is part of another, see its
    note."""

    name: str
    tokens: float = 0.0
    flops: float = 0.0
    device_hours: float
    days: float
    money: float | None
    note: str = ""


class Dominates(Strict):
    """What one device would wait for in `what`, each resource alone; `dominant` is the longest, `factor` times the
    next."""

    what: str
    compute_seconds: float
    memory_traffic_seconds: float
    network_seconds: float
    dominant: str
    factor: float

    @classmethod
    def of(cls, what: str, times: ResourceTimes) -> Dominates:
        (dominant, longest), (_, second), _ = times.ranked
        return cls(
            what=what, compute_seconds=times.compute, memory_traffic_seconds=times.memory,
            network_seconds=times.network, dominant=dominant, factor=longest / second if second else 1.0,
        )  # fmt: skip


class Alternative(Strict):
    """The same work on another device or in another precision; without hours where there is no room for it at all."""

    device: str
    precision: str
    device_hours: float | None
    days: float | None
    money: float | None
    fits: bool


class NearestFit(Strict):
    """The nearest thing that fits."""

    device: str
    count: int
    layout: str


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
    nearest_fit: NearestFit | None
    stages: list[PlanLine]
    dominates: Dominates
    alternatives: list[Alternative]
    assumptions: list[str]


class TrainingPlan(Plan):
    """`tflops_per_device` and `mfu` are of the main model's FLOPs, as published rates are."""

    tflops_per_device: float
    mfu: float
    layout_text: str


class PretrainPlan(TrainingPlan):
    """`six_nd_flops` is 6 x active x tokens; `published` the bill somebody published of the same work.

    tflops_bound   what this layout lets through at most: no step is shorter than its compute at the peak with the
                   pipeline's bubble, its memory traffic, or its network; a rate above it was not reached in this layout
    """

    tokens: float
    context: int
    batch_tokens: float
    optimizer_steps: float
    tokens_per_day: float
    six_nd_flops: float
    mfu_of_bfloat16: float | None
    tflops_bound: float
    layout: Layout
    bubble: float
    exposed_network_seconds: float
    transfers: list[Transfer]
    dense_equivalent: DenseEquivalent | None
    dense_device_hours: float | None
    published: PublishedBill | None


class RLPlan(TrainingPlan):
    """`rounds` of rollouts, `round_seconds` each; `devices_per_copy` hold one copy of the policy while it samples."""

    steps: int
    responses: int
    rounds: int
    round_seconds: float
    tokens: float
    devices_per_copy: int


class DistillPlan(TrainingPlan):
    """`sampled` responses of the teacher, of which `kept` become the student's data."""

    teacher: str
    sampled: float
    kept: float
    sampled_tokens_per_second_per_device: float
    devices_per_copy: int


class DecodePoint(Strict):
    """Decoding at one batch, in sequences a device: rates, what bounds it, and whether it has room and is fast
    enough."""

    batch: int
    tokens_per_second_per_device: float
    tokens_per_second_per_user: float
    bound_tokens_per_second_per_device: float
    step_seconds: float
    bytes_per_token: float
    dominant: str
    fits: bool
    within_latency: bool


class HitCost(Strict):
    """Cost per million tokens when this share of the prompt tokens is cached; `blended` over prompt and response
    tokens."""

    hit_share: float
    prompt: float
    blended: float


class BreakEven(Strict):
    """Against buying at the price list. `tokens_per_day` is where these devices, idle or not, cost as much; None:
    never."""

    bought_per_million: float
    made_per_million: float
    devices_per_day: float
    devices_tokens_per_day: float
    tokens_per_day: float | None
    utilisation: float | None


class ServingDay(Strict):
    """A day of the traffic asked about: what the devices cost and what the price list brings in."""

    input_tokens: float
    output_tokens: float
    cost: float | None
    revenue: float | None
    margin: float | None
    devices_needed: float
    utilisation: float


class ServePlan(Plan):
    """A day's plan: `device_hours` and `money` are a day's, costs per million tokens. Cached prompt tokens count as
    read."""

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
    curve: list[DecodePoint]
    cost_by_hit_share: list[HitCost]
    prices: tuple[float, float, float] | None
    margin: float | None
    break_even: BreakEven | None
    day: ServingDay | None


@dataclass(frozen=True)
class Hire:
    """Devices taken for a plan, the precision they work in, and what an hour of one costs; `example`: the table's
    price."""

    device: Device
    count: int
    precision: Precision
    price: float | None
    example: bool

    @classmethod
    def of(cls, asked: PlanRequest, count: int | None = None, precision: str | None = None) -> Hire:
        device, count = asked.device, count or asked.count or 1
        if count > MOST:
            raise SlingshotError(f"{count} devices: the largest count a plan takes is {MOST}")
        if count > 1 and not device.network:
            why = "what joins several of them is not known"
            raise SlingshotError(f"{count} x {device.name}: {why}; the nearest valid count is 1")
        price = device.price if asked.price is None else asked.price
        chosen = chosen_precision(asked.model.config, device, precision or asked.precision)
        return cls(device, count, chosen, price, asked.price is None)

    @property
    def usable(self) -> float:
        return USABLE * self.device.memory_bytes

    def line(self, name: str, hours: float, tokens: float = 0.0, flops: float = 0.0, note: str = "") -> PlanLine:
        days, money = hours / self.count / HOURS, None if self.price is None else hours * self.price
        return PlanLine(name=name, tokens=tokens, flops=flops, device_hours=hours, days=days, money=money, note=note)

    def common(
        self, kind: str, asked: PlanRequest, memory: Memory, lines: list[PlanLine],
        there: Callable[[Hire], tuple[float | None, bool]], fits: bool | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The fields every plan fills in the same way.

        `there` tells the device-hours of the same work on other devices, and whether it has room; `fits` the same of
        here.
        """
        watts, counts = self.device.power_watts, parameters(asked.model.config)
        hours = sum(line.device_hours for line in lines)
        money = None if self.price is None else hours * self.price
        days, has_room = hours / self.count / HOURS, memory.total <= self.usable
        own = Alternative(
            device=self.device.name, precision=self.precision.dtype, device_hours=hours, days=days, money=money,
            fits=has_room if fits is None else fits,
        )  # fmt: skip
        return {
            "kind": kind, "model": asked.model.name, "device": self.device.name, "count": self.count,
            "precision": self.precision.dtype,
            "parameters": Counts(
                total=counts.total, active=counts.active, active_without_embedding=counts.active - counts.embedding,
                active_without_embedding_and_head=counts.active - counts.embedding - counts.head, mtp=counts.mtp,
                cache_bytes_per_token=cache_bytes_per_token(asked.model.config),
            ),
            "device_hours": hours, "days": days, "price": self.price, "money": money,
            "energy_kwh": None if watts is None else hours * watts / 1000, "memory": memory,
            "memory_per_device_bytes": memory.total, "usable_memory_bytes": self.usable, "fits": has_room,
            "stages": lines, "alternatives": self._alternatives(own, there, serving=kind == "serve"),
        }  # fmt: skip

    def _alternatives(
        self, own: Alternative, there: Callable[[Hire], tuple[float | None, bool]], serving: bool
    ) -> list[Alternative]:
        """The same work on as many of every other device, in every precision worth comparing, this plan's own among
        them; a day's serving on as many as it takes."""
        found, here_too = [], (own.precision,) if serving else ("float32", own.precision)
        for other in and_others(self.device):
            here = other.name == self.device.name
            for dtype in dict.fromkeys(("fp8", "bfloat16", *(here_too if here else ()))):
                if here and dtype == own.precision:
                    found.append(own)
                elif dtype in other.peak:
                    price = self.price if here else other.price
                    hours, fits = there(replace(self, device=other, precision=PRECISIONS[dtype], price=price))
                    found.append(Alternative(
                        device=other.name, precision=dtype, device_hours=hours, fits=fits,
                        days=1.0 if serving else None if hours is None else hours / self.count / HOURS,
                        money=None if hours is None or price is None else hours * price,
                    ))  # fmt: skip
        return found

    def notes(self) -> list[str]:
        """The assumptions about the devices."""
        device, where = self.device, "the table's example" if self.example else "as given"
        price = f"${self.price:g} per {device.name} hour, {where}" if self.price is not None else (
            f"no price: none is known for {device.name}; give one per device-hour"
        )  # fmt: skip
        watts = f"{device.power_watts:g} W a device, hosts, network and cooling left out" if device.power_watts else ""
        filled = f"{show_share(USABLE)} of {show_size(device.memory_bytes)} may be filled"
        return [filled, price, watts or "energy unknown"]


def chosen_precision(config: ModelConfig, device: Device, name: str | None) -> Precision:
    """The precision asked for; else the one the model comes in, where the device has it, else 16 bits, else float32."""
    if name is None:
        wanted = (config.quantization, "bfloat16", "float32")
        name = next((dtype for dtype in wanted if dtype in device.peak), "float32")
    name = _SHORT.get(name.lower(), name.lower())
    dtype_peak(device, name)
    return PRECISIONS[name]


def beyond(config: ModelConfig, tokens: float) -> list[str]:
    """The assumption behind sequences longer than the model's own."""
    most = config.max_position_embeddings
    if tokens <= most:
        return []
    return [f"sequences of {tokens:g} tokens, though the model is made for {most}: its context extended first"]
