"""Where a stage works until its artifact is whole: resumable state, metrics, and the finish.

A stage that writes to `out` works in `out.partial/`: `state-STEP/` (safetensors and JSON, written whole) and
`metrics.jsonl` (one line a step). Killed at any moment and run again with the same configuration, it goes on from the
last state; metrics written after that are dropped and written anew, so what is logged ends the same, clocks excepted.

    with Parallel.start() as parallel, Checkpointer(out, "sft", config, parallel) as work:
        saved = work.load()
        with Interrupts() as interrupts:
            for step in range(saved.step, steps):
                ...
                work.log({"step": step + 1, "loss": loss})
                work.keep(step + 1, state, stop=interrupts.asked)  # saves now and then, and before stopping at Ctrl-C
        work.finish(write_artifact)

The same work has the same configuration and reads the same content (training/identity.py); anything else found in
`out.partial` is put aside. One process at a time works on an `out`; a second is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import lock, new_folder, put_aside, read_json, read_text, unlock, write_json, write_text
from slingshot.checkpoint.adapter import write_adapter
from slingshot.checkpoint.load_save import open_weights, save_checkpoint
from slingshot.cost.receipt import Meter, Parent
from slingshot.machine.device import auto_dtype, auto_threads, describe_machine, dtype_name, machine_peak
from slingshot.model.config import ModelConfig
from slingshot.model.stored import holds_stored
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.identity import Identity, content_digest, inputs
from slingshot.training.interrupts import Interrupts
from slingshot.training.lora import adapters, merged
from slingshot.training.optimizer import Optimizer
from slingshot.training.parallel import Parallel, agree
from slingshot.training.state import State, StateWriter, cannot_write

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # TensorBoard is not a dependency; installed, it is used
    SummaryWriter = None  # type: ignore[assignment, misc]

_NOTHING_YET = {".lock", "identity.json"}  # of a working folder in which no work was done
Named = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and JSON


class Checkpointer:
    """The working folder of one run of one stage. Only the first rank writes, but for its rows of the state.

    `reads`: where what the config names lies, by name. What `auto` means is decided once, by the first rank, and kept
    for a resume: `dtype` (of activations) and threads. `peak`: a process's measured matrix peak in that dtype, FLOP/s.
    """

    dtype: torch.dtype  # of stages that compute
    peak: float | None = None

    def __init__(self, out: Path, kind: str, config: StageConfig, parallel: Parallel) -> None:
        self.out, self.kind, self.config, self.parallel = out, kind, config, parallel
        self._refuse_what_exists()
        self.folder = out.with_name(f"{out.name}.partial")
        self.reads = inputs(config)
        self.meter = Meter()
        self._saved_at, self._step_at = time.monotonic(), (time.perf_counter(), 0.0)
        self._board: Any = None
        self._lock: int | None = None
        self._writing: StateWriter | None = None
        self._chosen: dict[str, Any] = {}

    def __enter__(self) -> Self:
        digests = {name: content_digest(path) for name, path in self.reads.items()}
        if self.parallel.mesh is not None:
            contents = {f"content of {name}": digest for name, digest in digests.items()}
            agree({"stage": self.kind, "out": str(self.out.absolute()), **self.config.flat(), **contents})
        if self.parallel.is_first:
            self._lock = lock(self.folder)
            try:
                self._open(digests)
            except BaseException as error:
                self.__exit__(type(error))
                raise
        self._chosen = self.parallel.agree(self._chosen)
        torch.set_num_threads(self._chosen["threads"])
        if self._chosen["dtype"] in ("float32", "bfloat16"):
            self.dtype = getattr(torch, self._chosen["dtype"])
            self.peak = machine_peak(self.dtype, self.parallel.device)
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if self._writing is not None:
            self._writing.wait()
        if self._lock is not None:
            if kind and issubclass(kind, Exception) and {p.name for p in self.folder.glob("*")} <= _NOTHING_YET:
                shutil.rmtree(self.folder, ignore_errors=True)  # refused before it began
            unlock(self._lock)

    def _refuse_what_exists(self) -> None:
        if self.out.exists() or not self.out.name:
            raise SlingshotError(f"{self.out} exists already; remove it or choose another --out")

    def _open(self, digests: dict[str, str]) -> None:
        """Find the folder of this very work, or begin one; decide what `auto` means."""
        self._refuse_what_exists()  # now that nobody else can make it
        self.parents = [Parent(path=str(self.reads[name]), digest=digest) for name, digest in digests.items()]
        identity = Identity(self.kind, self.config.model_dump(mode="json"), digests)
        mark = self.folder / "identity.json"
        begun = read_json(mark) if mark.exists() else {}
        if changes := self._changes(begun, identity):
            begun, kept = {}, put_aside(self.folder)
            print(f"{self.out.name}: what was begun is another stage ({changes}); kept in {kept}", file=sys.stderr)
            self.__exit__()
            self._lock = lock(self.folder)
        self._chosen = self._choose(begun.get("chosen", {}))
        write_json(mark, asdict(identity) | {"chosen": self._chosen})
        for unfinished in self.folder.glob(".*.tmp"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()

    def _changes(self, begun: Any, identity: Identity) -> str:
        """Why what lies in the folder is not the work that `identity` asks for; empty if it is, or nothing is there."""
        if begun == {} and not list(self.folder.glob("[!.]*")):
            return ""
        if not isinstance(begun, dict) or not begun.keys() >= {"kind", "config", "digests"}:
            return "of an earlier version"
        before = Identity(begun["kind"], begun["config"], begun["digests"])
        return ", ".join(identity.differences(before, type(self.config)))

    def _choose(self, before: dict[str, Any]) -> dict[str, Any]:
        """What `auto` means, as it was chosen `before`."""
        device, dtype = self.parallel.device, getattr(self.config, "dtype", None)
        if dtype == "auto":
            dtype = before.get("dtype") or dtype_name(auto_dtype(device))
        if device.type != before.get("device", device.type):
            print(f"{self.out.name}: begun on {before['device']}, goes on on {device.type}", file=sys.stderr)
        threads = self.config.threads or before.get("threads") or auto_threads(self._width())
        return {"device": device.type, "dtype": dtype, "threads": threads}

    def _width(self) -> int:
        """The hidden size of the model at work, on which the best number of threads depends."""
        model = getattr(self.config, "start", None) or getattr(self.config, "model", None)
        if isinstance(model, dict):
            return ModelConfig.parse({"vocab_size": 1, **model}, "model").hidden_size
        with suppress(SlingshotError):  # what cannot be read is for the stage to say
            return open_weights(self.reads[model]).config.hidden_size if model in self.reads else 256
        return 256

    def load(self) -> State:
        """The last state saved by an earlier run, that of the start if there is none; drops metrics of later steps."""
        states = self._states()
        state = State(states[max(states)] if states else None)
        if state:
            self.meter = Meter(state.meter)
            if not self.parallel.is_first:  # what all ranks spent is the first one's
                self.meter.tokens, self.meter.flops_by_part = 0, dict.fromkeys(self.meter.flops_by_part, 0.0)
        if self.parallel.is_first:
            self._cut_metrics(state.step)
            if SummaryWriter is not None:
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.step + 1)
        self.parallel.barrier()
        self._step_at = time.perf_counter(), self.meter.flops
        return state

    def _states(self) -> dict[int, Path]:
        return {int(path.name.removeprefix("state-")): path for path in self.folder.glob("state-*")}

    def _cut_metrics(self, step: int) -> None:
        """Keep the lines up to this step; a line that a power cut tore or filled with zeros ends them too."""
        metrics = self.folder / "metrics.jsonl"
        kept = []
        for line in read_text(metrics).splitlines(keepends=True) if metrics.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break
            at = row.get("step") if isinstance(row, dict) else None
            if not line.endswith("\n") or not isinstance(at, int) or at > step:
                break
            kept.append(line)
        write_text(metrics, "".join(kept))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line of metrics; the row holds its `step`. A value that is not finite stops the stage instead."""
        for name, value in row.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise self._diverged(f"{name} is {number} at step {row['step']}")
        if not self.parallel.is_first:
            return
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: _short(value) for key, value in row.items()}) + "\n")
        except OSError as error:
            raise cannot_write(self.folder, error.strerror or error) from error
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, row["step"])

    def speed(self, tokens: int) -> dict[str, float]:
        """Clocks of the step that just ended: `tokens` over all ranks, and this rank's FLOPs since the step before."""
        began, before = self._step_at
        self._step_at = now, flops = time.perf_counter(), self.meter.flops
        row = {"seconds": self.meter.seconds, "tokens_per_second": tokens / (now - began)}
        if self.peak:
            row["mfu"] = (flops - before) / (now - began) / self.peak
        return row

    def _diverged(self, what: str) -> SlingshotError:
        kept = f"the state of step {max(self._states(), default=0)} is kept in {self.folder}"
        return SlingshotError(f"{self.out.name}: {what}; {kept}; lower the learning rate and run again")

    def keep(self, step: int, state: Callable[[], Named], stop: bool = False) -> None:
        """Save now and then; to `stop`, save at once and raise KeyboardInterrupt. `state` is called on every rank."""
        due = time.monotonic() - self._saved_at >= self.config.save_seconds
        writes = self._writing is not None and not self._writing.done
        urgency, busy = self.parallel.maxima(2 if stop else int(due), int(writes))
        if urgency == 2 or not busy:
            self._commit()
        if urgency == 0 or (busy and urgency < 2):
            return
        self._saved_at = time.monotonic()
        if self.parallel.is_first and (metrics := self.folder / "metrics.jsonl").exists():
            with metrics.open("rb") as file:
                os.fsync(file.fileno())  # before the state that counts on them
        tensors, info = state()
        said = {"step": step, "meter": self.meter.state() | self._spent(), "info": info}
        self._writing = StateWriter(self.folder / f"state-{step}", self.parallel, tensors, said)
        if urgency == 2 or not self._writing.behind:
            self._commit()
        if urgency == 2:
            raise KeyboardInterrupt

    def _commit(self) -> None:
        """End the state that is being written, if one is; only the last one is kept."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.commit()
            for path in self._states().values() if self.parallel.is_first else ():
                if path != writing.folder:
                    shutil.rmtree(path)

    def _spent(self) -> dict[str, Any]:
        """The meter's tokens and FLOPs, of all ranks."""
        parts = self.parallel.sums({"tokens": self.meter.tokens, **self.meter.flops_by_part})
        return {"tokens": int(parts.pop("tokens")), "flops_by_part": parts}

    def finish(self, write: Callable[[Path], None], extra: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write the artifact with its metrics and receipt, whole or not at all, and remove the working folder."""
        self._commit()  # should the artifact not be written, there is the last state
        spent = self._spent()
        self.meter.tokens, self.meter.flops_by_part = spent["tokens"], spent["flops_by_part"]
        if self.parallel.is_first:
            with Interrupts(), new_folder(self.out) as folder:  # a Ctrl-C waits for the little that is left
                write(folder)
                if (self.folder / "metrics.jsonl").exists():
                    shutil.copyfile(self.folder / "metrics.jsonl", folder / "metrics.jsonl")
                if self._board is not None:
                    self._board.close()
                    shutil.copytree(self.folder / "tensorboard", folder / "tensorboard", dirs_exist_ok=True)
                dp_size, config = self.parallel.dp_size, self.config.model_dump(mode="json")
                self.meter.receipt(
                    self.kind, self.out.name, config, self.parents, folder, describe_machine(self.parallel.device),
                    peak=None if self.peak is None else self.peak * dp_size, price=self.config.price,
                    devices=dp_size if self.parallel.device.type != "cpu" else 1,
                    extra={**extra, "chosen": self._chosen},
                ).write(folder)  # fmt: skip
            shutil.rmtree(self.folder, ignore_errors=True)
        self.parallel.barrier()

    def finish_checkpoint(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        source: Path | None = None,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`finish` with the model (made from the checkpoint `source`), unless its last update has broken it."""
        if self.parallel.max(int(not _computes(model))):
            raise self._diverged("after the last update the weights or the logits hold NaN or infinite values")
        state, beside = (self.parallel.gathered(each) for each in (merged(model), adapters(model)))
        alone = holds_stored(model)  # merged, its numbers would have to be rounded anew

        def write(folder: Path) -> None:
            if not alone:
                save_checkpoint(folder, model, tokenizer, state, source=source)
            if lora := getattr(self.config, "lora", None):
                place = folder if alone else folder / "adapter"
                place.mkdir(exist_ok=True)
                write_adapter(place, beside, lora.rank, lora.alpha, getattr(self.config, "model", ""))

        self.finish(write, extra)

    @staticmethod
    def training_state(model: Transformer, optimizer: Optimizer, reference: Transformer | None = None) -> Named:
        """Weights (of a frozen base what is beside it) and optimizer state as named tensors, sharded as they are."""
        states = {"model": adapters(model) or model.state_dict(), "optimizer": optimizer.state()}
        if reference is not None:
            states["reference"] = reference.state_dict()
        named = {f"{group}/{name}": tensor for group, state in states.items() for name, tensor in state.items()}
        return named, {}


@torch.no_grad()
def restore(saved: State, model: Transformer, optimizer: Optimizer, reference: Transformer | None = None) -> None:
    """Take back what `Checkpointer.training_state` gave, and close the state. What was not saved is as it was: a frozen
    base."""
    for group, network in {"model": model, "reference": reference}.items():
        for name, target in network.state_dict().items() if network is not None else ():
            if f"{group}/{name}" in saved:
                target.copy_(saved.read(f"{group}/{name}", target))

    def read(name: str, like: Tensor) -> Tensor | None:
        return saved.read(f"optimizer/{name}", like) if f"optimizer/{name}" in saved else None

    optimizer.load(read)
    saved.close()


@torch.no_grad()
def _computes(model: Transformer) -> bool:
    """Whether this rank's weights and the logits of a few tokens are finite; of huge weights only the former are.

    Numbers of 8 bits and less were so when they were stored.
    """
    tokens_BT = torch.arange(min(8, model.config.vocab_size, model.config.max_position_embeddings))[None]
    device = next(model.parameters()).device
    logits = model(tokens_BT.to(device), segments_BT=torch.ones_like(tokens_BT).to(device)).logits_BTV
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in model.state_dict().values()]
    wide = [tensor for tensor in (logits, *local) if tensor.is_floating_point() and tensor.itemsize > 1]
    return all(bool(tensor.isfinite().all()) for tensor in wide)


def _short(value: Any) -> Any:
    """Numbers to 9 significant digits: all that float32 holds."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return [_short(item) for item in value] if isinstance(value, list) else value
