"""Rejection sampling: only what the verifier accepts, each reasoning once."""

import math

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_jsonl
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint
from slingshot.cost.receipt import Receipt
from slingshot.stages import sample
from slingshot.tasks.task import Solution


@pytest.fixture
def sampling(base, sums):
    common = {"model": str(base), "tasks": [sums], "dtype": "float32", "threads": 1, "sampling": {"max_tokens": 32}}
    return lambda **changes: sample.SampleConfig.parse(
        {**common, "problems": 6, "samples": 6, "chunk": 4, **changes}, "sample"
    )


def answering(config, *said):
    """Sample i of every problem: a reasoning and whether it ends in the right answer, or a text without any format."""
    answers = {item.key: item.problem.answer for item in config.draw()}

    def script(key, index):
        words = said[index % len(said)]
        return words if isinstance(words, str) else Solution(words[0], answers[key] if words[1] else "none")

    return script


SAID = [("because", True), ("wrong", False), "unclosed", ("だから", True), ("because", True), ("also so", True)]


def test_accepted_samples_are_kept_once(sampling, saying, tmp_path):
    config = sampling(per_problem=3)
    sampler = saying(answering(config, *SAID))
    sample.run(config, tmp_path / "out", sampler)
    rows, receipt = read_jsonl(tmp_path / "out" / "data.jsonl"), Receipt.read(tmp_path / "out")
    assert [row["reasoning"] for row in rows] == ["because", "also so"] * 6
    answers = {item.problem.key: item.problem.answer for item in config.draw()}
    assert {row["key"]: row["answer"] for row in rows} == answers and len(answers) == 6
    assert {row["task"] for row in rows} == {"arithmetic"} and receipt.extra["examples"] == 12
    assert receipt.tokens > 6 * 6 * 5 and set(receipt.flops_by_part) == {"sampling"}
    logged = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [(row["step"], row["kept"]) for row in logged] == [(1, 8), (2, 12)]
    assert logged[0]["pass_rate"] == pytest.approx(4 / 6)


NINE = {"per_problem": 9, "language": False}


@pytest.mark.parametrize(("changes", "kept"), [({}, ["because"]), (NINE, ["because", "だから", "also so"])])
def test_how_many_and_which_languages_are_kept(sampling, saying, tmp_path, changes, kept):
    config = sampling(**changes)
    sample.run(config, tmp_path / "out", saying(answering(config, *SAID)))
    assert [row["reasoning"] for row in read_jsonl(tmp_path / "out" / "data.jsonl")] == kept * 6


def test_a_model_that_solves_nothing_makes_no_dataset(sampling, saying, tmp_path):
    config = sampling()
    with pytest.raises(SlingshotError, match="base solved none of 6 problems in format; train it further"):
        sample.run(config, tmp_path / "out", saying(answering(config, ("wrong", False), "unclosed")))
    assert not (tmp_path / "out").exists()


def test_chunks_only_say_where_sampling_may_stop(sampling, saying, tmp_path):
    for name, changes in {"a": {}, "b": {"chunk": 64}, "c": {"seed": 1}}.items():
        config = sampling(problems=20, **changes)
        sample.run(config, tmp_path / name, saying(answering(config, ("because", True))))
    a, b, c = ((tmp_path / name / "data.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_bad_problems_are_counted_and_end_nothing(sampling, saying, troubled, tmp_path):
    config = sampling(tasks=[troubled], problems=40, samples=1)
    sample.run(config, tmp_path / "out", saying(answering(config, ("so", True))))
    logged = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    counts = [sum(row.get(name, 0) for row in logged) for name in ("skipped", "unverified")]
    assert counts[0] <= 1 and 1 <= counts[1] <= 3, "a tenth of the problems is held out for tests"
    assert len(read_jsonl(tmp_path / "out" / "data.jsonl")) == len(config.draw()) - sum(counts)


DIVERGED = {math.nan: "lm_head.weight holds NaN or infinite", 3e38: "not finite: its weights have diverged; go back to"}


@pytest.mark.parametrize(("weight", "message"), DIVERGED.items())
def test_a_diverged_model_ends_in_one_line(sampling, base, tmp_path, weight, message):
    model = load_model(base)
    model.lm_head.weight.data.fill_(weight)
    (tmp_path / "model").mkdir()
    save_checkpoint(tmp_path / "model", model, load_tokenizer(base))
    with pytest.raises(SlingshotError, match=message):
        sample.run(sampling(model=str(tmp_path / "model")), tmp_path / "out")
