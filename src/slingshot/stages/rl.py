"""Reinforcement learning with rewards a program can check: GRPO (arXiv 2402.03300) as R1 uses it (2501.12948).

Every step draws problems, samples a group of responses to each, scores them, and moves the policy towards those above
their group's mean: clipped ratio, k3 KL to a reference that is replaced now and then, no reward model, no critic.
`loss.name` is which paper's loss (docs/rl.md). With `loss.kl` 0 there is no reference, neither in memory nor in time
(arXiv 2503.14476, 2.3, leaves it out).

    slingshot rl --config rl.toml --out runs/zero
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.progress import Progress
from slingshot.checkpoint.frozen import load_frozen
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.flops import forward_flops, training_parts
from slingshot.engine.sampling import SamplingParams
from slingshot.machine.device import Dtype
from slingshot.model.stored import holds_stored
from slingshot.model.transformer import Transformer
from slingshot.rollout.ahead import RolloutsAhead
from slingshot.rollout.curriculum import Curriculum
from slingshot.rollout.reward import RewardWeights, assign_advantages, assign_rewards, has_signal
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler, Sampler, SamplingConfig
from slingshot.rollout.trajectory import Trajectory, pack, row_shape, sampling_cost
from slingshot.rollout.vllm import NoServerLeft, VllmSampler
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.verification import VerificationPool
from slingshot.training.checkpointer import Checkpointer, Named, restore
from slingshot.training.interrupts import Interrupts
from slingshot.training.language_model import MemoryConfig, add_loads, busiest
from slingshot.training.lora import LoRAConfig, add_lora, merged, twin
from slingshot.training.optimizer import Optimizer, OptimizerConfig, schedule, update_router_biases
from slingshot.training.parallel import Parallel
from slingshot.training.policy import (
    LOGGED_PER_TOKEN,
    DocumentSizes,
    PolicyLoss,
    policy_step,
    trainer_logprobs,
    trains_mtp,
)

COLLAPSED = 0.05  # of the first step's entropy
WAIT = 2.0  # seconds until servers are asked again whether they take weights


class RLConfig(StageConfig):
    """`max_flops` ends training once this stage has spent as many (sampling included). `rollouts`: addresses of vLLM
    servers that sample in the place of this process. `staleness`: updates that a step's samples may be behind its
    weights; they are made beside the updates then, `partial` ones go on with newer weights."""

    without_effect: ClassVar[frozenset[str]] = StageConfig.without_effect | {"rollouts"}

    model: str
    tasks: list[TaskConfig] = Field(min_length=1)
    form: PromptForm = PromptForm()
    rewards: RewardWeights = RewardWeights()
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(16, ge=2)
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", lr=1e-4, warmup=0.0, decay=0.0, weight_decay=0.0)
    loss: PolicyLoss = PolicyLoss()
    lora: LoRAConfig | None = None
    minibatches: int = Field(1, ge=1)
    micro_batch_size: int = Field(32, ge=1)
    memory: MemoryConfig = MemoryConfig()
    expert_parallel: int = Field(1, ge=1)
    rollouts: list[str] = []
    staleness: int = Field(0, ge=0, le=16)
    partial: bool = False
    sequence_length: int = Field(256, ge=8)
    bias_update_speed: float = Field(0.0, ge=0)
    refill: int = Field(0, ge=0, le=100)
    retire: float = Field(0.0, ge=0, le=1)
    max_flops: float | None = Field(None, gt=0)
    dtype: Dtype = "auto"

    @property
    def compares_trainer(self) -> bool:
        """Whether logprobs before the update take a pass of their own: the only update's own pass has them, too."""
        return self.loss.importance != "none" and self.minibatches > 1

    @field_validator("rollouts")
    @classmethod
    def _addresses(cls, rollouts: list[str]) -> list[str]:
        for url in rollouts:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r:.80} is no server's address: write http://HOST:PORT")
        if len(set(rollouts)) < len(rollouts):
            raise ValueError("a server is named twice")
        return rollouts

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sampling.temperature == 0 or self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ValueError("sampling: rl trains the whole distribution; leave top_p 1, top_k 0, temperature above 0")
        if self.rewards.overlong_buffer > self.sampling.max_tokens:
            raise ValueError("rewards.overlong_buffer: it is more than sampling.max_tokens; make it smaller")
        if self.partial and not self.staleness:
            raise ValueError("partial: responses last beyond an update only with staleness; set it, or leave it out")
        if self.lora is not None and self.bias_update_speed:
            raise ValueError("bias_update_speed: with lora the base is frozen, its router biases too; leave it out")
        return self


