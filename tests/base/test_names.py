"""base/names.py: one way out of a misspelt name, wherever it is looked up."""

from __future__ import annotations

import pytest

from slingshot.base.names import closest, did_you_mean, unknown_name

KEYS = ["steps", "optimizer", "sampling", "sequence_length", "tasks", "seed", "threads", "price", "data"]


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("stpes", KEYS, "did you mean steps?"), ("STEPS", KEYS, "did you mean steps?"),
        ("qwen3-0.6b", ["Qwen3-0.6B"], "did you mean Qwen3-0.6B?"),
        ("adam_rl", ["optimizer", "optimizer.adam_lr"], "did you mean optimizer.adam_lr?"),
        ("learning_rate", [*KEYS, "optimizer.lr", "minibatches"], "did you mean optimizer.lr?"),
        ("batch_size", ["micro_batch_size", "prompts_per_step"], "did you mean prompts_per_step?"),
        ("lora_rank", KEYS, "none of the 9 there are is near it"),
        ("seqlen_data", KEYS, "the nearest of 9 are sequence_length, seed, data"),
        ("zzz", ["lr", "steps"], "there are: lr, steps"), ("zzz", [], "there are none"),
    ],
)  # fmt: skip
def test_the_way_out_of_a_misspelt_name(name: str, known: list[str], says: str) -> None:
    assert did_you_mean(name, known) == says


def test_how_near_is_near_and_what_else_to_say_is_the_callers() -> None:
    assert did_you_mean("lora_rank", KEYS, otherwise="write it so") == "write it so"
    assert closest("bf16", ["bfloat16"], cutoff=0.4) == "bfloat16"
    assert closest("bf16", ["float32"]) is None


def test_an_unknown_name_is_refused_in_one_line() -> None:
    assert str(unknown_name("task", "arithmetics", ["arithmetic"])) == (
        "task 'arithmetics' is unknown; did you mean arithmetic?"
    )
