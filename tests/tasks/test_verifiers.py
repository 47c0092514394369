"""Verifiers: how answers are read, strictly and leniently, and which are right."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.worker import SandboxError, Target, Worker
from slingshot.tasks.verifiers import MAX_ANSWER, VERIFIERS, boxed, quantity


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1,234.5 km", "1234.5", "km"), ("$3", "3", ""), ("-$5", "-5", ""), ("50%", "50", "%"), (r"25\%", "25", "%"),
        ("3/4", "3/4", ""), ("1 3/4", "7/4", ""), (r"\frac{3}{4}", "3/4", ""), ("2e5", "200000", ""), (".5", "1/2", ""),
        ("−7", "-7", ""), ("14 apples.", "14", "apple"), (r"12\text{ cm}", "12", "cm"), ("1{,}234", "1234", ""),
        ("12 m^2", "12", "m^2"), ("007", "7", ""), (r"1\frac{3}{4}", "7/4", ""), ("+3", "3", ""),
        ("−1 3/4", "-7/4", ""), ("１，２３４．５％", "1234.5", "%"), ("$2.5 million", "2500000", ""),
        ("3 hundreds", "300", ""),
    ],
)  # fmt: skip
def test_quantities_are_read_as_people_write_them(text, value, unit):
    assert quantity(text) == (Fraction(value), unit)


@pytest.mark.parametrize(
    "text",
    ["", "fourteen", "13 14 15", "13, 14", "1/0", "1,23", "The answer is 14", "9" * 200, "1e9999", "1½", "5²", r"5\pi",
     "5π", "14 or 3"],
)  # fmt: skip
def test_what_is_no_one_quantity_is_none(text):
    assert quantity(text) is None


@pytest.mark.parametrize(
    ("name", "text", "strict", "lenient"),
    [
        ("number", "14", "14", "14"), ("number", "It is 13, no, 14.", None, "14"), ("number", "none", None, None),
        ("number", r"\boxed{14}", "14", "14"), ("number", r"so \boxed{3/4} of 9", None, "3/4"),
        ("number", "x^2 = 1 3/4", None, "1 3/4"), ("number", r"thus \frac{3}{4}", None, "3/4"),
        ("number", "about 25%", None, "25%"), ("number", "答えは１４です。", None, "14"),
        ("number", "some 3 million of them", None, "3 million"), ("number", r"so 1\frac{3}{4}", None, "1 3/4"),
        ("choice", "（Ｂ）。", "B", "B"), ("choice", "The answer is a number", None, None),
        ("choice", "answer: a", None, "A"), ("number", "it costs -$1,234", None, "-$1,234"),
        ("math", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"), ("math", "$x+1$", "x+1", "x+1"),
        ("math", "So\n$x+1$", "So\n$x+1$", "x+1"), ("math", " ", None, None),
        ("choice", "B", "B", "B"), ("choice", "(b).", "B", "B"), ("choice", "A dog", None, None),
        ("choice", "A or B?\nThe answer is (C), not D", None, "C"), ("choice", r"\boxed{\text{D}}", None, "D"),
        ("choice", "Answer: **B**", None, "B"), ("choice", "I think\nD", None, "D"),
        ("choice", "A, B, C, D", None, "D"),
        ("exact", "Paris.", "Paris.", "Paris."), ("exact", "It is\nParis", "It is\nParis", "Paris"),
        ("regex", "one\ntwo", "one\ntwo", "two"),
    ],
)  # fmt: skip
def test_answers_are_read_strictly_and_leniently(name, text, strict, lenient):
    verifier = VERIFIERS[name]
    assert (verifier.read(text), verifier.extract(text)) == (strict, lenient)


@pytest.mark.parametrize(
    ("name", "answer", "gold", "options", "right"),
    [
        ("number", "1,000", "1000.0", {}, 1), ("number", "0.75", "3/4", {}, 1), ("number", "5 km", "5 m", {}, 0),
        ("number", "5 miles", "5 mile", {}, 1), ("number", "5", "5 km", {}, 1), ("number", "50%", "0.5", {}, 1),
        ("number", "50%", "50", {}, 1), ("number", "3 million", "3", {}, 0), ("exact", "!", "?", {}, 0),
        ("exact", "...", "...", {}, 1), ("number", "3.14", "3.1416", {}, 0), ("number", "0.5", "50%", {}, 0),
        ("number", "336", r"336^\circ", {}, 1), ("number", r"336^{\circ}", "336", {}, 1),
        ("number", "3.14", "3.1416", {"tolerance": 0.01}, 1), ("number", "-3.14", "3.14", {"tolerance": 0.01}, 0),
        ("choice", "B", "b", {}, 1), ("choice", "B", "C", {}, 0),
        ("exact", " PARIS. ", "Paris", {}, 1), ("exact", "PARIS", "Paris", {"case": True}, 0),
        ("exact", "Pari", "Paris", {}, 0),
        ("regex", "Colour", "colou?r", {}, 1), ("regex", "the colour", "colou?r", {}, 0),
        ("regex", "Color", "colou?r", {"case": True}, 0),
    ],
)  # fmt: skip
def test_right_answers_are_right_and_others_are_not(name, answer, gold, options, right):
    assert VERIFIERS[name].score(answer, gold, options) == right


@given(st.fractions(-(10**6), 10**6, max_denominator=1000), st.text(max_size=30))
def test_every_fraction_is_read_back_and_no_text_breaks_a_reader(value, noise):
    assert quantity(str(value)) == (value, "")
    assert VERIFIERS["number"].score(str(value), f"{value}", {}) == 1.0
    for verifier in VERIFIERS.values():
        for text in (noise, f"\\boxed{{{noise}", f"{value}{noise}{value}"):
            assert isinstance(verifier.read(text), str | None) and isinstance(verifier.extract(text), str | None)


@pytest.mark.parametrize(
    "piece", ["1", "1,", "{", "\\boxed{", "(A", "\\frac{1", " ", "\n", "answer is ", "1 ", "$", "*"]
)
def test_reading_the_longest_answer_is_quick(piece):
    text = (piece * MAX_ANSWER)[:MAX_ANSWER]
    began = time.perf_counter()
    for verifier in VERIFIERS.values():
        verifier.read(text)
        verifier.extract(text)
    assert time.perf_counter() - began < 20


def test_boxes_end_where_their_braces_do():
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}} so") == r"\frac{1}{\sqrt{2}}"
    assert boxed(r"\boxed{1") is None and boxed("1") is None


@pytest.mark.slow
def test_formulas_are_compared_in_a_worker_and_one_that_hangs_costs_itself():
    pytest.importorskip("math_verify")
    worker, target = Worker(), Target("slingshot.tasks.verifiers:Scorer", ("math", {}), timeout=10.0)
    right = [("1/2", "0.5"), (r"\frac12", "0.5"), ("(1,2)", "(1, 2)"), ("(x+1)^2", "x^2+2x+1"), ("14", "14.0")]
    wrong = [("13 14 15", "14"), ("13, 14, 15", "14"), ("The answer is 42", "42"), ("1", "2"), ("14} 15", "14")]
    wrong += [(r"14}\boxed{15", "15")]
    assert [worker.call(target, "score", "", *pair) for pair in right] == [1.0] * len(right)
    assert [worker.call(target, "score", "", *pair) for pair in wrong] == [0.0] * len(wrong)
    with pytest.raises(SandboxError, match="took longer than 3 s"):
        worker.call(target, "score", "", "(10^8)!", "1", timeout=3.0)
    assert worker.call(target, "score", "", "7", "7.0") == 1.0


def test_a_worker_without_math_verify_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    from slingshot.tasks.verifiers import Scorer

    with pytest.raises(SlingshotError, match="pip install math-verify"):
        Scorer("math", {})
