"""Rejection sampling: only what the verifier accepts, each reasoning once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_jsonl
from slingshot.cost.receipt import Receipt
from slingshot.rollout.rollout import Rollout
from slingshot.stages import sample
from slingshot.tasks.mixture import Item

Sampling = Callable[..., sample.SampleConfig]

# What each of six samples scores: accuracy, format, language, and its reasoning.
SAID = [
    (1.0, 1.0, 1.0, "because"),
    (0.0, 1.0, 1.0, "wrong"),
    (1.0, 0.0, 1.0, "unclosed"),
    (1.0, 1.0, 0.5, "だから"),
    (1.0, 1.0, 1.0, "because"),
    (1.0, 1.0, 1.0, "also"),
]


@pytest.fixture
def sampling(base: Path, sums: dict[str, Any]) -> Sampling:
    common = {
        "model": str(base),
        "tasks": [sums],
        "dtype": "float32",
        "threads": 1,
        "sampling": {"max_tokens": 16},
        "problems": 6,
        "samples": 6,
        "chunk": 4,
    }
    return lambda **changes: sample.SampleConfig.parse({**common, **changes}, "sample")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float, str]]:
    """Every problem gets these samples instead of the model's own."""
    answers = list(SAID)

    def roll_out(_: Any, items: Sequence[Item], *__: Any) -> list[list[Rollout]]:
        return [
            [
                Rollout(
                    item.task,
                    item.problem,
                    [1, 2],
                    [3] * 5,
                    [-1.0] * 5,
                    f" {reasoning}\n",
                    "7 ",
                    accuracy,
                    form,
                    language,
                )
                for accuracy, form, language, reasoning in answers
            ]
            for item in items
        ]

    monkeypatch.setattr(sample, "roll_out", roll_out)
    return answers


def test_accepted_samples_are_kept_once(sampling: Sampling, said: list[Any], tmp_path: Path) -> None:
    sample.run(sampling(per_problem=3), tmp_path / "out")
    rows, receipt = read_jsonl(tmp_path / "out" / "data.jsonl"), Receipt.read(tmp_path / "out")
    assert [row["reasoning"] for row in rows] == ["because", "also"] * 6 and {row["answer"] for row in rows} == {"7"}
    assert len({row["key"] for row in rows}) == 6 and {row["task"] for row in rows} == {"arithmetic"}
    assert receipt.extra == {"examples": 12, "problems": 6} and receipt.tokens == 6 * 6 * 5
    logged = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [(row["step"], row["kept"]) for row in logged] == [(1, 8), (2, 12)] and logged[0][
        "pass_rate"
    ] == pytest.approx(5 / 6)


def test_at_most_so_many_of_one_problem(sampling: Sampling, said: list[Any], tmp_path: Path) -> None:
    sample.run(sampling(per_problem=1), tmp_path / "out")
    assert [row["reasoning"] for row in read_jsonl(tmp_path / "out" / "data.jsonl")] == ["because"] * 6


def test_another_language_is_kept_on_request(sampling: Sampling, said: list[Any], tmp_path: Path) -> None:
    sample.run(sampling(per_problem=9, language=False), tmp_path / "out")
    assert [row["reasoning"] for row in read_jsonl(tmp_path / "out" / "data.jsonl")] == [
        "because",
        "だから",
        "also",
    ] * 6


def test_a_model_that_solves_nothing_makes_no_dataset(sampling: Sampling, said: list[Any], tmp_path: Path) -> None:
    said[:] = [(0.0, 1.0, 1.0, "wrong"), (1.0, 0.0, 1.0, "unclosed")]
    with pytest.raises(
        SlingshotError, match=r"base solved none of 6 problems in format; train it further or take easier problems"
    ):
        sample.run(sampling(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_models_own_samples_follow_the_seed(
    sampling: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real sampling, everything accepted: the same seed writes the same bytes whatever the chunks, another seed others."""
    real = sample.roll_out

    def accepted(*arguments: Any) -> list[list[Rollout]]:
        groups = real(*arguments)
        for rollout in (rollout for group in groups for rollout in group):
            rollout.accuracy = rollout.format = rollout.language = 1.0
        return groups

    monkeypatch.setattr(sample, "roll_out", accepted)
    for name, changes in {"a": {}, "b": {"chunk": 64}, "c": {"seed": 1}}.items():
        sample.run(sampling(per_problem=6, **changes), tmp_path / name)
    a, b, c = ((tmp_path / name / "data.jsonl").read_bytes() for name in "abc")
    assert a == b != c and len(read_jsonl(tmp_path / "a" / "data.jsonl")) > 12
