"""Reasoning and answer, parted from what a model wrote.

    opened = ends_in_reasoning(prompt_ids, tokenizer)          # R1's template opens <think> in the prompt
    parsed = parse(ids, opened, tokenizer)                     # Parsed(reasoning, answer, closed)
    stream = ReasoningStream(tokenizer, opened)
    for id in ids: deltas = stream.push(id)                    # [("reasoning", text), ("answer", text)]
    deltas = stream.finish()

Where the vocabulary has think tokens the tags are those ids, and the same characters spelt by other tokens are text; elsewhere, and for plain
strings, the tags are the characters. Line breaks around the tags are layout and belong to neither part; nothing else is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from slingshot.data.tokenizer import END_THINK, THINK, Tokenizer

Kind = Literal["reasoning", "answer"]
Delta = tuple[Kind, str]


@dataclass(frozen=True)
class Parsed:
    """What a model wrote, in two parts. reasoning is None where none was begun; closed says that `</think>` ended it."""

    reasoning: str | None
    answer: str
    closed: bool


def ends_in_reasoning(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether what follows this prompt is reasoning: its last think tag opens."""
    if tokenizer.think_id is None:
        return tokenizer.decode(prompt_ids[-16:]).rstrip().endswith(THINK)
    tags = (id for id in reversed(prompt_ids) if id in (tokenizer.think_id, tokenizer.end_think_id))
    return next(tags, None) == tokenizer.think_id


def parse(output: str | Iterable[int], opened: bool, tokenizer: Tokenizer | None = None) -> Parsed:
    """Part a whole output, ids (with their tokenizer) or text. opened: the prompt ended inside <think>."""
    stream = ReasoningStream(tokenizer, opened)
    deltas = [delta for piece in ([output] if isinstance(output, str) else output) for delta in stream.push(piece)] + stream.finish()
    reasoning, answer = ("".join(text for kind, text in deltas if kind == wanted) for wanted in ("reasoning", "answer"))
    return Parsed(reasoning if stream.reasoned else None, answer, stream.closed)


class ReasoningStream:
    """Parts an output while it is written: `push` each id (or piece of text), `finish` once. The deltas joined by kind are what `parse` gives.

    A think tag counts where it can: `<think>` before anything else was written, `</think>` while reasoning. Elsewhere a tag is text.
    """

    def __init__(self, tokenizer: Tokenizer | None, opened: bool) -> None:
        self.reasoned = opened
        self.closed = False
        self._kind: Kind | None = "reasoning" if opened else None  # None: nothing but white space so far
        self._fresh = opened  # nothing written yet since the tag
        self._held = ""  # white space (line breaks, within reasoning) whose part the next character decides
        self._deltas: list[Delta] = []
        self._text = tokenizer.stream() if tokenizer is not None else None
        self._tags: dict[int, str] = {}
        if tokenizer is not None and tokenizer.think_id is not None and tokenizer.end_think_id is not None:
            self._tags = {tokenizer.think_id: THINK, tokenizer.end_think_id: END_THINK}
        self._tail = ""  # the beginning of what may become a tag, when tags are characters

    def push(self, piece: int | str) -> list[Delta]:
        """Take the next id or piece of text; what it adds to each part, often nothing."""
        if isinstance(piece, str):
            self._scan(piece)
        elif piece in self._tags:
            self._write(self._flush())
            self._tag(self._tags[piece])
        elif self._text is None:
            raise ValueError("parsing ids needs their tokenizer")
        elif self._tags:
            self._write(self._text.push(piece))
        else:
            self._scan(self._text.push(piece))
        return self._take()

    def finish(self) -> list[Delta]:
        """What was held back until the end was known."""
        if self._tags:
            self._write(self._flush())
        else:
            self._scan(self._flush())
        self._write(self._tail)
        if self._held:
            self._deltas.append((self._kind or "answer", self._held))
        return self._take()

    def _flush(self) -> str:
        return self._text.finish() if self._text is not None else ""

    def _scan(self, text: str) -> None:
        """Text whose characters may be tags: write what is none, keep the end back while it may become one."""
        text = self._tail + text
        while found := [(at, tag) for tag in (THINK, END_THINK) if (at := text.find(tag)) >= 0]:
            at, tag = min(found)
            self._write(text[:at])
            self._tag(tag)
            text = text[at + len(tag) :]
        kept = next((size for size in range(len(END_THINK) - 1, 0, -1) if text.endswith((THINK[:size], END_THINK[:size]))), 0)
        self._write(text[: len(text) - kept])
        self._tail = text[len(text) - kept :]

    def _tag(self, tag: str) -> None:
        if tag == THINK and self._kind is None:
            self._kind, self._fresh, self._held, self.reasoned = "reasoning", True, "", True
        elif tag == THINK and self._kind == "reasoning" and self._fresh:
            self._held = ""  # the prompt opened it already
        elif tag == END_THINK and self._kind == "reasoning":
            self._kind, self._fresh, self._held, self.closed = "answer", True, "", True
        else:
            self._write(tag)

    def _write(self, text: str) -> None:
        """Add text to the present part, less the line breaks that only set the tags apart."""
        text, self._held = self._held + text, ""
        if self._kind is None and text.strip():
            self._kind = "answer"
        if self._fresh:
            text = text.lstrip("\n")
        if self._kind != "answer":
            body = text.rstrip("\n") if self._kind else ""
            text, self._held = body, text[len(body) :]
        if text and self._kind:
            self._fresh = False
            self._deltas.append((self._kind, text))

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas
