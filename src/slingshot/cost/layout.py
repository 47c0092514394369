"""How a training run is laid out over devices, and what that makes them send each other. No torch.

    layout = Layout.over(2048, config, pp=16, ep=64)     # the rest is data parallel: dp 128
    for transfer in transfers(sizes(config, PRECISIONS["fp8"]), layout, device, tokens=63e6, context=4096): transfer.seconds
    layouts(config, 2048)                                # every layout that uses exactly all devices

Ways: tp splits every matrix but the experts' (Megatron-LM, arXiv 1909.08053, with sequence parallelism, 2205.05198), pp the blocks (1F1B), ep the
routed experts over the devices of a pipeline stage, dp the batch; ZeRO stage 1, 2, 3 shards optimizer, gradients, weights over dp (1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slingshot.config import ModelConfig, Strict
from slingshot.cost.devices import Device
from slingshot.cost.memory import Recompute, Sizes
from slingshot.files import SlingshotError

# Of a link's rate, what collectives were seen to reach: 160 of 200 GB/s NVLink, 40 of 50 GB/s InfiniBand (DeepSeek, arXiv 2505.09343, 4.3).
LINK_EFFICIENCY = 0.8

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


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
    def over(cls, count: int, config: ModelConfig, tp: int = 1, pp: int = 1, ep: int = 1, zero: int = 1, recompute: Recompute = "none") -> Layout:
        """The layout that uses all `count` devices. SlingshotError with the nearest way that divides where one does not."""
        _must_be_among(tp, _tensor_ways(config, count), "tp", f"{count} devices and {config.num_attention_heads} attention heads")
        _must_be_among(pp, _pipeline_ways(config, count // tp), "pp", f"{count // tp} devices, with at most a stage for each of the blocks")
        dp = count // tp // pp
        if ep > 1 and not config.n_moe_layers:
            raise SlingshotError(f"ep {ep}: this model has no experts; the nearest valid value is 1")
        _must_be_among(ep, _expert_ways(config, dp * tp), "ep", f"{dp * tp} devices a pipeline stage and {config.n_routed_experts} experts")
        if zero not in (0, 1, 2, 3):
            raise SlingshotError(f"zero {zero}: ZeRO has stages 0 to 3; the nearest valid value is {min(max(zero, 0), 3)}")
        if recompute not in RECOMPUTE:
            raise SlingshotError(f"recompute {recompute!r:.40}: there are {', '.join(RECOMPUTE)}")
        return cls.model_validate({"dp": dp, "tp": tp, "pp": pp, "ep": ep, "zero": zero, "recompute": recompute})


def layouts(config: ModelConfig, count: int, per_node: int = 8) -> Iterator[Layout]:
    """Every layout worth trying: tensor parallelism within a node, ZeRO from stage 1."""
    for tp in _tensor_ways(config, count):
        if tp > per_node:
            continue
        for pp in _pipeline_ways(config, count // tp):
            for ep in _expert_ways(config, count // pp):
                for zero in (1, 2, 3) if count // tp // pp > 1 else (0,):
                    for recompute in RECOMPUTE:
                        yield Layout(dp=count // tp // pp, tp=tp, pp=pp, ep=ep, zero=zero, recompute=recompute)


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
    group stays on the node's own links while its devices fit on one. Experts: a token goes to each node that has one of its experts once and is
    passed on there (DeepSeek-V3, 3.2.2), in FP8 where weights are FP8, and comes back in 16 bits; the backward pass does the same again.
    """
    found = []

    def send(purpose: str, n_bytes: float, group: int, stride: int = 1) -> None:
        if n_bytes:
            inside = group * stride <= device.per_node
            rate = LINK_EFFICIENCY * (device.link if inside else device.network)
            found.append(Transfer(purpose, n_bytes, "node" if inside else "network", n_bytes / rate if rate else math.inf))

    config, precision = weighed.config, weighed.precision
    blocks = -(-weighed.blocks // layout.pp)
    moe_blocks = min(blocks, config.n_moe_layers)
    mine = tokens / layout.dp  # that pass through this device's stage, shared with its tp neighbours
    microbatches = max(1.0, mine / context)
    width = config.hidden_size
    if layout.tp > 1:
        # Two all-reduces a block and pass (as gather and scatter around each sequence-parallel half), forward and backward, again if recomputed.
        passes = 6 if layout.recompute == "full" else 4
        send("tensor parallel", passes * blocks * 2 * (layout.tp - 1) / layout.tp * mine * width * precision.activation, layout.tp)
    if layout.ep > 1:
        there_and_back = precision.low_activation + max(2.0, precision.activation)
        crossings = 2 * moe_blocks * mine / layout.tp * width * there_and_back
        nodes = -(-layout.ep // device.per_node)
        if nodes > 1:
            send("experts, between nodes", crossings * (nodes - 1) / nodes * _nodes_met(config, nodes), layout.ep)
        local = min(layout.ep, device.per_node)
        if local > 1:
            send("experts, within a node", crossings * config.num_experts_per_tok * (local - 1) / local, local)
    if layout.pp > 1:
        send("pipeline", 2 * mine / layout.tp * width * precision.activation, layout.pp, stride=layout.dp * layout.tp)
    expert, dense = weighed.stage_weights(layout)
    for purpose, count, ranks, stride in (
        ("gradients and weights", dense, layout.dp, layout.tp),
        ("gradients and weights of experts", expert, layout.expert_dp, layout.ep),
    ):
        if ranks > 1 and count:
            part = (ranks - 1) / ranks * count
            reductions = microbatches if layout.zero >= 2 else 1.0
            gathers = 2 * microbatches if layout.zero == 3 else 1.0
            send(purpose, part * (precision.gradient * reductions + precision.weight * gathers), ranks, stride)
    return found


def network_seconds(sent: list[Transfer]) -> float:
    """Seconds the links are busy in a step: the node's own and the network's work at the same time (DeepSeek-V3, 3.2.2)."""
    return max(sum(transfer.seconds for transfer in sent if transfer.link == link) for link in ("node", "network"))


def _nodes_met(config: ModelConfig, nodes: int) -> float:
    """How many of `nodes` hold at least one of a token's experts: at most topk_group where groups of experts sit on nodes of their own."""
    anywhere = nodes * (1 - (1 - 1 / nodes) ** config.num_experts_per_tok)
    return min(anywhere, float(config.topk_group)) if 1 < config.n_group <= nodes else anywhere
