"""Data sets whose answers are programs: the shapes of HumanEval, MBPP and LiveCodeBench, and columns of any name."""

import base64
import gzip
import itertools
import json
import random
import zlib

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.program import isolation
from slingshot.tasks.hidden_tests import HiddenTests
from slingshot.tasks.loader import load_task

pytestmark = pytest.mark.skipif(bool(isolation().missing), reason="this machine cannot contain programs")


@pytest.fixture
def written(tmp_path):
    """written(*rows): the path of a file of these rows."""

    def write(*rows):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


HUMAN_EVAL = [
    {
        "task_id": f"T/{number}",
        "entry_point": "grow",
        "prompt": f"""from typing import List\n\ndef base(x):\n    return x\n
def grow(x: List[int]) -> int:\n    \"\"\"Add {number}.\"\"\"\n""",
        "canonical_solution": f"    return base(x) + {number}\n",
        "test": f"""def check(candidate):\n    assert candidate(1) == base(1) + {number}
    assert abs(candidate(2.5) - {number + 2.5}) < 1e-6\n""",
    }
    for number in range(2)
]


@pytest.mark.slow
def test_human_eval_is_read_from_its_package_and_is_for_testing(tmp_path, monkeypatch):
    data = tmp_path / "human_eval" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('its code ran')")
    with gzip.open(data / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in HUMAN_EVAL)
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("code:humaneval")
    problems = list(task.problems("test", 0))
    assert len({problem.prompt for problem in problems}) == 2 and task.has_solutions
    for problem, row in itertools.product(problems, HUMAN_EVAL):
        fits = row["prompt"] in problem.prompt
        body = row["canonical_solution"]
        whole = f"def grow(x: List[int]):\n{body}"
        assert [task.verify(problem, text).value for text in (body, whole, row["prompt"] + body)] == [float(fits)] * 3
        assert task.verify(problem, problem.answer).value == 1.0
    with pytest.raises(SlingshotError, match="no train problem; 2 are for test"):
        next(task.problems("train", 0))
    (data / "HumanEval.jsonl.gz").write_bytes(b"nothing")
    with pytest.raises(SlingshotError, match=r"HumanEval\.jsonl\.gz is not a readable gzip file"):
        load_task("dataset:humaneval")


def test_columns_that_a_table_leaves_empty_are_not_there(written):
    """Parquet has every column in every row."""
    rows = [
        {"prompt": "Add.", "tests": ["assert add(1, 2) == 3"], "inputs": None, "outputs": None, "entry_point": None},
        {"prompt": "Double.", "tests": None, "inputs": ["2\n"], "outputs": ["4"], "entry_point": None},
    ]
    task = load_task(f"code:{written(*rows)}", splits={"test": "all"})
    add, double = sorted(task.problems("test", 0), key=lambda problem: problem.prompt)
    assert task.verify(add, "def add(a, b): return a + b").value == 1.0
    assert task.verify(double, "print(2 * int(input()))").value == 1.0
    with pytest.raises(SlingshotError, match="row 1: its tests are no Python: MemoryError"):
        load_task(f"code:{written({'prompt': '?', 'tests': 'assert f(1) == ' + '-' * 20_000 + '1'})}")


MBPP = [
    {
        "task_id": n, "text": f"Write a function to add {n}.", "code": f"def add(x):\r\n    return x + {n}",
        "test_list": [f"assert add(1) == {n + 1}", f"assert add(BASE) == {n + 10}"], "test_setup_code": "BASE = 10",
        "challenge_test_list": ["assert add(0.5) != 0"],
    }
    for n in range(60)
]  # fmt: skip
SANITIZED = [
    {
        "source_file": "x", "task_id": n, "prompt": f"Write a function to add {n}.",
        "code": f"def add(x):\n    return x + {n}", "test_imports": ["import math", "from math import pi"],
        "test_list": [f"assert math.isclose(add(pi), math.pi + {n})"],
    }
    for n in range(60)
]  # fmt: skip


@pytest.mark.parametrize(("like", "made"), [("mbpp", MBPP), ("mbpp-sanitized", SANITIZED)])
def test_files_in_the_shape_of_mbpp(written, like, made):
    task = load_task("dataset", source=written(*made), like=like)
    problem = next(problem for problem in task.problems("train", 0) if "add 7." in problem.prompt)
    lines = "\n".join(made[7]["test_list"])
    assert problem.prompt == f"Write a function to add 7.\n\nYour code should pass these tests:\n\n{lines}"
    said = ["It is\n```python\ndef add(x): return x + 7\n```\nso\n```text\n7\n```\nYes.", "def add(x): return x + 8"]
    assert [task.verify(problem, text).value for text in (problem.answer, *said)] == [1.0, 1.0, 0.0]
    assert task.solution(problem, "steps", None).answer == made[7]["code"] and task.has_solutions


