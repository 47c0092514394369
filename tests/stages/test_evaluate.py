"""Evaluation: the statistics by hand, the choice of a prompt form, and a run on held-out problems."""

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json
from slingshot.cost.receipt import Receipt
from slingshot.recipe.results import headline
from slingshot.rollout.metrics import interval, maj_at_k, pass_at_k, wilson
from slingshot.stages import evaluate
from slingshot.stages.evaluate import summarise
from slingshot.tasks.task import Problem, Solution, split_of


@pytest.fixture
def evaluating(base, sums):
    common = {"model": str(base), "tasks": [sums], "dtype": "float32", "threads": 1, "sampling": {"max_tokens": 32}}
    sizes = {"problems": 4, "samples": 2, "chunk": 3}
    return lambda **changes: evaluate.EvaluateConfig.parse({**common, **sizes, **changes}, "evaluation")


def test_pass_at_k_by_hand():
    """1 - C(n - c, k) / C(n, k)."""
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)
    assert pass_at_k(8, 0, 8) == 0.0 and pass_at_k(8, 1, 8) == 1.0
    assert [pass_at_k(10, 3, 1), pass_at_k(16, 2, 8)] == pytest.approx([0.3, 1 - 3003 / 12870])


def test_the_majority_of_read_answers_by_hand():
    """Groups of k one after the other; what was not read has no vote, and of a tie the first answer counts."""
    answers, accuracy = ["7", "9", "9", None, None, None, "7", "8"], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert maj_at_k(answers, accuracy, 2) == (1 + 0 + 0 + 1) / 4
    assert maj_at_k(answers, accuracy, 4) == (0 + 1) / 2
    assert maj_at_k(answers, accuracy, 8) == maj_at_k(answers[:7], accuracy, 7) == 1.0
    assert maj_at_k([None, None], [0.0, 0.0], 2) == 0.0


def test_the_bootstrap_is_of_the_mean_over_problems():
    """100 problems, half solved: 0.5 +- 1.96 sqrt(0.25 / 100)."""
    low, high = interval([1.0, 0.0] * 50, samples=4, seed=0)
    assert low == pytest.approx(0.5 - 0.098, abs=0.012) and high == pytest.approx(0.5 + 0.098, abs=0.012)
    assert interval([1.0, 0.0] * 50, samples=4, seed=0) == [low, high]


