"""How a training run is laid out over devices, and what that makes them send each other. No torch.

    layout = Layout.over(2048, config, pp=16, ep=64)     # the rest is data parallel: dp 128
    for transfer in transfers(sizes(config, PRECISIONS["fp8"]), layout, device, tokens=63e6, context=4096): transfer.seconds
    layouts(config, 2048, tp=8)                          # every layout of that tp that uses exactly all devices

Ways: tp splits every matrix but the experts' (Megatron-LM, arXiv 1909.08053, with sequence parallelism, 2205.05198), pp the blocks (1F1B), ep the
routed experts over the devices of a pipeline stage, dp the batch; ZeRO stage 1, 2, 3 shards optimizer, gradients, weights over dp (1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import Device
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import Recompute, Sizes

# Of a link's rate, what collectives were seen to reach: 160 of 200 GB/s NVLink, 40 of 50 GB/s InfiniBand (DeepSeek, arXiv 2505.09343, 4.3).
LINK_EFFICIENCY = 0.8

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


class Layout(Strict):
    """dp x tp x pp devices; ep divides dp x tp. `recompute`: which activations the backward pass computes again."""

    dp: int
    tp: int
    pp: int
    ep: int
    zero: Literal[0, 1, 2, 3]
    recompute: Recompute

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def expert_dp(self) -> int:
        """How many copies of each expert's weights there are."""
        return self.dp * self.tp // self.ep

    def __str__(self) -> str:
        ways = {"data": self.dp, "tensor": self.tp, "pipeline": self.pp, "expert": self.ep}
        parts = [f"{name} {ways[name]}" for name in ways if ways[name] > 1] or ["one device"]
        return ", ".join(parts + ([f"ZeRO-{self.zero}"] if self.zero else []) + [f"recompute {self.recompute}"])

    @classmethod
    def over(
        cls,
        count: int,
        config: ModelConfig,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        zero: int = 1,
        recompute: Recompute = "none",
    ) -> Layout:
        """The layout that uses all `count` devices. SlingshotError with the nearest way that divides where one does not."""
        _must_be_among(
            tp, _tensor_ways(config, count), "tp", f"{count} devices and {config.num_attention_heads} attention heads"
        )
        _must_be_among(
            pp,
            _pipeline_ways(config, count // tp),
            "pp",
            f"{count // tp} devices, with at most a stage for each of the blocks",
        )
        dp = count // tp // pp
        if ep > 1 and not config.n_moe_layers:
            raise SlingshotError(f"ep {ep}: this model has no experts; the nearest valid value is 1")
        _must_be_among(
            ep,
            _expert_ways(config, dp * tp),
            "ep",
            f"{dp * tp} devices a pipeline stage and {config.n_routed_experts} experts",
        )
        if zero not in (0, 1, 2, 3):
            raise SlingshotError(
                f"zero {zero}: ZeRO has stages 0 to 3; the nearest valid value is {min(max(zero, 0), 3)}"
            )
        if recompute not in RECOMPUTE:
            raise SlingshotError(f"recompute {recompute!r:.40}: there are {', '.join(RECOMPUTE)}")
        return cls.model_validate({"dp": dp, "tp": tp, "pp": pp, "ep": ep, "zero": zero, "recompute": recompute})


def layouts(config: ModelConfig, count: int, per_node: int = 8, **given: Any) -> Iterator[Layout]:
    """Every layout worth trying that has the `given` ways: but for those, tensor parallelism within a node and ZeRO from stage 1.

    SlingshotError as from Layout.over where no layout has them.
    """
    Layout.over(count, config, **given)

    def open_ways(name: str, ways: Sequence[Any]) -> list[Any]:
        return [way for way in ways if given.get(name, way) == way]

    for tp in open_ways("tp", _tensor_ways(config, count)):
        if tp > per_node and "tp" not in given:
            continue
        for pp in open_ways("pp", _pipeline_ways(config, count // tp)):
            dp = count // tp // pp
            zeros: tuple[Any, ...] = (given["zero"],) if "zero" in given else (1, 2, 3) if dp > 1 else (0,)
            for ep in open_ways("ep", _expert_ways(config, dp * tp)):
                for zero in zeros:
                    for recompute in open_ways("recompute", RECOMPUTE):
                        yield Layout(dp=dp, tp=tp, pp=pp, ep=ep, zero=zero, recompute=recompute)


def _tensor_ways(config: ModelConfig, count: int) -> list[int]:
    return _divisors(math.gcd(count, config.num_attention_heads))


def _pipeline_ways(config: ModelConfig, count: int) -> list[int]:
    return [ways for ways in _divisors(count) if ways <= config.num_hidden_layers]


def _expert_ways(config: ModelConfig, count: int) -> list[int]:
    return _divisors(math.gcd(count, config.n_routed_experts)) if config.n_moe_layers else [1]


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _must_be_among(value: int, valid: list[int], name: str, what: str) -> None:
    if value not in valid:
        nearest = min(valid, key=lambda way: (abs(way - value), way))
        raise SlingshotError(f"{name} {value} does not divide {what}; the nearest valid value is {nearest}")


@dataclass(frozen=True)
class Transfer:
    """Bytes one device sends in one optimizer step for one purpose, the link they take and the seconds they need on it."""

    purpose: str
    n_bytes: float
    link: Literal["node", "network"]
    seconds: float


def transfers(weighed: Sizes, layout: Layout, device: Device, tokens: float, context: int) -> list[Transfer]:
    """What the device that sends most sends in one optimizer step over `tokens` tokens in sequences of `context`.

    Rings: all-gather and reduce-scatter move (n - 1)/n of the whole, all-reduce twice that. Groups nest in the order tp, ep, dp, pp, so a
    group stays on the node's own links while its devices fit on one; where it does not, a ring leaves a node once, and as many rings as the
    group has members there share the work, each over another's network card (NCCL; nodes of 8 x 400 Gb/s reach 350 GB/s, nccl-tests issue 283).
    Experts: a token goes once to each node and there once to each device that has one of its experts (DeepSeek-V3, 3.2.2), in FP8 where weights
    are FP8, and comes back in 16 bits; the backward pass does the same again, and what it computes again once more.
    """
    found = []

    def send(purpose: str, n_bytes: float, link: Literal["node", "network"]) -> None:
        if n_bytes:
            rate = LINK_EFFICIENCY * (device.link if link == "node" else device.network)
            found.append(Transfer(purpose, n_bytes, link, n_bytes / rate if rate else math.inf))

    def ring(purpose: str, n_bytes: float, group: int, stride: int = 1) -> None:
        members = max(1, device.per_node // stride)  # of the group, on one node
        if group <= members:
            send(purpose, n_bytes, "node")
        else:
            send(f"{purpose}, between nodes", n_bytes / members, "network")
            send(f"{purpose}, within a node", n_bytes * (members - 1) / members, "node")

    config, precision = weighed.config, weighed.precision
    blocks = -(-weighed.blocks // layout.pp)
    moe_blocks = min(blocks, config.n_moe_layers)
    mine = tokens / layout.dp  # that pass through this device's stage, shared with its tp neighbours
    microbatches = max(1.0, mine / context)
    width = config.hidden_size
    passes = 3 if layout.recompute == "full" else 2
    if layout.tp > 1:
        # Two all-reduces a block and pass (as gather and scatter around each sequence-parallel half).
        ring(
            "tensor parallel",
            passes * 2 * blocks * 2 * (layout.tp - 1) / layout.tp * mine * width * precision.activation,
            layout.tp,
        )
    if layout.ep > 1:
        there_and_back = precision.low_activation + max(2.0, precision.activation)
        crossings = passes * moe_blocks * mine / layout.tp * width * there_and_back
        nodes = -(-layout.ep // device.per_node)
        local = min(layout.ep, device.per_node)
        send("experts, between nodes", crossings * (nodes - 1) / nodes * parts_met(config, nodes), "network")
        send("experts, within a node", crossings * (local - 1) / local * parts_met(config, layout.ep), "node")
    if layout.pp > 1:
        link: Literal["node", "network"] = "node" if layout.devices <= device.per_node else "network"
        send("pipeline", 2 * mine / layout.tp * width * precision.activation, link)
    expert, dense = weighed.stage_weights(layout)
    for purpose, count, ranks, stride in (
        ("gradients and weights", dense, layout.dp, layout.tp),
        ("gradients and weights of experts", expert, layout.expert_dp, layout.ep),
    ):
        if ranks > 1:
            part = (ranks - 1) / ranks * count
            reductions = microbatches if layout.zero >= 2 else 1.0
            gathers = 2 * microbatches if layout.zero == 3 else 1.0
            gathered = precision.weight if layout.zero else precision.gradient  # without ZeRO gradients are all-reduced
            ring(purpose, part * (precision.gradient * reductions + gathered * gathers), ranks, stride)
    return found


def network_seconds(sent: list[Transfer]) -> float:
    """Seconds the links are busy in a step: the node's own and the network's work at the same time (DeepSeek-V3, 3.2.2)."""
    return max(sum(transfer.seconds for transfer in sent if transfer.link == link) for link in ("node", "network"))


def parts_met(config: ModelConfig, parts: int) -> float:
    """On how many of `parts` equal parts of the experts (nodes, devices) a token finds at least one of its own, expected, if none is preferred.

    Groups are chosen for their best experts (V3's gate: the sum of the best two), so each chosen one has one of the token's; the others lie
    anywhere in the chosen ones, and never further apart than without groups. Within 1% of a simulation of that gate.
    """

    def met(groups: int, chosen: int) -> float:
        out_of_reach = math.comb(groups - max(1, groups // parts), chosen) / math.comb(groups, chosen)
        missed = 1 - min(1.0, groups / parts)
        for drawn in range(chosen, config.num_experts_per_tok):
            missed *= max(
                0.0, 1 - config.n_routed_experts / parts / (config.n_routed_experts * chosen / groups - drawn)
            )
        return parts * (1 - out_of_reach) * (1 - missed)

    return min(met(config.n_group, config.topk_group), met(1, 1))
