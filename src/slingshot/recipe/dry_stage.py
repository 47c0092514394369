"""One stage of a dry run, in a process of its own: the stage's own code on a few steps, sampling scripted. Uses torch.

    python -m slingshot.recipe.dry_stage job.json      # what `dry_run` starts

Where a stage samples, the engine decodes as many tokens as the tasks' worked solutions have, and those are what is then
verified and trained on: a model of a few steps would neither stop in time nor be right.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median_high
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_jsonl, write_json
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.load_save import load_tokenizer, open_weights
from slingshot.cost.receipt import Receipt
from slingshot.engine.engine import Engine
from slingshot.rollout.sampler import EngineSampler, Sampler, ScriptedSampler
from slingshot.stages import quantize as stage
from slingshot.stages.kinds import STAGES
from slingshot.tasks.mixture import Item, TaskMix
from slingshot.tasks.task import Solution, Style
from slingshot.text.tokenizer import Tokenizer

# Problems are mostly solved always or never: each one's chance is drawn from a Beta distribution that is symmetric and
# so sharp that 44% of groups of 8 are all right or all wrong, as Llama-3.1-8B's are on Big-Math (arXiv 2607.00152).
SHARPNESS = 0.4214
QUANTIZE_STEPS = 4  # of distillation
_IN_WORDS: Mapping[Style, float] = {"steps": 1.0}


class SolutionScript:
    """Says an item's worked solution, with its own answer as often as the item's chance has it, else with another's;
    where samples are `kept` for training, always with its own, so that they are as many as may be."""

    def __init__(
        self,
        items: Sequence[Item],
        tokenizer: Tokenizer,
        max_tokens: int,
        styles: Mapping[Style, float],
        kept: bool = False,
    ) -> None:
        self._items = {item.key: item for item in items}
        self._answers = [item.problem.answer for item in items]
        self._tokenizer, self._max_tokens, self._styles, self._kept = tokenizer, max_tokens, styles, kept
        self.first_said: float | None = None  # when the first sample was asked for

    def __call__(self, key: str, index: int) -> Solution:
        self.first_said = self.first_said or time.perf_counter()
        item = self._items[key if key in self._items else key.rpartition("/")[0]]  # a later turn's key names the sample
        rng = random.Random(f"{key}/{index}")
        styles = {s: n for s, n in self._styles.items() if s != "calls" or item.task.tools}  # nothing to call: no calls
        (style,) = rng.choices(list(styles or _IN_WORDS), list((styles or _IN_WORDS).values()))
        said = item.task.solution(item.problem, style, rng) if item.task.has_solutions else self._long(item)
        if self._kept or rng.random() < random.Random(item.key).betavariate(SHARPNESS, SHARPNESS):
            return said
        others = [answer for answer in rng.choices(self._answers, k=8) if answer != item.problem.answer]
        return replace(said, answer=others[0] if others else "?")

    def _long(self, item: Item) -> Solution:
        """Where a task writes no solutions: as many tokens as a response may have."""
        room = self._max_tokens - len(self._tokenizer.encode(item.problem.answer)) - 16
        each = len(self._tokenizer.encode(" so" * 64)) / 64
        return Solution(" so" * max(1, int(room / each)), item.problem.answer)


def items_of(kind: str, config: Any) -> list[Item]:
    """The problems a sampling stage will put to its model."""
    if kind in ("rl", "distill"):
        most = config.steps * config.prompts_per_step * (1 + getattr(config, "refill", 0))
        return TaskMix(config.tasks, "train", f"{kind}/{config.seed}").draw(0, most)
    drawn = config.draw()
    return drawn if kind == "sample" else [item for items in drawn[0].values() for item in items]


def quantize(job: dict[str, Any]) -> dict[str, float]:
    """As `run`, of the stage that has parts of several kinds: one chunk of answers to calibrate on, one to compare by
    and a few steps of distillation stand for all, and what is done to the matrices once is done."""
    whole, out = stage.QuantizeConfig.parse(job["whole"], job["name"]), Path(job["out"])
    source = locate(whole.model)
    tokenizer, model = load_tokenizer(source), open_weights(source).config
    mix = TaskMix(whole.tasks or stage.trained_on(source, whole.model), "train", f"quantize/{whole.seed}")
    asked = len(stage.held_out(mix.tasks, model, whole))
    problems = min(asked, stage.CHUNK) // len(mix.tasks) or 1
    steps = min(whole.distill, QUANTIZE_STEPS)
    cut = {"calibrate": min(whole.calibrate, stage.CHUNK), "problems": problems, "distill": steps}
    config = whole.model_copy(update=cut)
    few = stage.held_out(mix.tasks, model, config)
    items = [*mix.draw(0, whole.calibrate + steps * whole.prompts_per_step + stage.HELD_OUT), *few]
    script = SolutionScript(items, tokenizer, whole.sampling.max_tokens, job["styles"])

    def sampler(path: Path) -> Sampler:
        timed = stage.engine_of(path)
        return ScriptedSampler(script, tokenizer, timed.model_config, timed=timed)

    stage.run(config, out, sampler)
    receipt = Receipt.read(out)
    told = receipt.extra["quantization"]
    answers = fitted_to = told.get("calibration_answers", 0)
    if fitted_to:  # more are drawn until they hold as many tokens as are asked for
        answers = min(whole.calibrate, fitted_to * max(1.0, whole.calibrate_tokens / told["calibration_tokens"]))
    times = dict.fromkeys((stage.CALIBRATION, "reading"), answers / max(1, fitted_to))
    times |= dict.fromkeys((stage.FULL, stage.SMALL, "comparison"), asked / len(few))
    times |= {"distillation": whole.distill / max(1, steps)}
    grows = {part: seconds for part, seconds in told["seconds"].items() if part in times}
    varying = sum(grows.values())
    factor = sum(seconds * times[part] for part, seconds in grows.items()) / varying
    return {"factor": factor, "fixed_seconds": receipt.seconds - varying, "varying_seconds": varying}


def run(job: dict[str, Any]) -> dict[str, float]:
    """Run the stage `job` describes; what was measured, and how much of the whole it was.

    `fixed_seconds` do not grow with its steps: all but the steps, each taken to last as long as the middle one.
    """
    kind, out = job["kind"], Path(job["out"])
    if kind == "quantize":
        return quantize(job)
    if kind == "rl":
        job["config"]["retire"] = 0.0  # made-up answers solve nothing
    config, whole = (STAGES[kind].config.parse(job[name], job["name"]) for name in ("config", "whole"))
    factor, loading, more, script = job["factor"], 0.0, {}, None
    if kind in ("rl", "distill", "sample", "evaluate"):
        settings: Any = config
        source, items = locate(settings.model), items_of(kind, settings)
        tokenizer, drawn = load_tokenizer(source), time.perf_counter()
        engine = Engine.load(source, dtype=settings.dtype)
        script = SolutionScript(items, tokenizer, settings.sampling.max_tokens, job["styles"], kept=kind == "sample")
        more["sampler"] = ScriptedSampler(script, tokenizer, engine.config, timed=EngineSampler(engine))
        if kind not in ("rl", "distill"):  # which load their own model beside the sampler's
            loading = time.perf_counter() - drawn
            factor = len(items_of(kind, whole)) / max(1, len(items))
    start = time.perf_counter()
    STAGES[kind].run(config, out, **more)
    seconds, metrics = Receipt.read(out).seconds, out / "metrics.jsonl"
    ends = [row["seconds"] for row in (read_jsonl(metrics) if metrics.is_file() else []) if "seconds" in row]
    if len(ends) > 1:
        fixed = max(0.0, seconds - len(ends) * median_high(later - earlier for earlier, later in pairwise(ends)))
    else:
        fixed = min(seconds, script.first_said - start) if script and script.first_said else seconds
    return {"factor": factor, "fixed_seconds": loading + fixed, "varying_seconds": seconds - fixed}


if __name__ == "__main__":
    job = read_json(Path(sys.argv[1]))
    try:
        found = run(job)
    except SlingshotError as error:
        sys.exit(f"slingshot: {error}")
    write_json(Path(job["result"]), found)
