"""A user's own file: what it may do and return, and one clear line for each thing that can be wrong with it."""

import itertools
import random
import re

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.tasks.task import Problem, Reward, split_of

GOOD = """
import helper

def problems(split, seed):
    for number in range(300):
        more = {"key": f"double {number}", "language": "ja", "data": {"number": number}}
        yield {"prompt": f"Double {number}?", "answer": str(2 * number)} | more

def verify(problem, text):
    print("looking at", text)
    if text == "half":
        return 0.5
    return text.strip() == problem["answer"] == str(helper.double(problem["data"]["number"]))

def solution(problem, style):
    return {"reasoning": f"{style}: two times {problem['data']['number']}", "answer": problem["answer"]}
"""
VERIFY = "def verify(problem, text): return True\n"
PROBLEMS = "def problems(split, seed):\n    for n in range(100): yield {'prompt': f'number {n}'}\n"


def test_a_file_is_a_task(load):
    task = load(GOOD)
    train, test = list(task.problems("train", 0)), list(task.problems("test", 0))
    assert len(train) + len(test) == 300 and len(test) > 10
    assert all(split_of(problem.key) == "test" for problem in test)
    first = min(train + test, key=lambda problem: problem.data["number"])
    assert first == Problem("Double 0?", "double 0", "0", "ja", {"number": 0})
    assert task.verify(train[3], f" {train[3].answer}\n").value == 1.0
    assert task.verify(train[3], "no").value == 0.0
    assert task.verify(train[3], "half").value == 0.5
    assert task.verify(train[3], " ") == task.verify(train[3], "\n", lenient=True) == Reward(0.0, None)
    assert task.verify(train[3], f"It is\n{train[3].answer}\n").value == 0.0
    assert task.verify(train[3], f"It is\n{train[3].answer}\n", lenient=True).value == 1.0
    assert task.has_solutions and not task.has_turns
    assert task.solution(first, "steps", random.Random(0)).reasoning == "steps: two times 0"
    assert task.solution(first, "answer", random.Random(0)).reasoning == ""


def test_iterators_survive_each_other_and_a_restart_of_the_worker(load):
    task = load(GOOD.replace('print("looking', 'text == "die" and __import__("os")._exit(1); print("looking'))
    whole = list(task.problems("train", 0))
    one, two = task.problems("train", 0), task.problems("train", 0)
    mixed = [next(iterator) for _ in range(70) for iterator in (one, two)]
    assert task.verify(whole[0], "die").error
    mixed += [next(iterator) for _ in range(70) for iterator in (one, two)]
    assert mixed == [problem for problem in whole[:140] for _ in range(2)]


@pytest.mark.slow
def test_a_file_that_draws_from_global_generators_draws_by_the_seed(load):
    """Unseeded, from random and numpy, shuffled as it is imported: every process and every iterator finds the same."""
    draw = "{'prompt': f'{random.random()} {np.random.random()} {next(order)}'}"
    source = (
        "import random, numpy as np\nitems = list(range(9))\nrandom.shuffle(items)\n"
        f"def problems(split, seed):\n    order = iter(items * 99)\n    while True: yield {draw}\n"
    )
    one, other = load(source + VERIFY), load(source + VERIFY)
    whole = list(itertools.islice(one.problems("train", 5), 200))
    first, second = other.problems("train", 5), other.problems("train", 6)
    mixed = [(next(first), next(second)) for _ in range(200)]
    assert [problem for problem, _ in mixed] == whole
    assert not set(whole) & {problem for _, problem in mixed}


@pytest.mark.slow
def test_problems_is_called_once_for_all_its_problems_and_slow_ones_are_fetched_in_time(load):
    wait = "for n in itertools.count(seed): yield time.sleep(0.1) or {'prompt': str(n), 'data': {'calls': calls}}"
    source = (
        f"import itertools, time\ncalls = 0\ndef problems(split, seed):\n    global calls\n    calls += 1\n    {wait}\n"
    )
    found = list(itertools.islice(load(source + VERIFY, timeout=5).problems("train", 0), 40))
    # A full chunk of 64 would take longer than a call may. The first calls tell whether the order goes by the seed.
    assert len(found) == 40 and len({problem.data["calls"] for problem in found}) == 1


