"""What tokens cost: a price list per model in TOML, dollars per million tokens, and what serving them costs its owner.

    [models."*"]                              # every model that has no entry of its own
    cache_hit = 0.014
    cache_miss = 0.14
    output = 0.28
    off_peak = { start = "16:30", end = "00:30", factor = 0.5 }     # UTC

    [serving]
    device_hour = 0.35                        # dollars an hour of this machine: `slingshot usage` shows the margin

Amounts are whole picodollars (10^-12 dollar): a token costs thousands of them, and sums are exact.
"""

from __future__ import annotations

import logging
import tomllib
from datetime import UTC, datetime, time
from pathlib import Path

from pydantic import Field, field_validator

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_text

PICO = 10**12
MOST = 10_000  # dollars per million tokens: a request of 100 million of them still counts in 64 bits


def dollars(amount: int) -> str:
    """Picodollars as people read them."""
    sign, size = "-" if amount < 0 else "", abs(amount)
    return f"{sign}${size / PICO:,.6f}" if 0 < size < PICO // 100 else f"{sign}${size / PICO:,.2f}"


class OffPeak(Strict):
    """The hours (UTC) in which prices are multiplied by `factor`; they may go over midnight."""

    start: time
    end: time
    factor: float = Field(ge=0, le=1)

    @field_validator("start", "end")
    @classmethod
    def _in_utc(cls, value: time) -> time:
        if value.tzinfo is not None:
            raise ValueError("hours are UTC's: leave the zone out")
        return value

    def covers(self, now: time) -> bool:
        inside = self.start <= now < self.end
        return inside if self.start <= self.end else now >= self.start or now < self.end


class ModelPrice(Strict):
    """Dollars per million tokens: of a prompt that was cached, of one that was not, of an answer."""

    cache_hit: float = Field(default=0.0, ge=0, le=MOST)
    cache_miss: float = Field(default=0.0, ge=0, le=MOST)
    output: float = Field(default=0.0, ge=0, le=MOST)
    off_peak: OffPeak | None = None

    def at(self, now: datetime) -> dict[str, float]:
        """Dollars per million tokens at this time."""
        cheap = self.off_peak if self.off_peak and self.off_peak.covers(now.astimezone(UTC).time()) else None
        factor = cheap.factor if cheap else 1.0
        return {name: getattr(self, name) * factor for name in ("cache_hit", "cache_miss", "output")}

    def cost(self, prompt: int, cached: int, completion: int, at: datetime) -> int:
        """Picodollars of a request that began at this time."""
        hit, miss, output = (round(price * 1e6) for price in self.at(at).values())  # picodollars a token
        return cached * hit + (prompt - cached) * miss + completion * output


class ServingCost(Strict):
    device_hour: float = Field(default=0.0, ge=0)


class PriceList(Strict):
    """Prices by a model's name, "*" those of all others; without an entry a model is free."""

    models: dict[str, ModelPrice] = {}
    serving: ServingCost = ServingCost()

    @classmethod
    def load(cls, path: Path) -> PriceList:
        try:
            return cls.parse(tomllib.loads(read_text(path)), str(path))
        except tomllib.TOMLDecodeError as error:
            raise SlingshotError(f"{path}: {error}") from error

    def of(self, model: str) -> ModelPrice:
        return self.models.get(model) or self.models.get("*") or ModelPrice()


class PriceFile:
    """A price list's file, watched for changes."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, self._stamp(path)

    def changed(self) -> PriceList | None:
        """The list, if the file was written to since; None for a file that is broken, which is said once."""
        stamp = self._stamp(self._path)
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            return PriceList.load(self._path)
        except SlingshotError as error:
            logging.getLogger(__name__).warning("%s; the prices before go on", error)
            return None

    @staticmethod
    def _stamp(path: Path) -> tuple[int, int]:
        try:
            found = path.stat()
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_size
