"""Quantities as people write and read them: 14.8T tokens, 7e12, 671B, 80GiB, 5GB, 50ms. No torch.

count("14.8T")            # 14.8e12; K, M, B or G, T, P, E are powers of 1000
size("80GiB")             # 85899345920.0; KB, MB, GB ... are powers of 1000, KiB, MiB, GiB ... of 1024
seconds("50ms")           # 0.05; us, ms, s, min, h, d, y

show_count(14.8e12)       # "14.8T";  show_flops(3.1e15) "3.1 PFLOP";  plural(1234, "step") "1,234 steps"
show_size(85899345920)    # "80 GiB"
show_duration(4000)       # "1 h 06 min", as a clock says; show_seconds(0.05) "50 ms", in one unit
show_money(5576000)       # "$5,576,000"; show_energy(1800) "0.5 Wh"; show_share(0.389) "38.9%"
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean

COUNTS = {"": 1e0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
BINARY_SIZES = {"B": 1.0} | {f"{prefix}iB": 1024.0**power for power, prefix in enumerate("KMGTPE", start=1)}
SIZES = {"": 1.0} | {f"{prefix}B": 1000.0**power for power, prefix in enumerate("KMGTPE", start=1)} | BINARY_SIZES
FLOPS = {f"{prefix}FLOP": 1000.0**power for power, prefix in enumerate(("", *"KMGTPEZY"))}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "y": 365 * 86400.0}

LARGEST = 1e30  # more tokens, bytes or FLOP/s than there will be; keeps products of a few quantities finite
SMALLEST_SHARE = 1e-6


def count(text: str | float, what: str = "a count") -> float:
    """Read a number with an optional suffix of COUNTS, in either case. `what` names it in the error."""
    return _read(text, what, COUNTS, "14.8T, 671B, 7e12 or 1500000")


def size(text: str | float, what: str = "a size") -> float:
    """Read bytes: a number with an optional suffix of SIZES, in either case."""
    return _read(text, what, SIZES, "80GiB, 5GB or 85899345920")


def seconds(text: str | float, what: str = "a time") -> float:
    """Read seconds: a number with an optional suffix of SECONDS; without one it counts seconds."""
    return _read(text, what, SECONDS | {"": 1.0}, "50ms, 1.5s or 2h")


def share(text: str | float, what: str = "a share") -> float:
    """Read a share between 0 and 1: 0.4 or 40%."""
    shown, percent = f"{text!s:.40}", str(text).strip().endswith("%")
    if shown.strip().startswith("-"):
        raise SlingshotError(f"{what} {shown!r}: must not be negative; did you mean {shown.strip().lstrip('-')}?")
    number = _read(str(text).strip().removesuffix("%"), what, {"": 1.0}, "0.4 or 40%") / (100 if percent else 1)
    if number > 1:
        nearest = "the nearest valid value is 100%" if percent or number > 100 else f"{number / 100:g} is {number:g}%"
        raise SlingshotError(f"{what} {shown!r}: a share lies between 0 and 1; {nearest}")
    if 0 < number < SMALLEST_SHARE:
        raise SlingshotError(f"{what} {shown!r}: the smallest share above 0 is {100 * SMALLEST_SHARE:g}%")
    return number


def whole(text: str | float, what: str = "a count") -> int:
    """Read a whole number of things, at least 1."""
    number = count(text, what)
    if number != int(number) or number < 1:
        nearest = max(1, round(number))
        raise SlingshotError(f"{what} {text!s:.40}: must be a whole number, at least 1; the nearest is {nearest}")
    return int(number)


# A comma stands between thousands or nowhere: "14,8B" is refused, for it would be read as ten times what was meant.
_NUMBER = re.compile(r"([+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)", re.ASCII)


def _read(text: str | float, what: str, suffixes: Mapping[str, float], examples: str) -> float:
    shown = f"{text!s:.40}"
    if isinstance(text, str):
        match = _NUMBER.fullmatch(text.strip().lstrip("$"))
        if match is None:
            raise SlingshotError(f"{what} {shown!r}: not a number; write {examples}")
        by_case = {suffix.lower(): factor for suffix, factor in suffixes.items()}
        suffix = match[2].lower()
        if suffix not in by_case:
            hint = did_you_mean(match[2], filter(None, suffixes), f"write {examples}", cutoff=0.4)
            raise SlingshotError(f"{what} {shown!r}: unknown unit {match[2]!r:.40}; {hint}")
        number = float(match[1].replace(",", "").replace("_", "")) * by_case[suffix]
    else:
        number = float(text)
    if not math.isfinite(number) or number > LARGEST:
        raise SlingshotError(f"{what} {shown!r}: must be a number up to {LARGEST:g}")
    if number < 0:
        raise SlingshotError(f"{what} {shown!r}: must not be negative; did you mean {shown.strip().lstrip('-')}?")
    return number


def show_count(number: float, digits: int = 3) -> str:
    """14800000000000 -> "14.8T"; beyond 1e18 in powers of ten, below 1000 as it is."""
    for suffix, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if float(f"{number:.{digits}g}") >= factor and number < 1e18:
            return f"{_plain(number / factor, digits)}{suffix}"
    return f"{number:.{digits}g}" if number >= 1e18 else _plain(number, digits)


def show_flops(flops: float) -> str:
    """3.1e15 -> "3.1 PFLOP"."""
    return _scaled(flops, FLOPS)


def show_size(n_bytes: float) -> str:
    """85899345920 -> "80 GiB"."""
    return _scaled(n_bytes, BINARY_SIZES)


def show_seconds(duration: float) -> str:
    """0.05 -> "50 ms"; 4680000 -> "54.2 d"; 4.7e8 -> "14.9 y"."""
    return _scaled(duration, SECONDS)


def show_duration(duration: float) -> str:
    """4000 -> "1 h 06 min"."""
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{_plain(duration, 2)} s"


def show_energy(joules: float | None) -> str:
    """1800 -> "0.5 Wh"; nothing where it is not known."""
    return "" if joules is None else _scaled(joules / 3600, {"Wh": 1e0, "kWh": 1e3, "MWh": 1e6, "GWh": 1e9})


def show_money(money: float | None, currency: str = "$") -> str:
    """5576000 -> "$5,576,000"; 0.0318 -> "$0.0318"; nothing where it is not known."""
    if money is None:
        return ""
    return currency + (f"{money:,.0f}" if money >= 1000 else f"{money:,.2f}" if money >= 1 else _plain(money, 3))


def show_share(part: float) -> str:
    """0.3894 -> "38.9%"."""
    return f"{100 * part:.1f}%"


def plural(count: int, noun: str) -> str:
    """1 -> "1 step"; 2500 -> "2,500 steps"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _scaled(number: float, units: Mapping[str, float]) -> str:
    """Three figures in the largest unit that leaves at least 1, else in the smallest; `units` ascend."""
    unit = max((unit for unit in units if number >= units[unit]), key=units.__getitem__, default=next(iter(units)))
    return f"{_plain(number / units[unit], 3)} {unit}"


def _plain(number: float, digits: int) -> str:
    """`digits` significant figures without an exponent, and no fewer than stand before the point."""
    if not number:
        return "0"
    text = f"{number:.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if abs(number) < 10_000 else f"{float(text):,.0f}"
