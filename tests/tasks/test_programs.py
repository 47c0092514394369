"""Generated programming problems: what they ask is what their tests want and their solutions do."""

import itertools
import json
import random

import pytest

from slingshot.sandbox.program import ProgramLimits, isolation, run_program
from slingshot.tasks.code import OPERATIONS, solve
from slingshot.tasks.hidden_tests import HiddenTests
from slingshot.tasks.judge import passed_tests
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import split_of

INPUTS = {
    "numbers": [[], [3], [5, -2, 9, 5, 0, 12]],
    "words": [[], ["a"], ["bo", "gadi", "bo", "nasu", "ri"]],
    "text": ["", "e", "bo gadi ere a"],
    "number": [0, -37, 108],
}


def drawn(count, **params):
    return list(itertools.islice(load_task("code", trusted=True, **params).problems("train", 0), count))


@pytest.mark.skipif(bool(isolation().missing), reason="this machine cannot contain programs")
def test_every_operation_is_the_expression_it_is_written_as():
    cases = [(i, k, x) for i, each in enumerate(OPERATIONS) for k in each.ks for x in INPUTS[each.takes]]
    lines = [f"out.append((lambda x: {OPERATIONS[i].spelt(k)})({x!r}))" for i, k, x in cases]
    outcome = run_program("\n".join(["import json", "out = []", *lines, "print(json.dumps(out))"]))
    assert json.loads(outcome.stdout) == [OPERATIONS[i].function(x, k) for i, k, x in cases], outcome.stderr


def test_operations_give_what_they_say_and_no_two_read_alike():
    for operation in OPERATIONS:
        for value in INPUTS[operation.takes]:
            made = operation.function(value, operation.ks[0])
            kinds = {"numbers": list, "words": list, "text": str, "number": int}
            assert type(made) is kinds[operation.gives]
    for language in ("en", "ja"):
        phrases = [(each.takes, each.phrase(language, 3)) for each in OPERATIONS]
        assert len(set(phrases)) == len(phrases)


def test_problems_go_by_the_seed_and_by_the_split():
    assert drawn(50) == drawn(50)
    task = load_task("code", trusted=True)
    test = list(itertools.islice(task.problems("test", 1), 50))
    assert {split_of(p.key) for p in test} == {"test"} and not {p.key for p in test} & {p.key for p in drawn(500)}
    assert {p.language for p in drawn(50)} == {"en", "ja"} and {p.language for p in drawn(50, languages=["ja"])} == {
        "ja"
    }


@pytest.mark.slow
def test_levels_are_lengths_and_there_are_thousands_of_kinds():
    for level in (1, 2, 3):
        assert {len(problem.data["chain"]) for problem in drawn(100, level=level)} == set(range(1, level + 1))
    assert len({problem.key for problem in drawn(2000, level=3)}) > 1000


def test_tests_tell_a_solution_from_one_that_leaves_a_step_out():
    for problem in drawn(150, level=3):
        chain, hidden = problem.data["chain"], HiddenTests(**problem.data["hidden"])
        assert len({json.dumps(output) for output in hidden.outputs}) >= 4 and hidden.entry_point == "f"
        for place, (index, _) in enumerate(chain):
            if OPERATIONS[index].takes == OPERATIONS[index].gives:
                left = [given[0] for given in hidden.inputs]
                for number, k in [*chain[:place], *chain[place + 1 :]]:
                    left = [OPERATIONS[number].function(value, k) for value in left]
                assert left != list(hidden.outputs)


@pytest.mark.skipif(bool(isolation().missing), reason="this machine cannot contain programs")
def test_worked_solutions_are_right():
    for problem in drawn(6, level=3):
        assert problem.answer == solve(problem.data["chain"])
        hidden = HiddenTests(**problem.data["hidden"])
        assert passed_tests(problem.answer, hidden, ProgramLimits()) == [True] * hidden.count
        assert passed_tests("def f(x): return x", hidden, ProgramLimits()) != [True] * hidden.count


def test_solutions_name_each_step_and_slips_are_corrected():
    task, rng = load_task("code", trusted=True, level=3), random.Random(0)
    for problem in drawn(20, level=3):
        steps = task.solution(problem, "steps", rng).reasoning.splitlines()
        slips = task.solution(problem, "slips", rng).reasoning
        assert len(steps) == len(problem.data["chain"]) and task.solution(problem, "answer", rng).reasoning == ""
        for step, (index, k) in zip(steps, problem.data["chain"], strict=True):
            assert step == f"{OPERATIONS[index].phrase(problem.language, k)}: {OPERATIONS[index].spelt(k)}"
        assert slips.count({"en": ", wait, ", "ja": "、いや"}[problem.language]) == 1
    other = task.write(problem, "steps", rng, language_mix=1.0)
    assert other.answer == problem.answer and other.reasoning.isascii() is (problem.language == "ja")
