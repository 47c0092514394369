"""What a run of RL does step by step: its metrics and costs, where responses come from, and what is refused."""

import gc
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.receipt import Receipt
from slingshot.engine.engine import Engine
from slingshot.planning.plan_training import plan_rl
from slingshot.planning.request import NamedModel, RLRequest
from slingshot.rollout.sampler import EngineSampler
from slingshot.rollout.trajectory import Trajectory
from slingshot.stages import rl
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.task import Solution
from slingshot.training.objectives import POLICY_LOSSES

PAGE = (Path(__file__).parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")


def test_the_page_says_what_each_loss_takes_and_what_each_key_is_where_it_is_not_set():
    given = {"model": "m", "tasks": ["arithmetic"]}
    rows = [
        line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `") and "name" not in line
    ]
    losses = {re.findall(r"`(\w+)`", row[0])[0]: row for row in rows if len(row) == 6}
    assert losses.keys() == POLICY_LOSSES.keys()
    for name, (said, _, _, clips, aggregation, std) in losses.items():
        loss = rl.RLConfig.parse({**given, "loss": {"name": name}}).loss
        told = *(float(each.split()[0]) for each in clips.split(",")), re.findall(r"`(\w+)`", aggregation)[0], std
        assert told == (loss.clip_low, loss.clip_high, loss.aggregation, f"`{loss.advantage_std}`")
        assert ("(default)" in said) == (rl.RLConfig.parse(given).loss.name == name)
    keys = [row for row in rows if len(row) == 4]
    assert len(keys) > 9
    for names, _, defaults, _ in keys:
        for name, default in zip(re.findall(r"`([\w.]+)`", names), defaults.split(", "), strict=True):
            value, told = attrgetter(name)(rl.RLConfig.parse(given)), default.strip("`")
            assert told == f"{value}".lower() or float(told) == value


def test_what_was_cut_off_is_not_trained_on_where_asked(training, metrics, tmp_path):
    """Of responses of at most 5 tokens many are cut off; without them there is less to train on."""
    config = training(loss={"mask_truncated": True}, sampling={"max_tokens": 5}, steps=1)
    rl.run(config, tmp_path / "masked")
    rl.run(training(sampling={"max_tokens": 5}, steps=1), tmp_path / "all")
    parts = [Receipt.read(tmp_path / name).flops_by_part for name in ("masked", "all")]
    assert parts[0]["training"] < parts[1]["training"] and parts[0]["sampling"] == parts[1]["sampling"]


def test_replay_is_refused_where_no_experts_are_told(training, saying, tmp_path):
    sampler = saying(lambda key, index: Solution("so", "no"))
    with pytest.raises(SlingshotError, match=r"loss.replay_routing: this sampler tells of no experts"):
        rl.run(training(loss={"replay_routing": True}), tmp_path / "out", sampler)


def test_a_run_logs_every_step_and_counts_its_cost(training, metrics, tmp_path, capsys):
    rl.run(training(), tmp_path / "out")
    rows, receipt = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out")
    sampling = {"step", "reward", "pass_rate", "format", "language", "response_tokens", "no_signal"}
    update = {"loss", "kl", "clip_fraction", "entropy", "logprob_gap", "gradient_norm", "mtp_loss", "expert_load", "lr"}
    assert [row["step"] for row in rows] == [1, 2] and all(set(row) == sampling | update for row in rows)
    first = rows[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and not first["clip_fraction"]
    assert all(row["logprob_gap"] < 1e-4 for row in rows)  # the engine has every step's weights
    assert receipt.tokens == round(sum(row["response_tokens"] * 12 for row in rows))
    parts = receipt.flops_by_part
    assert set(parts) == {"sampling", "training", "mtp", "reference"} and min(parts.values()) > 0
    assert "nothing was learned" not in capsys.readouterr().err
    rl.run(training(), tmp_path / "again")
    assert metrics(tmp_path / "again") == rows
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_step_keeps_nothing_of_the_steps_before(training, saying, tmp_path, staleness):
    """Trajectories that are there as weights are handed over: no more at the last step than once all are begun."""
    sampler, there = saying(lambda key, index: Solution("so", str(index))), []
    hand_over = sampler.update_weights

    def counted(*given):
        gc.collect()
        there.append(sum(type(each) is Trajectory for each in gc.get_objects()))
        return hand_over(*given)

    sampler.update_weights = counted
    rl.run(training(steps=8, staleness=staleness), tmp_path / "out", sampler)
    assert there[-1] <= there[1 + staleness] <= there[0] + 12 * (2 + staleness)


def test_samples_made_beside_the_updates_come_out_alike_twice(training, metrics, tmp_path):
    config = training(steps=4, staleness=2, optimizer={"lr": 0.01}, loss={"importance": "truncated"})
    for name in ("out", "again"):
        rl.run(config, tmp_path / name)
    rows = metrics(tmp_path / "out")
    assert rows == metrics(tmp_path / "again") and [row["staleness"] for row in rows] == [0, 1, 2, 2]
    assert rows[0]["logprob_gap"] < 1e-4 < min(row["logprob_gap"] for row in rows[1:])  # what they are behind by


@pytest.mark.parametrize("shares", [True, False])
def test_adapters_are_sampled_from_merged_and_compared_with_the_base(training, base, metrics, tmp_path, shares):
    lora = {"rank": 4, "targets": ["attention", "mlp", "experts"]}
    sampler = None if shares else EngineSampler(Engine.load(base, dtype="float32"))
    rl.run(training(lora=lora, steps=3, optimizer={"lr": 0.01}), tmp_path / "out", sampler)
    rows = metrics(tmp_path / "out")
    assert abs(rows[0]["kl"]) < 1e-6 < rows[2]["kl"]  # the base has not moved along
    assert all(row["logprob_gap"] < 1e-4 for row in rows)  # the engine has every step's merged weights
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_responses_may_come_from_elsewhere(training, saying, metrics, tmp_path):
    """A scripted sampler: half of each group is right, the rewards say so, weights are handed over every step."""
    items = {item.key: item for item in TaskMix(training().tasks, "train", "rl/0").draw(0, 6)}
    sampler = saying(lambda key, index: Solution("so", items[key].problem.answer if index % 2 else "none"))
    rl.run(training(rewards={}), tmp_path / "out", sampler)
    rows = metrics(tmp_path / "out")
    assert [(row["pass_rate"], row["format"], row["no_signal"]) for row in rows] == [(0.5, 1.0, 0.0)] * 2
    assert sampler.version == 1 and all(row["reward"] == pytest.approx(0.7) for row in rows)


def test_bad_problems_are_counted_and_end_nothing(training, troubled, metrics, tmp_path):
    """Of 40 problems one is too long for the model and three make their verifier raise."""
    config = training(tasks=[troubled], prompts_per_step=8, steps=5, group_size=2, form={"lenient": True}, rewards={})
    rl.run(config, tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert len(rows) == 5 and sum(row.get("skipped", 0) for row in rows) == 1
    assert sum(row.get("unverified", 0) for row in rows) >= 2


def test_an_answer_that_breaks_its_verifier_moves_nothing(training, saying, tmp_path):
    """A group of four, of which the last cannot be verified, trains as the group of the other three does."""
    lines = [
        "def problems(split, seed):", "    for number in range(40): yield {'prompt': f'What is {number}+1?'}",
        "def verify(problem, text):", "    if text == '3': raise ValueError('what a number')",
        "    return text == '0'",
    ]  # fmt: skip
    (tmp_path / "breaks.py").write_text("\n".join(lines))
    sampler = saying(lambda key, index: Solution("so", str(index)))
    for size in (3, 4):
        config = training(tasks=[str(tmp_path / "breaks.py")], group_size=size, steps=1, rewards={"random": False})
        rl.run(config, tmp_path / str(size), sampler)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("3", "4")]
    assert weights[0] == weights[1]


def test_the_reference_is_replaced_periodically(training, metrics, tmp_path):
    rl.run(training(steps=5, loss={"reference_steps": 2}), tmp_path / "out")
    kl = [row["kl"] for row in metrics(tmp_path / "out")]
    assert [value > 1e-5 for value in kl] == [False, True, False, True, False]


def test_without_a_kl_weight_there_is_no_reference(training, metrics, tmp_path):
    rl.run(training(loss={"kl": 0.0}), tmp_path / "free")
    rl.run(training(loss={"kl": 1e-12}), tmp_path / "tied")
    free, tied = metrics(tmp_path / "free"), metrics(tmp_path / "tied")
    assert [row["kl"] for row in free] == [0.0, 0.0] and tied[1]["kl"] > 0
    assert [row["loss"] for row in free] == pytest.approx([row["loss"] for row in tied], abs=1e-6)
    cost = [Receipt.read(tmp_path / name).flops_by_part["reference"] for name in ("free", "tied")]
    assert cost[0] == 0 < cost[1]


def test_groups_of_equal_reward_give_no_signal(training, base, metrics, tmp_path, capsys):
    """Nothing to learn from: the step is logged, not a weight moves, and the end says so."""
    rl.run(training(rewards={"accuracy": 0.0, "format": 0.0}, steps=1), tmp_path / "out")
    (row,) = metrics(tmp_path / "out")
    assert row["no_signal"] == 1.0 and row["reward"] == 0.0 and "loss" not in row
    assert "out: in no group did rewards differ, so nothing was learned; try" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_group_without_a_signal_is_not_pulled_to_the_reference(training, saying, tmp_path):
    """The first step moves the policy away from the reference; in those after it no reward differs, no weight moves."""
    sampler = saying(lambda key, index: "so" if sampler.version else Solution("so", "no" if index % 2 else ""))
    loss = {"kl": 10.0}
    rl.run(training(rewards={}, steps=1, loss=loss), tmp_path / "one", sampler)
    rl.run(training(rewards={}, steps=3, loss=loss), tmp_path / "three", sampler)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "three")]
    assert weights[0] == weights[1]


def test_a_budget_of_flops_ends_the_stage(training, metrics, tmp_path):
    rl.run(training(steps=2), tmp_path / "two")
    budget = 0.9 * Receipt.read(tmp_path / "two").flops
    rl.run(training(steps=50, max_flops=budget), tmp_path / "out")
    assert len(metrics(tmp_path / "out")) == 2 and Receipt.read(tmp_path / "out").flops > budget


def test_router_biases_move_on_request(training, base, tmp_path):
    rl.run(training(steps=1, bias_update_speed=0.25), tmp_path / "out")
    before, after = (load_model(path).moe_layers()[0].gate.e_score_correction_bias for path in (base, tmp_path / "out"))
    assert set((after - before).abs().mul(100).round().tolist()) <= {0.0, 25.0} and not torch.equal(before, after)


@pytest.mark.parametrize(("steps", "lr"), [(5, 1e30), (1, 1e38)])  # on the way, and by the last update
def test_divergence_is_reported_in_one_line(training, tmp_path, steps, lr):
    with pytest.raises(SlingshotError, match=r"^[^\n]*(nan|inf|NaN|not finite)[^\n]*$"):
        rl.run(training(steps=steps, optimizer={"lr": lr}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"optimizer": {"name": "muonn"}}, "rl.optimizer.name: Input should be 'muon' or 'adamw', got 'muonn'"),
    ({"group_size": 1}, "rl.group_size: .*got 1"),
    ({"tasks": []}, "rl.tasks: "),
    ({"loss": {"clip_low": 1.5}}, "rl.loss.clip_low: .*got 1.5"),
    ({"loss": {"kl": -1.0}}, "rl.loss.kl: .*got -1.0"),
    ({"rewards": {"format": float("nan")}}, "rl.*: nan is no number"),
    ({"sampling": {"temperature": 0.0}}, "rl.* temperature above 0"),
    ({"sampling": {"top_p": 0.9}}, "rl.* leave top_p 1"),
    ({"sampling": {"top_k": 5}}, "rl.* top_k 0"),
    ({"loss": {"name": "gppo"}}, "rl.loss.name: .*'dapo'.*got 'gppo'"),
    ({"loss": {"importance_cap": 1.0}}, "rl.loss.importance_cap: .*got 1.0"),
    ({"rewards": {"overlong_buffer": 99999}}, "rl: rewards.overlong_buffer: it is more than sampling.max_tokens"),
    ({"threads": 100_000}, "rl.threads: Input should be less than or equal to 1024"),
    ({"partial": True}, "rl: partial: responses last beyond an update only with staleness"),
    ({"max_flops": 0.0}, "rl.max_flops: .*got 0.0"),
    ({"rewards": {"acuracy": 1.0}}, r"rl.rewards.acuracy: unknown key; did you mean accuracy\?"),
])  # fmt: skip
def test_a_config_that_means_nothing_is_refused(training, changes, message):
    with pytest.raises(SlingshotError, match=message):
        training(**changes)


def test_what_a_run_cost_is_what_its_plan_says(base, training, metrics, tmp_path):
    """Sampling, reference, update and MTP: of as many tokens, a group's prompt once, but for lengths' distribution."""
    config = training(group_size=8, steps=3, sampling={"max_tokens": 24})
    rl.run(config, tmp_path / "out")
    rows, parts = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out").flops_by_part
    assert not any(row["no_signal"] for row in rows)
    items, tokenizer = TaskMix(config.tasks, "train", f"rl/{config.seed}").draw(0, 9), load_tokenizer(base)
    prompts = [len(config.form.encode(tokenizer, item.problem)) for item in items]
    plan = plan_rl(RLRequest.parse({
        "model": NamedModel(name="base", config=load_model(base).config), "device": "h100", "count": 1, "steps": 3,
        "prompts": 3, "group": 8, "prompt": sum(prompts) / 9, "longest": 24,
        "response": sum(row["response_tokens"] for row in rows) / 3,
    }))  # fmt: skip
    names = {"rollouts": "sampling", "training": "training", "other forward passes": "reference", "mtp": "mtp"}
    assert {names[part]: flops for part, flops in plan.flops_by_part.items()} == pytest.approx(parts, rel=0.03)
