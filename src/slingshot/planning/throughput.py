"""How fast a device can serve: rooflines of decoding and of reading prompts, and the time a round of rollouts takes. No torch.

    fleet = Fleet(config, device("h800"), PRECISIONS["fp8"], devices=144)      # one copy of the model on 144 devices
    step = fleet.decode_step(batch=88, context=4989)                           # 88 sequences a device
    88 / step.bound                                                            # tokens/s a device cannot exceed
    fleet.step_seconds(88, 4989)                                               # what a step takes, at the share of the bound engines reach

A decoding step reads every weight it touches and every cached key once, computes, and exchanges activations; the longest of the three bounds
it, the others hidden behind. A mixture of experts is served data parallel in attention and expert parallel in its experts, a dense model
tensor parallel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from slingshot.cost.devices import Device, mixed_peak
from slingshot.cost.flops import cache_bytes_per_token, decode_parts, prefill_parts
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import Memory, Precision, serving_weights
from slingshot.planning.sharding import LINK_EFFICIENCY

# The share of the decode roofline an engine reaches. Calibrated on one system: DeepSeek's decoded 14.8K tokens/s on a node of 8 H800 at 20 to 22
# tokens/s a user with 4,989 cached tokens each (open-infra-index, day 6); at 21 tokens/s that is 88 sequences a device.
DECODE_EFFICIENCY = 0.46

Resource = Literal["compute", "memory traffic", "network"]


@dataclass(frozen=True)
class Times:
    """Seconds one piece of work would take if only this resource were scarce."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def ranked(self) -> list[tuple[Resource, float]]:
        """Longest first."""
        named: list[tuple[Resource, float]] = [
            ("compute", self.compute),
            ("memory traffic", self.memory),
            ("network", self.network),
        ]
        return sorted(named, key=lambda pair: -pair[1])


def experts_touched(config: ModelConfig, tokens: float) -> float:
    """How many of a layer's routed experts at least one of `tokens` tokens chose, expected, if every expert is as likely as the next.

    E (1 - (1 - k/E)^tokens). Real routing is uneven, so fewer are touched; a group limit leaves each expert's chance as it is.
    """
    if not config.n_moe_layers:
        return 0.0
    miss = 1 - config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - miss**tokens)


def cached_heads(config: ModelConfig) -> int:
    """Heads of the cache, which tensor parallelism can part: keys' and values', or MLA's one latent."""
    return config.num_key_value_heads if config.family == "dense" else 1


@dataclass(frozen=True)
class Fleet:
    """One copy of a model on `devices` devices."""

    config: ModelConfig
    device: Device
    precision: Precision
    devices: int
    efficiency: float = DECODE_EFFICIENCY

    @functools.cached_property
    def held(self) -> tuple[float, float, float]:
        """Numbers on each device: experts', other matrices', the rest."""
        return serving_weights(self.config, self.devices)

    @functools.cached_property
    def cache_per_token(self) -> float:
        """Bytes of cache on a device for each token of its own sequences. Tensor parallel over more devices than key-value heads holds each
        head more than once; MLA's latent is one head."""
        copies = 1.0 if self.config.n_moe_layers else max(1.0, self.devices / cached_heads(self.config))
        return copies * cache_bytes_per_token(self.config)

    def memory(self, batch: float, context: float) -> Memory:
        """Of one device with `batch` sequences of `context` tokens of its own; the MTP module is left out."""
        experts, others, outside = self.held
        weights = (experts + others) * self.precision.weight + outside * self.precision.other
        return Memory.of(weights=weights, cache=batch * context * self.cache_per_token)

    def largest_batch(self, context: float, usable_bytes: float) -> float:
        """Sequences a device has room for beside the weights; 0 or less when the weights alone are too much."""
        return (usable_bytes - self.memory(0, 0).total) / (context * self.cache_per_token)

    def bytes_read(self, batch: float, context: float) -> float:
        """Bytes one device reads from its memory in a decoding step: weights touched by any token, and the cache."""
        experts, others, outside = self.held
        if self.config.n_moe_layers:
            experts *= experts_touched(self.config, batch * self.devices) / self.config.n_routed_experts
        # Of the embedding only the rows of the tokens are read.
        outside -= 0 if self.config.tie_word_embeddings else self._embedding_share()
        weights = (experts + others) * self.precision.weight + outside * self.precision.other
        return weights + batch * context * self.cache_per_token

    def _embedding_share(self) -> float:
        return self.config.vocab_size * self.config.hidden_size / (1 if self.config.n_moe_layers else self.devices)

    def bytes_sent(self, tokens: float) -> float:
        """Bytes one device sends while it passes `tokens` tokens of its own through the model, at most.

        Experts: each token goes to num_experts_per_tok devices in the precision of the weights (1 byte in FP8) and comes back in 16 bits,
        nothing sent once for several (arXiv 2505.09343, 2.3.2, counts the same and the shared expert besides). Tensor parallel: two
        all-reduces a block, over the tokens of all.
        """
        config, others = self.config, self.devices - 1
        if not others:
            return 0.0
        if config.n_moe_layers:
            blocks = config.n_moe_layers - config.num_nextn_predict_layers
            copies = config.num_experts_per_tok * others / self.devices
            return tokens * blocks * copies * config.hidden_size * (math.floor(self.precision.low_activation) + 2.0)
        return (
            tokens * self.devices * config.num_hidden_layers * 2 * 2 * others / self.devices * config.hidden_size * 2.0
        )

    def decode_step(self, batch: float, context: float) -> Times:
        """Seconds of a step in which every device decodes one token of each of `batch` sequences that hold `context` tokens."""
        token, key = self._token_and_key_seconds
        sent = self.bytes_sent(batch)
        return Times(
            compute=batch * (token + context * key),
            memory=self.bytes_read(batch, context) / self.device.bandwidth,
            network=sent / (self._link * LINK_EFFICIENCY) if self._link else math.inf if sent else 0.0,
        )

    @functools.cached_property
    def _token_and_key_seconds(self) -> tuple[float, float]:
        """Of compute at the peak: for a token decoded, and for each key it meets."""
        alone, attention = decode_parts(self.config, 0), {"attention": decode_parts(self.config, 1)["attention"]}
        token, key = (
            sum(parts.values()) / mixed_peak(self.device, self.precision.dtype, parts) for parts in (alone, attention)
        )
        return token, key

    @functools.cached_property
    def _link(self) -> float:
        """Bytes/s at which a device sends, one way.

        An all-reduce over several nodes is a ring, whose bytes cross a node's border once, through the network links of all its members: nodes of
        8 links of 50 GB/s reach 350 GB/s (NCCL; github.com/NVIDIA/nccl-tests, issue 283). Experts' tokens take their own device's link.
        """
        device = self.device
        if self.devices <= device.per_node:
            return device.link
        if self.config.n_moe_layers or device.per_node == 1:
            return device.network
        members = self.devices / math.ceil(self.devices / device.per_node)
        return min(device.link, members * device.network)

    def step_seconds(self, batch: float, context: float) -> float:
        """What such a step takes: the roofline's bound over the share engines reach."""
        return self.decode_step(batch, context).bound / self.efficiency

    def best_batch(self, context: float, usable_bytes: float, latency: float | None = None) -> int:
        """The largest batch a device has room for whose step stays within `latency` seconds; throughput grows with it. 0 when there is none."""
        low, high = 0, max(0, math.floor(self.largest_batch(context, usable_bytes)))
        if latency is None or (high and self.step_seconds(high, context) <= latency):
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.step_seconds(middle, context) <= latency else (low, middle - 1)
        return low

    def prefill_seconds(self, prompt: float, hit_share: float, mfu: float) -> float:
        """Seconds in which one device computes a prompt of `prompt` tokens, the first `hit_share` of them cached, at `mfu` of its products' peak.

        Bound by compute: the tokens of a prompt share every weight they read.
        """
        parts = prefill_parts(self.config, prompt, prompt * hit_share)
        return sum(parts.values()) / (mfu * mixed_peak(self.device, self.precision.dtype, parts))


