"""Configs are composed of tables, and a key outside its own is refused with its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import model_validator

from slingshot.base.config import StageConfig, Strict
from slingshot.base.errors import SlingshotError
from slingshot.recipe.recipe import Recipe
from slingshot.stages.kinds import STAGES

NAN = math.nan
SMALLEST: dict[str, dict[str, Any]] = {
    "tokenize": {"text": ["stdlib"]},
    "pretrain": {"model": "deepseek-v3", "text": ["stdlib"]},
    "sft": {"model": "m", "data": ["d"]},
    "rl": {"model": "m", "tasks": [{"name": "arithmetic"}]},
    "sample": {"model": "m", "tasks": [{"name": "arithmetic"}]},
    "evaluate": {"model": "m", "tasks": [{"name": "arithmetic"}]},
    "convert": {"source": "s"},
}


def parse(kind: str, **changes: Any) -> Any:
    return STAGES[kind].config.parse(SMALLEST[kind] | changes, kind)


def test_every_stage_has_a_config_of_its_own_name() -> None:
    names = [stage.config.__name__ for stage in STAGES.values()]
    kinds = ("Tokenize", "Pretrain", "SFT", "RL", "Distill", "Sample", "Evaluate", "Convert", "Quantize")
    assert sorted(names) == sorted(f"{kind}Config" for kind in kinds)


def test_a_table_in_part_keeps_the_other_defaults_of_its_stage() -> None:
    config = parse("rl", optimizer={"lr": 3e-5}, sampling={"max_tokens": 7})
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.warmup) == ("adamw", 3e-5, 0.0)
    sampling = {"max_tokens": 128, "temperature": 0.6, "top_p": 0.95, "top_k": 5}
    assert parse("evaluate", sampling={"top_k": 5}).sampling.model_dump() == sampling
    assert (parse("sft").optimizer.name, parse("sft").optimizer.lr) == ("muon", 3e-3)


@pytest.mark.parametrize(
    ("kind", "key", "place"),
    [
        ("pretrain", "lr", "optimizer.lr"), ("pretrain", "losses", "loss"), ("sft", "betas", "optimizer.betas"),
        ("rl", "warmup", "optimizer.warmup"), ("rl", "kl", "loss.kl"), ("rl", "max_tokens", "sampling.max_tokens"),
        ("sample", "temperature", "sampling.temperature"),
    ],
)  # fmt: skip
def test_a_key_outside_its_table_is_refused_with_its_place(kind: str, key: str, place: str) -> None:
    with pytest.raises(SlingshotError, match=rf"^{kind}\.{key}: unknown key; did you mean {place}\?$"):
        parse(kind, **{key: 1})


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("rl", {"price": NAN}, "price"), ("rl", {"price": "inf"}, "price"),
        ("rl", {"optimizer": {"lr": math.inf}}, "optimizer.lr"),
        ("rl", {"optimizer": {"betas": [0.9, NAN]}}, "optimizer.betas.1"),
        ("rl", {"rewards": {"accuracy": -math.inf}}, "rewards.accuracy"),
        ("rl", {"max_flops": math.inf}, "max_flops"),
        ("rl", {"tasks": [{"name": "arithmetic", "weight": math.inf}]}, "tasks.0.weight"),
        ("rl", {"tasks": [{"name": "arithmetic", "params": {"max_terms": NAN}}]}, "tasks.0.params.max_terms"),
        ("pretrain", {"model": {"preset": "deepseek-v3", "initializer_range": NAN}}, "model.initializer_range"),
        ("sample", {"seed": 2**63}, "seed"), ("evaluate", {"seed": -(2**63)}, "seed"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused_by_their_key(kind: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(SlingshotError, match=rf"^{kind}\.{key}: [^\n]+$"):
        parse(kind, **changes)


def test_a_place_is_named_once() -> None:
    """What a config opens says itself where the error is."""

    class Opening(Strict):
        path: str

        @model_validator(mode="after")
        def _open(self) -> Self:
            raise SlingshotError(f"{self.path}: no such file")

    with pytest.raises(SlingshotError, match=r"^capitals\.py: no such file$"):
        Opening.parse({"path": "capitals.py"}, "capitals.py")
    with pytest.raises(SlingshotError, match=r"^rl\.capitals\.py: no such file$"):
        Opening.parse({"path": "capitals.py"}, "rl")


def test_the_largest_seed_is_taken() -> None:
    assert StageConfig.parse({"seed": 2**63 - 1}).seed == 2**63 - 1


def test_an_override_reaches_a_table_of_a_recipe(tmp_path: Path) -> None:
    values = {stage.name: stage.values for stage in Recipe.load("tiny", ["zero.optimizer.lr=1e-4"]).stages}
    assert values["zero"]["optimizer"] == {"lr": 1e-4} and values["sft"]["optimizer"] == {"name": "adamw", "lr": 1e-3}
