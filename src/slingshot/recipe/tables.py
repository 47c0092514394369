"""Nested tables of a recipe: keys changed on the command line, defaults laid under, references resolved.

apply_override(tables, "rl.optimizer.lr=1e-4")
resolve({"model": "@base"}, artifact=..., flops=...)
"""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Callable
from typing import Any

from slingshot.base.errors import SlingshotError


def parse_override(text: str) -> tuple[list[str], Any]:
    """`rl.steps=30` -> (["rl", "steps"], 30). The value is read as TOML; what is not TOML is a string."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise SlingshotError(f"{text!r}: an override is written key=value, like steps=30")
    with contextlib.suppress(tomllib.TOMLDecodeError):
        parsed = tomllib.loads(f"value = {value}")
        if len(parsed) == 1:
            return path, parsed["value"]
    return path, value


def apply_override(values: dict[str, Any], text: str) -> None:
    """Set one key of nested tables in place; a table on the way that is not there yet is made."""
    path, value = parse_override(text)
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SlingshotError(f"{text!r}: {part} is no table, so it has no key {path[-1]}")
    values[path[-1]] = value


def inline_toml(value: Any) -> str:
    """A value as TOML writes it in one line, such as apply_override reads."""
    if isinstance(value, dict):
        pairs = (
            (key if key.isidentifier() and key.isascii() else json.dumps(key), part) for key, part in value.items()
        )
        return f"{{{', '.join(f'{key} = {inline_toml(part)}' for key, part in pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over them, tables key by key."""
    both = (key for key, change in changes.items() if isinstance(change, dict) and isinstance(values.get(key), dict))
    return {**values, **changes, **{key: {**values[key], **changes[key]} for key in both}}


def resolve(value: Any, artifact: Callable[[str], Any], flops: Callable[[str], float], where: str = "") -> Any:
    """A config value with every "@stage" replaced by artifact(stage), every {flops_of = stage, times = x} by
    x * flops(stage)."""
    if isinstance(value, str) and value.startswith("@"):
        return artifact(value[1:])
    if isinstance(value, list):
        return [resolve(part, artifact, flops, where) for part in value]
    if isinstance(value, dict) and "flops_of" in value:
        stage, times = value["flops_of"], value.get("times", 1)
        if value.keys() - {"flops_of", "times"} or not isinstance(stage, str) or not isinstance(times, int | float):
            form = 'a number from a receipt is written { flops_of = "STAGE", times = 3 }'
            raise SlingshotError(f"{where}: {form}, got {value!r:.80}")
        return times * flops(stage)
    if isinstance(value, dict):
        return {key: resolve(part, artifact, flops, f"{where}.{key}") for key, part in value.items()}
    return value
