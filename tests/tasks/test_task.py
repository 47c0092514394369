"""Splits by key, the guard against searching for ever, mixed languages, tasks without solutions."""

import itertools
import random
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import Problem, Task, in_split, split_of

GENERATED = pytest.mark.parametrize("name", ["arithmetic", "countdown", "knights", "multiplication", "needle"])


def problems_of(*keys):
    return (Problem(prompt=key, key=key) for key in keys)


def test_split_of_known_keys():
    # printf KEY | sha256sum: first 16 hex digits, modulo 10
    assert split_of("a") == "test"  # 0xca978112ca1bbdca % 10 == 0
    assert split_of("b") == "train"  # 0x3e23e8160039594a % 10 == 6
    assert split_of("c") == "test"  # 0x2e7d2c03a9507ae2 % 10 == 0
    assert split_of("+3+4+9-2") == "train"  # 0xb34302912ca9e6e9 % 10 == 9
    share = sum(split_of(f"key {number}") == "test" for number in range(10_000)) / 10_000
    assert 0.09 < share < 0.11


@given(st.lists(st.text()))
def test_in_split_parts_problems_without_overlap_or_loss(keys):
    parts = []
    for split, always in ("train", "b"), ("test", "a"):
        parts.append([problem.key for problem in in_split(problems_of(*keys, always), split, "task")][:-1])
    train, test = map(set, parts)
    assert not train & test and sorted(parts[0] + parts[1]) == sorted(keys)


def test_in_split_refuses_to_search_for_ever():
    with pytest.raises(SlingshotError, match=r"narrow: no test problem in 20000 drawn; .*parameters"):
        next(in_split(problems_of(*itertools.repeat("b", 30_000)), "test", "narrow"))


@GENERATED
def test_train_and_test_never_overlap_whatever_the_seed(name):
    task = load_task(name)
    train, test = (
        {problem.key for seed in range(3) for problem in itertools.islice(task.problems(split, seed), count)}
        for split, count in (("train", 2000), ("test", 400))
    )
    assert len(train) > 500 and len(test) > 100 and not train & test


@GENERATED
def test_problems_and_documents_repeat_by_seed(name):
    first, again, other = (
        list(itertools.islice(load_task(name).documents("train", seed, "slips", 0.5), 50)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("name", "english", "japanese"), [("arithmetic", "plus", "足す"), ("countdown", "yes", "正解")]
)
def test_language_mix_is_the_share_of_reasoning_in_the_other_language(name, english, japanese):
    task = load_task(name, **({"operators": "+"} if name == "arithmetic" else {}))
    mixed = 0
    for problem, solution in itertools.islice(task.documents("train", 0, "steps", language_mix=0.3), 2000):
        assert problem.language == ("en" if problem.prompt.isascii() else "ja")
        assert (english in solution.reasoning) != (japanese in solution.reasoning)
        mixed += (english in solution.reasoning) != (problem.language == "en")
        assert task.solution(problem, "steps", random.Random(0)).reasoning.isascii() == (problem.language == "en")
    assert 0.26 < mixed / 2000 < 0.34
    one = load_task(name, languages=["ja"]).documents("train", 0, "steps", language_mix=1.0)
    assert not any(solution.reasoning.isascii() for _, solution in itertools.islice(one, 50))


class Bare(Task):
    name: ClassVar[str] = "bare"

    def problems(self, split, seed):
        return problems_of("one\ntwo")


def test_a_task_brings_no_more_than_its_problems():
    task, problem = Bare(), Problem("?", "?", answer="two")
    assert not task.has_solutions
    with pytest.raises(SlingshotError, match="bare writes no worked solutions; give data or text instead of this task"):
        task.solution(problem, "steps", random.Random(0))
    assert task.extract("so it is\n two \n") == "two" and task.extract(" \n") is None and task.read("  ") is None
    assert task.verify(problem, " two ").value == 1.0 and task.verify(problem, "one two").value == 0.0
