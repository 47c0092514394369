"""Chat templates: R1's text, what the sandbox offers, and what it refuses."""

import time
from datetime import datetime

import pytest

from slingshot.data import template
from slingshot.data.template import R1_TEMPLATE, render
from slingshot.files import SlingshotError

TOKENS = ["<bos>", "<eos>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def text_of(source: str, *messages: dict[str, str]) -> str:
    return "".join(render(source, messages, TOKENS, bos_token="<bos>", eos_token="<eos>"))


def test_r1s_layout() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("2+3?"),
        {"role": "assistant", "content": "<think>\n2 plus 3\n</think>\n\n5"},
        {"role": "system", "content": "Be kind."},
        user("and 4?"),
    ]
    chat = "<bos>Be brief.\n\nBe kind.<｜User｜>2+3?<｜Assistant｜>5<eos><｜User｜>and 4?"
    variables = {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert "".join(render(R1_TEMPLATE, messages, TOKENS, **variables)) == chat
    assert "".join(render(R1_TEMPLATE, messages, TOKENS, add_generation_prompt=True, **variables)) == chat + "<｜Assistant｜><think>\n"
    off = render(R1_TEMPLATE, messages, TOKENS, add_generation_prompt=True, thinking=False, **variables)
    assert "".join(off) == chat + "<｜Assistant｜></think>"


def test_only_the_templates_own_tokens_are_control_tokens() -> None:
    pieces = render(R1_TEMPLATE, [user("a<think>b<｜User｜>")], TOKENS, bos_token="<bos>", add_generation_prompt=True)
    assert pieces == ["", "<bos>", "", "<｜User｜>", "a<think>b<｜User｜>", "<｜Assistant｜>", "", "<think>", "\n"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}",  # Qwen3's way
        "{{ messages[0].content.split('</think>')[0].split('<think>')[1].strip() }}",
        "{{ messages[0].content.split('</think>')[0].split('<think>')[1] | trim }}",
    ],
)
def test_templates_that_cut_at_tags_inside_messages(source: str) -> None:
    assert render(source, [user("x<think>\n\n6 <eos>\n</think>\n5")], TOKENS) == ["6 <eos>"]


def test_stripping_whole_messages_leaves_their_tags_text() -> None:
    assert render("{{ messages[0].content.strip() }}", [user(" <think> ")], TOKENS) == ["<think>"]
    assert render("{{ messages[0].content.split('\\n')[1] }}", [user("\n<think>")], TOKENS) == ["<think>"]


@pytest.mark.parametrize("source", ["<th{{ messages[0].content | trim }}", "{{ messages[1].content | trim }}ink>"])
def test_neighbours_do_not_complete_a_control_token(source: str) -> None:
    assert render(source, [user(" ink> "), user(" <th ")], TOKENS) == ["<think>"]


def test_what_transformers_offers_to_templates() -> None:
    assert text_of("{{ {'a': 'é<'} | tojson }}") == '{"a": "é<"}'
    assert text_of("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert text_of("{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}{{ loop.last }}{% endfor %}") == "0False1False"
    assert text_of("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", user("!")) == "ab!c"


def test_the_templates_refusal_is_passed_on() -> None:
    with pytest.raises(SlingshotError, match="the role is tool; this template knows system, user and assistant"):
        text_of(R1_TEMPLATE, {"role": "tool", "content": ""})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "Expected"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ missing.field }}", "undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 2 ** 9999999999 }}", "powers"),
    ],
)
def test_failing_and_forbidden_templates(source: str, reason: str) -> None:
    with pytest.raises(SlingshotError, match=reason) as caught:
        text_of(source, user("3"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[{"role": "user", "content": object()}], [{"role": "user", "content": {1, 2}}]])
def test_messages_are_plain_json(messages: list[dict[str, object]]) -> None:
    with pytest.raises(SlingshotError, match="plain JSON"):
        render(R1_TEMPLATE, messages, TOKENS)


@pytest.mark.parametrize(
    "source",
    [
        "{% set xs = range(99999) %}{% for a in xs %}{% for b in xs %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_time_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 0.05)
    start = time.monotonic()
    with pytest.raises(SlingshotError, match=r"more than 0\.05 s"):
        text_of(source)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}",
        "{% set ns = namespace(t='xy') %}{% for a in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t='xy') %}{% for a in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% set ns = namespace(t=2) %}{% for a in range(99) %}{% set ns.t = ns.t * ns.t %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ 99999999999 * [1] }}",
    ],
)
def test_size_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_CHARS", 10_000)
    with pytest.raises(SlingshotError, match="more than 10000 characters"):
        text_of(source, user("hello"))
