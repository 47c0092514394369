"""What trajectories earn: R1's rewards besides accuracy (arXiv 2501.12948, 2.2.2 and 2.3.2), their sum, advantages.

format_reward(closed=True, answer="14", finished=True) == 1.0
language_consistency("3 plus 4は7", "en") == 0.5
assign_rewards(groups, RewardWeights(language=0.2), normalize_std=True, coin="0/17")
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch

from slingshot.base.config import Strict
from slingshot.rollout.trajectory import Trajectory
from slingshot.training.objectives import group_advantages

# The scripts a language is written in, as Unicode names its letters.
_SCRIPTS = {"en": {"LATIN"}, "ja": {"HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC"}}
# Letters of no script of their own: modifiers, and accents that stand alone.
_UNWRITTEN = {"MODIFIER", "COMBINING", "VARIATION"}
# In these a single letter is notation (x, n, π), not language.
_NOTATION = {"en", "GREEK"}
# A text with more Chinese characters than this and no kana among them is Chinese.
_KANJI_ALONE = 8


def format_reward(closed: bool, answer: str, finished: bool) -> float:
    """1.0 if the response ended by itself, closed its reasoning, and answered without reasoning again; else 0.0."""
    return float(closed and finished and bool(answer.strip()) and "<think>" not in answer and "</think>" not in answer)


def language_consistency(text: str, language: str) -> float:
    """Share of the words of `text` written in the script of `language` ("en" or "ja"); 1.0 for a text without words.

    A word is a run of letters of one script, whatever the script is.
    """
    if language not in _SCRIPTS:
        raise ValueError(f"language {language!r} is not supported; {' and '.join(_SCRIPTS)} are")
    letters = [_language_of(character) for character in unicodedata.normalize("NFKC", text)]
    runs = ((written, len(list(run))) for written, run in groupby(letters) if written)
    words = Counter(written for written, length in runs if length > 1 or written not in _NOTATION)
    kana = any("\u3041" <= each <= "\u30ff" or "\uff66" <= each <= "\uff9f" for each in text)
    if language == "ja" and letters.count("ja") > _KANJI_ALONE and not kana:
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


class RewardWeights(Strict):
    """What a response earns: each score in [0, 1] times its weight. `random` is the control: a coin instead."""

    accuracy: float = 1.0
    format: float = 0.2
    language: float = 0.0
    random: bool = False

    def reward(self, trajectory: Trajectory) -> float:
        """What was cut off earns nothing for its accuracy: a lenient reader takes what may not have been the answer."""
        scores = trajectory.scores
        accuracy = self.accuracy * scores["accuracy"] if trajectory.finished else 0.0
        return accuracy + self.format * scores["format"] + self.language * scores["language"]


def assign_rewards(
    groups: Sequence[Sequence[Trajectory]], weights: RewardWeights, normalize_std: bool, coin: str
) -> None:
    """Give every trajectory its reward, and its advantage within its group. `coin` seeds the control's."""
    for group in groups:
        rng = random.Random(f"{coin}/{group[0].item.problem.key}")
        for trajectory in group:
            trajectory.reward = float(rng.random() < 0.5) if weights.random else weights.reward(trajectory)
        advantages = group_advantages(torch.tensor([trajectory.reward for trajectory in group]), normalize_std)
        for trajectory, advantage in zip(group, advantages.tolist(), strict=True):
            trajectory.advantage = advantage


def has_signal(group: Sequence[Trajectory]) -> bool:
    """Whether a group's rewards differ; where they do not, every advantage is zero."""
    return len({trajectory.reward for trajectory in group}) > 1
