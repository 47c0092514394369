"""Optimizer state away from the parameters: in the host's memory, or in files that are mapped into it.

    place = StatePlace(parameters, torch.float32, offload="host")       # or a folder, or None: beside its parameter
    kept = place.zeros_like(parameter)
    value = place.taken(kept, parameter)       # as the parameter is: on its device, in its dtype
    place.put_back(value, kept)

Parameters are updated one after another, so that no more than one's state is there at a time. A file has no name: it is
gone when the process is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from slingshot.base.errors import SlingshotError
from slingshot.base.files import os_errors
from slingshot.machine.memory import MADV_DONTNEED, advise

HOST = "host"


class StatePlace:
    """Where what an optimizer keeps of parameters lies, and in which dtype: None is the parameter's own."""

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype | None, offload: str | None) -> None:
        """SlingshotError where `offload` could do nothing."""
        self.dtype, self.offload = dtype, offload
        if offload is None:
            return
        for parameter in parameters:
            if hasattr(parameter, "to_local"):
                what = "parameters of several processes keep their state"
                raise SlingshotError(f"optimizer.offload: {what}; leave it out")
            if offload == HOST and parameter.device.type == "cpu":
                way = "name a folder, or leave it out"
                raise SlingshotError(f"optimizer.offload: host is where the parameters are; {way}")

    def moves(self, parameter: nn.Parameter) -> bool:
        """Whether state is something else than what a step computes with."""
        return self.offload is not None or self.dtype not in (None, parameter.dtype)

    def zeros_like(self, parameter: nn.Parameter) -> Tensor:
        """SlingshotError where there is no room in the folder."""
        if self.offload is None:
            return torch.zeros_like(parameter, dtype=self.dtype)
        dtype = self.dtype or parameter.dtype
        if self.offload == HOST:
            return torch.zeros(parameter.shape, dtype=dtype, pin_memory=parameter.is_cuda)
        size = max(parameter.numel(), 1)
        with os_errors(f"optimizer.offload: {self.offload}"):
            Path(self.offload).mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.offload) as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk says so now
                    os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
                mapped = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        return mapped[: parameter.numel()].view(parameter.shape)

    def copy(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A copy of what was kept of a parameter elsewhere."""
        kept = self.zeros_like(parameter)
        self.put_back(value, kept)
        return kept

    def taken(self, kept: Tensor, parameter: nn.Parameter) -> Tensor:
        """What is kept, as a step computes with it: itself where it is the same."""
        return kept.to(parameter.device, parameter.dtype)

    def put_back(self, value: Tensor, kept: Tensor) -> None:
        """Keep this. Pages of a file leave the process; the system writes them when it wants the memory."""
        if value is not kept:
            kept.copy_(value)
        if self.offload not in (None, HOST) and kept.numel():
            advise(kept.data_ptr(), kept.nbytes, MADV_DONTNEED)