def test_one_sample_of_each_problem_has_wilsons_interval():
    """Newcombe's table (Statistics in Medicine 17, 1998): 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    table = (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)
    for right, n, low, high in table:
        scores = [1.0] * right + [0.0] * (n - right)
        assert interval(scores, samples=1, seed=0) == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("score", [0.0, 1.0, 0.5])
def test_no_interval_has_a_width_of_zero(samples, score):
    low, high = interval([score] * 5, samples, seed=0)
    assert [low, high] == wilson(score, 5) and low <= score <= high and high - low > 0.4


def result(form, accuracy, tokens, task="sums", **more):
    rest = [0.0] * (len(accuracy) - 1)
    scores = {"accuracy": accuracy, "tokens": tokens, "format": [1.0, *rest], "language": [1.0] + [0.5] * len(rest)}
    return {"task": task, "form": form, **scores, "example": {"correct": accuracy[0] == 1.0}, **more}


def test_a_summary_by_hand(evaluating):
    """Two problems, two samples: pass@1 is the mean over all, shares are of all samples, the better form counts."""
    forms = [{"name": "chat"}, {"name": "plain", "chat": False}]
    results = [result("chat", [1.0, 0.0], [3, 5]), result("chat", [0.0, 0.0], [10, 2])]
    results += [result("plain", [1.0, 1.0], [1, 1]), result("plain", [0.0, 1.0], [2, 4])]
    summary = summarise(results, evaluating(forms=forms))
    found = summary["tasks"]["sums"]
    assert found.pop("ci95") == interval([1.0, 0.5], samples=2, seed=0)
    assert found.pop("at_k") == {"pass@2": {"mean": 1.0, "ci95": wilson(1.0, 2)}}
    assert found == {
        "pass@1": 0.75, "pass@8": None, "mean_tokens": 2.0, "format": 0.5, "language": 0.5, "n": 2,
        "samples_per_problem": 2, "right": 3, "right_leniently": 3, "split": "test", "given": None, "left_out": {},
        "cut_off": 0, "max_tokens": 32, "notes": [], "by_level": {}, "prompt_form": "plain",
        "pass@1_by_form": {"chat": 0.25, "plain": 0.75},
    }  # fmt: skip
    assert summary["examples"]["sums"] == [{"correct": True}, {"correct": False}]
    assert summary["scores"] == {"sums": [1.0, 0.5]}
    chat = summarise(results[:2], evaluating(forms=[{"name": "no room"}, *forms]))["tasks"]["sums"]
    assert (chat["pass@1"], chat["mean_tokens"], chat["pass@1_by_form"]) == (0.25, 5.0, {"chat": 0.25})
    results = [result("chat", [1.0] + [0.0] * 7, [1] * 8), result("chat", [0.0] * 8, [1] * 8)]
    assert summarise(results, evaluating(samples=8))["tasks"]["sums"]["pass@8"] == 0.5


def test_answers_that_the_limit_cut_off_are_told_where_they_are_many(evaluating):
    for cut, said in ([3, 0], []), ([4, 1], ["5 of 40 cut off at sampling.max_tokens=32"]):
        results = [result("chat", [1.0] * 20, [1] * 20, cut_off=[True] * n + [False] * (20 - n)) for n in cut]
        assert summarise(results, evaluating(samples=20))["tasks"]["sums"]["notes"] == said


def test_scores_by_level_and_of_majorities(evaluating):
    """Level 10 comes behind 9. Of the second problem's samples two wrong answers are alike."""
    assert [evaluate.level(Problem("", "", data={"numbers": given})) for given in ([3, 4], 5)] == ["2", None]
    results = [result("chat", [1.0] * 4, [1] * 4, level="9", answers=["1"] * 4)]
    results += [result("chat", [1.0, 0.0, 0.0, 0.0], [1, 2, 3, 4], level="10", answers=["1", "2", "2", None])]
    found = summarise(results, evaluating(samples=4))["tasks"]["sums"]
    assert list(found["by_level"]) == ["9", "10"] and found["notes"] == ["by level 9: 100%, 10: 25%"]
    assert found["by_level"]["10"] == {"pass@1": 0.25, "ci95": wilson(0.25, 1), "n": 1, "mean_tokens": 2.5}
    means = {name: each["mean"] for name, each in found["at_k"].items()}
    assert means == {"pass@2": 0.75, "maj@2": 0.75, "pass@4": 1.0, "maj@4": 0.5}
    assert found["at_k"]["maj@4"]["ci95"] == interval([1.0, 0.0], samples=4, seed=0)


def test_calls_of_tools_are_told_by_task_and_by_level(evaluating):
    results = [result("chat", [1.0, 1.0], [1] * 2, level="2", calls=[0, 0])]
    results += [result("chat", [1.0, 0.0], [1] * 2, level="3", calls=[1, 0])]
    found = summarise(results, evaluating())["tasks"]["sums"]
    assert found["calls"] == 0.25 and [each["calls"] for each in found["by_level"].values()] == [0.0, 0.5]
    said = "by level 2: 100% with 0.00 calls, 3: 50% with 0.50 calls"
    assert found["notes"] == ["0.25 calls of tools a problem", said]


def test_tasks_are_reported_apart_and_examples_are_limited(evaluating):
    results = [result("chat", [1.0, 1.0], [1, 1]), result("chat", [0.0, 0.0], [1, 1], task="other")]
    summary = summarise(results + [result("chat", [1.0, 0.0], [1, 1])] * 5, evaluating(examples=3))
    assert (summary["tasks"]["sums"]["n"], summary["tasks"]["other"]["pass@1"]) == (6, 0.0)
    assert [len(examples) for examples in summary["examples"].values()] == [3, 1]


