"""The sandbox of chat templates: what it offers, and that no template gets out, hangs, or fills the memory."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jinja2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.text import jinja
from slingshot.text.chat_template import render

BLOCKS = ("if 1", "for x in y", "macro m()", "call m()", "filter upper", "with", "set x", "generation")


def nested(opening: str, times: int) -> str:
    return f"{{% {opening} %}}" * times + f"{{% end{opening.split()[0]} %}}" * times


def loop(body: str, start: str = "a=[1], b=[1], t='xy'", times: int = 99_999) -> str:
    return f"{{% set ns = namespace({start}) %}}{{% for i in range({times}) %}}{body}{{% endfor %}}{{{{ ns.a }}}}{{{{ ns.a == ns.b }}}}{{{{ ns.t }}}}"


BIG = "{% set big = 'xy' * 1000000 %}"
HOSTILE = [
    # time
    "{% set xs = range(99999) %}{% for a in xs %}{% for b in xs %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 40 + "x" + "{% endcall %}" * 40,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    loop("{% set ns.a = ns.a | map('string') %}") + "{{ ns.a | list }}",
    "{% set a = 'a' * 400000 %}{{ a.rfind('ab' + a[:200000]) }}",
    "{% set a = 'a' * 400000 %}{{ a.rsplit('ab' + a[:200000]) }}",
    BIG + "{{ big.find(big + 'z') }}{{ (big + 'z') in big }}{{ big.count('xy' * 100 + 'z') }}",
    # repeating
    "{{ 'x' * 99999999999 }}",
    "{{ 99999999999 * [1] }}",
    BIG + "{{ (([big] * 1000) * 1000) | join }}",
    "{{ range(1000000000) | list }}",
    "{{ lipsum(n=1000000000) }}",
    loop("{% set ns.t = ns.t ~ ns.t %}"),
    loop("{% set ns.t = ns.t + ns.t %}"),
    loop("{% set ns.t = ns.t | replace('x', 'xx') %}"),
    loop("{% set t %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = t %}"),
    loop("{% set t %}{% filter upper %}{{ ns.t }}{{ ns.t }}{% endfilter %}{% endset %}{% set ns.t = t %}"),
    BIG + "{{ big.replace('x', big) }}",
    BIG + "{{ big.replace('', big) }}",
    BIG + "{{ big | replace('x', big) }}",
    BIG + "{{ big | replace(old='x', new=big) }}",
    BIG + "{{ big.join(big) }}",
    BIG + "{{ big | join(big) }}",
    BIG + "{{ big " + "~ big " * 10_000 + "}}",
    BIG + "{{ big " + "+ big " * 100 + "}}",
    BIG + "{{ [" + "big, " * 10_000 + "] }}",
    BIG + "{% macro f() %}{% for i in range(99999) %}{{ [big] }}{% endfor %}{% endmacro %}{{ f() | length }}",
    BIG + "{% macro f() %}{% for i in range(99999) %}{{ big ~ i }}{% endfor %}{% endmacro %}{{ f() | length }}",
    BIG + "{% macro f(s) %}{% set t = s[1:] %}{{ f(t) }}{% endmacro %}{{ f(big) }}",
    BIG + loop("{% set s = big ~ i %}{% macro m() %}{{ s }}{% endmacro %}{% set ns.a = ns.a + [m] %}"),
    BIG + loop("{% set ns.a = ns.a + [big ~ i] %}"),
    BIG + "{{ big | list | length }}{{ big | title | length }}{{ big.split('y') | length }}",
    # formatting
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%(a)*d' % {'a': 1} }}",
    "{{ '%.1000000000f' % 1 }}",
    BIG + "{{ ('%(a)s' * 100000) % {'a': big} }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    BIG + "{{ ('{0}' * 100000).format(big) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'x' | center(1000000000) }}{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.zfill(1000000000) }}",
    "{{ 'x'.expandtabs(1000000000) }}",
    BIG + "{{ big.replace('y', '\n') | indent(1000000) }}",
    BIG + "{{ big.replace('y', '\n') | indent(width=big) }}",
    "{{ {'a': [1]} | tojson(indent=1000000000) }}",
    BIG + "{{ range(99999) | list | tojson(separators=(big, ':')) }}",
    "{{ ('\\x00' * 4000000) | tojson }}",
    "{{ strftime_now('%c' * 1000000) }}",
    "{{ raise_exception('x' * 4000000) }}",
    # numbers
    "{{ 2 ** 9999999999 }}",
    loop("{% set ns.a = (ns.a if ns.a is integer else 2) * (ns.a if ns.a is integer else 2) %}"),
    "{{ 0x" + "f" * 60_000 + " // 0x" + "e" * 30_000 + " }}",
    "{{ 0x" + "f" * 90_000 + " }}",
    "{{ ('f' * 4000000) | int(base=16) }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    # lists that hold the same thing many times, and lists in lists
    loop("{% set ns.a = [ns.a, ns.a] %}", times=60),
    loop("{% set ns.a = (ns.a, ns.a) %}{% set ns.b = (ns.b, ns.b) %}", times=60),
    loop("{% set ns.a = {'a': ns.a, 'b': ns.a} %}", times=60) + "{{ ns.a | tojson }}",
    loop("{% set ns.a = {'a': ns.a.items(), 'b': ns.a.items()} %}", "a={}", times=60),
    loop("{% set ns.a = namespace(a=ns.a, b=ns.a) %}", times=60),
    loop("{% set ns.a = ns.a + ns.a %}"),
    loop("{% set ns.a = [ns.a] %}"),
    loop("{% set ns.a = (ns.a,) %}") + "{{ {ns.a: 1} }}",
    "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a }}",
    # source
    *(nested(block, 90_000 // (len(block) * 2 + 12)) for block in BLOCKS),
    *(
        "{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}",
        "{{ " + "[" * 40_000 + "]" * 40_000 + " }}",
        "{{ " + "-" * 90_000 + "1 }}",
    ),
    *("{{ 1" + part * (90_000 // len(part)) + " }}" for part in ("+1", "|d", ".b", "()", " and 1", "==1", "~1", "[1]")),
    "{% if 0 %}" + "{% elif 1 %}" * 7000 + "{% endif %}",
    "".join(f"{{% for x{i} in y %}}" for i in range(19)) + "{{ a }}{% set b = a %}" * 3000 + "{% endfor %}" * 19,
    "{#" * 49_000,
    "{{" * 49_000,
    "{{ " + "'" * 90_001 + " }}",
    "x" * (jinja.MAX_SOURCE + 1),
    "{{ " + "1" * 90_000 + " }}",
]

# Runs in a process that may not have more than 900 MB of addresses, 80 MB of which Python itself takes.
CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20))
from slingshot.text import jinja
from slingshot.text.chat_template import render
from slingshot.base.errors import SlingshotError
jinja.MAX_SECONDS = 0.2
for source in json.load(sys.stdin):
    start = time.process_time()
    try:
        told = "".join(render(source, [{"role": "user", "content": "hello"}], ["<think>"]))[:20]
    except SlingshotError as error:
        told = str(error)
    print(json.dumps([time.process_time() - start, told]), flush=True)
"""


