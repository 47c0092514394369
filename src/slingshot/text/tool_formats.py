"""How families of models write calls of functions: DeepSeek, Kimi K2, Qwen, Hermes, Llama. No torch.

form = tool_format(tokenizer)        # of the model whose chat template it is; None where that knows no tools
form.head.match(section)             # its group: the name of a call whose arguments begin there
form.read(section)                   # calls of a section that has no such head
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from slingshot.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolCall:
    """arguments: an object in JSON, as the model spelt it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls: a section between two tags, and within it tags of its own.

    head: what stands before a call's arguments, its name in it; layout: what may stand behind them, between: and also
    how the next call begins. read: calls of a section that has no such head, None where there are none.
    call: how one is spelt, with NAME and ARGUMENTS in it, and DIGITS where calls are numbered; apart: what stands
    between two, None: there is one at most. sign: by what a template is known. as_text: it wants the arguments of
    earlier calls as JSON text, not as an object.
    """

    name: str
    begin: str
    end: str
    inner: tuple[str, ...]
    head: re.Pattern[str]
    layout: re.Pattern[str]
    between: re.Pattern[str]
    read: Callable[[str], list[ToolCall] | None]
    call: str
    apart: str | None = ""
    sign: str = ""
    as_text: bool = False


def _checked(name: str, arguments: str) -> ToolCall | None:
    """The call, if its name is one and its arguments are an object."""
    whole = isinstance(parsed_json(arguments), dict)
    return ToolCall(name, arguments.strip()) if whole and name and not re.search(r"\s", name) else None


def parsed_json(text: str, otherwise: object = None) -> object:
    """A text as JSON; `otherwise` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


_XML_CALL = re.compile(r"\s*<function=([^>\s]+)>\n?(.*?)</function>\s*", re.DOTALL)
_XML_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _hermes(text: str) -> list[ToolCall] | None:
    """One call: JSON with name and arguments, or Qwen3-Coder's function and parameter tags."""
    if found := _XML_CALL.fullmatch(text):
        parameters = _XML_PARAMETER.findall(found[2])
        if "".join(_XML_PARAMETER.sub("", found[2]).split()):
            return None
        values = {name: parsed_json(value, value) for name, value in parameters}  # plain words are no JSON
        return [ToolCall(found[1], json.dumps(values, ensure_ascii=False))]
    call = _object_call(text)
    return None if call is None else [call]


def _object_call(text: str) -> ToolCall | None:
    """{"name": ..., "arguments" or "parameters": {...}}."""
    found = parsed_json(text)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        return _checked(found["name"], arguments)
    return _checked(found["name"], json.dumps(arguments, ensure_ascii=False))


def _llama(text: str) -> list[ToolCall] | None:
    """JSON calls, one behind the other, with semicolons between them or none."""
    rest, calls, decoder = text.strip(), list[ToolCall](), json.JSONDecoder()
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


def _reader(layout: str, begin: str, head: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """head, layout and between of a ToolFormat; begin: how each call in a section does."""
    between = f"{layout}(?:{begin}.*)?" if begin else layout
    return re.compile(layout + begin + head + r"\s*(?=\{)"), re.compile(layout), re.compile(between, re.DOTALL)


def _tagged(begin: str, middle: str, end: str, name: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    return _reader(rf"[\s`}}]*(?:{re.escape(end)}\s*)?", re.escape(begin), name.replace("SEP", re.escape(middle)))


_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
_NAMED = r'\s*"name"\s*:\s*"([^"\\\s]+)"\s*,\s*"(?:arguments|parameters)"\s*:'
_OF_DEEPSEEK = _tagged(*_DEEPSEEK, r"\s*(?:functionSEP(\S+)\n```json\n|(\S+?)\s*SEP)")  # V3's, and V3.1's
_OF_KIMI = _tagged(*_KIMI, r"\s*(?:functions\.)?(\S+?)(?::\d+)?\s*SEP")  # all calls of these two have heads
_OF_HERMES = _reader(r"[\s}]*", "", r"\{" + _NAMED)
_OF_LLAMA = _reader(r"[\s};]*", r"\{", r'(?:\s*"type"\s*:\s*"function"\s*,)?' + _NAMED)
FORMATS = (
    ToolFormat("deepseek-v3", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _DEEPSEEK, *_OF_DEEPSEEK,
               lambda _: None, "{}function{}NAME\n```json\nARGUMENTS\n```{}".format(*_DEEPSEEK), "\n", "```json",
               as_text=True),
    ToolFormat("deepseek", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _DEEPSEEK, *_OF_DEEPSEEK,
               lambda _: None, "{}NAME{}ARGUMENTS{}".format(*_DEEPSEEK), as_text=True),
    ToolFormat("kimi", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _KIMI, *_OF_KIMI,
               lambda _: None, "{}functions.NAME:DIGITS{}ARGUMENTS{}".format(*_KIMI)),
    ToolFormat("qwen-coder", "<tool_call>", "</tool_call>", (), *_OF_HERMES, _hermes,
               "\n<function=NAME>\nARGUMENTS\n</function>\n", "\n", "<function="),
    ToolFormat("hermes", "<tool_call>", "</tool_call>", (), *_OF_HERMES, _hermes,
               '\n{"name": "NAME", "arguments": ARGUMENTS}\n', "\n"),
    ToolFormat("llama", "<|python_tag|>", "", (), *_OF_LLAMA, _llama,
               '{"name": "NAME", "parameters": ARGUMENTS}', None),
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
