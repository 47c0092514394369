"""The sandbox in which a chat template runs: Jinja as `transformers` sets it up, with bounds on time, text and memory.

    template = Template(source)
    text = template.render(messages=[...], bos_token="...")

A template is foreign code. It sees JSON values and a short list of filters and methods, changes none of its inputs, reaches no attribute of
Python's, and whatever it raises, or spends too much, is an exception here. What it computes is metered: each turn of a loop and each call looks
at the clock, each new text or list counts against MAX_BYTES, and what could grow without a loop (repeating, joining, replacing, formatting) is
estimated before it is done.
"""

from __future__ import annotations

import json
import re
import string
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context, pass_environment
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from slingshot.base.errors import SlingshotError

MAX_SOURCE = 100_000  # characters of a template; the longest known ones have 20,000
MAX_CHARS = (
    5_000_000  # of a rendered chat, and of any text a template builds on the way: far beyond the longest context
)
MAX_BYTES = 64 * MAX_CHARS  # of everything built on the way
MAX_SECONDS = 10.0
_MAX_BITS = 1024  # of a whole number in arithmetic
_MAX_DEPTH = 200  # of lists in lists

# What a template may call on text, on dictionaries and on lists. All take time and space in proportion to what they are given, or are estimated.
_TEXT = [
    "capitalize",
    "casefold",
    "count",
    "endswith",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "islower",
]
_TEXT += [
    "isidentifier",
    "isnumeric",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
]
_TEXT += [
    "replace",
    "rfind",
    "rindex",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
]
METHODS: dict[type, list[str]] = {
    str: _TEXT,
    dict: ["copy", "get", "items", "keys", "values"],
    list: ["copy", "count", "index"],
}
METHODS[tuple] = ["count", "index"]
_FILTERS = [
    "abs",
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
]
_FILTERS += [
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "sort",
]
_FILTERS += ["string", "title", "trim", "unique", "upper"]
_CONTAINERS: Any = (list, tuple, dict, type({}.items()), type({}.keys()), type({}.values()))


