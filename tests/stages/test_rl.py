"""GRPO: the update against a loop over trajectories, and what a run does step by step."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.receipt import Receipt
from slingshot.rollout.reward import assign_advantages, assign_rewards
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler
from slingshot.rollout.trajectory import pack
from slingshot.stages import rl
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.task import Solution
from slingshot.tasks.verification import VerificationPool
from slingshot.training.objectives import POLICY_LOSSES, targets_ahead
from slingshot.training.optimizer import Optimizer
from slingshot.training.parallel import Parallel
from slingshot.training.policy import policy_step

ALONE = Parallel()


@pytest.fixture
def training(base, sums):
    """training(**changes): two steps of 3 problems, 4 responses each, a coin for a reward: there is always a signal."""
    common = {"model": str(base), "tasks": [sums], "dtype": "float32", "threads": 1, "rewards": {"random": True}}
    sizes = {"steps": 2, "prompts_per_step": 3, "group_size": 4, "sequence_length": 48}
    tables = {"sampling": {"max_tokens": 12}, "optimizer": {"lr": 1e-3}}

    def config(**changes):
        given = {name: table | changes.pop(name, {}) for name, table in tables.items()}
        return rl.RLConfig.parse({**common, **sizes, **given, **changes}, "rl")

    return config


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in found.items() if gradient.count_nonzero()}


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-3 * gradient.abs().max() + 1e-7, name


def recorded(model, reference, trajectories, config):
    """What an update logs, and the gradients of each of its steps, of which it takes none."""
    found = []

    def step(fraction):
        found.append(gradients(model))
        model.zero_grad()
        return 1.0

    return rl.update_policy(model, reference, SimpleNamespace(step=step), trajectories, config, 0, ALONE), found


def sampled(config):
    """The policy, a reference beside it, and scored responses of the policy."""
    model, reference = load_model(config.model), load_model(config.model)
    sampler = EngineSampler.beside(model, load_tokenizer(config.model), torch.float32, alone=True)
    params = replace(config.sampling.params(config.group_size, seed=0), routed_experts=config.loss.replay_routing)
    items = TaskMix(config.tasks, "train", "0").draw(0, config.prompts_per_step)
    groups = Rollout(sampler, params, PromptForm(), VerificationPool([]), ALONE).run(items)
    assign_rewards(groups, config.rewards, "0/0", config.sampling.max_tokens)
    assign_advantages(groups, config.loss.advantage_std, ALONE)
    return model, reference, [trajectory for group in groups for trajectory in group]


def of_response(network, trajectory, temperature=1.0):
    """Log probabilities of the sampled ids, and of the whole vocabulary in their places."""
    ids, start = torch.tensor([trajectory.ids]), trajectory.turns[0].start
    full = (network(ids).logits_BTV[0, start - 1 : -1] / temperature).log_softmax(-1)
    return full.gather(1, ids[0, start:, None]).squeeze(1), full


@pytest.mark.parametrize("micro_batch_size", [1, 32])
def test_the_update_is_the_policy_gradient_of_every_sampled_token(training, micro_batch_size):
    """At temperature 0.8, with k3 to another reference: the mean of -A d logp + kl (1 - exp(ref - logp)) d logp."""
    loss, temperature = {"kl": 0.5, "mtp": 0.0}, {"temperature": 0.8}
    config = training(loss=loss, sampling=temperature, micro_batch_size=micro_batch_size)
    model, reference, trajectories = sampled(config)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    logged, (found,) = recorded(model, reference, trajectories, config)

    total, kl, entropy, n_tokens = torch.zeros(()), 0.0, 0.0, sum(sum(t.mask) for t in trajectories)
    for t in trajectories:
        logp, full = of_response(model, t, 0.8)
        with torch.no_grad():
            difference = of_response(reference, t, 0.8)[0] - logp
            kl += float((difference.exp() - difference - 1).sum())
            entropy -= float((full.exp() * full).sum())
        total = total + ((-t.advantage + 0.5 * (1 - difference.exp())) * logp).sum() / n_tokens
    total.backward()
    close(found, gradients(model))
    assert logged["kl"] == pytest.approx(kl / n_tokens, rel=1e-3)
    assert logged["entropy"] == pytest.approx(entropy / n_tokens, rel=1e-4)
    assert logged["logprob_gap"] < 1e-4 and logged["clip_fraction"] == 0.0


def test_mtp_is_trained_on_detached_states(training):
    """Its loss is logged, and adds gradients of its own module only."""
    config = training(loss={"kl": 0.0})
    model, reference, trajectories = sampled(config)
    for each in trajectories:
        each.advantage = 0.0
    logged, (found,) = recorded(model, reference, trajectories, config)
    assert logged["mtp_loss"] > 1.0 and found and all(name.startswith("model.layers.2.") for name in found)


@dataclass
class OneOfTwo(Parallel):
    """A rank beside another: sums are those over all rows."""

    totals: dict[str, float] = field(default_factory=dict)

    def sums(self, values):
        return self.totals


def of_a_stale_sampler(trajectories):
    """The same, had another policy drawn them: every token was 0.7 to 1.4 times as likely to it."""
    for t in trajectories:
        t.logprobs = [logp + 0.35 * math.sin(place) for place, logp in enumerate(t.logprobs)]
    return trajectories


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_each_loss_is_its_formula_over_trajectories_one_by_one(training, name):
    """Ratios to a stale sampler, clips, aggregation: against a loop that reads like the papers."""
    config = training(loss={"name": name, "kl": 0.0, "mtp": 0.0, "clip_low": 0.15, "clip_high": 0.15})
    model, _, trajectories = sampled(config)
    logged, (found,) = recorded(model, None, of_a_stale_sampler(trajectories), config)
    total = torch.zeros(())
    groups = Counter(t.item.key for t in trajectories)
    tokens = {key: sum(sum(t.mask) for t in trajectories if t.item.key == key) for key in groups}
    for t in trajectories:
        logp, _ = of_response(model, t)
        ratio = (logp - torch.tensor(t.logprobs)[t.turns[0].start :]).exp()
        if name == "gspo":
            ratio = ratio.log().mean().exp().expand(len(ratio))
        held = ratio.clamp(0.85, 1.15)
        loss = -torch.minimum(ratio * t.advantage, held * t.advantage)
        if name == "cispo":
            loss = -held.detach() * t.advantage * logp
        divisor = {
            "token": sum(tokens.values()), "response": len(logp) * len(trajectories),
            "constant": 12 * len(trajectories), "prompt": tokens[t.item.key] * len(groups),
        }[config.loss.aggregation]  # fmt: skip
        total = total + loss.sum() / divisor
    total.backward()
    close(found, gradients(model))
    assert logged["loss"] == pytest.approx(float(total.detach()), rel=1e-3)
    assert logged["clip_fraction"] > 0 or name == "gspo"


@pytest.mark.parametrize("importance", ["none", "truncated", "masked"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_no_split_into_micro_batches_changes_a_gradient(training, name, importance):
    """KL, MTP and importance weights along; rows of their own are as all at once (symptom: a loss scaled by splits)."""
    loss = {"name": name, "kl": 0.5, "kl_unbiased": True, "importance": importance, "importance_cap": 1.2}
    config = training(loss=loss)
    model, reference, trajectories = sampled(config)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    of_a_stale_sampler(trajectories)
    _, (together,) = recorded(model, reference, trajectories, config)
    for size in (1, 2):
        split = config.model_copy(update={"micro_batch_size": size})
        close(recorded(model, reference, trajectories, split)[1][0], together)
    # nor does a split over ranks: each adds the gradient of its rows over the counts of all
    batch = pack(trajectories, config.sequence_length, config.loss.aggregation, config.sampling.max_tokens)
    far_BT = targets_ahead(batch.tokens_BT, batch.segments_BT, batch.mask_BT, ahead=2)[1]
    ours = OneOfTwo(totals={"units": float(batch.shares_BT.sum()), "far": float(far_BT.sum())})
    model.zero_grad()
    for part in (batch[:2], batch[2:]):
        policy_step(model, reference, part, max(2, len(batch) - 2), config.loss, 1.0, 8, ours)
    close(gradients(model), together)


@pytest.mark.parametrize(("importance", "weight"), [("truncated", [1.2, 0.9, 0.5]), ("masked", [0.0, 0.9, 0.0])])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_importance_weights_are_of_the_trainer_before_its_update(training, importance, weight, minibatches):
    """A sampler that found every third token 1/1.5, 1/.9 and 1/.5 times as likely; the first minibatch's gradient."""
    loss = {"importance": importance, "importance_cap": 1.2, "kl": 0.0, "mtp": 0.0}
    config = training(loss=loss, minibatches=minibatches)
    model, _, trajectories = sampled(config)
    for t in trajectories:
        t.logprobs = [logp - math.log([1.5, 0.9, 0.5][place % 3]) for place, logp in enumerate(t.logprobs)]
    _, found = recorded(model, None, trajectories, config)
    n_tokens = sum(sum(t.mask) for t in trajectories)
    total = torch.zeros(())
    for t in trajectories:
        logp, _ = of_response(model, t)
        places = torch.arange(t.turns[0].start, len(t.ids)) % 3
        total = total - (torch.tensor(weight)[places] * t.advantage * logp).sum() / n_tokens
    total.backward()
    if minibatches == 1:
        close(found[0], gradients(model))
    else:  # none is a step: together they are as one
        batch = pack(trajectories, config.sequence_length)
        size = -(-len(batch) // minibatches)
        shares = [float(batch[start : start + size].mask_BT.sum()) / n_tokens for start in range(0, len(batch), size)]
        pairs = list(zip(shares, found, strict=True))
        close(
            {name: sum(share * part[name] for share, part in pairs if name in part) for name in found[0]},
            gradients(model),
        )


def test_what_was_cut_off_is_not_trained_on_where_asked(training, metrics, tmp_path):
    """Of responses of at most 5 tokens many are cut off; without them there is less to train on."""
    config = training(loss={"mask_truncated": True}, sampling={"max_tokens": 5}, steps=1)
    rl.run(config, tmp_path / "masked")
    rl.run(training(sampling={"max_tokens": 5}, steps=1), tmp_path / "all")
    parts = [Receipt.read(tmp_path / name).flops_by_part for name in ("masked", "all")]
    assert parts[0]["training"] < parts[1]["training"] and parts[0]["sampling"] == parts[1]["sampling"]


def test_replayed_routing_keeps_the_samplers_experts(training):
    """A trainer whose routers would choose otherwise finds the sampler's logprobs where experts are replayed alone.

    The biases choose and do nothing else, so that gates are the sampler's too; MTP's layer is left as it is.
    """
    gaps, kept = {}, {}
    for replay in (False, True):
        config = training(loss={"replay_routing": replay, "kl": 0.0, "mtp": 0.0})
        model, _, trajectories = sampled(config)
        kept[replay] = recorded(model, None, trajectories, config)
        for layer in model.moe_layers():
            layer.gate.e_score_correction_bias.copy_(torch.arange(8.0).flip(0) % 3)
        gaps[replay] = recorded(model, None, trajectories, config)[0]["logprob_gap"]
    assert gaps[True] < 1e-5 and gaps[False] > 1e-3
    close(kept[True][1][0], kept[False][1][0])  # where the routers choose the same, nothing changes
    assert kept[True][0]["expert_load"] == kept[False][0]["expert_load"]


def test_replay_is_refused_where_no_experts_are_told(training, saying, tmp_path):
    sampler = saying(lambda key, index: Solution("so", "no"))
    with pytest.raises(SlingshotError, match=r"loss.replay_routing: this sampler tells of no experts"):
        rl.run(training(loss={"replay_routing": True}), tmp_path / "out", sampler)


def test_minibatches_are_steps_of_their_own_on_the_same_samples(training):
    config = training(minibatches=3, optimizer={"lr": 0.01})
    model, reference, trajectories = sampled(config)
    assert len(pack(trajectories, config.sequence_length)) >= 3
    assert len(recorded(model, reference, trajectories, config)[1]) == 3
    optimizer = Optimizer(model, config.optimizer)
    logged = rl.update_policy(model, reference, optimizer, trajectories, config, 0, ALONE)
    assert logged["logprob_gap"] > 1e-3  # the later minibatches are off policy


def test_a_rank_without_rows_takes_part_and_adds_nothing(training):
    """Another rank holds two rows more, then all of them: the gradient is that of our rows, then zero."""
    config = training()
    model, reference, trajectories = sampled(config)
    batch = pack(trajectories, config.sequence_length)

    def gradient(part, n_rows):
        model.zero_grad()
        policy_step(model, reference, batch[part], n_rows, config.loss, 1.0, 1, ALONE)
        return gradients(model)

    alone, beside_more = gradient(slice(None), len(batch)), gradient(slice(None), len(batch) + 2)
    assert alone and alone.keys() == beside_more.keys() and gradient(slice(0, 0), len(batch)) == {}
    assert all(p.grad is not None for name, p in model.named_parameters() if name in alone)
    assert all(torch.allclose(alone[name], beside_more[name], atol=1e-7) for name in alone)


def test_a_run_logs_every_step_and_counts_its_cost(training, metrics, tmp_path):
    rl.run(training(), tmp_path / "out")
    rows, receipt = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out")
    sampling = {"step", "reward", "pass_rate", "format", "language", "response_tokens", "no_signal"}
    update = {"loss", "kl", "clip_fraction", "entropy", "logprob_gap", "gradient_norm", "mtp_loss", "expert_load", "lr"}
    assert [row["step"] for row in rows] == [1, 2] and all(set(row) == sampling | update for row in rows)
    first = rows[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and first["logprob_gap"] < 1e-4 and not first["clip_fraction"]
    assert receipt.tokens == round(sum(row["response_tokens"] * 12 for row in rows))
    parts = receipt.flops_by_part
    assert set(parts) == {"sampling", "training", "mtp", "reference"} and min(parts.values()) > 0
    rl.run(training(), tmp_path / "again")
    assert metrics(tmp_path / "again") == rows
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


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


def test_groups_of_equal_reward_give_no_signal(training, base, metrics, tmp_path):
    """Nothing to learn from: the step is logged, and not a weight moves."""
    rl.run(training(rewards={"accuracy": 0.0, "format": 0.0}, steps=1), tmp_path / "out")
    (row,) = metrics(tmp_path / "out")
    assert row["no_signal"] == 1.0 and row["reward"] == 0.0 and "loss" not in row
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


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
    ({"max_flops": 0.0}, "rl.max_flops: .*got 0.0"),
    ({"rewards": {"acuracy": 1.0}}, r"rl.rewards.acuracy: unknown key; did you mean accuracy\?"),
])  # fmt: skip
def test_a_config_that_means_nothing_is_refused(training, changes, message):
    with pytest.raises(SlingshotError, match=message):
        training(**changes)
