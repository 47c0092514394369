"""Countdown: hand-worked expressions, an oracle built beside the text, hostile answers, and worked text."""

import itertools
import random
import re
import warnings
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.tasks.countdown import leaves, parse, render, value_of
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem, Solution

PROBLEM = Problem("Make 13 from 2, 3, 7.", "2,3,7=13", "3*2+7", "en", {"numbers": [2, 3, 7], "target": 13})


@st.composite
def trees(draw, max_depth=4):
    if max_depth == 0 or draw(st.booleans()):
        return draw(st.integers(0, 20))
    return (draw(st.sampled_from("+-*/")), draw(trees(max_depth - 1)), draw(trees(max_depth - 1)))


def exact(tree):
    """The oracle: its value as Python has it with Fractions, or None for a division by zero."""
    try:
        return Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", bracketed(tree))))
    except ZeroDivisionError:
        return None


def bracketed(tree):
    return str(tree) if isinstance(tree, int) else f"({bracketed(tree[1])} {tree[0]} {bracketed(tree[2])})"


@given(trees())
def test_expressions_mean_what_they_say(tree):
    for text in (bracketed(tree), render(tree)):
        assert value_of(parse(text)) == exact(tree)
        assert leaves(parse(text)) == leaves(tree)
    assert parse(render(tree)) == tree  # parentheses keep the order of operations, not only the value


@given(trees())
def test_verify_accepts_exactly_the_numbers_and_the_target(tree):
    task = load_task("countdown")
    numbers, value = leaves(tree), exact(tree)
    target = 7 if value is None else value
    right = float(value is not None)
    for has, wanted, reward in (numbers[::-1], target, right), (numbers, target + 1, 0.0), ([*numbers, 1], target, 0.0):
        assert task.verify(Problem("", "", data={"numbers": has, "target": wanted}), render(tree)).value == reward


@given(st.one_of(st.text(), st.text("0123456789()+-*/ .=_ex", max_size=300)))
def test_any_text_is_scored_without_an_exception(text):
    task = load_task("countdown")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lenient in (False, True):
            assert task.verify(PROBLEM, text, lenient=lenient).value in (0.0, 1.0)


RIGHT = "3*2+7", " 7 + 2*3. ", "(2*3)+7", "7+(3)*2", "2\u00d73+7", "7 + 3 * 2\n"


@pytest.mark.parametrize(
    "text",
    [
        *RIGHT, "13", "2+3+7", "3*2+7=13", "3*2+7, 2+3+7", "3*2+7 7*2-1", "3*2+7 or so", "6+7", "3*2+7+7-7",
        "7--(3*2)", "-3*-2+7", "+7+3*2", "3*2+07", "3*2+7.0",
        "3**2+7-2", "13//1", "7+0x3*2", "(3*2+7", "3*2+7)", "2(3)+7", "3 2 7", "", "()", "(" * 300, "2" * 300,
        "1" + "+1" * 120, "__import__('os')",
        "3*2+7 if 1 else 0", "3*2+7#", "[3*2+7][0]", "3*2+7\x00", "3*2\n+7",
    ],
)  # fmt: skip
def test_right_wrong_and_hostile_answers(text):
    assert load_task("countdown").verify(PROBLEM, text).value == float(text in RIGHT)


@pytest.mark.parametrize(
    ("numbers", "target", "text", "value"), [([3, 3, 8, 8], 24, "8/(3-8/3)", 1.0), ([1, 2, 2], 0, "1/(2-2)", 0.0)]
)
def test_fractions_on_the_way_are_exact_and_division_by_zero_is_wrong(numbers, target, text, value):
    assert (
        load_task("countdown").verify(Problem("", "", data={"numbers": numbers, "target": target}), text).value == value
    )


def test_depth_is_bounded():
    nested = "(1+" * 16 + "1" + ")" * 16
    assert parse(nested) is not None and parse(f"1+{nested}") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3*2+7 is 6+7 is 13, yes.\n3*2+7", "3*2+7"), ("3*2+7 = 13", "3*2+7"), ("I say (2 * 3) + 7!", "(2 * 3) + 7"),
        ("first 2+3, then 7", "2+3"), ("7 - it is 3*2+7 - or", "3*2+7"), ("3*2+7 (so", "3*2+7"), ("only 13", None),
    ],
)  # fmt: skip
def test_lenient_reading_takes_the_last_expression(text, answer):
    assert load_task("countdown").extract(text) == answer


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (("+", ("*", 3, 2), 7), "3*2+7"), (("*", ("+", 3, 2), 7), "(3+2)*7"), (("-", 9, ("-", 5, 2)), "9-(5-2)"),
        (("-", ("-", 9, 5), 2), "9-5-2"), (("/", 8, ("*", 2, 2)), "8/(2*2)"),
    ],
)  # fmt: skip
def test_render_uses_the_parentheses_it_needs(tree, text):
    assert render(tree) == text


