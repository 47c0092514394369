"""`Strict`, the base of every configuration, and `StageConfig`, what all stages' configurations have.

config = SFTConfig.parse(table, "recipe.toml [sft]")       # SlingshotError of one line, with the nearest right key
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and names the nearest right one; all configs derive from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, values: Any, where: str = "") -> Self:
        """Validate `values`; raises SlingshotError of one line that names `where`, the key and the way out."""
        try:
            return cls.model_validate(values)
        except SlingshotError as error:  # of a config that a validator of this one parsed
            raise SlingshotError(f"{where}.{error}" if where else str(error)) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = printable(".".join(str(part) for part in first["loc"]))
            place = f"{where}.{key}" if where and key else where or key
            if first["type"] == "extra_forbidden":
                owner = _nested(cls, first["loc"][:-1])
                hint = did_you_mean(str(first["loc"][-1]), owner.model_fields)
                if issubclass(owner, StageConfig) and not hint.endswith("?"):
                    hint += f"; slingshot {owner.__module__.rpartition('.')[2]} --keys tells of all"
                raise SlingshotError(f"{place}: unknown key; {hint}") from error
            message = first["msg"].removeprefix("Value error, ")
            given = "" if first["type"] in {"missing", "value_error"} else f", got {first['input']!r:.80}"
            raise SlingshotError(f"{place}: {message}{given}") from error


def printable(text: str) -> str:
    """A key of a file from anywhere, fit to be printed: no line breaks, no control sequences, no end without an end."""
    return "".join(character if character.isprintable() else " " for character in text[:200])


def _nested(model: type[Strict], location: Sequence[int | str]) -> type[Strict]:
    """The config class that stands at a place within `model`'s fields, lists and unions on the way looked through."""
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
    """What every stage's Config has. `threads` 0 leaves torch's own choice; `price` is money per hour of this machine."""

    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)
    price: float | None = Field(None, ge=0)
