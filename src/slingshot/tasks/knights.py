"""The task `knights`: knights always tell the truth, knaves always lie; who is what follows from what they say.

    Ann says Bob is a knave. Bob says Ann and Bob are of the same kind. Who is what?
    ->  Ann knight, Bob knight: Ann says Bob knave no: false.
        Ann knight, Bob knave: Ann says Bob knave yes: true, Bob says Ann knight and Bob knave same: false, yes.
    ->  Ann: knight, Bob: knave
    アン「ボブは悪党」ボブ「アンとボブは同類」誰が何?
    ->  アン騎士、ボブ騎士:アン「ボブ悪党否」偽。...                           ->  アン:騎士、ボブ:悪党

Exactly one assignment agrees with what is said. Reasoning is a table of cases in a fixed order: each statement is
checked in turn, claim by claim (or kind by kind, where two are said to be alike), and a case is dropped at the first
that a knight would not say, or a knave would. No step of it knows the answer beforehand.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import Literal, NamedTuple, Self, TypeAlias

from pydantic import Field, model_validator

from slingshot.tasks.task import COLON, COMMA, FULL_STOP, YES, GeneratedTask, Problem, Style

Form = Literal["is", "same", "and", "or", "if"]
Case: TypeAlias = tuple[bool, ...]  # who of the people is a knight

NAMES = {"en": ("Ann", "Bob", "Cid", "Dee", "Eve", "Fay"), "ja": ("アン", "ボブ", "シド", "ディー", "イブ", "フェイ")}
_KINDS = {"en": ("knave", "knight"), "ja": ("悪党", "騎士")}
_SAYS = {"en": "%s says %s.", "ja": "%s「%s」"}
_BESIDE = {"en": " ", "ja": ""}
_ASKS = {"en": "Who is what?", "ja": "誰が何?"}
_IS = {"en": "%s is a %s", "ja": "%sは%s"}
_PERSON_IS = {"en": "%s %s", "ja": "%s%s"}
_PAIR = {
    "en": ("%s and %s are of different kinds", "%s and %s are of the same kind"),
    "ja": ("%sと%sは別類", "%sと%sは同類"),
}
_JOINED = {
    "en": {"and": "%s and %s", "or": "%s or %s", "if": "if %s then %s"},
    "ja": {"and": "%sかつ%s", "or": "%sまたは%s", "if": "%sならば%s"},
}
_HOLDS = {"en": ("%s %s no", "%s %s yes"), "ja": ("%s%s否", "%s%s是")}
_ALIKE = {"en": ("%s and %s different", "%s and %s same"), "ja": ("%sと%s別類", "%sと%s同類")}
_CHECK = {"en": "%s says %s:%s", "ja": "%s「%s」%s"}
_TRUTH = {"en": (" false", " true"), "ja": ("偽", "真")}
_SLIP = {"en": "%s, wait,%s", "ja": "%s、いや%s"}

_PLACES = {name.lower(): place for names in NAMES.values() for place, name in enumerate(names)}
_WORDS = {word: bool(kind) for words in _KINDS.values() for kind, word in enumerate(words)}
_PERSON = re.compile(
    rf"({'|'.join(_PLACES)})(?: is |\s*[:=\uff1aは]\s*| )(?:an? |the )?({'|'.join(_WORDS)})(?:です|だ)?", re.IGNORECASE
)
_BETWEEN = r"(?:\s*[,;、。\uff0c]\s*(?:and )?| and |\s*\n\s*)"
_LIST = re.compile(rf"{_PERSON.pattern}(?:{_BETWEEN}{_PERSON.pattern})*", re.IGNORECASE)
_MAX_LENGTH = 256  # characters of an answer


class Statement(NamedTuple):
    """What `speaker` says, of one ("is") or two claims (person, is a knight); "same": both are true, or neither."""

    speaker: int
    form: Form
    claims: tuple[tuple[int, bool], ...]

    def holds(self, case: Case) -> bool:
        """Whether it is true in this case."""
        first, *others = (case[who] == knight for who, knight in self.claims)
        second = all(others)
        match self.form:
            case "is":
                return first
            case "and":
                return first and second
            case "or":
                return first or second
            case "if":
                return second or not first
            case "same":
                return first == second

    def tell(self, names: Sequence[str], language: str) -> str:
        kinds, words = _KINDS[language], [names[who] for who, _ in self.claims]
        if self.form == "same":
            return _PAIR[language][len({knight for _, knight in self.claims}) == 1] % tuple(words)
        said = tuple(_IS[language] % (names[who], kinds[knight]) for who, knight in self.claims)
        return said[0] if self.form == "is" else _JOINED[language][self.form] % said

    def check(self, case: Case, names: Sequence[str], language: str) -> str:
        """What is said, with what it comes to in this case: which claims hold, or which kinds are compared."""
        kinds = _KINDS[language]
        if self.form == "same":
            alike = len({knight for _, knight in self.claims}) == 1
            return _ALIKE[language][alike] % tuple(
                _PERSON_IS[language] % (names[who], kinds[case[who]]) for who, _ in self.claims
            )
        said = tuple(_HOLDS[language][case[who] == knight] % (names[who], kinds[knight]) for who, knight in self.claims)
        return said[0] if self.form == "is" else _JOINED[language][self.form] % said


class Knights(GeneratedTask):
    """Each of `min_people` to `max_people` says one thing, of one of `forms`, each as likely."""

    min_people: int = Field(2, ge=2, le=len(NAMES["en"]), description="people, at least")
    max_people: int = Field(3, ge=2, le=len(NAMES["en"]), description="people, at most")
    forms: tuple[Form, ...] = Field(
        ("is", "same", "and", "or", "if"), min_length=1, description="of what is said: of one person, or of two"
    )

    @model_validator(mode="after")
    def _some_have_one_solution(self) -> Self:
        if set(self.forms) == {"is"}:  # such statements fit as well where everybody is the other kind
            raise ValueError('forms: of puzzles of "is" alone none has exactly one solution; add another form')
        return self

    def generate(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            n_people = self.min_people + int(rng.random() * (self.max_people - self.min_people + 1))
            statements = [self._statement(speaker, n_people, rng) for speaker in range(n_people)]
            if len(found := consistent_cases(statements)) != 1:
                continue
            places = sorted(rng.sample(range(len(NAMES["en"])), n_people))
            language = self.languages[int(rng.random() * len(self.languages))]
            names = [NAMES[language][place] for place in places]
            said = [_SAYS[language] % (names[one.speaker], one.tell(names, language)) for one in statements]
            yield Problem(
                prompt=_BESIDE[language].join((*said, _ASKS[language])),
                key=knights_key(statements),
                answer=_answer(places, found[0], language),
                language=language,
                data={"places": places, "statements": statements, "level": n_people},
            )

    def _statement(self, speaker: int, n_people: int, rng: random.Random) -> Statement:
        form = self.forms[int(rng.random() * len(self.forms))]
        if form == "is":  # that a person is a knight says nothing of that person's own mouth, a knave nobody can say
            who = [(speaker + 1 + int(rng.random() * (n_people - 1))) % n_people]
        else:
            who = rng.sample(range(n_people), 2)
        claims = [(person, rng.random() < 0.5) for person in who]
        return Statement(speaker, form, tuple(claims if form == "if" else sorted(claims)))

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        language = problem.language
        names = [NAMES[language][place] for place in problem.data["places"]]
        statements = [Statement(*given) for given in problem.data["statements"]]
        rows = case_table(statements)
        slipped = int(rng.random() * sum(len(row.checks) for row in rows)) if style == "slips" else -1
        said = []
        for row in rows:
            people = [
                _PERSON_IS[language] % (name, _KINDS[language][kind])
                for name, kind in zip(names, row.case, strict=True)
            ]
            checks = []
            for at, holds in enumerate(row.checks):
                truth = _TRUTH[language][holds]
                if at == slipped:
                    truth = _SLIP[language] % (_TRUTH[language][not holds], truth)
                checks.append(_CHECK[language] % (names[at], statements[at].check(row.case, names, language), truth))
            slipped -= len(row.checks)
            said.append(COMMA[language].join(people) + COLON[language] + COMMA[language].join(checks))
        return FULL_STOP[language].join(said) + YES[language]

    def read(self, text: str) -> str | None:
        """Every person once with a kind, in English or Japanese, in any order, and nothing else."""
        text = re.sub(r"[.。]$", "", text.strip())
        return _canonical(text) if len(text) <= _MAX_LENGTH and _LIST.fullmatch(text) else None

    def extract(self, text: str) -> str | None:
        *_, found = "", *(match[0] for match in _LIST.finditer(text))
        return _canonical(found)

    def score(self, problem: Problem, answer: str) -> float:
        return float(answer == _canonical(problem.answer))


class CaseRow(NamedTuple):
    """A case, and whether each statement is true in it, up to the first that its speaker would not make."""

    case: Case
    checks: list[bool]


def case_table(statements: Sequence[Statement]) -> list[CaseRow]:
    """The cases up to the first in which everybody says what a knight or a knave would; knights come before knaves."""
    rows = list[CaseRow]()
    for case in product((True, False), repeat=len(statements)):
        rows.append(CaseRow(case, []))
        for one in statements:
            rows[-1].checks.append(one.holds(case))
            if rows[-1].checks[-1] != case[one.speaker]:
                break
        else:
            break
    return rows


def consistent_cases(statements: Sequence[Statement]) -> list[Case]:
    """All cases in which what knights say is true and what knaves say is false."""
    cases = product((True, False), repeat=len(statements))
    return [case for case in cases if all(one.holds(case) == case[one.speaker] for one in statements)]


def knights_key(statements: Sequence[Statement]) -> str:
    """One spelling for what is said, whoever says it: the least over all orders of the people."""
    return min(
        " ".join(sorted(_spell(one, order) for one in statements)) for order in permutations(range(len(statements)))
    )


def _spell(one: Statement, order: Sequence[int]) -> str:
    claims = [f"{order[who]}{'+' if knight else '-'}" for who, knight in one.claims]
    return f"{order[one.speaker]}:{one.form}:{','.join(claims if one.form == 'if' else sorted(claims))}"


def _answer(places: Sequence[int], case: Case, language: str) -> str:
    people = zip(places, case, strict=True)
    return COMMA[language].join(
        f"{NAMES[language][place]}{COLON[language]}{_KINDS[language][kind]}" for place, kind in people
    )


def _canonical(text: str) -> str | None:
    """A list of people in English, by name; None where it is empty, or somebody is named twice."""
    found = [(_PLACES[name.lower()], _WORDS[kind.lower()]) for name, kind in _PERSON.findall(text)]
    people = dict(sorted(found))
    return _answer(list(people), tuple(people.values()), "en") if len(people) == len(found) > 0 else None
