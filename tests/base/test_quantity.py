"""base/quantity.py: what people write is read, what is printed reads back, and nonsense is refused in one line with
the nearest sense."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base import quantity
from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import count, seconds, share, size, whole


@pytest.mark.parametrize(
    ("text", "number"),
    [("14.8T", 14.8e12), ("7e12", 7e12), ("671B", 671e9), ("671 b", 671e9), ("2G", 2e9),
     ("1.5M", 1.5e6), ("32k", 32e3), ("87,072", 87072),
     ("1,234,567.5", 1234567.5), ("1_000", 1000), (".5K", 500), ("$2.0", 2), (3, 3)],
)  # fmt: skip
def test_counts(text: str | float, number: float) -> None:
    assert count(text) == pytest.approx(number, rel=1e-15)


def test_sizes_times_and_shares() -> None:
    assert [size(text) for text in ("80GiB", "5GB", "5gb", "3B", "7")] == [80 * 2**30, 5e9, 5e9, 3, 7]
    assert [seconds(text) for text in ("50ms", "2h", "3", "1.5 min", "1d")] == [0.05, 7200, 3, 90, 86400]
    assert [share(text) for text in ("0.4", "40%", "1", "0")] == [0.4, 0.4, 1, 0]
    assert whole("2K") == 2000 and isinstance(whole("2K"), int)


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        *((count, text, "not a number") for text in ("", "T", "nan", "1\n2", "14,8B", "1,4.8T", "1234,567")),
        *((count, text, "must be a number up to") for text in (math.nan, "1e400", "9" * 5000)),
        (count, "14.8X", "unknown unit 'X'; write 14.8T"), (count, "-3T", "did you mean 3T?"),
        (size, "80GiBB", "did you mean GiB?"), (size, "3 GBit", "did you mean GB?"),
        (seconds, "5 mins", "did you mean min?"), (share, "40", "0.4 is 40%"), (share, "-40%", "did you mean 40%?"),
        (share, "140%", "the nearest valid value is 100%"), (share, "4e9", "the nearest valid value is 100%"),
        (share, "1e-300", "the smallest share above 0 is 0.0001%"),
        (whole, "2.5", "the nearest is 2"), (whole, "0", "the nearest is 1"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line_with_the_way_out(read: object, text: object, says: str) -> None:
    with pytest.raises(SlingshotError, match="the thing") as caught:
        read(text, "the thing")  # type: ignore[operator]
    message = str(caught.value)
    assert says in message and len(message.splitlines()) == 1 and len(message) < 300


positive = st.floats(1e-9, 1e29, allow_nan=False, allow_infinity=False)


@given(positive)
def test_what_is_printed_reads_back(number: float) -> None:
    """To the three figures that are printed."""
    assert count(quantity.show_count(number)) == pytest.approx(number, rel=0.0051)
    assert count(quantity.show_money(number)) == pytest.approx(number, rel=0.0051)
    if number < 1e12:
        assert seconds(quantity.show_seconds(max(number, 1e-6))) == pytest.approx(max(number, 1e-6), rel=0.0051)
        assert size(quantity.show_size(1 + number)) == pytest.approx(1 + number, rel=0.0051)


@given(st.floats(0, 1e29), st.sampled_from(["", "K", "M", "B", "T"]))
def test_a_suffix_is_a_factor(number: float, suffix: str) -> None:
    factor = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[suffix]
    if number * factor <= 1e30:
        assert count(f"{number!r}{suffix}") == number * factor


@pytest.mark.parametrize(
    ("show", "values", "shown"),
    [
        (quantity.show_count, (14.8e12, 671.03e9, 999_600, 12, 0, 3.7e24), "14.8T|671B|1M|12|0|3.7e+24"),
        (quantity.show_size, (80 * 2**30, 70_272, 5), "80 GiB|68.6 KiB|5 B"),
        (quantity.show_seconds, (4.7e8, 0.05, 7200), "14.9 y|50 ms|2 h"), (quantity.show_share, (0.389,), "38.9%"),
        (quantity.show_money, (5_576_000, 2, 0.0318, None, 0.0), "$5,576,000|$2.00|$0.0318||$0"),
        (quantity.show_duration, (0.42, 75, 3725), "0.42 s|1 min 15 s|1 h 02 min"),
        (quantity.show_energy, (None, 1800, 7.2e6), "|0.5 Wh|2 kWh"),
        (quantity.show_flops, (0, 15, 91.9e9, 3.1e15, 3.3e24), "0 FLOP|15 FLOP|91.9 GFLOP|3.1 PFLOP|3.3 YFLOP"),
    ],
)  # fmt: skip
def test_prints(show: Callable[[float | None], str], values: tuple[float | None, ...], shown: str) -> None:
    assert "|".join(map(show, values)) == shown


def test_prints_of_two_arguments() -> None:
    assert quantity.show_count(671.0264e9, 5) == "671.03B" and quantity.show_money(1234.5, "") == "1,234"
    assert [quantity.plural(count, "step") for count in (0, 1, 2500)] == ["0 steps", "1 step", "2,500 steps"]
