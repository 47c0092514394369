"""Chat templates: DeepSeek-R1's, and rendering a chat in any model's, which keeps what is said apart from control tokens.

    pieces = render(R1_TEMPLATE, messages, control_tokens, {"bos_token": "...", "eos_token": "..."}, add_generation_prompt=True)

`pieces` alternates text and control tokens: [text, token, text, token, ..., text]. What a message (a tool, a document) holds is always text, so a
user who types `<think>` or `<｜User｜>` writes characters, never a control token; `"".join(pieces)` is what `transformers` renders.

How the two are told apart: what looks like a control token in a message gets marks around it, which travel with it through the template, and
the template's own tokens have none. To the template the text of a message (`_Said`) behaves as if it had no marks, and what is made of it is such
text again. Where a mark still shows, the outcome differs from that of a rendering without, and the chat is refused rather than rendered otherwise.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.text.jinja import METHODS, Joinable, Template

# R1's layout (arXiv 2501.12948 and the model's own tokenizer): the opening <think> belongs to the prompt, and an earlier answer stands in the
# history without the reasoning that led to it. `thinking=False` primes an empty reasoning, as V3.1 does. R1 was not made for tools.
R1_TEMPLATE = """\
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is undefined or content is mapping or content is not iterable %}
        {{- raise_exception('a message has no content; it must be text, or a list of parts') }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type != 'text' %}
                {{- raise_exception('a message holds a part of type ' ~ part.type ~ '; this model reads text only') }}
            {%- endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- raise_exception('tools were given; this model was not made for them') }}
{%- endif %}
{{- bos_token }}
{%- for message in messages | selectattr('role', 'equalto', 'system') %}
    {{- ('' if loop.first else '\\n\\n') + text(message.content) }}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + text(message.content) }}
    {%- elif message.role == 'assistant' and not message.tool_calls %}
        {{- '<｜Assistant｜>' + text(message.content or '').split('</think>')[-1] + eos_token }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('a message has the role ' ~ message.role ~ (' and tool calls' if message.tool_calls else '') ~
            '; this template knows system, user and assistant, and no tools') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' + ('<think>\\n' if thinking is not defined or thinking else '</think>') }}
{%- endif %}
"""

# Marks around what looks like a control token in a message. Lone surrogates: no text holds them, and `clean` has taken those away that JSON can
# carry. What a message that is to be continued ends in is transformers' word for it: some templates look for it.
_BEGIN, _END, _HERE = "\udc00", "\udc01", "\udc02"
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG"

_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # what a message's reasoning is called; templates read the first, some the second


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    control_tokens: Iterable[str],
    special_tokens: Mapping[str, str] | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> list[str]:
    """Render a chat into alternating text and control tokens, text first and last.

    messages: JSON values, at least {"role": str, "content": str} each; keys whose value is null count as missing. tools: JSON schemas of
    functions. special_tokens: {"bos_token": "..."} and the like, the template's own. variables: what else the template may read (thinking ...).
    continue_final_message leaves the last message open, for the model to go on with it.

    Raises SlingshotError when the messages are not JSON, or the template refuses them, fails or passes the bounds of data/jinja.py.
    """
    if add_generation_prompt and continue_final_message:
        raise SlingshotError(
            "a chat either continues its last message or begins a reply; leave out add_generation_prompt or continue_final_message"
        )
    given = {"tools": tools, "documents": documents, **variables}
    chat = _plain_json({"messages": _messages(messages), **given})
    last = _open_last(chat["messages"]) if continue_final_message else ""
    own = {"add_generation_prompt": add_generation_prompt, **(special_tokens or {})}
    try:
        tokens = _ControlTokens.of(frozenset(control_tokens))
        compiled = _compile(template)
        text = compiled.render(**{**own, **chat})
        marked = str.__str__(compiled.render(**{**own, **tokens.said(chat)}))  # with the marks in sight
    except SlingshotError:
        raise
    except Exception as error:  # a template is foreign code: whatever it raises is its refusal
        reason = _unmarked(" ".join(str(error)[:1000].split()))[:300] or type(error).__name__
        raise SlingshotError(f"the chat template could not render these messages: {reason}") from error
    if continue_final_message:
        if last.strip() not in text or _CONTINUE not in text:
            raise SlingshotError("the chat template leaves a part of the last message away, so it cannot be continued")
        text, marked = _cut(text), _cut(marked)
    if _unmarked(marked) != text:
        raise SlingshotError(
            "the chat template takes apart what looks like a control token in a message; write it another way there"
        )
    return tokens.split(marked)


def clean(text: str) -> str:
    """Replace lone surrogates, which JSON can carry and UTF-8 cannot, by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template: no nulls, reasoning under every name."""
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise SlingshotError(
            "a chat is a list of messages, each an object such as {'role': 'user', 'content': 'Hello'}"
        )
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for place, message in enumerate(present):
        if (reasoning := next((message[name] for name in _REASONING if name in message), None)) is not None:
            present[place] = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return present


def _plain_json(value: Any) -> Any:
    try:
        return json.loads(clean(json.dumps(value, ensure_ascii=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise SlingshotError(
            f"chat messages and tools must be plain JSON, such as [{{'role': 'user', 'content': 'Hello'}}]: {error}"
        ) from error


def _open_last(messages: list[dict[str, Any]]) -> str:
    """Put a mark at the end of the last message and give its text. The space after the mark tells whether the template trims messages."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    places = (
        [(part, "text") for part in content if isinstance(part, dict)]
        if isinstance(content, list)
        else [(last, "content")]
    )
    places = [(place, key) for place, key in places if isinstance(place.get(key), str)]
    if not places:
        raise SlingshotError("the last message holds no text that could be continued")
    place, key = places[-1]
    text: str = place[key]
    place[key] += _CONTINUE + " "
    return text


