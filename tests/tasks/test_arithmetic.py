"""Arithmetic: hand-worked chains, worked text in both languages, keys, and numbers read strictly and leniently."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.tasks.arithmetic import chain_key, chain_steps, last_number, read_number
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem

CHAIN = {"numbers": [3, 4, 2, 9], "operators": ["+", "-", "+"]}
ODD = st.characters(exclude_characters="0123456789-,.)\u2212\uff0d")


def chain(language):
    return Problem("What is 3+4-2+9?", "+3+4+9-2", "14", language, CHAIN)


def test_steps_by_hand():
    assert chain_steps([3, 4, 2, 9], ["+", "-", "+"]) == [(3, "+", 4, 7), (7, "-", 2, 5), (5, "+", 9, 14)]
    assert chain_steps([9, 2, 3, 4], ["-", "x", "x"]) == [(2, "x", 3, 6), (6, "x", 4, 24), (9, "-", 24, -15)]


@given(st.integers(1, 99), st.lists(st.tuples(st.sampled_from("+-x"), st.integers(1, 99)), min_size=1, max_size=7))
def test_steps_agree_with_python(first, rest):
    operators, numbers = [operator for operator, _ in rest], [first, *(number for _, number in rest)]
    expression = str(first) + "".join(f"{operator}{number}" for operator, number in rest)
    assert chain_steps(numbers, operators)[-1][3] == eval(expression.replace("x", "*"))
    assert len(chain_steps(numbers, operators)) == len(operators)


@pytest.mark.parametrize(
    ("numbers", "operators", "key"),
    [
        ([3, 4, 2, 9], "+-+", "+3+4+9-2"), ([9, 2, 4, 3], "-++", "+3+4+9-2"), ([4, 2, 3], "+x", "+2x3+4"),
        ([3, 2, 4], "x+", "+2x3+4"), ([2, 4, 3], "-+", "+2+3-4"), ([4, 2, 3], "-+", "+3+4-2"),
    ],
)  # fmt: skip
def test_keys_by_hand(numbers, operators, key):
    assert chain_key(numbers, list(operators)) == key


def test_worked_solutions_in_both_languages():
    task, rng = load_task("arithmetic"), random.Random(0)
    assert task.solution(chain("en"), "answer", rng).reasoning == ""
    assert task.solution(chain("en"), "steps", rng).reasoning == "3 plus 4 is 7, 7 minus 2 is 5, 5 plus 9 is 14"
    assert task.solution(chain("ja"), "steps", rng).reasoning == "3足す4は7、7引く2は5、5足す9は14"
    product = Problem("", "", "12", "ja", {"numbers": [3, 4], "operators": ["x"]})
    assert task.solution(product, "steps", rng).reasoning == "3掛ける4は12"
    assert {task.solution(chain("en"), style, rng).answer for style in ("answer", "steps", "slips")} == {"14"}


@pytest.mark.parametrize(("language", "slip"), [("en", r"(-?\d+), wait, (-?\d+)"), ("ja", r"(-?\d+)、いや(-?\d+)")])
def test_a_slip_is_one_wrong_result_put_right(language, slip):
    task, places = load_task("arithmetic"), set()
    steps = task.solution(chain(language), "steps", random.Random(0)).reasoning
    for seed in range(50):
        reasoning = task.solution(chain(language), "slips", random.Random(seed)).reasoning
        ((wrong, right),) = re.findall(slip, reasoning)
        assert 1 <= abs(int(wrong) - int(right)) <= 2
        assert re.sub(slip, r"\2", reasoning) == steps
        places.add(right)
    assert places == {"7", "5", "14"}


def test_problems_keep_to_their_parameters():
    task = load_task("arithmetic", min_terms=2, max_terms=3, digits=2, operators="+x", languages=["en"])
    terms = []
    for problem in itertools.islice(task.problems("train", 0), 500):
        expression = re.fullmatch(r"What is ([1-9][0-9]?(?:[+x][1-9][0-9]?){1,2})\?", problem.prompt).group(1)
        assert int(problem.answer) == eval(expression.replace("x", "*"))
        terms.append(re.split(r"[+x]", expression))
    assert set(map(len, terms)) == {2, 3} and set(map(len, itertools.chain(*terms))) == {1, 2}


def test_prompts_speak_their_language_and_solutions_verify():
    task, languages = load_task("arithmetic"), set()
    for problem, solution in itertools.islice(task.documents("test", 3, "slips"), 200):
        languages.add(problem.language)
        assert ("What is" in problem.prompt) == (problem.language == "en")
        assert ("はいくつ" in problem.prompt) == (problem.language == "ja")
        assert task.verify(problem, solution.answer).value == 1.0
        assert task.verify(problem, f"{solution.reasoning}\n{solution.answer}", lenient=True).value == 1.0
    assert languages == {"en", "ja"}


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("14", "14", "14"), (" -2\n", "-2", "-2"), ("14.", "14", "14"), ("14。", "14", "14"), ("007", "7", "7"),
        ("1,234", "1234", "1234"), ("-1,234,567.", "-1234567", "-1234567"), ("\u22125", "-5", "-5"), ("-0", "0", "0"),
        ("14.0", "14", "14"), ("0.50", "0.5", "0.5"), ("-0.0", "0", "0"),
        ("", None, None), ("none", None, None), ("-", None, None), ("１４", None, None), ("½", None, None),
        ("9" * 65, None, None), ("14 15", None, "15"), ("14, 15", None, "15"), ("12,34", None, "34"),
        ("1,2345", None, "2345"), ("It is 14", None, "14"), ("14 is it", None, "14"), ("14..", None, "14"),
        ("3+4", None, "4"), ("--4", None, "-4"), ("+4", None, "4"), ("1e3", None, "3"), ("0x1f", None, "1"),
        (".5", None, "5"), ("5-", None, "5"), ("14\n15", None, "15"), ("7-2 is 5", None, "5"), ("is -4", None, "-4"),
        ("10-3", None, "3"), ("(2)-3", None, "3"), ("= \u22124", None, "-4"), ("a14b", None, "14"),
        ("the sum is 1,234.", None, "1234"), ("1,2", None, "2"), ("12,3456", None, "3456"), ("x=14.0!", None, "14"),
        ("14の", None, "14"), ("first 3 then 007", None, "7"),
    ],
)  # fmt: skip
def test_numbers_read_strictly_and_leniently(text, strict, lenient):
    assert (read_number(text), last_number(text)) == (strict, lenient)
    task = load_task("arithmetic")
    assert task.verify(chain("en"), text).value == float(strict == "14")
    assert task.verify(chain("en"), text, lenient=True).value == float(lenient == "14")


@given(st.integers(-(10**15), 10**15), st.text(ODD), st.text())
def test_integers_are_read_back_in_any_surroundings(value, words, text):
    for spelling in (str(value), f"{value:,}"):
        assert read_number(f" {spelling}. ") == str(value)
        assert last_number(f"{words}{spelling}{words}") == str(value)
    assert read_number(text) in (None, last_number(text))
