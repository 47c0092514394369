"""Rendering a chat: R1's text, what becomes a control token and what never does, and what is refused."""

import json
import time
from datetime import datetime
from typing import Any

import jinja2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.text.chat_template import R1_TEMPLATE, clean, render

TOKENS = ["<bos>", "<eos>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
thorough = settings(derandomize=True, deadline=None, max_examples=400)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text_of(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    return "".join(render(source, messages, TOKENS, SPECIAL, **variables))


def test_r1s_layout() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("2+3?"),
        {"role": "assistant", "content": "<think>\n2 plus 3\n</think>\n\n5"},
        {"role": "system", "content": "Be kind."},
        user([{"type": "text", "text": "and "}, {"type": "text", "text": "4?"}]),
        {"role": "assistant", "content": "9", "reasoning_content": "5 plus 4"},
        user("so"),
    ]
    chat = "<bos>Be brief.\n\nBe kind.<｜User｜>2+3?<｜Assistant｜>\n\n5<eos><｜User｜>and 4?<｜Assistant｜>9<eos><｜User｜>so"
    assert text_of(R1_TEMPLATE, *messages) == chat
    assert text_of(R1_TEMPLATE, *messages, add_generation_prompt=True) == chat + "<｜Assistant｜><think>\n"
    assert (
        text_of(R1_TEMPLATE, *messages, add_generation_prompt=True, thinking=False) == chat + "<｜Assistant｜></think>"
    )
    assert (
        text_of(R1_TEMPLATE, *messages[:2], {"role": "assistant", "content": None})
        == "<bos>Be brief.<｜User｜>2+3?<｜Assistant｜><eos>"
    )


@pytest.mark.parametrize(
    ("message", "variables", "reason"),
    [
        (
            {"role": "tool", "content": ""},
            {},
            "role tool; this template knows system, user and assistant, and no tools",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
            {},
            "role assistant and tool calls",
        ),
        (user("x"), {"tools": [{"type": "function"}]}, "this model was not made for them"),
        (user([{"type": "image", "url": "x"}]), {}, "a part of type image; this model reads text only"),
        ({"role": "user"}, {}, "a message has no content"),
        (user(3), {}, "a message has no content"),
    ],
)
def test_what_r1_was_not_made_for_is_refused(message: dict[str, Any], variables: dict[str, Any], reason: str) -> None:
    with pytest.raises(SlingshotError, match=reason):
        text_of(R1_TEMPLATE, message, **variables)


def test_only_the_templates_own_tokens_are_control_tokens() -> None:
    pieces = render(R1_TEMPLATE, [user("a<think>b<｜User｜>")], TOKENS, SPECIAL, add_generation_prompt=True)
    assert pieces == ["", "<bos>", "", "<｜User｜>", "a<think>b<｜User｜>", "<｜Assistant｜>", "", "<think>", "\n"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}",  # Qwen3's way
        "{{ messages[0].content.split('</think>')[0].split('<think>')[1].strip() }}",
        "{{ messages[0].content.split('</think>')[0].split('<think>')[1] | trim }}",
        "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(messages[0].content).split('</think>')[0].split('<think>')[1] | trim }}",
        "{% for p in messages[0].content.split('</think>') %}{% if loop.first %}{{ (p ~ '').split('<think>')[1] | trim }}{% endif %}{% endfor %}",
    ],
)
def test_templates_that_cut_at_tags_inside_messages(source: str) -> None:
    pieces = render(source, [user("x<think>\n\n6 <eos>\n</think>\n5")], TOKENS)
    assert pieces == ["6 <eos>"] and type(pieces[0]) is str


def test_templates_that_look_at_the_text() -> None:
    """Counting, comparing and slicing see what was typed: a mark around a control token is no character."""
    said = "<eos>ab<think>"
    looks = "{% if m.content.startswith('<eos>ab') and m.content.endswith('b<think>') and 'b<th' in m.content and m.content == said %}seen{% endif %}"
    looks += "{{ m.content | length }}{{ m.content[1:3] }}{{ m.content[::-1][:3] }}{{ m.content.find('ab') }}{{ {said: 'key'}[m.content] }}"
    looks += "{% for c in m.content %}{{ c }}-{% endfor %}{{ m.content | list | length }}{{ [m.content] }}{{ m.content | upper }}{{ m.content * 2 }}"
    (text,) = render("{% set m = messages[0] %}" + looks, [user(said)], TOKENS, said=said)
    spelt = "-".join(said)
    assert text == f"seen14eo>kn5key{spelt}-14['<eos>ab<think>']<EOS>AB<THINK><eos>ab<think><eos>ab<think>"


