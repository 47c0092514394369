"""Logits changed before a token is drawn: penalties, biases and what must not be said, for the rows that ask for it.

    rules = LogitRules(params, prompt, vocabulary)       # of one sample; None of it for a sample that asks for nothing
    rules.push(token_id)
    change(logits_RV, [(row, rules), ...])               # all rows at once, in place

Suffixes: R rows, V vocabulary, C changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slingshot.engine.sampling import SamplingParams
from slingshot.engine.vocabulary import Vocabulary


class TokenCounts:
    """The different ids of a prompt and its sample, and how often each was sampled."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids = np.unique(np.array(prompt, dtype=np.int64))
        self.counts = np.zeros(len(self.ids), dtype=np.float32)
        self.size = len(self.ids)
        self._places = {id: place for place, id in enumerate(self.ids.tolist())}

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self.size)
        if place == self.size:
            if self.size == len(self.ids):
                self.ids, self.counts = np.resize(self.ids, 2 * self.size), np.resize(self.counts, 2 * self.size)
            self.ids[place], self.counts[place] = token_id, 0
            self.size += 1
        self.counts[place] += 1


class BadWord:
    """A string that must not appear: which tokens would complete it after what was said so far."""

    def __init__(self, word: str, vocabulary: Vocabulary) -> None:
        self._word, self._vocabulary, self._tail = word.encode(), vocabulary, b""
        self.whole = vocabulary.holding(self._word)

    def push(self, token_id: int) -> None:
        self._tail = (self._tail + self._vocabulary.spelt[token_id])[-len(self._word) :]

    def completing(self) -> list[int]:
        """Tokens that begin with the rest of it, for every beginning of it that the text ends with."""
        word, tail = self._word, self._tail
        rests = (word[size:] for size in range(1, len(word)) if tail.endswith(word[:size]))
        return [id for rest in rests for id in self._vocabulary.starting_with(rest)]


class LogitRules:
    """What changes the logits of one sample. said: how many of the prompt's last ids it said itself, before."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocabulary: Vocabulary, said: int = 0) -> None:
        self.repetition, self.presence = params.repetition_penalty, params.presence_penalty
        self.frequency = params.frequency_penalty
        penalised = self.repetition != 1 or self.presence or self.frequency
        self.counts = TokenCounts(prompt) if penalised else None
        self._words = [BadWord(word, vocabulary) for word in params.bad_words if isinstance(word, str)]
        sequences = [word for word in params.bad_words if isinstance(word, tuple)]
        banned = {id for word in self._words for id in word.whole} | {word[0] for word in sequences if len(word) == 1}
        self._sequences = [list(word) for word in sequences if len(word) > 1]
        self._said: list[int] = []
        self.ids = np.array([id for id, _ in params.logit_bias] + sorted(banned), dtype=np.int64)
        biases = [bias for _, bias in params.logit_bias] + [-np.inf] * len(banned)
        self.biases = np.array(biases, dtype=np.float32)
        for token_id in prompt[len(prompt) - said :]:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        if self.counts is not None:
            self.counts.add(token_id)
        for word in self._words:
            word.push(token_id)
        if self._sequences:
            self._said.append(token_id)

    def banned(self) -> list[int]:
        """What the text so far forbids."""
        ids = [id for word in self._words for id in word.completing()]
        return ids + [word[-1] for word in self._sequences if self._said[1 - len(word) :] == word[:-1]]


def change(logits_RV: Tensor, rows: Sequence[tuple[int, LogitRules]]) -> None:
    """Apply the rules to their rows: penalties, then biases, then what is forbidden."""
    counted = [(row, rules, rules.counts) for row, rules in rows if rules.counts is not None]
    if counted:
        sizes = [counts.size for _, _, counts in counted]

        def spread(values: list[float]) -> Tensor:
            return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(logits_RV.device)

        rows_C = spread([row for row, _, _ in counted]).long()
        ids_C = torch.from_numpy(np.concatenate([counts.ids[: counts.size] for _, _, counts in counted]))
        counts_C = torch.from_numpy(np.concatenate([counts.counts[: counts.size] for _, _, counts in counted]))
        ids_C, counts_C = ids_C.to(logits_RV.device), counts_C.to(logits_RV.device)
        repetition_C = spread([rules.repetition for _, rules, _ in counted])
        x_C = logits_RV[rows_C, ids_C]
        x_C = torch.where(x_C > 0, x_C / repetition_C, x_C * repetition_C)
        x_C -= counts_C * spread([rules.frequency for _, rules, _ in counted])
        x_C -= (counts_C > 0) * spread([rules.presence for _, rules, _ in counted])
        logits_RV[rows_C, ids_C] = x_C
    if biased := [(row, rules.ids, rules.biases) for row, rules in rows if len(rules.ids)]:
        owners = np.repeat([row for row, _, _ in biased], [len(ids) for _, ids, _ in biased])
        parts = owners, np.concatenate([ids for _, ids, _ in biased]), np.concatenate([its for _, _, its in biased])
        at, ids_C, biases_C = (torch.from_numpy(part).to(logits_RV.device) for part in parts)
        logits_RV.index_put_((at, ids_C), biases_C, accumulate=True)
    forbid(logits_RV, [(row, rules.banned()) for row, rules in rows])


def forbid(logits_RV: Tensor, banned: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Take these ids out of their rows."""
    rows = [row for row, ids in banned for _ in ids]
    if rows:
        ids_C = torch.tensor([id for _, ids in banned for id in ids], device=logits_RV.device)
        logits_RV[torch.tensor(rows, device=logits_RV.device), ids_C] = -torch.inf
