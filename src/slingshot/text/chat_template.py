"""Chat templates: DeepSeek-R1's, and rendering a chat in any model's, with what is said kept apart from control tokens.

    controls = ControlTokens(["<think>", ...])
    pieces = render(R1_TEMPLATE, messages, controls, {"bos_token": "...", "eos_token": "..."})

`pieces` alternates text and control tokens: [text, token, ..., text]. What messages, tools and documents hold is text,
so a user who types `<think>` or `<｜User｜>` writes characters; `"".join(pieces)` is what `transformers` renders.

How the two are told apart: what looks like a control token in a message gets a mark between its characters, one private
character that this chat does not hold. What is a control token in the rendered text is then the template's own. In a
reply the tags of its reasoning are left as they are, for templates cut there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.text.template import render_template

# R1's layout (arXiv 2501.12948 and the model's own tokenizer): the opening <think> belongs to the prompt, an earlier
# answer stands without its reasoning. `thinking=False` primes an empty reasoning, as V3.1 does. R1 knows no tools.
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
        {{- raise_exception('a message has the role ' ~ message.role ~ \
(' and tool calls' if message.tool_calls else '') ~
            '; this template knows system, user and assistant, and no tools') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' + ('<think>\\n' if thinking is not defined or thinking else '</think>') }}
{%- endif %}
"""

# For models that call tools: R1's layout, calls and outputs of V3.1's template, and V3.2's rule for reasoning: it is
# kept from the last question on, while tools are called, and left out before.
TOOL_TEMPLATE = (
    R1_TEMPLATE.partition("{%- if tools %}")[0]
    + """\
{%- set seen = namespace(question=-1, output=false) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set seen.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages | selectattr('role', 'equalto', 'system') %}
    {{- ('' if loop.first else '\\n\\n') + text(message.content) }}
{%- endfor %}
{%- for tool in tools or [] %}
    {%- if loop.first %}
        {{- ('\\n\\n' if messages | selectattr('role', 'equalto', 'system') | list else '') + '## Tools\\n' }}
    {%- endif %}
    {{- '\\n### ' + tool.function.name + '\\n' + tool.function.description + '\\nParameters: ' +
        tool.function.parameters | tojson + '\\n' }}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + text(message.content) }}
        {%- set seen.output = false %}
    {%- elif message.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + text(message.content) + '<｜tool▁output▁end｜>' }}
        {%- set seen.output = true %}
    {%- elif message.role == 'assistant' %}
        {{- '' if seen.output else '<｜Assistant｜>' }}
        {%- set seen.output = false %}
        {%- if loop.index0 > seen.question and message.reasoning_content is string %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text(message.content or '').split('</think>')[-1] }}
        {%- for call in message.tool_calls or [] %}
            {%- set arguments = call.function.arguments %}
            {{- ('<｜tool▁calls▁begin｜>' if loop.first else '') + '<｜tool▁call▁begin｜>' + call.function.name +
                '<｜tool▁sep｜>' + (arguments if arguments is string else arguments | tojson) + '<｜tool▁call▁end｜>' +
                ('<｜tool▁calls▁end｜>' if loop.last else '') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('a message has the role ' ~ message.role ~
            '; this template knows system, user, assistant and tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ('' if seen.output else '<｜Assistant｜>') +
        ('<think>\\n' if thinking is not defined or thinking else '</think>') }}
{%- endif %}
"""
)

THINK, END_THINK = "<think>", "</think>"

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG"  # transformers' word; some templates look for it
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what a message's reasoning is called
_PRIVATE = range(0xF0000, 0xFFFFE)
_EXAMPLE = "{'role': 'user', 'content': 'Hello'}"


def render(
    template: str, messages: Sequence[Mapping[str, Any]], controls: ControlTokens,
    special_tokens: Mapping[str, str] | None = None, *,
    add_generation_prompt: bool = False, continue_final_message: bool = False, **variables: Any,
) -> list[str]:  # fmt: skip
    """Render a chat into alternating text and control tokens, text first and last.

    messages: JSON values, at least {"role": str, "content": str} each. special_tokens: {"bos_token": "..."} and the
    like, the template's own. variables: what else the template may read (tools, documents, thinking ...).
    continue_final_message leaves the last message open, for the model to go on with it.

    Raises SlingshotError when the messages are not JSON, or the template refuses them, fails or takes too much.
    """
    if add_generation_prompt and continue_final_message:
        chosen = "leave out add_generation_prompt or continue_final_message"
        raise SlingshotError(f"a chat either continues its last message or begins a reply; {chosen}")
    chat, held = _plain_json({"tools": None, "documents": None, **variables, "messages": _messages(messages)})
    held += template
    mark = next(mark for mark in map(chr, _PRIVATE) if not any(form in held for form in _forms(mark)))
    said = {key: value if key == "messages" else controls.mark(value, mark) for key, value in chat.items()}
    said["messages"] = [controls.mark_message(message, mark) for message in chat["messages"]]
    last = _open_last(said["messages"]) if continue_final_message else ""
    own = {"add_generation_prompt": add_generation_prompt, **(special_tokens or {})}
    try:
        text = render_template(template, {**own, **said}, trusted=template in (R1_TEMPLATE, TOOL_TEMPLATE))
    except SlingshotError as error:
        raise SlingshotError(_unmarked(str(error), mark)) from error
    if continue_final_message:
        before, tag, after = text.rpartition(_CONTINUE)
        if not tag or last.strip() not in text:
            raise SlingshotError("the chat template leaves a part of the last message away, so it cannot be continued")
        text = before if after.startswith(" ") else before.rstrip()  # a template that trims took the space away
    return controls.split(text, mark)


