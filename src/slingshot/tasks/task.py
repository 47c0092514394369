"""The Task: where problems come from, how an answer is verified, and how a worked solution reads.

    task = load_task("arithmetic", max_terms=6)          # tasks/loader.py knows the kinds
    problem = next(task.problems("train", seed=0))
    task.verify(problem, "14").value                     # 1.0 if 14 is the answer
    for problem, solution in task.documents("train", seed=0, style="steps"): ...

A problem's split follows from the SHA-256 of its canonical key, so train and test never overlap, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError

Split = Literal["train", "test"]
Style = Literal["answer", "steps", "slips", "calls"]
Language = Literal["en", "ja"]

# What joins and ends the steps of worked solutions.
COMMA, COLON = {"en": ", ", "ja": "、"}, {"en": ": ", "ja": ":"}
FULL_STOP, YES = {"en": ". ", "ja": "。"}, {"en": ", yes.", "ja": "、正解。"}

# Problems of the other split drawn in a row before a task is told to have none: 0.9 ** 20000 is no accident.
_PATIENCE = 20_000


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. Problems with the same key are the same problem in other words, and always share a split."""

    prompt: str
    key: str
    answer: str = ""
    language: str = "en"
    # What the task itself needs to verify and solve, as JSON has it.
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)


class Call(NamedTuple):
    """What is asked of a tool; `arguments` an object in JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Solution:
    """A worked solution. `reasoning` is empty in style "answer"; `calls`, of tools, come before the answer."""

    reasoning: str
    answer: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Reward:
    """Accuracy in [0, 1], and the answer that was read in the text (None: no answer could be read)."""

    value: float
    answer: str | None
    error: str | None = None  # why nothing could be verified: the verifier raised, or hung


class Task(Strict, ABC):
    """Base of all tasks; a subclass's fields are its parameters.

    A subclass brings `name` and `problems`. `score`, `read` and `extract` say which answers are right and how one is
    read in a text; `has_solutions` and `reasoning` are for tasks that write worked text, `has_turns` and `step` for
    environments of several turns, `tools` and `calls` for those with something to call.
    """

    @property
    def is_given(self) -> bool:
        """Whether the problems are a person's, so many and no more, not generated."""
        return False

    @property
    @abstractmethod
    def name(self) -> str:
        """What `load_task` calls it."""

    @abstractmethod
    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        """Problems of one split, the same for the same seed; endless, or finite where a user's file ends."""

    @property
    def has_solutions(self) -> bool:
        return False

    def solution(self, problem: Problem, style: Style, rng: random.Random) -> Solution:
        """A worked solution in the problem's language: bare, in steps, or with a slip that is corrected."""
        if not self.has_solutions:
            raise SlingshotError(f"{self.name} writes no worked solutions; give data or text instead of this task")
        return Solution("" if style == "answer" else self.reasoning(problem, style, rng), problem.answer)

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        """What `solution` says on the way to the answer."""
        raise NotImplementedError

    def documents(
        self, split: Split, seed: int, style: Style, language_mix: float = 0.0
    ) -> Iterator[tuple[Problem, Solution]]:
        """Problems with their solutions, as `write` writes them."""
        rng = random.Random(f"{self.name}/{style}/{seed}")
        for problem in self.problems(split, seed):
            yield problem, self.write(problem, style, rng, language_mix)

    def write(self, problem: Problem, style: Style, rng: random.Random, language_mix: float = 0.0) -> Solution:
        """A solution, with probability `language_mix` in another language than the problem's, if the task has some."""
        return self.solution(problem, style, rng)

    def read(self, text: str) -> str | None:
        """The answer when `text` is nothing else; else None. Strict, so that listing many answers earns nothing."""
        return text.strip() or None

    def extract(self, text: str) -> str | None:
        """The last thing in `text` that looks like an answer, or None. Lenient, for models that know no format."""
        return text.strip().rpartition("\n")[2].strip() or None

    def score(self, problem: Problem, answer: str) -> float:
        """Accuracy of an answer that was read, in [0, 1]."""
        return float(answer == problem.answer)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """Score the answer part of a response; `lenient` looks for the last answer anywhere in `text` instead."""
        answer = self.extract(text) if lenient else self.read(text)
        return Reward(0.0 if answer is None else self.score(problem, answer), answer)

    @property
    def has_turns(self) -> bool:
        return False

    def step(self, problem: Problem, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """What the environment says to the conversation so far, as messages of a chat; None when it is over."""
        return None

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """What the model may call, as chat templates are told of it; its calls stand in messages as `tool_calls`."""
        return ()

    @property
    def observation_tokens(self) -> int | None:
        """Tokens of a message of the environment at most; what is beyond is cut off. None: no bound."""
        return None

    def calls(self, problem: Problem) -> tuple[Call, ...]:
        """How a worked solution would ask tools for the answer, as far as their names are those of environments/."""
        return ()


class GeneratedTask(Task):
    """A task that makes problems without end, in `languages`, and solves them. A subclass brings `generate`.

    Of two parameters min_X and max_X the first is not above the second.
    """

    languages: tuple[Language, ...] = Field(("en", "ja"), min_length=1, description="of the problems, each as often")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        for least in (name for name in type(self).model_fields if name.startswith("min_")):
            most = least.replace("min_", "max_", 1)
            if (low := getattr(self, least)) > (high := getattr(self, most, low)):
                raise ValueError(f"{least} {low} is above {most} {high}")
        return self

    @abstractmethod
    def generate(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of both splits without end."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def has_solutions(self) -> bool:
        return True

    def write(self, problem: Problem, style: Style, rng: random.Random, language_mix: float = 0.0) -> Solution:
        others = [other for other in self.languages if other != problem.language]
        if language_mix and rng.random() < language_mix and others:
            problem = replace(problem, language=rng.choice(others))
        return self.solution(problem, style, rng)

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return in_split(self.generate(random.Random(f"{self.name}/{seed}")), split, self.name)


def key_number(key: str) -> int:
    """The first 64 bits of the SHA-256 of a canonical key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def split_of(key: str) -> Split:
    """The split a canonical key belongs to: a tenth of all keys are for testing."""
    return "test" if key_number(key) % 10 == 0 else "train"


def in_split(problems: Iterable[Problem], split: Split, name: str) -> Iterator[Problem]:
    """Those of `problems` that belong to `split`. Raises SlingshotError where there is none, or none for too long."""
    missed, found = 0, False
    for problem in problems:
        if split_of(problem.key) == split:
            missed, found = 0, True
            yield problem
        elif (missed := missed + 1) == _PATIENCE:
            break
    if not found or missed == _PATIENCE:
        way = "give it parameters that allow more different problems"
        raise SlingshotError(f"{name}: no {split} problem in {missed} drawn; {way}")
