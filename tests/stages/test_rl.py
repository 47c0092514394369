"""GRPO: rewards and advantages by hand, the update against a loop over completions, and what a run does step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.receipt import Receipt
from slingshot.engine.engine import Engine
from slingshot.model.transformer import Transformer
from slingshot.rollout.rollout import PromptForm, Rollout, roll_out
from slingshot.stages import rl
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.task import Problem
from slingshot.training.optimizer import Optimizer
from slingshot.training.parallel import Parallel
from slingshot.training.policy import policy_step

ALONE = Parallel(0, 1, torch.device("cpu"), None)
Training = Callable[..., rl.RLConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def training(base: Path, sums: dict[str, Any]) -> Training:
    """training(**changes): two steps of 3 problems, 4 responses each, with a coin for a reward, so that every model gets a signal."""
    common = {
        "model": str(base),
        "tasks": [sums],
        "dtype": "float32",
        "threads": 1,
        "steps": 2,
        "prompts_per_step": 3,
        "group_size": 4,
    }
    sizes = {"sequence_length": 48, "rewards": {"random": True}}
    tables = {"sampling": {"max_tokens": 12}, "optimizer": {"lr": 1e-3}}

    def config(**changes: Any) -> rl.RLConfig:
        given = {name: table | changes.pop(name, {}) for name, table in tables.items()}
        return rl.RLConfig.parse({**common, **sizes, **given, **changes}, "rl")

    return config


def rollout(
    accuracy: float = 0.0, form: float = 0.0, language: float = 1.0, key: str = "k", completion: Sequence[int] = (3,)
) -> Rollout:
    task = load_task("arithmetic")
    n = len(completion)
    return Rollout(
        task,
        Problem("p", key),
        [1, 2],
        list(completion),
        [-float(i + 1) for i in range(n)],
        "",
        "",
        accuracy,
        form,
        language,
    )


def test_rewards_and_advantages_by_hand(training: Training) -> None:
    """Rewards 1.3, 0.2, 0.2, 0.1 (weights 1, 0.2, 0.1): mean 0.45."""
    group = [rollout(1.0, 1.0, 1.0), rollout(0.0, 1.0, 0.0), rollout(0.0, 0.5, 1.0), rollout(0.0, 0.0, 1.0)]
    weights = {"accuracy": 1.0, "format": 0.2, "language": 0.1}
    rl.score([group], training(rewards=weights, loss={"normalize_std": False}), step=0)
    assert [r.reward for r in group] == pytest.approx([1.3, 0.2, 0.2, 0.1])
    assert [r.advantage for r in group] == pytest.approx([0.85, -0.25, -0.25, -0.35])
    rl.score([group], training(rewards=weights), step=0)
    std = math.sqrt((0.85**2 + 2 * 0.25**2 + 0.35**2) / 4)
    assert [r.advantage for r in group] == pytest.approx([0.85 / std, -0.25 / std, -0.25 / std, -0.35 / std], rel=1e-5)


def test_the_control_rewards_a_coin_and_nothing_else(training: Training) -> None:
    good, bad = (
        [[rollout(score, score, score, key=str(i)) for _ in range(4)] for i in range(100)] for score in (1.0, 0.0)
    )
    rl.score(good, training(), step=3)
    rl.score(bad, training(), step=3)
    rewards = [r.reward for group in good for r in group]
    assert rewards == [r.reward for group in bad for r in group]
    assert set(rewards) == {0.0, 1.0} and 0.42 < sum(rewards) / 400 < 0.58
    rl.score(bad, training(), step=4)
    assert rewards != [r.reward for group in bad for r in group]


def test_rows_hold_advantage_and_logprob_in_the_place_of_each_completion_token() -> None:
    a, b = rollout(completion=[11, 12, 13]), rollout(completion=[21])
    a.advantage, b.advantage = 2.0, -1.0
    batch = rl.pack([a, b], 9)
    rows = batch.rows
    assert rows.tokens_BT.tolist() == [[1, 2, 11, 12, 13, 1, 2, 21, 0]] and rows.segments_BT.tolist() == [
        [1, 1, 1, 1, 1, 2, 2, 2, 0]
    ]
    assert rows.weights_BT.tolist() == [[0, 0, 1, 1, 1, 0, 0, 1, 0]]
    assert batch.advantages_BT.tolist() == [[0, 0, 2, 2, 2, 0, 0, -1, 0]] and batch.sampler_BT.tolist() == [
        [0, 0, -1, -2, -3, 0, 0, -1, 0]
    ]
    assert rl.pack([a], 3).rows.tokens_BT.shape == (1, 5), "rows grow for what is longer"
    assert rl.pack([], 9).rows.tokens_BT.shape == (0, 9)


class Recorder:
    """In the optimizer's place: keeps the gradients of each step, changes nothing."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self, fraction: float) -> float:
        self.gradients.append(
            {
                name: p.grad.clone()
                for name, p in self.model.named_parameters()
                if p.grad is not None and p.grad.count_nonzero()
            }
        )
        self.model.zero_grad()
        return 1.0


