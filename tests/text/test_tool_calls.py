"""Calls of functions by ids and by characters, whole and torn, in every format's own spelling."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.text.tokenizer import R1_CONFIG, R1_TOKENS, Tokenizer
from slingshot.text.tool_calls import CallDelta, ToolCallStream
from slingshot.text.tool_formats import FORMATS, ToolCall, tool_format

TEMPLATES = {form.name: f"{{% if tools %}}{form.begin} {form.sign} {form.end}{{% endif %}}" for form in FORMATS}
BY_NAME = {form.name: form for form in FORMATS}
SPELT = [f"spelt {form.name}" for form in FORMATS if form.inner]
TAGS = [tag for form in FORMATS for tag in (form.begin, form.end, *form.inner) if tag] + ["<think>", "</think>"]


@pytest.fixture(scope="module")
def tokenizers():
    """For every format a tokenizer that has its tags as tokens; for "spelt", which is Hermes', and "spelt kimi" and so
    on one that has none of them."""
    plain = Tokenizer.train(["What is the weather in Paris? It is fine."] * 20, 400)
    description = plain.description()
    made = {}
    for name, form in [*BY_NAME.items(), *((name, None) for name in ("spelt", *SPELT))]:
        tags = [tag for tag in (form.begin, form.end, *form.inner) if tag] if form else []
        added = R1_TOKENS | dict.fromkeys(tags, False)
        vocab = description["model"]["vocab"] | {t["content"]: t["id"] for t in description["added_tokens"]}
        vocab |= {tag: plain.vocab_size + place for place, tag in enumerate(tags)}
        config = R1_CONFIG | {"chat_template": TEMPLATES.get(name.removeprefix("spelt "), TEMPLATES["hermes"])}
        merges = [tuple(pair) for pair in description["model"]["merges"]]
        made[name] = Tokenizer.from_bpe(vocab, merges, added, config)
    return made


def section(name, calls):
    """What a model of that format writes to call functions."""
    if name == "deepseek-v3":
        (begin, middle, end), fenced = BY_NAME[name].inner, "\n```json\n{}\n```"
        inner = "\n".join(f"{begin}function{middle}{n}{fenced.format(a)}{end}" for n, a in calls)
        return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"
    if name == "deepseek":
        inner = "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{a}<｜tool▁call▁end｜>" for n, a in calls)
        return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"
    if name == "kimi":
        begin, middle, end = BY_NAME["kimi"].inner
        inner = "".join(f"{begin}functions.{n}:{i}{middle}{a}{end}" for i, (n, a) in enumerate(calls))
        return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"
    if name == "llama":
        return "<|python_tag|>" + "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls)


def encode(tokenizer, text, *, spelt=False):
    """Ids of what a model writes: tags as control tokens where there are such; spelt: as text would spell them."""
    if spelt:
        return tokenizer.encode(text, continues=True)
    ids = []
    for piece in re.split(f"({'|'.join(map(re.escape, TAGS))})", text):
        id = tokenizer.control_id(piece)
        ids += [id] if id is not None else tokenizer.encode(piece, continues=True) if piece else []
    return ids


def parts(tokenizer, ids, opened=True):
    """(reasoning, answer, calls) of an output."""
    stream = ToolCallStream(tokenizer, opened, tool_format(tokenizer))
    told = [part for id in ids for part in stream.push(id)] + stream.finish()
    said = {"reasoning": "", "answer": ""}
    for kind, text in (part for part in told if isinstance(part, tuple)):
        said[kind] += text
    return *said.values(), whole_calls(told)


def whole_calls(told):
    calls = []
    for part in (part for part in told if isinstance(part, CallDelta)):
        if part.name is not None:
            calls.append(ToolCall(part.name, ""))
        calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + part.arguments)
    return calls


CALLS = [("weather", '{"city": "Paris"}'), ("add", '{"terms": [1, 2.5], "note": "a </tool_call> b"}')]
NAMES = [*BY_NAME, "spelt"]


@pytest.mark.parametrize("name", NAMES)
def test_calls_after_the_reasoning_are_found(tokenizers, name):
    calls = CALLS[:1] if name == "spelt" else CALLS
    ids = encode(tokenizers[name], "Look it up.</think>\n\n")
    for place, piece in enumerate(section(name, calls).split("a </tool_call> b")):
        ids += encode(tokenizers[name], "a </tool_call> b", spelt=True) if place else []
        ids += encode(tokenizers[name], piece)
    reasoning, answer, found = parts(tokenizers[name], ids)
    assert (reasoning, answer) == ("Look it up.", "")
    assert [(call.name, json.loads(call.arguments)) for call in found] == [(n, json.loads(a)) for n, a in calls]


@pytest.mark.parametrize("name", SPELT)
def test_every_call_between_tags_that_are_characters_is_found(tokenizers, name):
    form = BY_NAME[name.removeprefix("spelt ")]
    calls = [CALLS[0], ("add", json.dumps({"note": f"a {form.inner[2]} b"}, ensure_ascii=False)), CALLS[0]]
    text = f"Look it up.</think>\n\nSo: {section(form.name, calls)}\n\nDone."
    reasoning, answer, found = parts(tokenizers[name], encode(tokenizers[name], text))
    assert (reasoning, answer, found) == ("Look it up.", "So:Done.", [ToolCall(*call) for call in calls])
    cut = text[: text.index(form.end)]  # the section is not ended
    assert parts(tokenizers[name], encode(tokenizers[name], cut))[1:] == ("So:", found)


@pytest.mark.parametrize("name", ["deepseek", "kimi", "hermes"])
def test_a_call_inside_the_reasoning_is_a_call(tokenizers, name):
    ids = encode(tokenizers[name], "Look." + section(name, CALLS[:1]) + "More.</think>\n\nFine.")
    reasoning, answer, found = parts(tokenizers[name], ids)
    assert (reasoning, answer, [call.name for call in found]) == ("Look.More.", "Fine.", ["weather"])


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_only_quoted_in_the_reasoning_is_text(tokenizers, name):
    quoted = section(name, CALLS[:1])
    ids = encode(tokenizers[name], quoted, spelt=True) + encode(tokenizers[name], "</think>\n\nFine.")
    assert parts(tokenizers[name], ids) == (quoted, "Fine.", [])


@pytest.mark.parametrize("name", ["deepseek", "kimi", "hermes"])
def test_a_call_that_is_only_quoted_in_the_answer_is_text(tokenizers, name):
    quoted = section(name, CALLS[:1])
    ids = encode(tokenizers[name], "</think>\n\n") + encode(tokenizers[name], quoted, spelt=True)
    assert parts(tokenizers[name], ids) == ("", quoted, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_was_cut_has_the_arguments_that_were_there(tokenizers, name):
    """From its arguments' first brace on it is a call, whatever comes; before, it is text as it stands."""
    tokenizer = tokenizers[name]
    whole = encode(tokenizer, "</think>\n\n" + section(name, CALLS[:1]))
    before = ""
    for size in range(1, len(whole) + 1):
        _, answer, found = parts(tokenizer, whole[:size])
        if not found:
            assert not before and answer == tokenizer.decode(whole[1:size]).lstrip("\n")
        else:
            ((its),) = found
            assert answer == "" and its.name == "weather" and its.arguments.startswith(before)
            before = its.arguments
    assert before == CALLS[0][1]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_are_no_json_are_told_as_they_were_written(tokenizers, name):
    ids = encode(tokenizers[name], "</think>\n\n" + section(name, [("f", "{1: 2, 3")]))
    _, answer, (call,) = parts(tokenizers[name], ids)
    assert answer == "" and call.name == "f" and call.arguments.startswith("{1: 2, 3")


