"""A stage's first few steps, timed: the real code on the real shapes, with random weights for a model that is not there yet.

    rehearse("rl", config, out, Writer(), steps=4)          # in a process of its own; `measure` starts one and reads the result

The stage's own `run` works in a temporary folder and is stopped after some steps. Two things are put in its way there. Its Workspace keeps
the time of every step and ends it. And where it samples, the engine does all its work but says what a Writer wrote: what random weights would
say has neither the length nor the right answers of what a trained model says. (A model that is there already speaks for itself.) A conversion
is stopped after as many tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slingshot.base.config import StageConfig, Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import new_folder, read_json, write_json
from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.cost.receipt import Meter, Receipt
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.sequence import Sequence as Sample
from slingshot.machine.machine import Machine
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.prospect import Writer
from slingshot.rollout.rollout import Item, PromptForm, Rollout, roll_out
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.checkpointer import State, Workspace

LONG = 20.0  # seconds of steps after which `least` are enough
SHARP = 10.0  # standard deviation of the logits over the temperature: as sure as a trained model, so that nucleus sampling has few tokens to sort,
#               and not so sure that weights become denormal numbers, with which processors are slow


class Step(Strict):
    """One step as it was: seconds, and the FLOPs its stage counted; for a conversion the bytes of a tensor."""

    seconds: float
    flops: float
    n_bytes: int = 0


class Rehearsal(Strict):
    """What was measured of a stage: the time before its first step, its steps, one save of its state, the share of it that is weights."""

    start: float  # of the process, until the stage began
    prepare: float
    steps: list[Step]
    save: float = 0.0
    weights_share: float = 1.0
    peak_memory_bytes: int
    watts: float | None

    @property
    def seconds_per_flop(self) -> float:
        """Of the steps after the first, which prepares code for shapes that are new to it."""
        later = self.steps[1:] or self.steps
        return sum(step.seconds for step in later) / max(1.0, sum(step.flops for step in later))

    @property
    def first(self) -> float:
        """What the first step took beyond its share."""
        return max(0.0, self.steps[0].seconds - self.steps[0].flops * self.seconds_per_flop)


class _Enough(BaseException):
    """Ends a stage from within."""


class _Watch(Workspace):
    """A Workspace that keeps the clock and stops its stage."""

    limit: int
    least: int  # steps, however long they take
    began = 0.0  # to finish
    aside = 0.0  # seconds in which nothing was done that the stage would do

    def load(self) -> State | None:
        state = super().load()
        self.clock = [time.perf_counter()]
        self.counted: list[Step] = []
        self._flops_before = 0.0
        return state

    def keep(self, step: int, state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        now = time.perf_counter()
        self.counted.append(Step(seconds=max(0.0, now - self.clock[-1] - self.aside), flops=self.meter.flops - self._flops_before))
        self.clock.append(now)
        self.aside = 0.0
        self._flops_before = self.meter.flops
        if len(self.counted) >= self.limit or (len(self.counted) >= self.least and now - self.clock[0] > LONG):
            self.result = self.closing(step, state)
            raise _Enough

    def closing(self, step: int, state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> dict[str, Any]:
        """Save once, timed."""
        self._save_seconds = 0.0
        begin = time.perf_counter()
        super().keep(step, state)
        took = time.perf_counter() - begin
        tensors = state()[0]
        total = sum(tensor.nbytes for tensor in tensors.values())
        weights = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model/"))
        return {"save": took, "weights_share": weights / total if total else 1.0}

    def finish(self, *arguments: Any, **named: Any) -> None:
        self.began, before = time.perf_counter(), self.meter.seconds
        super().finish(*arguments, **named)
        self.result = {"save": Receipt.read(self.out).seconds - before}  # as far as a receipt counts: digests come later
        raise _Enough


def rehearse(kind: str, module: Any, config: StageConfig, out: Path, writer: Writer | None, steps: int, least: int = 2) -> dict[str, Any]:
    """Run the stage until it has made `steps` steps; what was measured, as `Rehearsal` has it but for `start`.

    Without a writer the model speaks for itself. After LONG seconds of steps `least` are enough.
    """
    made: list[_Watch] = []

    def workspace(*arguments: Any, **named: Any) -> _Watch:
        made.append(_Watch(*arguments, **named))
        made[0].limit, made[0].least = steps, least
        return made[0]

    module.Workspace = workspace
    tensors: list[Step] = []
    spent: list[float] = []  # seconds of a conversion: one writing of its tensors, and of `_write` without one writing of the tokenizer
    if kind == "convert":
        module.write_checkpoint = functools.partial(_write, module.write_checkpoint, spent)
        for name in ("_as_stored", "_converted"):
            setattr(module, name, functools.partial(_some, getattr(module, name), tensors, steps))
    elif hasattr(module, "roll_out") and writer:
        module.roll_out = functools.partial(recite, writer, aside=lambda seconds: setattr(made[0], "aside", made[0].aside + seconds))
    begin = time.perf_counter()
    with contextlib.suppress(_Enough):
        module.run(config, out)
    work = made[0]
    counted = tensors or work.counted
    prepared = (work.began if tensors else work.clock[0]) - begin
    if tensors:  # read and written inside the finish, of which all else takes as long for any model
        written, apart = spent
        prepared += work.result["save"] - apart
        work.result["save"] = max(0.0, written)
    joules = work.meter.joules
    return {
        "prepare": prepared, "steps": [step.model_dump() for step in counted], "peak_memory_bytes": work.meter.peak_memory_bytes,
        "watts": None if joules is None else joules / work.meter.seconds, **work.result,
    }  # fmt: skip


def recite(
    writer: Writer, engine: Engine, items: Sequence[Item], params: SamplingParams, form: PromptForm, aside: Callable[[float], None]
) -> list[list[Rollout]]:
    """`roll_out` with the engine at work on every token, and the writer's words in its mouth; `aside` is told the seconds those took."""
    begin = time.perf_counter()
    replies = {item.key: writer.respond(engine.tokenizer, item, form, params.n, params.max_tokens)[1] for item in items}
    scripts: dict[Sample, list[int]] = {}
    decode = type(engine)._decode
    if params.top_p < 1 or params.top_k:
        config = engine.model.config
        with torch.no_grad():
            engine.model.model.norm.weight.fill_(SHARP * (params.temperature or 1.0) / (config.initializer_range * math.sqrt(config.hidden_size)))
    aside(time.perf_counter() - begin)

    def said() -> tuple[list[int], list[float]]:
        _, logprobs = decode(engine)
        begin = time.perf_counter()
        batch = engine._batch
        for s in batch.sequences:
            if s not in scripts:
                scripts.update(zip(s.request.sequences, [reply.ids for reply in replies[s.request.key]], strict=True))
        ids = [scripts[s][len(s.token_ids)] for s in batch.sequences]
        batch.tokens_S[: len(ids)] = torch.tensor(ids, device=batch.tokens_S.device)
        aside(time.perf_counter() - begin)
        return ids, logprobs

    cast(Any, engine)._decode = said
    return roll_out(engine, items, params, form)


