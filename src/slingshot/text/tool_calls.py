"""Calls of functions in what a model writes, parted from its reasoning and its answer.

    stream = ToolCallStream(tokenizer, opened, tool_format(tokenizer))
    for id in ids:
        for part in stream.push(id): ...     # ("reasoning", text), ("answer", text) or ToolCall(name, arguments)
    parts = stream.finish()

Where a format's tags are tokens of the vocabulary, only those ids begin a call, in the reasoning as well as after it,
and the same characters spelt otherwise are text; elsewhere the characters do, in the answer alone. What is no whole
call is text as it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slingshot.text.reasoning import Delta, ReasoningStream, beginning
from slingshot.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolCall:
    """arguments: an object in JSON, as the model spelt it."""

    name: str
    arguments: str


Part = Delta | ToolCall
Segment = tuple[str, str]  # a tag and the text behind it


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls: a section between two tags, and within it tags of its own.

    read: the section's segments -> its calls; None where it is no whole section. call: how one is spelt, with NAME and
    ARGUMENTS in it, and DIGITS where calls are numbered; apart: what stands between two, None: there is one at most.
    sign: by what a template is known. as_text: it wants the arguments of earlier calls as JSON text, not as an object.
    """

    name: str
    begin: str
    end: str
    inner: tuple[str, ...]
    read: Callable[[list[Segment]], list[ToolCall] | None]
    call: str
    apart: str | None = ""
    sign: str = ""
    as_text: bool = False


def _tagged(
    begin: str, middle: str, end: str, call: Callable[[str, str], ToolCall | None]
) -> Callable[[list[Segment]], list[ToolCall] | None]:
    """A section of calls of the form: begin, head, middle, body, end."""

    def read(segments: list[Segment]) -> list[ToolCall] | None:
        calls: list[ToolCall] = []
        (_, before), *rest = segments
        while rest and not before.strip():
            if [tag for tag, _ in rest[:3]] != [begin, middle, end]:
                return None
            (_, head), (_, body), (_, before), *rest = rest
            if (found := call(head, body)) is None:
                return None
            calls.append(found)
        return None if before.strip() else calls or None

    return read


def _checked(name: str, arguments: str) -> ToolCall | None:
    """The call, if its name is one and its arguments are an object."""
    whole = isinstance(_parsed(arguments), dict)
    return ToolCall(name, arguments.strip()) if whole and name and not re.search(r"\s", name) else None


def _parsed(text: str, otherwise: object = None) -> object:
    """A text as JSON; `otherwise` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def _deepseek(head: str, body: str) -> ToolCall | None:
    """V3: the kind, then the name and fenced JSON. V3.1: the name, then JSON."""
    if head.strip() == "function" and (fenced := re.fullmatch(r"\s*(\S+)\n```json\n(.*)\n```\s*", body, re.DOTALL)):
        return _checked(fenced[1], fenced[2])
    return _checked(head.strip(), body)


def _kimi(head: str, body: str) -> ToolCall | None:
    """functions.NAME:NUMBER, then JSON."""
    named = re.fullmatch(r"\s*(?:functions\.)?(.+?)(?::\d+)?\s*", head, re.DOTALL)
    return _checked(named[1], body) if named else None


_XML_CALL = re.compile(r"\s*<function=([^>\s]+)>\n?(.*?)</function>\s*", re.DOTALL)
_XML_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _hermes(segments: list[Segment]) -> list[ToolCall] | None:
    """One call: JSON with name and arguments, or Qwen3-Coder's function and parameter tags."""
    text = segments[0][1]
    if len(segments) != 1:
        return None
    if found := _XML_CALL.fullmatch(text):
        parameters = _XML_PARAMETER.findall(found[2])
        if "".join(_XML_PARAMETER.sub("", found[2]).split()):
            return None
        values = {name: _parsed(value, value) for name, value in parameters}  # plain words are no JSON
        return [ToolCall(found[1], json.dumps(values, ensure_ascii=False))]
    call = _object_call(text)
    return None if call is None else [call]


def _object_call(text: str) -> ToolCall | None:
    """{"name": ..., "arguments" or "parameters": {...}}."""
    found = _parsed(text)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        return _checked(found["name"], arguments)
    return _checked(found["name"], json.dumps(arguments, ensure_ascii=False))


def _llama(segments: list[Segment]) -> list[ToolCall] | None:
    """JSON calls, one behind the other, with semicolons between them or none."""
    rest, calls, decoder = "".join(text for _, text in segments).strip(), list[ToolCall](), json.JSONDecoder()
    while rest:
        try:
            _, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        call = _object_call(rest[:end])
        if call is None:
            return None
        calls.append(call)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return calls or None


