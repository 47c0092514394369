"""How fast a copy of a model writes and reads: rooflines of decoding and prompts, rounds of rollouts. No torch.

    copy = ModelCopy(config, device("h800"), PRECISIONS["fp8"], devices=144)   # one copy of the model on 144 devices
    88 / max(copy.decode_step(batch=88, context=4989))    # tokens/s that 88 sequences on a device cannot exceed

A decoding step reads every weight it touches and every cached key once, computes, and exchanges activations; the
longest of the three bounds it, the others hidden behind. A mixture of experts is served data parallel in attention and
expert parallel in its experts (as DeepSeek serves), a dense model tensor parallel. The MTP module is left out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import show_size
from slingshot.cost.devices import Device, and_others, mixed_peak
from slingshot.cost.flops import cache_bytes_per_token, decode_parts, prefill_parts
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Layout
from slingshot.planning.memory import Blocks, Memory, Precision
from slingshot.planning.network import LINK_EFFICIENCY

# The share of the decode roofline an engine reaches. Calibrated on one system: DeepSeek's decoded 14.8K tokens/s on a
# node of 8 H800 at 20 to 22 tokens/s a user with 4,989 cached tokens each (open-infra-index, day 6); at 21 that is 88 a
# device.
DECODE_EFFICIENCY = 0.46
POINTS = 128  # at which a round's shrinking batch is looked at: within 0.1% of 20,000


class ResourceTimes(NamedTuple):
    """Seconds one piece of work would take if only this resource were scarce; the largest bounds it."""

    compute: float
    memory_traffic: float
    network: float

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Longest first."""
        named = ((name.replace("_", " "), seconds) for name, seconds in self._asdict().items())
        return sorted(named, key=lambda pair: -pair[1])

    def dominates(self, what: str) -> dict[str, str | float]:
        """What takes longest in `what`, and how many times the next it takes."""
        (dominant, longest), (_, second), _ = self.ranked
        seconds = {f"{name}_seconds": each for name, each in self._asdict().items()}
        return {"what": what} | seconds | {"dominant": dominant, "factor": longest / second if second else 1.0}


