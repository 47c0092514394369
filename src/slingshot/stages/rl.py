"""Reinforcement learning with rewards a program can check: GRPO (arXiv 2402.03300) as R1-Zero and R1 use it (2501.12948).

Every step draws problems, samples a group of responses to each through the engine, scores them, and moves the policy towards those
above their group's mean: clipped ratio, k3 KL to a reference that is replaced now and then, no reward model, no critic.

    slingshot rl --config rl.toml --out runs/zero
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from slingshot.config import Strict, TaskConfig
from slingshot.cost.flops import forward_flops, generation_flops, training_flops
from slingshot.data.packing import pack_examples
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.model.checkpoint import load_model, load_tokenizer, save_checkpoint
from slingshot.model.transformer import Transformer
from slingshot.rollout import PromptForm, Rollout, TaskMix, roll_out
from slingshot.training.language_model import Rows, add_loads
from slingshot.training.objectives import cross_entropy, group_advantages, grpo, mtp_targets, next_token_targets, token_logprobs
from slingshot.training.optimizer import Optimizer, OptimizerConfig, schedule, update_router_biases
from slingshot.training.parallel import Parallel, gathered, load_gathered
from slingshot.training.precision import Dtype, compute_dtype, peak
from slingshot.training.progress import Progress
from slingshot.training.workspace import Workspace, restore, training_state

kind = "rl"


class RewardWeights(Strict):
    """What a response earns: each score in [0, 1] times its weight. `random` is the control: a coin instead of the accuracy and format."""

    accuracy: float = 1.0
    format: float = 0.2
    language: float = 0.0
    random: bool = False


class Config(OptimizerConfig):
    """`max_flops` ends training once this stage has spent as many (sampling included)."""

    model: str
    tasks: list[TaskConfig]
    form: PromptForm = PromptForm()
    rewards: RewardWeights = RewardWeights()
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(16, ge=2)
    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)
    optimizer: Any = "adamw"
    lr: float = Field(1e-4, gt=0)
    warmup: float = 0.0
    decay: float = 0.0
    weight_decay: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.28  # arXiv 2503.14476, 3.1
    kl: float = 1e-3  # arXiv 2501.12948
    reference_steps: int = Field(400, ge=1)
    normalize_std: bool = True
    minibatches: int = Field(1, ge=1)
    sequence_length: int = Field(256, ge=8)
    micro_batch_size: int = Field(32, ge=1)
    mtp: float = 0.1
    bias_update_speed: float = 0.0
    max_flops: float | None = None
    dtype: Dtype = "auto"
    save_seconds: float = 60.0


def run(config: Config, out: Path) -> None:
    """Train `config.model` by GRPO and write a checkpoint to `out`; resumes from `out.partial`."""
    parallel = Parallel.start(config.threads)
    work = Workspace(out, kind, config, [Path(config.model)], parallel, config.save_seconds, peak(config.dtype))
    tasks = TaskMix(config.tasks)
    model, reference, tokenizer = load_model(config.model), load_model(config.model), load_tokenizer(config.model)
    dtype = compute_dtype(config.dtype)
    engine = Engine(model, tokenizer, dtype=dtype)
    for network in (model, reference):
        network.to(parallel.device).compute_dtype = dtype
        parallel.shard(network)
    optimizer = Optimizer(model, config)
    saved = work.load()
    if saved:
        restore(saved, model, optimizer)
        load_gathered(reference, saved.group("reference"))
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, n=config.group_size, seed=config.seed)

    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, info = training_state(model, optimizer)
        return tensors | {f"reference/{name}": tensor for name, tensor in gathered(reference).items()}, info

    with Progress(out.name, config.steps, saved.step if saved else 0, parallel.is_first) as progress:
        for step in range(saved.step if saved else 0, config.steps):
            if config.max_flops is not None and float(parallel.sum(work.meter.flops)) >= config.max_flops:
                break
            if step % config.reference_steps == 0 and step > 0:
                load_gathered(reference, gathered(model))
            flops_before = work.meter.flops

            engine.update_weights(gathered(model))
            items = tasks.draw("train", f"{config.seed}/{step}", config.prompts_per_step)[parallel.rank :: parallel.world]
            groups = roll_out(engine, items, params, config.form)
            score(groups, config, step)
            kept = [rollout for group in groups if len({rollout.reward for rollout in group}) > 1 for rollout in group]
            update = _update(model, reference, optimizer, kept, config, step, parallel)
            work.check(step + 1, **{name: update.logged[name] for name in ("loss", "gradient_norm") if name in update.logged})

            _count(work, model, groups, kept, config)
            row = {"step": step + 1, **_summary(groups, parallel), **update.logged}
            speed = work.speed(row.pop("tokens"), flops_before)
            work.log({**row, "lr": config.lr * schedule(config, step, config.steps), **speed})
            shown = {"reward": row["reward"], "pass": row["pass_rate"], "length": row["response_tokens"], "tokens/s": speed["tokens_per_second"]}
            progress.update(step + 1, **shown)
            work.keep(step + 1, state)

    weights = gathered(model)
    work.finish(lambda folder: save_checkpoint(folder, model, tokenizer, weights))
    parallel.stop()


def score(groups: Sequence[Sequence[Rollout]], config: Config, step: int) -> None:
    """Give every rollout its reward, and its advantage within its group."""
    weights = config.rewards
    for group in groups:
        coin = random.Random(f"{config.seed}/{step}/{group[0].problem.key}")
        for rollout in group:
            if weights.random:
                rollout.reward = float(coin.random() < 0.5)
            else:
                rollout.reward = weights.accuracy * rollout.accuracy + weights.format * rollout.format + weights.language * rollout.language
        advantages = group_advantages(torch.tensor([rollout.reward for rollout in group]), config.normalize_std)
        for rollout, advantage in zip(group, advantages.tolist(), strict=True):
            rollout.advantage = advantage


@dataclass
class _Update:
    """What the update of one step logged."""

    logged: dict[str, Any] = field(default_factory=dict)


def _pack(rollouts: Sequence[Rollout], length: int) -> tuple[Rows, Tensor, Tensor]:
    """Rows of the rollouts, with advantage and sampler logprob of every completion token in its place."""
    examples = [(r.prompt_ids + r.completion_ids, [0] * len(r.prompt_ids) + [1] * len(r.completion_ids)) for r in rollouts]
    packed = pack_examples(examples, max(length, *(len(ids) for ids, _ in examples)) if examples else length)
    advantages_BT, logprobs_BT = (np.zeros(packed.tokens_NT.shape, dtype=np.float32) for _ in range(2))
    for rollout, (row, start) in zip(rollouts, packed.placement, strict=True):
        places = slice(start + len(rollout.prompt_ids), start + len(rollout.prompt_ids) + len(rollout.completion_ids))
        advantages_BT[row, places] = rollout.advantage
        logprobs_BT[row, places] = rollout.logprobs
    return Rows.from_numpy(packed.tokens_NT, packed.segments_NT, packed.mask_NT), torch.from_numpy(advantages_BT), torch.from_numpy(logprobs_BT)


def _update(
    model: Transformer, reference: Transformer, optimizer: Optimizer, rollouts: Sequence[Rollout], config: Config, step: int, parallel: Parallel
) -> _Update:
    """One pass over the rollouts in `minibatches` optimizer steps."""
    rows, advantages_BT, sampler_BT = _pack(rollouts, config.sequence_length)
    n_rows = parallel.max(len(rows.tokens_BT))  # ranks hold different numbers of rows: all take as many, the missing ones empty
    if n_rows == 0:
        return _Update()
    size = -(-n_rows // config.minibatches)
    totals = dict.fromkeys(("loss", "kl", "clipped", "entropy", "gap", "mtp_loss", "tokens_seen", "far"), 0.0)
    load_LE: list[Tensor] = []
    norms = []
    with_mtp = model.config.num_nextn_predict_layers > 0 and config.mtp > 0
    for start in range(0, n_rows, size):
        batch = rows[start : start + size]
        counts = parallel.sums({"tokens": float(batch.weights_BT.sum()), "far": float(_far(batch)[1].sum())})
        batch_load: list[Tensor] = []
        for inner in range(start, min(start + size, n_rows), config.micro_batch_size):
            part = slice(inner, min(inner + config.micro_batch_size, start + size))
            micro = _padded(rows[part])
            targets_BT, weights_BT = next_token_targets(micro.tokens_BT, micro.segments_BT, micro.weights_BT)
            chosen_N = weights_BT.flatten().nonzero().squeeze(1)
            targets_N = targets_BT.flatten()[chosen_N]

            def shifted(values_BT: Tensor, part: slice = part, chosen_N: Tensor = chosen_N) -> Tensor:
                return values_BT[part].roll(-1, dims=1).flatten()[chosen_N] if len(values_BT[part]) else values_BT.new_zeros(0)

            with torch.no_grad():
                hidden_BTD = reference(micro.tokens_BT, segments_BT=micro.segments_BT, logits=False).hidden_BTD
                chosen_ND = hidden_BTD.flatten(0, 1).index_select(0, chosen_N)
                reference_N, _ = token_logprobs(reference.lm_logits(chosen_ND), targets_N, config.temperature)
            output = model(micro.tokens_BT, segments_BT=micro.segments_BT, logits=False, mtp=with_mtp, detach_mtp=True)
            chosen_ND = output.hidden_BTD.flatten(0, 1).index_select(0, chosen_N)
            logprobs_N, entropy_N = token_logprobs(model.lm_logits(chosen_ND), targets_N, config.temperature)
            sampler_N = shifted(sampler_BT)
            ones_N = torch.ones_like(logprobs_N)
            terms = grpo(logprobs_N, sampler_N, shifted(advantages_BT), ones_N, reference_N, config.clip_low, config.clip_high, config.kl)
            loss = terms.loss / max(counts["tokens"], 1.0)
            if output.mtp_hidden_BTD is not None:
                far_targets, far_weights = _far(micro)
                far_N = far_weights.flatten().nonzero().squeeze(1)
                far_logits = model.lm_logits(output.mtp_hidden_BTD.flatten(0, 1).index_select(0, far_N), detach_head=True)
                far_loss = cross_entropy(far_logits, far_targets.flatten()[far_N])
                loss = loss + config.mtp * far_loss / max(counts["far"], 1.0)
                totals["mtp_loss"] += float(far_loss.detach())
            (loss * parallel.world).backward()
            batch_load = add_loads(batch_load, output)
            totals["loss"] += float(terms.loss.detach())
            totals["kl"] += float(terms.kl)
            totals["clipped"] += float(terms.clipped)
            totals["entropy"] += float(entropy_N.sum())
            totals["gap"] += float((logprobs_N.detach() - sampler_N).abs().sum())
        totals["tokens_seen"] += float(batch.weights_BT.sum())
        totals["far"] += float(_far(batch)[1].sum())
        norms.append(optimizer.step(schedule(config, step, config.steps)))
        batch_load = [parallel.sum(load) for load in batch_load]
        if config.bias_update_speed and batch_load:
            update_router_biases(model, batch_load, config.bias_update_speed)
        load_LE = [a + b for a, b in zip(load_LE, batch_load, strict=True)] if load_LE else batch_load
    total = parallel.sums(totals)
    tokens = max(total["tokens_seen"], 1.0)
    logged: dict[str, Any] = {
        "loss": total["loss"] / tokens,
        "kl": total["kl"] / tokens,
        "clip_fraction": total["clipped"] / tokens,
        "entropy": total["entropy"] / tokens,
        "logprob_gap": total["gap"] / tokens,
        "gradient_norm": max(norms),
    }
    if with_mtp:
        logged["mtp_loss"] = total["mtp_loss"] / max(total["far"], 1.0)
    if load_LE:
        logged["expert_load"] = [float(load.max() / load.mean()) for load in load_LE]
    return _Update(logged)


def _far(rows: Rows) -> tuple[Tensor, Tensor]:
    return mtp_targets(rows.tokens_BT, rows.segments_BT, rows.weights_BT)


def _padded(rows: Rows) -> Rows:
    """At least one row: a rank without rollouts left still takes part in the collective operations."""
    if len(rows.tokens_BT):
        return rows
    return Rows(*(torch.zeros(1, field.shape[1], dtype=field.dtype) for field in (rows.tokens_BT, rows.segments_BT, rows.weights_BT)))


def _count(work: Workspace, model: Transformer, groups: Sequence[Sequence[Rollout]], kept: Sequence[Rollout], config: Config) -> None:
    """Tokens and FLOPs of this step, on this rank: sampling, update, reference, MTP."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in kept]
    with_mtp = training_flops(model.config, lengths, mtp=True) if config.mtp else training_flops(model.config, lengths, mtp=False)
    update = training_flops(model.config, lengths, mtp=False)
    work.meter.add(
        sum(len(r.completion_ids) for group in groups for r in group),
        sampling=sum(generation_flops(model.config, len(group[0].prompt_ids), [len(r.completion_ids) for r in group]) for group in groups),
        training=update,
        mtp=with_mtp - update,
        reference=forward_flops(model.config, lengths),
    )


def _summary(groups: Sequence[Sequence[Rollout]], parallel: Parallel) -> dict[str, float]:
    """Means over the global step's responses, as they are logged."""
    rollouts = [rollout for group in groups for rollout in group]
    tokens = sum(len(r.completion_ids) for r in rollouts)
    total = parallel.sums(
        {
            "reward": sum(r.reward for r in rollouts),
            "pass_rate": sum(r.accuracy for r in rollouts),
            "format": sum(r.format for r in rollouts),
            "language": sum(r.language for r in rollouts),
            "response_tokens": float(tokens),
            "no_signal": float(sum(len({r.reward for r in group}) == 1 for group in groups)),
            "n": float(len(rollouts)),
            "groups": float(len(groups)),
        }
    )
    n, n_groups = max(total.pop("n"), 1.0), max(total.pop("groups"), 1.0)
    no_signal = total.pop("no_signal") / n_groups
    return {"tokens": total["response_tokens"], **{name: value / n for name, value in total.items()}, "no_signal": no_signal}
