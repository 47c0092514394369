"""What trajectories earn: R1's rewards besides accuracy (arXiv 2501.12948, 2.2.2 and 2.3.2), their sum, advantages.

format_reward(closed=True, answer="14", finished=True) == 1.0
language_consistency("3 plus 4は7", "en") == 0.5
assign_rewards(groups, RewardWeights(language=0.2), coin="0/17", max_tokens=128)
assign_advantages(groups, "group", parallel)
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
from pydantic import Field

from slingshot.base.config import Strict
from slingshot.rollout.trajectory import Trajectory
from slingshot.training.objectives import AdvantageStd, group_advantages
from slingshot.training.parallel import Parallel

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
    """What a response earns: each score in [0, 1] times its weight. `random` is the control: a coin instead.

    `calls` is what each call of a tool earns, below 0 what it costs: so a model learns when one is worth it.
    With `length` short right responses of a group earn more than long ones (`length_rewards`).
    With `overlong_buffer` the last tokens of the room are paid for, evenly up to 1 for all (arXiv 2503.14476, 3.4).
    """

    accuracy: float = 1.0
    format: float = 0.2
    language: float = 0.0
    length: float = Field(default=0.0, ge=0)
    calls: float = 0.0
    random: bool = False
    overlong_buffer: int = Field(default=0, ge=0)

    def reward(self, trajectory: Trajectory, max_tokens: int) -> float:
        """What was cut off earns nothing for its accuracy: a lenient reader takes what may not have been the answer."""
        scores = trajectory.scores
        accuracy = self.accuracy * scores["accuracy"] if trajectory.finished else 0.0
        earned = accuracy + self.format * scores["format"] + self.language * scores["language"]
        return earned + self.calls * scores.get("calls", 0.0) - self._overlong(trajectory, max_tokens)

    def _overlong(self, trajectory: Trajectory, max_tokens: int) -> float:
        """What the longest turn has to pay: 0 to 1 over the buffer, 1 for what was cut off."""
        if not self.overlong_buffer:
            return 0.0
        longest = max(turn.end - turn.start for turn in trajectory.turns)
        beyond = longest - (max_tokens - self.overlong_buffer)
        return 1.0 if trajectory.cut_off else min(1.0, max(0, beyond) / self.overlong_buffer)


def assign_rewards(groups: Sequence[Sequence[Trajectory]], weights: RewardWeights, coin: str, max_tokens: int) -> None:
    """Give every trajectory its reward; `max_tokens` is the room a response had. `coin` seeds the control's."""
    for group in groups:
        rng = random.Random(f"{coin}/{group[0].item.problem.key}")
        lengths = length_rewards(group) if weights.length else [0.0] * len(group)
        for each, short in zip(group, lengths, strict=True):
            earned = weights.reward(each, max_tokens) + weights.length * short
            each.reward = float(rng.random() < 0.5) if weights.random else earned


def length_rewards(group: Sequence[Trajectory]) -> list[float]:
    """What the lengths of a group's responses earn, in [-0.5, 0.5] (arXiv 2501.12599, 2.3.3).

    The shortest earns 0.5 and the longest -0.5, evenly between; where not right, 0 at most. 0 where all are as long.
    """
    lengths = [sum(each.mask) for each in group]
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(group)
    earned = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    right = [each.finished and each.scores["accuracy"] == 1.0 for each in group]
    return [each if its else min(0.0, each) for each, its in zip(earned, right, strict=True)]


def assign_advantages(groups: Sequence[Sequence[Trajectory]], std: AdvantageStd, parallel: Parallel) -> None:
    """Give every trajectory its advantage: its reward less its group's mean, over the std of its group or the batch.

    The batch is all ranks' groups together; its std is that of the differences (arXiv 2510.13786, 3.2).
    """
    squares = count = 0.0
    for group in groups:
        advantages = group_advantages(torch.tensor([each.reward for each in group]), std == "group").tolist()
        for trajectory, advantage in zip(group, advantages, strict=True):
            trajectory.advantage = advantage
            squares, count = squares + advantage**2, count + 1
    if std == "batch":
        total = parallel.sums({"squares": squares, "count": count})
        spread = math.sqrt(total["squares"] / max(1.0, total["count"]))
        for trajectory in (each for group in groups for each in group):
            trajectory.advantage = trajectory.advantage / spread if spread > 1e-6 else 0.0


def has_signal(group: Sequence[Trajectory]) -> bool:
    """Whether the rewards of a group's verified answers differ; where they do not, every advantage is zero."""
    return len({trajectory.reward for trajectory in group if trajectory.verified}) > 1
