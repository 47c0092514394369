"""The task `code`: right programs earn, and nothing else does."""

import json

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.program import ProgramLimits, isolation
from slingshot.tasks.hidden_tests import HiddenTests
from slingshot.tasks.judge import passed_tests, same, same_text
from slingshot.tasks.loader import load_task
from slingshot.tasks.verification import VerificationPool

pytestmark = pytest.mark.skipif(bool(isolation().missing), reason="this machine cannot contain programs")

CALLED = HiddenTests(inputs=([3], [4], [-1]), outputs=("mark-9", "mark-16", "mark-1"), entry_point="f")
ASSERTED = HiddenTests(tests=("assert f(3) == 'mark-9'", "assert f(x=4) == 'mark-16'\nassert f(-1) == 'mark-1'"))
CHECKED = HiddenTests(
    tests=("def check(g):\n    assert g(3) == 'mark-9'\n    assert g(4) == 'mark-16'",), entry_point="f"
)
RIGHT = "def f(x): return f'mark-{x * x}'"
LIMITS = ProgramLimits(seconds=30.0)

# Answers that compute nothing, and what each hopes for.
CHEATS = {
    "the end of the process": "import os\nos._exit(0)",
    "the end in the function": "import os\ndef f(x): os._exit(0)",
    "a good exit": "import sys\nsys.exit(0)",
    "a good exit in the function": "def f(x): raise SystemExit(0)",
    "equality": "class Yes(str):\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
    "equality of an object": "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
    "words that are equal": "class Yes:\n    def __repr__(self): return 'mark-9'\ndef f(x): return Yes()",
    "no assertions": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): raise AssertionError",
    "raising what is caught": "def f(x): raise StopIteration",
    "nothing": "",
    "no function": "f = 'mark-9'",
    "no Python": "def f(x:",
    "another function": "def g(x): return f'mark-{x * x}'",
    "a generator": "def f(x): yield 'mark-9'",
    "printed results": "for word in ('mark-9', 'passed', '[true]', '{\"passed\": [true, true]}'): print(word)",
    "written verdicts": """
import os
for descriptor in range(64):
    for line in ('{"passed": [true, true, true]}', '[null, {"value": "mark-9"}]', '{"value": "mark-9"}'):
        try: os.write(descriptor, line.encode() + b"\\n")
        except OSError: pass
def f(x): return 0
""",
    "edited tests": """
for name in ("program.py", "test.py", "tests.py", "answer.py", "conftest.py", "code_child.py", "reward.txt"):
    try: open(name, "w").write("1.0")
    except OSError: pass
def f(x): return 0
""",
    "the stack": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, str) and "mark" in value and "return" not in value: return value
        frame = frame.f_back
    return 0
""",
    "all objects": """
import gc
def f(x):
    for each in gc.get_objects():
        for value in (each.values() if type(each) is dict else each if type(each) in (list, tuple) else ()):
            if type(value) is str and value.startswith("m" + "ark-"): return value
    return 0
""",
    "files of processes": """
import glob
def f(x):
    for name in glob.glob("/proc/*/mem") + ["/proc/self/mem", "/proc/self/environ", "/proc/1/cmdline"]:
        try: return open(name).read()
        except OSError: pass
    return 0
""",
    "the channel": """
import __main__, json, sys
__main__.encode = lambda value: {"passed": [True]}
json.dumps = lambda value: '{"passed": [true, true, true]}'
def f(x): return 0
""",
    "a reply before the question": """
import sys, gc, io
for each in gc.get_objects():
    if isinstance(each, io.TextIOWrapper) and each.writable() and each.fileno() > 2:
        for _ in range(9): each.write('[0, {"value": "mark-9"}]\\n')
        each.flush()
