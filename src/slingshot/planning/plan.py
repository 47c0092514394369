"""Plans: what pre-training, reinforcement learning, distillation and serving will cost, before anything runs. No torch.

What all plans share; the arithmetic is in plan_training.py and plan_serving.py. Nothing that is not in the
architecture, the table of devices or the request enters a figure without a line in `assumptions`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ConfigDict

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import packaged_toml
from slingshot.base.quantity import show_share, show_size
from slingshot.cost.devices import USABLE, Device, and_others, dtype_peak, mixed_peak
from slingshot.cost.flops import cache_bytes_per_token, parameters
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS, Memory, Precision, stored_bytes
from slingshot.planning.network import LINK_EFFICIENCY
from slingshot.planning.request import PlanRequest
from slingshot.quantization.formats import BITS

MOST = 10**7  # devices a plan takes
ASSUMPTIONS = packaged_toml("slingshot.planning", "assumptions.toml")
DECODING = "of the roofline (DeepSeek's day-6 disclosure comes to 46%), no speculation"
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


class PlanLine(Strict):
    """A line of the bill. `device_hours` are every device's together; a line of 0 is part of another, see its note."""

    name: str
    tokens: float = 0.0
    flops: float = 0.0
    device_hours: float
    days: float
    money: float | None
    note: str = ""


class Plan(Strict):
    """What every plan has, and beside it what its kind has: the functions that make plans name those fields."""

    model_config = ConfigDict(extra="allow")

    kind: str
    model: str
    device: str
    count: int
    precision: str
    device_hours: float
    days: float
    price: float | None
    money: float | None  # in the currency of the price
    energy_kwh: float | None  # of the devices alone
    flops: float
    flops_by_part: dict[str, float]
    memory: Memory
    usable_memory_bytes: float
    fits: bool
    nearest_fit: dict[str, str | int] | None  # what has room
    stages: list[PlanLine]
    dominates: dict[str, str | float]  # what one device would wait for, each resource alone
    alternatives: list[dict[str, Any]]  # the same work elsewhere, without hours where there is no room for it at all
    parameters: dict[str, float]  # active ones as they are counted three ways
    assumptions: list[str]


@dataclass(frozen=True)
class Hire:
    """Devices taken for a plan, with the memory and the price that were asked for, and their precision."""

    device: Device
    count: int
    precision: Precision

    @classmethod
    def of(cls, asked: PlanRequest, count: int | None = None) -> Hire:
        device, count = asked.device, count or asked.count or 1
        if count > MOST:
            raise SlingshotError(f"{count} devices: the largest count a plan takes is {MOST}")
        if count > 1 and not device.network:
            why = "what joins several of them is not known"
            raise SlingshotError(f"{count} x {device.name}: {why}; the nearest valid count is 1")
        own = {"memory_bytes": asked.memory, "price": asked.price}
        device = device.model_copy(update={key: value for key, value in own.items() if value is not None})
        return cls(device, count, chosen_precision(asked.model.config, device, asked.precision, asked.kind == "serve"))

    def peak(self, parts: Mapping[str, float]) -> float:
        """FLOP/s of one of them at work of these `parts`."""
        return mixed_peak(self.device, self.precision.dtype, parts)

    def costs(self, hours: float | None) -> dict[str, Any]:
        """What so many device-hours come to."""
        money = None if hours is None or self.device.price is None else hours * self.device.price
        return {"device_hours": hours, "days": None if hours is None else hours / self.count / 24, "money": money}

    def line(self, name: str, hours: float, tokens: float = 0.0, flops: float = 0.0, note: str = "") -> PlanLine:
        return PlanLine(name=name, tokens=tokens, flops=flops, note=note, **self.costs(hours))

    def plan(
        self, asked: PlanRequest, memory: Memory, lines: list[PlanLine],
        there: Callable[[Hire], tuple[float | None, bool]], own_fits: bool | None = None, **own: Any,
    ) -> Plan:  # fmt: skip
        """Fill in the fields that every plan has, beside its `own`.

        `there` tells the device-hours of the same work on other devices, and whether it has room; `own_fits` of here.
        """
        watts, counts = self.device.power_watts, parameters(asked.model.config)
        hours, fits = sum(line.device_hours for line in lines), memory.total <= self.device.usable_bytes
        here = {"device": self.device.name, "precision": self.precision.dtype} | self.costs(hours)
        others = []  # in other precisions, and on as many of every other device; a day of serving on what it takes
        for device in and_others(self.device):
            own_dtype = [self.precision.dtype] * (device is self.device)
            for dtype in dict.fromkeys(("fp8", "bfloat16", *own_dtype)):
                if dtype in own_dtype:
                    others.append(here | {"fits": fits if own_fits is None else own_fits})
                elif dtype in device.peak:
                    other = replace(self, device=device, precision=PRECISIONS[dtype])
                    found, room = there(other)
                    days = {"days": 1.0} if asked.kind == "serve" else {}
                    costs = other.costs(found) | days | {"fits": room}
                    others.append({"device": device.name, "precision": dtype} | costs)
        return Plan.model_validate(here | {
            "kind": asked.kind, "model": asked.model.name, "count": self.count, "price": self.device.price,
            "stages": lines, "parameters": {"total": counts.total} | counts.active_ways | {
                "mtp": counts.mtp, "cache_bytes_per_token": cache_bytes_per_token(asked.model.config),
            },
            "energy_kwh": None if watts is None else hours * watts / 1000, "memory": memory, "alternatives": others,
            "usable_memory_bytes": self.device.usable_bytes, "fits": fits,
        } | own)  # fmt: skip

    def assumed(self, asked: PlanRequest, length: float, **known: Any) -> list[str]:
        """The sentences of assumptions.toml for a plan of sequences of `length`, with what is `known` filled in; one
        that needs what is None is left out."""
        device, most, found = self.device, asked.model.config.max_position_embeddings, list[str]()
        known |= {
            "asked": asked, "links": LINK_EFFICIENCY, "decoding": DECODING,
            "usable": show_share(USABLE), "memory": show_size(device.memory_bytes), "device": device.name,
            "price": device.price, "whose": "the table's example" if asked.price is None else "as given",
            "unpriced": device.name if device.price is None else None, "watts": device.power_watts,
            "unknown": None if device.power_watts else "energy", "most": most,
            "length": length if length > most else None,
        }  # fmt: skip
        known = {name: value for name, value in known.items() if value is not None}
        for part in (asked.kind, "longer", "devices", *["elsewhere"] * (asked.kind != "serve")):
            for text in ASSUMPTIONS[part]:
                with contextlib.suppress(KeyError):
                    found.append(text.format(**known))
        return found


def chosen_precision(config: ModelConfig, device: Device, name: str | None, served: bool = False) -> Precision:
    """The precision asked for; else fp8 where the model comes in it and the device has it, else 16 bits, else float32.

    Numbers that are stored as int8 and int4 multiply 16 bits; of a model that is only `served` they stay as stored.
    """
    wanted = (*["fp8"] * (config.quantization == "fp8"), "bfloat16")
    dtype = next((dtype for dtype in wanted if dtype in device.peak), "float32")
    if name is not None:
        dtype = _SHORT.get(name.lower(), name.lower())
    dtype_peak(device, dtype)
    if served and name is None and config.quantization in BITS:
        held = config.model_copy(update={"num_nextn_predict_layers": 0})
        return PRECISIONS[dtype]._replace(weight=stored_bytes(held))
    return PRECISIONS[dtype]
