"""One program, any number of processes: who am I, sharding from outside the model, sums over ranks.

    with Parallel.start(expert_parallel=2) as parallel:      # one process, or what torchrun's RANK and WORLD_SIZE say
        parallel.shard(model)
        total = parallel.sums({"tokens": count})

The mesh is dp x ep. Every rank has data of its own. Order inside `shard`: the experts over ep (all-to-all), then over
dp (FSDP2), then what is left of each block, and the root, over all ranks (FSDP2).

A run that fails on one rank ends on all: the first rank that fails says why in a line, those it takes along end without
a word.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slingshot import __version__
from slingshot.base.errors import SlingshotError
from slingshot.machine.device import auto_device
from slingshot.machine.memory import keep_memory
from slingshot.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


Row = TypeVar("Row")


@dataclass
class Parallel:
    """This process among `dp_size` that share the data, of which each `ep_size` share experts; alone without a mesh."""

    dp_rank: int = 0
    dp_size: int = 1
    ep_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    store: Any = None  # torch's, of names and numbers that all processes can read, also when one of them is gone

    @classmethod
    def start(cls, expert_parallel: int = 1, trains: bool = True) -> Parallel:
        """Join the other processes. Which kind of device all of them use is the first one's decision.

        trains: steps will take and free the same memory over and over, and this process keeps it.
        """
        if trains:
            keep_memory()
        device, size = auto_device(), int(os.environ.get("WORLD_SIZE", "1"))
        if size % expert_parallel:
            raise SlingshotError(f"expert_parallel: {expert_parallel} is no divisor of {size} processes; see --nproc")
        if size == 1:
            return cls(device=device)
        # here, because they take half a second that a single process saves
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.rendezvous import rendezvous

        store = None
        if not dist.is_initialized():
            own = "" if device.type == "cpu" else f",{device.type}:{dist.get_default_backend_for_device(device)}"
            at_end = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from torchrun, when another one never came
            store, rank, size = next(rendezvous("env://"))
            dist.init_process_group(f"cpu:gloo{own}", store=store, rank=rank, world_size=size)
            signal.signal(signal.SIGTERM, at_end)
        parallel = cls(dist.get_rank(), size, expert_parallel, store=store)
        try:
            agree({"slingshot": __version__, "torch": torch.__version__, "expert_parallel": expert_parallel})
        except SlingshotError as error:
            raise parallel._ending(error) from None
        device = torch.device(_texts(device.type)[0])
        if device.type != "cpu":
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
            torch.accelerator.set_device_index(device.index)
        shape = size // expert_parallel, expert_parallel
        parallel.device, parallel.mesh = device, init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ep"))
        return parallel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.mesh is not None and error is None:
            dist.destroy_process_group()
        elif self.mesh is not None and error is not None and (ending := self._ending(error)) is not error:
            raise ending from None

    def _ending(self, error: BaseException) -> BaseException:
        """What this process ends with where it met an error: that, in a line with its rank; or nothing to be said,
        where another rank has failed before."""
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        asked = isinstance(error, KeyboardInterrupt)  # also by torchrun, of all others when one has failed
        own, failed = int(not asked), 0
        with suppress(RuntimeError):  # the store may be gone, too
            failed = self.store.add("failed", own) - own if self.store is not None else 0
        if failed and (lost or asked or isinstance(error, SlingshotError)):
            return SystemExit(1)
        if lost:
            gone = "another process is gone, killed or out of memory"
            return SlingshotError(f"rank {self.dp_rank}: {gone}; run the same command to go on")
        if isinstance(error, SlingshotError) and not str(error).startswith("rank "):
            return SlingshotError(f"rank {self.dp_rank}: {error}")
        return error

    @property
    def is_first(self) -> bool:
        return self.dp_rank == 0

    def mine(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This rank's share of rows that all ranks have; `gather` puts what became of them in order again."""
        return rows[self.dp_rank :: self.dp_size]

    def shard(self, model: Transformer) -> None:
        """Shard parameters, gradients and optimizer state over the ranks, block by block."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        from slingshot.training.expert_parallel import share_experts

        for moe in model.moe_layers() if self.ep_size > 1 else ():
            share_experts(moe, self.mesh["ep"])
            fully_shard(moe.experts, mesh=self.mesh["dp"])
        everyone = self.mesh["dp"] if self.ep_size == 1 else self.mesh._flatten("ranks")
        for layer in model.model.layers:
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)

    def _all(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.mesh is not None:
            dist.all_reduce(tensor, operation)
        return tensor

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on the device where the tensor is."""
        return self._all(value.detach().clone())

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over ranks of named numbers; in float64 on the CPU, since not every accelerator has it."""
        total = self._all(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def max(self, value: int) -> int:
        return self.maxima(value)[0]

    def maxima(self, *values: int) -> list[int]:
        """Of each number the largest that a rank has."""
        return [int(value) for value in self._all(torch.tensor(values), dist.ReduceOp.MAX)]

    def gather(self, rows: list[Any]) -> list[Any]:
        """Every rank's JSON rows, interleaved as the ranks took them: row i of rank r was row i * dp_size + r."""
        if self.mesh is None:
            return rows
        lists = [json.loads(text) for text in _texts(json.dumps(rows))]
        return [part[i] for i in range(max(map(len, lists))) for part in lists if i < len(part)]

    def gathered(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict with whole tensors on the first rank, itself where it is alone; on the others it is empty."""
        if self.mesh is None:
            return state
        tensors = ((name, whole(tensor)) for name, tensor in state.items())  # which takes all ranks, one by one
        return {name: tensor for name, tensor in tensors if self.is_first}

    def agree(self, value: Any) -> Any:
        """The first rank's value, JSON, on every rank."""
        return self.gather([value])[0]

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def agree(said: Mapping[str, Any]) -> None:
    """SlingshotError, on every rank, where one says something else of itself than the first does (JSON, by name)."""
    first, *others = (json.loads(text) for text in _texts(json.dumps(said)))
    for rank, other in enumerate(others, start=1):
        for name in first | other:
            if (its := other.get(name)) != (value := first.get(name)):
                raise SlingshotError(f"rank {rank} has {name} {its}, rank 0 {value}; start all ranks alike")


def _texts(text: str) -> list[str]:
    """Every process's text, on all of them. As bytes in tensors: torch's own exchange of objects unpickles."""
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([content.numel()]))
    longest = int(max(sizes))
    padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(content, (0, longest - content.numel())))
    return [bytes(part[: int(size)].tolist()).decode() for part, size in zip(padded, sizes, strict=True)]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a DTensor), on every rank; one that is not is given back as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def placed_like(rows: Tensor, target: Tensor) -> Tensor:
    """This rank's rows of a tensor, on the device of `target` and a DTensor where that is one."""
    rows = rows.to(target.device).contiguous()
    if not hasattr(target, "full_tensor"):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(target, DTensor)
    mesh, placements = target.device_mesh, target.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=target.shape, stride=target.stride())