def f(x): return 0
""",
    "tracing": "import sys\nsys.settrace(lambda *a: None)\nsys.setrecursionlimit(40)\ndef f(x): return f(x)",
    "hanging": "def f(x):\n    while True: pass",
    "hanging with closed pipes": "import os, time\nos.closerange(0, 64)\ntime.sleep(60)",
    "a flood": "def f(x):\n    return 'x' * 10_000_000",
    "depth": "def f(x):\n    value = []\n    for _ in range(100_000): value = [value]\n    return value",
    "a thread that stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "no memory": "x = bytearray(1 << 33)",
}
SLOW = {"hanging", "hanging with closed pipes", "a thread that stays"}


@pytest.mark.parametrize("hidden", [CALLED, ASSERTED, CHECKED])
def test_a_right_answer_passes_each_test(hidden):
    assert passed_tests(RIGHT, hidden, LIMITS) == [True] * hidden.count


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CHEATS])
@pytest.mark.parametrize(
    "hidden", [CALLED, pytest.param(ASSERTED, marks=pytest.mark.slow)], ids=["called", "asserted"],
)  # fmt: skip
def test_no_cheat_passes_any_test(name, hidden):
    limits = ProgramLimits(seconds=1.0) if name in SLOW else LIMITS
    assert not any(passed_tests(CHEATS[name], hidden, limits, all_tests=True))


@pytest.mark.parametrize(
    ("answer", "given", "expected", "holds"),
    [
        ("print(int(input()) + 1)", "41\n", "42\n", True), ("print('4 2')", "", " 4   2\n\n", True),
        ("print(0.1 + 0.2)", "", "0.3", True), ("print(3)", "", "3.0", False), ("print('nan')", "", "1.5", False),
        ("print(42); 1 / 0", "", "42", False), ("print(42); raise SystemExit(1)", "", "42", False),
        ("1 / 0", "", "", False), ("print(", "", "42", False),
        ("import os; os._exit(0)", "", "42", False), ("print('4\\n2')", "", "4 2", False),
    ],
)  # fmt: skip
def test_a_program_is_judged_by_what_it_writes_and_how_it_ends(answer, given, expected, holds):
    assert passed_tests(answer, HiddenTests(inputs=(given,), outputs=(expected,)), LIMITS) == [holds]


FUTURE = '"""Doubles."""\nfrom __future__ import annotations\nimport sys\n'


@pytest.mark.parametrize("preamble", ["", "from re import *\nfrom math import *\n", "class Node:\n    pass\n"])
def test_an_answer_may_begin_with_imports_from_the_future(preamble):
    program = FUTURE + "def f(x: Nothing): return 2 * x\nif __name__ == '__main__': print(f(int(input())))"
    read = HiddenTests(inputs=("2", "3"), outputs=("4", "6"), preamble=preamble)
    called = HiddenTests(inputs=([2],), outputs=(4,), entry_point="f", preamble=preamble)
    assert passed_tests(program, read, LIMITS) == [True, True] and passed_tests(program, called, LIMITS) == [True]
    asserted = HiddenTests(tests=("from __future__ import annotations\nassert f(2) == 4",), preamble=preamble)
    assert passed_tests(program, asserted, LIMITS) == [True]


def test_an_answer_has_no_imports_from_the_future_that_it_does_not_ask_for():
    answer = "def f(x: int): return f.__annotations__['x'] is int"
    assert passed_tests(answer, HiddenTests(inputs=([2],), outputs=(True,), entry_point="f"), LIMITS) == [True]
    assert passed_tests(answer + "\nprint(f(1))", HiddenTests(inputs=("",), outputs=("True",)), LIMITS) == [True]


@pytest.mark.parametrize(
    ("value", "expected", "holds"),
    [
        (1, 1, True), (1.0, 1, True), (True, 1, False), (1, True, False), (None, None, True), (0, None, False),
        (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), (float("nan"), float("nan"), False), (float("nan"), 0.5, False),
        (float("inf"), float("inf"), False), (10**400, 0.5, False), ((1, (2.0,)), [1, [2]], True), ([1], [1, 2], False),
        ({1: (2,)}, {"1": [2]}, True), ({}, {"a": 1}, False), ("a", "a", True), ("1", 1, False), ({1}, [1], False),
    ],
)  # fmt: skip
def test_results_are_compared_as_json_has_them(value, expected, holds):
    assert same(value, expected, 1e-6) is holds


def test_numbers_with_a_point_are_near_in_text():
    assert same_text("1.0000001 a", "1.0 a", 1e-6) and not same_text("1.1 a", "1.0 a", 1e-6)


VALUES = """
def f(x): return x
def g(): return (1, {2: {3, 4}}, frozenset([5]), b"6", 7j, None, [8.5, True, "9"])
def h(): raise KeyError("x")
class Odd: pass
def k(): return Odd()
"""
TESTS = """
for value in [(1, 2), {1: 'a', (2,): None}, {3}, frozenset({4}), b'5', 6j, 1.5, '七', [], {}, 2 ** 100, -0.0, True]:
    assert f(value) == value and type(f(value)) is type(value)
