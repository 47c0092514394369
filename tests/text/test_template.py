"""The rendering of templates: what is offered, and that no template gets out, hangs, or fills the memory."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.text.template import render_template


def text_of(source: str, trusted: bool = True, **variables: Any) -> str:
    return render_template(source, {"messages": [], **variables}, trusted=trusted)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        (
            "{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}{{ loop.last }}{% endfor %}",
            "0False1False",
        ),
        ("{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}-{{ a }}", "1-"),
        ("{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}", "4"),
        ("{{ dict(a=1) | items | list }}{{ namespace(self=2).self }}", "[('a', 1)]2"),
        ("{{ '{0.__class__}'.format(1) }}{{ messages.__class__ }}{{ loop }}", ""),
    ],
)
def test_what_is_offered(source: str, text: str) -> None:
    assert text_of(source) == text_of(source, trusted=False) == text


def test_json_as_python_writes_it() -> None:
    value = {"b": [1, 2.5, None, True, {}], "a": 'é\x7f😀"\n'}
    for options in ({}, {"indent": 2}, {"ensure_ascii": True}, {"sort_keys": True, "separators": (",", ":")}):
        arguments = ", ".join(f"{key}={option!r}" for key, option in options.items())
        written = json.dumps(value, **{"ensure_ascii": False, **options})
        assert text_of(f"{{{{ value | tojson({arguments}) }}}}", value=value) == written


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ ''['__class__'].x }}", "unsafe"),
        ("{{ ('' | attr('__class__')).x }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
        ("{{ '{a.__class__.x}'.format_map({'a': 1}) }}", "unsafe"), ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{% macro m() %}{% endmacro %}{{ m._environment.x }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns._a = 1 %}", "names of that kind belong to Python"),
        ("{{ namespace(__class__=1) }}", "names of that kind belong to Python"), ("{% include 'x' %}", "no loader"),
        ("{% for %}", "Expected"), ("{{ 1 + 'a' }}", "unsupported operand"), ("{{ missing.field }}", "undefined"),
        ("{{ raise_exception('no\nway') }}", "could not render these messages: no way"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        # too much at once: what a worker may not have, or may not say
        ("{{ 'x' * 99999999999 }}", "MemoryError|could not render"),
        pytest.param(
            "{{ ('x' * 900000000) | upper | list }}", "MemoryError|could not render|took longer", marks=pytest.mark.slow
        ),
        ("{{ '%2000000000d' % 1 }}", "MemoryError|could not render"),
        ("{{ 'x' * 20000000 }}", "returned more than 16 MiB"), ("{{ range(1000000000) | list }}", "Range too big"),
        ("{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}", "could not render|ended its process"),
    ],
)  # fmt: skip
def test_refused_in_one_line(source: str, reason: str) -> None:
    with pytest.raises(SlingshotError, match=reason) as caught:
        text_of(source, trusted=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert text_of("fine", trusted=False) == "fine"  # the next chat is served


@pytest.mark.parametrize(
    "source",
    [
        "{% set xs = range(99999) %}{% for a in xs %}{% for b in xs %}{% endfor %}{% endfor %}",
        "{% set a = 'a' * 4000000 %}{{ a.rfind('ab' + a[:2000000]) }}",  # within one call of Python's
    ],
)
def test_an_endless_template_is_ended(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(SlingshotError, match="the chat template took longer than 1 s; shorten the chat or mend"):
        render_template(source, {"messages": []}, seconds=1.0)
    assert time.monotonic() - start < 20


def test_long_honest_chats_fit() -> None:
    """A million tokens are four million characters."""
    source = "{% for m in messages %}{{ m.role + (m.content | trim).split('</think>')[-1] }}{% endfor %}"
    messages = [{"role": "user", "content": "text <think> and more of it, " * 140}] * 1000
    assert len(text_of(source, trusted=False, messages=messages)) > 4_000_000


def test_threads_share_a_worker() -> None:
    source = "{% for i in range(99) %}{{ i }}{{ messages[0].content }}{% endfor %}"
    chats = [[{"content": str(number)}] for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda chat: text_of(source, trusted=False, messages=chat), chats))
    assert texts == [text_of(source, messages=chat) for chat in chats]


SYNTAX = ["{{ ", " }}", "{% ", " %}", "messages", "[0]", ".content", " | tojson", "for x in ", "endfor", "if "]
SOURCES = st.lists(st.sampled_from(SYNTAX) | st.text(max_size=4), max_size=12).map("".join)
LEAVES = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"]))


@given(source=SOURCES, content=st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3)))
def test_any_text_renders_or_is_refused(source: str, content: Any) -> None:
    try:
        text_of(source, trusted=False, messages=[{"content": content}])
    except SlingshotError as error:
        assert "\n" not in str(error)
