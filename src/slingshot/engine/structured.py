"""Answers held to a JSON schema, a regular expression, a choice, an EBNF grammar or a structural tag, by xgrammar.

    matcher = GrammarMatcher(vocabulary.grammars.compile(params.structure), vocabulary.size)
    mask_W = matcher.mask(); matcher.push(token_id); matcher.slow

Grammars are compiled once and kept. Only text is allowed, and at a whole end the tokens that end a sample; control
tokens have no text that a grammar could ask for, so that a structural tag alone lets them in, by id. An object
holds the properties that its schema names, in their order, and others only where it says additionalProperties.
Suffixes: R rows, V vocabulary, W words of 32 ids.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingError, Structure

if TYPE_CHECKING:
    import xgrammar

_KEPT = 128 << 20  # bytes of compiled grammars
SPACES = 24  # of white space at most between two parts of JSON: a model may like it too well to end

# Seconds of the processor that following one answer may take: for each token, and what it may be behind.
_A_TOKEN, _BEHIND = 0.005, 0.5

# What a JSON schema can ask and xgrammar passes over in silence.
_UNKNOWN = {
    "not", "if", "contains", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
    "$dynamicRef", "$recursiveRef",
}  # fmt: skip
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")  # of a message: time and file
_OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}  # names, and a schema each
_PLAIN = {"enum", "const", "default", "examples", "required", "description", "title"}  # hold no schemas


class GrammarError(SamplingError):
    """A structure that is none, or that no text of this model can have."""


class Grammars:
    """Compiles what requests ask for; any number of threads may ask.

    texts: the bytes of every id of the model's, of control tokens what no text holds. ends: ids that end a sample.
    """

    def __init__(self, texts: Sequence[bytes], ends: Iterable[int]) -> None:
        try:
            import xgrammar
        except ImportError as error:
            way_out = "pip install 'slingshot-lm[structured]'"
            raise SlingshotError(f"structured output needs the package xgrammar: {way_out}") from error
        self.texts, self.ends = texts, sorted(ends)
        if not self.ends:
            raise GrammarError("structured output needs a tokenizer that names its eos_token")
        info = xgrammar.TokenizerInfo(list(texts), stop_token_ids=self.ends, vocab_size=len(texts))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._kept: OrderedDict[Structure, xgrammar.CompiledGrammar] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.size = len(texts)

    def kept(self, structure: Structure) -> xgrammar.CompiledGrammar | None:
        """What was compiled before."""
        with self._lock:
            if found := self._kept.get(structure):
                self._kept.move_to_end(structure)
            return found

    def compile(self, structure: Structure) -> xgrammar.CompiledGrammar:
        """What an answer will be like. GrammarError where that is nothing."""
        if found := self.kept(structure):
            return found
        found = self._compile(structure)
        if not GrammarMatcher(found, self.size).mask().any():
            kind, source = structure
            raise GrammarError(f"sampling: no answer can have this {kind}: {_short(source)}")
        with self._lock:
            if structure not in self._kept:
                self._bytes += found.memory_size_bytes
            self._kept[structure] = found
            while self._bytes > _KEPT and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].memory_size_bytes
        return found

    def _compile(self, structure: Structure) -> xgrammar.CompiledGrammar:
        kind, source = structure
        try:
            if kind == "json_schema":
                _check(json.loads(source))
                return self._compiler.compile_json_schema(source, max_whitespace_cnt=SPACES)
            if kind == "structural_tag":
                for schema in _found(json.loads(source), "json_schema"):
                    _check(schema)
                return self._compiler.compile_structural_tag(source)
            if kind == "regex":
                return self._compiler.compile_regex(source)
            if kind == "choice":
                source = "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in source)
            return self._compiler.compile_grammar(source)
        except (RuntimeError, ValueError) as error:
            why = _PLACE.sub("", " ".join(str(error).split()))[:300]
            raise unusable(structure, why) from error


def unusable(structure: Structure, why: str) -> GrammarError:
    kind, source = structure
    return GrammarError(f"sampling: {kind} {_short(source)} cannot be used: {why}")


class GrammarMatcher:
    """Follows one answer through a grammar. slow: that took longer than the others of a batch can be made to wait."""

    def __init__(self, grammar: xgrammar.CompiledGrammar, size: int) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._mask_1W = xgrammar.allocate_token_bitmask(1, size)
        self._left = _BEHIND  # seconds

    @property
    def slow(self) -> bool:
        return self._left < 0

    def push(self, token_id: int) -> bool:
        """Take the next token; False where the grammar has no place for it."""
        with self._timed():
            return bool(self._matcher.accept_token(token_id))

    def push_text(self, text: str) -> bool:
        with self._timed():
            return bool(self._matcher.accept_string(text))

    def mask(self) -> Tensor:
        """Which ids may come next, 32 in an int32: bit id % 32 of word id // 32. Kept until the next call."""
        if self._matcher.is_terminated():
            return self._mask_1W[0].zero_()
        with self._timed():
            self._left = min(self._left + _A_TOKEN, _BEHIND)
            self._matcher.fill_next_token_bitmask(self._mask_1W)
        return self._mask_1W[0]

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        self._left -= time.thread_time() - began