def test_no_template_hangs_or_fills_the_memory() -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(HOSTILE), capture_output=True, text=True)
    told = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(told) == len(HOSTILE), f"{HOSTILE[len(told)][:200]!r} ended the process: {child.stderr[-500:]}"
    for source, (seconds, text) in zip(HOSTILE, told, strict=True):
        assert seconds < 4, source[:200]
        assert "\n" not in text and len(text) < 500, source[:200]
        assert "MemoryError" not in text or "elif" in source, source[
            :200
        ]  # as Python's compiler calls what is nested too deep


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'x' * 20000 }}", "more than 10000 characters"),
        ("{{ ('x' * 9000) ~ ('x' * 9000) }}", "more than 10000 characters"),
        ("{% for a in range(9999) %}xx{% endfor %}", "more than 10000 characters"),
        ("{{ ('x' * 100).replace('x', 'y' * 200) }}", "more than 10000 characters"),
        ("{{ ('x' * 100) | replace('x', 'y' * 200) }}", "more than 10000 characters"),
        ("{{ ('x' * 200) | join('y' * 100) }}", "more than 10000 characters"),
        ("{{ ('%s' * 200) % ('y' * 100) }}", "more than 10000 characters"),
        ("{{ ('{}' * 200).format('y' * 100) }}", "more than 10000 characters"),
        ("{{ ('a\n' * 200) | indent(100) }}", "more than 10000 characters"),
        ("{% for a in range(9999) %}{% set b = 'x' * 900 %}{% endfor %}", "more than 0 MB"),
        (
            "{% set l = ['x' * 99] %}{% macro f() %}{% for a in range(9999) %}{{ l }}{% endfor %}{% endmacro %}{{ f() }}",
            "more than 0 MB",
        ),
        (
            "{% set ns = namespace(a=1) %}{% for a in range(300) %}{% set ns.a = [ns.a] %}{% endfor %}",
            "more than 200 deep",
        ),
        ("{{ '%9999d' % 1 }}", "a width of more than 999"),
        ("{{ '{:9999}'.format(1) }}", "a width of more than 999"),
        ("{{ '%*d' % (9, 1) }}", "a width taken from an argument"),
        ("{{ '{:{}}'.format(1, 9) }}", "a width taken from an argument"),
        ("{{ ('f' * 500) | int(base=16) + 1 }}", "whole numbers beyond 1024 bits"),
        ("{{ 2 ** 3 }}", "powers"),
        ("{{ 1 | tojson(indent=101) }}", "101 characters where 100 would be many"),
        ("{{ strftime_now('%Y' * 501) }}", "1002 characters where 1000 would be many"),
        ("x" * 100_001, "has 100001 characters, more than 100000"),
    ],
)
def test_bounds(source: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja, "MAX_CHARS", 10_000)
    monkeypatch.setattr(jinja, "MAX_BYTES", 400_000)
    with pytest.raises(SlingshotError, match=reason):
        render(source, [], [])