@pytest.mark.parametrize("name", ["mine.py", "random.py", "my-task.py"])
def test_a_file_is_an_ordinary_module(load, name):
    """Dataclasses under postponed annotations, pickling, processes of its own, what lies beside it by either import."""
    task = load(
        """
        from __future__ import annotations
        import dataclasses, multiprocessing, pickle
        from concurrent.futures import ProcessPoolExecutor
        import helper
        from .helper import double
        from . import helper as beside

        @dataclasses.dataclass
        class Sum:
            left: int
            right: int | None = None

        def add(sum): return sum.left + sum.right

        def problems(split, seed):
            yield from ({"prompt": str(n), "data": dataclasses.asdict(Sum(n, 2))} for n in range(30))

        def verify(problem, text):
            sums = [pickle.loads(pickle.dumps(Sum(**problem["data"])))] * 2
            anew = multiprocessing.get_context("spawn")  # such a process imports this file by its name
            with multiprocessing.Pool(1) as pool, ProcessPoolExecutor(1) as executor, anew.Pool(1) as other:
                added = pool.map(add, sums) + list(executor.map(add, sums)) + other.map(add, sums)
            return added == [int(problem["prompt"]) + 2] * 6 and beside.double(3) == double(3) == helper.double(3) == 6
        """,
        name,
    )
    assert task.verify(next(task.problems("train", 0)), "x") == Reward(1.0, "x")


EVALUATES = """
import decimal, fractions, os, time
import numpy as np
def verify(problem, text): return eval(text)
"""


HALF = (
    "0.5", "np.float32(0.5)", "np.float64(0.5)", "np.array(0.5)", "fractions.Fraction(1, 2)", "decimal.Decimal('0.5')",
)  # fmt: skip
ONE = "True", "1", "np.bool_(True)", "np.int64(1)", "decimal.Decimal(1)"


def test_what_verify_returns_is_taken_as_the_number_it_is(load):
    task = load(EVALUATES + PROBLEMS)
    for text in (*HALF, *ONE):
        assert task.verify(Problem("p", "p"), text) == Reward(0.5 if text in HALF else 1.0, text)


FAILING = {
    "{}['capital']": r"raised KeyError: 'capital' \(<string> line 1\)",
    "time.sleep(60)": r"took longer than 3 s", "os._exit(0)": r"ended its process \(exit status 0\)",
    "'yes'": r"returned 'yes'; return True, False or a number from 0 to 1", "None": r"returned None; return",
    "2": r"returned 2;", "-0.1": r"returned -0\.1;", "float('nan')": r"returned nan; return",
    "np.float32('inf')": r"returned .*inf.*; return", "{1}": r"returned \{1\}; return",
    "['x' * 9] * 9_999_999": r"returned \[",
}  # fmt: skip


def test_a_verify_that_fails_costs_its_own_item(load):
    """A reward of 0 and one line of why; the next answer is verified again."""
    task = load(EVALUATES + PROBLEMS, timeout=3)
    for code, message in FAILING.items():
        failed = task.verify(Problem("p", "p"), code)
        assert (failed.value, failed.answer) == (0.0, None)
        assert re.search(rf"/mine\.py: verify\(\) {message}", failed.error) and "\n" not in failed.error
        assert task.verify(Problem("p", "p"), "True") == Reward(1.0, "True")


def test_what_problems_and_solution_return_is_taken_as_the_text_and_numbers_it_is(load):
    task = load(
        """
        import types
        from decimal import Decimal
        from fractions import Fraction
        import numpy as np

        def problems(split, seed):
            data = {"a": np.arange(3), "b": np.float32(0.5), "c": Fraction(1, 4), "d": (1, np.bool_(True))}
            answers = [3, 0.5, np.int64(7), Fraction(1, 3), Decimal("0.10"), np.str_("x"), True, None]
            for number, answer in enumerate(answers):
                for key in range(20):  # of every answer some are for training
                    problem = {"prompt": np.int32(number), "answer": answer, "key": 100 * number + key, "data": data}
                    yield types.MappingProxyType(problem)

        def verify(problem, text): return True
        def solution(problem, style): return {"reasoning": Fraction(1, 2), "answer": np.float32(0.1)}
        """
    )
    problems = list(task.problems("train", 0))
    said = ["3", "0.5", "7", "1/3", "0.10", "x", "True", ""]
    assert {(problem.prompt, problem.answer) for problem in problems} == {(str(n), text) for n, text in enumerate(said)}
    assert problems[0].data == {"a": [0, 1, 2], "b": 0.5, "c": 0.25, "d": [1, True]} and problems[0].key.isdigit()
    written = task.solution(problems[0], "steps", random.Random(0))
    assert (written.reasoning, written.answer) == ("1/2", "0.1")