def clean(text: str) -> str:
    """Replace lone surrogates, which JSON can carry and UTF-8 cannot, by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template, with their reasoning under every name."""
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise SlingshotError(f"a chat is a list of messages, each an object such as {_EXAMPLE}")
    named = [dict(message) for message in messages]
    for message in named:
        if told := [message[name] for name in _REASONING if message.get(name) is not None]:
            message["reasoning_content"] = told[0]
            message["thinking"] = told[0] if message.get("thinking") is None else message["thinking"]
    return named


def _plain_json(value: Any) -> tuple[Any, str]:
    """A value as JSON carries it, and its JSON."""
    try:
        text = clean(json.dumps(value, ensure_ascii=False))
        return json.loads(text), text
    except (TypeError, ValueError, RecursionError) as error:
        raise SlingshotError(f"chat messages and tools must be plain JSON, such as {_EXAMPLE}: {error}") from error


def _open_last(messages: list[dict[str, Any]]) -> str:
    """Put a tag at the end of the last message and give its text. The space after it tells whether a template trims."""
    last = messages[-1] if messages else {}
    content, key = last.get("content"), "content"
    if isinstance(content, list):
        texts = [part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        last, key = texts[-1] if texts else {}, "text"
    text = last.get(key)
    if not isinstance(text, str):
        raise SlingshotError("the last message holds no text that could be continued")
    last[key] = f"{text}{_CONTINUE} "
    return text


def _forms(mark: str) -> list[str]:
    """A mark, and how Python and JSON spell it: a template may print a list, or escape what is not ASCII."""
    return [mark, ascii(mark)[1:-1], json.dumps(mark)[1:-1]]


def _unmarked(text: str, mark: str) -> str:
    for form in _forms(mark):
        text = text.replace(form, "")
    return text


class ControlTokens:
    """Finds control tokens in text, the longest where several begin: marks what is said, splits what was rendered."""

    def __init__(self, tokens: Iterable[str]) -> None:
        words = set(tokens) - {""}
        self._find = re.compile(_alternatives(words) or "(?!)")
        # A template may change the case of what is said.
        self._find_said = re.compile(self._find.pattern, re.IGNORECASE)
        self._beginnings = frozenset(word[:size].lower() for word in words for size in range(1, len(word)))
        self._endings = frozenset(word[size:].lower() for word in words for size in range(1, len(word)))
        self._longest = max(map(len, words), default=0)

    def split(self, text: str, mark: str) -> list[str]:
        """Rendered text as [text, control token, text, ...], the marks taken out."""
        pieces, start = [], 0
        for match in self._find.finditer(text):
            begin, end = match.span()
            if end - begin > 1 or text[begin - 1 : begin] != mark:  # a single character has its mark before it
                pieces += [_unmarked(text[start:begin], mark), match[0]]
                start = end
        return [*pieces, _unmarked(text[start:], mark)]

    def mark(self, value: Any, mark: str, reply: bool = False) -> Any:
        """A JSON value with marks in control tokens, and where a text could become one together with its neighbours.

        reply: it is what an assistant wrote, where the tags of its reasoning stay.
        """
        if isinstance(value, str):
            return self._mark_reply(value, mark) if reply else self._mark_text(value, mark)
        if isinstance(value, list):
            return [self.mark(item, mark, reply) for item in value]
        if isinstance(value, dict):  # names are left alone: templates ask for them most of the time
            names = {key: key if key.isidentifier() else self._mark_text(key, mark) for key in value}
            return {names[key]: self.mark(item, mark, reply) for key, item in value.items()}
        return value

    def mark_message(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        replies = message.get("role") == "assistant"
        return {key: self.mark(value, mark, replies and key == "content") for key, value in message.items()}

    def _mark_reply(self, text: str, mark: str) -> str:
        opening = re.match(rf"\s*{THINK}", text)
        start = opening.end() if opening else 0
        parts = text[start:].split(END_THINK)
        return text[:start] + END_THINK.join(self._mark_text(part, mark) for part in parts)

    def _mark_text(self, text: str, mark: str) -> str:
        lower = text.strip().lower()
        sizes = range(1, min(len(lower) + 1, self._longest))
        after = mark if any(lower[-size:] in self._beginnings for size in sizes) else ""
        before = mark if any(lower[:size] in self._endings for size in sizes) else ""
        text = self._find_said.sub(lambda match: f"{mark}{mark.join(match[0])}{mark}", text)
        core = text.strip()  # templates trim: a mark must stay beside what it guards
        return text.replace(core, f"{before}{core}{after}", 1)


def _alternatives(words: Iterable[str]) -> str:
    """A regular expression for the longest of many words; it reads each character once, however many begin alike."""
    rests: dict[str, set[str]] = {}
    for word in words:
        rests.setdefault(word[:1], set()).add(word[1:])
    optional = rests.pop("", None) is not None
    branches = "|".join(re.escape(first) + _alternatives(rest) for first, rest in rests.items())
    return f"(?:{branches}){'?' * optional}" if len(rests) > 1 or (optional and rests) else branches