@pytest.mark.parametrize(
    "source",
    [
        "{% set xs = range(99999) %}{% for a in xs %}{% for b in xs %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 1 }}" * 10_000,  # while it is compiled
    ],
)
def test_time_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja, "MAX_SECONDS", 0.05)
    start = time.monotonic()
    with pytest.raises(SlingshotError, match=r"more than 0\.05 s"):
        render(source, [], [])
    assert time.monotonic() - start < 5


def test_long_honest_chats_fit() -> None:
    """Every message goes through what templates do with one; a million tokens are four million characters."""
    source = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set text = m.content | trim %}{% set ns.all = ns.all + [text] %}"
        "{{ '<|im_start|>' + m.role + '\n' + text.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}{{ ns.all | length }}"
    )
    messages = [{"role": "user", "content": "日本語と text <think> " * 240}] * 1000
    assert sum(map(len, render(source, messages, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]))) > 4_000_000


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ''['__class__'].x }}", "unsafe"),
        ("{{ '' | attr('__class__') }}", "No filter named 'attr'"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{{ '{a.__class__}'.format_map({'a': 1}) }}", "unsafe"),
        ("{{ ''.encode() }}", "unsafe"),
        ("{{ (1).bit_length() }}", "unsafe"),
        ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{% macro m() %}{% endmacro %}{{ m._environment.x }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns._a = 1 %}", "names of that kind belong to Python"),
        ("{{ namespace(__class__=1) }}", "names of that kind belong to Python"),
        ("{% include 'x' %}", "no loader"),
        ("{% import 'x' as x %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
        ("{% autoescape true %}{% endautoescape %}", "autoescape"),
        ("{% for %}", "Expected"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ missing.field }}", "undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_refused(source: str, reason: str) -> None:
    with pytest.raises(SlingshotError, match=reason) as caught:
        render(source, [{"role": "user", "content": "hello"}], [])
    assert "\n" not in str(caught.value)


def test_attributes_of_python_print_nothing() -> None:
    assert render("{{ '{0.__class__}'.format(1) }}{{ messages.__class__ }}{{ loop }}{{ namespace.mro }}", [], []) == [
        ""
    ]


def test_json_as_python_writes_it() -> None:
    value = {"b": [1, 2.5, None, True, {}], "a": 'é\x7f😀"\n'}
    for options in (
        {},
        {"indent": 2},
        {"ensure_ascii": True},
        {"sort_keys": True, "separators": (",", ":")},
        {"indent": 0},
        {"indent": "\t"},
    ):
        arguments = ", ".join(f"{key}={option!r}" for key, option in options.items())
        assert render(f"{{{{ value | tojson({arguments}) }}}}", [], [], value=value) == [
            json.dumps(value, **{"ensure_ascii": False, **options})
        ]


def test_a_scope_of_its_own_for_what_the_assistant_wrote() -> None:
    assert render("{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}-{{ a }}", [], []) == ["1-"]


def test_threads_share_a_template() -> None:
    source = "{% for i in range(999) %}{{ i }}{{ messages[0].content + '<eos>' }}{% endfor %}"
    chats = [[{"role": "user", "content": f"<eos>{number}"}] for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda chat: render(source, chat, ["<eos>"]), chats))
    assert pieces == [render(source, chat, ["<eos>"]) for chat in chats]