def run(config: RLConfig, out: Path, sampler: Sampler | None = None) -> None:
    """Train `config.model`, sampling in process or by `sampler`, and write a checkpoint to `out`; resumes."""
    with Parallel.start(config.expert_parallel) as parallel, Checkpointer(out, "rl", config, parallel) as work:
        if config.rewards.length and config.loss.advantage_std == "group" and parallel.is_first:
            cancelled = "where a whole group is right, division by its std leaves nothing of rewards.length"
            print(f'{out.name}: {cancelled}; set loss.advantage_std = "none"', file=sys.stderr)
        tasks, source = TaskMix(config.tasks, "train", f"rl/{config.seed}"), work.reads[config.model]
        load = load_model if config.lora is None else load_frozen
        model, tokenizer = load(source, device=parallel.device), load_tokenizer(source)
        reference = reference_of(config, model, source, parallel)
        passed = add_lora(model, config.lora, config.seed, parallel)
        params = sampling_of(config, model)
        if sampler is None and config.rollouts:
            probes = [(item, config.form.encode(tokenizer, item.problem, item.task.tools)) for item in tasks.draw(0, 8)]
            where = work.folder / "weights"
            sampler = VllmSampler(config.rollouts, model, tokenizer, where, probes, params, parallel)
        if sampler is None:
            alone = parallel.mesh is None and not config.staleness
            sampler = EngineSampler.beside(model, tokenizer, work.dtype, alone)
        pool = VerificationPool(tasks.tasks, batches=1 + config.staleness)
        rollout = Rollout(sampler, params, config.form, pool, parallel)
        parallel.shard(model)
        for network in (model, reference):
            if network is not None:
                network.compute_dtype = work.dtype
                config.memory.apply(network)
        moving = reference if config.lora is None else None
        optimizer = Optimizer(model, config.optimizer)
        saved = work.load()
        restore(saved, model, optimizer, moving)

        done, info = saved.step, saved.info
        place = info.get("drawn", done * config.prompts_per_step)
        curriculum = Curriculum(tasks, config.retire, place, info.get("retired", ()))
        entropy = EntropyWatch(info.get("entropy"))

        def state() -> Named:
            tensors, _ = work.training_state(model, optimizer, moving)
            return tensors, {**batches.state(), "entropy": entropy.first}

        def keep(step: int) -> None:
            work.keep(step, state, stop=interrupts.asked)

        batches = RolloutsAhead(rollout, curriculum, config.prompts_per_step, config.staleness, config.partial)
        showing = Progress(out.name, config.steps, done, parallel.is_first)
        with pool, batches, Interrupts() as interrupts, showing as progress:
            for step in range(done, config.steps):
                spent = 0.0
                if config.max_flops is not None:
                    spent = parallel.sums({"flops": work.meter.flops})["flops"] / config.max_flops
                    progress.total = min(config.steps, max(step + 1, round(step / spent))) if spent else config.steps
                if spent >= 1:
                    break
                if moving is not None and step and step % config.loss.reference_steps == 0:
                    moving.load_state_dict(model.state_dict())

                pushed = hand_over(batches, step, model, keep)
                batches.begin(step, config.steps)
                groups, left_out = collect(batches, config, step)
                while config.rollouts and left_out["aborted"]:  # no server was left before all samples were made
                    batches.put_back(step)
                    pushed = hand_over(batches, step, model, keep)
                    groups, left_out = collect(batches, config, step)
                curriculum.note(groups, parallel)
                # What could not be verified is in no group's mean and moves nothing: its 0 is the verifier's failure.
                signals = [[each for each in group if each.verified] for group in groups if has_signal(group)]
                assign_advantages(signals, config.loss.advantage_std, parallel)
                kept = [
                    each for group in signals for each in group if not (config.loss.mask_truncated and each.cut_off)
                ]
                update, sizes = update_policy(model, reference, optimizer, kept, config, step, parallel)

                tokens = account(work, model, config, groups, sizes, passed)
                row = summary(groups, parallel, calls=any(task.tools for task in tasks.tasks))
                speed = work.speed(int(parallel.sums({"tokens": tokens})["tokens"]))
                lr = config.optimizer.lr * schedule(config.optimizer, step, config.steps)
                stale = {"staleness": step - batches.version} if config.staleness else {}
                work.log({"step": step + 1, **row, **update, **left_out, **pushed, **stale, "lr": lr, **speed})
                entropy.watch(update.get("entropy"), parallel.is_first)
                shown = {"reward": row["reward"], "pass": row["pass_rate"], "length": row["response_tokens"]}
                shown |= {"calls": row["calls"]} if "calls" in row else {}
                progress.update(step + 1, **shown, **{"tokens/s": speed["tokens_per_second"]})
                keep(step + 1)

        rollout.refuse_nothing()
        if entropy.first is None and parallel.is_first:  # no step had an update
            alike = "in no group did rewards differ, so nothing was learned"
            print(f"{out.name}: {alike}; try other problems, larger groups, or more sft before", file=sys.stderr)
        work.finish_checkpoint(model, tokenizer, source)