def _write(write: Callable[..., None], spent: list[float], folder: Path, config: ModelConfig, tensors: Any, tokenizer: Tokenizer, *rest: Any) -> None:
    """Write a checkpoint three times, again in the memory it had: page cache not used before is up to ten times slower. Its tokenizer once more."""
    begin = time.perf_counter()
    made, writes = list(tensors), []
    for _ in range(3):
        clock = time.perf_counter()
        for file in folder.iterdir():
            file.unlink()
        write(folder, config, made, tokenizer, *rest)
        writes.append(time.perf_counter() - clock)
    clock = time.perf_counter()
    tokenizer.save(folder)
    end = time.perf_counter()
    again = end - clock
    spent += [min(writes) - again, end - begin - again]


def _some(convert: Callable[..., Iterator[tuple[str, Tensor]]], counted: list[Step], most: int, *arguments: Any) -> Iterator[tuple[str, Tensor]]:
    """The first tensors of a conversion, timed from one request to the next."""
    begin = time.perf_counter()
    for name, tensor in islice(convert(*arguments), most):
        yield name, tensor
        now = time.perf_counter()
        counted.append(Step(seconds=now - begin, flops=0.0, n_bytes=tensor.nbytes))
        begin = now


def stand_in(folder: Path, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """A checkpoint of random weights with a receipt, so that reading it costs what reading the real one will."""
    network = Transformer(model.model_copy(update={"quantization": None}))
    network.init_weights(torch.Generator().manual_seed(0))
    with new_folder(folder) as place:
        save_checkpoint(place, network, tokenizer)
        Meter().receipt("stand-in", folder.name, {}, [], place, Machine(cpu="", cores=1, memory_bytes=0)).write(place)


def measure(kind: str, config: StageConfig, folder: Path, writer: Writer | None, steps: int, least: int = 2) -> Rehearsal:
    """`rehearse` in a process of its own, as a recipe's stages are run. SlingshotError with the process's last words when it fails."""
    job, result = folder / "job.json", folder / "result.json"
    said = {"styles": dict(writer.styles), "solved": writer.solved} if writer else None
    write_json(job, {"kind": kind, "config": config.model_dump(mode="json"), "writer": said, "steps": steps, "least": least})
    begin = time.time()
    done = subprocess.run([sys.executable, "-m", "slingshot.rehearsal", str(job), str(result)], capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SlingshotError(f"rehearsing a stage of kind {kind} failed: {words:.300}; --no-probe plans without")
    found = read_json(result)
    return Rehearsal.parse({**found, "start": found["start"] - begin}, f"the rehearsal of {kind}")


def main(job: Path, result: Path) -> None:
    from slingshot.recipe.recipe import stage_module  # as the runner finds it

    values = read_json(job)
    module = stage_module(values["kind"])
    config = module.Config.parse(values["config"], values["kind"])
    began = time.time()
    writer = Writer(**values["writer"]) if values["writer"] else None
    found = rehearse(values["kind"], module, config, job.parent / "out", writer, values["steps"], values["least"])
    write_json(result, {"start": began, **found})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
