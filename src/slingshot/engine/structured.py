"""Answers held to a JSON schema, a regular expression, a choice or an EBNF grammar, by xgrammar.

    matcher = GrammarMatcher(vocabulary.grammars.compile(params), vocabulary.size)
    mask_W = matcher.mask(); matcher.push(token_id)

Grammars are compiled once and kept. Only text is allowed, and at a whole end the tokens that end a sample. An object
holds the properties that its schema names, in their order, and others only where it says additionalProperties.
Suffixes: R rows, V vocabulary, W words of 32 ids.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import STRUCTURES, SamplingError, SamplingParams
from slingshot.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

_KEPT = 64  # compiled grammars
_SPACES = 24  # of white space at most between two parts of JSON: a model may like it too well to end

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
    """Compiles what requests ask for; any number of threads may ask. spelt: the bytes of every id of the model's."""

    def __init__(self, tokenizer: Tokenizer, spelt: list[bytes]) -> None:
        try:
            import xgrammar
        except ImportError as error:
            way_out = "pip install 'slingshot-lm[structured]'"
            raise SlingshotError(f"structured output needs the package xgrammar: {way_out}") from error
        if not tokenizer.eos_ids:
            raise GrammarError("structured output needs a tokenizer that names its eos_token")
        texts = [b"" if id in tokenizer.control_ids else text for id, text in enumerate(spelt)]
        info = xgrammar.TokenizerInfo(texts, stop_token_ids=sorted(tokenizer.eos_ids), vocab_size=len(spelt))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self._kept: OrderedDict[tuple[str, str | tuple[str, ...]], xgrammar.CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        self.size = len(spelt)

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
                if wrong := next(_passed_over(json.loads(str(source))), None):
                    raise GrammarError(f"sampling: json_schema: {wrong} is not supported; leave it out")
                return self._compiler.compile_json_schema(str(source), max_whitespace_cnt=_SPACES)
            if kind == "regex":
                return self._compiler.compile_regex(str(source))
            if kind == "choice":
                source = "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in source)
            return self._compiler.compile_grammar(str(source))
        except (RuntimeError, ValueError) as error:
            why = _PLACE.sub("", " ".join(str(error).split()))[:300]
            raise GrammarError(f"sampling: {kind} {_short(source)} cannot be used: {why}") from error


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

    rows, mask_RW = [row for row, _ in masks], torch.empty(len(logits_RV), len(masks[0][1]), dtype=torch.int32)
    mask_RW[rows] = torch.stack([mask for _, mask in masks])
    xgrammar.apply_token_bitmask_inplace(logits_RV, mask_RW.to(logits_RV.device), indices=rows)


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
