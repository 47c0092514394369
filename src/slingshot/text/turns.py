"""Turns of a conversation as ids: what a model said in one, what it is told then, and calls as it writes them.

    parsed, calls = read_turn(ids, opened, tokenizer, tool_format(tokenizer))
    ids += turn_suffix(tokenizer, [{"role": "tool", "content": "42"}], calls)      # up to where it goes on
    encode_calls(tokenizer, form, [ToolCall("calculator", '{"expression": "6*7"}')])
    encode_calling(tokenizer, "hard", "", calls, opened=True)                      # a whole response, to its end token
    ids, mask = encode_conversation(tokenizer, messages, tools)                    # all turns; 1 where the model spoke

What was sampled stays as it was: the ids of a turn begin with all ids of the turn before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.text.reasoning import Parsed, before_reasoning, encode_answers, encode_responses, ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_calls import CallDelta, ToolCallStream
from slingshot.text.tool_formats import ToolCall, ToolFormat, parsed_json, tool_format


def read_turn(
    ids: Iterable[int], opened: bool, tokenizer: Tokenizer, form: ToolFormat | None
) -> tuple[Parsed, list[ToolCall]]:
    """A response parted into reasoning, answer and calls. Without `form` there are none.

    What begins as a call and is none becomes one without a name, so that the model can be told.
    """
    stream, begun = ToolCallStream(tokenizer, opened, form), False
    begin = tokenizer.control_id(form.begin) if form else None
    parts = []
    for id in ids:
        begun = begun or (begin is not None and id == begin)
        parts += stream.push(id)
    said, calls = {"reasoning": "", "answer": ""}, list[ToolCall]()
    for part in parts + stream.finish():
        if not isinstance(part, CallDelta):
            said[part[0]] += part[1]
        elif part.name is not None:
            calls.append(ToolCall(part.name, part.arguments))
        else:
            calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + part.arguments)
    reasoning = said["reasoning"] if stream.reasoning.reasoned else None
    answer = said["answer"]
    if form and not calls and (begun or (begin is None and form.end and form.begin in answer)):
        answer, _, wrong = answer.partition(form.begin)
        calls = [ToolCall("", wrong.strip() or answer.strip())]
    return Parsed(reasoning, answer.rstrip() if calls else answer, stream.reasoning.closed), calls


def told_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as a message's `tool_calls`."""
    return [
        {"id": f"call_{number}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for number, call in enumerate(calls, start=1)
    ]


def turn_suffix(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], calls: Sequence[ToolCall] = (), **more: Any
) -> list[int]:
    """Ids from behind a response's end token to where the next one begins: messages in the chat template's frame.

    What is sampled stays as it is, so the ids of a turn begin with those of the turn before, though the template would
    render old responses otherwise (R1's drops their reasoning). calls: those of the response, which some templates
    want before messages of tools. more: as for `encode_chat`.
    SlingshotError where responses end with no end token.
    """
    question: Mapping[str, Any] = {"role": "user", "content": "."}
    response: dict[str, Any] = {"role": "assistant", "content": "."}
    if calls and (form := tool_format(tokenizer)):
        response["tool_calls"] = _as_template_wants(calls, form.as_text)
    asked = tokenizer.encode_chat([question], add_generation_prompt=False)
    whole = tokenizer.encode_chat([question, response, *messages], **more)
    ends = [place for place, id in enumerate(whole) if id in tokenizer.eos_ids]
    first = sum(id in tokenizer.eos_ids for id in asked)
    if len(ends) <= first:
        raise SlingshotError("this model's chat template ends responses with no end token: it takes no several turns")
    return whole[ends[first] + 1 :]


