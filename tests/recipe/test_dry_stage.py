"""One stage of a dry run: a few steps stand for the whole, the engine decodes what the script says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slingshot.base.files import read_json, read_jsonl
from slingshot.cost.receipt import Receipt
from slingshot.recipe import dry_stage
from slingshot.recipe.recipe import Recipe

ARITHMETIC = [{"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 2, "languages": ["en"]}}]
MICRO = {stage.name: stage.values for stage in Recipe.load("micro").stages}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the dry run of micro's first stage leaves."""
    out = tmp_path_factory.mktemp("dry") / "base"
    run("pretrain", MICRO["base"] | {"steps": 3}, MICRO["base"], 40.0, out)
    return out


def run(kind: str, config: dict[str, Any], whole: dict[str, Any], factor: float, out: Path) -> dict[str, Any]:
    job = {"kind": kind, "name": out.name, "config": config, "whole": whole, "factor": factor, "out": str(out),
           "styles": {"steps": 1.0}}  # fmt: skip
    return dry_stage.run(job)


def test_the_steps_and_what_comes_once_make_up_the_receipt(base: Path, tmp_path: Path) -> None:
    config = MICRO["rl"] | {"model": str(base), "steps": 3}
    found, receipt = run("rl", config, config | {"steps": 30}, 10.0, tmp_path / "rl"), Receipt.read(tmp_path / "rl")
    assert found["factor"] == 10 and found["fixed_seconds"] >= 0
    assert found["fixed_seconds"] + found["varying_seconds"] == pytest.approx(receipt.seconds)
    ends = [row["seconds"] for row in read_jsonl(tmp_path / "rl" / "metrics.jsonl")]
    step = sorted((ends[1] - ends[0], ends[2] - ends[1]))[1]
    assert found["varying_seconds"] == pytest.approx(min(3 * step, receipt.seconds))


def test_responses_are_worked_solutions_some_of_them_wrong(base: Path, tmp_path: Path) -> None:
    config = MICRO["rl"] | {"model": str(base), "steps": 3, "prompts_per_step": 16}
    run("rl", config, config, 1.0, tmp_path / "rl")
    rows = read_jsonl(tmp_path / "rl" / "metrics.jsonl")
    assert all(0.1 < row["pass_rate"] < 0.9 and row["format"] == 1 for row in rows)
    assert all(0 < row["no_signal"] < 1 and 3 < row["response_tokens"] < 32 for row in rows)


def test_rejection_sampling_keeps_all_that_it_may(base: Path, tmp_path: Path) -> None:
    config = MICRO["sample"] | {"model": str(base), "problems": 24, "tasks": ARITHMETIC, "dtype": "float32"}
    run("sample", config, config, 1.0, tmp_path / "sample")
    assert len(read_jsonl(tmp_path / "sample" / "data.jsonl")) == 24


def test_a_student_is_timed_on_what_is_written_for_it(base: Path, tmp_path: Path) -> None:
    sizes = {"steps": 2, "prompts_per_step": 8, "sequence_length": 64, "sampling": {"max_tokens": 32}}
    config = {"model": str(base), "teachers": [{"model": str(base)}], "tasks": ARITHMETIC, "dtype": "float32"} | sizes
    found = run("distill", config, config | {"steps": 20}, 10.0, tmp_path / "student")
    assert found["factor"] == 10 and found["varying_seconds"] > 0
    assert all(0 < row["response_tokens"] < 32 for row in read_jsonl(tmp_path / "student" / "metrics.jsonl"))


def test_an_evaluation_stands_for_one_of_more_problems(base: Path, tmp_path: Path) -> None:
    config = {"model": str(base), "tasks": ARITHMETIC, "problems": 4, "dtype": "float32"}
    config |= {"sampling": {"max_tokens": 32}}
    found = run("evaluate", config, config | {"problems": 12}, 1.0, tmp_path / "evaluation")
    assert found["factor"] == 3 and found["fixed_seconds"] >= 0 and found["varying_seconds"] > 0
    assert 0 < read_json(tmp_path / "evaluation" / "evaluation.json")["tasks"]["arithmetic"]["pass@1"] < 1


def test_a_few_answers_stand_for_what_a_matrix_is_fitted_to_and_compared_by(base: Path, tmp_path: Path) -> None:
    tasks = [{"name": "arithmetic", "params": {"min_terms": 3, "max_terms": 4}}]
    config = {"model": str(base), "tasks": tasks, "calibrate": 128, "problems": 96, "sampling": {"max_tokens": 48}}
    config |= {"threads": 1, "dtype": "float32", "calibrate_tokens": 10_000}
    found, receipt = run("quantize", config, config, 1.0, tmp_path / "int4"), Receipt.read(tmp_path / "int4")
    told = receipt.extra["quantization"]
    assert (told["calibration_answers"], told["tasks"]["arithmetic"]["n"]) == (32, 32)
    assert 3 <= found["factor"] <= 4 and 0 < found["varying_seconds"] < receipt.seconds
    assert found["fixed_seconds"] + found["varying_seconds"] == pytest.approx(receipt.seconds)


@pytest.mark.slow
def test_a_task_without_solutions_is_answered_at_full_length(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plus.py").write_text(PLUS)
    tasks = [{"name": str(tmp_path / "plus.py")}]
    config = MICRO["sample"] | {"model": str(base), "problems": 20, "tasks": tasks, "language": False}
    run("sample", config | {"sampling": {"max_tokens": 64}}, config, 1.0, tmp_path / "sample")
    receipt = Receipt.read(tmp_path / "sample")
    assert 40 < receipt.tokens / (20 * 4) <= 64 and receipt.extra["examples"] > 0


PLUS = """
def problems(split, seed):
    for number in range(200):
        yield {"prompt": f"{number} + 1 =", "answer": str(number + 1)}

def verify(problem, text):
    return text.strip() == problem["answer"]
"""
