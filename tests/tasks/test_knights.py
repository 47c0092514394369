"""Knights and knaves: an oracle in plain logic, a table worked by hand, keys under renaming, answers of all shapes."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.tasks.knights import Statement, case_table, consistent_cases, knights_key
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem, Solution

SAID = [[0, "is", [[1, False]]], [1, "same", [[0, True], [1, True]]]]
PROBLEM = Problem("", "", "Ann: knight, Bob: knave", "en", {"places": [0, 1], "statements": SAID})
WORKED = (
    "Ann knight, Bob knight: Ann says Bob knave no: false. "
    "Ann knight, Bob knave: Ann says Bob knave yes: true, Bob says Ann knight and Bob knave same: false, yes."
)
WORKED_JA = (
    "アン騎士、ボブ騎士:アン「ボブ悪党否」偽。"
    "アン騎士、ボブ悪党:アン「ボブ悪党是」真、ボブ「アン騎士とボブ悪党同類」偽、正解。"
)
ORACLE = {
    "is": lambda p: p[0], "and": lambda p: p[0] and p[1], "or": lambda p: p[0] or p[1],
    "if": lambda p: p[0] <= p[1], "same": lambda p: p[0] == p[1],
}  # fmt: skip


@st.composite
def puzzles(draw):
    n_people = draw(st.integers(2, 4))
    statements = []
    for speaker in range(n_people):
        form = draw(st.sampled_from(sorted(ORACLE)))
        who = draw(st.lists(st.integers(0, n_people - 1), min_size=2, max_size=2, unique=True))[: 1 + (form != "is")]
        statements.append(Statement(speaker, form, tuple((person, draw(st.booleans())) for person in who)))
    return statements


@given(puzzles())
def test_cases_are_those_of_plain_logic_and_the_table_ends_at_the_first(statements):
    cases = list(itertools.product((True, False), repeat=len(statements)))
    right = []
    for case in cases:
        truths = [ORACLE[form]([case[who] == kind for who, kind in claims]) for _, form, claims in statements]
        right += [case] * (truths == list(case))
    assert consistent_cases(statements) == right
    rows = case_table(statements)
    assert [row.case for row in rows] == cases[: cases.index(right[0]) + 1 if right else len(cases)]
    for row in rows:
        agrees = [holds == row.case[at] for at, holds in enumerate(row.checks)]
        assert all(agrees[:-1]) and (agrees[-1] or row.case not in right)


@given(puzzles())
def test_a_check_says_which_claims_hold_or_of_which_kinds_the_people_are(statements):
    for case, one in itertools.product(itertools.product((True, False), repeat=len(statements)), statements):
        said = one.check(case, "ABCD", "en")
        kinds = ["knight" if (case[who] if one.form == "same" else kind) else "knave" for who, kind in one.claims]
        assert re.findall(r"([A-D]) (\w+)", said) == [
            ("ABCD"[who], kind) for (who, _), kind in zip(one.claims, kinds, strict=True)
        ]
        holds = [] if one.form == "same" else [case[who] == kind for who, kind in one.claims]
        assert [word == "yes" for word in re.findall(r"\b(?:yes|no)\b", said)] == holds


@given(puzzles(), st.randoms())
def test_a_key_is_the_same_whoever_the_people_are(statements, rng):
    order = list(range(len(statements)))
    rng.shuffle(order)
    renamed = [
        Statement(order[one.speaker], one.form, tuple((order[w], k) for w, k in one.claims)) for one in statements
    ]
    rng.shuffle(renamed)
    assert knights_key(renamed) == knights_key(statements)


@pytest.mark.parametrize(("language", "worked"), [("en", WORKED), ("ja", WORKED_JA)])
def test_a_table_worked_by_hand(language, worked):
    task, problem = load_task("knights"), Problem("", "", PROBLEM.answer, language, PROBLEM.data)
    assert task.solution(problem, "steps", random.Random(0)) == Solution(worked, PROBLEM.answer)
    assert task.solution(problem, "answer", random.Random(0)).reasoning == ""


@pytest.mark.parametrize("params", [{}, {"min_people": 3, "max_people": 4}, {"forms": ["is", "same"], "min_people": 3}])
def test_problems_have_one_solution_at_which_the_worked_one_ends(params):
    task = load_task("knights", **params)
    for problem, solution in itertools.islice(task.documents("train", 1, "slips"), 300):
        statements = [Statement(*given) for given in problem.data["statements"]]
        (case,) = consistent_cases(statements)
        assert {one.form for one in statements} <= set(task.forms)
        assert task.min_people <= len(case) == problem.data["level"] <= task.max_people
        assert problem.language == ("en" if problem.prompt.isascii() else "ja")
        kinds = ("knight", "騎士")
        assert tuple(pair.endswith(kinds) for pair in re.split(r", |、", solution.answer)) == case
        assert task.verify(problem, solution.answer).value == 1.0
        last = re.split(r"\. |。(?=.)", solution.reasoning)[-1]
        ended = re.split(r": |:", last)[0]
        assert tuple(pair.endswith(kinds) for pair in re.split(r", |、", ended)) == case
        whole = f"{solution.reasoning}\n{solution.answer}"
        assert task.verify(problem, whole).value == 0.0 and task.verify(problem, whole, lenient=True).value == 1.0
        for other in itertools.product((True, False), repeat=len(case)):
            names = re.findall(r"(\w+)\s*:", solution.answer)
            told = ", ".join(
                f"{name}: {'knight' if kind else 'knave'}" for name, kind in zip(names, other, strict=True)
            )
            assert task.verify(problem, told).value == float(other == case)


@pytest.mark.parametrize(("language", "slip"), [("en", r" (\w+), wait, (\w+)"), ("ja", r"([真偽])、いや([真偽])")])
def test_a_slip_is_one_wrong_verdict_put_right(language, slip):
    task, problem = load_task("knights"), Problem("", "", PROBLEM.answer, language, PROBLEM.data)
    steps, places = task.solution(problem, "steps", random.Random(0)).reasoning, set()
    for seed in range(50):
        reasoning = task.solution(problem, "slips", random.Random(seed)).reasoning
        (found,) = re.finditer(slip, reasoning)
        assert found[1] != found[2] and re.sub(slip, r" \2" if language == "en" else r"\2", reasoning) == steps
        places.add(found.start())
    assert len(places) == 3


RIGHT = [
    "Ann: knight, Bob: knave", "Bob: knave, Ann: knight.", "Ann is a knight and Bob is a knave",
    "ann = Knight; bob = knave", "Ann: knight\nBob: knave", " Ann knight, and Bob knave ",
    "アン:騎士、ボブ:悪党", "アンは騎士、ボブは悪党です。", "アン:騎士、Bob: knave",
]  # fmt: skip
WRONG = [
    "Ann: knave, Bob: knight", "Ann: knight, Bob: knight", "Ann: knight", "knight, knave", "Ann: knight Bob: knave", "",
    "Ann: knight, Bob: knave, Cid: knave", "Ann: knight, Bob: knave, Bob: knave", "Ann: knight, Ann: knave, Bob: knave",
    "I say Ann: knight, Bob: knave", "Ann: knight, Bob: knave or Ann: knave, Bob: knight", "Annknight, Bob: knave",
    "Ann: not knight, Bob: knave", "Ann: knights, Bob: knave", "Ann: knight, Bob: knave" + " " * 300 + "x",
]  # fmt: skip


@pytest.mark.parametrize("text", [*RIGHT, *WRONG])
def test_answers_in_either_language_are_read_strictly(text):
    task = load_task("knights")
    assert task.verify(PROBLEM, text).value == float(text in RIGHT)
    assert task.verify(PROBLEM, f"So it is: {text}!", lenient=True).value == 1.0 or text in WRONG


@given(
    st.text() | st.lists(st.sampled_from(["Ann", "Bob", ":", " ", "knight", "knave", ", ", "は", "騎士"])).map("".join)
)
def test_any_text_is_scored_without_an_exception(text):
    for lenient in (False, True):
        assert load_task("knights").verify(PROBLEM, text, lenient=lenient).value in (0.0, 1.0)
