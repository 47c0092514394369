"""Calls of functions in what a model writes, parted from its reasoning and its answer.

    stream = ToolCallStream(tokenizer, opened, tool_format(tokenizer))
    for id in ids:
        for part in stream.push(id): ...     # ("reasoning", text), ("answer", text) or CallDelta(arguments, name)
    parts = stream.finish()

Where a format's tags are tokens of the vocabulary, only those ids begin a call, in the reasoning as well as after it,
and the same characters spelt otherwise are text; elsewhere the characters do, in the answer alone. It is a call from
the first brace of its arguments on, and what it grew by is not taken back; before that brace it is text as it stands.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from slingshot.text.reasoning import Delta, ReasoningStream, beginning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolFormat


@dataclass(frozen=True)
class CallDelta:
    """What a call grew by. name: of one that begins. whole: its arguments have ended as an object does."""

    arguments: str
    name: str | None = None
    whole: bool = False


Part = Delta | CallDelta


class _JsonObject:
    """Finds where an object that is read in pieces ends, or what is none begins."""

    def __init__(self) -> None:
        self._depth, self._string, self._escaped = 0, False, False
        self.whole = self.broken = False

    def push(self, text: str) -> int:
        """How much of the text belongs to it."""
        for place, char in enumerate(text):
            if self._string:
                self._string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self.whole = True
                    return place + 1
            elif char == "<":
                self.broken = True
                return place
        return len(text)


class _Section:
    """A section of calls from its first tag on. What is no call is not lost: `held` has it, ids or texts."""

    def __init__(self, form: ToolFormat, first: list[int | str]) -> None:
        self._form, self.held = form, first
        self._text = ""  # since the first tag, or the last call
        self._object: _JsonObject | None = None
        self._called = False

    @property
    def in_arguments(self) -> bool:
        return self._object is not None

    def arguments(self, text: str) -> tuple[list[CallDelta], int]:
        """What a text adds to the arguments that are open, and how much of it does."""
        assert self._object is not None
        its = self._object
        size = its.push(text)
        if its.whole or its.broken:
            self._object = None
        return [CallDelta(text[:size], whole=its.whole)] if size else [], size

    def push(self, item: int | str, text: str, tag: str | None) -> list[CallDelta] | None:
        """What is new; None where the section ends: `held` is then to be told as text."""
        told: list[CallDelta] = []
        if self._object is not None and tag is None:
            told, size = self.arguments(text)
            text = text[size:]
            if self.in_arguments or not text:
                return told
            item = text if isinstance(item, str) else item
        self._object = None
        self._text += tag or text
        self.held.append(item)
        if tag and tag == self._form.end:
            return None
        if begun := self._form.head.match(self._text):
            name, rest = str(begun[begun.lastindex or 0]), self._text[begun.end() :]
            self._object, self._text, self.held, self._called = _JsonObject(), "", [], True
            deltas, size = self.arguments(rest)
            self._text = rest[size:]
            return [*told, CallDelta(deltas[0].arguments, name, deltas[0].whole)]
        if self._called and not self._form.between.fullmatch(self._text):
            return told or None
        return told

    def rest(self) -> list[CallDelta]:
        """The section is over: its calls that could not be told before. Without any, what is `held` is text."""
        text = self._text.removesuffix(self._form.end) if self._form.end else self._text
        if self._called:
            if self._form.layout.fullmatch(text[: len(text) - beginning(text, self._form.end)]):
                self.held = []
            return []
        calls = self._form.read(text)
        if calls:
            self.held = []
        return [CallDelta(call.arguments, call.name, whole=True) for call in calls or ()]


class ToolCallStream:
    """Parts an output while it is written, like ReasoningStream, whose deltas it passes on. No format: only those.

    White space of the answer beside a call is layout, and dropped.
    """

    def __init__(self, tokenizer: Tokenizer, opened: bool, tools: ToolFormat | None) -> None:
        self.reasoning = ReasoningStream(tokenizer, opened)
        self._format, self._new_text = tools, tokenizer.stream
        names = (tools.begin, tools.end, *tools.inner) if tools else ()
        self._tags = {id: name for name in names if name and (id := tokenizer.control_id(name)) is not None}
        self._by_id = tools is not None and tools.begin in self._tags.values()
        self._thinks = {tokenizer.think_id, tokenizer.end_think_id} - {None}
        self._section: _Section | None = None
        self._ids = False  # the section is one of ids
        self._text = tokenizer.stream()  # of its ids
        # Of the answer: white space that a call may follow; what may be a call, where characters begin it.
        self._held = ""
        self._told = self._called = False  # some of the answer; a call since then

    @property
    def calling(self) -> bool:
        """Whether a section was begun and not ended."""
        return self._section is not None

    def push(self, id: int) -> list[Part]:
        tag = self._tags.get(id)
        if self._section is not None and self._ids and self._format is not None:
            if id in self._thinks:
                return self._leave() + self.push(id)
            text = "" if tag else self._text.push(id)
            deltas = self._section.push(id, text, tag)
            return self._leave() if deltas is None else self._grow(deltas)
        if tag and self._format and tag == self._format.begin:
            self._section, self._ids, self._text = _Section(self._format, [id]), True, self._new_text()
            return []
        return self._pass_on(self.reasoning.push(id), final=False)

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._section is not None and self._ids:
            if self._section.in_arguments and (text := self._text.finish()):
                parts += self._grow(self._section.arguments(text)[0])
            parts += self._leave()
        return parts + self._pass_on(self.reasoning.finish(), final=True)

    def _leave(self) -> list[Part]:
        """The section of ids is over."""
        assert self._section is not None
        section, self._section = self._section, None
        calls = self._grow(section.rest())
        deltas = [delta for id in section.held for delta in self.reasoning.push(id)]
        return calls + self._pass_on(deltas, final=False)

    def _grow(self, deltas: list[CallDelta]) -> list[Part]:
        if deltas:
            self._held, self._called = "", True
        return list(deltas)

    def _pass_on(self, deltas: list[Delta], final: bool) -> list[Part]:
        if self._format is None:
            return list(deltas)
        parts: list[Part] = [delta for delta in deltas if delta[0] == "reasoning"]
        self._held += "".join(text for kind, text in deltas if kind == "answer")
        spelt = not self._by_id or not self._format.end
        if spelt and (self._held or self._section is not None):
            parts += self._spelt(self._format, final)
        kept = len(self._held) - len(self._held.rstrip()) if self._by_id and not final else 0
        waits = self._section is not None or (spelt and not self._by_id and not final)
        return parts if waits else parts + self._tell(len(self._held) - kept)

    def _tell(self, size: int) -> list[Part]:
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
        while True:
            if self._section is None and not self._begins(form):
                break
            if self._section is None:
                start = self._held.index(form.begin) if form.end else 0
                yield from self._tell(len(self._held[:start].rstrip()))
                first = form.begin if form.end else ""
                self._held = self._held.lstrip().removeprefix(first)
                self._section, self._ids = _Section(form, [first]), False
            if not (yield from self._read(self._section, form, final)):
                return
        if not final:
            kept = beginning(self._held, form.begin) if form.end else 0
            if form.end or self._held.strip() or self._told:
                yield from self._tell(len(self._held[: len(self._held) - kept].rstrip()))

    def _begins(self, form: ToolFormat) -> bool:
        return form.begin in self._held if form.end else not self._told and self._held.lstrip()[:1] == "{"

    def _read(self, section: _Section, form: ToolFormat, final: bool) -> Generator[Part, None, bool]:
        """Go on with a section of characters; whether it ended."""
        while self._held:
            text, tag = self._held, None
            if section.in_arguments:
                deltas, size = section.arguments(text)
                held = text[size:]
                yield from self._grow(deltas)
                self._held = held
                continue
            tags = [its for its in (form.end, *form.inner) if its]
            place, first = min(((at, its) for its in tags if (at := text.find(its)) >= 0), default=(-1, ""))
            if place == 0:
                text = tag = first
            elif place > 0:
                text = text[:place]
            elif tags and not final:
                text = text[: len(text) - max(beginning(text, its) for its in tags)]
                if not text:
                    return False
            held = self._held[len(text) :]
            found = section.push(text, text, tag)
            if found is None:
                break
            yield from self._grow(found)
            self._held = held
        else:
            if not final:
                return False
            held = ""
        yield from self._grow(section.rest())
        self._section = None
        rest = "".join(map(str, section.held))
        self._held = rest
        yield from self._tell(len(rest) if rest.strip() else 0)
        self._held = held
        return True
