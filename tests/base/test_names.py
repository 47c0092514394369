"""base/names.py: one way out of a misspelt name, wherever it is looked up."""

from __future__ import annotations

import pytest

from slingshot.base.names import closest, did_you_mean, unknown_name

KEYS = ["steps", "optimizer", "sampling", "sequence_length", "tasks", "seed", "threads", "price", "data"]


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("stpes", KEYS, "did you mean steps?"),
        ("STEPS", KEYS, "did you mean steps?"),
        ("qwen3-0.6b", ["Qwen3-0.6B"], "did you mean Qwen3-0.6B?"),
        ("zzz", ["lr", "steps"], "there are: lr, steps"),
        ("zzz", [], "there are none"),
    ],
)
def test_the_way_out_of_a_misspelt_name(name: str, known: list[str], says: str) -> None:
    assert did_you_mean(name, known) == says


def test_of_many_names_that_are_all_far_the_nearest_three_are_told() -> None:
    hint = did_you_mean("lora_rank", KEYS)
    assert hint.startswith("the nearest of 9 are ") and hint.count(",") == 2
    assert set(hint.removeprefix("the nearest of 9 are ").split(", ")) < set(KEYS)
    assert did_you_mean("lora_rank", KEYS, otherwise="write it so") == "write it so"


def test_how_near_is_near_can_be_said() -> None:
    assert closest("bf16", ["bfloat16"], cutoff=0.4) == "bfloat16"
    assert closest("bf16", ["float32"]) is None


def test_an_unknown_name_is_refused_in_one_line() -> None:
    assert str(unknown_name("task", "arithmetics", ["arithmetic"])) == (
        "task 'arithmetics' is unknown; did you mean arithmetic?"
    )
