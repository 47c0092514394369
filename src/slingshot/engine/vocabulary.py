"""What the engine needs to know of a model's tokens beside the tokenizer: one for each engine, its tables made when
they are first asked for.

    vocabulary = Vocabulary(tokenizer, config.vocab_size)
    vocabulary.starting_with(b"ab"); vocabulary.holding(b"ab"); vocabulary.ending(b"\\xe3\\x81")
    vocabulary.closing            # the ids that end a reasoning, and those that lead to the answer
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingError, SamplingParams
from slingshot.text.chat_template import END_THINK, THINK
from slingshot.text.reasoning import before_reasoning
from slingshot.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slingshot.engine.structured import Grammars

_CLOSING = "\n", "\n\n"  # around </think>, where a template does not show its own: R1's layout (text/reasoning.py)


class Vocabulary:
    """size: ids that the model knows; the tokenizer may have fewer."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.holding = lru_cache(maxsize=256)(self._holding)
        self.starting_with = lru_cache(maxsize=4096)(self._starting_with)
        self.ending = lru_cache(maxsize=256)(self._ending)

    def check(self, params: SamplingParams) -> None:
        """Raise SamplingError where the parameters name ids that the model does not know."""
        ids = [("stop_token_ids", id) for id in params.stop_token_ids]
        ids += [("logit_bias", id) for id, _ in params.logit_bias]
        ids += [("bad_words", id) for word in params.bad_words if isinstance(word, tuple) for id in word]
        for name, id in ids:
            if not 0 <= id < self.size:
                raise SamplingError(f"sampling: {name} names token id {id}, the model's vocabulary has {self.size}")

    @cached_property
    def silent(self) -> dict[int, str]:
        """Names of the tokens that add nothing to the text: a stop string may be one of them."""
        added = self.tokenizer.description()["added_tokens"]
        return {token["id"]: token["content"] for token in added if not self.tokenizer.decode([token["id"]])}

    @cached_property
    def spelt(self) -> list[bytes]:
        """What each id adds to the text."""
        return [self.tokenizer.detokenizer.bytes_of(id) for id in range(self.size)]

    @cached_property
    def grammars(self) -> Grammars:
        from slingshot.engine.structured import Grammars  # brings xgrammar, which many never need

        # No text in UTF-8 holds that byte; ids without any are barred even where a structural tag asks for them.
        controls = self.tokenizer.control_ids
        texts = [b"\xff%d" % id if id in controls else text for id, text in enumerate(self.spelt)]
        return Grammars(texts, self.tokenizer.eos_ids)

    @cached_property
    def closing(self) -> tuple[list[int], list[int]]:
        """Ids that end a reasoning, the tag included, and those that stand between the tag and the answer.

        In the words of the template, where it shows an answer with its reasoning.
        """
        tokenizer, (before, after) = self.tokenizer, self._closing_words()
        if tokenizer.end_think_id is None:
            return tokenizer.encode(before + END_THINK, continues=True), tokenizer.encode(after, continues=True)
        ends = [*tokenizer.encode(before, continues=True), tokenizer.end_think_id]
        return ends, tokenizer.encode(after, continues=True) if after else []

    def closing_after(self, last: bytes) -> list[int]:
        """What closes a reasoning whose last token is spelt so: it has its line break already, or gets one."""
        ends, leads = self.closing
        if last.endswith(b"\n") and self.spelt[ends[0]] == b"\n":
            ends = ends[1:]
        return [*ends, *leads]

    def closing_of(self, prompt: Sequence[int]) -> list[int]:
        """What closes the reasoning that a prompt ends in: one that has begun may have its line break already."""
        tokenizer = self.tokenizer
        if tokenizer.think_id is None or tokenizer.end_think_id is None:
            return self.closing_after(b"")
        thought = prompt[len(before_reasoning(prompt, tokenizer)) + 1 :]
        return self.closing_after(self.spelt[prompt[-1]] if tokenizer.decode(thought).strip() else b"")

    @cached_property
    def may_begin_reasoning(self) -> bool:
        """Whether the model itself writes the tag that begins its reasoning, because the template does not (Qwen3)."""
        tokenizer = self.tokenizer
        if tokenizer.think_id is None or THINK not in (tokenizer.chat_template or ""):
            return False
        try:
            asked = tokenizer.encode_chat([{"role": "user", "content": "?"}])
        except SlingshotError:
            return False
        return not {tokenizer.think_id, tokenizer.end_think_id} & set(asked)

    def _closing_words(self) -> tuple[str, str]:
        thought, said = "A thought.", "An answer."
        reply = {"role": "assistant", "content": said, "reasoning_content": thought}
        try:
            ids = self.tokenizer.encode_chat([{"role": "user", "content": "?"}, reply], add_generation_prompt=False)
        except SlingshotError:  # no template, or one that wants it otherwise
            return _CLOSING
        _, found, rest = self.tokenizer.decode(ids).partition(thought)
        before, tag, rest = rest.partition(END_THINK)
        after, answered, _ = rest.partition(said)
        return (before, after) if found and tag and answered else _CLOSING

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        ids = sorted(range(self.size), key=self.spelt.__getitem__)
        return [self.spelt[id] for id in ids], ids

    def _starting_with(self, prefix: bytes) -> tuple[int, ...]:
        spelt, ids = self._sorted
        first = last = bisect_left(spelt, prefix)
        while last < len(spelt) and spelt[last].startswith(prefix):
            last += 1
        return tuple(ids[first:last])

    def _holding(self, word: bytes) -> tuple[int, ...]:
        return tuple(id for id, spelt in enumerate(self.spelt) if word in spelt)

    def _ending(self, pending: bytes) -> tuple[int, ...]:
        """Ids that go on with the character of which `pending` is the beginning, and add nothing else."""
        found = []
        for first in range(0x80, 0xC0):
            for id in self.starting_with(bytes([first])):
                decoder = codecs.getincrementaldecoder("utf-8")()
                try:
                    text = decoder.decode(pending + self.spelt[id])
                except UnicodeDecodeError:
                    continue
                if not text or (len(text) == 1 and not decoder.getstate()[0]):
                    found.append(id)
        return tuple(found)
