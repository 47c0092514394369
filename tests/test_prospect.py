"""prospect.py: replies of a model to come are worked solutions of the same problems, right as often as it is believed to be."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from slingshot import prospect
from slingshot.prospect import Writer, guesses
from slingshot.rollout.rollout import Item, PromptForm, TaskMix
from slingshot.tasks.task import Problem, TaskConfig
from slingshot.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    task = TaskMix([TaskConfig(name="arithmetic")]).tasks[0][0]
    texts = [solution.reasoning for _, (_, solution) in zip(range(200), task.documents("train", 0, "steps"), strict=False)]
    return Tokenizer.train(texts, 400)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return TaskMix([TaskConfig(name="arithmetic")]).draw("train", "here", 300)


def test_a_reply_is_the_worked_solution_of_its_problem(tokenizer: Tokenizer, items: list[Item]) -> None:
    prompt, (reply,) = Writer({"steps": 1.0}).respond(tokenizer, items[0], PromptForm(), 1, 1000)
    assert prompt == PromptForm().encode(tokenizer, items[0].problem)
    assert reply.reasoning == items[0].task.solution(items[0].problem, "steps", random.Random(0)).reasoning
    assert tokenizer.decode(reply.ids).startswith(reply.reasoning + "\n</think>") and reply.ids[-1] == tokenizer.eos_id
    _, (plain,) = Writer({"answer": 1.0}).respond(tokenizer, items[0], PromptForm(chat=False), 1, 1000)
    assert plain.ids == [*tokenizer.encode(plain.answer), tokenizer.eos_id]
    assert len(Writer().respond(tokenizer, items[0], PromptForm(), 1, 5)[1][0].ids) == 5


def test_right_replies_pass_the_verifier_and_wrong_ones_do_not(tokenizer: Tokenizer, items: list[Item]) -> None:
    for item in items[:60]:
        for reply in Writer().respond(tokenizer, item, PromptForm(), 4, 1000)[1]:
            assert item.task.verify(item.problem, reply.answer).value == float(reply.right)


@pytest.mark.parametrize("solved", [0.2, 0.5, 0.9])
def test_problems_are_solved_as_often_as_believed_and_some_always_or_never(tokenizer: Tokenizer, items: list[Item], solved: float) -> None:
    shares = [statistics.fmean(r.right for r in Writer(solved=solved).respond(tokenizer, item, PromptForm(), 16, 50)[1]) for item in items]
    assert statistics.fmean(shares) == pytest.approx(solved, abs=0.06)
    mixed = statistics.fmean(0.0 < share < 1.0 for share in shares)  # of independent problems nearly all would be
    assert mixed == pytest.approx(Writer(solved=solved).disagreement(16), abs=0.08)


def test_replies_disagree_as_often_as_was_measured() -> None:
    assert Writer().disagreement(2) == pytest.approx(2 * 0.25 * 0.84 / 1.84)  # 2 (E p - E p^2), where E p^2 = (E p)^2 + E p (1 - E p) / 1.84
    assert Writer(solved=0.25).disagreement(2) == pytest.approx(2 * 0.1875 * 0.84 / 1.84)
    assert Writer().disagreement(1) == pytest.approx(0)
    assert 0 <= Writer(solved=1e-15).disagreement(8) < 1e-12
    assert Writer().disagreement(8) == pytest.approx(1 - 0.44, abs=0.005)  # arXiv 2607.00152


def test_styles_come_in_their_shares_and_again_the_same(tokenizer: Tokenizer, items: list[Item]) -> None:
    writer = Writer({"answer": 3.0, "steps": 1.0})
    replies = [writer.respond(tokenizer, item, PromptForm(), 4, 1000)[1] for item in items]
    assert statistics.fmean(not reply.reasoning for group in replies for reply in group) == pytest.approx(0.75, abs=0.05)
    assert replies[7] == writer.respond(tokenizer, items[7], PromptForm(), 4, 1000)[1]


def test_of_many_problems_some_stand_for_all(items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    assert prospect.some(items) == (items, 1.0)
    monkeypatch.setattr(prospect, "SHOWN", 4)
    assert prospect.some(items[:10]) == ([items[0], items[3], items[6], items[9]], 2.5)
    assert prospect.some(items[:4]) == (items[:4], 1.0)
    assert prospect.some([]) == ([], 0.0)


class Silent:
    """A task that cannot write solutions."""

    name = "silent"
    has_solutions = False


def test_a_task_without_solutions_is_answered_at_full_length(tokenizer: Tokenizer) -> None:
    task: Any = Silent()
    item = Item(task, Problem(prompt="?", key="k", answer="7"), "k")
    _, replies = Writer().respond(tokenizer, item, PromptForm(), 3, 40)
    assert [len(reply.ids) for reply in replies] == [40, 40, 40]
    assert guesses([item], Writer(), 40) == ["silent: no worked solutions, so every response runs to max_tokens 40"]
