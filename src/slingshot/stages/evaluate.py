"""Evaluation on held-out problems: pass@1 with a 95% interval, pass@k, maj@k, length, format, language, by level.

Several prompt forms can be tried; the best is reported, so that a base model is not marked down for its format.

    slingshot evaluate --config evaluate.toml --out runs/zero-evaluation
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from slingshot.base.config import StageConfig
from slingshot.base.files import write_json
from slingshot.base.progress import Progress
from slingshot.engine.engine import Engine
from slingshot.engine.kv_cache import CacheForm
from slingshot.machine.device import Dtype
from slingshot.rollout.metrics import interval, maj_at_k, pass_at_k
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler, Sampler, SamplingConfig
from slingshot.rollout.trajectory import Trajectory, sampling_cost
from slingshot.stages.contamination import contaminated, texts
from slingshot.stages.probe import probe, probe_notes, summarise_probe
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item, distinct
from slingshot.tasks.task import Problem, Split
from slingshot.tasks.verification import VerificationPool
from slingshot.training.checkpointer import Checkpointer
from slingshot.training.interrupts import Interrupts
from slingshot.training.parallel import Parallel

_COUNTED = 10_000  # given problems are counted up to here
_MOST_LEVELS = 6  # told in a line
_MANY_CUT = 0.1  # of the answers: told


class EvaluateConfig(StageConfig):
    """Sampling as DeepSeek evaluates R1: temperature 0.6, top-p 0.95 (arXiv 2501.12948, 3)."""

    model: str
    tasks: list[TaskConfig] = Field(min_length=1)
    forms: list[PromptForm] = Field([PromptForm()], min_length=1)
    split: Split = "test"
    problems: int = Field(500, ge=1)  # of each task
    samples: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    thinking_budget: int | None = Field(None, ge=0)
    contamination: list[str] = []
    probe: int = Field(0, ge=0)  # of each task's problems
    examples: int = Field(12, ge=0)  # kept for reading
    chunk: int = Field(128, ge=1)
    dtype: Dtype = "auto"
    kv_cache: CacheForm = "auto"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for kind_of, names in (("forms", [form.name for form in self.forms]), ("tasks", [t.name for t in self.tasks])):
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two {kind_of} are named {repeated[0]}; results are told apart by name")
        return self

    def draw(self) -> tuple[dict[str, list[Item]], dict[str, int]]:
        """The problems of each task, the same for every model, and how many there are of those that are given."""
        items, given = {}, {}
        for named in self.tasks:
            task, seed = named.load(), f"evaluate/{self.seed}"
            found = distinct(task, self.split, seed, max(self.problems, _COUNTED if task.is_given else 0))
            if task.is_given and len(found) < _COUNTED:
                given[named.name] = len(found)
            items[named.name] = [Item(task, problem, problem.key) for problem in found[: self.problems]]
        return items, given


def run(config: EvaluateConfig, out: Path, sampler: Sampler | None = None) -> None:
    """Evaluate `config.model`, in process or by `sampler`, into `out`/evaluation.json; resumes from `out.partial`."""
    with Parallel.start() as parallel, Checkpointer(out, "evaluate", config, parallel) as work:
        source = work.reads[config.model]
        sampler = sampler or EngineSampler(
            Engine.load(source, dtype=work.dtype, device=parallel.device, kv_cache=config.kv_cache)
        )  # fmt: skip
        params = replace(config.sampling.params(config.samples, config.seed), thinking_budget=config.thinking_budget)
        for data in config.contamination:
            next(texts(Path(data)), None)  # what cannot be read is said before hours of sampling
        items, given = config.draw()
        pool = VerificationPool([some[0].task for some in items.values() if some])
        jobs = [
            (task, rollout, some[start : start + config.chunk])
            for task, some in items.items()
            for form in config.forms
            for rollout in [Rollout(sampler, params, form, pool, parallel, both=not form.lenient)]
            for start in range(0, len(some), config.chunk)
        ]
        saved = work.load()
        results: list[dict[str, Any]] = saved.info.get("results", [])
        probes: dict[str, Any] = saved.info.get("probes", {})
        done, title = saved.step, f"evaluation of {source.name}"
        with pool, Interrupts() as interrupts, Progress(title, len(jobs), done, parallel.is_first) as progress:
            for step in range(done, len(jobs)):
                task, rollout, chunk = jobs[step]
                form, groups = rollout.form.name, rollout.run(chunk)
                tokens, flops = sampling_cost(sampler.model_config, groups)
                work.meter.add(tokens, sampling=flops)
                found = parallel.gather([result(task, form, group) for group in groups])
                results.extend([*found, {"task": task, "form": form, "left_out": rollout.counts}])
                accuracy = [score for row in found for score in row["accuracy"]]
                progress.update(step + 1, **{"pass": sum(accuracy) / max(1, len(accuracy))})
                work.keep(step + 1, lambda: ({}, {"results": results, "probes": probes}), stop=interrupts.asked)
            evaluation = summarise(results, config, given)
            if config.contamination:
                tell_contamination(evaluation, results, config)
            for task in evaluation["tasks"] if config.probe else ():
                if task not in probes:
                    best = next(f for f in config.forms if f.name == evaluation["tasks"][task]["prompt_form"])
                    chunk = items[task][: config.probe]
                    rows, cost = probe(Rollout(sampler, params, best, pool, parallel), chunk, config.seed)
                    work.meter.add(cost[0], sampling=cost[1])
                    probes[task] = summarise_probe(parallel.gather(rows))
                    work.keep(len(jobs), lambda: ({}, {"results": results, "probes": probes}), stop=interrupts.asked)
                evaluation["tasks"][task]["probe"] = probes[task]
                evaluation["tasks"][task]["notes"] += probe_notes(probes[task])
        for _, rollout, _ in jobs:
            rollout.refuse_nothing()
        work.finish(lambda folder: write_json(folder / "evaluation.json", evaluation))


def result(task: str, form: str, group: Sequence[Trajectory]) -> dict[str, Any]:
    """What is kept of one problem's samples."""
    first, problem = group[0], group[0].item.problem
    spoken = {"reasoning": first.response.reasoning or "", "response": first.response.answer}
    example = {"prompt": problem.prompt, "answer": problem.answer, **spoken, "correct": first.scores["accuracy"] == 1.0}
    scores = {name: [trajectory.scores[name] for trajectory in group] for name in first.scores}
    said = {"tokens": [sum(t.mask) for t in group], "answers": [t.answer for t in group], "level": level(problem)}
    said["cut_off"] = [t.turns[-1].finish_reason == "length" for t in group]
    return {"task": task, "form": form, **said, **scores, "example": example}


