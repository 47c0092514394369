"""The tests of a programming problem, and how they are read in the rows of data sets.

    HiddenTests(inputs=([3],), outputs=(9,), entry_point="square")
    read_tests(row, "{public_test_cases} {private_test_cases}", entry_point, preamble, "row 7")

A column holds asserts, a text or a list of them (MBPP, HumanEval), or inputs with their outputs: a table of two lists
(APPS), or a list of tables (LiveCodeBench), as they are or as the text of their JSON.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.tasks.rows import Row, column, columns_of

_PACKED = re.compile(r"[A-Za-z0-9+/\s]{40,}=*\s*")  # base64, of what LiveCodeBench has pickled and compressed
_FUNCTION_NAMES = ("func_name", "fn_name")  # in a table of a problem's particulars


@dataclass(frozen=True)
class HiddenTests:
    """The tests of a problem, in one of three forms.

    `tests`: statements that assert something of functions of the answer, and `check(entry_point)` if they define
    `check`; `preamble` is run before answer and tests. Else `inputs` and `outputs`: lists of arguments and results of
    `entry_point` (of a class: see `uses`), or, without one, what a program reads and writes.
    """

    tests: tuple[str, ...] = ()
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    entry_point: str = ""
    preamble: str = ""
    tolerance: float = 1e-6

    @property
    def count(self) -> int:
        return len(self.tests) or len(self.outputs)

    def uses(self, given: Any) -> bool:
        """Whether arguments are names of an object's methods, the class's own first, and the arguments of each."""
        if not self.entry_point[:1].isupper() or len(given) != 2 or not all(isinstance(each, list) for each in given):
            return False
        methods, arguments = given
        return len(methods) == len(arguments) and methods[:1] == [self.entry_point]


def called_names(hidden: HiddenTests) -> list[str]:
    """Functions and classes that tests call and only the answer defines. Raises SyntaxError: tests are no Python."""
    nodes = [node for text in (hidden.preamble, *hidden.tests) for node in ast.walk(ast.parse(text))]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    called |= {node.id for node in owners if isinstance(node, ast.Name) and node.id[:1].isupper()}
    kinds = ast.FunctionDef | ast.ClassDef
    known = {node.name for node in nodes if isinstance(node, kinds)} | set(dir(builtins))
    known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    known |= {name.asname or name.name for node in imports for name in node.names}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return sorted(called - known)


def read_tests(row: Row, form: str, entry_point: str, preamble: str, where: str) -> HiddenTests:
    """All tests in the columns that `form` names. Raises SlingshotError where they cannot tell a right answer.

    `entry_point` is a function's name, or JSON that tells it; "inputs" and "outputs" of a row are its "tests".
    """
    if row.get("outputs") is not None and form == "tests":
        if row.get("tests"):
            raise SlingshotError(f'{where}: it has "tests" (asserts), or "inputs" and "outputs"')
        row = {**row, "tests": {"inputs": row.get("inputs") or [], "outputs": row["outputs"]}}
    asserts, inputs, outputs = list[str](), list[Any](), list[Any]()
    if isinstance(particulars := _parsed(entry_point, f"{where}: entry_point"), Mapping):
        entry_point = _named(particulars)
    for name in columns_of(form, row, where):
        value = _parsed(column(name, row, where), f"{where}: column {name}")
        if isinstance(value, Mapping) and "outputs" in value:
            entry_point = entry_point or _named(value)
            pairs = [(_list(value.get("inputs")), _list(value["outputs"]))]
        elif isinstance(value, list) and all(isinstance(each, Mapping) and "output" in each for each in value):
            pairs = [([each.get("input", "")], [each["output"]]) for each in value]
        elif isinstance(value, str | list) and all(isinstance(each, str) for each in value):
            asserts += [value] * bool(value.strip()) if isinstance(value, str) else value
            continue
        else:
            raise SlingshotError(f"{where}: column {name} holds {value!r:.60}: neither asserts nor inputs and outputs")
        inputs += [given for some, _ in pairs for given in some]
        outputs += [made for _, some in pairs for made in some]
    if entry_point and not asserts:
        inputs, outputs = [_arguments(each, where) for each in inputs], [_result(each) for each in outputs]
    hidden = HiddenTests(tuple(asserts), tuple(inputs), tuple(outputs), entry_point, preamble)
    if fault := _fault(hidden):
        raise SlingshotError(f"{where}: {fault}")
    return hidden


def _fault(hidden: HiddenTests) -> str:
    """Why these tests could not tell a right answer from none; empty where they can."""
    if bool(hidden.tests) == bool(hidden.outputs):
        return 'it has "tests" (asserts), or "inputs" and "outputs"'
    if len(hidden.inputs) != len(hidden.outputs):
        return f"{len(hidden.inputs)} inputs and {len(hidden.outputs)} outputs"
    if hidden.outputs and all(output in ("", None) for output in hidden.outputs):
        return "no output tells a right answer from an empty one"
    if not hidden.entry_point and not all(isinstance(each, str) for each in (*hidden.inputs, *hidden.outputs)):
        return 'inputs and outputs of a program are text; those of a function have "entry_point"'
    if hidden.entry_point and not all(isinstance(each, list) for each in hidden.inputs):
        return "inputs of a function are lists of arguments"
    try:
        if not called_names(hidden) and hidden.tests and not hidden.entry_point:
            return "its tests call no function of an answer"
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return f"its tests are no Python: {getattr(error, 'msg', type(error).__name__)}"
    return ""


def _parsed(value: Any, where: str) -> Any:
    """A text that is JSON of a list or of a table as what it says. Pickles are never opened."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, str) and _PACKED.fullmatch(value):
        way = 'name columns with tests in JSON, for example answer = "public_test_cases"'
        raise SlingshotError(f"{where} holds tests packed as a pickle, which is never opened; {way}")
    return value


def _named(particulars: Mapping[str, Any]) -> str:
    return str(next((particulars[name] for name in _FUNCTION_NAMES if particulars.get(name)), ""))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _arguments(given: Any, where: str) -> Any:
    """Arguments that stand as text are JSON, a line each."""
    if not isinstance(given, str):
        return given
    try:
        return [json.loads(line) for line in given.split("\n") if line.strip()]
    except ValueError as error:
        raise SlingshotError(f"{where}: arguments in text are JSON, a line each; {given!r:.60} is none") from error


def _result(made: Any) -> Any:
    try:
        return json.loads(made) if isinstance(made, str) else made
    except ValueError:
        return made