def _cut(text: str) -> str:
    """A rendered chat up to the mark in its last message."""
    before, _, after = text.rpartition(_CONTINUE)
    return before if after.startswith(" ") else before.rstrip()


def _unmarked(text: str) -> str:
    return text.replace(_BEGIN, "").replace(_END, "")


def _alternatives(words: Iterable[str]) -> str:
    """A regular expression for the longest of many words that reads each character once, however many words begin alike."""
    by_first: dict[str, list[str]] = {}
    for word in words:
        by_first.setdefault(word[:1], []).append(word)
    optional = by_first.pop("", None) is not None
    branches = []
    for alike in by_first.values():
        low, high = min(alike), max(alike)
        start = low[
            : next((at for at, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
        ]
        branches.append(re.escape(start) + _alternatives(word[len(start) :] for word in alike))
    return f"(?:{'|'.join(branches)}){'?' * optional}" if branches else ""


class _ControlTokens:
    """Finds control tokens in text: marks them in messages, recognises the unmarked ones in what was rendered."""

    def __init__(self, tokens: frozenset[str]) -> None:
        token = _alternatives(tokens - {""}) or "(?!)"
        self._find = re.compile(token)
        self._find_unmarked = re.compile(f"{_BEGIN}{token}{_END}|(?P<control>{token})")
        self._beginnings = frozenset(token[:size] for token in tokens for size in range(1, len(token)))
        self._endings = frozenset(token[size:] for token in tokens for size in range(1, len(token)))
        self._longest = max(map(len, tokens), default=0)

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(tokens: frozenset[str]) -> _ControlTokens:
        return _ControlTokens(tokens)

    def said(self, value: Any) -> Any:
        """A JSON value, or what a method of a text gave, with every text in it one that was said."""
        if isinstance(value, _Said):
            return value
        if isinstance(value, str):
            return _Said(_unmarked(value), self)
        if isinstance(value, list | tuple):
            return type(value)(map(self.said, value))
        if isinstance(value, dict):  # names are left alone: templates ask for them most of the time
            return {key if key.isidentifier() else self.said(key): self.said(item) for key, item in value.items()}
        return value

    def mark(self, text: str) -> str:
        """Put marks around control tokens.

        A lone mark goes where a text could become one together with its neighbours: two parts "<th" and "ink>" of one message, say.
        """
        core = text.strip()  # templates trim: the lone mark must stay beside what it guards
        text = self._find.sub(lambda match: _BEGIN + match[0] + _END, text)
        sizes = range(1, min(len(core) + 1, self._longest))
        if any(core[-size:] in self._beginnings for size in sizes):
            at = len(text.rstrip())
            text = text[:at] + _END + text[at:]
        if any(core[:size] in self._endings for size in sizes):
            at = len(text) - len(text.lstrip())
            text = text[:at] + _BEGIN + text[at:]
        return text

    def split(self, text: str) -> list[str]:
        """Rendered text as [text, control token, text, ...], the marks taken out."""
        pieces, start = [], 0
        for match in self._find_unmarked.finditer(text):
            if match["control"]:
                pieces += [text[start : match.start()], match["control"]]
                start = match.end()
        pieces.append(text[start:])
        return [_unmarked(piece) for piece in pieces]


class _Said(Joinable):
    """Text of a message, with marks in it. Its methods see it without and give texts of this kind; what copies its characters copies the marks."""

    _tokens: _ControlTokens

    def __new__(cls, plain: str, tokens: _ControlTokens) -> _Said:
        said = super().__new__(cls, tokens.mark(plain))
        said.plain, said._tokens = plain, tokens
        return said

    def like(self, value: Any) -> Any:
        return self._tokens.said(value)

    def joined(self, parts: list[str]) -> str:
        """Text of this kind again when no part brings anything of a control token from elsewhere; otherwise text with marks in it."""
        if all(isinstance(part, _Said) or part == _unmarked(part) == self._tokens.mark(part) for part in parts):
            return self.like("".join(part.plain if isinstance(part, _Said) else part for part in parts))
        return "".join(parts)

    def replace(self, old: str, new: str, count: int = -1) -> str:  # type: ignore[override]
        first, *others = self.like(self.plain.replace(_plain(old), _HERE, count).split(_HERE))
        return self.joined([first, *(part for other in others for part in (new, other))])

    def __add__(self, other: str) -> str:
        return NotImplemented if hasattr(other, "__html__") else self.joined([self, other])

    def __radd__(self, other: str) -> str:
        return self.joined([other, self])

    def __iter__(self) -> Iterator[str]:
        return iter(self.like([*self.plain]))

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return self.like(repr(self.plain))


def _plain(text: Any) -> Any:
    return text.plain if isinstance(text, _Said) else text


def _seen_without_marks(name: str) -> Callable[..., Any]:
    of_str = getattr(str, name)

    def method(self: _Said, *args: Any, **kwargs: Any) -> Any:
        return self.like(of_str(self.plain, *map(_plain, args), **kwargs))

    method.__name__ = name
    return method


_OPERATORS = [
    "__contains__",
    "__eq__",
    "__ge__",
    "__getitem__",
    "__gt__",
    "__hash__",
    "__le__",
    "__len__",
    "__lt__",
    "__mod__",
    "__mul__",
    "__ne__",
]
for _name in {*METHODS[str], *_OPERATORS, "__rmul__"} - {"format", "join", "replace"}:
    setattr(_Said, _name, _seen_without_marks(_name))


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    return Template(source)