def level(problem: Problem) -> str | None:
    """How hard a problem is: its task's word for it, or how many numbers it has."""
    numbers = problem.data.get("numbers")  # of a user's own problem it may be anything
    found = problem.data.get("level", len(numbers) if isinstance(numbers, list) else None)
    return None if found is None else str(found)


def summarise(
    results: Sequence[dict[str, Any]], config: EvaluateConfig, given: dict[str, int] | None = None
) -> dict[str, Any]:
    """The Evaluation: every task in the prompt form with the highest pass@1, the other forms' pass@1 beside it.

    `scores` holds each problem's share of right samples in a fixed order: two evaluations compare problem by problem.
    `given`: how many problems a task has, where that is known.
    """
    tasks: dict[str, Any] = {}
    examples: dict[str, Any] = {}
    scores: dict[str, list[float]] = {}
    asked, forms = [row for row in results if "example" in row], [form.name for form in config.forms]
    for task in dict.fromkeys(row["task"] for row in asked):
        of_task = [row for row in asked if row["task"] == task]
        by_form = {name: rows for name in forms if (rows := [row for row in of_task if row["form"] == name])}
        passes = {form: mean(rows, "accuracy") for form, rows in by_form.items()}
        best = max(passes, key=lambda form: passes[form])
        rows = by_form[best]
        right = [row["accuracy"].count(1.0) for row in rows]
        scores[task] = [float(np.mean(row["accuracy"])) for row in rows]
        left_out = [row.get("left_out") for row in results if (row["task"], row["form"]) == (task, best)]
        found = tasks[task] = {
            "pass@1": passes[best], "ci95": interval(scores[task], config.samples, config.seed),
            "pass@8": float(np.mean([pass_at_k(config.samples, c, 8) for c in right])) if config.samples >= 8 else None,
            "mean_tokens": mean(rows, "tokens"), "format": mean(rows, "format"),
            "language": float(np.mean([np.mean([value == 1.0 for value in row["language"]]) for row in rows])),
            "n": len(rows), "samples_per_problem": config.samples, "right": sum(right),
            "right_leniently": sum(row.get("lenient", row["accuracy"]).count(1.0) for row in rows),
            "cut_off": sum(sum(row.get("cut_off", ())) for row in rows), "max_tokens": config.sampling.max_tokens,
            "split": config.split, "given": (given or {}).get(task), "prompt_form": best, "pass@1_by_form": passes,
            "at_k": at_k(rows, config), "by_level": by_level(rows, config),
            "left_out": dict(sum(map(Counter, left_out), Counter())),
        }  # fmt: skip
        if "calls" in rows[0]:
            found["calls"] = mean(rows, "calls")
        found["notes"] = notes(found)
        examples[task] = [row["example"] for row in rows[: config.examples]]
    return {"tasks": tasks, "examples": examples, "scores": scores}


