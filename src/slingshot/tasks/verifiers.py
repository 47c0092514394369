"""Verifiers by name: how an answer is read in a text, and whether it is right.

    verifier = VERIFIERS["number"]
    verifier.read("The answer is 1,234.")           # None: strictly, a text is the answer and nothing else
    verifier.extract("so \\boxed{1,234} km")        # "1,234", the last thing that looks like an answer
    verifier.score("1,234", "1234", {})             # 1.0

Reading is quick whatever the text; scores are asked for in a worker (`Scorer`), for patterns and algebra can hang.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

from pydantic import Field

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.tasks.arithmetic import read_number
from slingshot.tasks.code_verifier import CodeJudge, CodeOptions, code_block
from slingshot.tasks.model_judge import JudgeOptions, judged_score

MAX_ANSWER = 100_000  # characters; longer ones are wrong without asking
_MAX_QUANTITY = 100  # characters of a number with its unit
# The typographic minus, and ASCII's signs in the full width that Japanese text gives them.
_PLAIN = str.maketrans({"\u2212": "-"} | {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)})
_NUMERAL = r"-?[0-9][0-9,]*(?:\.[0-9]+)?"
# Words that are no units, and what power of 10 they are.
_TIMES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_QUANTITY = re.compile(
    rf"(?P<sign>[-+])?[$€£¥]?\s?(?:(?P<whole>[0-9]+) (?=[0-9]+/))?(?P<top>{_NUMERAL}|-?\.[0-9]+)"
    rf"(?:\s?/\s?(?P<bottom>{_NUMERAL}))?(?:[eE](?P<power>[+-]?[0-9]{{1,3}}))?"
    rf"(?:\s?(?P<times>{'|'.join(_TIMES)})s?\b)?"
    r"\s?(?P<unit>(?!pi\b|π)(?:[%°]|[^\W\d_])[^\d\n,;]{0,30}(?:(?<!\s)\^?[23])?)?"
)
_FOUND = re.compile(
    rf"(?<![A-Za-z0-9_^.])(?:-?[$€£¥])?(?:[0-9]{{1,9}} (?=[0-9]+/))?(?:{_NUMERAL}|\.[0-9]+)"
    rf"(?:/[0-9]+)?(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?(?:\s?\\?%|\s?(?:{'|'.join(_TIMES)})s?\b)?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]{0,40})\}")
_LETTER = re.compile(r"[(\[]?([A-Ja-j])[)\]]?[.:。]?")
# Where a response names its choice, the surest place first; of each the last. "a number" and "i think" name none.
_NAMED = (
    re.compile(r"(?i)(?:answer|choice|option)(?:\s+is)?\s*:?\s*\**\s*[(\[]?((?-i:[A-J])|[b-hj]|[ai](?!\s\w))\b"),
    re.compile(r"[(\[]([A-J])[)\]]"),
    re.compile(r"\b([A-J])[.)]?\**\s*$"),
)


class NumberOptions(Strict):
    tolerance: float = Field(0.0, ge=0, description="relative error that is still right")


class TextOptions(Strict):
    case: bool = Field(False, description="whether capital letters differ from small ones")


@dataclass(frozen=True)
class Verifier:
    """`read` is strict, `extract` lenient; both None where no answer is found. `score` of answer, gold and options.

    Scores are in [0, 1]; `score` is None where `Scorer` needs more for one. `check` tells whether a gold answer can be
    compared with at all.
    """

    meaning: str
    read: Callable[[str], str | None]
    extract: Callable[[str], str | None]
    score: Callable[[str, str, dict[str, Any]], float] | None = None
    check: Callable[[str], bool] = bool
    options: type[Strict] = Strict


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} of `text`, braces matched; None where there is none that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin:place].strip()
    return None


def whole(text: str) -> str | None:
    """`text` itself; of a text that is one \\boxed{} or one formula between dollars, what stands in there."""
    text = text.strip()
    if len(text) > 4 and text.startswith("$$") and text.endswith("$$"):
        text = text[2:-2].strip()
    elif len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2:
        text = text[1:-1].strip()
    if text.startswith("\\boxed{") and (inside := boxed(text)) is not None and text.endswith("}"):
        text = inside if text == f"\\boxed{{{inside}}}" or text.count("\\boxed{") == 1 else text
    return text or None


def last(text: str) -> str | None:
    """The last \\boxed{}, else the last line."""
    return boxed(text) or whole(text.strip().rpartition("\n")[2])


def quantity(text: str) -> tuple[Fraction, str] | None:
    """A number and its unit ("" for none): 1,234.5 km, $3, 50%, 3/4, 1 3/4, 2e5, \\frac{3}{4}. None for others."""
    if len(text) > _MAX_QUANTITY:
        return None
    text = _in_line(text.translate(_PLAIN))
    text = _WRAPPED.sub(r" \1", text.replace("\\!", "").replace("\\,", "").replace("\\ ", " ").replace("{,}", ","))
    text = re.sub(r"\^\{?\\circ\}?", "°", text)
    text = re.sub(r"\s+", " ", text.replace("\\", "")).strip().removesuffix(".").removesuffix("。")
    if not (match := _QUANTITY.fullmatch(text)) or (match["unit"] or "")[:1].isnumeric():  # 1½, 5²
        return None
    parts = [read_number(re.sub(r"^(-?)\.", r"\g<1>0.", match[name] or "1")) for name in ("top", "bottom")]
    if parts[0] is None or parts[1] is None or Fraction(parts[1]) == 0:
        return None
    value = (int(match["whole"] or 0) + Fraction(parts[0]) / Fraction(parts[1])) * (-1 if match["sign"] == "-" else 1)
    power = int(match["power"] or 0) + _TIMES.get(match["times"], 0)
    return value * Fraction(10) ** power, _unit(match["unit"] or "")


def _in_line(text: str) -> str:
    """With LaTeX's fractions as 3/4; one behind a whole number apart from it."""
    return _FRACTION.sub(r"\1/\2", re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text))


