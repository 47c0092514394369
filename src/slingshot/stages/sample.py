"""Rejection sampling: many responses to train problems, keep what the verifier accepts, drop duplicates (arXiv 2501.12948, 2.3.3).

The artifact is a dataset, data.jsonl: {"prompt", "reasoning", "answer", "task", "key"} a line.

    slingshot sample --config sample.toml --out runs/samples
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_jsonl
from slingshot.base.progress import Progress
from slingshot.checkpoint.hub import locate
from slingshot.cost.flops import generation_flops
from slingshot.engine.engine import Engine
from slingshot.machine.precision import Dtype, compute_dtype, peak
from slingshot.rollout.rollout import PromptForm, roll_out
from slingshot.rollout.sampling import MOVED_TO_SAMPLING, SamplingConfig
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item, TaskMix
from slingshot.tasks.task import Problem, Task
from slingshot.training.checkpointer import Workspace
from slingshot.training.parallel import Parallel

kind = "sample"


class SampleConfig(StageConfig):
    """`per_problem` caps how many different accepted responses to one problem are kept."""

    moved: ClassVar[dict[str, str]] = MOVED_TO_SAMPLING

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
    save_seconds: float = 30.0


def run(config: SampleConfig, out: Path) -> None:
    """Sample from `config.model` and write a dataset to `out`; resumes from `out.partial`."""
    parallel = Parallel.start(config.threads)
    source = locate(config.model)
    work = Workspace(out, kind, config, [source], parallel, config.save_seconds, peak(config.dtype))
    engine = Engine.load(source, dtype=compute_dtype(config.dtype), device=parallel.device)
    items = _items(config)
    params = config.sampling.params(config.samples, config.seed)
    saved = work.load()
    rows: list[dict[str, Any]] = saved.info["rows"] if saved else []
    chunks = [items[i : i + config.chunk] for i in range(0, len(items), config.chunk)]

    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"rows": rows}

    with Progress(out.name, len(chunks), saved.step if saved else 0, parallel.is_first) as progress:
        for step in range(saved.step if saved else 0, len(chunks)):
            flops_before = work.meter.flops
            groups = roll_out(engine, chunks[step][parallel.rank :: parallel.world], params, config.form)
            found = []
            for group in groups:
                good = [
                    r
                    for r in group
                    if r.accuracy == 1.0 and r.format == 1.0 and (r.language == 1.0 or not config.language)
                ]
                texts = [(r.reasoning.strip(), r.answer.strip()) for r in good]
                kept = _rows(group[0].task, group[0].problem, texts, config)
                found.append((kept, sum(r.accuracy == 1.0 for r in group) / len(group)))
                counts = [len(r.completion_ids) for r in group]
                work.meter.add(
                    sum(counts), sampling=generation_flops(engine.model.config, len(group[0].prompt_ids), counts)
                )
            found = parallel.gather(found)
            rows += [row for kept, _ in found for row in kept]
            pass_rate = sum(share for _, share in found) / max(1, len(found))
            tokens = sum(len(r.completion_ids) for group in groups for r in group)
            work.log({"step": step + 1, "pass_rate": pass_rate, "kept": len(rows), **work.speed(tokens, flops_before)})
            progress.update(step + 1, **{"pass": pass_rate, "kept": len(rows)})
            work.keep(step + 1, state)
    if not rows:
        raise SlingshotError(
            f"{config.model} solved none of {len(items)} problems in format; train it further or take easier problems"
        )
    work.finish(
        lambda folder: write_jsonl(folder / "data.jsonl", rows), {"examples": len(rows), "problems": len(items)}
    )
    parallel.stop()


def _items(config: SampleConfig) -> list[Item]:
    return TaskMix(config.tasks, "train", f"sample/{config.seed}", repeat=False).draw(0, config.problems)


def _rows(task: Task, problem: Problem, texts: Sequence[tuple[str, str]], config: SampleConfig) -> list[dict[str, Any]]:
    """Lines of the dataset from accepted responses to a problem, reasoning and answer: the first of every reasoning."""
    first: dict[str, str] = {}
    for reasoning, answer in texts:
        first.setdefault(reasoning, answer)
    kept = list(first.items())[: config.per_problem]
    return [
        {"prompt": problem.prompt, "reasoning": r, "answer": a, "task": task.name, "key": problem.key} for r, a in kept
    ]
