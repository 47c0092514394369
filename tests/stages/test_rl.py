"""The policy update, against loops over trajectories: losses, aggregations, importance weights, replayed routing."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.rollout.reward import assign_advantages, assign_rewards
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler
from slingshot.rollout.trajectory import pack
from slingshot.stages import rl
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.verification import VerificationPool
from slingshot.training.objectives import POLICY_LOSSES, targets_ahead
from slingshot.training.optimizer import Optimizer
from slingshot.training.parallel import Parallel
from slingshot.training.policy import policy_step, trainer_logprobs

ALONE = Parallel()


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

    return rl.update_policy(model, reference, SimpleNamespace(step=step), trajectories, config, 0, ALONE)[0], found


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


@pytest.mark.parametrize(
    "importance", ["truncated", *(pytest.param(each, marks=pytest.mark.slow) for each in ("none", "masked"))]
)
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


def test_wrong_responses_that_the_policy_left_behind_add_nothing(training):
    """Every other token was e^3 times as likely to the sampler, the rest a little less: only the mask holds those."""
    config = training(loss={"kl": 0.0, "mtp": 0.0, "off_policy_delta": 0.5})
    model, _, trajectories = sampled(config)
    left = [t for t in trajectories if t.advantage < 0][::2]
    for t in left:
        t.logprobs = [logp - 0.1 + 3.1 * (place % 2) for place, logp in enumerate(t.logprobs)]
        start = t.turns[0].start
        t.logprobs[start] += 3.0  # also where there is one token
    logged, (found,) = recorded(model, None, trajectories, config)
    tokens = [sum(sum(t.mask) for t in some) for some in (left, trajectories)]
    assert left and logged["clip_fraction"] == pytest.approx(tokens[0] / tokens[1])
    unmasked = config.model_copy(update={"loss": config.loss.model_copy(update={"off_policy_delta": None})})
    others = recorded(model, None, trajectories, unmasked)[1][0]
    assert any((others[name] - found[name]).abs().max() > 1e-4 for name in found)
    for t in left:
        t.advantage = 0.0
    close(recorded(model, None, trajectories, unmasked)[1][0], found)


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


def test_logits_of_a_trainer_in_bfloat16_are_float32(training):
    """Its logprobs are those of the last hidden states under the head that the sampler has, to float32's precision."""
    config = training()
    model, _, trajectories = sampled(config)
    model.compute_dtype = torch.bfloat16
    batch = pack(trajectories, config.sequence_length)
    found = trainer_logprobs(model, batch, len(batch), 1.0, 32)
    assert found.dtype == torch.float32
    with torch.no_grad():
        hidden_BTD = model(batch.tokens_BT, segments_BT=batch.segments_BT, logits=False).hidden_BTD
        assert hidden_BTD.dtype == torch.bfloat16
        full = (hidden_BTD.float() @ model.lm_head.weight.bfloat16().float().T).log_softmax(-1)
    expected = full[:, :-1].gather(-1, batch.tokens_BT[:, 1:, None]).squeeze(-1) * batch.mask_BT[:, 1:]
    torch.testing.assert_close(found[:, 1:], expected, atol=1e-5, rtol=1e-5)


def test_minibatches_are_steps_of_their_own_on_the_same_samples(training):
    config = training(minibatches=3, optimizer={"lr": 0.01})
    model, reference, trajectories = sampled(config)
    assert len(pack(trajectories, config.sequence_length)) >= 3
    assert len(recorded(model, reference, trajectories, config)[1]) == 3
    optimizer = Optimizer(model, config.optimizer)
    logged, _ = rl.update_policy(model, reference, optimizer, trajectories, config, 0, ALONE)
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