_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
FORMATS = (
    ToolFormat("deepseek-v3", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _DEEPSEEK,
               _tagged(*_DEEPSEEK, _deepseek), "{}function{}NAME\n```json\nARGUMENTS\n```{}".format(*_DEEPSEEK),
               "\n", "```json", as_text=True),
    ToolFormat("deepseek", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _DEEPSEEK, _tagged(*_DEEPSEEK, _deepseek),
               "{}NAME{}ARGUMENTS{}".format(*_DEEPSEEK), as_text=True),
    ToolFormat("kimi", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _KIMI, _tagged(*_KIMI, _kimi),
               "{}functions.NAME:DIGITS{}ARGUMENTS{}".format(*_KIMI)),
    ToolFormat("qwen-coder", "<tool_call>", "</tool_call>", (), _hermes,
               "\n<function=NAME>\nARGUMENTS\n</function>\n", "\n", "<function="),
    ToolFormat("hermes", "<tool_call>", "</tool_call>", (), _hermes,
               '\n{"name": "NAME", "arguments": ARGUMENTS}\n', "\n"),
    ToolFormat("llama", "<|python_tag|>", "", (), _llama, '{"name": "NAME", "parameters": ARGUMENTS}', None),
)  # fmt: skip


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """How this tokenizer's model writes calls, by its chat template; None where that knows no tools."""
    template = tokenizer.tool_template
    if template is None or "tools" not in template:
        return None
    found = next((known for known in FORMATS if known.begin in template and known.sign in template), None)
    if found is None and '"parameters"' in template:  # Llama 3.2's, which begins with the JSON itself
        found = FORMATS[-1]
    return found


class ToolCallStream:
    """Parts an output while it is written, like ReasoningStream, whose deltas it passes on. No format: only those.

    White space of the answer beside a call is layout, and dropped.
    """

    def __init__(self, tokenizer: Tokenizer, opened: bool, tools: ToolFormat | None) -> None:
        self.reasoning = ReasoningStream(tokenizer, opened)
        self._format, self._decode = tools, tokenizer.decode
        names = (tools.begin, tools.end, *tools.inner) if tools else ()
        self._tags = {id: name for name in names if name and (id := tokenizer.control_id(name)) is not None}
        self._by_id = tools is not None and tools.begin in self._tags.values()
        self._section: list[int] | None = None  # ids since a section's first tag
        # Of the answer: white space that a call may follow; what may be a call, where characters begin it.
        self._held = ""
        self._told = self._called = False  # some of the answer; a call since then

    @property
    def calling(self) -> bool:
        """Whether a section was begun and not ended."""
        return self._section is not None

    def push(self, id: int) -> list[Part]:
        tag = self._tags.get(id)
        if self._section is not None:
            self._section.append(id)
            return self._close() if self._format and tag and tag == self._format.end else []
        if tag and self._format and tag == self._format.begin:
            self._section = [id]
            return []
        return self._pass_on(self.reasoning.push(id), final=False)

    def finish(self) -> list[Part]:
        parts = self._close() if self._section is not None else []
        return parts + self._pass_on(self.reasoning.finish(), final=True)

    def _close(self) -> list[Part]:
        """A section ended: its calls, or its text where it holds none."""
        assert self._format is not None and self._section is not None
        section, self._section = self._section, None
        segments: list[tuple[str, list[int]]] = []
        for id in section:
            if tag := self._tags.get(id):
                segments.append((tag, []))
            else:
                segments[-1][1].append(id)
        whole = not self._format.end or segments[-1] == (self._format.end, [])
        told = [(tag, self._decode(ids)) for tag, ids in segments[: -1 if self._format.end else None]]
        calls = self._format.read(told) if whole else None
        if calls is not None:
            return self._calls(calls)
        return self._pass_on([delta for id in section for delta in self.reasoning.push(id)], final=False)

    def _calls(self, calls: list[ToolCall]) -> list[Part]:
        self._held, self._called = "", True
        return list(calls)

    def _pass_on(self, deltas: list[Delta], final: bool) -> list[Part]:
        if self._format is None:
            return list(deltas)
        parts: list[Part] = [delta for delta in deltas if delta[0] == "reasoning"]
        self._held += "".join(text for kind, text in deltas if kind == "answer")
        if not self._by_id and self._held:
            parts += self._spelt(self._format, final)
        kept = 0 if final else len(self._held) - len(self._held.rstrip()) if self._by_id else len(self._held)
        return parts + self._tell(len(self._held) - kept, final)

    def _tell(self, size: int, final: bool = False) -> list[Part]:
        """So much of what is held, as text."""
        text, self._held = self._held[:size], self._held[size:]
        if self._called:
            text = text.lstrip()
        if not text:
            return []
        self._told, self._called = True, False
        return [("answer", text)]

    def _spelt(self, form: ToolFormat, final: bool) -> Iterator[Part]:
        """What is told by now of an answer whose calls begin with characters."""
        if not form.end:  # the whole of it is calls, or text
            begun = self._held.lstrip()
            maybe = not self._told and (not begun or begun[0] == "{" or begun.startswith(form.begin[: len(begun)]))
            if maybe and not final:
                return
            calls = form.read([("", begun.removeprefix(form.begin))]) if maybe else None
            yield from self._calls(calls) if calls else self._tell(len(self._held))
            return
        while form.begin in self._held:
            start = self._held.index(form.begin)
            end = self._held.find(form.end, start)
            if end < 0:
                if not final:
                    yield from self._tell(len(self._held[:start].rstrip()))
                return
            after = self._held[end + len(form.end) :]
            calls = form.read([(form.begin, self._held[start + len(form.begin) : end])])
            if calls is None:
                yield from self._tell(end + len(form.end))
            else:
                yield from self._tell(len(self._held[:start].rstrip()))
                yield from self._calls(calls)
            self._held = after
        if not final:
            safe = len(self._held) - beginning(self._held, form.begin)
            yield from self._tell(len(self._held[:safe].rstrip()))
