"""Evaluation: the statistics by hand, the choice of a prompt form, and a run on held-out problems."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json
from slingshot.cost.receipt import Receipt
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.stages import evaluate
from slingshot.stages.evaluate import bootstrap, pass_at_k, summarise
from slingshot.tasks.loader import load_task
from slingshot.tasks.task import split_of

Evaluating = Callable[..., evaluate.EvaluateConfig]


@pytest.fixture
def evaluating(base: Path, sums: dict[str, Any]) -> Evaluating:
    common = {
        "model": str(base),
        "tasks": [sums],
        "dtype": "float32",
        "threads": 1,
        "sampling": {"max_tokens": 12},
        "problems": 4,
        "samples": 2,
        "chunk": 3,
    }
    return lambda **changes: evaluate.EvaluateConfig.parse({**common, **changes}, "evaluation")


def test_pass_at_k_by_hand() -> None:
    """1 - C(n - c, k) / C(n, k)."""
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)
    assert pass_at_k(8, 0, 8) == 0.0 and pass_at_k(8, 1, 8) == 1.0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(16, 2, 8) == pytest.approx(1 - 3003 / 12870)


def test_the_interval_is_of_the_mean_over_problems() -> None:
    """100 problems, half solved: 0.5 +- 1.96 sqrt(0.25 / 100)."""
    low, high = bootstrap([1.0, 0.0] * 50, seed=0)
    assert low == pytest.approx(0.5 - 0.098, abs=0.012) and high == pytest.approx(0.5 + 0.098, abs=0.012)
    assert bootstrap([1.0] * 5, seed=0) == [1.0, 1.0]
    assert bootstrap([1.0, 0.0] * 50, seed=0) == [low, high]


def result(form: str, accuracy: list[float], tokens: list[int], task: str = "sums") -> dict[str, Any]:
    n = len(accuracy)
    return {
        "task": task, "form": form, "accuracy": accuracy, "tokens": tokens, "format": [1.0] + [0.0] * (n - 1), "language": [1.0] + [0.5] * (n - 1),
        "example": {"correct": accuracy[0] == 1.0},
    }  # fmt: skip


def test_a_summary_by_hand(evaluating: Evaluating) -> None:
    """Two problems, two samples: pass@1 is the mean over all, shares are of all samples, the better form is reported."""
    forms = [{"name": "chat"}, {"name": "plain", "chat": False}]
    results = [result("chat", [1.0, 0.0], [3, 5]), result("chat", [0.0, 0.0], [10, 2])]
    results += [result("plain", [1.0, 1.0], [1, 1]), result("plain", [0.0, 1.0], [2, 4])]
    summary = summarise(results, evaluating(forms=forms))
    found = summary["tasks"]["sums"]
    assert (found["pass@1"], found["prompt_form"], found["pass@1_by_form"]) == (
        0.75,
        "plain",
        {"chat": 0.25, "plain": 0.75},
    )
    assert (found["mean_tokens"], found["format"], found["language"], found["n"], found["samples_per_problem"]) == (
        2.0,
        0.5,
        0.5,
        2,
        2,
    )
    assert found["pass@8"] is None and found["ci95"][0] <= 0.75 <= found["ci95"][1] == 1.0
    assert summary["examples"]["sums"] == [{"correct": True}, {"correct": False}]
    chat = summarise(results[:2], evaluating())["tasks"]["sums"]
    assert (chat["pass@1"], chat["mean_tokens"]) == (0.25, 5.0)


def test_pass_at_8_where_there_are_8_samples(evaluating: Evaluating) -> None:
    results = [result("chat", [1.0] + [0.0] * 7, [1] * 8), result("chat", [0.0] * 8, [1] * 8)]
    assert summarise(results, evaluating(samples=8))["tasks"]["sums"]["pass@8"] == 0.5


def test_tasks_are_reported_apart_and_examples_are_limited(evaluating: Evaluating) -> None:
    results = [result("chat", [1.0, 1.0], [1, 1]), result("chat", [0.0, 0.0], [1, 1], task="other")] + [
        result("chat", [1.0, 0.0], [1, 1])
    ] * 5
    summary = summarise(results, evaluating(examples=3))
    assert (summary["tasks"]["sums"]["n"], summary["tasks"]["other"]["pass@1"]) == (6, 0.0)
    assert [len(examples) for examples in summary["examples"].values()] == [3, 1]


def test_a_run_asks_held_out_problems_in_every_form(
    evaluating: Evaluating, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = evaluate.roll_out, []

    def remembered(engine: Any, items: Any, params: Any, form: PromptForm) -> list[list[Rollout]]:
        groups = real(engine, items, params, form)
        seen.extend((form.name, rollout) for group in groups for rollout in group)
        return groups

    monkeypatch.setattr(evaluate, "roll_out", remembered)
    config = evaluating(forms=[{"name": "chat"}, {"name": "plain", "chat": False, "lenient": True}])
    evaluate.run(config, tmp_path / "out")
    assert len(seen) == 2 * 4 * 2
    keys = [rollout.problem.key for _, rollout in seen]
    assert len(set(keys)) == 4 and {split_of(key) for key in keys} == {"test"}
    evaluation, receipt = read_json(tmp_path / "out" / "evaluation.json"), Receipt.read(tmp_path / "out")
    found = evaluation["tasks"]["arithmetic"]
    of_form = [rollout for form, rollout in seen if form == found["prompt_form"]]
    assert found["n"] == 4 and found["pass@1"] == pytest.approx(sum(rollout.accuracy for rollout in of_form) / 8)
    assert found["mean_tokens"] == pytest.approx(sum(len(rollout.completion_ids) for rollout in of_form) / 8)
    assert receipt.tokens == sum(len(rollout.completion_ids) for _, rollout in seen) and set(receipt.flops_by_part) == {
        "sampling"
    }
    example = evaluation["examples"]["arithmetic"][0]
    first = next(rollout for rollout in of_form)
    assert example == {
        "prompt": first.problem.prompt, "answer": first.problem.answer, "reasoning": first.reasoning, "response": first.answer,
        "correct": first.accuracy == 1.0,
    }  # fmt: skip

    monkeypatch.undo()
    evaluate.run(evaluating(forms=config.forms, chunk=64), tmp_path / "again")
    assert read_json(tmp_path / "again" / "evaluation.json") == evaluation, "chunks only say where it may stop"


def test_the_problems_are_the_same_for_every_model(sums: dict[str, Any]) -> None:
    from slingshot.tasks.mixture import distinct

    task = load_task("arithmetic")
    first = [problem.key for problem in distinct(task, "test", "evaluate/0", 30)]
    assert (
        first == [problem.key for problem in distinct(load_task("arithmetic"), "test", "evaluate/0", 30)]
        and len(set(first)) == 30
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "evaluation.tasks: "),
        ({"forms": []}, "evaluation.forms: "),
        ({"samples": 0}, "evaluation.samples: .*got 0"),
        ({"sampling": {"temperature": -0.1}}, "evaluation.sampling: temperature must be 0 .*got -0.1"),
        ({"sampling": {"top_p": 0.0}}, "evaluation.sampling: top_p must be .*got 0.0"),
        ({"forms": [{"name": "a"}, {"name": "a", "chat": False}]}, "evaluation.*two forms are named a"),
    ],
)
def test_a_config_that_means_nothing_is_refused(evaluating: Evaluating, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SlingshotError, match=message):
        evaluating(**changes)