def sampled(config: rl.RLConfig) -> tuple[Transformer, Transformer, list[Rollout]]:
    """The policy, a reference beside it, and scored responses of the policy."""
    model, reference = load_model(config.model), load_model(config.model)
    items = TaskMix(config.tasks, "train", "0").draw(0, config.prompts_per_step)
    params = config.sampling.params(config.group_size, seed=0)
    groups = roll_out(Engine(model, load_tokenizer(config.model)), items, params, PromptForm())
    rl.score(groups, config, 0)
    return model, reference, [r for group in groups for r in group]


@pytest.mark.parametrize("micro_batch_size", [1, 32])
def test_the_update_is_the_policy_gradient_of_every_completion(training: Training, micro_batch_size: int) -> None:
    """On policy, at temperature 0.8, with k3 to a reference that differs: -A d logp + kl (1 - exp(ref - logp)) d logp, a mean over all tokens."""
    config = training(loss={"kl": 0.5, "mtp": 0.0}, sampling={"temperature": 0.8}, micro_batch_size=micro_batch_size)
    model, reference, rollouts = sampled(config)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    optimizer: Any = Recorder(model)
    logged = rl._update(model, reference, optimizer, rollouts, config, 0, ALONE)

    total, kl_sum, entropy_sum, n_tokens = torch.zeros(()), 0.0, 0.0, sum(len(r.completion_ids) for r in rollouts)
    for r in rollouts:
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        places = slice(len(r.prompt_ids) - 1, -1)
        full = (model(ids).logits_BTV[0, places] / 0.8).log_softmax(-1)
        logp = full.gather(1, ids[0, len(r.prompt_ids) :, None]).squeeze(1)
        with torch.no_grad():
            ref = (
                (reference(ids).logits_BTV[0, places] / 0.8)
                .log_softmax(-1)
                .gather(1, ids[0, len(r.prompt_ids) :, None])
                .squeeze(1)
            )
            k3 = (ref - logp).exp() - (ref - logp) - 1
            kl_sum += float(k3.sum())
            entropy_sum += float(-(full.exp() * full).sum())
        total = total + ((-r.advantage + 0.5 * (1 - (ref - logp.detach()).exp())) * logp).sum() / n_tokens
    total.backward()
    (found,) = optimizer.gradients
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-3 * gradient.abs().max() + 1e-7, name
    assert logged["kl"] == pytest.approx(kl_sum / n_tokens, rel=1e-3) and logged["entropy"] == pytest.approx(
        entropy_sum / n_tokens, rel=1e-4
    )
    assert logged["logprob_gap"] < 1e-4 and logged["clip_fraction"] == 0.0