def test_a_template_leaves_nothing_behind() -> None:
    template = jinja.Template("{{ messages + [] }}")
    template.render(messages=[["x"] * 1000])
    assert not template._environment.meter.known


# Expressions and statements, well formed and not, over everything the sandbox offers and much that it does not.
names = [
    "messages",
    "messages[0]",
    "messages[-1].content",
    "ns.a",
    "x",
    "loop",
    "bos_token",
    "namespace",
    "cycler",
    "range",
    "m",
    "none",
    "true",
]
constants = [
    "1",
    "-1",
    "0",
    "99999",
    "1e9",
    "2.5",
    "''",
    "'ab\\n'",
    "'%s'",
    "'{}'",
    "'%9d'",
    "'{:>{}}'",
    "'<think>'",
    "[]",
    "{}",
]
with_arguments = ["replace('a', 'bb')", "tojson(indent=9)", "map('list')", "batch(3)", "attr('a')", "join(', ')"]
filters = st.sampled_from([*jinja._FILTERS, "join", "tojson", *with_arguments])
methods = st.sampled_from(
    [*jinja._TEXT, "items", "keys", "get", "copy", "append", "__class__", "zfill", "encode", "cycle", "x"]
)
operators = st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "not in"])
tests = st.sampled_from(
    ["defined", "string", "mapping", "none", "iterable", "sequence", "odd", "divisibleby(0)", "in [1]", "sameas none"]
)


def _deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arguments = st.lists(inner, max_size=2).map(", ".join)
    return st.one_of(
        st.tuples(inner, filters).map(lambda p: f"({p[0]} | {p[1]})"),
        st.tuples(inner, methods, arguments).map(lambda p: f"{p[0]}.{p[1]}({p[2]})"),
        st.tuples(inner, arguments).map(lambda p: f"{p[0]}({p[1]})"),
        st.tuples(inner, operators, inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(inner, tests).map(lambda p: f"({p[0]} is {p[1]})"),
        st.tuples(inner, inner, inner).map(lambda p: f"{p[0]}[{p[1]}:{p[2]}]"),
        st.tuples(inner, inner).map(lambda p: f"{p[0]}[{p[1]}]"),
        st.lists(inner, max_size=3).map(lambda p: f"[{', '.join(p)}]"),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: f"({', '.join(p)},)"),
        st.tuples(inner, inner).map(lambda p: f"{{{p[0]}: {p[1]}}}"),
        st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} if {p[1]} else {p[2]})"),
    )


expressions = st.recursive(st.sampled_from(names + constants), _deeper, max_leaves=8)


def _around(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(expressions, inner).map(lambda p: f"{{% for x in {p[0]} %}}{p[1]}{{% endfor %}}"),
        st.tuples(expressions, inner).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% else %}}{{{{ x }}}}{{% endif %}}"),
        st.tuples(inner, expressions).map(lambda p: f"{{% macro m(x) %}}{p[0]}{{% endmacro %}}{{{{ m({p[1]}) }}}}"),
        st.tuples(inner, expressions).map(lambda p: f"{{% call m({p[1]}) %}}{p[0]}{{% endcall %}}"),
        inner.map(lambda p: f"{{% set x %}}{p}{{% endset %}}"),
        inner.map(lambda p: f"{{% generation %}}{p}{{% endgeneration %}}"),
        st.lists(inner, max_size=3).map("".join),
    )


statements = st.recursive(
    st.one_of(
        expressions.map(lambda e: f"{{{{ {e} }}}}"),
        expressions.map(lambda e: f"{{% set ns.a = {e} %}}"),
        expressions.map(lambda e: f"{{% set x = {e} %}}"),
        st.sampled_from(
            [
                "{% break %}",
                "{% continue %}",
                "{{ raise_exception('no') }}",
                "{#",
                "{%- ",
                "-}}",
                "{% endfor %}",
                "\n  ",
            ]
        ),
        st.text(max_size=5),
    ),
    _around,
    max_leaves=6,
)
said = st.text(st.characters(), max_size=6) | st.sampled_from(["<think>", "a<th", "ink>", "\udc00"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | said,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(said, inner, max_size=3),
    max_leaves=6,
)
fuzz = settings(derandomize=True, deadline=None, max_examples=500)


@pytest.fixture(scope="module")
def quick() -> "pytest.MonkeyPatch":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja, "MAX_SECONDS", 1.0)
        patch.setattr(jinja, "MAX_CHARS", 100_000)
        yield patch