@pytest.mark.parametrize(
    "params", [{}, {"n_numbers": 4, "operators": "+-*/", "max_number": 25, "max_target": 100}, {"operators": "-"}]
)
def test_problems_are_solvable_within_their_bounds(params):
    task = load_task("countdown", **params)
    for problem in itertools.islice(task.problems("train", 1), 300):
        numbers, target = problem.data["numbers"], problem.data["target"]
        assert len(numbers) == task.n_numbers and all(1 <= number <= task.max_number for number in numbers)
        assert 1 <= target <= task.max_target
        assert problem.key == f"{','.join(map(str, sorted(numbers)))}={target}"
        said = [target, *numbers] if problem.language == "en" else [*numbers, target]
        assert re.findall(r"\d+", problem.prompt) == list(map(str, said))
        assert set(re.findall(r"[+*/-]", problem.answer)) <= set(task.operators)
        assert task.verify(problem, problem.answer).value == 1.0


SEARCHED = "3+2=5: 7+5=12<13, 7-5=2<13, 7*5=35>13. 3-2=1: 7+1=8<13, 7-1=6<13, 7*1=7<13. 3*2=6: 7+6=13, yes."
SEARCHED_JA = "3+2=5:7+5=12<13、7-5=2<13、7*5=35>13。3-2=1:7+1=8<13、7-1=6<13、7*1=7<13。3*2=6:7+6=13、正解。"


@pytest.mark.parametrize(("language", "reasoning"), [("en", SEARCHED), ("ja", SEARCHED_JA)])
def test_a_worked_solution_searches_in_a_fixed_order(language, reasoning):
    task = load_task("countdown")
    problem = Problem("", "", "3*2+7", language, PROBLEM.data)
    assert task.solution(problem, "steps", random.Random(0)) == Solution(reasoning, "7+3*2")
    assert task.solution(problem, "answer", random.Random(0)) == Solution("", "7+3*2")


EQUATION = re.compile(r"(\d+)([-+*/])(\d+)(?:=(\d+))?(?:([<>])(\d+))?")


@pytest.mark.parametrize("params", [{}, {"max_number": 15, "max_target": 60}, {"n_numbers": 4, "operators": "+-*/"}])
def test_every_line_of_a_search_is_true_and_only_the_last_hits(params):
    task = load_task("countdown", languages=["en"], **params)
    for problem, solution in itertools.islice(task.documents("train", 2, "steps"), 200):
        target = problem.data["target"]
        said = EQUATION.findall(solution.reasoning)
        for a, sign, b, result, relation, bound in said:
            value = exact(parse(f"{a}{sign}{b}"))
            assert result in ("", str(value))
            assert not relation or (value < int(bound) if relation == "<" else value > int(bound))
        assert said[-1][3:] == (str(target), "", "") and solution.reasoning.endswith(", yes.")
        assert task.verify(problem, solution.answer).value == 1.0


def test_a_search_knows_its_target_only_when_it_is_there():
    task = load_task("countdown", languages=["en"])
    for problem, solution in itertools.islice(task.documents("train", 3, "steps"), 200):
        other = Problem("", "", language="en", data={**problem.data, "target": 10**9})
        whole = re.sub(r"[<>]1000000000", "", task.solution(other, "steps", random.Random(0)).reasoning)
        searched = re.sub(rf"[<>]{problem.data['target']}\b", "", solution.reasoning.removesuffix(", yes."))
        assert EQUATION.sub(r"\1\2\3", whole).startswith(EQUATION.sub(r"\1\2\3", searched))


def test_a_slip_is_one_wrong_result_put_right():
    task = load_task("countdown", languages=["en"])
    for problem, solution in itertools.islice(task.documents("train", 2, "slips"), 300):
        ((expression, wrong, right),) = re.findall(r"([\d+*-]+)=(\d+), wait, (\d+)", solution.reasoning)
        assert exact(parse(expression)) == int(right) != int(wrong)
        assert task.verify(problem, solution.answer).value == 1.0


def test_more_numbers_than_a_search_gets_through_have_problems_but_no_worked_solutions():
    task = load_task("countdown", n_numbers=5)
    problem = next(task.problems("train", 0))
    assert not task.has_solutions and task.verify(problem, problem.answer).value == 1.0
    with pytest.raises(SlingshotError, match="worked solutions search through up to 4 numbers"):
        task.solution(problem, "steps", random.Random(0))
