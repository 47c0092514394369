"""Chat templates: DeepSeek-R1's, and the sandbox in which any model's Jinja template is rendered.

    pieces = render(R1_TEMPLATE, messages, control_tokens, bos_token="...", eos_token="...", add_generation_prompt=True)

`pieces` alternates text and control tokens: [text, token, text, token, ..., text]. What a message holds is always text, so a user who types
`<think>` or `<｜User｜>` writes characters, never a control token; `"".join(pieces)` is what `transformers` renders.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from slingshot.files import SlingshotError

# R1's layout (arXiv 2501.12948 and the model's own tokenizer): the opening <think> belongs to the prompt, and an earlier answer stands in the
# history without the reasoning that led to it. `thinking=False` primes an empty reasoning, as V3.1 does.
R1_TEMPLATE = """\
{{- bos_token }}
{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜>' + (message.content or '').split('</think>')[-1].lstrip('\\n') + eos_token }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('the role is ' ~ message.role ~ '; this template knows system, user and assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' + ('<think>\\n' if thinking is not defined or thinking else '</think>') }}
{%- endif %}
"""

MAX_CHARS = 16_000_000  # of a rendered chat, and of any text a template builds on the way: far beyond the longest context
MAX_SECONDS = 10.0

# Marks around what looks like a control token inside a message. Unicode sets these two aside for a program's own use; they are never text.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_NO_MARKS = {ord(_BEGIN): None, ord(_END): None}


def render(template: str, messages: Sequence[Mapping[str, Any]], control_tokens: Iterable[str], **variables: Any) -> list[str]:
    """Render a chat into alternating text and control tokens, text first and last.

    Only tokens the template itself writes count as control tokens. Messages are JSON values: at least {"role": str, "content": str} each.
    `variables` are what else the template may read (bos_token, add_generation_prompt, thinking ...). Raises SlingshotError when the messages are
    not JSON, or the template refuses them, fails, or exceeds MAX_CHARS or MAX_SECONDS.
    """
    tokens = _ControlTokens.of(frozenset(control_tokens))
    try:
        plain = json.loads(json.dumps(list(messages)))
    except (TypeError, ValueError, RecursionError) as error:
        raise SlingshotError(f"chat messages must be plain JSON, such as [{{'role': 'user', 'content': 'Hello'}}]: {error}") from error
    try:
        text = _compile(template).render(messages=tokens.mark(plain), tools=None, documents=None, **variables)
    except SlingshotError:
        raise
    except Exception as error:  # a template is foreign code: whatever it raises is its refusal
        reason = " ".join(str(error).split()).translate(_NO_MARKS) or type(error).__name__
        raise SlingshotError(f"the chat template could not render these messages: {reason}") from error
    return tokens.split(text)


class _ControlTokens:
    """Finds control tokens in text: marks them in messages, recognises the unmarked ones in what was rendered."""

    def __init__(self, tokens: frozenset[str]) -> None:
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._find = re.compile(token)
        self._find_unmarked = re.compile(f"{_BEGIN}(?:{token}){_END}|{_BEGIN}|{_END}|(?P<control>{token})")
        self._beginnings = tuple({token[:size] for token in tokens for size in range(1, len(token))})
        self._endings = tuple({token[size:] for token in tokens for size in range(1, len(token))})

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(tokens: frozenset[str]) -> _ControlTokens:
        return _ControlTokens(tokens)

    def mark(self, value: Any) -> Any:
        """Put marks around control tokens in every string of a JSON value.

        A lone mark goes where a string could become one together with its neighbours: two parts "<th" and "ink>" of one message, say.
        """
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        text = value.translate(_NO_MARKS)
        core = text.strip()  # templates trim: the lone mark must stay beside what it guards
        text = self._find.sub(lambda match: _BEGIN + match[0] + _END, text)
        if core.endswith(self._beginnings):
            at = len(text.rstrip())
            text = text[:at] + _END + text[at:]
        if core.startswith(self._endings):
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
        return [piece.translate(_NO_MARKS) for piece in pieces]


class _Template:
    """A compiled template whose rendering is bounded."""

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        tree = _Bound().visit(self._environment.parse(source))
        self._template = self._environment.template_class.from_code(
            self._environment, self._environment.compile(tree), self._environment.make_globals(None)
        )

    def render(self, **variables: Any) -> str:
        self._environment.clock.deadline = time.monotonic() + MAX_SECONDS
        chunks, size = [], 0
        for chunk in self._template.generate(**variables):
            size += len(chunk)
            self._environment.check(size)
            chunks.append(chunk)
        return "".join(chunks)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> _Template:
    return _Template(source)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as `transformers` sets it up for chat templates, with bounds on time and size.

    Time is looked at wherever a template can repeat itself: each turn of a loop, each call. Size is, wherever text is repeated, joined or
    written out.
    """

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.clock = threading.local()
        self.filters |= {"tojson": _tojson, "trim": lambda value, chars=None: _strip(str(value), "strip", chars), _TIMED: _timed, _SIZED: _sized}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda format: datetime.now().strftime(format)}

    def check(self, size: int = 0) -> None:
        if size > MAX_CHARS:
            raise SlingshotError(f"the chat template makes more than {MAX_CHARS} characters; shorten the chat or mend the template")
        if time.monotonic() > self.clock.deadline:
            raise SlingshotError(f"the chat template takes more than {MAX_SECONDS:g} s; shorten the chat or mend the template")

    # The names are jinja2's, out of the way of whatever keywords a template passes.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.check()
        if isinstance(text := getattr(__obj, "__self__", None), str) and __obj.__name__ in ("strip", "lstrip", "rstrip"):
            return _strip(text, __obj.__name__, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TemplateError("powers are not part of a chat template")
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            self.check(left * _extent(right) if isinstance(left, int) else _extent(left) * right)
        result = super().call_binop(context, operator, left, right)
        self.check(_extent(result))
        return result


def _extent(value: Any) -> int:
    """How large a text, list or whole number is; 1 for anything else."""
    return len(value) if isinstance(value, str | list | tuple) else value.bit_length() if isinstance(value, int) else 1


_TIMED, _SIZED = "slingshot_timed", "slingshot_sized"


class _Bound(NodeTransformer):
    """Puts a watch on every loop and every joining of text."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _TIMED, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(node, _SIZED, [], [], None, None, lineno=node.lineno)


@pass_context
def _timed(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    check: Callable[[], None] = context.environment.check  # type: ignore[attr-defined]
    for item in items:
        check()
        yield item


@pass_context
def _sized(context: Context, text: str) -> str:
    context.environment.check(len(text))  # type: ignore[attr-defined]
    return text


class _Generation(Extension):
    """The `{% generation %}` block of templates that mark what the assistant wrote: its body, as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _strip(text: str, side: str, chars: str | None = None) -> str:
    """str.strip, lstrip or rstrip as if there were no marks: one whose token was cut off, as by a split at </think>, goes with what is stripped."""
    before = None
    while text != before:
        before = text
        if side != "rstrip":
            text = text.lstrip(chars).lstrip(_END)
        if side != "lstrip":
            text = text.rstrip(chars).rstrip(_BEGIN)
    return text


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