def test_mtp_is_trained_on_detached_states(training: Training) -> None:
    """Its loss is logged, and adds gradients of its own module only."""
    config = training(loss={"kl": 0.0})
    model, reference, rollouts = sampled(config)
    for each in rollouts:
        each.advantage = 0.0
    optimizer: Any = Recorder(model)
    logged = rl._update(model, reference, optimizer, rollouts, config, 0, ALONE)
    assert logged["mtp_loss"] > 1.0
    assert optimizer.gradients[0] and all(name.startswith("model.layers.2.") for name in optimizer.gradients[0])


def test_an_update_raises_what_was_better_than_its_group(training: Training) -> None:
    config = training(optimizer={"lr": 1e-4}, loss={"kl": 0.0})
    model, reference, rollouts = sampled(config)

    def logprobs() -> list[float]:
        found = []
        with torch.no_grad():
            for r in rollouts:
                ids = torch.tensor([r.prompt_ids + r.completion_ids])
                full = model(ids).logits_BTV[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
                found.append(float(full.gather(1, ids[0, len(r.prompt_ids) :, None]).sum()))
        return found

    before = logprobs()
    rl._update(model, reference, Optimizer(model, config.optimizer), rollouts, config, 0, ALONE)
    gains = [r.advantage * (after - old) for r, old, after in zip(rollouts, before, logprobs(), strict=True)]
    assert sum(gains) > 0 and sum(gain > 0 for gain in gains) > len(gains) / 2


def test_minibatches_are_steps_of_their_own_on_the_same_samples(training: Training) -> None:
    config = training(minibatches=3, optimizer={"lr": 0.01})
    model, reference, rollouts = sampled(config)
    rows = len(rl.pack(rollouts, config.sequence_length).rows.tokens_BT)
    assert rows >= 3
    recorder: Any = Recorder(model)
    rl._update(model, reference, recorder, rollouts, config, 0, ALONE)
    assert len(recorder.gradients) == 3
    logged = rl._update(model, reference, Optimizer(model, config.optimizer), rollouts, config, 0, ALONE)
    assert logged["logprob_gap"] > 1e-3  # the later minibatches are off policy


def test_a_rank_without_rows_takes_part_and_adds_nothing(training: Training) -> None:
    """Another rank holds two rows more, then all of them: the gradient is that of our rows, then zero."""
    config = training(micro_batch_size=1)
    model, reference, rollouts = sampled(config)
    batch = rl.pack(rollouts, config.sequence_length)
    n_rows = len(batch.rows.tokens_BT)

    def gradient(part: slice, n_rows: int) -> dict[str, torch.Tensor]:
        policy_step(model, reference, batch[part], n_rows, config.loss, 1.0, 1, ALONE)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    alone, beside_more, empty = (
        gradient(slice(None), n_rows),
        gradient(slice(None), n_rows + 2),
        gradient(slice(0, 0), n_rows),
    )
    assert alone.keys() == beside_more.keys() == empty.keys()
    assert all(torch.allclose(alone[name], beside_more[name], atol=1e-7) for name in alone)
    assert all(grad.count_nonzero() == 0 for grad in empty.values()) and any(
        grad.count_nonzero() for grad in alone.values()
    )


def test_a_run_logs_every_step_and_counts_its_cost(training: Training, metrics: Metrics, tmp_path: Path) -> None:
    rl.run(training(), tmp_path / "out")
    rows, receipt = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out")
    sampling = {"step", "reward", "pass_rate", "format", "language", "response_tokens", "no_signal"}
    update = {"loss", "kl", "clip_fraction", "entropy", "logprob_gap", "gradient_norm", "mtp_loss", "expert_load", "lr"}
    assert [row["step"] for row in rows] == [1, 2] and all(set(row) == sampling | update for row in rows)
    assert (
        rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        and rows[0]["logprob_gap"] < 1e-4
        and rows[0]["clip_fraction"] == 0.0
    )
    assert receipt.tokens == round(sum(row["response_tokens"] * 12 for row in rows))
    assert (
        set(receipt.flops_by_part) == {"sampling", "training", "mtp", "reference"}
        and min(receipt.flops_by_part.values()) > 0
    )
    rl.run(training(), tmp_path / "again")
    assert metrics(tmp_path / "again") == rows
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_the_reference_is_replaced_periodically(training: Training, metrics: Metrics, tmp_path: Path) -> None:
    rl.run(training(steps=5, loss={"reference_steps": 2}), tmp_path / "out")
    kl = [row["kl"] for row in metrics(tmp_path / "out")]
    assert [value > 1e-5 for value in kl] == [False, True, False, True, False]


def test_without_a_kl_weight_there_is_no_reference(training: Training, metrics: Metrics, tmp_path: Path) -> None:
    rl.run(training(loss={"kl": 0.0}), tmp_path / "free")
    rl.run(training(loss={"kl": 1e-12}), tmp_path / "tied")
    free, tied = metrics(tmp_path / "free"), metrics(tmp_path / "tied")
    assert [row["kl"] for row in free] == [0.0, 0.0]
    assert tied[1]["kl"] > 0
    assert [row["loss"] for row in free] == pytest.approx([row["loss"] for row in tied], abs=1e-6)
    assert (
        Receipt.read(tmp_path / "free").flops_by_part["reference"]
        == 0
        < Receipt.read(tmp_path / "tied").flops_by_part["reference"]
    )


def test_groups_of_equal_reward_give_no_signal(
    training: Training, base: Path, metrics: Metrics, tmp_path: Path
) -> None:
    """Nothing to learn from: the step is logged, and not a weight moves."""
    rl.run(training(rewards={"accuracy": 0.0, "format": 0.0}, steps=1), tmp_path / "out")
    (row,) = metrics(tmp_path / "out")
    assert row["no_signal"] == 1.0 and row["reward"] == 0.0 and "loss" not in row
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_budget_of_flops_ends_the_stage(training: Training, metrics: Metrics, tmp_path: Path) -> None:
    rl.run(training(steps=2), tmp_path / "two")
    budget = 0.9 * Receipt.read(tmp_path / "two").flops
    rl.run(training(steps=50, max_flops=budget), tmp_path / "out")
    assert len(metrics(tmp_path / "out")) == 2 and Receipt.read(tmp_path / "out").flops > budget


def test_router_biases_move_on_request(training: Training, base: Path, tmp_path: Path) -> None:
    rl.run(training(steps=1, bias_update_speed=0.25), tmp_path / "out")
    before, after = (load_model(path).moe_layers()[0].gate.e_score_correction_bias for path in (base, tmp_path / "out"))
    assert set((after - before).abs().mul(100).round().tolist()) <= {0.0, 25.0} and not torch.equal(before, after)


def test_divergence_is_reported_in_one_line(training: Training, tmp_path: Path) -> None:
    with pytest.raises(SlingshotError) as stopped:
        rl.run(training(steps=5, optimizer={"lr": 1e30}), tmp_path / "out")
    assert "\n" not in str(stopped.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "muonn"}}, "rl.optimizer.name: Input should be 'muon' or 'adamw', got 'muonn'"),
        ({"group_size": 1}, "rl.group_size: .*got 1"),
        ({"tasks": []}, "rl.tasks: "),
        ({"loss": {"clip_low": 1.5}}, "rl.loss.clip_low: .*got 1.5"),
        ({"loss": {"kl": -1.0}}, "rl.loss.kl: .*got -1.0"),
        ({"sampling": {"temperature": 0.0}}, "rl.* temperature above 0"),
        ({"max_flops": 0.0}, "rl.max_flops: .*got 0.0"),
        ({"rewards": {"acuracy": 1.0}}, r"rl.rewards.acuracy: unknown key; did you mean accuracy\?"),
    ],
)
def test_a_config_that_means_nothing_is_refused(training: Training, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SlingshotError, match=message):
        training(**changes)
