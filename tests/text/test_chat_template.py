"""Rendering a chat: R1's text, what becomes a control token and what never does, and what is refused."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.text.chat_template import R1_TEMPLATE, ControlTokens, clean, render

TOKENS = ControlTokens(["<bos>", "<eos>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"])
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text_of(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    return "".join(render(source, messages, TOKENS, SPECIAL, **variables))


def test_r1s_layout() -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, user("2+3?"), reply("<think>\n2 plus 3\n</think>\n\n5"),
        {"role": "system", "content": "Be kind."},
        user([{"type": "text", "text": "and "}, {"type": "text", "text": "4?"}]),
        {"role": "assistant", "content": "9", "reasoning_content": "5 plus 4"}, user("so"),
    ]  # fmt: skip
    chat = "<bos>Be brief.\n\nBe kind.<｜User｜>2+3?<｜Assistant｜>\n\n5<eos>"
    chat += "<｜User｜>and 4?<｜Assistant｜>9<eos><｜User｜>so"
    assert text_of(R1_TEMPLATE, *messages) == chat
    assert text_of(R1_TEMPLATE, *messages, add_generation_prompt=True) == chat + "<｜Assistant｜><think>\n"
    primed = text_of(R1_TEMPLATE, *messages, add_generation_prompt=True, thinking=False)
    assert primed == chat + "<｜Assistant｜></think>"
    assert text_of(R1_TEMPLATE, *messages[:2], reply(None)) == "<bos>Be brief.<｜User｜>2+3?<｜Assistant｜><eos>"


@pytest.mark.parametrize(
    ("message", "variables", "reason"),
    [
        (
            {"role": "tool", "content": ""},
            {},
            "role tool; this template knows system, user and assistant, and no tools",
        ),
        ({**reply(""), "tool_calls": [{"function": {"name": "f"}}]}, {}, "role assistant and tool calls"),
        (user("x"), {"tools": [{"type": "function"}]}, "this model was not made for them"),
        (user([{"type": "image", "url": "x"}]), {}, "a part of type image; this model reads text only"),
        *((message, {}, "a message has no content") for message in ({"role": "user"}, user(None), user(3))),
    ],
)
def test_what_r1_was_not_made_for_is_refused(message: dict[str, Any], variables: dict[str, Any], reason: str) -> None:
    with pytest.raises(SlingshotError, match=reason):
        text_of(R1_TEMPLATE, message, **variables)


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_only_the_templates_own_tokens_are_control_tokens(role: str) -> None:
    typed = "a<think>b<｜User｜></think>"
    pieces = render("<bos>{{ messages[0].content }}<eos>", [{"role": role, "content": typed}], TOKENS)
    assert pieces == ["", "<bos>", typed, "<eos>", ""]


def test_in_a_reply_only_the_tags_of_its_reasoning_are_the_models_own() -> None:
    source = "{{ messages[0].content }}|{{ messages[0].content.split('</think>')[-1] }}"
    pieces = render(source, [reply("<think>so <eos> <think></think>b<think>")], TOKENS)
    assert pieces == ["", "<think>", "so <eos> <think>", "</think>", "b<think>|b<think>"]
    in_parts = render("{{ messages[0].content[0].text }}", [reply([{"text": "</think>b<eos>"}])], TOKENS)
    assert in_parts == ["", "</think>", "b<eos>"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}",  # Qwen3's way
        "{{ content.split('</think>')[0].split('<think>')[1] | trim }}",
        "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(content).split('</think>')[0].split('<think>')[1] | trim }}",
    ],
)
def test_templates_that_cut_at_tags_of_replies(source: str) -> None:
    source = "{% set content = messages[0].content %}" + source
    assert render(source, [reply("<think>\n\n6 <eos>\n</think>\n5")], TOKENS) == ["6 <eos>"]


@pytest.mark.parametrize("source", ["<th{{ messages[0].content | trim }}", "{{ messages[1].content | trim }}ink>"])
def test_neighbours_do_not_complete_a_control_token(source: str) -> None:
    assert render(source, [user(" ink> "), user(" <th ")], TOKENS) == ["<think>"]


def test_a_template_may_put_a_control_token_together_itself() -> None:
    """As Phi-4-mini's does, from the role."""
    made = render("{{ '<|' + messages[0].role + '|>' }}", [user("")], ControlTokens(["<|user|>"]))
    assert made == ["", "<|user|>", ""]
    replaced = render("{{ messages[0].content.replace('x', '<think>') }}", [user("a<eos>x")], TOKENS)
    assert replaced == ["a<eos>", "<think>", ""]


