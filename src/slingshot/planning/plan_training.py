"""What training costs: pre-training from tokens, reinforcement learning from steps and rollouts, distillation from samples. No torch.

plan_pretrain(config, "deepseek-v3", device("h800"), 2048, tokens=14.8e12, tflops=385)
plan_rl(config, "deepseek-v3", device("h800"), 512, steps=10_400, response=6_700, longest=32_768, rollout=8_192)
plan_distill(student, "qwen2.5-32b", device("h800"), 64, teacher=config, teacher_name="deepseek-v3", samples=804_745, response=5_355)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import show_count, show_share
from slingshot.cost.devices import Device, and_others, mixed_peak
from slingshot.cost.flops import (
    decode_parts,
    forward_flops,
    forward_parts,
    parameters,
    prefill_parts,
    training_flops,
    training_parts,
)
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS, Memory, Precision, Sizes, sizes, training_memory
from slingshot.planning.plan import (
    ASSUMED_MFU,
    HOURS,
    MOST,
    USABLE,
    Alternative,
    DistillPlan,
    Fit,
    PretrainPlan,
    RLPlan,
    Transferred,
    beyond,
    chosen_precision,
    dominates,
    pool,
    positive,
    training_rate,
)
from slingshot.planning.plan_serving import DECODING, sampling_fleet
from slingshot.planning.published import published
from slingshot.planning.scaling import dense_equivalent
from slingshot.planning.sharding import (
    LINK_EFFICIENCY,
    RECOMPUTE,
    Layout,
    Transfer,
    layouts,
    network_seconds,
    transfers,
)
from slingshot.planning.throughput import DECODE_EFFICIENCY, Fleet, Lengths, Times, round_seconds

BATCH = 4e6  # tokens in an optimizer step where the request does not say
_ELSEWHERE = "other devices and precisions: at the same share of their own peak, which flatters the faster ones"
_FASTEST = " (the power of two that is fastest)"


def plan_pretrain(
    config: ModelConfig,
    model: str,
    device: Device,
    count: int,
    *,
    tokens: float,
    mfu: float | None = None,
    tflops: float | None = None,
    hours: float | None = None,
    price: float | None = None,
    precision: str | None = None,
    context: int | None = None,
    batch: float | None = None,
    ways: Mapping[str, Any] | None = None,
    stages: Mapping[str, float] | None = None,
) -> PretrainPlan:
    """The bill of training `config` on `tokens` tokens in sequences of `context`, `batch` tokens an optimizer step.

    mfu, tflops, hours    at most one: the share of the peak, TFLOP/s of a device, or the device-hours it took, from which the rate follows
    ways                  of the layout: any of tp, pp, ep, zero, recompute; what is left open is chosen
    stages                further lines of the bill whose device-hours are known, by name
    """
    hired = pool(device, count, price)
    positive(tokens=tokens)
    context = min(4096, config.max_position_embeddings) if context is None else context
    if not 2 <= context <= 2**27:
        raise SlingshotError(
            f"context {context}: from 2 to {2**27} tokens; the nearest valid value is {min(max(2, context), 2**27)}"
        )
    if tokens < context:
        raise SlingshotError(
            f"tokens {tokens:g}: fewer than one sequence of {context}; the nearest valid value is {context}"
        )
    chosen = chosen_precision(config, device, precision)
    batch_tokens, batch_note = _batch(batch, tokens, context, count)
    parts = _forward_and_backward(config, context, tokens)
    mtp = training_parts(config, [context])["mtp"] * tokens / context
    flops = sum(parts.values())
    rate = training_rate(device, chosen, parts, mfu, tflops, hours)
    run = _Run(config, device, count, chosen, context, batch_tokens)
    layout = run.layout(ways or {})
    memory = run.memory(layout)
    times = run.times(layout, memory)
    bubble = (layout.pp - 1) / (run.microbatches(layout) + layout.pp - 1)
    shortest = max(times.compute / (1 - bubble), times.memory, times.network)
    bound = flops / tokens * batch_tokens / count / shortest if shortest < math.inf else 0.0
    computed = flops / rate.per_device / 3600
    lines = [hired.stage("pre-training", computed, tokens, flops)]
    if mtp:
        lines.append(
            hired.stage(
                "of it the MTP module",
                0.0,
                tokens,
                mtp,
                "its FLOPs are not in the rate, its time is in the hours above",
            )
        )
    for name, known in (stages or {}).items():
        positive(**{f"the hours of {name}": known})
        lines.append(hired.stage(name, known, note="hours given, not computed"))
    total = sum(line.device_hours for line in lines)
    equal = dense_equivalent(config, tokens)
    common = hired.common("pretrain", config, model, chosen, memory, lines)
    return PretrainPlan(
        **common,
        nearest_fit=None if run.fits(memory) else run.nearest_fit(),
        flops=flops,
        flops_by_part=parts | ({"mtp": mtp} if mtp else {}),
        dominates=dominates(f"an optimizer step of {show_count(batch_tokens)} tokens", times),
        alternatives=_alternatives(run, common, parts, computed, total - computed),
        assumptions=[
            rate.note,
            batch_note,
            f"sequences of {context} tokens, each one document, one a microbatch; attention counted over the causal half",
            *beyond(config, context),
            f"layout: {layout}{'' if ways else '; chosen as the fastest that fits'}",
            f"bytes a parameter in {chosen.dtype}: {chosen.weight:.3g} weights, {chosen.gradient:.3g} gradients, {chosen.optimizer:.3g} optimizer",
            f"links reach {LINK_EFFICIENCY:.0%} of their rate, a node's own and the network's at the same time; compute hides what it can",
            *(
                [f"the rate is more than this layout lets through, {bound / 1e12:.3g} TFLOP/s"]
                if rate.per_device > bound
                else []
            ),
            *(
                [
                    "the rate counts the main model's FLOPs, as published rates do; the MTP module's stand on a line of their own"
                ]
                if mtp
                else []
            ),
            *hired.notes(),
            _ELSEWHERE,
            *(["hours given are the same on every device"] if stages else []),
        ],
        tokens=tokens,
        context=context,
        batch_tokens=batch_tokens,
        optimizer_steps=tokens / batch_tokens,
        tokens_per_day=tokens * count * HOURS / computed,
        six_nd_flops=6.0 * parameters(config).active * tokens,
        tflops_per_device=rate.per_device / 1e12,
        mfu=rate.mfu,
        mfu_of_bfloat16=rate.per_device / device.peak["bfloat16"] if "bfloat16" in device.peak else None,
        tflops_bound=bound / 1e12,
        layout=layout,
        layout_text=str(layout),
        bubble=bubble,
        exposed_network_seconds=max(0.0, times.network - times.compute),
        transfers=[Transferred(**vars(transfer)) for transfer in run.transfers(layout)],
        dense_equivalent=equal,
        dense_device_hours=equal.ratio * computed if equal else None,
        published=published(config, model, device.name, tokens),
    )


def plan_rl(
    config: ModelConfig,
    model: str,
    device: Device,
    count: int,
    *,
    steps: int,
    response: float,
    longest: float,
    prompts: int = 32,
    group: int = 16,
    rollout: int | None = None,
    prompt: float = 200,
    forwards: int = 1,
    verify_seconds: float = 0.1,
    verify_workers: int | None = None,
    mfu: float | None = None,
    tflops: float | None = None,
    price: float | None = None,
    precision: str | None = None,
    devices_per_copy: int | None = None,
    efficiency: float = DECODE_EFFICIENCY,
    ways: Mapping[str, Any] | None = None,
) -> RLPlan:
    """The bill of GRPO: rollouts, then their verification, then the update, one after the other on the same devices.

    prompts, group    of a step: so many prompts, so many responses to each;  rollout   responses sampled at once (a step's, when not given)
    prompt, response  mean tokens;  longest   the cap on a response
    forwards          forward passes besides the trained one: 1 for the reference of the KL term
    verify_seconds    of one processor core for a response, on `verify_workers` cores (16 a device, when not given)
    """
    hired = pool(device, count, price)
    positive(
        steps=steps,
        prompts=prompts,
        group=group,
        response=response,
        prompt=prompt,
        longest=longest,
        efficiency=efficiency,
    )
    if response >= longest:
        raise SlingshotError(
            f"a mean response of {response:g} tokens needs a longer cap than {longest:g}; one of {2 * response:g} is usual"
        )
    if forwards < 0 or verify_seconds < 0:
        raise SlingshotError("forwards and verify seconds must not be negative; the nearest valid value is 0")
    chosen = chosen_precision(config, device, precision)
    responses = steps * prompts * group
    at_once = min(rollout if rollout is not None else prompts * group, responses)
    workers = verify_workers if verify_workers is not None else 16 * count
    positive(rollout=at_once, verify_workers=workers)
    full, last = divmod(responses, at_once)
    rounds, tokens = full + (last > 0), responses * (prompt + response)
    lengths = Lengths(response, longest)

    def sampling(copies: int, fleet: Fleet) -> float:
        """Device-hours of all rounds."""
        usable = USABLE * fleet.device.memory_bytes
        seconds = full * round_seconds(fleet, at_once, copies, prompt, lengths, usable)
        return (seconds + (round_seconds(fleet, last, copies, prompt, lengths, usable) if last else 0.0)) * count / 3600

    def policies(other: Device, precision: Precision, given: int | None = None) -> tuple[int, Fleet]:
        return sampling_fleet(
            config, other, precision, count, given, prompt + response, at_once / count, efficiency, sampling
        )

    def sampled(other: Device, precision: Precision) -> float:
        return sampling(*policies(other, precision))

    copies, fleet = policies(device, chosen, devices_per_copy)
    # A token of a response meets the prompt and, in the mean over all tokens, E[n^2] / 2 E[n] of its own.
    decoding = responses * sum(decode_parts(config, prompt + lengths.square / response / 2, response).values())

    # Packed rows of one prompt and response each. In the mean a token's row is E[row^2] / E[row] long, which is what its attention goes by.
    length = max(2, round(prompt + response))
    longer = max(2, round((prompt**2 + 2 * prompt * response + lengths.square) / (prompt + response)))
    train = _forward_and_backward(config, longer, tokens)
    other = forwards * forward_flops(config, [longer]) * tokens / longer
    rate = training_rate(device, chosen, train, mfu, tflops)
    run = _Run(config, device, count, chosen, length, max(prompts * group, count) * float(length))
    layout = run.layout(ways or {})
    batch = min(at_once / count, fleet.largest_batch(prompt + response, hired.usable))
    memory = max(run.memory(layout), fleet.memory(batch, prompt + response), key=lambda held: held.total)
    waits = full * math.ceil(at_once / workers) + math.ceil(
        last / workers
    )  # for a response to be verified, one after the other
    lines = [
        hired.stage(
            "rollouts", sampling(copies, fleet), responses * response, decoding,
            f"{rounds:,} rounds of {at_once:,} responses{f', the last of {last:,}' if last else ''}",
        ),
        hired.stage("verification", waits * verify_seconds * count / 3600, note=f"{workers:,} cores, {verify_seconds:g} s a response"),
        hired.stage("update", (sum(train.values()) + other) / rate.per_device / 3600, tokens, sum(train.values()) + other),
    ]  # fmt: skip
    common = hired.common("rl", config, model, chosen, memory, lines)
    return RLPlan(
        **common,
        nearest_fit=None if run.fits(memory) else run.nearest_fit(),
        flops=sum(line.flops for line in lines),
        flops_by_part={"rollouts": decoding, "training": sum(train.values()), "other forward passes": other},
        dominates=dominates(
            f"a decoding step of {batch:.3g} sequences a device", fleet.decode_step(batch, prompt + response / 2)
        ),
        alternatives=_alternatives(run, common, train, lines[2].device_hours, lines[1].device_hours, sampled),
        assumptions=[
            rate.note,
            f"responses of {response:g} tokens in the mean and at most {longest:g}, their lengths exponential; prompts of {prompt:g} tokens",
            *beyond(config, prompt + longest),
            f"{copies} {'copy' if copies == 1 else 'copies'} of the policy on {fleet.devices} devices each{'' if devices_per_copy else _FASTEST}, "
            f"decoding at {efficiency:.0%} {DECODING}",
            "reading the prompts left out: a group shares its prompt's",
            "a round ends with its longest response; rollouts, verification and update take turns on all devices, none overlapped",
            f"update: one pass over every response without padding and {forwards} forward passes besides",
            "the reference's weights are not counted as memory",
            f"verification of a round on {workers:,} cores at {verify_seconds:g} s a response, each on one core",
            f"training layout: {layout}; weights pass between training and sampling in no time",
            *hired.notes(),
            f"{_ELSEWHERE}; copies of the policy on as many devices as is fastest there",
        ],
        steps=steps,
        responses=responses,
        rounds=rounds,
        round_seconds=round_seconds(fleet, at_once, copies, prompt, lengths, hired.usable),
        tokens=tokens,
        devices_per_copy=fleet.devices,
        layout_text=str(layout),
        tflops_per_device=rate.per_device / 1e12,
        mfu=rate.mfu,
    )


def plan_distill(
    config: ModelConfig,
    model: str,
    device: Device,
    count: int,
    *,
    teacher: ModelConfig,
    teacher_name: str,
    samples: float,
    response: float,
    prompt: float = 200,
    accepted: float = 1.0,
    epochs: float = 2,
    mfu: float | None = None,
    tflops: float | None = None,
    price: float | None = None,
    precision: str | None = None,
    teacher_precision: str | None = None,
    devices_per_copy: int | None = None,
    efficiency: float = DECODE_EFFICIENCY,
    ways: Mapping[str, Any] | None = None,
) -> DistillPlan:
    """The bill of sampling until `samples` responses of a teacher are kept, `accepted` of those it writes, and of training `config` on them."""
    hired = pool(device, count, price)
    positive(samples=samples, response=response, prompt=prompt, accepted=accepted, epochs=epochs, efficiency=efficiency)
    if accepted > 1:
        raise SlingshotError(f"accepted {accepted:g}: a share lies between 0 and 1; the nearest valid value is 1")
    chosen, of_teacher = (
        chosen_precision(config, device, precision),
        chosen_precision(teacher, device, teacher_precision),
    )
    sampled, context = samples / accepted, prompt + response / 2
    copies, fleet = sampling_fleet(
        teacher, device, of_teacher, count, devices_per_copy, context, sampled / count, efficiency
    )

    def batch_and_hours(copy: Fleet, usable: float) -> tuple[float, float]:
        batch = min(copy.largest_batch(context, usable), max(1.0, sampled / count))
        reading = copy.prefill_seconds(prompt, 0.0, ASSUMED_MFU[copy.precision.dtype])
        return batch, sampled * (response * copy.step_seconds(batch, context) / batch + reading) / 3600

    def sampling(other: Device, _: Precision) -> float:
        as_here = of_teacher if of_teacher.dtype in other.peak else chosen_precision(teacher, other, None)
        copy = sampling_fleet(teacher, other, as_here, count, None, context, sampled / count, efficiency)[1]
        return batch_and_hours(copy, USABLE * other.memory_bytes)[1]

    batch, sampling_hours = batch_and_hours(fleet, hired.usable)
    speed = batch / fleet.step_seconds(batch, context)
    writing = sampled * sum(
        sum(parts.values()) for parts in (prefill_parts(teacher, prompt), decode_parts(teacher, context, response))
    )

    length = max(2, round(prompt + response))
    tokens = epochs * samples * (prompt + response)
    train = _forward_and_backward(config, length, tokens)
    rate = training_rate(device, chosen, train, mfu, tflops)
    run = _Run(config, device, count, chosen, length, max(64, count) * float(length))
    layout = run.layout(ways or {})
    memory = max(run.memory(layout), fleet.memory(batch, context), key=lambda held: held.total)
    lines = [
        hired.stage(
            "the teacher samples", sampling_hours, sampled * response, writing,
            f"{show_count(sampled)} responses, {show_count(samples)} kept",
        ),
        hired.stage("the student trains", sum(train.values()) / rate.per_device / 3600, tokens, sum(train.values()), f"{epochs:g} epochs"),
    ]  # fmt: skip
    common = hired.common("distill", config, model, chosen, memory, lines)
    return DistillPlan(
        **common,
        nearest_fit=None if run.fits(memory) else run.nearest_fit(),
        flops=sum(line.flops for line in lines),
        flops_by_part={"sampling": writing, "training": sum(train.values())},
        dominates=dominates(
            f"a decoding step of the teacher, {batch:.3g} sequences a device", fleet.decode_step(batch, context)
        ),
        alternatives=_alternatives(run, common, train, lines[1].device_hours, sampled=sampling),
        assumptions=[
            rate.note,
            f"{accepted:.3g} of the teacher's responses are kept; {response:g} tokens each, prompts of {prompt:g}; verification left out",
            f"{copies} {'copy' if copies == 1 else 'copies'} of the teacher in {of_teacher.dtype} on {fleet.devices} devices each"
            f"{'' if devices_per_copy else _FASTEST}, decoding at {efficiency:.0%} {DECODING}, always at full batch",
            f"prompts read at {show_share(ASSUMED_MFU[of_teacher.dtype])} of the peak of their products",
            f"student's layout: {layout}; at least 64 examples a step, packed without padding",
            *hired.notes(),
            f"{_ELSEWHERE}; the teacher in {of_teacher.dtype} where they have it, its copies on as many devices as is fastest there",
        ],
        teacher=teacher_name,
        sampled=sampled,
        kept=samples,
        sampled_tokens_per_second_per_device=speed,
        devices_per_copy=fleet.devices,
        layout_text=str(layout),
        tflops_per_device=rate.per_device / 1e12,
        mfu=rate.mfu,
    )


def _forward_and_backward(config: ModelConfig, length: int, tokens: float) -> dict[str, float]:
    """FLOPs of both passes of the main model over `tokens` tokens in documents of this length, by part of the network."""
    return {part: 3 * flops * tokens / length for part, flops in forward_parts(config, [length]).items()}


def _batch(batch: float | None, tokens: float, context: int, count: int) -> tuple[float, str]:
    """Tokens in an optimizer step, and the line that says so."""
    if batch is not None:
        if not context <= batch <= tokens:
            nearest = min(max(batch, context), tokens)
            raise SlingshotError(
                f"batch {batch:g} tokens: from one sequence of {context} to the whole run; the nearest valid value is {nearest:g}"
            )
        return batch, f"{show_count(batch)} tokens in an optimizer step, as given"
    wanted, all_there_are = max(round(min(BATCH, tokens / 1000) / context), count), int(tokens // context)
    sequences = min(wanted, all_there_are)
    why = "at least a sequence a device" if wanted <= all_there_are else "the whole run has no more whole sequences"
    return sequences * float(context), f"{show_count(sequences * context)} tokens in an optimizer step, assumed; {why}"


@dataclass(frozen=True)
class _Run:
    """A training run on these devices: which layouts it may take and what they mean."""

    config: ModelConfig
    device: Device
    count: int
    precision: Precision
    context: int
    batch_tokens: float

    @functools.cached_property
    def weighed(self) -> Sizes:
        return sizes(self.config, self.precision)

    @functools.cached_property
    def compute_seconds(self) -> float:
        """Of training on an optimizer step's tokens, MTP included, on one device at its peak."""
        parts = forward_parts(self.config, [self.context])
        flops = training_flops(self.config, [self.context]) / self.context * self.batch_tokens / self.count
        return flops / mixed_peak(self.device, self.precision.dtype, parts)

    @property
    def sequences(self) -> float:
        return self.batch_tokens / self.context

    def microbatches(self, layout: Layout) -> float:
        return max(1.0, self.sequences / layout.dp)

    def memory(self, layout: Layout) -> Memory:
        return training_memory(self.weighed, layout, self.context, self.microbatches(layout))

    def fits(self, memory: Memory) -> bool:
        return memory.total <= USABLE * self.device.memory_bytes

    def transfers(self, layout: Layout) -> list[Transfer]:
        return transfers(self.weighed, layout, self.device, self.batch_tokens, self.context)

    def layout(self, ways: Mapping[str, Any]) -> Layout:
        """The fastest layout with these ways that fits; where none does, the one that needs least memory."""
        options = list(layouts(self.config, self.count, self.device.per_node, **ways))
        fewest = min(layout.dp for layout in options)
        if fewest > self.sequences:
            raise SlingshotError(
                f"a batch of {self.batch_tokens:g} tokens has {self.sequences:g} sequences of {self.context}, fewer than {fewest} data-parallel "
                f"ranks; the nearest valid batch is {fewest * self.context}, in a run of at least as many tokens"
            )
        needs = [(layout, self.memory(layout)) for layout in options if layout.dp <= self.sequences]
        fitting = [(layout, memory) for layout, memory in needs if self.fits(memory)]
        if not fitting:
            return min(needs, key=lambda pair: pair[1].total)[0]
        # Who asks for ZeRO asks for data parallelism, which it shards over.
        return min(fitting, key=lambda pair: (pair[0].zero > 0 and pair[0].dp == 1, self._seconds(*pair)))[0]

    def _seconds(self, layout: Layout, memory: Memory) -> float:
        """Of an optimizer step, to compare layouts: what takes longest, compute at its peak with recomputation and bubble; then less network."""
        again = {"none": 1.0, "selective": 1.05, "full": 4 / 3}[layout.recompute]
        compute = again * self.compute_seconds * (1 + (layout.pp - 1) / self.microbatches(layout))
        times = self.times(layout, memory)
        return max(compute, times.memory, times.network) + 0.01 * times.network

    def times(self, layout: Layout, memory: Memory) -> Times:
        """Seconds of an optimizer step on one device, each resource alone.

        Memory traffic: a microbatch reads the weights forward and for both gradients and reads and writes the gradients and what is kept for the
        backward pass; the optimizer reads and writes its state once.
        """
        experts, others = self.weighed.stage_weights(layout)
        microbatches = self.microbatches(layout)
        kept = memory.activations / min(layout.pp, microbatches)
        moved = (
            microbatches * ((experts + others) * (3 * self.precision.weight + 2 * self.precision.gradient) + 2 * kept)
            + 2 * memory.optimizer
        )
        return Times(
            compute=self.compute_seconds * (4 / 3 if layout.recompute == "full" else 1),
            memory=moved / self.device.bandwidth,
            network=network_seconds(self.transfers(layout)),
        )

    def nearest_fit(self) -> Fit | None:
        """Another layout on as many devices, else more of them, else another device; None where the table has nothing."""
        for other in and_others(self.device):
            if self.precision.dtype not in other.peak:
                continue
            for count in (
                self.count * 2**power for power in range(13 if other.network else 1) if self.count * 2**power <= MOST
            ):
                batch = max(self.batch_tokens, float(self.context * count))
                layout = _Run(self.config, other, count, self.precision, self.context, batch).leanest()
                if layout is not None:
                    return Fit(device=other.name, count=count, layout=str(layout))
        return None

    def leanest(self) -> Layout | None:
        """A layout that fits, found by trying only the settings that save most memory; None when there is none."""
        for layout in layouts(self.config, self.count, self.device.per_node):
            lean = layout.recompute == RECOMPUTE[-1] and layout.zero in (0, 3) and layout.dp <= self.sequences
            if lean and self.fits(self.memory(layout)):
                return layout
        return None


def _alternatives(
    run: _Run,
    plan: Mapping[str, Any],
    parts: Mapping[str, float],
    trained: float,
    same: float = 0.0,
    sampled: Callable[[Device, Precision], float] | None = None,
) -> list[Alternative]:
    """The same work on as many of every other device, in every precision worth comparing, and `plan`'s own figures among them.

    Training takes `trained` device-hours here and keeps its share of the peak of `parts`; `same` hours do not depend on the device; `sampled`
    tells the hours of sampling on another one, or raises SlingshotError where no copy of the model has room. This device's price is `plan`'s.
    """
    peak = mixed_peak(run.device, run.precision.dtype, parts)
    found = []
    for other in and_others(run.device):
        here = other.name == run.device.name
        for dtype in (
            dict.fromkeys(("fp8", "bfloat16", "float32", run.precision.dtype)) if here else ("fp8", "bfloat16")
        ):
            if dtype not in other.peak or (run.count > 1 and not other.network):
                continue
            if here and dtype == run.precision.dtype:
                own = {name: plan[name] for name in ("device_hours", "days", "money", "fits")}
                found.append(Alternative(device=other.name, precision=dtype, **own))
                continue
            hours = trained * peak / mixed_peak(other, dtype, parts) + same
            fits = (
                _Run(run.config, other, run.count, PRECISIONS[dtype], run.context, run.batch_tokens).leanest()
                is not None
            )
            if sampled is not None:
                try:
                    hours += sampled(other, PRECISIONS[dtype])
                except SlingshotError:
                    fits = False
            price = plan["price"] if here else other.price
            money = hours * price if price is not None else None
            found.append(
                Alternative(
                    device=other.name,
                    precision=dtype,
                    device_hours=hours,
                    days=hours / run.count / HOURS,
                    money=money,
                    fits=fits,
                )
            )
    return found
