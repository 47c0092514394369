"""Calls as a structure that the sampler keeps to: xgrammar's structural tag in the model's own syntax.

    params = replace(params, structural_tag=call_structure(form, tokenizer, functions, several=True))

Tags that are tokens of the vocabulary are asked for by id, others by their characters. Arguments keep to the
function's schema. With `otherwise` calls are not a must: what stands there may come instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slingshot.engine.structured import SPACES
from slingshot.serving.sampling_fields import ANY_OBJECT
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolFormat

_Format = dict[str, Any]


def call_structure(
    form: ToolFormat, tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], several: bool,
    otherwise: _Format | None = None,
) -> str:  # fmt: skip
    """functions: name, parameters, and "loose" where any object will do. several: whether one call may follow another.
    otherwise: what may come instead of calls."""
    writer = _Writer(form, tokenizer)
    calls = writer.calls(functions, several and form.apart is not None)
    held = calls if otherwise is None else {"type": "or", "elements": [otherwise, calls]}
    return json.dumps({"type": "structural_tag", "format": held})


def free_text(form: ToolFormat, tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]]) -> str:
    """Any text, in which a call that is begun keeps to its function's schema."""
    writer, begin = _Writer(form, tokenizer), tokenizer.control_id(form.begin)
    if begin is None and not form.end:  # an answer that begins like JSON is a call
        other = {"type": "regex", "pattern": r"([^{\s][\s\S]*)?"}
        return call_structure(form, tokenizer, functions, several=False, otherwise=other)
    rest = writer.section(functions, several=True)
    kind, trigger = ("dispatch", form.begin) if begin is None else ("token_dispatch", begin)
    free = {"type": kind, "rules": [[trigger, rest]], "loop": True}
    return json.dumps({"type": "structural_tag", "format": free})


class _Writer:
    def __init__(self, form: ToolFormat, tokenizer: Tokenizer) -> None:
        self._form, self._id = form, tokenizer.control_id
        tags = [tag for tag in (form.begin, form.end, *form.inner) if tag]
        self._parts = re.compile(f"({'|'.join(map(re.escape, [*tags, 'NAME', 'ARGUMENTS', 'DIGITS']))})")

    def calls(self, functions: Sequence[Mapping[str, Any]], several: bool) -> _Format:
        begin = self._form.begin if self._form.end or self._id(self._form.begin) is not None else ""
        section = _sequence([*self._spelt(begin, {}), self.section(functions, several)])
        return section if self._form.inner or not several else _repeated(section, self._form.apart or "")

    def section(self, functions: Sequence[Mapping[str, Any]], several: bool) -> _Format:
        """What follows its first tag."""
        spelt = [_sequence(self._spelt(self._form.call, function)) for function in functions]
        call = spelt[0] if len(spelt) == 1 else {"type": "or", "elements": spelt}
        if self._form.inner and several:
            call = _repeated(call, self._form.apart or "")
        return _sequence([call, *self._spelt(self._form.end, {})])

    def _spelt(self, text: str, function: Mapping[str, Any]) -> list[_Format]:
        return [self._part(part, function) for part in self._parts.split(text) if part]

    def _part(self, part: str, function: Mapping[str, Any]) -> _Format:
        if part == "ARGUMENTS":
            schema = ANY_OBJECT if function.get("loose") else function["parameters"]
            style = {"style": "qwen_xml"} if self._form.sign == "<function=" else {}
            return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": SPACES} | style
        if part == "DIGITS":
            return {"type": "regex", "pattern": "[0-9]{1,4}"}
        if part != "NAME" and (id := self._id(part)) is not None:
            return {"type": "token", "token": id}
        return {"type": "const_string", "value": function["name"] if part == "NAME" else part}


def _sequence(elements: list[_Format]) -> _Format:
    return elements[0] if len(elements) == 1 else {"type": "sequence", "elements": elements}


def _repeated(one: _Format, apart: str) -> _Format:
    between = [{"type": "const_string", "value": apart}] if apart else []
    return _sequence([one, {"type": "star", "content": _sequence([*between, one])}])
