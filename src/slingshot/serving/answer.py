"""From token deltas to what a client reads: pieces of reasoning, of the answer and of tool calls, never two in one.

    answer = AnswerStream(tokenizer, opened=True, stop=("\\n\\n",))
    for delta in deltas:
        for piece in answer.push(delta): ...        # piece.kind is "reasoning", "content" or "call"
    answer.finish_reason, answer.completion_tokens, answer.reasoning_tokens

Whatever the deltas' sizes, the pieces joined are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slingshot.engine.sequence import FinishReason, StopWatch, visible_ids
from slingshot.serving.backend import TokenDelta
from slingshot.text.reasoning import Kind, ReasoningStream, parse
from slingshot.text.tokenizer import Tokenizer

PieceKind = Literal["reasoning", "content"]


@dataclass(frozen=True)
class ToldToken:
    """A sampled token: top_logprobs and experts where asked for."""

    id: int
    logprob: float
    top_logprobs: dict[int, float] = field(default_factory=dict)
    experts: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """What an answer grew by. tokens: those sampled since the last piece, of whatever kind."""

    kind: PieceKind
    text: str
    tokens: list[ToldToken] = field(default_factory=list)


class AnswerStream:
    """One sample on its way. `finish_reason` is None until it ended; then nothing more is pushed.

    stop: strings before the first of which the answer ends; what is said in the reasoning stops nothing.
    `stopped` is the one that did.
    """

    def __init__(self, tokenizer: Tokenizer, opened: bool, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._opened = tokenizer, opened
        self._watch = StopWatch(stop, tokenizer, {}, opened) if stop else None
        self._stream = ReasoningStream(tokenizer, opened)
        self._sent: dict[Kind, str] = {"reasoning": "", "answer": ""}
        self._ids: list[int] = []
        self._pushed = 0
        self._tokens: list[ToldToken] = []
        self._stop = stop
        self.finish_reason: FinishReason | None = None
        self.stopped: str | None = None
        self.reasoning_tokens = 0

    @property
    def completion_tokens(self) -> int:
        return len(self._ids)

    @property
    def reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning."""
        return self._stream.reasoned and not self._stream.closed

    @property
    def token_ids(self) -> list[int]:
        return self._ids

    def push(self, delta: TokenDelta) -> list[Piece]:
        pieces: list[Piece] = []
        for place, token_id in enumerate(delta.token_ids):
            top = delta.top_logprobs[place] if delta.top_logprobs else {}
            experts = delta.experts[place] if delta.experts else []
            self._tokens.append(ToldToken(token_id, delta.logprobs[place], top, experts))
            self._ids.append(token_id)
            if self._watch is not None and self._watch.push(token_id):
                self.finish_reason = "stop"
                self.stopped = next(s for s in self._stop if self._watch.text.startswith(s, self._watch.cut))
                return pieces + self._rest()
            ends = delta.finish_reason == "stop" and place == len(delta.token_ids) - 1
            if not ends:
                pieces += self._push_safe()
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            pieces += self._rest()
        return pieces

    def _push_safe(self) -> list[Piece]:
        """Tokens that no stop string reaches back into."""
        pieces: list[Piece] = []
        safe = len(self._ids) if self._watch is None else self._watch.safe_tokens()
        while self._pushed < safe:
            self.reasoning_tokens += self.reasoning
            deltas = self._stream.push(self._ids[self._pushed])
            self._pushed += 1
            for kind, text in deltas:
                self._sent[kind] += text
                pieces.append(self._piece(kind, text))
        return pieces

    def _rest(self) -> list[Piece]:
        """The end was held back: where the text ends, and what its last white space belongs to, is known only now."""
        visible = visible_ids(self._ids, self.finish_reason == "stop", self._watch, self._tokenizer)
        self.reasoning_tokens += len(self._ids[self._pushed :]) if self.reasoning else 0
        whole = parse(visible, self._opened, self._tokenizer)
        pieces: list[Piece] = []
        for kind, text in (("reasoning", whole.reasoning or ""), ("answer", whole.answer)):
            if rest := text[len(self._sent[kind]) :]:  # type: ignore[index]
                pieces.append(self._piece(kind, rest))  # type: ignore[arg-type]
        if self._tokens and pieces:
            pieces[-1].tokens.extend(self._tokens)
            self._tokens = []
        return pieces

    def _piece(self, kind: Kind, text: str) -> Piece:
        tokens, self._tokens = self._tokens, []
        return Piece("content" if kind == "answer" else "reasoning", text, tokens)