def reference_of(config: RLConfig, model: Transformer, source: Path, parallel: Parallel) -> Transformer | None:
    """What `loss.kl` is measured to; with adapters the frozen base itself, or, of several ranks, one of their own."""
    if not config.loss.kl:
        return None
    separate = config.lora is None or parallel.mesh is not None
    return load_model(source, device=parallel.device, shard=parallel.shard) if separate else twin(model)


def sampling_of(config: RLConfig, model: Transformer) -> SamplingParams:
    """A group's sampling. Raises SlingshotError for what this model cannot be asked for."""
    params = config.sampling.params(config.group_size, config.seed)
    if config.loss.replay_routing:
        if not model.config.n_moe_layers:
            raise SlingshotError("loss.replay_routing: this model has no experts; leave it out")
        params = replace(params, routed_experts=True)
    if holds_stored(model) and (key := "rollouts" if config.rollouts else "staleness" if config.staleness else ""):
        raise SlingshotError(f"{key}: samples come from this base of few bits where it is trained; leave it out")
    return params


def account(
    work: Checkpointer,
    model: Transformer,
    config: RLConfig,
    groups: Sequence[Sequence[Trajectory]],
    sizes: DocumentSizes,
    passed: float | None,
) -> int:
    """Add a step's FLOPs to the receipt, `passed` of them as adapters pass them; the tokens sampled."""
    tokens, flops = sampling_cost(model.config, groups)
    again = forward_flops(model.config, sizes.lengths, before=sizes.before) if config.loss.kl else 0.0
    if config.compares_trainer:
        again += forward_flops(model.config, sizes.lengths, False, passed or 0.0, sizes.before)
    parts = training_parts(model.config, sizes.lengths, config.loss.mtp > 0, passed, sizes.before)
    work.meter.add(tokens, sampling=flops, reference=again, **parts)
    return tokens


def hand_over(batches: RolloutsAhead, step: int, model: Transformer, keep: Callable[[int], None]) -> dict[str, float]:
    """Give the sampler the weights of a step. While no server takes them this waits, saves, and stops where asked."""
    told = False
    while True:
        batches.wait()
        try:
            return batches.rollout.sampler.update_weights(step, merged(model))
        except NoServerLeft as error:
            if not told:
                print(f"{error}; waiting for one", file=sys.stderr)
            told = True
        keep(step)
        time.sleep(WAIT)


def collect(batches: RolloutsAhead, config: RLConfig, step: int) -> tuple[list[list[Trajectory]], Counter[str]]:
    """The step's groups with their rewards, and counts of what was left out.

    In place of groups without a signal others are drawn, `refill` times at most (arXiv 2503.14476, 3.2, has no end).
    """
    groups: list[list[Trajectory]] = []
    left_out, lacking = Counter[str](), config.prompts_per_step
    for turn in range(1 + config.refill):
        found = batches.more(lacking) if turn else batches.take()
        assign_rewards(found, config.rewards, f"{config.seed}/{step}", config.sampling.max_tokens)
        groups += found
        left_out += batches.rollout.counts
        with_signal = batches.rollout.parallel.sums({"groups": sum(has_signal(group) for group in groups)})["groups"]
        lacking = config.prompts_per_step - round(with_signal)
        if lacking <= 0 or left_out["aborted"]:
            break
    return groups, left_out