assert g() == (1, {2: {3, 4}}, frozenset([5]), b"6", 7j, None, [8.5, True, "9"])
try: h()
except KeyError: pass
else: assert False
try: k()
except TypeError: pass
else: assert False
"""


def test_plain_values_and_exceptions_pass_between_answer_and_tests():
    assert passed_tests(VALUES, HiddenTests(tests=(TESTS,)), LIMITS) == [True]
    mixed = HiddenTests(tests=("assert f(1) == 2", "f(1)", "1 + 1"))
    assert passed_tests(VALUES, mixed, LIMITS) == [False, True, False]


def rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SQUARE = {"prompt": "Square x.", "entry_point": "f", "inputs": [[2], [3]], "outputs": [4, 9]}


def test_an_answer_that_hangs_holds_up_neither_its_caller_nor_other_answers(tmp_path):
    task = load_task("code", source=rows(tmp_path / "mine.jsonl", SQUARE), timeout=60)
    (problem,) = both(task)
    with VerificationPool([task], workers=2) as pool:
        hangs = pool.submit(task, problem, "while True: pass")
        right = pool.submit(task, problem, "def f(x): return x ** 2")
        assert right.result().value == 1.0 and not hangs.done()
    assert hangs.result().value == 0.0 and "SIGKILL" in hangs.result().error


def both(task):
    return [problem for split in ("train", "test") for problem in one_split(task, split)]


def one_split(task, split):
    try:
        return list(task.problems(split, 0))
    except SlingshotError:
        return []


def test_a_file_of_problems_is_a_task(tmp_path):
    asserts = {"prompt": "Write add.", "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    program = {"prompt": "Add one.", "inputs": ["1", "2"], "outputs": ["2", "3"]}
    source = rows(tmp_path / "mine.jsonl", SQUARE, asserts, program)
    task, partial = load_task("code", source=source), load_task("code", source=source, partial=True)
    answers = {"Square x.": "def f(x): return 2 * x", "Write add.": "def add(a, b): return a - b"}
    answers["Add one."] = "print(2)"
    problems = both(task)
    assert (task.name, task.is_given, load_task("code").name) == (f"code:{source}", True, "code")
    with VerificationPool([task, partial]) as pool:
        strict = [pool.submit(task, problem, answers[problem.prompt]) for problem in problems]
        shares = [pool.submit(partial, problem, answers[problem.prompt]) for problem in problems]
        program = next(problem for problem in problems if problem.prompt == "Add one.")
        right = pool.submit(task, program, "So:\n```python\nprint(int(input()) + 1)\n```\n.")
        assert [reward.result().value for reward in strict] == [0.0] * 3
        assert [reward.result().value for reward in shares] == [0.5] * 3
        assert right.result().value == 1.0 and right.result().answer == "print(int(input()) + 1)"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "no column 'tests'"),
        ({"prompt": "p", "tests": []}, '"tests" .asserts., or "inputs" and "outputs"'),
        ({"prompt": "p", "tests": 3}, "column tests holds 3: neither asserts nor inputs and outputs"),
        (SQUARE | {"tests": "assert f(1)"}, '"tests" .asserts., or "inputs" and "outputs"'),
        (SQUARE | {"outputs": [4]}, "2 inputs and 1 outputs"), (SQUARE | {"inputs": [2, 3]}, "lists of arguments"),
        (SQUARE | {"entry_point": ""}, 'those of a function have "entry_point"'),
        (SQUARE | {"outputs": [None, None]}, "no output tells a right answer from an empty one"),
        ({"prompt": "p", "inputs": ["1"], "outputs": [""]}, "no output tells a right answer from an empty one"),
        ({"prompt": "p", "tests": "assert ("}, "its tests are no Python"),
        ({"prompt": "p", "tests": "assert 1 + 1 == 2"}, "its tests call no function of an answer"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_judged_is_refused_by_its_line(tmp_path, row, message):
    with pytest.raises(SlingshotError, match=rf"mine\.jsonl row 2.*{message}"):
        load_task("code", source=rows(tmp_path / "mine.jsonl", SQUARE, row))


def test_an_answer_is_its_last_block_or_all_of_it():
    task = load_task("code")
    said = "First:\n```python\na = 1\n```\nno, better:\n```py\nb = 2\n\nc = 3\n```\nDone."
    cases = {said: "b = 2\n\nc = 3", "x = 1\n": "x = 1\n", "```python\nx": "x", "  ": None, "```\nx\n```": "x"}
    cases |= {
        "```py\na\n```\nand\n```\nb\n```\nDone.": "a", "```text\na\n```\nDone.": "```text\na\n```\nDone.",
        "1.\n   ```Python3\n   a\n   ```\n": "   a", "```\na\n```\n```\nb\n```": "b", "```python\n```": None,
    }  # fmt: skip
    assert {text: task.read(text) for text in cases} == cases
    assert task.extract(said) == "b = 2\n\nc = 3" and task.read("x" * 200_000) is None


def test_what_cannot_be_judged_here_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        SlingshotError,
        match=r"^dataset\.source: 'mine' is no data set; give a hub's org/name, or a \.jsonl or \.parquet file$",
    ):
        load_task("code:mine")
    monkeypatch.setattr("slingshot.sandbox.seccomp.available", lambda: False)
    with pytest.raises(SlingshotError, match=r"cannot contain untrusted programs, for it has no seccomp"):
        load_task("code")
    assert load_task("code", trusted=True).trusted
