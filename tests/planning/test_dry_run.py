"""A dry run: a few steps stand for the whole, the engine decodes what the script says, what cannot be known is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_jsonl, write_jsonl
from slingshot.cli.plan import deliver
from slingshot.cost.receipt import Receipt
from slingshot.planning import dry_stage
from slingshot.planning.dry_run import DryRun, DryStage, dry_run, dry_run_page
from slingshot.planning.page import render
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

RECIPE = """
[defaults]
threads = 1
dtype = "float32"
price = 3600
[base]
stage = "pretrain"
vocab_size = 300
sequence_length = 32
batch_size = 4
steps = 40
model = { family = "dense", hidden_size = 16, intermediate_size = 32, num_hidden_layers = 1, num_attention_heads = 2 }
documents = { tasks = [{ name = "arithmetic" }], count = 200 }
[tuned]
stage = "sft"
model = "@base"
data = ["examples.jsonl"]
sequence_length = 64
batch_size = 2
epochs = 3
[evaluation]
problems = 4
tasks = [{ name = "arithmetic", params = { min_terms = 2, max_terms = 2 } }]
sampling = { max_tokens = 24 }
"""


@pytest.mark.slow
def test_a_recipe_is_run_scaled_and_left_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    examples = [{"prompt": f"{n}?", "reasoning": "so", "answer": str(n)} for n in range(96)]
    write_jsonl(tmp_path / "examples.jsonl", examples)
    found = dry_run(Recipe.load("recipe.toml"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.jsonl", "recipe.toml"]
    base, scored, tuned, again = found.stages
    assert [base.share, scored.share] == [pytest.approx(10 / 40), 1]
    assert tuned.share == pytest.approx(24 / 96 / 3) and tuned.fixed_seconds < tuned.seconds
    assert again.tokens > scored.tokens  # a base writes bare answers, too, as its documents do
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages) + found.start_seconds)
    assert base.money == pytest.approx(base.seconds) and base.peak_host_memory_bytes > 2**26
    with pytest.raises(SlingshotError, match=r"^dry run of base: the corpus fills .* rows"):
        dry_run(Recipe.load("recipe.toml", ["base.batch_size=4000"]))


def test_the_page_says_every_stage_the_sum_and_what_was_assumed() -> None:
    stage = DryStage(name="<b>", kind="rl", seconds=90, fixed_seconds=6, tokens=1e6, flops=1e12, share=0.08, money=0.5,
                     peak_host_memory_bytes=2**30)  # fmt: skip
    found = DryRun(recipe="tiny", machine="a cpu", stages=[stage], seconds=100, start_seconds=10, flops=1e12, money=0.5,
                   assumptions=["half of all responses are right"])  # fmt: skip
    page = render(dry_run_page(found))
    wanted = ("&lt;b&gt;", "1 min 30 s", "1 min 40 s", "8.0%", "1 GiB", "half of all responses are right", "a cpu")
    assert all(each in page for each in wanted) and "fits" not in page


def test_the_table_of_many_columns_is_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its columns stand in several tables, one under the other, with the stages' names in each."""
    names = [f"the_students_reinforced_score_{letter}" for letter in "abcdefghijkl"]
    stages = [
        DryStage(name=name, kind="evaluate", seconds=1e5, fixed_seconds=75, tokens=1e9, flops=1e12 * 7**at, share=0.08,
                 money=None, peak_host_memory_bytes=2**30)
        for at, name in enumerate(names)
    ]  # fmt: skip
    found = DryRun(recipe="micro", machine="a cpu", stages=stages, seconds=1e6, start_seconds=20, flops=1e20,
                   money=None, assumptions=[])  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    deliver(found, dry_run_page(found), as_json=False, html=None)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said and "money" not in said
    assert [said.count(name) for name in names] == [2] * 12
    assert all(said.count(each) == 12 for each in ("27 h 46 min", "1 min 15 s", "evaluate", "8.0%", "  1 GiB\n"))
