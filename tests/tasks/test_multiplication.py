"""Multiplication: a product worked by hand, every calculation checked by Python, keys, answers right and wrong."""

import itertools
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.environments.calculator import Calculator
from slingshot.tasks.loader import load_task
from slingshot.tasks.multiplication import long_multiplication, lowest_first
from slingshot.tasks.task import Problem, Solution

WORKED = (
    "4 8 by 6 7. 6: 4*6=24,+0=24; 8*6=48,+2=50: 4 0 5. "
    "7: 4*7=28,+0=28,+0=28; 8*7=56,+5=61,+2=63: 4 8 3 6, read back 6 3 8 4."
)
WORKED_JA = (
    "4 8に6 7。6:4*6=24,+0=24;8*6=48,+2=50:4 0 5。7:4*7=28,+0=28,+0=28;8*7=56,+5=61,+2=63:4 8 3 6、逆に6 3 8 4。"
)
LEVELS = {"2x2", "2x3", "2x4", "3x3", "3x4", "4x4"}
STEP = re.compile(r"(\d)\*(\d)=(\d+)((?:,\+\d=\d+)+)")


def product_of(a, b, language="en"):
    return Problem(f"What is {a} x {b}?", f"{min(a, b)}x{max(a, b)}", str(a * b), language, {"factors": [a, b]})


@pytest.mark.parametrize(("language", "worked"), [("en", WORKED), ("ja", WORKED_JA)])
def test_a_product_worked_by_hand(language, worked):
    task, problem = load_task("multiplication"), product_of(84, 76, language)
    assert task.solution(problem, "steps", random.Random(0)) == Solution(worked, "6384")
    assert task.solution(problem, "answer", random.Random(0)) == Solution("", "6384")


@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_calculator_is_asked_for_the_product(language):
    (call,) = load_task("multiplication").calls(product_of(84, 76, language))
    assert call.name == "calculator" and Calculator().call(json.loads(call.arguments)) == "6384"


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_every_calculation_is_true_and_small_and_the_last_sum_is_the_product(a, b):
    text = load_task("multiplication").solution(product_of(a, b), "steps", random.Random(0)).reasoning
    steps = STEP.findall(text)
    assert len(steps) == len(str(a)) * len(str(b))
    for one, two, result, more in steps:
        value = int(result)
        assert value == int(one) * int(two)
        for added, after in re.findall(r"\+(\d)=(\d+)", more):
            value += int(added)
            assert value == int(after) < 100
    lowest, highest = text.rpartition(": ")[2].removesuffix(".").replace(" ", "").split(",readback")
    assert int(lowest[::-1]) == int(highest) == a * b and highest == str(a * b)
    for place, row in enumerate(long_multiplication(lowest_first(a), lowest_first(b)), start=1):
        assert int("".join(map(str, row.total[::-1]))) == a * (b % 10**place)


def test_digits_of_the_reasoning_stand_alone_or_are_results_below_100():
    for _, solution in itertools.islice(load_task("multiplication").documents("train", 0, "steps"), 100):
        assert max(map(len, re.findall(r"\d+", solution.reasoning))) <= 2


@pytest.mark.parametrize(("language", "slip"), [("en", r"(\d+), wait, (\d+)"), ("ja", r"(\d+)、いや(\d+)")])
def test_a_slip_is_one_wrong_result_put_right(language, slip):
    task, problem, places = load_task("multiplication"), product_of(101, 76, language), set()
    steps = task.solution(problem, "steps", random.Random(0)).reasoning
    for seed in range(200):
        reasoning = task.solution(problem, "slips", random.Random(seed)).reasoning
        (found,) = re.finditer(slip, reasoning)
        assert found[1] != found[2] and re.sub(slip, r"\2", reasoning) == steps
        places.add(found.start())
    assert len(places) == 15  # three steps of two results, and three of three


def test_problems_keep_to_their_digits_and_the_order_of_factors_is_no_matter():
    task, lengths = load_task("multiplication", min_digits=2, max_digits=4), set()
    for problem, solution in itertools.islice(task.documents("test", 1, "slips"), 300):
        a, b = map(int, re.findall(r"\d+", problem.prompt))
        assert problem.data["factors"] == [a, b] and problem.key == "x".join(map(str, sorted((a, b))))
        assert problem.prompt == (f"What is {a} x {b}?" if problem.language == "en" else f"{a} x {b}はいくつ?")
        assert solution.answer == problem.answer == str(a * b)
        lengths |= {len(str(a)), len(str(b))}
        assert problem.data["level"] in {f"{len(str(a))}x{len(str(b))}", f"{len(str(b))}x{len(str(a))}"} & LEVELS
        for text in (solution.answer, f"{a * b:,}", f" {a * b}. "):
            assert task.verify(problem, text).value == 1.0
        for text in (str(a * b + 1), str(a * b)[:-1], f"{a * b} {a * b}", f"{a} x {b}", "", solution.reasoning):
            assert task.verify(problem, text).value == 0.0
        whole = f"{solution.reasoning}\n{solution.answer}"
        assert task.verify(problem, whole).value == 0.0 and task.verify(problem, whole, lenient=True).value == 1.0
    assert lengths == {2, 3, 4}