@dataclass(frozen=True)
class ModelCopy:
    """One copy of a model on `devices` devices."""

    config: ModelConfig
    device: Device
    precision: Precision
    devices: int = 1
    efficiency: float = DECODE_EFFICIENCY

    @property
    def cached_heads(self) -> int:
        """Of the cache, which tensor parallelism can part: keys' and values', or MLA's one latent."""
        return self.config.num_key_value_heads if self.config.family == "dense" else 1

    @property
    def tensor_ways(self) -> int:
        """Devices over which all but the experts is parted."""
        return 1 if self.config.n_moe_layers else self.devices

    @cached_property
    def held(self) -> tuple[float, float, float]:
        """Numbers on each device: experts', other matrices', the rest (embedding, head, router, norms)."""
        alone = self.config.model_copy(update={"num_nextn_predict_layers": 0})
        experts, matrices, rest = Blocks(alone, self.precision).on_device(Layout(), 0)
        return experts / self.devices, matrices / self.tensor_ways, rest / self.tensor_ways

    @cached_property
    def cache_per_token(self) -> float:
        """Bytes on a device for a token of its own; with fewer cached heads than devices, heads are held repeatedly."""
        return max(1.0, self.tensor_ways / self.cached_heads) * cache_bytes_per_token(self.config)

    def memory(self, batch: float, context: float) -> Memory:
        """Of one device with `batch` sequences of `context` tokens of its own."""
        experts, others, outside = self.held
        weights = (experts + others) * self.precision.weight + outside * self.precision.other
        return Memory(weights=weights, cache=batch * context * self.cache_per_token)

    def largest_batch(self, context: float) -> float:
        """Sequences a device has room for beside the weights; 0 or less when the weights alone are too much."""
        room = self.device.usable_bytes - self.memory(0, 0).total
        return room / (context * self.cache_per_token)

    def bytes_read(self, batch: float, context: float) -> float:
        """Bytes one device reads in a decoding step: the cache, and weights touched by any token.

        Of a layer's E experts n tokens touch E (1 - (1 - k/E)^n), expected, all being as likely.
        """
        config, (experts, others, outside) = self.config, self.held
        if config.n_moe_layers:
            experts *= 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** (batch * self.devices)
        if not config.tie_word_embeddings:  # of the embedding only the rows of the tokens are read
            outside -= config.vocab_size * config.hidden_size / self.tensor_ways
        weights = (experts + others) * self.precision.weight + outside * self.precision.other
        return weights + batch * context * self.cache_per_token

    def bytes_sent(self, tokens: float) -> float:
        """Bytes one device sends while it passes `tokens` tokens of its own through the model, at most.

        Experts: each token goes to num_experts_per_tok devices in the precision of the weights and comes back in 16
        bits (arXiv 2505.09343, 2.3.2). Tensor parallel: two all-reduces a block, over the tokens of all.
        """
        config, others = self.config, (self.devices - 1) / self.devices
        if config.n_moe_layers:
            blocks = config.n_moe_layers - config.num_nextn_predict_layers
            there_and_back = math.floor(self.precision.low_activation) + 2.0
            return tokens * blocks * config.num_experts_per_tok * others * config.hidden_size * there_and_back
        return tokens * self.devices * config.num_hidden_layers * 2 * 2 * others * config.hidden_size * 2.0

    def decode_step(self, batch: float, context: float) -> ResourceTimes:
        """Seconds of a step that decodes a token of each of `batch` sequences of `context` tokens a device."""
        token, key = self._token_and_key_seconds
        sent = self.bytes_sent(batch)
        return ResourceTimes(
            compute=batch * (token + context * key),
            memory_traffic=self.bytes_read(batch, context) / self.device.bandwidth,
            network=sent / (self._link * LINK_EFFICIENCY) if self._link else math.inf if sent else 0.0,
        )

    @cached_property
    def _token_and_key_seconds(self) -> tuple[float, float]:
        """Of compute at the peak: for a token decoded, and for each key it meets."""
        alone, attention = decode_parts(self.config, 0), {"attention": decode_parts(self.config, 1)["attention"]}
        dtype = self.precision.dtype
        token, key = (sum(parts.values()) / mixed_peak(self.device, dtype, parts) for parts in (alone, attention))
        return token, key

    @cached_property
    def _link(self) -> float:
        """Bytes/s at which a device sends, one way. An all-reduce over several nodes is a ring, as in network.py."""
        device = self.device
        if self.devices <= device.per_node:
            return device.link
        if self.config.n_moe_layers or device.per_node == 1:
            return device.network
        members = self.devices / math.ceil(self.devices / device.per_node)
        return min(device.link, members * device.network)

    def step_seconds(self, batch: float, context: float) -> float:
        """What such a step takes: the roofline's bound over the share engines reach."""
        return max(self.decode_step(batch, context)) / self.efficiency

    def best_batch(self, context: float, latency: float) -> int:
        """The largest batch with room whose step stays within `latency` seconds; 0 when there is none."""
        with_room = range(1, 1 + max(0, math.floor(self.largest_batch(context))))
        return bisect_right(with_room, latency, key=lambda batch: self.step_seconds(batch, context))

    def prefill_seconds(self, prompt: float, hit_share: float, mfu: float) -> float:
        """Seconds to compute a prompt, `hit_share` of it cached, at `mfu` of its products' peak: bound by compute."""
        parts = prefill_parts(self.config, prompt, prompt * hit_share)
        return sum(parts.values()) / (mfu * mixed_peak(self.device, self.precision.dtype, parts))

    def _splits(self, size: int) -> bool:
        """Whether it may be spread so: experts, or equal heads and whole heads of the cache or a share of one."""
        even = self.config.num_attention_heads % size == 0 and 0 in (self.cached_heads % size, size % self.cached_heads)
        return even or self.config.n_moe_layers > 0

    def spread(self, most: int) -> list[ModelCopy]:
        """Such copies over powers of two of at most so many devices, at least an expert or attention head each."""
        limit = min(most, self.config.n_routed_experts if self.config.n_moe_layers else self.config.num_attention_heads)
        sizes = (2**power for power in range(max(1, limit).bit_length()))
        return [replace(self, devices=size) for size in sizes if self._splits(size)]

    def over(self, given: int, most: int, divides: bool = False) -> ModelCopy:
        """Such a copy over `given` of `most` devices, a divisor where `divides`; SlingshotError with the nearest."""
        valid = [size for size in range(1, most + 1) if self._splits(size) and not (divides and most % size)]
        if given not in valid:
            rule = f"{'divide' if divides else 'be at most'} {most}"
            if not self.config.n_moe_layers:
                heads = f"{self.config.num_attention_heads} attention heads and {self.cached_heads} of keys and values"
                rule += f" and share {heads} evenly"
            nearest = min(valid, key=lambda size: abs(size - given))
            raise SlingshotError(f"{given} devices a copy: they must {rule}; the nearest valid value is {nearest}")
        return replace(self, devices=given)

    def smallest(self, context: float) -> ModelCopy | None:
        """On the fewest of these devices, else of the first others in the table, that hold a copy and one sequence."""
        others = and_others(self.device, self.precision.dtype)
        copies = (replace(self, device=other).spread(1024 if other.network else 1) for other in others)
        return next((copy for some in copies for copy in some if copy.largest_batch(context) >= 1), None)

    def roomy(self, count: int, given: int | None, context: float) -> list[ModelCopy]:
        """Such copies on at most `count` devices, or on `given`, that hold a sequence; SlingshotError if none does."""
        copies = self.spread(count) if given is None else [self.over(given, count, divides=True)]
        roomy = [copy for copy in copies if copy.largest_batch(context) >= 1]
        if not roomy:
            fit, last = self.smallest(context), copies[-1]
            place = f"the nearest that do are {fit.devices} x {fit.device.name}" if fit else "nothing in the table does"
            need, has = show_size(last.memory(1, context).total), show_size(self.device.usable_bytes)
            short = f"a copy of the model and a sequence ({need} each, {has} usable)"
            raise SlingshotError(f"{last.devices} x {self.device.name} do not hold {short}; {place}")
        return roomy


