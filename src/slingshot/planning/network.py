"""What devices that train together send each other. No torch.

for sent in transfers(Blocks(config, PRECISIONS["fp8"]), layout, device, tokens=63e6, context=4096): sent.seconds
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from slingshot.cost.devices import Device
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Layout
from slingshot.planning.memory import Blocks

# Of a link's rate, what collectives were seen to reach: 160 of 200 GB/s NVLink, 40 of 50 GB/s InfiniBand (DeepSeek,
# arXiv 2505.09343, 4.3).
LINK_EFFICIENCY = 0.8

Link = Literal["node", "network"]


@dataclass(frozen=True)
class Transfer:
    """Bytes one device sends in one optimizer step, the link they take and the seconds they need on it."""

    purpose: str
    n_bytes: float
    link: Link
    seconds: float


def transfers(blocks: Blocks, layout: Layout, device: Device, tokens: float, context: int) -> list[Transfer]:
    """What the device that sends most sends in one optimizer step over `tokens` tokens in sequences of `context`.

    Groups nest in the order tp, ep, dp, pp; one that fits on a node stays on its links. Else a ring leaves a node once,
    and as many rings as the group has members there share the work, each over another's network card (NCCL). Experts: a
    token goes once to each node and there once to each device that has one of its experts (DeepSeek-V3, 3.2.2).
    """
    found = []

    def send(purpose: str, n_bytes: float, link: Link) -> None:
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

    config, precision, width = blocks.config, blocks.precision, blocks.config.hidden_size
    in_stage = -(-(config.num_hidden_layers + config.num_nextn_predict_layers) // layout.pp)
    mine = tokens / layout.dp  # that pass through this device's stage, shared with its tp neighbours
    microbatches = max(1.0, mine / context)
    passes = 3 if layout.recompute == "full" else 2
    if layout.tp > 1:
        # Two all-reduces a block and pass (as gather and scatter around each sequence-parallel half).
        of_a_token = passes * 2 * in_stage * 2 * width * precision.activation
        ring("tensor parallel", of_a_token * mine * (layout.tp - 1) / layout.tp, layout.tp)
    if layout.ep > 1:
        there_and_back = precision.low_activation + max(2.0, precision.activation)
        crossings = passes * min(in_stage, config.n_moe_layers) * mine / layout.tp * width * there_and_back
        nodes, local = -(-layout.ep // device.per_node), min(layout.ep, device.per_node)
        send("experts, between nodes", crossings * (nodes - 1) / nodes * parts_met(config, nodes), "network")
        send("experts, within a node", crossings * (local - 1) / local * parts_met(config, layout.ep), "node")
    if layout.pp > 1:
        link: Link = "node" if layout.devices <= device.per_node else "network"
        send("pipeline", 2 * mine / layout.tp * width * precision.activation, link)
    expert, dense = blocks.stage_weights(layout)
    trained_expert, trained_dense = blocks.trained(layout, expert, dense)
    for purpose, count, trained, ranks, stride in (
        ("gradients and weights", dense, trained_dense, layout.dp, layout.tp),
        ("gradients and weights of experts", expert, trained_expert, layout.expert_dp, layout.ep),
    ):
        reductions = microbatches if layout.zero >= 2 else 1.0
        gathers = 2 * microbatches if layout.zero == 3 else 1.0
        gathered = precision.weight if layout.zero else precision.gradient  # without ZeRO gradients are all-reduced
        shared = count if layout.zero == 3 else trained
        n_bytes = trained * precision.gradient * reductions + shared * gathered * gathers
        ring(purpose, (ranks - 1) / ranks * n_bytes, ranks, stride)
    return found


def network_seconds(sent: list[Transfer]) -> float:
    """Seconds the links are busy in a step: the node's and the network's work at the same time (DeepSeek-V3, 3.2.2)."""
    return max(sum(transfer.seconds for transfer in sent if transfer.link == link) for link in ("node", "network"))


def parts_met(config: ModelConfig, parts: int) -> float:
    """On how many of `parts` equal parts of the experts a token finds one of its own, expected.

    Groups are chosen for their best experts (V3's gate), so each chosen one has one of the token's; the others lie
    anywhere in those. Within 1% of a simulation.
    """

    def met(groups: int, chosen: int) -> float:
        out_of_reach = math.comb(groups - max(1, groups // parts), chosen) / math.comb(groups, chosen)
        missed = 1 - min(1.0, groups / parts)
        for drawn in range(chosen, config.num_experts_per_tok):
            left = config.n_routed_experts * chosen / groups - drawn
            missed *= max(0.0, 1 - config.n_routed_experts / parts / left)
        return parts * (1 - out_of_reach) * (1 - missed)

    return min(met(config.n_group, config.topk_group), met(1, 1))
