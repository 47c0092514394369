"""From token deltas to what a client reads: pieces of reasoning, of the answer and of tool calls, never two in one.

    answer = AnswerStream(tokenizer, opened=True, stop=("\\n\\n",))
    for delta in deltas:
        for piece in answer.push(delta): ...        # piece.kind is "reasoning", "content" or "call"
    answer.finish_reason, answer.completion_tokens, answer.reasoning_tokens, answer.calls

Whatever the deltas' sizes, the pieces joined are the same. Where the model would end in its reasoning, or a client has
read enough of it, the template's closing words are written for it:

    if answer.unanswered: pieces = answer.close_reasoning(vocabulary)       # and the sample goes on from there
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from slingshot.engine.sequence import FinishReason, StopWatch, visible_ids
from slingshot.engine.vocabulary import Vocabulary
from slingshot.serving.backend import TokenDelta
from slingshot.text.reasoning import Kind
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_calls import CallDelta, Part, ToolCallStream
from slingshot.text.tool_formats import ToolFormat

PieceKind = Literal["reasoning", "content", "call"]


@dataclass(slots=True)  # unlike frozen ones they are made quickly, and there are many
class ToldToken:
    """A sampled token: top_logprobs, experts and whether it was drafted where asked for."""

    id: int
    logprob: float
    top_logprobs: dict[int, float] = field(default_factory=dict)
    experts: list[list[int]] = field(default_factory=list)
    drafted: bool = False


@dataclass
class AnsweredCall:
    """A call of a function while it grows; number: its place among the answer's. whole: nothing is missing of it."""

    id: str
    number: int
    name: str
    arguments: str = ""
    whole: bool = False


@dataclass(slots=True)
class Piece:
    """What an answer grew by: text, or a call's arguments. tokens: those sampled since the last piece, of whatever
    kind. call: the one that grows; begins, ends: whether it does so with this piece."""

    kind: PieceKind
    text: str
    tokens: list[ToldToken] = field(default_factory=list)
    call: AnsweredCall | None = None
    begins: bool = False
    ends: bool = False