@pytest.mark.parametrize(
    ("returned", "heard"),
    [
        ("None", None), ("'again'", [{"role": "user", "content": "again"}]),
        ("[{'role': 'tool', 'content': 3}, 'go']",
         [{"role": "tool", "content": "3"}, {"role": "user", "content": "go"}]),
        ("{'content': messages[-1]['content'] + problem['answer']}", [{"role": "user", "content": "41"}]),
    ],
)  # fmt: skip
def test_step_replies_to_the_conversation(load, returned, heard):
    task = load(f"def step(problem, messages): return {returned}\n" + PROBLEMS + VERIFY)
    assert task.has_turns
    assert task.step(Problem("p", "p", "1"), [{"role": "assistant", "content": "4"}]) == heard


def test_parameters_are_checked(load):
    with pytest.raises(SlingshotError, match=r"mine\.py\.timeot: unknown key; did you mean timeout\?"):
        load(GOOD, timeot=3)
    with pytest.raises(SlingshotError, match=r"mine\.py\.timeout: .*greater than 0, got 0"):
        load(GOOD, timeout=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def problems(:", r"importing it raised SyntaxError: .* \(mine\.py line 1\)$"),
        ("1 / 0", r"importing it raised ZeroDivisionError: division by zero \(mine\.py line 1\)$"),
        ("import os; os._exit(4)", r"importing it ended its process \(exit status 4\)$"),
        (PROBLEMS, r"function verify\(problem, text\) is missing; add it$"),
        (VERIFY + "problems = 3", r"function problems\(split, seed\) is missing; add it$"),
    ],
)
def test_a_file_that_cannot_be_a_task(load, source, message):
    with pytest.raises(SlingshotError, match=r"/mine\.py: " + message) as caught:
        load(source)
    assert str(caught.value).count("mine.py:") == 1


@pytest.mark.parametrize(
    ("function", "body", "message"),
    [
        ("problems", "raise OSError('no data')", r"problems\(\) raised OSError: no data"),
        ("problems", "return None", r"problems\(\) returned None; it should yield problems"),
        ("problems", "return []", r"no train problem in 0 drawn"),
        ("problems", "return ['2+2?']", r"problems\(\) item 0: '2\+2\?' is no dict with prompt, answer, key, language"),
        ("problems", "return [{'prompt': 'a'}, {'answer': '4'}]", r"problems\(\) item 1\.prompt: Field required"),
        ("problems", "return [{'prompt': ''}]", r"problems\(\) item 0\.prompt: .*at least 1 character"),
        ("problems", "return [{'promt': 'a'}]", r"problems\(\) item 0\.promt: unknown key; did you mean prompt\?"),
        ("problems", "return [{'prompt': 'a', 'language': 'fr'}]", r"problems\(\) item 0\.language: .*'fr'"),
        ("problems", "return [{'prompt': 'a', 'data': {'b': {1}}}]", r"problems\(\) returned .* not JSON: .*set"),
        (
            "problems",
            "return [{'prompt': 'a', 'data': {'b': float('nan')}}]",
            r"problems\(\) item 0\.data\.b: nan is no",
        ),
        ("solution", "return 'four'", r"solution\(\) returned: 'four' is no dict with reasoning, answer"),
        ("solution", "return {'answer': '4'}", r"solution\(\) returned\.reasoning: Field required"),
        ("solution", "raise ValueError('too hard')", r"solution\(\) raised ValueError: too hard"),
        ("step", "return {'role': 'robot', 'content': 'x'}", r"step\(\) message\.role: .*'robot'"),
        ("step", "return [{1}]", r"step\(\) message\.content: .*string, got \{1\}"),
    ],
)
def test_functions_that_fail_are_named_in_one_line(load, function, body, message):
    task = load(PROBLEMS + VERIFY + f"def {function}(given, more): {body}\n")
    with pytest.raises(SlingshotError, match=r"/mine\.py: " + message):
        if function == "problems":
            list(task.problems("train", 0))
        elif function == "solution":
            task.solution(Problem("p", "p"), "steps", random.Random(0))
        else:
            task.step(Problem("p", "p"), [])


def test_problems_that_never_come_are_named_in_one_line(load):
    task = load("import time\n" + PROBLEMS + VERIFY + "def problems(split, seed): time.sleep(60)\n", timeout=0.5)
    with pytest.raises(SlingshotError, match=r"/mine\.py: problems\(\) took longer than 0\.5 s"):
        list(task.problems("train", 0))
