"""Recipes: how they are read, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.recipe.recipe import Recipe
from slingshot.recipe.tables import apply_override, parse_override

Refusal = Callable[[Callable[[], object]], str]
Load = Callable[..., Recipe]

TEXT = Path(__file__).with_name("three.toml").read_text()

pytestmark = pytest.mark.usefixtures("built")


def test_stages_come_in_order_with_defaults_and_evaluations(load: Load) -> None:
    loaded = load()
    assert loaded.name == "three"
    assert [stage.name for stage in loaded.stages] == ["base", "base.evaluation", "picks", "tuned", "tuned.evaluation"]
    assert [stage.kind for stage in loaded.stages] == ["pretrain", "evaluate", "sample", "sft", "evaluate"]
    values = {stage.name: stage.values for stage in loaded.stages}
    assert values["base"] == {"lr": 0.5, "shape": {"width": 4}}
    assert values["tuned"]["lr"] == 0.25
    assert values["tuned.evaluation"] == {"lr": 0.5, "text": "test", "model": "@tuned"}
    assert {stage.name: stage.folder for stage in loaded.stages}["tuned.evaluation"] == "evaluations/tuned"
    assert loaded.stages[3].parents == ["picks", "base"]


def test_a_stage_changes_or_leaves_out_its_evaluation(load: Load) -> None:
    text = TEXT.replace("shape.width = 4", 'evaluation = { text = "own" }').replace("lr = 0.25", "evaluation = false")
    loaded = load(text)
    assert [stage.name for stage in loaded.stages] == ["base", "base.evaluation", "picks", "tuned"]
    assert loaded.stages[1].values["text"] == "own"


def test_overrides_and_seed(load: Load) -> None:
    loaded = load(TEXT, "base.shape.width=16", "tuned.lr=1e-4", "defaults.lr=2", "evaluation.text=harder", seed=7)
    values = {stage.name: stage.values for stage in loaded.stages}
    assert values["base"] == {"lr": 2, "shape": {"width": 16}, "seed": 7}
    assert values["tuned"]["lr"] == 1e-4
    assert values["base.evaluation"]["text"] == "harder"
    assert all(stage.values["seed"] == 7 for stage in loaded.stages)


def test_tables_are_merged_key_by_key(load: Load) -> None:
    """Of [defaults], of [evaluation] and of a stage: what is set nearer stands, the rest of the table stays."""
    text = TEXT.replace("lr = 0.5", "lr = 0.5\nshape = { width = 1, height = 2 }")
    text = text.replace('text = "test"', "shape = { height = 5 }").replace("lr = 0.25", "evaluation.shape.width = 6")
    values = {stage.name: stage.values for stage in load(text, "picks.shape.height=3").stages}
    assert values["base"]["shape"] == {"width": 4, "height": 2}
    assert values["picks"]["shape"] == {"width": 1, "height": 3}
    assert values["base.evaluation"]["shape"] == {"width": 1, "height": 5}
    assert values["tuned.evaluation"]["shape"] == {"width": 6, "height": 5}


def test_until_includes_the_stage_and_its_evaluation(load: Load, refusal: Refusal) -> None:
    loaded = load()
    assert [stage.name for stage in loaded.until("base")] == ["base", "base.evaluation"]
    assert [stage.name for stage in loaded.until("picks")] == ["base", "base.evaluation", "picks"]
    assert loaded.until(None) == loaded.stages
    assert "did you mean tuned?" in refusal(lambda: loaded.until("tune"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lr = 0.25", "lrr = 0.25"), "tuned.lrr: unknown key; did you mean lr?"),
        (("width = 4", "widht = 4"), "base.shape.widht: unknown key"), (("= 4", '= "broad"'), "base.shape.width"),
        (('text = "test"', "txt = 1"), "base.evaluation.txt: unknown key; did you mean text?"),
        (("lr = 0.5", "leaning_rate = 0.5"), "defaults.leaning_rate: no stage"),
        (('"@picks"', '"@pick"'), "tuned: no earlier stage 'pick' to refer to; did you mean picks?"),
        (("shape.width = 4", 'model = "@tuned"'), "base: no earlier stage 'tuned' to refer to; [tuned] comes later"),
        (('flops_of = "base"', 'flops_of = "bas"'), "tuned: no earlier stage 'bas' to refer to; did you mean base?"),
        (('flops_of = "base"', "flops_of = 3"), "tuned.flops: a number from a receipt is written"),
        (("times = 3", "time = 3"), "tuned.flops: a number from a receipt is written"),
        (('stage = "sft"', 'stage = "stf"'), "[tuned] stage = 'stf' is no kind of stage; did you mean sft?"),
        (("[picks]", "[evaluations]"), "[evaluations] cannot name"), (('stage = "sft"', ""), "[tuned] has no stage"),
        (("[picks]", '["../picks"]'), "[../picks] cannot name a stage"), (("[base]", "[base"), "not valid TOML"),
        (("lr = 0.25", "evaluation = 3"), "tuned.evaluation: must be a table"),
        (("[defaults]", "lr = 3\n[defaults]"), "lr stands outside a"), ((TEXT, "[evaluation]\n"), "has no stages"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(load: Load, change: tuple[str, str], message: str, refusal: Refusal) -> None:
    assert change[0] in TEXT
    assert message in refusal(lambda: load(TEXT.replace(*change)))


def test_recipes_that_are_not_there(tmp_path: Path, refusal: Refusal) -> None:
    assert "did you mean micro?" in refusal(lambda: Recipe.load("mirco"))
    assert str(tmp_path / "none.toml") in refusal(lambda: Recipe.load(str(tmp_path / "none.toml")))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(lambda: Recipe.load(str(tmp_path / "binary.toml")))


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("rl.lr=1e-4", ["rl", "lr"], 1e-4), ("steps=3", ["steps"], 3), ("keep=true", ["keep"], True),
        ("rl.task=arithmetic", ["rl", "task"], "arithmetic"), ("rl.task='a b'", ["rl", "task"], "a b"),
        ("rl.model=@base", ["rl", "model"], "@base"), ("a.b.c=[1, 2]", ["a", "b", "c"], [1, 2]),
        ("formula=a=b", ["formula"], "a=b"), ("text=1\nother = 2", ["text"], "1\nother = 2"), ("text=", ["text"], ""),
    ],
)  # fmt: skip
def test_override_values_are_toml_or_text(text: str, path: list[str], value: object) -> None:
    assert parse_override(text) == (path, value)


@given(st.text(max_size=20))
def test_any_value_of_an_override_is_read(value: str) -> None:
    path, read = parse_override(f"key={value}")
    assert path == ["key"]
    assert read == value or not isinstance(read, str) or value.strip()[:1] in "'\""


def test_overrides_that_fit_nowhere(load: Load, refusal: Refusal) -> None:
    assert "key=value" in refusal(lambda: parse_override("lr"))
    assert "key=value" in refusal(lambda: parse_override("rl..lr=3"))
    assert "STAGE.KEY=VALUE" in refusal(lambda: load(TEXT, "lr=3"))
    assert "did you mean tuned?" in refusal(lambda: load(TEXT, "tunde.lr=3"))
    assert "lr is no table" in refusal(lambda: apply_override({"lr": 3}, "lr.x=1"))