def _unit(said: str) -> str:
    folded = "".join(said.casefold().split()).rstrip(".")
    return folded.removesuffix("s") if len(folded) > 2 else folded


def _read_quantity(text: str) -> str | None:
    answer = whole(text) if len(text) <= 2 * _MAX_QUANTITY else None
    return answer if answer and quantity(answer) else None


def _find_quantity(text: str) -> str | None:
    if (inside := boxed(text)) and quantity(inside):
        return inside
    *_, found = "", *_FOUND.findall(_in_line(text.translate(_PLAIN)))
    found = found.rstrip(",").strip()
    return found if quantity(found) else None


def score_number(answer: str, gold: str, options: dict[str, Any]) -> float:
    """Right where the values agree, to `tolerance`, and no other unit is named; 50% is 50 and 0.5."""
    said, known = quantity(answer), quantity(gold)
    if said is None or known is None:
        return 0.0
    (value, unit), (right, expected) = said, known
    values = [value] + [value / 100] * (unit == "%" and not expected)
    if unit and expected and unit != expected:
        return 0.0
    room = Fraction(options.get("tolerance", 0)) * abs(right)
    return float(any(abs(each - right) <= room for each in values))


@lru_cache(1024)
def _formula(text: str) -> Any:
    """What math-verify makes of a formula. It is boxed, so that nothing is searched for within other words."""
    from math_verify import LatexExtractionConfig, parse

    whole_only = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    # Its own time limit is an alarm, which only works on a main thread: here the worker is ended instead.
    return parse(f"\\boxed{{{text}}}", whole_only, fallback_mode="no_fallback", parsing_timeout=None)


def score_math(answer: str, gold: str, options: dict[str, Any]) -> float:
    """Right where math-verify takes both for the same: 1/2, 0.5 and \\frac12 are."""
    from math_verify import verify

    if answer.strip() == gold.strip():
        return 1.0
    if not _closed(answer):  # of what follows a brace too many nothing would be read
        return 0.0
    return float(verify(_formula(gold), _formula(answer), timeout_seconds=None))