class Template:
    """A compiled template. `render(**variables)` gives its text; raises SlingshotError past a bound, and what Jinja and the template raise."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise SlingshotError(
                f"the chat template has {len(source)} characters, more than {MAX_SOURCE}; mend the template"
            )
        self._environment = _Environment()
        self._environment.meter.start()
        tree = _Watch().visit(self._environment.parse(source))
        code = self._environment.compile(tree)
        self._template = self._environment.template_class.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, **variables: Any) -> str:
        self._environment.meter.start()
        try:
            return self._environment.concat(self._template.generate(**variables))
        finally:
            self._environment.meter.start()  # lets go of what was built


class _Meter(threading.local):
    """What the template now running in this thread has spent."""

    def start(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.spent = 0
        self.known: dict[
            int, tuple[Any, int, int]
        ] = {}  # id -> container (held, so that no other takes its id), bytes, depth

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise SlingshotError(
                f"the chat template takes more than {MAX_SECONDS:g} s; shorten the chat or mend the template"
            )

    def expect(self, characters: int) -> None:
        """Refuse to build a text that long."""
        if characters > MAX_CHARS:
            raise SlingshotError(
                f"the chat template makes more than {MAX_CHARS} characters; shorten the chat or mend the template"
            )

    def watch(self, value: Any) -> Any:
        """Count what was just made."""
        self.check()
        if isinstance(value, str):
            self.expect(len(value))
        elif isinstance(value, int):
            _small(value)
        else:
            self.weigh(value)
        self.spent += sys.getsizeof(value)
        if self.spent > MAX_BYTES:
            raise SlingshotError(
                f"the chat template needs more than {MAX_BYTES // 1_000_000} MB; shorten the chat or mend the template"
            )
        return value

    def weigh(self, value: Any) -> tuple[int, int]:
        """Bytes and depth of a value written out in full: what a list holds twice counts twice, as it would be printed or compared."""
        if not isinstance(value, _CONTAINERS):
            return sys.getsizeof(value), 0
        if id(value) not in self.known:
            self.check()
            size, depth = sys.getsizeof(value), 0
            for part in value:
                for child in (part, value[part]) if isinstance(value, dict) else (part,):
                    child_size, child_depth = self.weigh(child)
                    size, depth = size + child_size, max(depth, child_depth + 1)
                self.expect(size // 8)
            if depth > _MAX_DEPTH:
                raise SlingshotError(
                    f"the chat template nests lists more than {_MAX_DEPTH} deep; shorten the chat or mend the template"
                )
            self.known[id(value)] = (value, size, depth)
        return self.known[id(value)][1:]


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize, extensions=extensions
        )
        self.meter = _Meter()
        self.filters = {name: _metered(name, FILTERS[name]) for name in _FILTERS}
        self.filters |= {
            "join": _join,
            "replace": _replace,
            "safe": _safe,
            "tojson": _tojson,
            _TIMED: _timed,
            _WATCHED: _watched,
        }
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")}
        self.globals |= {"dict": lambda *args, **kwargs: dict(*args, **kwargs), "namespace": _Namespace}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, methods in METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return type(obj).__module__ in (
            "jinja2.runtime",
            "jinja2.utils",
            __name__,
        )  # loop, caller, cycler, namespace ...

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None or value.__name__ != "format":
            return None  # and `format_map` is none of METHODS

        def bounded(*args: Any, **kwargs: Any) -> str:
            fields = [(name, spec) for _, name, spec, _ in string.Formatter().parse(value.__self__) if name is not None]
            if any("{" in (spec or "") for _, spec in fields):
                raise TemplateError("a width taken from an argument is not part of a chat template")
            self._expect_format(value.__self__, " ".join(spec or "" for _, spec in fields), len(fields), (args, kwargs))
            return wrapped(*args, **kwargs)

        bounded.__name__ = "format"
        return bounded

    # The names are jinja2's, out of the way of whatever keywords a template passes.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.meter.check()
        name = __obj.__name__ if isinstance(__obj, types.BuiltinMethodType | types.MethodType) else ""
        owner = __obj.__self__ if name else None
        if isinstance(owner, str):
            if name == "join":
                return __self.join(owner, *args)
            if name == "replace":
                __self.expect_replace(owner, *args)
            elif name.startswith("r") and args and isinstance(args[0], str):
                __self.meter.expect(
                    len(owner) * len(args[0]) // 1000
                )  # searching from the right is slow for long needles
        result = super().call(__context, __obj, *args, **kwargs)
        return result if name == "get" or isinstance(__obj, Macro) else __self.meter.watch(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TemplateError("powers are not part of a chat template")
        if isinstance(left, int) and isinstance(right, int):
            _small(left)
            _small(right)
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            times, value = (left, right) if isinstance(left, int) else (right, left)
            self.meter.expect(times * max(1, len(value) if isinstance(value, str) else self.meter.weigh(value)[0] // 8))
        elif operator == "%" and isinstance(left, str):
            if re.search(r"%(\([^)]*\))?[-+ #0-9.]*\*", left):
                raise TemplateError("a width taken from an argument is not part of a chat template")
            self._expect_format(left, left, left.count("%"), right)
        return self.meter.watch(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a template writes: the whole of it, a macro's part or a block's."""
        texts, size = [], 0
        for part in parts:
            size += len(part)
            self.meter.expect(size)
            texts.append(part)
        self.meter.check()
        joined = next((part.joined for part in texts if isinstance(part, Joinable)), "".join)
        return self.meter.watch(joined(texts))

    def join(self, separator: str, items: Iterable[Any]) -> str:
        def parts() -> Iterator[str]:
            for number, item in enumerate(items):
                if number:
                    yield separator
                yield item if isinstance(item, str) else str(item)

        return self.concat(parts())

    def expect_replace(self, text: str, old: str, new: str, count: int = -1) -> None:
        self.meter.expect(len(text) + text.count(old) * len(new))

    def _expect_format(self, text: str, widths: str, fields: int, args: Any) -> None:
        if re.search("[0-9]{4}", widths):
            raise TemplateError("a width of more than 999 is not part of a chat template")
        self.meter.expect(len(text) + fields * (self.meter.weigh(args)[0] + 999))


