"""A dry run: a few steps stand for the whole, what cannot be known is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_jsonl
from slingshot.cli.plan import deliver
from slingshot.planning.dry_run import DryRun, DryStage, dry_run, dry_run_page
from slingshot.planning.page import render
from slingshot.recipe.recipe import Recipe

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
problems = 34
samples = 2
chunk = 34
tasks = [{ name = "arithmetic", params = { min_terms = 2, max_terms = 3 } }]
sampling = { max_tokens = 32 }
"""


@pytest.mark.slow
def test_a_recipe_is_run_scaled_and_left_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    examples = [{"prompt": f"{n}?", "reasoning": "so", "answer": str(n)} for n in range(96)]
    write_jsonl(tmp_path / "examples.jsonl", examples)
    found = dry_run(Recipe.load("recipe.toml"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.jsonl", "recipe.toml"]
    base, scored, tuned, again = found.stages
    assert [base.share, scored.share] == [pytest.approx(10 / 40), pytest.approx(17 / 34)]
    assert tuned.share == pytest.approx(24 / 96 / 3) and tuned.fixed_seconds < tuned.seconds
    assert again.tokens > scored.tokens  # a base writes bare answers, too, as its documents do
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages) + found.start_seconds)
    assert base.money == pytest.approx(base.seconds) and base.peak_host_memory_bytes > 2**26
    said = capsys.readouterr().err
    assert "3 of 4: dry run of tuned (" in said and "\nevaluation of tuned 1/1" in said  # the stage's own progress
    with pytest.raises(SlingshotError, match=r"^dry run of base: the corpus fills .* rows"):
        dry_run(Recipe.load("recipe.toml", ["base.batch_size=4000"]))
    assert "the corpus fills" not in capsys.readouterr().err  # it is said once, by the error


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
