"""Tools: what each says, to right and to wrong arguments, and what becomes of one that fails, floods, hangs or dies."""

import json
import time

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.environments.calculator import Calculator
from slingshot.environments.python_program import PythonProgram
from slingshot.environments.search import FolderSearch
from slingshot.environments.tool import MOST, answer
from slingshot.environments.toolbox import ask, toolbox
from slingshot.sandbox.worker import Worker


def computed(expression):
    return answer(Calculator(), json.dumps({"expression": expression}))


@pytest.mark.parametrize(("expression", "value"), [
    ("6*7", "42"), ("3 x (4 - 1/2)", "10.5"), ("0.1+0.2", "0.3"), ("1/3", "1/3, about 0.333333333333"),
    ("-7//2", "-4"), ("-7 % 3", "2"), ("2^10", "1024"), ("2**-3", "0.125"), ("1e3 + 1.50", "1001.5"), ("12÷8", "1.5"),
    ("３＋４", "7"), ("(-1)**999999999999", "-1"), ("0**99999999999", "0"), ("-0.05", "-0.05"), ("6*7 =", "42"),
    ("123456789*987654321", "121932631112635269"), ("9" * 500, "9" * 500),
    ("5² + 1", "26"), ("2¹⁰", "1024"),
])  # fmt: skip
def test_arithmetic_is_exact(expression, value):
    assert computed(expression) == value


@pytest.mark.parametrize(("expression", "says"), [
    ("9**9**9", "too many digits"), ("(9**1000)*(9**1000)", "too many digits"), ("1e999999999", "exponent"),
    ("1/0", "division by zero"), ("0**-1", "division by zero"), ("2**0.5", "roots"), ("", "no expression"),
    ("__import__('os')", "no arithmetic"),
    ("1,000", "no arithmetic"), ("x", "no arithmetic"), ("1 < 2", "no arithmetic"),
    ("True+1", "no arithmetic"), ("'a'*9", "no arithmetic"), ("1j", "no arithmetic"), ("9" * 501, "501 characters"),
    ("(" * 400, "no expression"), ("1\x00", "no expression"), ("1 << 99", "no arithmetic"),
])  # fmt: skip
def test_what_is_no_arithmetic_or_too_much_is_refused_in_words(expression, says):
    start, said = time.perf_counter(), computed(expression)
    assert said.startswith("error: ") and says in said and "\n" not in said
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(("arguments", "says"), [
    ("{}", "expression is missing"), ("{", "no JSON"), ("[1]", "an object"), ("3", "an object"),
    ('{"expression": 3}', "is string, not 3"), ('{"expression": true}', "is string"), ("[" * 100_000, "no JSON|deep"),
    ('{"expression": "1", "digits": 2}', "digits is unknown; the arguments are: expression"),
])  # fmt: skip
def test_wrong_arguments_are_named(arguments, says):
    said = answer(Calculator(), arguments)
    assert said.startswith("error: ") and any(each in said for each in says.split("|"))


def ran(code):
    return answer(PythonProgram(), json.dumps({"code": code}))


def test_a_program_says_what_it_prints():
    assert ran("print(6 * 7)") == "42"
    assert ran("x = 1") == "error: the program printed nothing; print what you want to know"
    assert ran("print(1)\n1/0") == "1\nerror: ZeroDivisionError: division by zero"
    assert "PermissionError" in ran("open('/etc/hostname')")
    flood = ran("while True: print('x' * 1000)")
    assert len(flood) < MOST + 200 and flood.startswith("x")


def test_passages_of_a_folder_are_found_and_nothing_outside_it(tmp_path):
    (tmp_path / "secret.txt").write_text("the password is swordfish")
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "bridge.md").write_text("The bridge was built in 1932.\n" + "Other words follow here.\n" * 100)
    (folder / "deep" / "橋.txt").write_text("この橋は昭和七年に架けられた。")
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00bridge")
    (folder / ".hidden").write_text("bridge bridge bridge")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    search = FolderSearch(folder)

    def found(query):
        return answer(search, json.dumps({"query": query}))

    assert found("When was the bridge built?").startswith("bridge.md\nThe bridge was built in 1932.")
    assert found("橋は いつ").startswith("deep/橋.txt\n")
    assert found("swordfish password").startswith("error: nothing found")
    assert found("../secret.txt").startswith("error: nothing found") or "swordfish" not in found("../secret.txt")
    assert len(found("words follow here")) < 4 * 700
    assert found("?!").startswith("error: the query has no words")
    for wrong in tmp_path / "none", tmp_path / "notes" / "bridge.md":
        with pytest.raises(SlingshotError, match="no such folder"):
            FolderSearch(wrong)


OWN = '''
import os, time
def double(number: int, times: int = 1) -> int:
    """Doubles a number.

    More than a model is told."""
    return number * 2**times
def hang() -> str:
    """Never ends."""
    time.sleep(60)
def die() -> str:
    """Dies."""
    os._exit(3)
def flood() -> str:
    """Ten million characters."""
    print("into the pipe?")
    return "x" * 10_000_000
def unsaid(a: int): return a
async def later():
    """Says it later."""
TOOLS = [double, hang, die, flood]
'''


def test_functions_of_a_file_are_tools_whatever_they_do(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    worker, box = Worker(), toolbox([f"{tmp_path}/own.py", "calculator"])
    first, *_, last = worker.call(box, "schemas")
    function = {"name": "double", "description": "Doubles a number."}
    kinds = {"number": {"type": "integer"}, "times": {"default": 1, "type": "integer"}}
    shape = {"parameters": {"type": "object", "properties": kinds, "required": ["number"]}}
    assert first == {"type": "function", "function": function | shape} and last["function"]["name"] == "calculator"
    assert ask(worker, box, "double", '{"number": 3, "times": 2}') == "12"
    assert ask(worker, box, "double", '{"number": "3"}') == "error: number is integer, not '3'"
    flood = ask(worker, box, "flood", "{}")
    assert len(flood) < MOST + 100 and flood.endswith("characters more)")
    assert ask(worker, box, "die", "{}") == "error: die ended its process (exit status 3)"
    assert ask(worker, box, "doubel", "{}") == "error: there is no tool 'doubel'; did you mean double?"
    quick = toolbox([f"{tmp_path}/own.py:hang"])
    quick = type(quick)(quick.name, quick.args, timeout=2.0)
    assert ask(worker, quick, "hang", "{}") == "error: hang took longer than 2 s"
    assert ask(worker, box, "double", '{"number": 1}') == "2"  # in a new worker
    worker.close()


@pytest.mark.parametrize(("spec", "says"), [
    ("calculater", "did you mean calculator?"), ("search", "unknown"), ("own.py:doubel", "did you mean double?"),
    ("own.py:unsaid", "unsaid has no docstring"), ("own.py:later", "later is async"),
    ("none.py:f", "no such file"), ("empty.py", "say TOOLS = "),
    ("search:none", "no such folder"), ("mcp:", "unknown"), ("own.py", "2 of them are called double"),
])  # fmt: skip
def test_a_tool_that_cannot_be_had_is_refused_by_name(tmp_path, monkeypatch, spec, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "empty.py").write_text("x = 1\n")
    specs = [spec, "own.py:double"] if "called" in says else [spec]
    with pytest.raises(SlingshotError, match=says.replace("?", r"\?")):
        Worker().call(toolbox(specs), "schemas")