def test_characters_one_by_one_do_not_make_a_control_token() -> None:
    assert render("{% for c in messages[0].content %}{{ c }}{% endfor %}", [user("<think>")], TOKENS) == ["<think>"]


@pytest.mark.parametrize("source", ["<th{{ messages[0].content | trim }}", "{{ messages[1].content | trim }}ink>"])
def test_neighbours_do_not_complete_a_control_token(source: str) -> None:
    assert render(source, [user(" ink> "), user(" <th ")], TOKENS) == ["<think>"]


def test_a_template_may_put_a_control_token_together_itself() -> None:
    """As Phi-4-mini's does, from the role."""
    assert render("{{ '<|' + messages[0].role + '|>' }}", [user("")], ["<|user|>"]) == ["", "<|user|>", ""]
    assert render("{{ messages[0].content.replace('x', '<think>') }}", [user("a<eos>x")], TOKENS) == [
        "a<eos>",
        "<think>",
        "",
    ]


def test_what_is_given_as_a_special_token_is_said() -> None:
    assert render("{{ bos_token }}{{ eos_token }}", [], TOKENS, SPECIAL, bos_token="<think>") == [
        "<think>",
        "<eos>",
        "",
    ]


def test_the_longest_control_token_is_taken() -> None:
    assert render("<a><ab><abc><ab", [], ["<a>", "<ab>", "<ab", "<abc>", ""]) == [
        "",
        "<a>",
        "",
        "<ab>",
        "",
        "<abc>",
        "",
        "<ab",
        "",
    ]
    assert render("plain", [], []) == ["plain"]


def test_tools_documents_and_variables_are_said_too() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "see <think>", "parameters": {"<eos>": 1}}}]
    source = "<think>{{ tools | tojson }}{{ documents[0].text }}{{ extra }}{{ messages[0].a | string }}<eos>"
    pieces = render(
        source, [{"a": {"<bos>": "x"}}], TOKENS, tools=tools, documents=[{"text": "<bos>"}], extra=["<｜User｜>"]
    )
    assert pieces == ["", "<think>", json.dumps(tools) + "<bos>['<｜User｜>']{'<bos>': 'x'}", "<eos>", ""]
    escaped = "{{ messages[0].content | tojson(ensure_ascii=true) }}"
    assert render(escaped, [user("<｜User｜>é<eos>")], TOKENS) == [json.dumps("<｜User｜>é<eos>")]


def test_what_transformers_offers_to_templates() -> None:
    assert text_of("{{ {'a': 'é<'} | tojson }}") == '{"a": "é<"}'
    assert text_of("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert (
        text_of("{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}{{ loop.last }}{% endfor %}")
        == "0False1False"
    )
    assert text_of("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", user("!")) == "ab!c"
    assert (
        text_of("{{ messages[0] }}", {"role": "user", "content": None, "name": "n"}) == "{'role': 'user', 'name': 'n'}"
    )
    told = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert [
        text_of(told, {"role": "assistant", name: "so"}) for name in ("reasoning_content", "thinking", "reasoning")
    ] == ["soso"] * 3


def test_a_last_message_is_left_open() -> None:
    messages = [user("2+3?"), {"role": "assistant", "content": "It is <eos> "}]
    assert render(R1_TEMPLATE, messages, TOKENS, SPECIAL, continue_final_message=True)[-1] == "It is <eos> "
    trims = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    assert text_of(trims, *messages, continue_final_message=True) == "[2+3?][It is <eos>"
    parts = [user([{"type": "image"}, {"type": "text", "text": "look "}, {"type": "image"}])]
    assert text_of("{{ messages[0].content[1].text }}.", *parts, continue_final_message=True) == "look "
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


def test_a_rendering_that_would_differ_is_refused() -> None:
    """Where a template cuts through text that it put together itself from its own and what was said."""
    assert render("{{ ('<eos>' + messages[0].content)[:7] }}", [user("abc")], TOKENS) == ["", "<eos>", "ab"]
    with pytest.raises(SlingshotError, match="takes apart what looks like a control token"):
        render("{{ ('<eos>' + messages[0].content)[:7] }}", [user("<eos>abc")], TOKENS)


