"""Functions that a client offers: checked as they come in, and earlier calls as templates read them.

    tools = read_tools(body["tools"])                    # OpenAI's {"type": "function", "function": {...}}
    asked = read_choice(body["tool_choice"], body["tools"], tools)      # fields of Question
    messages = with_arguments(messages, as_text=False)

Tools of a type that this server does not run (web_search and the like) are left out: clients send them unasked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slingshot.base.names import did_you_mean
from slingshot.serving.answer import AnsweredCall
from slingshot.serving.errors import ApiError
from slingshot.text.tool_formats import parsed_json

MOST_TOOLS = 128


def read_tools(given: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The functions among them, whether they stand in a "function" of their own (chat) or not (responses)."""
    if given is not None and len(given) > MOST_TOOLS:
        raise ApiError(400, f"tools: at most {MOST_TOOLS}, got {len(given)}", param="tools")
    tools = []
    for place, tool in enumerate(given or ()):
        where = f"tools.{place}"
        if not isinstance(tool, Mapping) or not isinstance(tool.get("type"), str):
            raise ApiError(400, f"{where}: a tool is an object with a type", param=where)
        if tool["type"] != "function":
            continue
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not re.fullmatch(r'[^\s"\\<>]{1,128}', name):
            what = "a function has a name of at most 128 characters, without white space, quotes and brackets"
            raise ApiError(400, f"{where}: {what}", param=where)
        kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        tools.append({"type": "function", "function": {"description": "", "parameters": _NOTHING} | kept})
    return tools


_NOTHING: dict[str, Any] = {"type": "object", "properties": {}}


def read_choice(given: Any, offered: Sequence[Any] | None, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is asked of calls, as fields of Question. offered: what `tools` were read from, `strict` among its keys."""
    known = [tool["function"]["name"] for tool in tools]
    functions = [tool.get("function", tool) for tool in offered or () if tool["type"] == "function"]
    asked: dict[str, Any] = {"strict": frozenset(its["name"] for its in functions if its.get("strict"))}
    if isinstance(given, Mapping):
        function = given.get("function", given)
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in known:
            message = f"tool_choice: no function {name!r:.80}; {did_you_mean(str(name), known)}"
            raise ApiError(400, message, param="tool_choice")
        return asked | {"tool_choice": "required", "function": name}
    if given not in (None, "auto", "none", "required"):
        message = f"tool_choice {given!r:.80} is none of auto, none, required"
        raise ApiError(400, message, param="tool_choice")
    if given == "required" and not tools:
        raise ApiError(400, "tool_choice required: there is no function to call; give `tools`", param="tool_choice")
    return asked | {"tool_choice": given or "auto"}


def told_call(call: AnsweredCall) -> dict[str, Any]:
    """A call as the chat API has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def with_arguments(messages: Sequence[Mapping[str, Any]], as_text: bool) -> list[dict[str, Any]]:
    """Messages whose calls have their arguments as the template wants them: JSON text, or an object."""
    told = []
    for place, message in enumerate(messages):
        its = dict(message)
        if calls := its.get("tool_calls"):
            where, calls = f"messages.{place}.tool_calls", calls if isinstance(calls, list) else [calls]
            made = [_with_arguments(call, as_text, where) for call in calls]
            its |= {"content": its.get("content") or "", "tool_calls": made}
        told.append(its)
    return told


def _with_arguments(call: Any, as_text: bool, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: a call has a function with a name and arguments", param=where)
    arguments = function.get("arguments") or "{}"
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        arguments = parsed_json(arguments, arguments)  # what a model wrote wrongly it is told as it wrote it
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
