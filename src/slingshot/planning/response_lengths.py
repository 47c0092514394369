"""How long responses are, and how long a round of rollouts takes that waits for its longest. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from slingshot.planning.model_copy import ModelCopy

POINTS = 128  # at which a round's shrinking batch is looked at: within 0.1% of 20,000


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
    """Seconds until the last of `responses` responses is written by `copies` copies of the model, all started at once.

    The batch shrinks as responses end, and the longest keep the devices waiting: the sum of the steps' times over
    positions, each counted by the chance that any response is still being written. Where the caches of all do not fit,
    they are written in equal waves.
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
