"""Tools from end to end on a model of a few thousand parameters: documents with calls, reinforcement, evaluation."""

from dataclasses import replace

import pytest

from slingshot.base.files import read_json, read_jsonl
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.recipe.recipe import Recipe
from slingshot.recipe.tables import resolve
from slingshot.rollout.sampler import ScriptedSampler
from slingshot.stages import evaluate, pretrain, rl, sample, sft
from slingshot.stages.kinds import STAGES
from slingshot.tasks.task import Call, Solution
from slingshot.text.tool_formats import tool_format


@pytest.fixture(scope="module")
def with_tool(sums):
    return sums | {"tools": ["calculator"], "max_turns": 3}


@pytest.fixture(scope="module")
def calling(pretraining, with_tool, tmp_path_factory):
    """A base that has read calls and answers."""
    out = tmp_path_factory.mktemp("calling") / "base"
    documents = {"tasks": [with_tool], "count": 300, "styles": {"answer": 1.0, "calls": 1.0}, "template_share": 0.6}
    changes = {"steps": 12, "vocab_size": 400, "sequence_length": 128, "documents": documents}
    pretrain.run(pretraining(**changes), out)
    return out


@pytest.mark.slow
def test_a_base_that_read_calls_is_reinforced_with_a_price_of_them_and_evaluated(
    calling, training, with_tool, metrics, tmp_path
):
    assert tool_format(load_tokenizer(calling)).name == "deepseek"
    config = {"model": str(calling), "tasks": [with_tool], "sequence_length": 256}
    rl.run(training(**config, rewards={"calls": -0.1}, sampling={"max_tokens": 30}), tmp_path / "rl")
    assert all(row["calls"] >= 0 for row in metrics(tmp_path / "rl"))
    evaluated = evaluate.EvaluateConfig.parse(
        {"model": str(tmp_path / "rl"), "tasks": [with_tool], "problems": 8, "sampling": {"max_tokens": 30}}, "evaluate"
    )
    evaluate.run(evaluated, tmp_path / "evaluation")
    found = read_json(tmp_path / "evaluation" / "evaluation.json")["tasks"]["arithmetic"]
    assert found["n"] == 8 and found["calls"] >= 0


@pytest.mark.slow
def test_calls_are_counted_where_a_script_says_them(calling, training, with_tool, metrics, tmp_path):
    """Half of each group calls first, which is paid for; both are right."""
    tokenizer, shape = (
        load_tokenizer(calling),
        load_model(calling).config.model_copy(update={"max_position_embeddings": 512}),
    )

    def script(key, index):
        if "/" not in key.rpartition("+")[2] and index % 2:
            return Solution("", "", (Call("calculator", '{"expression": "1+1"}'),))
        return Solution("", "2")

    sampler = ScriptedSampler(script, tokenizer, shape)
    config = training(
        model=str(calling), tasks=[with_tool], rewards={"calls": -0.1}, sampling={"max_tokens": 60}, steps=1
    )
    rl.run(config, tmp_path / "rl", sampler)
    (row,) = metrics(tmp_path / "rl")
    assert row["calls"] == 0.5 and row["no_signal"] == 0.0 and row["reward"] == pytest.approx(0.15, abs=0.5)


@pytest.mark.slow
def test_the_recipe_calculator_in_small_tells_of_its_tool_but_to_the_control_without(tmp_path, metrics):
    """Every kind of its stages, with a step or two and few problems."""
    small = ["defaults.threads=1", "base.steps=2", "base.batch_size=2", "base.documents.count=60"]
    for name in "priced", "without":
        small += [f"{name}.steps=1", f"{name}.prompts_per_step=2", f"{name}.group_size=2"]
    stages = {stage.name: stage for stage in Recipe.load("calculator", [*small, "evaluation.problems=2"]).stages}

    def run(name):
        kind, out = STAGES[stages[name].kind], tmp_path / name
        values = resolve(stages[name].values, lambda parent: str(tmp_path / parent), lambda _: 0.0)
        kind.run(kind.config.parse(values, name), out)
        return out

    assert tool_format(load_tokenizer(run("base"))).name == "deepseek"
    for name, told in ("priced", True), ("without", False):
        assert all(("calls" in row) == told for row in metrics(run(name)))
        tasks = read_json(run(f"{name}.evaluation") / "evaluation.json")["tasks"]
        assert list(tasks) == ["arithmetic", "multiplication"]
        assert all(("calls" in score) == told for score in tasks.values())


CALLED = Solution("", "", (Call("calculator", '{"expression": "1+1"}'),))


@pytest.mark.slow
def test_trajectories_that_are_right_are_kept_whole_and_learnt_without_what_the_tool_said(calling, with_tool, tmp_path):
    tokenizer = load_tokenizer(calling)
    shape = load_model(calling).config.model_copy(update={"max_position_embeddings": 512})
    common = {"model": str(calling), "dtype": "float32", "threads": 1}
    config = sample.SampleConfig.parse(
        {**common, "tasks": [with_tool], "problems": 4, "samples": 3, "per_problem": 2}, "sample"
    )
    answers = {item.key: item.problem.answer for item in config.draw()}

    def script(key, index):
        """The first sample calls and is right, the second is right at once, the third calls and is wrong."""
        asked, _, number = key.rpartition("/")
        if asked in answers:  # a second turn
            return Solution("I was told 2", answers[asked] if number == "0" else "none")
        return Solution("at once", answers[key]) if index == 1 else CALLED

    sample.run(config, tmp_path / "samples", ScriptedSampler(script, tokenizer, shape))
    rows = read_jsonl(tmp_path / "samples" / "data.jsonl")
    assert [len(row["messages"]) for row in rows] == [4, 2] * 4 and {row["key"] for row in rows}
    called = rows[0]
    assert [message["role"] for message in called["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert called["messages"][2]["content"] == "2" and called["messages"][3]["reasoning_content"] == "I was told 2"
    assert called["tools"][0]["function"]["name"] == "calculator" and sum(called["mask"]) < len(called["ids"])
    learnt = tokenizer.decode(id for id, each in zip(called["ids"], called["mask"], strict=True) if each)
    assert "1+1" in learnt and "I was told 2" in learnt and "output" not in learnt

    tuning = sft.SFTConfig.parse({**common, "data": [str(tmp_path / "samples")], "sequence_length": 256}, "sft")
    as_sampled = sft.encode(sft.read(tuning), tokenizer, tuning)
    assert as_sampled == [(row["ids"], row["mask"]) for row in rows]
    by_words = [replace(each, tokenizer="another") for each in sft.read(tuning)]
    assert sft.encode(by_words, tokenizer, tuning) == as_sampled
    sft.run(tuning, tmp_path / "tuned")
    assert load_tokenizer(tmp_path / "tuned").digest == tokenizer.digest
