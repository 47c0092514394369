"""Reading a number in a text: strictly (the text is the number) or leniently (the last number in it).

    read_number("1,234.")           == "1234"
    read_number("It is 14")         is None
    last_number("7-2 is 5, so -14.0") == "-14"

Numbers come back in one canonical spelling, so that equal numbers are equal strings.
"""

from __future__ import annotations

import re

# A minus right after a digit or a closing bracket is an operator, not a sign.
_NUMBER = re.compile(r"(?:(?<![0-9)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_MINUS = str.maketrans({"\u2212": "-", "\uff0d": "-"})  # the typographic and the full-width minus
_MAX_LENGTH = 64  # characters; no task here has longer answers, and int() of thousands of digits is slow


def canonical(number: str) -> str:
    """One spelling per number: no separators, leading zeros, trailing decimal zeros or negative zero."""
    sign = "-" if number.startswith("-") else ""
    whole, _, decimals = number.lstrip("-").replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return value if value == "0" else sign + value


def read_number(text: str) -> str | None:
    """The number that `text` is, but for surrounding space and one full stop; None if it is anything else."""
    text = text.strip().translate(_MINUS)
    if text.endswith((".", "。")):
        text = text[:-1]
    return canonical(text) if len(text) <= _MAX_LENGTH and _NUMBER.fullmatch(text) else None


def last_number(text: str) -> str | None:
    """The last number in `text`; None if it has none."""
    found = None
    for match in _NUMBER.finditer(text.translate(_MINUS)):
        found = match.group()
    return canonical(found) if found is not None and len(found) <= _MAX_LENGTH else None
