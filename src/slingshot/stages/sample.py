"""Rejection sampling: many responses to problems, those the verifier accepts are kept (arXiv 2501.12948, 2.3.3).

The artifact is a dataset, data.jsonl: {"prompt", "reasoning", "answer", "task", "key"} a line. Of a task of several
turns a line is the trajectory: {"messages", "tools", "ids", "mask", "tokenizer", "task", "key"}.

    slingshot sample --config sample.toml --out runs/samples
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_jsonl
from slingshot.base.progress import Progress
from slingshot.engine.engine import Engine
from slingshot.machine.device import Dtype
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler, Sampler, SamplingConfig
from slingshot.rollout.trajectory import Trajectory, Turn, sampling_cost
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item, TaskMix
from slingshot.tasks.verification import VerificationPool
from slingshot.training.checkpointer import Checkpointer
from slingshot.training.interrupts import Interrupts
from slingshot.training.parallel import Parallel


class SampleConfig(StageConfig):
    """`per_problem` caps how many different accepted responses to one problem are kept."""

    model: str
    tasks: list[TaskConfig] = Field(min_length=1)
    form: PromptForm = PromptForm()
    problems: int = Field(1000, ge=1)
    samples: int = Field(4, ge=1)
    per_problem: int = Field(1, ge=1)
    language: bool = True  # keep only responses wholly in the problem's language
    sampling: SamplingConfig = SamplingConfig()
    chunk: int = Field(64, ge=1)  # problems between two chances to stop
    dtype: Dtype = "auto"

    def draw(self) -> list[Item]:
        """The problems that are put to the model; fewer than `problems` where the tasks have no more."""
        return TaskMix(self.tasks, "train", f"sample/{self.seed}", repeat=False).draw(0, self.problems)


def run(config: SampleConfig, out: Path, sampler: Sampler | None = None) -> None:
    """Sample from `config.model`, in process or by `sampler`, and write a dataset to `out`; resumes."""
    with Parallel.start() as parallel, Checkpointer(out, "sample", config, parallel) as work:
        items = config.draw()
        tasks = {item.task.name: item.task for item in items}
        source = work.reads[config.model]
        sampler = sampler or EngineSampler(Engine.load(source, dtype=work.dtype, device=parallel.device))
        params = config.sampling.params(config.samples, config.seed)
        pool = VerificationPool(list(tasks.values()))
        rollout = Rollout(sampler, params, config.form, pool, parallel)
        digest = sampler.tokenizer.digest
        saved = work.load()
        rows: list[dict[str, Any]] = saved.info.get("rows", [])
        chunks = [items[i : i + config.chunk] for i in range(0, len(items), config.chunk)]

        showing = Progress(out.name, len(chunks), saved.step, parallel.is_first)
        with pool, Interrupts() as interrupts, showing as progress:
            for step in range(saved.step, len(chunks)):
                groups = rollout.run(chunks[step])
                tokens, flops = sampling_cost(sampler.model_config, groups)
                work.meter.add(tokens, sampling=flops)

                right = [[trajectory.scores["accuracy"] == 1.0 for trajectory in group] for group in groups]
                found = parallel.gather(
                    [[accepted(group, config, digest), r] for group, r in zip(groups, right, strict=True)]
                )
                rows.extend(row for lines, _ in found for row in lines)
                pass_rate = sum(sum(each) / len(each) for _, each in found) / max(1, len(found))
                logged = {"step": step + 1, "pass_rate": pass_rate, "kept": len(rows), **rollout.counts}
                work.log({**logged, **work.speed(tokens)})
                progress.update(step + 1, **{"pass": pass_rate, "kept": len(rows)})
                work.keep(step + 1, lambda: ({}, {"rows": rows}), stop=interrupts.asked)
        rollout.refuse_nothing()
        if not rows:
            way_out = "train it further or take easier ones"
            raise SlingshotError(f"{config.model} solved none of {len(items)} problems in format; {way_out}")
        extra = {"examples": len(rows), "problems": len(items)}
        work.finish(lambda folder: write_jsonl(folder / "data.jsonl", rows), extra)


def accepted(group: Sequence[Trajectory], config: SampleConfig, tokenizer: str) -> list[dict[str, Any]]:
    """Lines of the dataset from the responses to a problem: the first of every reasoning, right and in format.

    tokenizer: the digest of the one whose ids the trajectories hold.
    """
    first: dict[tuple[str, ...], Trajectory] = {}
    for trajectory in group:
        scores = trajectory.scores
        if scores["accuracy"] == scores["format"] == 1.0 and (scores["language"] == 1.0 or not config.language):
            before = [turn.parsed.answer for turn in trajectory.turns[:-1]]
            first.setdefault((*map(_thought, trajectory.turns), *before), trajectory)
    item = group[0].item
    line = _turns if item.task.has_turns else _single
    named = {"task": item.task.name, "key": item.problem.key}
    return [line(trajectory, tokenizer) | named for trajectory in list(first.values())[: config.per_problem]]


def _thought(turn: Turn) -> str:
    called = [f"{call.name} {call.arguments}" for call in turn.calls]
    return "\n".join([(turn.parsed.reasoning or "").strip(), *called])


def _single(trajectory: Trajectory, _: str) -> dict[str, Any]:
    said, prompt = trajectory.response, trajectory.item.problem.prompt
    return {"prompt": prompt, "reasoning": (said.reasoning or "").strip(), "answer": said.answer.strip()}


def _turns(trajectory: Trajectory, tokenizer: str) -> dict[str, Any]:
    """The chat with its reasoning, and the ids as they were sampled: learnt by a model of the same tokenizer."""
    turns = iter(trajectory.turns)
    messages = [
        {**message, "reasoning_content": next(turns).parsed.reasoning} if message["role"] == "assistant" else message
        for message in trajectory.messages
    ]
    sampled = {"ids": trajectory.ids, "mask": trajectory.mask, "tokenizer": tokenizer}
    return {"messages": messages, "tools": list(trajectory.item.task.tools), **sampled}
