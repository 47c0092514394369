"""Contamination: problems found whole or in part in rows, tables and texts, and the scores without them."""

import json

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json
from slingshot.stages import evaluate
from slingshot.stages.contamination import contaminated
from slingshot.tasks.task import Solution

FORM = "please work out the following sum and give the number alone as the answer:"
PROMPTS = [f"{FORM} 1 + 2", f"{FORM} 3 - 4", "How many legs?", " ".join(f"word{n}" for n in range(20))]


@pytest.mark.parametrize(("text", "whole", "part"), [
    (f"x {FORM} 1 + 2 y", {0}, {0}),  # the form's own 13 words do not touch the other problem
    (f"{FORM} 5 + 6", set(), set()),
    ("3 + 4", set(), set()),
    ("how MANY\nlegs ? two", {2}, {2}),
    ("how many arms?", set(), set()),
    (" ".join(f"word{n}" for n in range(3, 16)), set(), {3}),
    (" ".join(f"word{n}" for n in range(3, 15)), set(), set()),
])  # fmt: skip
def test_found_whole_and_in_part(text, whole, part, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"n": [1], "turns": [[{"said": text}]]})
    (tmp_path / "data").mkdir()
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "data" / "b.jsonl").write_text(json.dumps({"messages": [{"content": text}], "n": 1}) + "\n\n")
    parquet.write_table(table, tmp_path / "c.parquet")
    for name in ("a.txt", "data", "c.parquet"):
        assert contaminated(PROMPTS, [str(tmp_path / name)]) == {"whole": whole, "13-gram": part}


@pytest.mark.slow
def test_an_evaluation_tells_scores_with_and_without_what_was_seen(base, sums, saying, tmp_path):
    """2 of 4 problems stand in the data; the model is right on these alone."""
    file, values = tmp_path / "seen.jsonl", {"model": str(base), "tasks": [sums], "problems": 4, "threads": 1}
    config = evaluate.EvaluateConfig.parse({**values, "dtype": "float32", "contamination": [str(file)]}, "evaluation")
    problems = [item.problem for item in config.draw()[0]["arithmetic"]]
    file.write_text("".join(json.dumps({"prompt": each.prompt}) + "\n" for each in problems[:2]))
    answers = {each.key: each.answer if each in problems[:2] else "no" for each in problems}
    evaluate.run(config, tmp_path / "out", saying(lambda key, _: Solution("so", answers[key])))
    found = read_json(tmp_path / "out" / "evaluation.json")["tasks"]["arithmetic"]
    whole = found["contamination"]["whole"]
    assert (whole["problems"], whole["share"], whole["pass@1"], whole["pass@1_without"]) == (2, 0.5, 1.0, 0.0)
    assert found["notes"] == ["2 of 4 problems stand in the data named, pass@1 without them 0%"]


def test_data_that_cannot_be_read_is_said_before_anything_is_sampled(base, sums, saying, tmp_path):
    (tmp_path / "empty").mkdir()
    values = {"model": str(base), "tasks": [sums], "threads": 1, "contamination": [str(tmp_path / "empty")]}
    asked = list[str]()
    sampler = saying(lambda key, _: asked.append(key) or Solution("so", "1"))
    with pytest.raises(SlingshotError, match="holds no file of data"):
        evaluate.run(evaluate.EvaluateConfig.parse(values), tmp_path / "out", sampler)
    assert not asked


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SlingshotError, match=r"cannot read .*no.jsonl"):
        contaminated(PROMPTS, [str(tmp_path / "no.jsonl")])
    with pytest.raises(SlingshotError, match="holds no file of data"):
        contaminated(PROMPTS, [str(tmp_path)])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SlingshotError, match=r"bad.parquet is not a readable Parquet file: Parquet magic bytes"):
        contaminated(PROMPTS, [str(tmp_path)])