def test_deepseek_v3_fences_its_json(tokenizers):
    text = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>'
    ids = encode(tokenizers["deepseek"], f"</think><｜tool▁calls▁begin｜>{text}\n{text}<｜tool▁calls▁end｜>")
    assert parts(tokenizers["deepseek"], ids)[2] == [ToolCall("weather", '{"city": "Paris"}')] * 2


def test_parameters_in_tags_are_read_as_json_where_they_can_be(tokenizers):
    parameters = "<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>"
    ids = encode(tokenizers["hermes"], f"<tool_call>\n<function=f>\n{parameters}\n</function>\n</tool_call>")
    calls = parts(tokenizers["hermes"], ids, opened=False)[2]
    assert calls == [ToolCall("f", '{"city": "Paris", "days": 3}')]


def test_without_a_template_for_tools_nothing_is_a_call():
    tokenizer = Tokenizer.train(["none"], 300)
    assert tool_format(tokenizer) is None
    assert parts(tokenizer, encode(tokenizer, "</think>" + section("hermes", CALLS)))[1].startswith("<tool_call>")


OTHERS = ["Fine. ", "\n", "<tool_call>", "</tool_call>", "{", '{"name": "f", "arguments": {}}', "</think>", "日本"]


@given(name=st.sampled_from(NAMES), pieces=st.lists(st.sampled_from([*OTHERS, "CALL", "QUOTED"]), max_size=8))
def test_nothing_that_was_written_is_lost(tokenizers, name, pieces):
    """What is no call is told as text, but for white space and tags that are layout."""
    call = section(name, CALLS[:1])
    texts = [(call if piece in ("CALL", "QUOTED") else piece, piece == "QUOTED") for piece in pieces]
    ids = [id for text, spelt in texts for id in encode(tokenizers[name], text, spelt=spelt)]
    reasoning, answer, found = parts(tokenizers[name], ids)

    def bare(text):
        return "".join(text.replace("<think>", "").replace("</think>", "").split())

    told, written = bare(reasoning + answer), bare("".join(text for text, _ in texts))
    assert len(told) < len(written) if found else told == written
