"""Rewards besides accuracy, as R1 has them (arXiv 2501.12948, 2.2.2 and 2.3.2): format, and consistency of the language reasoned in.

format_reward(closed=True, answer="14", finished=True) == 1.0
language_consistency("3 plus 4は7", "en") == 0.5
"""

from __future__ import annotations

import re

# Runs of one script count as a word each. A single Latin letter is notation (x, n), not language.
_WORDS = {"en": re.compile(r"[A-Za-zÀ-ÖØ-öø-ɏ]{2,}"), "ja": re.compile(r"[ぁ-ゖァ-ヺー々一-鿿]+")}


def format_reward(closed: bool, answer: str, finished: bool) -> float:
    """1.0 if the response ended by itself, closed its reasoning, and gave an answer without opening reasoning again; else 0.0."""
    return float(closed and finished and bool(answer.strip()) and "<think>" not in answer and "</think>" not in answer)


def language_consistency(text: str, language: str) -> float:
    """Share of the words of `text` that are written in the script of `language` ("en" or "ja"); 1.0 for a text without words."""
    if language not in _WORDS:
        raise ValueError(f"language {language!r} is not supported; {' and '.join(_WORDS)} are")
    counts = {name: len(words.findall(text)) for name, words in _WORDS.items()}
    total = sum(counts.values())
    return counts[language] / total if total else 1.0
