"""The protocol of a tool: what it is called, what it is for, which arguments it takes, and what it says.

    class Clock:
        name, description = "clock", "The time in a city."
        parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        def call(self, arguments): return "12:00"

    answer(Clock(), '{"city": "Tokyo"}')     # "12:00"; what fails is text too: "error: city is missing"

A model reads what a tool says, so whatever goes wrong is an observation and no exception.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any, Protocol

from slingshot.base.errors import SlingshotError

SECONDS = 10.0  # that a call may take
MOST = 16_384  # characters of an observation; what a model is told of it is bounded in tokens besides

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip


class ToolError(SlingshotError):
    """What a tool refuses, in words for the model."""


class Tool(Protocol):
    """parameters: a JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def call(self, arguments: dict[str, Any]) -> str:
        """What it says. Raises ToolError, with what was wrong with the arguments."""


def text_argument(name: str) -> dict[str, Any]:
    """The parameters of a tool that takes one text."""
    return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}


def schema(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates and APIs are told of it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def answer(tool: Tool, arguments: str) -> str:
    """What a tool says to arguments as a model spelt them, in JSON; an error is said too."""
    try:
        return shortened(tool.call(_checked(tool.parameters, arguments)))
    except ToolError as error:
        return failure(str(error))
    except RecursionError:
        return failure("the arguments are nested too deeply")
    except Exception as error:  # a tool of anybody's
        return failure(f"{tool.name} raised {type(error).__name__}: {error}")


def observation(call: Mapping[str, Any], said: str) -> dict[str, Any]:
    """The message of a chat in which a tool says something to a call of `tool_calls`."""
    return {"role": "tool", "content": said, "tool_call_id": call["id"], "name": call["function"]["name"]}


def failure(words: str) -> str:
    """An observation that says what went wrong, in one line."""
    return f"error: {' '.join(shortened(words, 500).split())}"


def shortened(text: str, most: int = MOST) -> str:
    """A text of at most `most` characters that says what was left out."""
    return text if len(text) <= most else f"{text[:most]}\n... ({len(text) - most:,} characters more)"


def _checked(parameters: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Arguments that have what is required and nothing that is unknown, each of its type."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ToolError(f"the arguments are no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ToolError(f"the arguments are an object, not {reprlib.repr(given)}")
    known = parameters.get("properties", {})
    if missing := [name for name in parameters.get("required", ()) if name not in given]:
        raise ToolError(f"{missing[0]} is missing; {_wanted(parameters)}")
    unknown = [] if parameters.get("additionalProperties") else [name for name in given if name not in known]
    if unknown:
        raise ToolError(f"{unknown[0]:.80} is unknown; {_wanted(parameters)}")
    for name, value in given.items():
        kinds = known.get(name, {}).get("type", ())
        kinds = [kinds] if isinstance(kinds, str) else kinds
        fits = any(
            isinstance(value, _TYPES.get(kind, object)) and (kind == "boolean") >= isinstance(value, bool)
            for kind in kinds
        )
        if kinds and not fits:
            raise ToolError(f"{name} is {' or '.join(kinds)}, not {reprlib.repr(value)}")
    return given


def _wanted(parameters: Mapping[str, Any]) -> str:
    names = ", ".join(parameters.get("properties", {})) or "none"
    return f"the arguments are: {names}"