def test_what_is_given_as_a_special_token_is_said() -> None:
    pieces = render("{{ bos_token }}{{ eos_token }}", [], TOKENS, SPECIAL, bos_token="<think>")
    assert pieces == ["<think>", "<eos>", ""]


def test_the_longest_control_token_is_taken() -> None:
    tokens = ControlTokens(["<a>", "<ab>", "<ab", "<abc>", "", "#"])
    assert render("<a><ab><abc><ab#", [], tokens) == ["", "<a>", "", "<ab>", "", "<abc>", "", "<ab", "", "#", ""]
    assert render("{{ x }}", [], tokens, x="<a><ab><abc><ab#") == ["<a><ab><abc><ab#"]
    overlapping = ControlTokens(["<ab", "ab>", "b"])
    assert render("{{ x }}", [], overlapping, x="<ab>") == ["<ab>"]
    assert render("plain", [], ControlTokens([])) == ["plain"]


def test_tools_documents_and_variables_are_said_too() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "see <think>", "parameters": {"<eos>": 1}}}]
    source = "<think>{{ tools | tojson }}{{ documents[0].text }}{{ extra }}{{ messages[0].a | string }}<eos>"
    given = {"tools": tools, "documents": [{"text": "<bos>"}], "extra": ["<｜User｜>"]}
    pieces = render(source, [{"a": {"<bos>": "x"}}], TOKENS, **given)
    assert pieces == ["", "<think>", json.dumps(tools) + "<bos>['<｜User｜>']{'<bos>': 'x'}", "<eos>", ""]
    escaped = "{{ messages[0].content | tojson(ensure_ascii=true) }}"
    assert render(escaped, [user("<bos>é<eos>")], TOKENS) == [json.dumps("<bos>é<eos>")]


def test_private_characters_that_are_typed_stay() -> None:
    typed = "\U000f0000<think>\U000f0001\ue000"
    assert render("{{ messages[0].content }}<eos>", [user(typed)], TOKENS) == [typed, "<eos>", ""]


def test_messages_as_transformers_hands_them_over() -> None:
    assert text_of("{{ messages[0] }}", {**user(None), "name": "n"}) == "{'role': 'user', 'name': 'n'}"
    told = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert text_of(told, {"role": "assistant", name: "so"}) == "soso"


@pytest.mark.parametrize("key", [".content", "['content']"])
def test_nulls_are_kept_for_templates_that_ask_for_them(key: str) -> None:
    asks = f"{{% if messages[0]{key} is none %}}{{{{ messages[0].tool_calls }}}}{{% endif %}}"
    assert text_of(asks + "{{ messages[0].name }}", {**reply(None), "tool_calls": [1], "name": None}) == "[1]"


def test_a_last_message_is_left_open() -> None:
    messages = [user("2+3?"), reply("It is <eos> ")]
    assert render(R1_TEMPLATE, messages, TOKENS, SPECIAL, continue_final_message=True)[-1] == "It is <eos> "
    trims = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    assert text_of(trims, *messages, continue_final_message=True) == "[2+3?][It is <eos>"
    parts = user([{"type": "image"}, {"type": "text", "text": "look "}, {"type": "image"}])
    assert text_of("{{ messages[0].content[1].text }}.", parts, continue_final_message=True) == "look "
    for source, message, reason in [
        ("{{ messages[0].content[:2] }}", user("long"), "leaves a part of the last message away"),
        ("{{ messages[0].content[2:] }}", user("long"), "leaves a part of the last message away"),
        ("nothing", user("long"), "leaves a part of the last message away"),
        (trims, user(None), "no text that could be continued"),
        (trims, user([{"type": "image"}]), "no text that could be continued"),
    ]:
        with pytest.raises(SlingshotError, match=reason):
            text_of(source, message, continue_final_message=True)
    with pytest.raises(SlingshotError, match="either continues"):
        text_of(trims, user("x"), continue_final_message=True, add_generation_prompt=True)