def _closed(text: str) -> bool:
    """Whether every brace that opens is closed, and none besides; \\{ is a sign."""
    braces = re.sub(r"\\.|[^{}]", "", text, flags=re.DOTALL)
    depths = list(accumulate((1 if sign == "{" else -1 for sign in braces), initial=0))
    return min(depths) == depths[-1] == 0


def _read_letter(text: str) -> str | None:
    match = _LETTER.fullmatch((whole(text) or "").translate(_PLAIN).strip("* "))
    return match[1].upper() if match else None


def _find_letter(text: str) -> str | None:
    if (inside := boxed(text)) and (letter := _read_letter(_WRAPPED.sub(r"\1", inside))):
        return letter
    if letter := _read_letter(text.strip().rpartition("\n")[2]):
        return letter
    for pattern in _NAMED:
        if found := pattern.findall(text):
            return found[-1].upper()
    return None


def _normal(text: str, case: bool = False) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    text = text.strip(" .。!?\"'`*") or text  # an answer of punctuation alone is that
    return text if case else text.casefold()


def score_exact(answer: str, gold: str, options: dict[str, Any]) -> float:
    """Right where both are the same text but for spaces, outer punctuation and, unless `case`, capital letters."""
    return float(_normal(answer, options.get("case", False)) == _normal(gold, options.get("case", False)))


def score_regex(answer: str, gold: str, options: dict[str, Any]) -> float:
    """Right where the whole answer matches the pattern that the gold answer is."""
    return float(re.fullmatch(gold, answer, 0 if options.get("case") else re.IGNORECASE) is not None)


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern) and pattern)
    except (re.error, RecursionError, OverflowError):
        return False


def _text(text: str) -> str | None:
    return text.strip() or None


VERIFIERS = {
    "number": Verifier(
        "a number: separators, fractions, percent, units; options: tolerance", _read_quantity, _find_quantity,
        score_number, lambda gold: quantity(gold) is not None, NumberOptions,
    ),
    "math": Verifier("a formula, compared by math-verify (pip install math-verify)", whole, last, score_math),
    "choice": Verifier(
        "a letter from A to J", _read_letter, _find_letter, lambda answer, gold, _: float(answer == _read_letter(gold)),
        lambda gold: _read_letter(gold) is not None,
    ),
    "exact": Verifier(
        "a text, but for spaces and outer punctuation; options: case", whole, last, score_exact, options=TextOptions
    ),
    "regex": Verifier(
        "a text that the answer column's pattern matches as a whole; options: case", _text, last, score_regex,
        _compiles, TextOptions,
    ),
    "code": Verifier(
        "Python that hidden tests judge, the last block of it; options: entry_point, preamble, partial, memory_mb",
        code_block, code_block, options=CodeOptions,
    ),
    "judge": Verifier(
        "free text, scored by a model behind an OpenAI-compatible URL; options: url, model, rubric", _text, _text,
        check=lambda gold: True, options=JudgeOptions,
    ),
}  # fmt: skip


class Scorer:
    """The worker's side: a verifier with its options."""

    def __init__(self, verifier: str, options: dict[str, Any]) -> None:
        self._verifier, self._options = verifier, options
        self._judge = CodeJudge(options) if verifier == "code" else None
        if verifier == "judge":
            import httpx  # noqa: F401  # as with math: the first answer need not wait for it
        if verifier == "math":
            try:
                import math_verify  # noqa: F401  # seconds of work, before an answer waits for it
            except ImportError as error:
                raise SlingshotError("the verifier math needs math-verify: pip install math-verify") from error

    def score(self, question: str, answer: str, gold: Any) -> float:
        """`gold` is the right answer; of a program its hidden tests."""
        if self._judge is not None:
            return self._judge.score(gold, answer)
        if self._verifier == "judge":
            return judged_score(question, answer, gold, self._options)
        score = VERIFIERS[self._verifier].score
        assert score is not None
        return score(answer, gold, self._options)