CASES = [
    {"input": "1\n2", "output": "3", "testtype": "functional"},
    {"input": "4\n5", "output": "9", "testtype": "functional"},
]
STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CONTEST = [
    {
        "question_content": "Add two numbers.", "difficulty": "easy", "public_test_cases": json.dumps(CASES[:1]),
        "private_test_cases": json.dumps(CASES[1:]), "metadata": '{"func_name": "addUp"}',
        "starter_code": "class Solution:\n    def addUp(self, a: int, b: int) -> int:\n        ",
    },
    {
        "question_content": "Read two numbers, write their sum.", "difficulty": "hard", "metadata": "{}",
        "public_test_cases": json.dumps(STDIN), "private_test_cases": "[]", "starter_code": "",
    },
]  # fmt: skip


def test_files_in_the_shape_of_livecodebench(written):
    task = load_task("dataset", source=written(*CONTEST), like="livecodebench")
    added, read = sorted(task.problems("test", 0), key=lambda problem: problem.prompt)
    assert (added.data["level"], read.data["level"]) == ("easy", "hard") and CONTEST[0]["starter_code"] in added.prompt
    assert HiddenTests(**added.data["hidden"]).count == 2
    method = CONTEST[0]["starter_code"] + "return List[int] and Counter([a]).total() * (a + b)"
    answers = [method, "def addUp(a, b): return a + b", "def addUp(a, b): return 3", "class Solution: pass"]
    assert [task.verify(added, answer).value for answer in answers] == [1.0, 1.0, 0.0, 0.0]
    answers = [
        "print(sum(map(int, input().split())))",
        "a, b = map(int, stdin.read().split())\nprint(a + b)",
        "print(4)",
    ]
    assert [task.verify(read, answer).value for answer in answers] == [1.0, 1.0, 0.0]


def test_tests_that_are_pickled_are_never_opened(written):
    packed = base64.b64encode(zlib.compress(b"\x80\x04" + random.Random(0).randbytes(200))).decode()
    source = written(CONTEST[0] | {"private_test_cases": packed})
    with pytest.raises(
        SlingshotError, match="row 1: column private_test_cases holds tests packed as a pickle"
    ) as caught:
        load_task("dataset", source=source, like="livecodebench")
    assert "\n" not in str(caught.value) and 'answer = "public_test_cases"' in str(caught.value)
    public = load_task("dataset", source=source, like="livecodebench", answer="public_test_cases")
    assert len(next(public.problems("test", 0)).data["hidden"]["outputs"]) == 1


@pytest.mark.slow
def test_tests_are_columns_of_any_name_and_a_table_of_inputs_and_outputs(written):
    held = {"inputs": [[1, 2], [4, 5]], "outputs": [3, 9], "fn_name": "add"}
    mine = {"question": "Add.", "input_output": json.dumps(held), "checks": "assert add(0, 0) == 0", "name": "add"}
    source, only = written(mine), {"test": "all"}
    for answer, options in {
        "input_output": {},
        "checks": {},
        "{checks}": {"entry_point": "name", "partial": True},
    }.items():
        task = load_task(
            "dataset", source=source, prompt="question", answer=answer, verifier="code", options=options, splits=only
        )
        (problem,) = task.problems("test", 0)
        assert [task.verify(problem, f"def add(a, b): return {what}").value for what in ("a + b", "1")] == [1.0, 0.0]
    for params, message in {
        "{input_output} {checks}": r'row 1: it has "tests"', "{none}": "no column 'none'", "none": "no column 'none'",
        "{checks": "no text with {columns}",
        "question": "its tests call no function|no Python",
    }.items():  # fmt: skip
        with pytest.raises(SlingshotError, match=message):
            load_task("dataset", source=source, prompt="question", answer=params, verifier="code")
    with pytest.raises(SlingshotError, match=r"options\.partal: unknown key; did you mean partial\?"):
        load_task("dataset", source=source, verifier="code", options={"partal": True})
    with pytest.raises(SlingshotError, match="arguments in text are JSON, a line each"):
        load_task(
            "code", source=written(mine | {"prompt": "p", "entry_point": "f", "tests": [{**CASES[0], "input": "x"}]})
        )