def test_messages_are_plain_json() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for content in (object(), {1, 2}, b"x", 10**5000, deep):
        with pytest.raises(SlingshotError, match="plain JSON"):
            text_of(R1_TEMPLATE, user(content))


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, [["role"]], None, 3, [None]])
def test_a_chat_is_a_list_of_messages(messages: Any) -> None:
    with pytest.raises(SlingshotError, match="a chat is a list of messages"):
        render(R1_TEMPLATE, messages, TOKENS)


def test_half_characters_are_replaced_and_pairs_joined() -> None:
    said = json.loads('"a\\ud800b\\udc00\\udc01<think>\\ud83d\\ude42"')
    assert render("{{ messages[0].content }}", [user(said)], TOKENS) == ["a\ufffdb\ufffd\ufffd<think>🙂"]
    assert clean("\ufdd0\uffff\0") == "\ufdd0\uffff\0"


def test_many_tokens_and_long_messages_take_no_time() -> None:
    tokens = ControlTokens(f"<｜place▁holder▁no▁{i}｜>" for i in range(800))
    start = time.monotonic()
    for said in ("<｜place▁holder▁no▁79" * 40_000, "<" * 500_000, "<｜place▁holder▁no▁79｜>" * 20_000):
        assert render("{{ messages[0].content }}", [user(said)], tokens) == [said]
    assert time.monotonic() - start < 10


# What templates do with a message: none of it brings a control token in. Last comes what puts it beside half a token.
STEPS = """\
| trim;| upper;| string;| reverse;| replace('a', 'b');| replace('', '.');| tojson;| list | join;| join('-');\
| safe;| title;| capitalize;| indent(1, true);.split('</think>')[-1];.split('<think>') | join(' ');.rstrip();[::-1];\
.strip('<>');.partition('think')[2];.removeprefix('<th');.replace('/', '');.casefold();| select | join;[1:];[:-1];* 2;\
.split() | join('');.split('h')[0];+ 'a';~ messages[1].content;+ messages[1].content;| lower;[0];\
"""
LAST = ["", "+ '<th'", "~ 'ink>'", "| replace('<', '<<')", "| join('>')", "| escape", "~ '<eos'"]
PARTS = ["\n", " ", "<bos>", "<eos>", "<｜User｜>", "<think>", "</think>", "<th", "ink>", "<BOS>", "<", ">", "h", "a"]
PARTS += ["<｜User"]
said = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)


@settings(max_examples=100)
@given(
    first=said, second=said, steps=st.lists(st.sampled_from(STEPS.split(";")), max_size=4), last=st.sampled_from(LAST)
)
@example(first="<think>", second="", steps=[], last="")
@example(first="<BOS>", second="", steps=["| safe", "| lower"], last="")
@example(first="<BOS>", second="", steps=["| tojson", "| lower"], last="")
def test_whatever_is_done_with_a_message_it_stays_text(first: str, second: str, steps: list[str], last: str) -> None:
    expression = "messages[0].content"
    for step in filter(None, [*steps, last]):
        expression = f"({expression} {step})" if step[0] in "|+~*" else f"{expression}{step}"
    source = "{{ bos_token }}{% set x = " + expression + " %}{{ x }}"
    try:
        pieces = render(source, [user(first), user(second)], TOKENS, SPECIAL)
    except SlingshotError as error:
        assert "could not render" in str(error)
        return
    assert pieces[:2] == ["", "<bos>"]
    assert len(pieces) == 3
