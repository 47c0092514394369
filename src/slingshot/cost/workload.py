"""What a stage will do, or has done, as counts of work; and what that work would take on a device of the table. No torch.

    workload = slingshot.stages.rl.plan(config, prospect)       # every stage module has one
    workload.flops, workload.tokens, workload.assumptions
    elsewhere(workload, device("h100")).seconds                 # at an assumed share of what the device can do
    Workload.of(Receipt.read(folder), model, steps=450)         # the same nouns for a stage that has run

A phase is work of one sort. Training takes `steps` optimizer steps, with `at_once` tokens in one forward and backward pass. Rollouts take
`steps` rounds of `responses` responses each, decoded together from prompts of `prompt` tokens to `response` tokens in the mean and `longest` at
most. Files only pass `n_bytes`.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from slingshot.base.config import Strict
from slingshot.base.quantity import show_share
from slingshot.cost.devices import Device, dtype_peak
from slingshot.cost.flops import is_moe, parameters
from slingshot.cost.receipt import Receipt
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS, sizes, training_memory
from slingshot.planning.plan import ASSUMED_MFU, USABLE
from slingshot.planning.sharding import Layout
from slingshot.planning.throughput import DECODE_EFFICIENCY, Fleet

SOLVED = 0.5  # chance that a response is right, where nobody knows
ENGINE_BATCH = 256  # sequences the engine decodes together unless told otherwise

# Where a network is small a device waits for its next kernel. Counted on this repository's own network: about 80 kernels in a block's forward
# pass and, with experts, 75 more and two for each; a training step, backward and optimizer included, issues four times its forward's.
KERNELS, KERNELS_OF_EXPERTS, KERNELS_OF_EXPERT, TRAINING_KERNELS = 80, 75, 2, 4
KERNEL_SECONDS = 10e-6  # assumed: Python issues about 100,000 a second


class Phase(Strict):
    """Work of one sort; `flops` by what they are spent on, as receipts have them."""

    name: str
    sort: Literal["training", "rollouts", "forward", "files"]
    steps: int = 0
    at_once: float = 0.0
    tokens: float = 0.0
    flops: dict[str, float] = {}
    responses: int = 0
    prompt: float = 0.0
    response: float = 0.0
    longest: float = 0.0
    n_bytes: float = 0.0

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


class Workload(Strict):
    """What a stage of this kind does with a network of the architecture `model`. `examples`: lines of the dataset it leaves, if one."""

    kind: str
    model: ModelConfig
    phases: tuple[Phase, ...]
    assumptions: tuple[str, ...] = ()
    examples: int | None = None

    @property
    def flops(self) -> float:
        return sum(phase.total_flops for phase in self.phases)

    @property
    def tokens(self) -> float:
        return sum(phase.tokens for phase in self.phases)

    def scaled(self, times: float) -> Workload:
        """The same with responses `times` as long, and their FLOPs in proportion."""
        phases = []
        for phase in self.phases:
            flops = {part: times * count for part, count in phase.flops.items()}
            lengths = {"response": times * phase.response, "longest": max(phase.longest, times * phase.response)}
            phases.append(phase.model_copy(update={"tokens": times * phase.tokens, "flops": flops, **lengths}))
        return self.model_copy(update={"phases": tuple(phases)})

    @property
    def steps(self) -> int:
        """Steps of its loop: the first phase's where phases take turns (rl), else those of all."""
        return self.phases[0].steps if self.kind == "rl" else sum(phase.steps for phase in self.phases)

    def memory(self, fleet: Fleet) -> float:
        """Bytes its busiest moment takes on the device of `fleet`: a policy in training and the engine beside it take turns, but neither leaves."""
        weighed, layout = sizes(self.model, fleet.precision), Layout(dp=1, tp=1, pp=1, ep=1, zero=0, recompute="none")
        training, sampling = ([phase for phase in self.phases if phase.sort == sort] for sort in ("training", "rollouts"))
        trained = [training_memory(weighed, layout, math.ceil(phase.at_once), 1).total for phase in training]
        sampled = [fleet.memory(min(phase.responses, ENGINE_BATCH), phase.prompt + phase.longest).total for phase in sampling]
        references = sum(parameters(self.model).total * fleet.precision.weight for phase in self.phases if "reference" in phase.flops)
        return max(trained, default=0.0) + max(sampled, default=0.0) + references

    @classmethod
    def of(cls, receipt: Receipt, model: ModelConfig, steps: int) -> Self:
        """The work of a stage that has run, from its receipt and the steps it logged."""
        parts = {part: flops for part, flops in receipt.flops_by_part.items() if flops}
        phases = []
        if sampling := parts.pop("sampling", 0.0):
            config = receipt.config
            responses = _responses(config)
            rounds = max(1, steps) if receipt.stage != "evaluate" else _evaluation_rounds(config, responses)
            response = receipt.tokens / (rounds * responses)
            phases.append(
                Phase(
                    name="rollouts", sort="rollouts", steps=rounds, tokens=receipt.tokens, flops={"sampling": sampling}, responses=responses,
                    response=response, longest=min(2 * response, config.get("max_tokens") or 2 * response),
                )
            )  # fmt: skip
        if parts:
            phases.append(Phase(name="training", sort="training", steps=steps, tokens=receipt.tokens, flops=parts))
        return cls(kind=receipt.stage, model=model, phases=tuple(phases))