def at_k(rows: Sequence[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    """pass@k and maj@k for powers of two up to the samples that every problem has, with intervals over problems."""
    most, found = min(len(row["accuracy"]) for row in rows), dict[str, Any]()
    for k in (1 << power for power in range(1, most.bit_length())):
        scores = {f"pass@{k}": [pass_at_k(len(row["accuracy"]), row["accuracy"].count(1.0), k) for row in rows]}
        if all("answers" in row for row in rows):
            scores[f"maj@{k}"] = [maj_at_k(row["answers"], row["accuracy"], k) for row in rows]
        for name, each in scores.items():
            found[name] = {"mean": float(np.mean(each)), "ci95": interval(each, config.samples, config.seed)}
    return found


def by_level(rows: Sequence[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    """pass@1 and tokens at each level, where problems have several; the easiest first."""
    levels = {row["level"] for row in rows if row.get("level") is not None}
    found = {}
    for name in sorted(levels, key=lambda level: (len(level), level)) if len(levels) > 1 else []:
        its = [row for row in rows if row.get("level") == name]
        ci95 = interval([float(np.mean(row["accuracy"])) for row in its], config.samples, config.seed)
        found[name] = {"pass@1": mean(its, "accuracy"), "ci95": ci95, "n": len(its), "mean_tokens": mean(its, "tokens")}
        if "calls" in rows[0]:
            found[name]["calls"] = mean(its, "calls")
    return found


def tell_contamination(evaluation: dict[str, Any], results: Sequence[dict[str, Any]], config: EvaluateConfig) -> None:
    """Add to every task how many of its problems stand in the data named, and pass@1 of these and of the others."""
    for task, score in evaluation["tasks"].items():
        form, scores = score["prompt_form"], evaluation["scores"][task]
        rows = [row for row in results if "example" in row and (row["task"], row["form"]) == (task, form)]
        found = score["contamination"] = dict[str, Any]()
        for way, places in contaminated([row["example"]["prompt"] for row in rows], config.contamination).items():
            sides: list[list[float]] = [[], []]
            for place, each in enumerate(scores):
                sides[place in places].append(each)
            without, of_these = (float(np.mean(side)) if side else None for side in sides)
            share = len(places) / len(scores)
            found[way] = {"problems": len(places), "share": share, "pass@1": of_these, "pass@1_without": without}
        if whole := found["whole"]["problems"]:
            rest = found["whole"]["pass@1_without"]
            said = "" if rest is None else f", pass@1 without them {rest:.0%}"
            score["notes"].append(f"{whole} of {len(scores)} problems stand in the data named{said}")


def notes(score: dict[str, Any]) -> list[str]:
    """What qualifies one task's scores, in words."""
    total, right, given = score["n"] * score["samples_per_problem"], score["right"], score["given"]
    said = [f"{count} {what}" for what, count in score["left_out"].items()]
    if "calls" in score:
        said.append(f"{score['calls']:.2f} calls of tools a problem")
    if score["cut_off"] >= _MANY_CUT * total:
        said.append(f"{score['cut_off']} of {total} cut off at sampling.max_tokens={score['max_tokens']}")
    if given and given > score["n"]:
        said.append(f"{score['n']} of {given} given {score['split']} problems asked")
    if (leniently := score["right_leniently"]) > right:
        in_format = f"{round(score['format'] * total)} of {total} in format"
        said.append(f"{in_format}, {leniently} right if read leniently")
    if 0 < len(score["by_level"]) <= _MOST_LEVELS:
        said.append("by level " + ", ".join(f"{name}: {_at_level(each)}" for name, each in score["by_level"].items()))
    return said


def _at_level(score: dict[str, Any]) -> str:
    return f"{score['pass@1']:.0%}" + (f" with {score['calls']:.2f} calls" if "calls" in score else "")


def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The mean over problems of their samples' mean."""
    return float(np.mean([np.mean(row[name]) for row in rows]))
