"""Where a stage works until its artifact is whole: resumable state, metrics, and the finish.

A stage that writes to `out` works in `out.partial/`: `state-STEP/` (safetensors and JSON, written whole), `metrics.jsonl` (one line a
step). A stage killed at any moment is run again with the same configuration and goes on from the last state; metrics written after
that state are dropped and written anew, so what is logged ends the same as without the interruption, clocks excepted.

    work = Workspace(out, "sft", config, parents=[model_path], parallel=parallel)
    saved = work.load()                                        # None at the start
    for step in range(saved.step if saved else 0, steps):
        ...
        work.log({"step": step + 1, "loss": loss})
        work.keep(step + 1, state)                             # saves now and then, and before stopping at Ctrl-C
    work.finish(write_artifact)
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import digest, new_folder, read_json, read_text, write_json, write_text
from slingshot.cost.receipt import Meter, artifact_digest
from slingshot.machine.device import describe_machine
from slingshot.model.transformer import Transformer
from slingshot.training.optimizer import Optimizer
from slingshot.training.parallel import Parallel, gathered, load_gathered

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # TensorBoard is not a dependency; installed, it is used
    SummaryWriter = None  # type: ignore[assignment, misc]


@dataclass
class State:
    """A stage's state after `step` steps: named tensors and JSON."""

    step: int
    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix`/NAME, by NAME."""
        return {
            name.removeprefix(prefix + "/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix + "/")
        }


class Workspace:
    """The working folder of one run of one stage. Only the first rank writes."""

    def __init__(
        self,
        out: Path,
        kind: str,
        config: StageConfig,
        parents: list[Path],
        parallel: Parallel,
        save_seconds: float = 60.0,
        peak: float | None = None,
    ) -> None:
        self.out, self.kind, self.config, self.parents, self.parallel, self.peak = (
            out,
            kind,
            config,
            parents,
            parallel,
            peak,
        )
        self.folder = out.with_name(out.name + ".partial")
        self.meter = Meter()
        self._save_seconds, self._saved_at, self._interrupted = save_seconds, time.monotonic(), False
        self._step_at = time.perf_counter()
        self._board: Any = None
        if out.exists():
            raise SlingshotError(f"{out} exists already; remove it or choose another --out")
        identity = {
            "kind": kind,
            "config": config.model_dump(mode="json"),
            "parents": [artifact_digest(parent) for parent in parents],
        }
        if parallel.is_first:
            mark = self.folder / "identity.json"
            if not mark.exists() or read_json(mark) != digest(identity):
                if self.folder.exists():  # of another configuration, or such a one half removed
                    shutil.rmtree(self.folder)
                write_json(mark, digest(identity))
            for unfinished in self.folder.glob(".*.tmp"):
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        parallel.barrier()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True

    def load(self) -> State | None:
        """The last state saved by an earlier run, or None; drops metrics of later steps."""
        states = sorted(self.folder.glob("state-*"), key=lambda path: int(path.name.removeprefix("state-")))
        step = 0
        state = None
        if states:
            try:
                tensors = load_file(states[-1] / "tensors.safetensors")
            except (OSError, SafetensorError) as error:
                raise SlingshotError(
                    f"{states[-1]} cannot be read: {error}; remove {self.folder} to start the stage anew"
                ) from error
            info = read_json(states[-1] / "state.json")
            self.meter = Meter(info["meter"])
            step = int(info["step"])
            state = State(step, tensors, info["info"])
        if self.parallel.is_first:
            self._cut_metrics(step)
            if SummaryWriter is not None:
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        self.parallel.barrier()
        self._step_at = time.perf_counter()
        return state

    def _cut_metrics(self, step: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        kept = []
        if metrics.exists():
            for line in read_text(metrics).splitlines(keepends=True):
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
        write_text(metrics, "".join(kept))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line of metrics; the row holds its `step`."""
        if not self.parallel.is_first:
            return
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: _short(value) for key, value in row.items()}) + "\n")
        except OSError as error:
            raise SlingshotError(
                f"cannot write {self.folder}: {error.strerror}; free space there and run the same command to go on"
            ) from error
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, row["step"])

    def speed(self, tokens: int, flops_before: float) -> dict[str, float]:
        """Clocks of the step that just ended: `tokens` over all ranks, and the FLOPs this rank's meter counted since `flops_before`."""
        now = time.perf_counter()
        seconds, self._step_at = now - self._step_at, now
        row = {"seconds": self.meter.seconds, "tokens_per_second": tokens / seconds}
        if self.peak:
            row["mfu"] = (self.meter.flops - flops_before) / seconds / self.peak
        return row

    def check(self, step: int, **values: float) -> None:
        """Stop the stage at a value that is not finite; the last state saved is from before it."""
        for name, value in values.items():
            if not math.isfinite(value):
                saved = max((int(path.name.removeprefix("state-")) for path in self.folder.glob("state-*")), default=0)
                kept = f"the state of step {saved} is kept in {self.folder}"
                raise SlingshotError(
                    f"{self.out.name}: {name} is {value} at step {step}; {kept}; lower the learning rate and run again"
                )

    def keep(self, step: int, state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Save now and then; at Ctrl-C save at once and stop with KeyboardInterrupt. `state` is called on every rank."""
        due = time.monotonic() - self._saved_at >= self._save_seconds
        urgency = self.parallel.max(2 if self._interrupted else int(due))
        if urgency == 0:
            return
        self._saved_at = time.monotonic()
        tensors, info = state()
        if self.parallel.is_first:
            with new_folder(self.folder / f"state-{step}") as folder:
                try:
                    save_file(
                        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                        folder / "tensors.safetensors",
                    )
                except (OSError, SafetensorError) as error:
                    raise SlingshotError(
                        f"cannot write {folder}: {error}; free space there and run the same command to go on"
                    ) from error
                write_json(folder / "state.json", {"step": step, "meter": self.meter.state(), "info": info})
            for path in self.folder.glob("state-*"):
                if path.name != f"state-{step}":
                    shutil.rmtree(path)
        self.parallel.barrier()
        if urgency == 2:
            raise KeyboardInterrupt

    def finish(self, write: Callable[[Path], None], extra: Mapping[str, Any] | None = None) -> None:
        """Write the artifact with its metrics and receipt, whole or not at all, and remove the working folder."""
        totals = self.parallel.sums({"tokens": self.meter.tokens, **self.meter.flops_by_part})
        self.meter.tokens = int(totals.pop("tokens"))
        self.meter.flops_by_part = totals
        if self.parallel.is_first:
            with new_folder(self.out) as folder:
                write(folder)
                if (self.folder / "metrics.jsonl").exists():
                    shutil.copyfile(self.folder / "metrics.jsonl", folder / "metrics.jsonl")
                if self._board is not None:
                    self._board.close()
                    shutil.copytree(self.folder / "tensorboard", folder / "tensorboard", dirs_exist_ok=True)
                receipt = self.meter.receipt(
                    self.kind,
                    self.out.name,
                    self.config.model_dump(mode="json"),
                    self.parents,
                    folder,
                    describe_machine(),
                    None if self.peak is None else self.peak * self.parallel.world,
                    self.config.price,
                    self.parallel.world if self.parallel.device.type == "cuda" else 1,
                    extra,
                )
                receipt.write(folder)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.parallel.barrier()


def training_state(model: Transformer, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and optimizer state as named tensors, gathered from all ranks."""
    tensors = {f"model/{name}": tensor for name, tensor in gathered(model).items()}
    return tensors | {f"optimizer/{name}": tensor for name, tensor in optimizer.state().items()}, {}


def restore(saved: State, model: Transformer, optimizer: Optimizer) -> None:
    """Take back what `training_state` gave."""
    load_gathered(model, saved.group("model"))
    optimizer.load(saved.group("optimizer"))


def _short(value: Any) -> Any:
    """Numbers to 9 significant digits: all that float32 holds."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return [_short(item) for item in value] if isinstance(value, list) else value
