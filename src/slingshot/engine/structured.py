"""Answers held to a JSON schema, a regular expression, a choice or an EBNF grammar, by xgrammar.

    grammar = vocabulary.grammars.compile(params)         # None where the request asks for no structure
    matcher = grammar.matcher()
    mask_V32 = matcher.mask(); matcher.push(token_id)

Grammars are compiled once and kept. Only text is allowed, and at a whole end the tokens that end a sample.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import STRUCTURES, SamplingError, SamplingParams

if TYPE_CHECKING:
    import xgrammar

    from slingshot.engine.vocabulary import Vocabulary

_KEPT = 64  # compiled grammars


class GrammarError(SamplingError):
    """A structure that is none, or that no text of this model can have."""


class Grammars:
    """Compiles what requests ask for; any number of threads may ask."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            import xgrammar
        except ImportError as error:
            way_out = "pip install 'slingshot-lm[structured]'"
            raise SlingshotError(f"structured output needs the package xgrammar: {way_out}") from error
        tokenizer = vocabulary.tokenizer
        if not tokenizer.eos_ids:
            raise GrammarError("structured output needs a tokenizer that names its eos_token")
        texts = [b"" if id in tokenizer.control_ids else text for id, text in enumerate(vocabulary.spelt)]
        info = xgrammar.TokenizerInfo(texts, stop_token_ids=sorted(tokenizer.eos_ids), vocab_size=vocabulary.size)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self._kept: OrderedDict[tuple[str, str | tuple[str, ...]], xgrammar.CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        self.size = vocabulary.size

    def compile(self, params: SamplingParams) -> xgrammar.CompiledGrammar:
        """What an answer of this request will be like. GrammarError where that is nothing."""
        kind = next(name for name in STRUCTURES if getattr(params, name))
        source = getattr(params, kind)
        with self._lock:
            found = self._kept.get((kind, source))
        if found is None:
            found = self._compile(kind, source)
            if not GrammarMatcher(found, self.size).mask().any():
                raise GrammarError(f"sampling: no answer can have this {kind}: {_short(source)}")
        with self._lock:
            self._kept[kind, source] = found
            self._kept.move_to_end((kind, source))
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    def _compile(self, kind: str, source: str | tuple[str, ...]) -> xgrammar.CompiledGrammar:
        try:
            if kind == "json_schema":
                json.loads(str(source))
                return self._compiler.compile_json_schema(str(source))
            if kind == "regex":
                return self._compiler.compile_regex(str(source))
            if kind == "choice":
                source = "root ::= " + " | ".join(json.dumps(choice) for choice in source)
            return self._compiler.compile_grammar(str(source))
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[-300:]
            raise GrammarError(f"sampling: {kind} {_short(source)} is none: {why}") from error


class GrammarMatcher:
    """Follows one answer through a grammar."""

    def __init__(self, grammar: xgrammar.CompiledGrammar, size: int) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._mask_1W = xgrammar.allocate_token_bitmask(1, size)

    def push(self, token_id: int) -> bool:
        """Take the next token; False where the grammar has no place for it."""
        return bool(self._matcher.accept_token(token_id))

    def push_text(self, text: str) -> bool:
        return bool(self._matcher.accept_string(text))

    def mask(self) -> Tensor:
        """Which ids may come next, 32 in an int32: bit id % 32 of word id // 32. Kept until the next call."""
        if self._matcher.is_terminated():
            return self._mask_1W[0].zero_()
        self._matcher.fill_next_token_bitmask(self._mask_1W)
        return self._mask_1W[0]


def allow_only(logits_RV: Tensor, masks: list[tuple[int, Tensor]]) -> None:
    """Take all ids but those of the masks out of their rows."""
    import xgrammar

    mask_RW = torch.stack([mask for _, mask in masks]).to(logits_RV.device)
    xgrammar.apply_token_bitmask_inplace(logits_RV, mask_RW, indices=[row for row, _ in masks])


def _short(source: str | tuple[str, ...]) -> str:
    return repr(source)[:120]
