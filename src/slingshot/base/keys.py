"""The keys of a config, told to a person: type in words, default, meaning.

for key in keys_of(SFTConfig):
    print(key.name, key.kind, key.default, key.meaning)        # optimizer.lr  number above 0  0.001  ...
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from slingshot.base.config import Strict

_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "table"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Key:
    """`name` is a path of dots; `default` as it would be typed, None where a value is needed."""

    name: str
    kind: str
    default: str | None
    meaning: str


def keys_of(config: type[Strict], prefix: str = "", defaults: Any = None) -> Iterator[Key]:
    """All keys of a config, those of its tables after their name and a dot."""
    for name, field in config.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        table = field.annotation
        if isinstance(table, type) and issubclass(table, Strict) and isinstance(default, Strict):
            yield from keys_of(table, f"{prefix}{name}.", default)
        else:
            shown = None if field.is_required() and defaults is None else typed(default)
            yield Key(prefix + name, _kind(field), shown, field.description or "")


def typed(value: Any) -> str:
    """A value as it is typed behind `key=`."""
    if isinstance(value, Strict):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {typed(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(typed, value)) + "]"
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def words(annotation: Any) -> str:
    """A type in words: list[int] is "list: whole number"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(words(arg) for arg in args if arg is not type(None))
    if origin in (list, tuple):
        return f"list: {words(args[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return "table"
    return _WORDS.get(origin or annotation, "value")


def _kind(field: FieldInfo) -> str:
    limits = ((said, getattr(bound, name, None)) for bound in field.metadata for name, said in _BOUNDS.items())
    bounds = [f"{said} {limit:g}" for said, limit in limits if limit is not None and limit < 2**62]
    return " ".join([words(field.annotation), " and ".join(bounds)]).strip()