@dataclass(frozen=True)
class Lengths:
    """How long responses are: exponential, cut off at `longest`, with this mean."""

    mean: float
    longest: float

    @functools.cached_property
    def rate(self) -> float:
        """Of the exponential, by bisection: cut off at L, its mean is (1 - exp(-rate L)) / rate."""
        low, high = 0.0, 1 / self.mean
        for _ in range(100):
            middle = (low + high) / 2
            too_long = middle == 0 or -math.expm1(-middle * self.longest) / middle > self.mean
            low, high = (middle, high) if too_long else (low, middle)
        return high

    @functools.cached_property
    def square(self) -> float:
        """The mean of the squared length, the integral of 2 x exp(-rate x) up to `longest`."""
        until = self.rate * self.longest
        if until < 1e-4:  # nearly all at the cap, where the difference below would be lost in rounding
            return self.longest**2 * (1 - 2 * until / 3)
        return 2 * (-math.expm1(-until) - until * math.exp(-until)) / self.rate**2

    def share_longer(self, position: float) -> float:
        """The share of responses that go on after `position` tokens."""
        return math.exp(-self.rate * position) if position < self.longest else 0.0


POINTS = 128  # at which a round's shrinking batch is looked at: within 0.1% of 20,000


def round_seconds(
    fleet: Fleet, responses: int, copies: int, prompt: float, lengths: Lengths, usable_bytes: float
) -> float:
    """Seconds until the last of `responses` responses is written by `copies` copies of the fleet, all started at once.

    The batch shrinks as responses end, and the longest keep the devices waiting: the sum of the steps' times over positions, each counted by
    the chance that any response is still being written. Where the caches of all do not fit, they are written in equal waves.
    """
    room = fleet.largest_batch(prompt + lengths.mean, usable_bytes)
    if room <= 0:
        return math.inf
    waves = math.ceil(max(1.0, responses / copies / fleet.devices / room))
    of_wave = responses / waves
    # Where the cap is far off, the last response ends long before it: one round in exp(12), 160,000, goes on.
    end = min(lengths.longest, (math.log(max(of_wave, 1.0)) + 12) / lengths.rate)
    total, width = 0.0, end / POINTS
    for point in range(POINTS):
        position = (point + 0.5) * width
        share = lengths.share_longer(position)
        any_left = -math.expm1(of_wave * math.log1p(-share)) if share < 1 else 1.0
        # A copy that still runs has at least one response; those of other copies do not share its steps.
        total += (
            width * any_left * fleet.step_seconds(max(of_wave * share / copies, 1.0) / fleet.devices, prompt + position)
        )
    return waves * total
