"""Rewards besides accuracy, as R1 has them (arXiv 2501.12948, 2.2.2 and 2.3.2): format, and consistency of the language reasoned in.

format_reward(closed=True, answer="14", finished=True) == 1.0
language_consistency("3 plus 4は7", "en") == 0.5
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import groupby

# The scripts a language is written in, as Unicode names its letters.
_SCRIPTS = {"en": {"LATIN"}, "ja": {"HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC"}}
# Letters of no script of their own: modifiers, and accents that stand alone.
_UNWRITTEN = {"MODIFIER", "COMBINING", "VARIATION"}
# In these a single letter is notation (x, n, π), not language.
_NOTATION = {"en", "GREEK"}
# A text with more Chinese characters than this and no kana among them is Chinese.
_KANJI_ALONE = 8


def format_reward(closed: bool, answer: str, finished: bool) -> float:
    """1.0 if the response ended by itself, closed its reasoning, and answered without opening reasoning again; else 0.0."""
    return float(closed and finished and bool(answer.strip()) and "<think>" not in answer and "</think>" not in answer)


def language_consistency(text: str, language: str) -> float:
    """Share of the words of `text` written in the script of `language` ("en" or "ja"); 1.0 for a text without words.

    A word is a run of letters of one script, whatever the script is.
    """
    if language not in _SCRIPTS:
        raise ValueError(f"language {language!r} is not supported; {' and '.join(_SCRIPTS)} are")
    letters = [_language_of(character) for character in unicodedata.normalize("NFKC", text)]
    words = Counter(
        written for written, run in groupby(letters) if written and (len(list(run)) > 1 or written not in _NOTATION)
    )
    if language == "ja" and letters.count("ja") > _KANJI_ALONE and not any(map(_is_kana, text)):
        return 0.0
    total = sum(words.values())
    return words[language] / total if total else 1.0


@lru_cache(1 << 16)
def _language_of(character: str) -> str:
    """The language whose script this letter is of, or the script's name; nothing for what is no letter."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    script = unicodedata.name(character, "").replace("-", " ").partition(" ")[0]
    known = (language for language, scripts in _SCRIPTS.items() if script in scripts)
    return "" if script in _UNWRITTEN else next(known, script)


def _is_kana(character: str) -> bool:
    return "\u3041" <= character <= "\u30ff" or "\uff66" <= character <= "\uff9f"