def allow_only(logits_RV: Tensor, masks: list[tuple[int, Tensor]]) -> None:
    """Take all ids but those of the masks out of their rows."""
    import xgrammar

    rows, mask_RW = [row for row, _ in masks], torch.empty(len(logits_RV), len(masks[0][1]), dtype=torch.int32)
    mask_RW[rows] = torch.stack([mask for _, mask in masks])
    xgrammar.apply_token_bitmask_inplace(logits_RV, mask_RW.to(logits_RV.device), indices=rows)


def own_tokens(structural_tag: str) -> list[int]:
    """The ids that it asks for, or waits for, by number."""
    tag = json.loads(structural_tag)
    named = [*_found(tag, "token"), *(rule[0] for rules in _found(tag, "rules") for rule in rules)]
    return sorted({id for id in named if isinstance(id, int)})


def _found(tag: Any, name: str) -> Iterator[Any]:
    """What a structural tag holds by a name, schemas' own contents aside."""
    for value in tag if isinstance(tag, list) else ():
        yield from _found(value, name)
    if isinstance(tag, dict):
        if name in tag:
            yield tag[name]
        for key, value in tag.items():
            if key != "json_schema":
                yield from _found(value, name)


def _check(schema: Any) -> None:
    if wrong := next(_passed_over(schema), None):
        raise GrammarError(f"sampling: json_schema: {wrong} is not supported; leave it out")


def _passed_over(schema: Any) -> Iterator[str]:
    """What of a schema would not be kept to."""
    if isinstance(schema, list):
        for part in schema:
            yield from _passed_over(part)
    if not isinstance(schema, dict):
        return
    yield from (repr(key) for key in sorted(_UNKNOWN & schema.keys()))
    if schema.get("uniqueItems"):
        yield "'uniqueItems'"
    if "pattern" in schema and {"minLength", "maxLength"} & schema.keys():
        yield "'pattern' together with a length"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema and {"type", "properties", "required", "items", "$ref"} & schema.keys():
            yield f"{key!r} beside other demands"
    if len(schema.get("allOf") or ()) > 1:
        yield "'allOf' of several"
    if not str(schema.get("$ref", "#")).startswith("#"):
        yield f"a '$ref' to elsewhere ({schema['$ref']!r:.80})"
    required, properties = schema.get("required", []), schema.get("properties", {})
    if isinstance(required, list) and isinstance(properties, dict):
        yield from (
            f"{name!r:.80}, required but not among 'properties'," for name in required if name not in properties
        )
    for key, value in schema.items():
        if key not in _PLAIN:
            yield from _passed_over(list(value.values()) if key in _OF_SCHEMAS and isinstance(value, dict) else value)


def _short(source: str | tuple[str, ...]) -> str:
    return repr(source)[:120]
