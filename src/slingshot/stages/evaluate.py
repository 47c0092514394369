"""Evaluation on the held-out test split: pass@1 with a bootstrap interval, pass@k, response length, format, language.

Several prompt forms can be tried; the best is reported, so that a base model is not marked down for its format.

    slingshot evaluate --config evaluate.toml --out runs/zero-evaluation
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.files import write_json
from slingshot.base.progress import Progress
from slingshot.checkpoint.hub import locate
from slingshot.cost.flops import generation_flops
from slingshot.engine.engine import Engine
from slingshot.machine.precision import Dtype, compute_dtype, peak
from slingshot.rollout.rollout import PromptForm, Rollout, roll_out
from slingshot.rollout.sampling import MOVED_TO_SAMPLING, SamplingConfig
from slingshot.tasks.loader import TaskConfig, load_task
from slingshot.tasks.mixture import Item, distinct
from slingshot.tasks.task import Task
from slingshot.training.checkpointer import Workspace
from slingshot.training.parallel import Parallel

kind = "evaluate"


class EvaluateConfig(StageConfig):
    """Sampling as DeepSeek evaluates R1: temperature 0.6, top-p 0.95 (arXiv 2501.12948, 3)."""

    moved: ClassVar[dict[str, str]] = MOVED_TO_SAMPLING

    model: str
    tasks: list[TaskConfig] = Field(min_length=1)
    forms: list[PromptForm] = Field([PromptForm()], min_length=1)
    problems: int = Field(500, ge=1)  # of each task
    samples: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    examples: int = Field(12, ge=0)  # kept for reading
    chunk: int = Field(128, ge=1)
    dtype: Dtype = "auto"
    save_seconds: float = 30.0

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for kind_of, names in (
            ("forms", [form.name for form in self.forms]),
            ("tasks", [task.name for task in self.tasks]),
        ):
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two {kind_of} are named {repeated[0]}; results are told apart by name")
        return self


def run(config: EvaluateConfig, out: Path) -> None:
    """Evaluate `config.model` and write evaluation.json to `out`; resumes from `out.partial`."""
    parallel = Parallel.start(config.threads)
    source = locate(config.model)
    work = Workspace(out, kind, config, [source], parallel, config.save_seconds, peak(config.dtype))
    engine = Engine.load(source, dtype=compute_dtype(config.dtype), device=parallel.device)
    params = config.sampling.params(config.samples, config.seed)
    jobs = []
    for spec in config.tasks:
        task = load_task(spec.name, **spec.params)
        items = _items(task, config)
        jobs += [
            (task.name, form, items[i : i + config.chunk])
            for form in config.forms
            for i in range(0, len(items), config.chunk)
        ]
    saved = work.load()
    results: list[dict[str, Any]] = saved.info["results"] if saved else []

    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"results": results}

    with Progress(out.name, len(jobs), saved.step if saved else 0, parallel.is_first) as progress:
        for step in range(saved.step if saved else 0, len(jobs)):
            name, form, items = jobs[step]
            groups = roll_out(engine, items[parallel.rank :: parallel.world], params, form)
            for group in groups:
                counts = [len(r.completion_ids) for r in group]
                work.meter.add(
                    sum(counts), sampling=generation_flops(engine.model.config, len(group[0].prompt_ids), counts)
                )
            found = parallel.gather([_result(name, form, group) for group in groups])
            results += found
            progress.update(
                step + 1,
                **{"pass": sum(sum(r["accuracy"]) for r in found) / max(1, sum(len(r["accuracy"]) for r in found))},
            )
            work.keep(step + 1, state)
    evaluation = summarise(results, config)
    work.finish(lambda folder: write_json(folder / "evaluation.json", evaluation))
    parallel.stop()


def _items(task: Task, config: EvaluateConfig) -> list[Item]:
    return [
        Item(task, problem, problem.key)
        for problem in distinct(task, "test", f"evaluate/{config.seed}", config.problems)
    ]


def _result(task: str, form: PromptForm, group: Sequence[Rollout]) -> dict[str, Any]:
    """What is kept of one problem's samples."""
    first = group[0]
    return {
        "task": task,
        "form": form.name,
        "accuracy": [r.accuracy for r in group],
        "tokens": [len(r.completion_ids) for r in group],
        "format": [r.format for r in group],
        "language": [r.language for r in group],
        "example": {
            "prompt": first.problem.prompt,
            "answer": first.problem.answer,
            "reasoning": first.reasoning,
            "response": first.answer,
            "correct": first.accuracy == 1.0,
        },
    }


def summarise(results: Sequence[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    """The Evaluation: every task in the prompt form with the highest pass@1, the other forms' pass@1 beside it.

    `scores` holds each problem's share of right samples in a fixed order, so that two evaluations can be compared problem by problem.
    """
    tasks: dict[str, Any] = {}
    examples: dict[str, Any] = {}
    scores: dict[str, list[float]] = {}
    for task in dict.fromkeys(result["task"] for result in results):
        by_form = {
            form.name: [r for r in results if r["task"] == task and r["form"] == form.name] for form in config.forms
        }
        passes = {form: float(np.mean([np.mean(r["accuracy"]) for r in rows])) for form, rows in by_form.items()}
        best = max(passes, key=lambda form: passes[form])
        rows = by_form[best]
        correct = [sum(score == 1.0 for score in r["accuracy"]) for r in rows]
        tasks[task] = {
            "pass@1": passes[best],
            "ci95": bootstrap([float(np.mean(r["accuracy"])) for r in rows], config.seed),
            "pass@8": float(np.mean([pass_at_k(config.samples, c, 8) for c in correct]))
            if config.samples >= 8
            else None,
            "mean_tokens": float(np.mean([np.mean(r["tokens"]) for r in rows])),
            "format": float(np.mean([np.mean(r["format"]) for r in rows])),
            "language": float(np.mean([np.mean([value == 1.0 for value in r["language"]]) for r in rows])),
            "n": len(rows),
            "samples_per_problem": config.samples,
            "prompt_form": best,
            "pass@1_by_form": passes,
        }
        scores[task] = [float(np.mean(r["accuracy"])) for r in rows]
        examples[task] = [r["example"] for r in rows[: config.examples]]
    return {"tasks": tasks, "examples": examples, "scores": scores}


def bootstrap(scores: Sequence[float], seed: int, resamples: int = 2000) -> list[float]:
    """95% percentile interval of the mean, resampling problems."""
    values = np.asarray(scores)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return [float(low), float(high)]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples (arXiv 2107.03374, equation 1)."""
    return 1.0 - comb(n - correct, k) / comb(n, k)
