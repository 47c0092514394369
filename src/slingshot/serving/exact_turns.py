"""Turns of a conversation with calls, kept as the ids that were sampled.

    turns.keep(question, message, prompt_ids + token_ids)
    ids = turns.prompt(question, rendered)     # None: nothing known of its history

A template writes a call anew from its JSON, and drops its reasoning: other tokens than the model wrote, so that nothing
of the conversation is found in the cache and the model reads what it did not say. Where the client sends a call back by
the id it was given, and has changed nothing before it, the prompt is what was sampled, and behind it what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slingshot.serving.question import Question
from slingshot.text.tool_formats import parsed_json

KEPT = 4_000_000  # ids in all; what was not asked for longest goes first


@dataclass(frozen=True)
class _Turn:
    said: bytes  # what was asked, the answer included
    ids: list[int]  # prompt and sample


class ExactTurns:
    """By the ids of calls. One for each model."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, _Turn] = OrderedDict()
        self._size = 0

    def keep(self, question: Question, message: Mapping[str, Any], ids: list[int]) -> None:
        """An answer with calls, as the `message` that tells of it. ids: the prompt and all that was sampled."""
        turn = _Turn(_digest(question, [*(question.messages or ()), message]), ids)
        self._turns[message["tool_calls"][0]["id"]] = turn
        self._size += len(turn.ids)
        while self._size > KEPT:
            _, dropped = self._turns.popitem(last=False)
            self._size -= len(dropped.ids)

    def prompt(self, question: Question, rendered: Callable[[int, bool], list[int]]) -> list[int] | None:
        """rendered(n, answering): the first n messages as the template writes them, with an answer to follow or not."""
        messages = list(question.messages or ())
        for place in range(len(messages) - 1, -1, -1):
            calls = messages[place].get("tool_calls") or [{}]
            turn = self._turns.get(str(calls[0].get("id"))) if isinstance(calls[0], Mapping) else None
            if turn is None:
                continue
            if turn.said != _digest(question, messages[: place + 1]):
                return None
            self._turns.move_to_end(str(calls[0]["id"]))
            until, whole = rendered(place + 1, False), rendered(len(messages), True)
            end = turn.ids[-1]
            if whole[: len(until)] != until or end not in until:
                return None
            behind = until[len(until) - until[::-1].index(end) :]
            return [*turn.ids, *behind, *whole[len(until) :]]
        return None


def _digest(question: Question, messages: Sequence[Mapping[str, Any]]) -> bytes:
    """A name for what was said: reasoning aside, which clients may drop."""
    plain = []
    for message in messages:
        functions = [(call.get("id"), call.get("function") or {}) for call in message.get("tool_calls") or ()]
        calls = [[id, function.get("name"), _plain(function.get("arguments"))] for id, function in functions]
        plain.append([message.get("role"), message.get("content") or "", calls, message.get("tool_call_id")])
    told = [plain, list(question.tools), question.thinking, question.effort]
    return hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _plain(arguments: Any) -> Any:
    return parsed_json(arguments, arguments) if isinstance(arguments, str) else arguments