def test_messages_are_plain_json() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for content in (object(), {1, 2}, b"x", 10**5000, deep):
        with pytest.raises(SlingshotError, match="plain JSON"):
            render(R1_TEMPLATE, [user(content)], TOKENS)


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, [["role"]], None, 3, [None]])
def test_a_chat_is_a_list_of_messages(messages: Any) -> None:
    with pytest.raises(SlingshotError, match="a chat is a list of messages"):
        render(R1_TEMPLATE, messages, TOKENS)


def test_half_characters_are_replaced_and_pairs_joined() -> None:
    said = json.loads('"a\\ud800b\\udc00\\udc01<think>\\ud83d\\ude42"')
    assert render("{{ messages[0].content }}", [user(said)], TOKENS) == ["a\ufffdb\ufffd\ufffd<think>🙂"]
    assert clean("\ufdd0\uffff\0") == "\ufdd0\uffff\0"


def test_many_tokens_and_long_messages_take_no_time() -> None:
    tokens = [f"<｜place▁holder▁no▁{i}｜>" for i in range(800)]
    start = time.monotonic()
    for said in ("<｜place▁holder▁no▁79" * 40_000, "<" * 500_000, "<｜place▁holder▁no▁79｜>" * 20_000):
        assert render("{{ messages[0].content }}", [user(said)], tokens) == [said]
    assert time.monotonic() - start < 5


# What templates do with a message: none of it brings a control token in. Last comes, maybe, what puts it beside half a token of the template's.
STEPS = [
    *[
        "| trim",
        "| upper",
        "| string",
        "| reverse",
        "| replace('a', 'b')",
        "| replace('think', 'bos')",
        "| replace('', '.')",
        "| tojson",
    ],
    *[
        "| list | join",
        "| join('-')",
        "| default(messages[1].content, true)",
        "| safe",
        "| title",
        "| capitalize",
        "| indent(1, true)",
    ],
    *[
        ".split('</think>')[-1]",
        ".split('<think>') | join(' ')",
        ".split() | join('')",
        ".split('h')[0]",
        ".strip('<>')",
        ".lstrip('\\n')",
    ],
    *[
        ".partition('think')[2]",
        ".removeprefix('<th')",
        ".removesuffix('>')",
        ".replace('/', '')",
        ".splitlines() | join('\\n')",
        ".casefold()",
    ],
    *["| select | join", "| map('lower') | join", "| list | reverse | join", "| unique | join"],
    *[
        "[1:]",
        "[:-1]",
        "[::2]",
        "[::-1]",
        "[0]",
        "+ 'a'",
        "~ messages[1].content",
        "+ messages[1].content",
        "* 2",
        ".rstrip()",
        "| lower",
    ],
]
LAST = ["", "+ '<th'", "~ 'ink>'", "| replace('<', '<<')", "| join('>')", "| escape", "~ '<eos'"]
said = st.lists(
    st.sampled_from([*TOKENS, "<th", "ink>", "<BOS>", "<", ">", "h", "a", "\n", " ", "｜", "<｜User", "é"]), max_size=6
).map("".join)


@thorough
@given(first=said, second=said, steps=st.lists(st.sampled_from(STEPS), max_size=4), last=st.sampled_from(LAST))
@example(first="<think>", second="", steps=[], last="")
@example(first="<<think>think>", second="", steps=[".replace('<think>', '')"], last="")
@example(first="<BOS>", second="", steps=["| safe", "| lower"], last="")
@example(first="<BOS>", second="", steps=["| tojson", "| lower"], last="")
def test_whatever_is_done_with_a_message_it_stays_text(first: str, second: str, steps: list[str], last: str) -> None:
    expression = "messages[0].content"
    for step in filter(None, [*steps, last]):
        expression = f"({expression} {step})" if step[0] in "|+~*" else f"{expression}{step}"
    source = "{{ bos_token }}{% set x = " + expression + " %}{{ x }}"
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(finalize=str)
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    messages = [user(first), user(second)]
    try:
        expected = plain.from_string(source).render(messages=messages, bos_token="<bos>")
    except Exception:
        with pytest.raises(SlingshotError, match="could not render"):
            render(source, messages, TOKENS, SPECIAL)
        return
    try:
        pieces = render(source, messages, TOKENS, SPECIAL)
    except SlingshotError as error:
        assert "takes apart" in str(error)
        assert last
        return
    assert "".join(pieces) == expected
    assert pieces[:2] == ["", "<bos>"]
    assert len(pieces) == 3