def encode_calls(tokenizer: Tokenizer, form: ToolFormat, calls: Sequence[ToolCall]) -> list[int]:
    """Ids of calls in a model's own syntax, its tags as tokens where they are some; what calls hold stays text."""
    begin = [form.begin] if form.end else []
    parts = [*begin] if form.inner else []
    for number, call in enumerate(calls):
        named = {"DIGITS": str(number), "NAME": call.name, "ARGUMENTS": call.arguments}
        skeleton = (form.apart or "") * bool(number) + ("" if form.inner else "".join(begin)) + form.call
        skeleton += "" if form.inner else form.end
        for piece in _split(skeleton, form):
            parts.append(re.sub("|".join(named), lambda found: named[found[0]], piece))  # noqa: B023
    parts += [form.end] if form.inner else []
    tags = {form.begin, form.end, *form.inner}
    ids = list[int]()
    for part in filter(None, parts):
        id = tokenizer.control_id(part) if part in tags else None
        ids += tokenizer.encode(part, continues=True) if id is None else [id]
    return ids


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    silent: bool = False,
) -> tuple[list[int], list[int]]:
    """Ids of a chat as a rollout has them, up to its last response, and a mask: 1 on what the assistant says.

    Reasoning is a message's `reasoning_content` or `reasoning`; one without has an empty one, or none where `silent`.
    SlingshotError where tools are called and the model's template knows none.
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if tool_format(tokenizer) is None and (tools or any(messages[place].get("tool_calls") for place in places)):
        raise SlingshotError("this model's chat template knows no tools, and the chat calls some: take another model")
    ids = tokenizer.encode_chat(list(messages[: places[0]]), tools=list(tools) or None)
    mask = [0] * len(ids)
    for number, place in enumerate(places):
        message = messages[place]
        reasoning = message.get("reasoning_content", message.get("reasoning"))
        calls = [ToolCall(each["function"]["name"], _as_text(each)) for each in message.get("tool_calls") or ()]
        if silent and reasoning is None:
            ids = before_reasoning(ids, tokenizer) if ends_in_reasoning(ids, tokenizer) else ids
            (said,) = encode_answers(tokenizer, [message["content"]])
            said = _end_in_calls(tokenizer, said, calls)
        else:
            opened = ends_in_reasoning(ids, tokenizer)
            said = encode_calling(tokenizer, reasoning or "", message["content"], calls, opened)
        told = messages[place + 1 : places[number + 1]] if number + 1 < len(places) else None
        suffix = [] if told is None else turn_suffix(tokenizer, told, calls)
        mask = [*mask[: len(ids)], *[1] * len(said), *[0] * len(suffix)]
        ids = [*ids, *said, *suffix]
    return ids, mask


def _as_text(call: Mapping[str, Any]) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def encode_calling(
    tokenizer: Tokenizer, reasoning: str, answer: str, calls: Sequence[ToolCall], opened: bool
) -> list[int]:
    """Ids of a response that ends in calls, where the model knows some; opened: as for `encode_responses`."""
    (ids,) = encode_responses(tokenizer, [(reasoning, answer)], opened)
    return _end_in_calls(tokenizer, ids, calls)


def _end_in_calls(tokenizer: Tokenizer, ids: list[int], calls: Sequence[ToolCall]) -> list[int]:
    if calls and (form := tool_format(tokenizer)):
        return [*ids[:-1], *encode_calls(tokenizer, form, calls), ids[-1]]
    return ids


def _split(skeleton: str, form: ToolFormat) -> list[str]:
    tags = [tag for tag in (form.begin, form.end, *form.inner) if tag]
    return re.split(f"({'|'.join(map(re.escape, tags))})", skeleton)


def cut_text(tokenizer: Tokenizer, text: str, most: int | None) -> str:
    """A text of at most `most` tokens, which says that it was cut."""
    ids = tokenizer.encode(text, continues=True) if most is not None and len(text) * 4 > most else []
    return text if most is None or len(ids) <= most else tokenizer.decode(ids[:most]).rstrip("\ufffd") + " ..."


def _as_template_wants(calls: Sequence[ToolCall], as_text: bool) -> list[dict[str, Any]]:
    """Calls that every template can write: what a model wrote wrongly has no arguments."""
    told = told_calls([replace(call, name=call.name or "call") for call in calls])
    for call in told:
        given = parsed_json(call["function"]["arguments"])
        plain = given if isinstance(given, dict) else {}
        call["function"]["arguments"] = json.dumps(plain, ensure_ascii=False) if as_text else plain
    return told
