"""bench.py: what it counts is worked out by hand; what it measures is whole and told with the machine it was on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slingshot.cli.bench import bytes_read
from slingshot.engine.engine import Engine
from slingshot.kernels.native import native_library
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_step_reads_all_weights_but_a_plain_embedding(dense: Callable[..., ModelConfig], tied: bool) -> None:
    config = dense(vocab_size=300, tie_word_embeddings=tied)
    weights = sum(parameter.numel() for parameter in Transformer(config).parameters())
    entries = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    looked_up = 0 if tied else 300 * config.hidden_size
    assert bytes_read(config, 4, 10, 2) == 2 * (weights - looked_up) + 4 * 10 * 2 * entries


def test_a_step_of_experts_reads_those_that_a_batch_touches(deepseek: Callable[..., ModelConfig]) -> None:
    config = deepseek(vocab_size=300, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    experts = 3 * config.hidden_size * config.moe_intermediate_size * 4
    layers = config.num_hidden_layers - config.first_k_dense_replace
    one, two, many = (bytes_read(config, batch, 0, 2) for batch in (1, 2, 1000))
    assert many - one == pytest.approx(2 * experts * layers / 2) and two - one == pytest.approx(
        2 * experts * layers / 4
    )


@pytest.mark.slow
def test_bench_prints_a_table_and_where_it_was_measured(command: Command, checkpoint: Path) -> None:
    asked = ("bench", checkpoint, "--batch", "1,3", "--prompt", 5, "--new", 4, "--first", 20, "--rounds", 1)
    code, out, _ = command(*asked, "--dtype", "float32")
    assert code == 0
    heading, *rows = (line.split() for line in out.splitlines())
    assert heading[:2] == ["batch", "tokens/s"] and [row[0] for row in rows[:2]] == ["1", "3"]
    assert all(row[-1].endswith("%") and row[-2].endswith("%") for row in rows[:2])
    assert "first token after 20 tokens: " in out and f"{checkpoint} in float32 by " in out
    assert "prompts of 5 and completions of 4 tokens, medians of 1." in out
    measured = json.loads(command(*asked, "--json")[1])
    assert [row["batch"] for row in measured["rows"]] == [1, 3] and measured["machine"]["cpu"]
    config = Engine.load(checkpoint).config
    width = 2 if measured["dtype"] == "bfloat16" else 4
    assert measured["rows"][1]["bytes_read"] == bytes_read(config, 3, 7, width)
    assert all(value > 0 for row in measured["rows"] for value in row.values())


@pytest.mark.slow
def test_bench_takes_a_preset_with_random_weights(command: Command) -> None:
    code, out, _ = command("bench", "deepseek-v3-tiny-576", "--batch", 2, "--new", 2, "--first", 1, "--rounds", 1)
    assert code == 0 and "deepseek-v3-tiny-576 with random weights in " in out and " by " in out


@pytest.mark.slow
@pytest.mark.skipif(native_library() is None, reason="no native library is built here")
def test_bench_rounds_weights_when_asked(command: Command) -> None:
    asked = (
        "bench", "deepseek-v3-tiny-576", "--weights", "int4", "--batch", 1, "--new", 2, "--first", 1, "--rounds", 1,
    )  # fmt: skip
    code, out, _ = command(*asked)
    assert code == 0 and ", int4) on " in out and "rounded to nearest int4: this measures speed, not quality." in out


@pytest.mark.slow
def test_bench_keeps_a_cache_of_8_bits_when_asked(command: Command, checkpoint: Path) -> None:
    asked = ("bench", checkpoint, "--batch", 2, "--prompt", 5, "--new", 4, "--first", 20, "--rounds", 1, "--json")
    measured = json.loads(command(*asked, "--kv-cache", "int8")[1])
    assert measured["runs_on"].endswith(", int8 cache")
    assert measured["rows"][0]["bytes_read"] < json.loads(command(*asked)[1])["rows"][0]["bytes_read"]


def test_weights_of_few_bits_are_counted_so(dense: Callable[..., ModelConfig]) -> None:
    config = dense(vocab_size=300, hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    weights = bytes_read(config, 1, 0, 2) / 2
    assert bytes_read(config, 1, 0, 2, 8) == weights * (1 + 4 / 32)
    assert bytes_read(config, 1, 0, 2, 4) == weights * 0.625


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepseek-v3"], "deepseek-v3 has weights of"), (["none"], "none"),
        (["x", "--batch", "1,x"], "--batch 1,x: give whole numbers"), (["x", "--batch", "0"], "--batch 0: give whole"),
        (["x", "--weights", "int3"], "--weights int3: choose int8 or int4"),
        (["deepseek-v3-tiny-576", "--dtype", "half"], "dtype 'half' is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line(command: Command, arguments: list[str], message: str) -> None:
    code, out, err = command("bench", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


@pytest.mark.slow
@pytest.mark.parametrize("keys", [["--prompt", 5000], ["--new", 5000], ["--first", 5000]])
def test_more_tokens_than_the_model_takes_are_refused_by_their_flags(
    command: Command, checkpoint: Path, keys: list[object]
) -> None:
    for source, most in ((checkpoint, Engine.load(checkpoint).max_length), ("deepseek-v3-tiny-576", 1024)):
        code, _, err = command("bench", source, *keys)
        assert code == 2 and err.count("\n") == 1
        assert f"takes {most:,} tokens, 5," in err and "; lower --prompt, --new or --first" in err
