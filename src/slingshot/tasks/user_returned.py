"""What the functions of a user's file may return (docs/task.md), beside plain numbers."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from slingshot.base.config import Strict
from slingshot.sandbox.isolate import number
from slingshot.tasks.task import Language


class Returned(Strict):
    """What a file's function may return: a dict, with numbers for the text they are and None for what is left out."""

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise ValueError(f"{reprlib.repr(given)} is no dict with {', '.join(cls.model_fields)}")
        said = {name: value for name, value in given.items() if value is not None}
        return {name: value if number(value) is None else str(value) for name, value in said.items()}


class ReturnedProblem(Returned):
    prompt: str = Field(min_length=1)
    answer: str = ""
    key: str = ""
    language: Language = "en"
    data: dict[Any, Any] = {}


class ReturnedSolution(Returned):
    reasoning: str
    answer: str


class ReturnedMessage(Returned):
    role: Literal["user", "system", "tool"] = "user"
    content: str