class Joinable(str):
    """A kind of text that stays of its kind.

    plain       its characters, as an ordinary text
    joined      what all the parts make that are put together, this one among them
    like        what was made of this text (a text, or a list of texts): of this kind too
    """

    plain: str

    def joined(self, parts: list[str]) -> str:
        raise NotImplementedError

    def like(self, value: Any) -> Any:
        raise NotImplementedError


class _Namespace(Namespace):
    """Jinja's, as transformers restricts it: no names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # what it holds may be large, and reachable in many ways
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant wrote: its body, in a scope of its own. And a look at the clock while parsing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for token in stream:
            self.environment.meter.check()  # type: ignore[attr-defined]
            yield token


class _Watch(NodeTransformer):
    """Puts the meter on every loop, and on what makes texts and lists without a call."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _through(_TIMED, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _through("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _through(_WATCHED, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return _through(_WATCHED, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return _through(_WATCHED, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _through(_WATCHED, node) if node.ctx == "load" else node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise TemplateError("autoescape is not part of a chat template")


_TIMED, _WATCHED = "slingshot_timed", "slingshot_watched"


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _timed(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    check: Callable[[], None] = context.environment.meter.check  # type: ignore[attr-defined]
    for item in items:
        check()
        yield item


@pass_context
def _watched(context: Context, value: Any) -> Any:
    return context.environment.meter.watch(value)  # type: ignore[attr-defined]


@pass_environment
def _finalize(environment: _Environment, value: Any) -> str:
    return value if isinstance(value, str) else environment.meter.watch(str(value))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters under the meter. What it would yield piece by piece is made at once, and so counted; it can still be read only once."""
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        environment: Any = context.environment
        environment.meter.check()
        if name == "format":
            return environment.call_binop(context, "%", str(value), kwargs or args)
        if name == "indent":
            width = args[0] if args else kwargs.get("width", 4)
            environment.meter.expect((str(value).count("\n") + 2) * (len(width) if isinstance(width, str) else width))
        first = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (environment,)}.get(
            wants.name if wants else "", ()
        )
        plain, like = (value.plain, value.like) if isinstance(value, Joinable) else (value, lambda result: result)
        result = function(*first, plain, *args, **kwargs)
        if isinstance(result, Iterator):
            return iter(environment.meter.watch(like(list(_timed(context, result)))))
        return value if result is plain else environment.meter.watch(like(result))

    return metered


@pass_context
def _join(context: Context, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    environment: Any = context.environment
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return environment.join(str(d), value)


@pass_context
def _replace(context: Context, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    environment: Any = context.environment
    environment.expect_replace(str(s), str(old), str(new))
    return environment.meter.watch(str(s).replace(str(old), str(new), -1 if count is None else count))


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int):
        indent = " " * min(indent, 1000)
    for text in (indent, *(separators or ())):
        _short(text or "", 100)
    encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    text = context.environment.concat(encoder.iterencode(value))
    text = _ascii(text) if ensure_ascii else text
    return next(
        (part.like(text) for part in _texts(value) if isinstance(part, Joinable)), text
    )  # what is said is still said


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value:
            yield from _texts(part)
            if isinstance(value, dict):
                yield from _texts(value[part])


def _safe(value: Any) -> str:
    return value if isinstance(value, Joinable) else Markup(value)


def _ascii(text: str) -> str:
    """JSON with all but ASCII escaped; lone surrogates, which no text holds and a caller may use as marks, stay."""
    return re.sub("[\x7f-\ud7ff\ue000-\U0010ffff]", lambda match: json.dumps(match[0])[1:-1], text)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(_short(format, 1000))


def _short(text: str, length: int) -> str:
    if len(text) > length:
        raise TemplateError(f"a text of {len(text)} characters where {length} would be many")
    return text


def _small(number: int) -> None:
    if number.bit_length() > _MAX_BITS:
        raise TemplateError(f"whole numbers beyond {_MAX_BITS} bits are not part of a chat template")


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace cannot hold {name!r}: names of that kind belong to Python")
