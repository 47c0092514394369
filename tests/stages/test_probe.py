"""The probe of reasoning: a model that reads its chain, one that does not, and the engine's own model."""

import pytest

from slingshot.base.files import read_json
from slingshot.engine.engine import Engine
from slingshot.rollout.metrics import wilson
from slingshot.rollout.sampler import EngineSampler
from slingshot.rollout.trajectory import Sampled
from slingshot.stages import evaluate
from slingshot.stages.probe import CHAINS, summarise_probe
from slingshot.tasks.task import Solution


@pytest.fixture
def evaluating(base, sums):
    common = {"model": str(base), "tasks": [sums], "dtype": "float32", "threads": 1, "sampling": {"max_tokens": 32}}
    return lambda **changes: evaluate.EvaluateConfig.parse({**common, "problems": 6, **changes}, "evaluation")


def answering(sampler, says):
    """The scripted sampler, which closes a chain that it is given and says says(chain) behind it."""
    asked, tokenizer = sampler.sample, sampler.tokenizer

    def sample(prompts, params, keys):
        if params[0].thinking_budget is None:
            yield from asked(prompts, params, keys)
            return
        for index, ids in enumerate(prompts):
            begin = len(ids) - ids[::-1].index(tokenizer.think_id)
            ends = [*tokenizer.encode(says(tokenizer.decode(ids[begin:]), keys[index])), *sorted(tokenizer.eos_ids)[:1]]
            yield index, 0, Sampled([tokenizer.end_think_id, *ends], [0.0] * (1 + len(ends)), "stop")

    sampler.sample = sample
    return sampler


def test_a_model_that_reads_its_chain_is_told_from_one_that_does_not(evaluating, saying, tmp_path):
    config = evaluating(probe=6)
    answers = {item.key: item.problem.answer for item in config.draw()[0]["arithmetic"]}
    script = lambda key, _: Solution(f"so it is {answers[key]}", answers[key])  # noqa: E731
    models = {
        "reads": lambda chain, key: (chain.split() or ["0"])[-1],
        "ignores": lambda chain, key: answers[key.rpartition("/")[0]],
    }
    found = {}
    for name, says in models.items():
        evaluate.run(config, tmp_path / name, answering(saying(script), says))
        found[name] = read_json(tmp_path / name / "evaluation.json")["tasks"]["arithmetic"]["probe"]
    assert list(found["reads"]) == list(found["ignores"]) == list(CHAINS)
    assert [each["same"] for each in found["ignores"].values()] == [1.0] * len(CHAINS)
    assert found["ignores"]["last number"]["follows"] == 0.0
    reads = found["reads"]
    assert (reads["whole"]["same"], reads["whole"]["right"], reads["empty"]["same"]) == (1.0, 1.0, 0.0)
    assert reads["corrupted"]["same"] == reads["last number"]["same"] == 0.0
    assert reads["last number"]["follows"] == reads["swapped"]["follows"] == 1.0


def test_shares_by_hand():
    rows = [{"chain": "swapped", "same": n < 1, "follows": n < 3, "right": float(n < 2)} for n in range(4)]
    assert summarise_probe(rows) == {
        "swapped": {
            "n": 4, "same": 0.25, "same_ci95": wilson(0.25, 4), "right": 0.5,
            "follows": 0.75, "follows_ci95": wilson(0.75, 4),
        }
    }  # fmt: skip


def test_the_engine_answers_at_once_behind_a_given_chain(evaluating, saying, base, tmp_path):
    """The chains are scripted, the answers the model's own; the same seed probes the same."""
    config = evaluating(probe=6)
    answers = {item.key: item.problem.answer for item in config.draw()[0]["arithmetic"]}
    found = []
    for name in ("one", "two"):
        scripted = saying(lambda key, _: Solution(f"so it is {answers[key]}", answers[key]))
        engine, asked = EngineSampler(Engine.load(base)), scripted.sample
        scripted.sample = lambda prompts, params, keys, engine=engine, asked=asked: (
            asked if params[0].thinking_budget is None else engine.sample
        )(prompts, params, keys)
        evaluate.run(config, tmp_path / name, scripted)
        found.append(read_json(tmp_path / name / "evaluation.json")["tasks"]["arithmetic"])
    assert found[0] == found[1] and {each["n"] for each in found[0]["probe"].values()} == {6}
    assert found[0]["notes"][-1].startswith("same answer with its chain whole ")
