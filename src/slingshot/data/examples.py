"""Examples to learn from: rows of JSONL datasets in the forms that people keep them in.

    {"prompt": "What is 3+4?", "reasoning": "3 plus 4 is 7", "answer": "7"}          # what `slingshot sample` writes
    {"prompt": "What is 3+4?", "answer": "7"}
    {"messages": [{"role": "user", "content": "What is 3+4?"}, {"role": "assistant", "content": "7"}]}
    {"messages": [..., {"role": "assistant", "tool_calls": [...]}, {"role": "tool", ...}, ...], "tools": [...]}

examples = read_examples(Path("runs/samples"))
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.files import jsonl_rows, read_text

_log = logging.getLogger(__name__)

_CUT = {"length", "error", "abort"}  # a row that `slingshot generate` wrote of an answer without its end

_FORMS = (
    'an example holds "prompt" and "answer", with or without "reasoning", as text; '
    'or "messages" with a role and content each, one of them the assistant\'s, calls as "tool_calls"'
)


@dataclass(frozen=True)
class Example:
    """What is asked, a text or a chat so far, and what is to be said; `reasoning` None where the row has none."""

    prompt: str | list[dict[str, Any]]
    reasoning: str | None
    answer: str


@dataclass(frozen=True)
class Conversation:
    """A chat in which every response is to be said, calls of its tools among them, and nothing of what tools said.

    ids, mask: the same as it was sampled, 1 where the model spoke, by the tokenizer of digest `tokenizer`; or empty.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    ids: list[int]
    mask: list[int]
    tokenizer: str


def read_examples(source: Path) -> list[Example | Conversation]:
    """The examples of a dataset folder or a .jsonl file; each assistant message of a chat is one, to all before it.

    A chat in which tools are called, or that was sampled in turns, is one as a whole.
    Answers that were cut off are left out, which is said. SlingshotError names file and line of what is no example.
    """
    file = source / "data.jsonl" if source.is_dir() else source
    examples, cut = list[Example | Conversation](), 0
    for where, row in jsonl_rows(file, read_text(file).split("\n")):
        if isinstance(row, dict) and row.get("finish_reason") in _CUT:
            cut += 1
            continue
        found = _of_row(row) if isinstance(row, dict) else []
        if not found:
            raise SlingshotError(f"{where}: {_FORMS}")
        examples += found
    if cut:
        _log.warning("%s: %d answers were cut off (finish_reason) and are left out", file, cut)
    return examples


def _of_row(row: dict[str, Any]) -> Sequence[Example | Conversation]:
    if "messages" not in row:
        prompt, reasoning, answer = (_text(row.get(name)) for name in ("prompt", "reasoning", "answer"))
        known = isinstance(prompt, str) and isinstance(answer, str) and isinstance(reasoning, str | None)
        return [Example(prompt, reasoning, answer)] if known else []
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and type(m.get("role")) is str for m in messages):
        return []
    if "ids" in row or any(message.get("tool_calls") for message in messages):
        return _whole(row, messages)
    examples = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not place:
            continue
        reasoning, answer = message.get("reasoning_content", message.get("reasoning")), _text(message.get("content"))
        if not isinstance(answer, str) or not isinstance(reasoning, str | None):
            return []
        examples.append(Example(messages[:place], reasoning, answer))
    return examples


def _whole(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[Conversation]:
    """A chat of several responses; [] where it cannot be said again."""
    tools, ids, mask = (row.get(name) or [] for name in ("tools", "ids", "mask"))
    said = [message for message in messages if message["role"] == "assistant"]
    calls = [call for message in said for call in message.get("tool_calls") or []]
    sound = said and messages[0] is not said[0] and all(map(_is_call, calls)) and isinstance(tools, list)
    sampled = isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)
    if not (sound and sampled and all(type(each) is int for each in (*ids, *mask))):
        return []
    plain = [message | {"content": _text(message.get("content")) or ""} for message in messages]
    return [Conversation(plain, tools, ids, mask, str(row.get("tokenizer", "")))]


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | dict)
    )


def _text(value: Any) -> Any:
    """Numbers as the text they are, but NaN, and the parts that an API's content may consist of as one text."""
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value) or None
    return value
