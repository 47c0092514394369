"""One sample led through its reasoning to its answer: the reasoning ends at its budget, the answer keeps to a grammar.

    guide = Guide(params, opened, vocabulary, grammar, prompt)
    guide.forced                     # ids that come next, whatever the model says
    guide.mask(), guide.allowed(), guide.banned()
    guide.push(token_id)

The reasoning itself is free, but a sample cannot end in it: where it would, and at the budget, the answer is still to
come. A grammar binds from the answer's first character on.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from slingshot.engine.sampling import SamplingParams
from slingshot.engine.vocabulary import Vocabulary
from slingshot.text.reasoning import ReasoningStream

if TYPE_CHECKING:
    import xgrammar

    from slingshot.engine.structured import GrammarMatcher

_CHARACTER = 3  # bytes, and so tokens, that may be missing of a character at most


class Guide:
    """opened: whether the prompt ends in an open reasoning."""

    def __init__(
        self, params: SamplingParams, opened: bool, vocabulary: Vocabulary, grammar: xgrammar.CompiledGrammar | None,
        prompt: Sequence[int],
    ) -> None:  # fmt: skip
        self._vocabulary, self._budget = vocabulary, params.thinking_budget
        self._stream = ReasoningStream(vocabulary.tokenizer, opened)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._used = 0  # tokens of reasoning
        self._reasoning = opened
        self._may_begin = not opened and vocabulary.may_begin_reasoning and self._budget != 0
        self._ending: Sequence[int] = ()  # what may end the character in which the budget ran out
        self.forced: deque[int] = deque()
        self.failed = False  # the answer left the grammar
        self._matcher: GrammarMatcher | None = None
        self._banned = sorted(vocabulary.tokenizer.eos_ids)  # within the reasoning
        if grammar is not None:
            from slingshot.engine.structured import GrammarMatcher, own_tokens

            self._banned += own_tokens(params.structural_tag) if params.structural_tag else []
            self._matcher = GrammarMatcher(grammar, vocabulary.size)
        if opened and self._budget == 0:
            self.forced.extend(vocabulary.closing_of(prompt))

    def push(self, token_id: int) -> None:
        forced = bool(self.forced)
        if forced:
            self.forced.popleft()
        before, self._ending, may_begin, self._may_begin = self._reasoning, (), self._may_begin, False
        deltas = self._stream.push(token_id)
        self._reasoning = self._stream.reasoned and not self._stream.closed
        spelt = self._vocabulary.spelt[token_id]
        self._decoder.decode(spelt)
        if self._reasoning:
            self._used += before
            if not forced and self._budget is not None and self._used >= self._budget:
                self._end_reasoning(spelt)
        elif before:
            self._begin_answer("".join(text for kind, text in deltas if kind == "answer"), forced)
        elif self._matcher is not None and not forced:
            begun = may_begin and token_id == self._vocabulary.tokenizer.think_id
            self.failed = not begun and not self._matcher.push(token_id)

    def _end_reasoning(self, spelt: bytes) -> None:
        """The budget is spent: what is missing of a character may follow, then the closing words do."""
        pending = self._decoder.getstate()[0]
        if pending and self._used < (self._budget or 0) + _CHARACTER:
            self._ending = self._vocabulary.ending(pending)
        if not self._ending:
            self.forced.extend(self._vocabulary.closing_after(spelt if self._used else b""))

    def _begin_answer(self, said: str, forced: bool) -> None:
        """The reasoning has just ended; what its last token says of the answer belongs to the grammar."""
        if self._matcher is None or forced:
            return
        if said.strip("\n"):
            self.failed = not self._matcher.push_text(said.lstrip("\n"))
        elif not said:
            self.forced.extend(self._vocabulary.closing[1])

    def mask(self) -> Tensor | None:
        """What the grammar allows next, as GrammarMatcher has it; None where it does not bind."""
        if self._matcher is None or self.forced or self._reasoning:
            return None
        mask_W = self._matcher.mask()
        if self._may_begin:
            think = self._vocabulary.tokenizer.think_id or 0
            bit = 1 << think % 32
            mask_W[think // 32] |= bit if bit < 1 << 31 else -(1 << 31)
        return mask_W

    @property
    def slow(self) -> bool:
        """Whether the grammar takes too long to be followed."""
        return self._matcher is not None and self._matcher.slow

    def allowed(self) -> Sequence[int]:
        """The only ids that may come next; none where that is not settled."""
        return self._ending

    def banned(self) -> Sequence[int]:
        """Within reasoning no token ends the sample, and none belongs to a structure that is held to after it."""
        return self._banned if self._reasoning and not self.forced else ()
