"""Chat templates rendered: Jinja as `transformers` sets it up, in a worker that is killed when it does not answer.

    text = render_template(source, {"messages": [...], "bos_token": "..."})

A template is foreign code. It sees JSON values, in jinja2's sandbox; the worker bounds time, memory and what it writes.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.worker import SandboxError, Target, Worker

MAX_SECONDS = 10.0  # for one chat
_RENDERER = Target("slingshot.text.template:TemplateRenderer", memory=1 << 30)

_one_at_a_time = threading.Lock()


def render_template(
    source: str, variables: Mapping[str, Any], trusted: bool = False, seconds: float = MAX_SECONDS
) -> str:
    """A template's text. `trusted` templates are rendered in this process.

    A message's key whose value is null counts as missing, unless the template asks whether it is none.
    Raises SlingshotError when the template is none, fails, refuses the messages, or takes too much.
    """
    if trusted:
        reply = _renderer(os.getpid()).render(source, variables)
    else:
        try:
            with _one_at_a_time:
                reply = _worker(os.getpid()).call(_RENDERER, "render", source, variables, timeout=seconds)
        except SandboxError as error:
            raise SlingshotError(f"the chat template {error}; shorten the chat or mend the template") from error
    if "text" not in reply:
        raise SlingshotError(f"the chat template could not render these messages: {reply['refused']}")
    return str(reply["text"])


class TemplateRenderer:
    """Compiles templates and renders them; the object inside the worker."""

    def __init__(self) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self._environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._environment.globals |= {"dict": lambda *args, **kwargs: dict(*args, **kwargs), "namespace": _Namespace}
        self._environment.filters["tojson"] = _tojson
        self._compile = functools.lru_cache(maxsize=16)(self._compiled)

    def render(self, source: str, variables: Mapping[str, Any]) -> dict[str, str]:
        """{"text": ...}, or {"refused": why}: what a template raises is its refusal."""
        try:
            template, asked = self._compile(source)
            messages = [
                {key: value for key, value in message.items() if value is not None or key in asked}
                for message in variables["messages"]
            ]
            return {"text": template.render({**variables, "messages": messages})}
        except Exception as error:
            return {"refused": " ".join(str(error)[:1000].split())[:300] or type(error).__name__}

    def _compiled(self, source: str) -> tuple[Template, set[str]]:
        """A template, and the names of which it asks whether they are none: `message['content'] is none`."""
        tree = self._environment.parse(source)
        tested = [test.node for test in tree.find_all(nodes.Test) if test.name == "none"]
        asked = {node.attr for node in tested if isinstance(node, nodes.Getattr)}
        keys = [node.arg for node in tested if isinstance(node, nodes.Getitem)]
        return self._environment.from_string(tree), asked | {key.value for key in keys if isinstance(key, nodes.Const)}


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant wrote: its body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's, without names that belong to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name that a template may use
        for name in dict(*args[1:], **kwargs):
            _public(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names of that kind belong to Python")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


# One for each process: a fork has its own.
_worker = functools.cache(lambda process: Worker())
_renderer = functools.cache(lambda process: TemplateRenderer())
