"""Reasoning and answer: parted from what a model wrote, and written as it writes them.

    opened = ends_in_reasoning(prompt_ids, tokenizer)          # R1's template opens <think> in the prompt
    parsed = parse(ids, opened, tokenizer)                     # Parsed(reasoning, answer, closed)
    stream = ReasoningStream(tokenizer, opened)
    for id in ids: deltas = stream.push(id)                    # [("reasoning", text), ("answer", text)]
    deltas = stream.finish()
    encode_responses(tokenizer, [("3 plus 4 is 7", "7")], opened=True)      # the inverse of parse, the end included

Where the vocabulary has think tokens the tags are those ids, and the same characters spelt by other tokens are text;
elsewhere, and for plain strings, the tags are the characters.

`opened` says where the output begins: True within the reasoning, False before it. A tag counts where it can: `<think>`
before anything else was written, `</think>` while reasoning. Elsewhere it is text, as in an answer that speaks of tags;
so is a `</think>` that nothing opened, for what came before it may have been shown as the answer. With opened=None,
where the prompt is not known, it makes all before it reasoning, and nothing is told before a tag or the end comes.

Dropped is layout: white space before `<think>`, line breaks after it (or at the beginning, where the prompt opened it)
and on either side of the `</think>` that counts, and a `<think>` repeated right after the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from slingshot.base.errors import SlingshotError
from slingshot.text.chat_template import END_THINK, THINK
from slingshot.text.tokenizer import Tokenizer

_TAG = re.compile(f"{THINK}|{END_THINK}")

Kind = Literal["reasoning", "answer"]
Delta = tuple[Kind, str]


@dataclass(frozen=True)
class Parsed:
    """What a model wrote. reasoning is None where none was begun; closed says that `</think>` ended it."""

    reasoning: str | None
    answer: str
    closed: bool


def ends_in_reasoning(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether what follows this prompt is reasoning: its last think tag opens."""
    if tokenizer.think_id is None or tokenizer.end_think_id is None:
        return tokenizer.decode(prompt_ids[-16:]).rstrip().endswith(THINK)
    tags = (id for id in reversed(prompt_ids) if id in (tokenizer.think_id, tokenizer.end_think_id))
    return next(tags, None) == tokenizer.think_id


def before_reasoning(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """A prompt that `ends_in_reasoning` without its opened think tag, to be answered at once."""
    if tokenizer.think_id is None:
        raise SlingshotError("this model's template opens its reasoning in plain text; no answer can follow at once")
    return list(prompt_ids[: len(prompt_ids) - 1 - list(reversed(prompt_ids)).index(tokenizer.think_id)])


def parse(output: str | Iterable[int], opened: bool | None, tokenizer: Tokenizer | None = None) -> Parsed:
    """Part a whole output: ids (with their tokenizer), or text. opened: did the prompt end in <think>, if known."""
    stream = ReasoningStream(tokenizer, opened)
    pieces = [output] if isinstance(output, str) else output
    deltas = [delta for piece in pieces for delta in stream.push(piece)] + stream.finish()
    reasoning, answer = ("".join(text for kind, text in deltas if kind == wanted) for wanted in ("reasoning", "answer"))
    return Parsed(reasoning if stream.reasoned else None, answer, stream.closed)


def beginning(text: str, tag: str) -> int:
    """How much of the text's end may become the tag."""
    sizes = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)


class ReasoningStream:
    """Parts an output while it is written: `push` each id (or piece of text), `finish` once. Joined it is `parse`."""

    def __init__(self, tokenizer: Tokenizer | None, opened: bool | None) -> None:
        self.reasoned = bool(opened)
        self.closed = False
        self._unknown = opened is None
        self._kind: Kind | None = "reasoning" if opened else None  # None: not told yet
        self._fresh = self.reasoned  # nothing written yet since the tag
        # Text whose part what follows decides: line breaks within reasoning; white space, or all, before any tag.
        self._held: list[str] = []
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
        else:
            (self._write if self._tags else self._scan)(self._text.push(piece))
        return self._take()

    def finish(self) -> list[Delta]:
        """What was held back until the end was known."""
        (self._write if self._tags else self._scan)(self._flush())
        self._write(self._tail)
        self._tell(self._kind or "answer", "")
        return self._take()

    def _flush(self) -> str:
        return self._text.finish() if self._text is not None else ""

    def _scan(self, text: str) -> None:
        """Text whose characters may be tags: write what is none, keep the end back while it may become one."""
        text, start = self._tail + text, 0
        for found in _TAG.finditer(text):
            self._write(text[start : found.start()])
            self._tag(found[0])
            start = found.end()
        text = text[start:]
        kept = max(beginning(text, THINK), beginning(text, END_THINK))
        self._write(text[: len(text) - kept])
        self._tail = text[len(text) - kept :]

    def _tag(self, tag: str) -> None:
        if tag == THINK and self._kind is None and not any(map(str.strip, self._held)):
            self._kind, self._fresh, self._held, self.reasoned = "reasoning", True, [], True
        elif tag == THINK and self._kind == "reasoning" and self._fresh:
            pass  # the prompt opened it already
        elif tag == END_THINK and (self._kind == "reasoning" or (self._kind is None and self._unknown)):
            before = "" if self._kind else "".join(self._held).strip("\n")
            self._held, self.reasoned = [], True
            self._tell("reasoning", before)
            self._kind, self._fresh, self.closed = "answer", True, True
        else:
            self._write(tag)

    def _write(self, text: str) -> None:
        """Add text to the present part, less the line breaks that only set the tags apart."""
        if self._kind is None and text.strip() and not self._unknown:
            self._kind = "answer"
        if self._fresh:
            text = text.lstrip("\n")
        body = text if self._kind == "answer" else text.rstrip("\n") if self._kind else ""
        if body and self._kind:
            self._fresh = False
            self._tell(self._kind, body)
        if text[len(body) :]:
            self._held.append(text[len(body) :])

    def _tell(self, kind: Kind, text: str) -> None:
        if text := "".join([*self._held, text]):
            self._deltas.append((kind, text))
        self._held = []

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas


def encode_responses(tokenizer: Tokenizer, responses: Sequence[tuple[str, str]], opened: bool) -> list[list[int]]:
    """Ids of `reasoning\\n</think>\\n\\nanswer` and the end token; `opened`: the prompt already holds `<think>\\n`.

    Where the vocabulary has no think tokens (models not made for reasoning) the tags are written as ordinary text.
    """
    if tokenizer.end_think_id is None or tokenizer.think_id is None:
        start = "" if opened else "<think>\n"
        texts = [f"{start}{reasoning}\n</think>\n\n{answer}" for reasoning, answer in responses]
        return encode_answers(tokenizer, texts)
    start = "" if opened else "\n"
    reasonings = tokenizer.encode_batch([f"{start}{reasoning}\n" for reasoning, _ in responses], continues=True)
    answers = encode_answers(tokenizer, [f"\n\n{answer}" for _, answer in responses])
    start_ids = [] if opened else [tokenizer.think_id]
    pairs, end = zip(reasonings, answers, strict=True), tokenizer.end_think_id
    return [[*start_ids, *reasoning, end, *answer] for reasoning, answer in pairs]


def encode_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> list[list[int]]:
    """Ids of responses without reasoning, each with the end token."""
    if tokenizer.eos_id is None:
        raise SlingshotError("this tokenizer names no eos_token to end responses; add it to tokenizer_config.json")
    return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(list(answers), continues=True)]