class AnswerStream:
    """One sample on its way. `finish_reason` is None until it ended; then nothing more is pushed.

    opened: the prompt ends in an open reasoning. stop: strings before the first of which the answer ends; what is said
    in the reasoning stops nothing. `stopped` is the one that did. raw: all that is said is content, tags too.
    tools: how the model writes `calls`, where it was given functions; several: whether there may be more than one,
    else the answer ends before the second, and is `trimmed`.
    `unanswered`: the model ended in its reasoning; `closed`: the closing words were written for it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        opened: bool,
        stop: tuple[str, ...] = (),
        raw: bool = False,
        tools: ToolFormat | None = None,
        several: bool = True,
    ) -> None:
        self._tokenizer, self._opened, self._raw = tokenizer, opened, tokenizer.stream() if raw else None
        self._watch = StopWatch(stop, tokenizer, {}, opened) if stop else None
        self._several, self.trimmed = several, False
        self._tools, self._stream = tools, ToolCallStream(tokenizer, opened, tools)
        self.calls: list[AnsweredCall] = []
        self._sent: dict[Kind, str] = {"reasoning": "", "answer": ""}
        self._ids: list[int] = []
        self._dropped = 0  # tokens that ended the reasoning too early
        self._pushed = 0
        self._tokens: list[ToldToken] = []
        self._stop = stop
        self.finish_reason: FinishReason | None = None
        self.stopped: str | None = None
        self.reasoning_tokens = 0
        self.unanswered = self.closed = False

    @property
    def completion_tokens(self) -> int:
        return len(self._ids) + self._dropped

    @property
    def reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning."""
        reasoning = self._stream.reasoning
        return self._raw is None and reasoning.reasoned and not reasoning.closed and not self._stream.calling

    @property
    def content(self) -> str:
        """What of the answer was told so far."""
        return self._sent["answer"]

    @property
    def token_ids(self) -> list[int]:
        """What the sample goes on from."""
        return self._ids

    def push(self, delta: TokenDelta) -> list[Piece]:
        pieces: list[Piece] = []
        for place, token_id in enumerate(delta.token_ids):
            ends = delta.finish_reason == "stop" and place == len(delta.token_ids) - 1
            if ends and self.reasoning and not self.closed:
                self.unanswered = True
                self._dropped += 1
                self.reasoning_tokens += 1
                return pieces
            top = delta.top_logprobs[place] if delta.top_logprobs else {}
            experts = delta.experts[place] if delta.experts else []
            drafted = bool(delta.drafted) and delta.drafted[place]
            self._tokens.append(ToldToken(token_id, delta.logprobs[place], top, experts, drafted))
            self._ids.append(token_id)
            if self._watch is not None and self._watch.push(token_id):
                self.finish_reason = "stop"
                self.stopped = next(s for s in self._stop if self._watch.text.startswith(s, self._watch.cut))
                return pieces + self._rest()
            if not ends:
                pieces += self._push_safe()
                if self.trimmed:
                    return pieces
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            pieces += self._rest()
        return pieces

    def close_reasoning(self, vocabulary: Vocabulary) -> list[Piece]:
        """Write the words that close the reasoning; they are counted as the model's own."""
        self.unanswered, self.closed = False, True
        last = vocabulary.spelt[self._ids[-1]] if self._ids else b""
        ids = vocabulary.closing_after(last)
        return self.push(TokenDelta(ids, [0.0] * len(ids)))

    def count_untold(self, tokens: int) -> None:
        """So many were made that nobody will read."""
        self._dropped += tokens
        self.reasoning_tokens += tokens if self.reasoning else 0

    def _push_safe(self) -> list[Piece]:
        """Tokens that no stop string reaches back into."""
        pieces: list[Piece] = []
        safe = len(self._ids) if self._watch is None else self._watch.safe_tokens()
        while self._pushed < safe and not self.trimmed:
            self.reasoning_tokens += self.reasoning
            token_id = self._ids[self._pushed]
            parts = self._stream.push(token_id) if self._raw is None else self._push_raw(self._raw.push(token_id))
            self._pushed += 1
            pieces += map(self._piece, self._first_call(parts))
        return pieces

    def _first_call(self, parts: list[Part]) -> list[Part]:
        """What comes before a second call, where there may be no other."""
        if self._several:
            return parts
        calls = [place for place, part in enumerate(parts) if isinstance(part, CallDelta) and part.name is not None]
        if len(self.calls) + len(calls) < 2:
            return parts
        self.finish_reason, self.trimmed = "stop", True
        return parts[: calls[1 - len(self.calls)]]

    def _rest(self) -> list[Piece]:
        """The end was held back: where the text ends, and what its last white space belongs to, is known only now."""
        visible = visible_ids(self._ids, self.finish_reason == "stop", self._watch, self._tokenizer)
        self.reasoning_tokens += len(self._ids[self._pushed :]) if self.reasoning else 0
        pieces: list[Piece] = []
        if self._watch is None or self._watch.cut is None:
            pieces += map(self._piece, self._first_call(self._finish(visible[self._pushed :])))
        else:
            pieces += self._cut(visible)
        if self._tokens and pieces:
            pieces[-1].tokens.extend(self._tokens)
            self._tokens = []
        return pieces

    def _finish(self, ids: list[int]) -> list[Part]:
        """The last ids, and what the streams held back."""
        if self._raw is not None:
            return self._push_raw("".join(map(self._raw.push, ids)) + self._raw.finish())
        return [part for id in ids for part in self._stream.push(id)] + self._stream.finish()

    def _cut(self, visible: list[int]) -> Iterator[Piece]:
        """What was not told of an answer that a stop string cut, perhaps within a token."""
        whole: list[Part] = [("answer", self._tokenizer.decode(visible))]
        if self._raw is None:
            again = ToolCallStream(self._tokenizer, self._opened, self._tools)
            whole = [part for id in visible for part in again.push(id)] + again.finish()
        for kind in self._sent:
            text = "".join(part[1] for part in whole if not isinstance(part, CallDelta) and part[0] == kind)
            if rest := text[len(self._sent[kind]) :]:
                yield self._piece((kind, rest))
        calls = [part for part in whole if isinstance(part, CallDelta)]
        yield from map(self._piece, self._first_call(list(self._untold(calls))))

    def _untold(self, deltas: list[CallDelta]) -> Iterator[Part]:
        """What these say of calls beyond what was told of them."""
        known, number = [len(call.arguments) for call in self.calls], -1
        for delta in deltas:
            number += delta.name is not None
            told = min(known[number], len(delta.arguments)) if number < len(known) else 0
            if number < len(known):
                known[number] -= told
            if rest := delta.arguments[told:]:
                yield replace(delta, arguments=rest, name=delta.name if number >= len(known) else None)

    def _push_raw(self, text: str) -> list[Part]:
        return [("answer", text)] if text else []

    def _piece(self, part: Part) -> Piece:
        tokens, self._tokens = self._tokens, []
        if isinstance(part, CallDelta):
            if begins := part.name is not None:
                self.calls.append(AnsweredCall(f"call_{secrets.token_hex(12)}", len(self.calls), part.name or ""))
            call = self.calls[-1]
            call.arguments += part.arguments
            call.whole = part.whole
            return Piece("call", part.arguments, tokens, call, begins, part.whole)
        kind, text = part
        self._sent[kind] += text
        return Piece("content" if kind == "answer" else "reasoning", text, tokens)


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind, and of one call, as one."""
    if len(pieces) < 2:
        return pieces
    groups: list[list[Piece]] = []
    for piece in pieces:
        if groups and piece.kind == groups[-1][0].kind and piece.call is groups[-1][0].call:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    together = []
    for its in groups:
        text, tokens = "".join(piece.text for piece in its), [token for piece in its for token in piece.tokens]
        first, last = its[0], its[-1]
        together.append(Piece(first.kind, text, tokens, first.call, first.begins, last.ends))
    return together
