"""Arithmetic: hand-worked chains, worked text in both languages, keys, and strictness of the verifier."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.tasks.arithmetic import chain_key, chain_steps
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem

CHAIN = {"numbers": [3, 4, 2, 9], "operators": ["+", "-", "+"]}


def chain(language):
    return Problem("What is 3+4-2+9?", "+3+4+9-2", "14", language, CHAIN)


@st.composite
def chains(draw):
    numbers = draw(st.lists(st.integers(1, 99), min_size=2, max_size=8))
    operators = draw(st.lists(st.sampled_from("+-x"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    return numbers, operators


def test_steps_by_hand():
    assert chain_steps([3, 4, 2, 9], ["+", "-", "+"]) == [(3, "+", 4, 7), (7, "-", 2, 5), (5, "+", 9, 14)]
    assert chain_steps([9, 2, 3, 4], ["-", "x", "x"]) == [(2, "x", 3, 6), (6, "x", 4, 24), (9, "-", 24, -15)]


@settings(derandomize=True, deadline=None)
@given(chains())
def test_steps_agree_with_python(given_chain):
    numbers, operators = given_chain
    expression = str(numbers[0]) + "".join(
        f"{operator}{number}" for operator, number in zip(operators, numbers[1:], strict=True)
    )
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
    task = load_task("arithmetic")
    rng = random.Random(0)
    assert task.solution(chain("en"), "answer", rng).reasoning == ""
    assert task.solution(chain("en"), "steps", rng).reasoning == "3 plus 4 is 7, 7 minus 2 is 5, 5 plus 9 is 14"
    assert task.solution(chain("ja"), "steps", rng).reasoning == "3足す4は7、7引く2は5、5足す9は14"
    product = Problem("", "", "12", "ja", {"numbers": [3, 4], "operators": ["x"]})
    assert task.solution(product, "steps", rng).reasoning == "3掛ける4は12"
    assert {task.solution(chain("en"), style, rng).answer for style in ("answer", "steps", "slips")} == {"14"}


@pytest.mark.parametrize(("language", "slip"), [("en", r"(-?\d+), wait, (-?\d+)"), ("ja", r"(-?\d+)、いや(-?\d+)")])
def test_a_slip_is_one_wrong_result_put_right(language, slip):
    task = load_task("arithmetic")
    steps = task.solution(chain(language), "steps", random.Random(0)).reasoning
    places = set()
    for seed in range(50):
        reasoning = task.solution(chain(language), "slips", random.Random(seed)).reasoning
        ((wrong, right),) = re.findall(slip, reasoning)
        assert 1 <= abs(int(wrong) - int(right)) <= 2
        assert re.sub(slip, r"\2", reasoning) == steps
        places.add(right)
    assert places == {"7", "5", "14"}


def test_problems_keep_to_their_parameters():
    task = load_task("arithmetic", min_terms=2, max_terms=3, digits=2, operators="+x", languages=["en"])
    seen_terms, seen_lengths = set(), set()
    for problem in itertools.islice(task.problems("train", 0), 500):
        expression = re.fullmatch(r"What is ([1-9][0-9]?(?:[+x][1-9][0-9]?){1,2})\?", problem.prompt).group(1)
        assert int(problem.answer) == eval(expression.replace("x", "*"))
        terms = re.split(r"[+x]", expression)
        seen_terms.add(len(terms))
        seen_lengths.update(map(len, terms))
    assert seen_terms == {2, 3} and seen_lengths == {1, 2}


def test_prompts_speak_their_language_and_solutions_verify():
    task = load_task("arithmetic")
    languages = set()
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
        ("14", 1.0, 1.0), (" 14.\n", 1.0, 1.0), ("15", 0.0, 0.0), ("-14", 0.0, 0.0), ("The answer is 14.", 0.0, 1.0),
        ("14 15", 0.0, 0.0), ("12 13 14", 0.0, 1.0), ("14 or 15", 0.0, 0.0), ("1 4", 0.0, 0.0), ("", 0.0, 0.0),
    ],
)  # fmt: skip
def test_verify_strictly_and_leniently(text, strict, lenient):
    task = load_task("arithmetic")
    assert task.verify(chain("en"), text).value == strict
    assert task.verify(chain("en"), text, lenient=True).value == lenient