def test_a_run_asks_held_out_problems_in_every_form(evaluating, saying, tmp_path, capsys):
    """Sample 0 is right and in format, sample 1 right for a lenient reader only."""
    config = evaluating(forms=[{"name": "chat"}, {"name": "plain", "chat": False, "lenient": True}])
    (items,) = config.draw()[0].values()
    answers = {item.key: item.problem.answer for item in items}
    assert len(answers) == 4 and {split_of(key) for key in answers} == {"test"}
    sampler = saying(lambda key, index: f"It is {answers[key]}" if index else Solution("so", answers[key]))
    evaluate.run(config, tmp_path / "out", sampler)
    assert "evaluation of base 4/4" in capsys.readouterr().err
    evaluation = read_json(tmp_path / "out" / "evaluation.json")
    found = evaluation["tasks"]["arithmetic"]
    assert (found["n"], found["pass@1"], found["prompt_form"], found["right"]) == (4, 1.0, "plain", 8)
    assert found["pass@1_by_form"] == {"chat": 0.5, "plain": 1.0} and not found["notes"]
    problem = items[0].problem
    assert evaluation["examples"]["arithmetic"][0] == {
        "prompt": problem.prompt, "answer": problem.answer, "reasoning": "so", "response": problem.answer,
        "correct": True,
    }  # fmt: skip

    strict = evaluating(chunk=64)
    evaluate.run(strict, tmp_path / "strict", sampler)
    found = read_json(tmp_path / "strict" / "evaluation.json")["tasks"]["arithmetic"]
    assert (found["right"], found["right_leniently"], found["format"]) == (4, 8, 0.5)
    assert found["notes"] == ["4 of 8 in format, 8 right if read leniently"]
    assert "4 of 8 in format, 8 right if read leniently)" in headline(tmp_path / "strict")
    receipt = Receipt.read(tmp_path / "strict")
    assert receipt.tokens == 8 * found["mean_tokens"] and set(receipt.flops_by_part) == {"sampling"}


def test_chunks_only_say_where_an_evaluation_may_stop(evaluating, tmp_path):
    for chunk in (3, 64):
        evaluate.run(evaluating(chunk=chunk), tmp_path / f"{chunk}")
    assert read_json(tmp_path / "3" / "evaluation.json") == read_json(tmp_path / "64" / "evaluation.json")


def test_given_problems_are_counted_and_bad_ones_end_nothing(evaluating, saying, troubled, tmp_path):
    """The train split of the 40 given sums: which of them are asked, could not be, and could not be verified."""
    config = evaluating(tasks=[troubled], split="train", problems=30, samples=1, chunk=64)
    (items,), (given,) = (tuple(each.values()) for each in config.draw())
    assert len(items) == 30 < given <= 40 and {split_of(item.key) for item in items} == {"train"}
    answers = {item.key: item.problem.answer for item in items}
    evaluate.run(config, tmp_path / "out", saying(lambda key, _: Solution("so", answers[key])))
    (found,) = read_json(tmp_path / "out" / "evaluation.json")["tasks"].values()
    skipped = sum(len(item.problem.prompt) > 1000 for item in items)
    broken = sum(item.problem.answer in ("4", "5", "6") for item in items)
    left_out = {"skipped": skipped, "unverified": broken}
    assert broken and found["left_out"] == {kind: count for kind, count in left_out.items() if count}
    assert (found["n"], found["right"], found["given"]) == (30 - skipped, 30 - skipped - broken, given)
    assert f"{30 - skipped} of {given} given train problems asked" in found["notes"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": []}, "evaluation.tasks: "),
    ({"forms": []}, "evaluation.forms: "),
    ({"samples": 0}, "evaluation.samples: .*got 0"),
    ({"split": "dev"}, "evaluation.split: Input should be 'train' or 'test', got 'dev'"),
    ({"sampling": {"top_p": 0.0}}, "evaluation.sampling: top_p must be .*got 0.0"),
    ({"forms": [{"name": "a"}, {"name": "a", "chat": False}]}, "evaluation.*two forms are named a"),
])  # fmt: skip
def test_a_config_that_means_nothing_is_refused(evaluating, changes, message):
    with pytest.raises(SlingshotError, match=message):
        evaluating(**changes)