def update_policy(
    model: Transformer,
    reference: Transformer | None,
    optimizer: Optimizer,
    trajectories: Sequence[Trajectory],
    config: RLConfig,
    step: int,
    parallel: Parallel,
) -> tuple[dict[str, Any], DocumentSizes]:
    """One pass over the trajectories in `minibatches` optimizer steps; what is logged, if any has a signal, and the
    sizes of this rank's documents."""
    loss, own = config.loss, 2 if trains_mtp(model, config.loss) else 1
    given = config.sequence_length, config.micro_batch_size
    length, micro_batch_size = row_shape(trajectories, *given, parallel, own, config.minibatches)
    packed = pack(trajectories, length, loss.aggregation, config.sampling.max_tokens, own)
    batch = packed.to(parallel.device)
    if loss.replay_routing and len(batch) and batch.replayed_BTLk is None:
        raise SlingshotError("loss.replay_routing: this sampler tells of no experts; leave it out")
    n_rows = parallel.max(len(batch))
    if n_rows == 0:
        return {}, packed.sizes()
    size = -(-n_rows // config.minibatches)
    sizes = config.sampling.temperature, micro_batch_size
    if config.compares_trainer:
        batch.trainer_BT = trainer_logprobs(model, batch, n_rows, *sizes)
    totals: dict[str, float] = {}
    load_LE: list[Tensor] = []
    norms = []
    for start in range(0, n_rows, size):
        part, rows = batch[start : start + size], min(size, n_rows - start)
        sums, loads = policy_step(model, reference, part, rows, loss, *sizes, parallel)
        norms.append(optimizer.step(schedule(config.optimizer, step, config.steps)))
        loads = [parallel.sum(load) for load in loads]
        if config.bias_update_speed:
            update_router_biases(model, loads, config.bias_update_speed)
        load_LE = add_loads(load_LE, loads)
        totals = {name: totals.get(name, 0.0) + value for name, value in parallel.sums(sums).items()}
    logged: dict[str, Any] = {"loss": totals["loss"] / totals["units"]}
    logged |= {name: totals[name] / totals["tokens"] for name in LOGGED_PER_TOKEN}
    logged["gradient_norm"] = max(norms)
    if totals["mtp_loss"]:
        logged["mtp_loss"] = totals["mtp_loss"] / totals["far"]
    if load_LE:
        logged["expert_load"] = busiest(load_LE)
    return logged, packed.sizes()


@dataclass
class EntropyWatch:
    """Says once, in a line, that the policy has become nearly certain: samples alike teach nothing more."""

    first: float | None  # nats per token at the first step
    told: bool = False

    def watch(self, entropy: float | None, speaks: bool) -> None:
        if entropy is None:
            return
        if self.first is None:
            self.first = entropy
        if entropy < COLLAPSED * self.first and not self.told:
            self.told = True
            if speaks:
                fell = f"entropy fell from {self.first:.3g} to {entropy:.2g} nats a token"
                print(f"{fell}: samples are alike; try a higher loss.clip_high, or a lower rate", file=sys.stderr)


def summary(groups: Sequence[Sequence[Trajectory]], parallel: Parallel, calls: bool = False) -> dict[str, float]:
    """Means over the global step's trajectories, and over its groups, as they are logged; `calls` of tools if asked."""
    each = [trajectory for group in groups for trajectory in group]
    scores = {"pass_rate": "accuracy", "format": "format", "language": "language"}
    scores |= {"calls": "calls"} if calls else {}
    sums = {
        "reward": sum(t.reward for t in each),
        **{name: sum(t.scores.get(score, 0.0) for t in each) for name, score in scores.items()},
        "response_tokens": sum(sum(t.mask) for t in each),
        "no_signal": sum(not has_signal(group) for group in groups),
    }
    total = parallel.sums({**sums, "each": len(each), "groups": len(groups)})
    return {name: total[name] / max(1.0, total["groups" if name == "no_signal" else "each"]) for name in sums}
