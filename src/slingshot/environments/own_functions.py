"""Tools of a user's own: functions of a Python file, told to a model by their annotations and docstrings.

# weather.py
def forecast(city: str, days: int = 1) -> str:
    \"\"\"The weather in a city.\"\"\"
    return "rain"

own_functions("weather.py:forecast")      # or "weather.py" of a file with TOOLS = [forecast]
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean


class OwnFunction:
    """A function as a tool. Whatever it returns is said as text."""

    def __init__(self, function: Callable[..., Any], where: str) -> None:
        self.name = function.__name__
        self.description = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
        if not self.description:
            raise SlingshotError(f"{where}: {self.name} has no docstring; say there what it is for")
        if inspect.iscoroutinefunction(function):
            raise SlingshotError(f"{where}: {self.name} is async; a tool is a plain function that returns what it says")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]
            found = adapter.json_schema()
        except (PydanticUserError, NameError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise SlingshotError(f"{where}: the arguments of {self.name} are no JSON: {reason}") from error
        if found.get("type") != "object" and found.get("items") != []:
            raise SlingshotError(f"{where}: {self.name} takes arguments without names; a model gives them by name")
        plain = {name: _untitled(kind) for name, kind in found.get("properties", {}).items()}
        self.parameters: Mapping[str, Any] = {
            "type": "object",
            "properties": plain,
            "required": found.get("required", []),
        }
        self._function = function

    def call(self, arguments: dict[str, Any]) -> str:
        return str(self._function(**arguments))


def own_functions(spec: str) -> list[OwnFunction]:
    """The tools that "file.py:name" or "file.py" names. Raises SlingshotError where there is no such thing."""
    path, _, name = spec.partition(".py:")
    file = Path(path if path.endswith(".py") else f"{path}.py")
    if not file.is_file():
        raise SlingshotError(f"{file}: no such file; a tool of your own is a function of a Python file, file.py:name")
    module = _imported(file.resolve())
    if name:
        functions = {key: its for key, its in vars(module).items() if inspect.isfunction(its)}
        if name not in functions:
            raise SlingshotError(f"{file}: there is no function {name}; {did_you_mean(name, functions)}")
        return [OwnFunction(functions[name], str(file))]
    if not isinstance(listed := getattr(module, "TOOLS", None), list) or not listed:
        raise SlingshotError(f"{file}: which of its functions are tools? say TOOLS = [name] in it, or {file}:name here")
    return [OwnFunction(function, str(file)) for function in listed]


def _imported(file: Path) -> Any:
    sys.path.append(str(file.parent))  # for `import helper`
    name = f"tools_{sha256(str(file).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _untitled(kind: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kind.items() if key != "title"}
