"""Tools from end to end on a model of a few thousand parameters: documents with calls, reinforcement, evaluation."""

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.rollout.sampler import ScriptedSampler
from slingshot.stages import evaluate, pretrain, rl, sample
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


def test_a_dataset_of_single_turns_refuses_tools(base, with_tool, tmp_path):
    config = sample.SampleConfig.parse({"model": str(base), "tasks": [with_tool], "problems": 2}, "sample")
    with pytest.raises(SlingshotError, match="takes several turns"):
        sample.run(config, tmp_path / "out")
