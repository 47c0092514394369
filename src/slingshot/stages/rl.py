"""Reinforcement learning with rewards a program can check: GRPO (arXiv 2402.03300) as R1-Zero and R1 use it (2501.12948).

Every step draws problems, samples a group of responses to each through the engine, scores them, and moves the policy towards those
above their group's mean: clipped ratio, k3 KL to a reference that is replaced now and then, no reward model, no critic. With `kl` 0 there
is no reference, neither in memory nor in time (arXiv 2503.14476, 2.3, leaves it out).

    slingshot rl --config rl.toml --out runs/zero
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from slingshot.base.config import StageConfig, Strict
from slingshot.base.progress import Progress
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint
from slingshot.cost.flops import forward_flops, generation_flops, training_parts
from slingshot.data.packing import pack_examples
from slingshot.engine.engine import Engine
from slingshot.machine.precision import Dtype, compute_dtype, peak
from slingshot.model.transformer import Transformer
from slingshot.rollout.rollout import PromptForm, Rollout, roll_out
from slingshot.rollout.sampling import MOVED_TO_SAMPLING, SamplingConfig
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix
from slingshot.training.checkpointer import Workspace, restore, training_state
from slingshot.training.language_model import Rows, add_loads, busiest
from slingshot.training.objectives import group_advantages
from slingshot.training.optimizer import MOVED_TO_OPTIMIZER, Optimizer, OptimizerConfig, schedule, update_router_biases
from slingshot.training.parallel import Parallel, gathered, load_gathered
from slingshot.training.policy import GRPOConfig, PolicyRows, policy_step

kind = "rl"


class RewardWeights(Strict):
    """What a response earns: each score in [0, 1] times its weight. `random` is the control: a coin instead of the accuracy and format."""

    accuracy: float = 1.0
    format: float = 0.2
    language: float = 0.0
    random: bool = False


class RLConfig(StageConfig):
    """`max_flops` ends training once this stage has spent as many (sampling included)."""

    moved: ClassVar[dict[str, str]] = (
        MOVED_TO_OPTIMIZER | MOVED_TO_SAMPLING | {key: f"loss.{key}" for key in GRPOConfig.model_fields}
    )

    model: str
    tasks: list[TaskConfig] = Field(min_length=1)
    form: PromptForm = PromptForm()
    rewards: RewardWeights = RewardWeights()
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(16, ge=2)
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", lr=1e-4, warmup=0.0, decay=0.0, weight_decay=0.0)
    loss: GRPOConfig = GRPOConfig()
    minibatches: int = Field(1, ge=1)
    micro_batch_size: int = Field(32, ge=1)
    sequence_length: int = Field(256, ge=8)
    bias_update_speed: float = Field(0.0, ge=0)
    max_flops: float | None = Field(None, gt=0)
    dtype: Dtype = "auto"
    save_seconds: float = 60.0

    @model_validator(mode="after")
    def _samples_what_it_trains(self) -> Self:
        if self.sampling.temperature == 0 or self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ValueError("sampling: rl trains the whole distribution; leave top_p 1, top_k 0, temperature above 0")
        return self


def run(config: RLConfig, out: Path) -> None:
    """Train `config.model` by GRPO and write a checkpoint to `out`; resumes from `out.partial`."""
    parallel = Parallel.start(config.threads)
    source = locate(config.model)
    work = Workspace(out, kind, config, [source], parallel, config.save_seconds, peak(config.dtype))
    tasks = TaskMix(config.tasks, "train", f"rl/{config.seed}")
    model, tokenizer = load_model(source, device=parallel.device), load_tokenizer(source)
    reference = load_model(source, device=parallel.device, shard=parallel.shard) if config.loss.kl else None
    dtype = compute_dtype(config.dtype)
    engine = Engine(model, tokenizer, dtype=dtype)
    parallel.shard(model)
    for network in (model, reference):
        if network is not None:
            network.compute_dtype = dtype
    optimizer = Optimizer(model, config.optimizer)
    saved = work.load()
    if saved:
        restore(saved, model, optimizer)
        if reference is not None:
            load_gathered(reference, saved.group("reference"))
    params = config.sampling.params(config.group_size, config.seed)

    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, info = training_state(model, optimizer)
        if reference is not None:
            tensors |= {f"reference/{name}": tensor for name, tensor in gathered(reference).items()}
        return tensors, info

    with Progress(out.name, config.steps, saved.step if saved else 0, parallel.is_first) as progress:
        for step in range(saved.step if saved else 0, config.steps):
            if config.max_flops is not None and float(parallel.sum(work.meter.flops)) >= config.max_flops:
                break
            if reference is not None and step % config.loss.reference_steps == 0 and step > 0:
                load_gathered(reference, gathered(model))
            flops_before = work.meter.flops

            engine.update_weights(gathered(model))
            items = tasks.draw(step * config.prompts_per_step, config.prompts_per_step)[parallel.rank :: parallel.world]
            groups = roll_out(engine, items, params, config.form)
            score(groups, config, step)
            kept = [rollout for group in groups if len({rollout.reward for rollout in group}) > 1 for rollout in group]
            update = _update(model, reference, optimizer, kept, config, step, parallel)
            work.check(step + 1, **{name: update[name] for name in ("loss", "gradient_norm") if name in update})

            _count(work, model, groups, kept, config)
            row = {"step": step + 1, **_summary(groups, parallel), **update}
            speed = work.speed(row.pop("tokens"), flops_before)
            work.log({**row, "lr": config.optimizer.lr * schedule(config.optimizer, step, config.steps), **speed})
            shown = {
                "reward": row["reward"],
                "pass": row["pass_rate"],
                "length": row["response_tokens"],
                "tokens/s": speed["tokens_per_second"],
            }
            if config.max_flops is not None:
                spent = float(parallel.sum(work.meter.flops)) / config.max_flops
                progress.total = min(config.steps, max(step + 1, round((step + 1) / spent)))
            progress.update(step + 1, **shown)
            work.keep(step + 1, state)

    weights = gathered(model)
    work.finish(lambda folder: save_checkpoint(folder, model, tokenizer, weights, source=source))
    parallel.stop()


def score(groups: Sequence[Sequence[Rollout]], config: RLConfig, step: int) -> None:
    """Give every rollout its reward, and its advantage within its group."""
    weights = config.rewards
    for group in groups:
        coin = random.Random(f"{config.seed}/{step}/{group[0].problem.key}")
        for rollout in group:
            if weights.random:
                rollout.reward = float(coin.random() < 0.5)
            else:
                rollout.reward = (
                    weights.accuracy * rollout.accuracy
                    + weights.format * rollout.format
                    + weights.language * rollout.language
                )
        advantages = group_advantages(torch.tensor([rollout.reward for rollout in group]), config.loss.normalize_std)
        for rollout, advantage in zip(group, advantages.tolist(), strict=True):
            rollout.advantage = advantage


def pack(rollouts: Sequence[Rollout], length: int) -> PolicyRows:
    """Rows of the rollouts, with advantage and sampler logprob of every completion token in its place."""
    examples = [
        (r.prompt_ids + r.completion_ids, [0] * len(r.prompt_ids) + [1] * len(r.completion_ids)) for r in rollouts
    ]
    packed = pack_examples(examples, max([length, *(len(ids) for ids, _ in examples)]))
    advantages_BT, sampler_BT = (np.zeros(packed.tokens_NT.shape, dtype=np.float32) for _ in range(2))
    for rollout, (row, start) in zip(rollouts, packed.placement, strict=True):
        places = slice(start + len(rollout.prompt_ids), start + len(rollout.prompt_ids) + len(rollout.completion_ids))
        advantages_BT[row, places] = rollout.advantage
        sampler_BT[row, places] = rollout.logprobs
    rows = Rows.from_numpy(packed.tokens_NT, packed.segments_NT, packed.mask_NT)
    return PolicyRows(rows, torch.from_numpy(advantages_BT), torch.from_numpy(sampler_BT))


def _update(
    model: Transformer,
    reference: Transformer | None,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    config: RLConfig,
    step: int,
    parallel: Parallel,
) -> dict[str, Any]:
    """One pass over the rollouts in `minibatches` optimizer steps; what is logged of it, nothing if no group carried a signal."""
    batch = pack(rollouts, config.sequence_length).to(parallel.device)
    n_rows = parallel.max(len(batch.rows.tokens_BT))
    if n_rows == 0:
        return {}
    size = -(-n_rows // config.minibatches)
    totals: dict[str, float] = {}
    load_LE: list[Tensor] = []
    norms = []
    for start in range(0, n_rows, size):
        sums = policy_step(
            model,
            reference,
            batch[start : start + size],
            min(size, n_rows - start),
            config.loss,
            config.sampling.temperature,
            config.micro_batch_size,
            parallel,
        )
        norms.append(optimizer.step(schedule(config.optimizer, step, config.steps)))
        loads = [parallel.sum(load) for load in sums.load_LE]
        if config.bias_update_speed:
            update_router_biases(model, loads, config.bias_update_speed)
        load_LE = add_loads(load_LE, loads)
        totals = {name: totals.get(name, 0.0) + value for name, value in parallel.sums(sums.values).items()}
    per_token = {"loss": "loss", "kl": "kl", "clip_fraction": "clipped", "entropy": "entropy", "logprob_gap": "gap"}
    logged: dict[str, Any] = {name: totals[key] / totals["tokens"] for name, key in per_token.items()}
    logged["gradient_norm"] = max(norms)
    if totals["mtp_loss"]:
        logged["mtp_loss"] = totals["mtp_loss"] / totals["far"]
    if load_LE:
        logged["expert_load"] = busiest(load_LE)
    return logged


def _count(
    work: Workspace, model: Transformer, groups: Sequence[Sequence[Rollout]], kept: Sequence[Rollout], config: RLConfig
) -> None:
    """Tokens and FLOPs of this step, on this rank: sampling, update, reference, MTP."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in kept]
    work.meter.add(
        sum(len(r.completion_ids) for group in groups for r in group),
        sampling=sum(
            generation_flops(model.config, len(group[0].prompt_ids), [len(r.completion_ids) for r in group])
            for group in groups
        ),
        **training_parts(model.config, lengths, mtp=config.loss.mtp > 0),
        reference=forward_flops(model.config, lengths) if config.loss.kl else 0.0,
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
    return {
        "tokens": total["response_tokens"],
        **{name: value / n for name, value in total.items()},
        "no_signal": no_signal,
    }