@dataclass(frozen=True)
class ResponseLengths:
    """Exponential, cut off at `longest`, with this mean."""

    mean: float
    longest: float

    @cached_property
    def rate(self) -> float:
        """Of the exponential, by bisection: cut off at L, its mean is (1 - exp(-rate L)) / rate."""
        low, high = 0.0, 1 / self.mean
        for _ in range(100):
            middle = (low + high) / 2
            too_long = middle == 0 or -math.expm1(-middle * self.longest) / middle > self.mean
            low, high = (middle, high) if too_long else (low, middle)
        return high

    @cached_property
    def square(self) -> float:
        """The mean of the squared length, the integral of 2 x exp(-rate x) up to `longest`."""
        until = self.rate * self.longest
        if until < 1e-4:  # nearly all at the cap, where the difference below would be lost in rounding
            return self.longest**2 * (1 - 2 * until / 3)
        return 2 * (-math.expm1(-until) - until * math.exp(-until)) / self.rate**2

    def share_longer(self, position: float) -> float:
        """The share of responses that go on after `position` tokens."""
        return math.exp(-self.rate * position) if position < self.longest else 0.0


def round_seconds(copy: ModelCopy, responses: float, copies: int, prompt: float, lengths: ResponseLengths) -> float:
    """Seconds until `copies` copies of the model have written all `responses`, started at once, in waves that fit.

    The batch shrinks as they end: a step at each position, counted by the chance that any is still being written.
    """
    room = copy.largest_batch(prompt + lengths.mean)
    if room <= 0 or not responses:
        return math.inf if responses else 0.0
    waves = math.ceil(max(1.0, responses / copies / copy.devices / room))
    of_wave = responses / waves
    # Where the cap is far off, the last response ends long before it: one round in exp(12), 160,000, goes on.
    end = min(lengths.longest, (math.log(max(of_wave, 1.0)) + 12) / lengths.rate)
    total, width = 0.0, end / POINTS
    for position in ((point + 0.5) * width for point in range(POINTS)):
        share = lengths.share_longer(position)
        any_left = -math.expm1(of_wave * math.log1p(-share)) if share < 1 else 1.0
        # A copy that still runs has at least one response; those of other copies do not share its steps.
        batch = max(of_wave * share / copies, 1.0) / copy.devices
        total += width * any_left * copy.step_seconds(batch, prompt + position)
    return waves * total
