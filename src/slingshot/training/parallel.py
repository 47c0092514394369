"""One program, any number of processes: who am I, sharding from outside the model, sums over ranks.

    parallel = Parallel.start(threads=0)         # one process, or what torchrun's RANK and WORLD_SIZE say
    parallel.shard(model)                        # FSDP2; expert parallelism will be applied here first, before fully_shard
    total = parallel.sum(count)

Order inside `shard`, each from outside the model: (expert parallelism, when it comes), then `fully_shard` on each block and the root.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from slingshot.machine.device import auto_device
from slingshot.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Parallel:
    """This process among `world`; `mesh` is None when it is alone."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None

    @classmethod
    def start(cls, threads: int = 0) -> Parallel:
        if threads:
            torch.set_num_threads(threads)
        device, world = auto_device(), int(os.environ.get("WORLD_SIZE", "1"))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world == 1:
            return cls(0, 1, device, None)
        from torch.distributed.device_mesh import (
            init_device_mesh,  # here, because it takes half a second that a single process saves
        )

        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), world, device, init_device_mesh(device.type, (world,)))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, model: Transformer) -> None:
        """Shard parameters, gradients and optimizer state over the ranks, block by block (FSDP2)."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)

    def sum(self, value: float | Tensor) -> Tensor:
        """The sum over ranks, in float64 for plain numbers."""
        tensor = (
            value.detach().clone()
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=torch.float64, device=self.device)
        )
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over ranks of named numbers, in one message."""
        return dict(
            zip(
                values,
                self.sum(torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)).tolist(),
                strict=True,
            )
        )

    def max(self, value: int) -> int:
        tensor = torch.tensor(value, device=self.device)
        if self.mesh is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, rows: list[Any]) -> list[Any]:
        """Every rank's JSON rows, interleaved as the ranks took them (row i of rank r was row i * world + r)."""
        if self.mesh is None:
            return rows
        content = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([content.numel()], device=self.device))
        longest = int(max(sizes))
        padded = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world)]
        dist.all_gather(padded, torch.nn.functional.pad(content, (0, longest - content.numel())))
        parts = [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(padded, sizes, strict=True)]
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()

    def stop(self) -> None:
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a DTensor), on every rank."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def sharded_like(full: Tensor, target: Tensor) -> Tensor:
    """`full` on the device of `target`, sharded as it is: this rank's part where `target` is a DTensor, else all of it."""
    full = full.to(target.device)
    if not hasattr(target, "full_tensor"):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(full, target.device_mesh, target.placements)


def gathered(model: Transformer) -> dict[str, Tensor]:
    """The whole state dict on every rank, sharded or not."""
    return {name: whole(value) for name, value in model.state_dict().items()}


@torch.no_grad()
def load_gathered(model: Transformer, state: dict[str, Tensor]) -> None:
    """Copy a whole state dict into a model, sharded or not."""
    for name, target in model.state_dict().items():
        target.copy_(sharded_like(state[name], target))