def outcome(source: str, messages: object) -> str:
    try:
        return "".join(render(source, messages, ["<think>", "</think>"], {"bos_token": "<think>"}))  # type: ignore[arg-type]
    except SlingshotError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's compiler about what is called or subscripted
@fuzz
@given(body=statements, content=json_values)
@example(body="{{ ([99999] * 99999) }}", content=1)
def test_any_template_renders_or_is_refused(quick: pytest.MonkeyPatch, body: str, content: object) -> None:
    start = time.monotonic()
    outcome(
        "{% set ns = namespace(a=[1]) %}" + body,
        [{"role": "user", "content": content}, {"role": "assistant", "content": "<think>b</think>c"}],
    )
    assert time.monotonic() - start < 3


@fuzz
@given(
    source=st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")) | st.text(st.characters(), max_size=40),
    messages=json_values,
)
def test_so_does_any_text(quick: pytest.MonkeyPatch, source: str, messages: object) -> None:
    outcome(source, messages)


def test_the_whole_of_jinja_that_is_offered_is_jinjas() -> None:
    """Where the meter stands between, the result is still the plain sandbox's."""
    plain = jinja2.sandbox.SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    cases = [
        "{{ [3, 1, 2] | sort }}{{ 'a-b' | title }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 1, 2] | unique | list }}{{ 'x\ny' | indent(2, true) }}",
        "{{ ['a', 'b'] | join('-') }}{{ [{'a': 1}, {'a': 2}] | join('+', attribute='a') }}{{ 'a' ~ 1 }}{{ [{'a': 1}] | map(attribute='a') | first }}",
        "{% for k, v in {'x': 1}.items() %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{{ k }}{{ v }}{% endfor %}",
        "{% for x in [] %}{% else %}e{% endfor %}{% for x in 'ab' %}{{ x }}{{ loop.revindex }}{% endfor %}",
        "{% if [] | selectattr('a') %}yes{% endif %}{% set g = [1, 2] | map('string') %}{{ g | list }}{{ g | list }}",
        "{{ '%s-%05.1f' % ('a', 2.25) }}{{ '{0}-{b:>4}'.format(1, b='x') }}{{ '%d' | format(3) }}",
        "{{ (1, 'a') }}{{ {'k': (1,)} }}{{ 7 // 2 }}{{ -7 % 3 }}{{ 7 / 2 }}{{ 'a' * 3 }}{{ [1] * 2 + [3] }}",
        "{{ 'a<b' | e }}{{ ('<b>' | safe) ~ '<' }}{{ ('<b>' | safe) + '<' }}{{ ['<' | safe, '<'] | join(',') }}{{ 'aXbX'.replace('X', '<', 1) }}",
        "{{ range(3) | list }}{{ [1, 2, 3][::-1] }}{{ 'abc'[1:] }}{{ 'abc' | first }}{{ 'abc' | last }}{{ 'abc' | reverse }}{{ [[1, 2]] | length }}",
        "{{ 'x' | int }}{{ '3' | int }}{{ '2.5' | float }}{{ none | default('d') }}{{ nothing | default('d') }}{{ '' | d('d', true) }}{{ -3 | abs }}",
        "{% set ns = namespace(x=1) %}{% for i in range(3) %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
        "{% macro f(a, b=2) %}{{ a + b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(3) %}c{% endcall %}",
        "{{ dict(a=1).items() | list }}{{ {'a': 1}.get('b', 'no') }}{{ 'a,b'.split(',') }}{{ 'aXb'.partition('X') }}{{ 'x'.join(['1', '2']) }}",
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}",
        "{{ ['ab', 'ac', 'ba'] | groupby(0) | list }}{{ [1, 2, 3] | select('odd') | list }}{{ [2, 1] | max }}{{ {'a': 1} | items | list }}",
    ]
    for source in cases:
        assert "".join(render(source, [], [])) == plain.from_string(source).render(), source