def _responses(config: dict[str, object]) -> int:
    """Responses decoded in one round, by a stage's configuration."""
    numbers = {key: value for key, value in config.items() if isinstance(value, int)}
    if "group_size" in numbers:
        return numbers.get("prompts_per_step", 1) * numbers["group_size"]
    return min(numbers.get("chunk", 1), numbers.get("problems", 1)) * numbers.get("samples", 1)


def _evaluation_rounds(config: dict[str, object], responses: int) -> int:
    """An evaluation logs no steps: every task in every form, chunk by chunk."""
    several = [len(value) for key in ("tasks", "forms") if isinstance(value := config.get(key), list)]
    problems, samples = (value if isinstance(value := config.get(key), int) else 1 for key in ("problems", "samples"))
    rounds = -(-problems * samples // responses)
    for count in several:
        rounds *= max(1, count)
    return rounds


class Elsewhere(Strict):
    """What a workload would take on one device of the table."""

    device: str
    seconds: float
    memory_bytes: float
    fits: bool
    money: float | None
    joules: float | None
    launching: float  # seconds of it spent waiting for the next kernel
    assumptions: tuple[str, ...]


def elsewhere(workload: Workload, device: Device) -> Elsewhere:
    """Time, money and energy of `workload` on one `device`: training at the MFU plans assume, decoding at their share of the roofline.

    No step takes less time than issuing its kernels does. Work of the host is not in it.
    """
    dtype = "bfloat16" if "bfloat16" in device.peak else "float32"
    fleet = Fleet(workload.model, device, PRECISIONS[dtype], devices=1)
    rate = ASSUMED_MFU[dtype] * dtype_peak(device, dtype)
    seconds = launching = 0.0
    for phase in workload.phases:
        if phase.sort == "files":
            seconds += 2 * phase.n_bytes / device.bandwidth  # in and out of its memory
            continue
        issuing = forward_kernels(workload.model) * KERNEL_SECONDS
        if phase.sort == "rollouts":
            batch = min(max(1, phase.responses), ENGINE_BATCH)
            rounds = phase.steps * -(-phase.responses // batch)
            # A round lasts as long as its longest response: a full batch to the mean length, then what is left of it.
            parts = [(phase.response, batch, phase.response / 2), (phase.longest - phase.response, 1, phase.longest)]
            times = [(rounds * tokens, fleet.step_seconds(rows, phase.prompt + context)) for tokens, rows, context in parts]
        else:
            issuing *= TRAINING_KERNELS if phase.sort == "training" else 1
            times = [(phase.steps, phase.total_flops / rate / max(1, phase.steps))]
        seconds += sum(steps * max(each, issuing) for steps, each in times)
        launching += sum(steps * max(0.0, issuing - each) for steps, each in times)
    memory = workload.memory(fleet)
    return Elsewhere(
        device=device.name,
        seconds=seconds,
        memory_bytes=memory,
        fits=memory <= USABLE * device.memory_bytes,
        money=None if device.price is None else seconds / 3600 * device.price,
        joules=None if device.power_watts is None else seconds * device.power_watts,
        launching=launching,
        assumptions=(
            f"one {device.title} in {dtype}: an MFU of {show_share(ASSUMED_MFU[dtype])} in training, {show_share(DECODE_EFFICIENCY)} of the decoding "
            "roofline",
            f"no step takes less than its kernels do at {KERNEL_SECONDS * 1e6:g} us each; a small network waits for little else",
            "the host's work (documents, tokenizer, verification, files) left out",
            *([f"${device.price:g} an hour, the table's example"] if device.price is not None else []),
            *([f"{device.power_watts:g} W all the time"] if device.power_watts is not None else []),
        ),
    )


def forward_kernels(config: ModelConfig) -> float:
    """About how many kernels one forward pass issues."""
    experts = KERNELS_OF_EXPERTS + KERNELS_OF_EXPERT * config.n_routed_experts
    return sum(KERNELS + (experts if is_moe(config, layer) else 0) for layer in range(config.num_hidden_layers))
