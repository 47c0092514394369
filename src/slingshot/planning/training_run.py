"""A training run on some devices: how fast, in which layout, in how much memory. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import show_count, show_share
from slingshot.cost.devices import and_others
from slingshot.cost.flops import forward_flops, forward_parts, remade_flops, trained, training_parts
from slingshot.planning.layout import RECOMPUTE, Layout, layouts
from slingshot.planning.memory import PRECISIONS, Blocks, Memory, training_memory, with_momenta
from slingshot.planning.model_copy import ResourceTimes
from slingshot.planning.network import network_seconds, transfers
from slingshot.planning.plan import MOST, Hire
from slingshot.planning.request import TrainingRequest


class TrainingRate(NamedTuple):
    """FLOP/s of one device, which share of the mix's peak that is, and where it is from."""

    per_device: float
    mfu: float
    note: str


class TrainingRun:
    """Training on `tokens` tokens in documents of `length`, on hired devices, in sequences of `context` tokens of which
    a step has `batch_tokens`; `parts`: FLOPs of both passes of the main model over all of them."""

    def __init__(
        self, asked: TrainingRequest, hire: Hire, context: int, batch_tokens: float, length: int, tokens: float
    ) -> None:
        self.asked, self.hire, self.context, self.batch_tokens = asked, hire, context, batch_tokens
        self.length, self.tokens, self.sequences = length, tokens, batch_tokens / context
        self.config = config = asked.model.config
        held, passed = asked.adapters or (None, None)
        self.blocks = Blocks(config, with_momenta(hire.precision, asked.state_dtype, asked.offload), held)
        parts = trained(forward_parts(config, [length], adapters=passed or 0.0), passed)
        self.parts = {part: flops * tokens / length for part, flops in parts.items()}
        # Of training on an optimizer step's tokens, MTP included, on one device at its peak.
        flops = sum(training_parts(config, [context], adapters=passed).values())
        self.compute_seconds = flops * self.sequences / hire.count / hire.peak(forward_parts(config, [context]))
        remade = remade_flops(config, context) / flops
        whole = forward_flops(config, [context], mtp=True, adapters=passed or 0.0) / flops
        self.computed = {"none": 1.0, "selective": 1 + remade, "full": 1 + whole}

    @cached_property
    def rate(self) -> TrainingRate:
        """By --mfu, --tflops or --hours, else by what is assumed. Never above the peak."""
        asked, precision, hours = self.asked, self.hire.precision, getattr(self.asked, "hours", None)
        dtype = precision.dtype
        if not precision.gradient:
            trainable = ", ".join(name for name, other in PRECISIONS.items() if other.gradient)
            raise SlingshotError(f"precision {dtype}: nothing is trained in it; the nearest that is are {trainable}")
        if sum(given is not None for given in (asked.mfu, asked.tflops, hours)) > 1:
            raise SlingshotError("--mfu, --tflops and --hours each set the rate; give one of them")
        peak, flops = self.hire.peak(self.parts), sum(self.parts.values())
        if asked.tflops is not None:
            rate, source = asked.tflops * 1e12, f"{asked.tflops:g} TFLOP/s a device, as given"
        elif hours is not None:
            rate, source = flops / hours / 3600, f"{show_count(hours)} device-hours, as given"
        elif asked.mfu is not None:
            rate, source = asked.mfu * peak, f"MFU {show_share(asked.mfu)}, as given"
        else:
            rate, source = precision.mfu * peak, f"MFU {show_share(precision.mfu)}, assumed; {precision.mfu_source}"
        if rate > peak * (1 + 1e-9):
            below = f"{math.floor(peak / 1e9) / 1000:.10g}"
            most = f"one {self.hire.device.name} does at most {below} of this model's products in {dtype}"
            nearest = f"{math.ceil(flops / peak / 3600):,} hours" if hours is not None else below
            raise SlingshotError(f"{rate / 1e12:.4g} TFLOP/s: {most}; the nearest valid value is {nearest}")
        of_peak = f"{show_share(rate / peak)} of {peak / 1e12:.4g} for this mix in {dtype}"
        return TrainingRate(rate, rate / peak, f"{source}: {rate / 1e12:.4g} TFLOP/s, {of_peak}")

    @property
    def hours(self) -> float:
        """Device-hours of all of it."""
        return sum(self.parts.values()) / self.rate.per_device / 3600

    def microbatches(self, layout: Layout) -> float:
        return max(1.0, self.sequences / layout.dp)

    def memory_in(self, layout: Layout) -> Memory:
        return training_memory(self.blocks, layout, self.context, self.microbatches(layout), self.asked.logits_chunk)

    @cached_property
    def memory(self) -> Memory:
        return self.memory_in(self.layout)

    @cached_property
    def layout(self) -> Layout:
        """The fastest layout with the ways asked for that fits; where none does, the one that needs least memory."""
        ways = self.asked.ways
        if self.blocks.adapters is not None:  # what stages with adapters do
            ways = {"recompute": RECOMPUTE[-1]} | ways
        options = layouts(self.config, self.hire.count, self.hire.device.per_node, **ways)
        fewest = min(layout.dp for layout in options)
        if fewest > self.sequences:
            has = f"{self.sequences:g} sequences of {self.context}, fewer than {fewest} data-parallel ranks"
            way_out = f"the nearest valid batch is {fewest * self.context}, in a run of at least as many tokens"
            raise SlingshotError(f"a batch of {self.batch_tokens:g} tokens has {has}; {way_out}")
        needs = [(layout, self.memory_in(layout)) for layout in options if layout.dp <= self.sequences]
        fitting = [(layout, memory) for layout, memory in needs if memory.total <= self.hire.device.usable_bytes]
        if not fitting:
            return min(needs, key=lambda pair: pair[1].total)[0]
        # Who asks for ZeRO asks for data parallelism, which it shards over.
        return min(fitting, key=lambda pair: (pair[0].zero > 0 and pair[0].dp == 1, self._seconds(*pair)))[0]

    def _seconds(self, layout: Layout, memory: Memory) -> float:
        """Of an optimizer step, to compare layouts: what takes longest; then less network."""
        times = self.times(layout, memory)
        elementwise = 1.03 if layout.recompute == "selective" else 1.0  # norms, rotation, SwiGLU: docs/results.md
        compute = elementwise * times.compute * (1 + (layout.pp - 1) / self.microbatches(layout))
        return max(compute, times.memory_traffic, times.network) + 0.01 * times.network

    def times(self, layout: Layout, memory: Memory) -> ResourceTimes:
        """Seconds of an optimizer step on one device, each resource alone.

        Memory traffic: a microbatch reads the weights forward and for both gradients and reads and writes the gradients
        and what is kept for the backward pass; the optimizer reads and writes its state once.
        """
        hire, precision, microbatches = self.hire, self.hire.precision, self.microbatches(layout)
        kept = memory.activations / min(layout.pp, microbatches)
        held = self.blocks.stage_weights(layout)
        moved = 3 * precision.weight * sum(held) + 2 * precision.gradient * sum(self.blocks.trained(layout, *held))
        return ResourceTimes(
            compute=self.compute_seconds * self.computed[layout.recompute],
            memory_traffic=(microbatches * (moved + 2 * kept) + 2 * memory.optimizer) / hire.device.bandwidth,
            network=network_seconds(transfers(self.blocks, layout, hire.device, self.batch_tokens, self.context)),
        )

    def leanest(self, hire: Hire) -> Layout | None:
        """A layout of the same on other devices that fits, with at least a sequence for each, found by trying only the
        settings that save most memory; None when there is none."""
        batch = max(self.batch_tokens, float(self.context * hire.count))
        there = TrainingRun(self.asked, hire, self.context, batch, self.length, self.tokens)
        some = layouts(there.config, hire.count, hire.device.per_node, recompute=RECOMPUTE[-1])
        lean = (layout for layout in some if layout.zero in (0, 3) and layout.dp <= there.sequences)
        return next((layout for layout in lean if there.memory_in(layout).total <= hire.device.usable_bytes), None)

    def nearest_fit(self) -> dict[str, str | int] | None:
        """Another layout on as many devices, else more of them, else another device; None: nothing in the table."""
        for other in and_others(self.hire.device, self.hire.precision.dtype):
            for count in (self.hire.count * 2**power for power in range(13 if other.network else 1)):
                there = replace(self.hire, device=other, count=count)
                if count <= MOST and (layout := self.leanest(there)) is not None:
                    return {"device": other.name, "count": count, "layout": str(layout)}
        return None

    def fields(self) -> dict[str, Any]:
        """What plans with training in them fill in the same way."""
        nearest = None if self.memory.total <= self.hire.device.usable_bytes else self.nearest_fit()
        return {"nearest_fit": nearest, "layout_text": str(self.layout),
                "tflops_per_device": self.rate.per_device / 1e12, "mfu": self.rate.mfu}  # fmt: skip

    def elsewhere(self, other: Hire, trained: float, more: Callable[[Hire], float]) -> tuple[float | None, bool]:
        """Device-hours on other devices, and whether there is room: of what took `trained` hours here at the same share
        of the peak, and of `more`, a SlingshotError where no copy of the model has room."""
        try:
            hours = trained * self.hire.peak(self.parts) / other.peak(self.parts) + more(other)
        except SlingshotError:
            return None, False
        return hours, self.leanest(other) is not None
