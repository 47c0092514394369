"""`Strict`, the base of every configuration, and `StageConfig`, what all stages' configurations have.

config = SFTConfig.parse(table, "recipe.toml [sft]")       # SlingshotError of one line, with the nearest right key
config.optimizer.lr                                         # a table of keys is a Strict of its own
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and names the nearest right one; all configs derive from it.

    A table that is given in part takes its other keys from the field's own default, not the table's class. Keys
    `without_effect` change nothing in an artifact. One thing stands for a list of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    without_effect: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        complete = {}
        for key, value in values.items():
            # Tables of free keys have no types to refuse NaN and infinities.
            for place, number in _flat({key: value}).items() if isinstance(value, dict | list) else ():
                if isinstance(number, float) and not math.isfinite(number):
                    raise SlingshotError(f"{place}: {number} is no number to compute with")
            if field := cls.model_fields.get(key):
                if get_origin(field.annotation) is list and isinstance(value, str | dict):
                    value = [value]
                elif isinstance(value, dict) and isinstance(field.default, Strict):
                    value = field.default.model_dump(exclude_unset=True) | value
            complete[key] = value
        return complete

    def flat(self) -> dict[str, Any]:
        """JSON values by dotted key."""
        return _flat(self.model_dump(mode="json"))

    @classmethod
    def key_names(cls) -> Iterator[str]:
        """All keys, those of its tables after their name and a dot."""
        for name, field in cls.model_fields.items():
            yield name
            if isinstance(table := field.annotation, type) and issubclass(table, Strict):
                yield from (f"{name}.{key}" for key in table.key_names())

    @classmethod
    def parse(cls, values: Any, where: str = "") -> Self:
        """Validate `values`; raises SlingshotError of one line that names `where`, the key and the way out."""
        try:
            return cls.model_validate(values)
        except SlingshotError as error:  # of a config that a validator of this one parsed
            said = str(error)
            raise SlingshotError(f"{where}.{said}" if where and not said.startswith(where) else said) from error
        except ValidationError as error:
            errors = error.errors()  # a key that does not exist may be why another is missing
            first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
            key = printable(".".join(str(part) for part in first["loc"]))
            place = f"{where}.{key}" if where and key else where or key
            owner = _nested(cls, first["loc"][:-1])
            kind = owner.__module__.rpartition(".")[2] if issubclass(owner, StageConfig) else ""
            rest = f"; slingshot {kind} --keys tells of all" * bool(kind)
            if first["type"] == "extra_forbidden":
                hint = did_you_mean(str(first["loc"][-1]), owner.key_names())
                raise SlingshotError(f"{place}: unknown key; {hint}{'' if hint.endswith('?') else rest}") from error
            message = first["msg"].removeprefix("Value error, ") + rest * (first["type"] == "missing")
            given = "" if first["type"] in {"missing", "value_error"} else f", got {first['input']!r:.80}"
            raise SlingshotError(f"{place}: {message}{given}") from error

    @classmethod
    def differences(cls, old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Dotted keys in which two dumped configs make different artifacts, each with its old and new value.

        `old` may be of an earlier version: a key that only one of them has does not count, but in free tables, whose
        keys the user decides on.
        """
        had = _flat(old, lists=False)
        with contextlib.suppress(ValidationError, SlingshotError):  # keys that are new within lists take their defaults
            old = cls.model_validate(old, extra="ignore").model_dump(mode="json")
        before, after = _flat(old, lists=False), _flat(new, lists=False)
        return {
            key: (before.get(key), after.get(key))
            for key in before | after
            if before.get(key) != after.get(key)
            and key not in cls.without_effect
            and ((key in had and key in after) or cls._is_free(key))
        }

    @classmethod
    def _is_free(cls, path: str) -> bool:
        """Whether a dotted path leads into a table of free keys, such as `styles.answer`."""
        owner: type[Strict] = cls
        for table in path.split(".")[:-1]:
            nested = _nested(owner, [table])
            if nested is owner:
                return True
            owner = nested
        return False


def _flat(value: Any, prefix: str = "", lists: bool = True) -> dict[str, Any]:
    """Nested tables as one table of dotted keys, items of lists by number; without `lists` a list is a value."""
    if isinstance(value, list | tuple) and lists:
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        place: found
        for key, part in value.items()
        for place, found in _flat(part, f"{prefix}.{key}" if prefix else f"{key}", lists).items()
    }


def printable(text: str) -> str:
    """A key of a file from anywhere, fit to be printed: no line breaks, no control sequences, no end without an end."""
    return "".join(character if character.isprintable() else " " for character in text[:200])


def _nested(model: type[Strict], location: Sequence[int | str]) -> type[Strict]:
    """The config class at a place within `model`'s fields, lists and unions on the way looked through."""
    for part in location:
        waiting = [model.model_fields[str(part)].annotation] if part in model.model_fields else []
        while waiting:
            annotation = waiting.pop()
            if isinstance(annotation, type) and issubclass(annotation, Strict):
                model = annotation
                break
            waiting += get_args(annotation)
    return model


class StageConfig(Strict):
    """What the config of every stage has. `threads` 0: the fastest here; `price`: money per hour of this machine."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"threads", "price", "save_seconds", "expert_parallel", "memory.recompute", "optimizer.offload"}
    )

    seed: int = Field(0, ge=0, lt=2**63)
    threads: int = Field(0, ge=0, le=1024)  # far beyond what a system starts, torch ends the process
    price: float | None = Field(None, ge=0)
    save_seconds: float = Field(60.0, ge=0)
