"""A user's own file: what it may do, and one clear line for each thing that can be wrong with it."""

import itertools
import random
import textwrap

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem, split_of

GOOD = """
import helper

def problems(split, seed):
    for number in range(seed, seed + 300):
        yield {"prompt": f"Double {number}?", "answer": str(2 * number), "key": f"double {number}", "language": "ja", "data": {"number": number}}

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


@pytest.fixture
def load(tmp_path):
    def write(source, **params):
        (tmp_path / "mine.py").write_text(textwrap.dedent(source))
        (tmp_path / "helper.py").write_text("def double(number): return 2 * number")
        return load_task(str(tmp_path / "mine.py"), **params)

    return write


def test_a_file_is_a_task(load):
    task = load(GOOD.replace("seed, seed + 300", "300"))
    train, test = list(task.problems("train", 0)), list(task.problems("test", 0))
    assert len(train) + len(test) == 300 and len(test) > 10
    assert all(split_of(problem.key) == "test" for problem in test)
    first = min(train + test, key=lambda problem: problem.data["number"])
    assert first == Problem("Double 0?", "double 0", "0", "ja", {"number": 0})
    assert task.verify(train[3], f" {train[3].answer}\n").value == 1.0
    assert task.verify(train[3], "no").value == 0.0
    assert task.verify(train[3], "half").value == 0.5
    assert task.verify(train[3], " ") == task.verify(train[3], "\n", lenient=True)
    assert task.verify(train[3], f"It is\n{train[3].answer}\n").value == 0.0
    assert task.verify(train[3], f"It is\n{train[3].answer}\n", lenient=True).value == 1.0
    assert task.has_solutions
    assert task.solution(first, "steps", random.Random(0)).reasoning == "steps: two times 0"
    assert task.solution(first, "answer", random.Random(0)).reasoning == ""


def test_iterators_survive_each_other_and_a_restart_of_the_worker(load):
    task = load(GOOD)
    whole = list(task.problems("train", 0))
    one, two = task.problems("train", 0), task.problems("train", 0)
    mixed = [next(iterator) for _ in range(70) for iterator in (one, two)]
    task._sandbox.close()
    mixed += [next(iterator) for _ in range(70) for iterator in (one, two)]
    assert mixed == [problem for problem in whole[:140] for _ in range(2)]


def test_problems_is_called_once_for_all_its_problems(load):
    task = load(
        "calls = 0\ndef problems(split, seed):\n    global calls\n    calls += 1\n"
        "    for n in range(300): yield {'prompt': str(n + seed), 'data': {'calls': calls}}\n" + VERIFY
    )
    assert len({problem.data["calls"] for problem in task.problems("train", 0)}) == 1


def test_two_functions_are_enough(load):
    task = load(PROBLEMS + VERIFY)
    problem = next(task.problems("train", 0))
    assert problem == Problem(problem.prompt, problem.prompt)
    assert not task.has_solutions
    assert task.verify(problem, "anything").value == 1.0


def test_endless_and_slow_problems_are_fetched_in_time(load):
    source = "import itertools, time\ndef problems(split, seed):\n    for n in itertools.count(seed): yield time.sleep(0.03) or {'prompt': str(n)}\n"
    task = load(source + VERIFY, timeout=1.5)  # a full chunk of 64 would take longer than a call may
    assert len(list(itertools.islice(task.problems("train", 0), 40))) == 40


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def problems(:", r"mine\.py: importing it raised SyntaxError: .* \(mine\.py line 1\)"),
        ("1 / 0", r"mine\.py: importing it raised ZeroDivisionError: division by zero \(mine\.py line 1\)"),
        ("import os; os._exit(4)", r"mine\.py: importing it ended its process \(exit status 4\)"),
        (PROBLEMS, r"mine\.py: function verify\(problem, text\) is missing; add it"),
        (VERIFY + "problems = 3", r"mine\.py: function problems\(split, seed\) is missing"),
    ],
)
def test_a_file_that_cannot_be_a_task(load, source, message):
    with pytest.raises(SlingshotError, match=message):
        load(source)


def test_parameters_are_checked(load):
    with pytest.raises(SlingshotError, match=r"mine\.py\.timeot: unknown key; did you mean timeout\?"):
        load(GOOD, timeot=3)
    with pytest.raises(SlingshotError, match="timeout 0 must be positive"):
        load(GOOD, timeout=0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('capital')", r"mine\.py: verify\(\) raised KeyError: 'capital' \(mine\.py line 1\)"),
        ("import time; time.sleep(60)", r"mine\.py: verify\(\) took longer than 0\.5 s"),
        ("import os; os._exit(0)", r"mine\.py: verify\(\) ended its process \(exit status 0\)"),
        ("return 'yes'", r"mine\.py: verify\(\) returned 'yes'; return True, False or a number from 0 to 1"),
        ("return None", r"mine\.py: verify\(\) returned None; return True"),
        ("return 2", r"mine\.py: verify\(\) returned 2;"),
        ("return -0.1", r"mine\.py: verify\(\) returned -0\.1;"),
        ("return float('nan')", r"mine\.py: verify\(\) returned something that is not JSON"),
        ("return {1}", r"mine\.py: verify\(\) returned something that is not JSON"),
        ("return ['x' * 9] * 9_999_999", r"mine\.py: verify\(\) "),
    ],
)
def test_verify_that_fails(load, body, message):
    task = load(f"def verify(problem, text): {body}\n" + PROBLEMS, timeout=0.5)
    with pytest.raises(SlingshotError, match=message) as caught:
        task.verify(Problem("p", "p"), "text")
    assert "\n" not in str(caught.value)


def test_verify_that_floods_its_output(load, capfd):
    task = load(
        "def verify(problem, text):\n    for _ in range(10000): print('x' * 10000)\n    return True\n" + PROBLEMS
    )
    assert task.verify(Problem("p", "p"), "text").value == 1.0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise OSError('no data')", r"mine\.py: problems\(\) raised OSError: no data"),
        ("import time; time.sleep(60)", r"mine\.py: problems\(\) took longer than 0\.5 s"),
        ("return None", r"mine\.py: problems\(\) returned None; it should yield problems"),
        ("return []", r"mine\.py: no train problem in 0 drawn"),
        ("return ['2+2?']", r"mine\.py: problems\(\) item 0 is '2\+2\?'; yield a dict with at least a prompt"),
        ("return [{'prompt': 'a'}, {'answer': '4'}]", r"mine\.py: problems\(\) item 1\.prompt: Field required"),
        ("return [{'prompt': ''}]", r"mine\.py: problems\(\) item 0\.prompt: .*at least 1 character"),
        (
            "return [{'promt': 'a', 'prompt': 'b'}]",
            r"mine\.py: problems\(\) item 0\.promt: unknown key; did you mean prompt\?",
        ),
        ("return [{'prompt': 'a', 'language': 'fr'}]", r"mine\.py: problems\(\) item 0\.language: .*'fr'"),
        ("return [{'prompt': 'a', 'data': {'b': {1}}}]", r"mine\.py: problems\(\) returned something that is not JSON"),
    ],
)
def test_problems_that_fail(load, body, message):
    task = load(f"def problems(split, seed): {body}\n" + VERIFY, timeout=0.5)
    with pytest.raises(SlingshotError, match=message):
        list(task.problems("train", 0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'four'", r"mine\.py: solution\(\) returned 'four'; return a dict with reasoning and answer"),
        ("return {'answer': '4'}", r"mine\.py: solution\(\)\.reasoning: Field required"),
        ("raise ValueError('too hard')", r"mine\.py: solution\(\) raised ValueError: too hard"),
    ],
)
def test_solutions_that_fail(load, body, message):
    task = load(f"def solution(problem, style): {body}\n" + PROBLEMS + VERIFY)
    with pytest.raises(SlingshotError, match=message):
        task.solution(Problem("p", "p"), "steps", random.Random(0))
